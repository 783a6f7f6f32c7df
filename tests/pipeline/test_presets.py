"""`--preset`: one name for several options."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fptq_export.cli.arguments import options_from_namespace
from fptq_export.cli.presets import PRESETS
from fptq_export.options import RunOptions
from fptq_export.package.manifest import read_manifest
from fptq_export.pipeline.summary import print_summary
from tests.pipeline.conftest import SMALL, Command

GIVEN = {"model": "model", "output": "run"}


def options(**given: Any) -> RunOptions:
    """Those of a command line with so much on it."""
    return options_from_namespace("run", GIVEN | given)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_changes_what_it_says_and_nothing_else(name: str) -> None:
    """Each of its fields, and every other one has its default."""
    changed = {
        field: getattr(options(preset=name), field)
        for field in RunOptions.model_fields
        if getattr(options(preset=name), field) != getattr(options(), field)
    }
    assert changed == dict(PRESETS[name])


def test_the_paper_is_the_default() -> None:
    """Without the option nothing changes."""
    assert options(preset="paper") == options()


def test_options_that_are_given_win() -> None:
    """Wherever they stand."""
    found = options(preset="accurate", weight_method="gptq+cd", v1=150.0)
    assert (found.weight_method, found.v0, found.v1, found.equalizer) == ("gptq+cd", 0.0, 150.0, "search")


def test_a_preset_reaches_the_run(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """Later verbs go on with its options, as with all others."""
    outcome = command(tiny_llama_dir, "-o", run_copy, "--preset", "balanced", *SMALL, "--no-verify")
    assert outcome.code == 0, outcome.err
    manifest = read_manifest(run_copy)
    assert manifest is not None
    assert (manifest.options.weight_method, manifest.options.equalizer) == ("gptq", "search")


@pytest.mark.parametrize(
    ("method", "increase", "hints"), [("rtn", 0.06, True), ("rtn", 0.04, False), ("gptq", 0.06, False)]
)
def test_who_lost_much_with_the_paper_is_told_of_them(
    run_copy: Path, method: str, increase: float, hints: bool
) -> None:
    """At the end of the run; not who lost little, and not who has better weights already."""
    verify = run_copy / "verify.json"
    document = json.loads(verify.read_text())
    document["perplexity_increase"] = increase
    verify.write_text(json.dumps(document))
    manifest = read_manifest(run_copy)
    assert manifest is not None
    changed = manifest.options.model_copy(update={"weight_method": method, "output": run_copy})
    printed = io.StringIO()
    print_summary(manifest.model_copy(update={"options": changed}), Console(file=printed, width=200))
    assert ("--preset balanced" in printed.getvalue()) is hints


def test_no_such_preset(tiny_llama_dir: Path, tmp_path: Path, command: Command) -> None:
    """The names are listed, and nothing is written."""
    outcome = command(tiny_llama_dir, "-o", tmp_path / "run", "--preset", "best")
    assert outcome.code == 1
    assert "--preset best" in outcome.err
    assert "paper, balanced, accurate" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_run_directory_has_its_options(run_copy: Path, command: Command) -> None:
    """Verbs that go on from a run take none: it would be half of one."""
    outcome = command("rewrite", run_copy, "--preset", "accurate")
    assert outcome.code == 1
    assert "--preset" in outcome.err
