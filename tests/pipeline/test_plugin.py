"""`--plugin on` from the command line to an engine whose linears are plugin layers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from fptq_export.build.proof import Proof
from fptq_export.errors import ExitCode
from fptq_export.files import read_json_model, sha256_from_file
from fptq_export.plugin.library import DIRECTORY_VARIABLE, LOADED_LIBRARY
from tests.pipeline.conftest import FILES, Command
from tests.support.plugin import built_double

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the plugin is built on Linux only")


IN_THE_ENGINE = r"plugin library .* in the engine"
"""A row of a table."""


@pytest.fixture
def plugin_directory(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plugin with a double of its kernels, where the command looks for it."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(built_double()))
    return built_double()


@pytest.mark.parametrize(("option", "layers"), [("--fuse-projections", 8), ("--no-fuse-projections", 14)])
def test_every_linear_runs_in_the_plugin(
    run_copy: Path, tmp_path: Path, command: Command, plugin_directory: Path, option: str, layers: int
) -> None:
    """All 14 linears of the tiny model run in the plugin, in 4 layers a block where q, k, v and gate, up are fused."""
    words = ("build", run_copy, "--engine", tmp_path / "plugin.plan", "--plugin", "on", option)
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    record = json.loads((run_copy / "manifest.json").read_text())["stages"]["build"]["summary"]
    assert (record["plugin_linears"], record["quantized_linears"], record["not_in_plugin"]) == (14, 14, {})
    assert record["plugin_layers"] == record["layers_by_type"]["custom_layer"] == layers
    assert {path.name for path in run_copy.iterdir()} - {".lock"} == FILES
    proof = read_json_model(run_copy / "proof.json", Proof)
    assert (proof.verdicts(), proof.engine.plugin_layers) == ({"proven": 15}, layers)
    assert proof.engine.plugin is not None
    assert ("14 in 8 layers" in outcome.out) == (layers == 8)
    assert "build: up to date" in command(*words).err


def test_projections_are_fused_unless_told_otherwise(
    run_copy: Path, tmp_path: Path, command: Command, plugin_directory: Path
) -> None:
    """The option is on by default, and another choice builds the engine again.

    Between the two builds: `doctor` finds the plugin that built the engine, says that this stand-in has no kernels,
    and names the plugin where it is missing.
    """
    words = ("build", run_copy, "--engine", tmp_path / "plugin.plan", "--plugin", "on")
    assert "14 in 8 layers" in command(*words).out
    asked = ("doctor", tmp_path / "plugin.plan", "--compute-capability", "8.0")
    present = command(*asked, "--json")
    checks = json.loads(present.out)["plan"]["checks"]
    assert [check["status"] for check in checks if check["what"] == "plugin"] == ["ok", "problem"]
    assert [check["text"] for check in checks if check["status"] == "problem"] == [
        "the plugin has no code for compute capability 8.0: it was built for no GPU"
    ]
    with pytest.MonkeyPatch.context() as without:
        without.setenv(DIRECTORY_VARIABLE, str(tmp_path))
        missing = command(*asked, "--json")
    assert missing.code == ExitCode.USER_ERROR
    assert "8 of its layers run in the plugin, which is missing" in missing.out
    outcome = command(*words, "--no-fuse-projections")
    assert outcome.code == 0, outcome.err
    assert "build: up to date" not in outcome.err
    assert "in 8 layers" not in outcome.out


def test_engine_carries_the_plugin_where_that_is_asked_for(
    run_copy: Path, tmp_path: Path, command: Command, plugin_directory: Path
) -> None:
    """The library is in the engine and recorded with its hash; `doctor` and `inspect` then ask for none."""
    plan, library = tmp_path / "plugin.plan", plugin_directory / LOADED_LIBRARY
    outcome = command("build", run_copy, "--engine", plan, "--plugin", "on", "--embed-plugin")
    assert outcome.code == 0, outcome.err
    assert re.search(IN_THE_ENGINE, outcome.out)
    assert library.read_bytes() in plan.read_bytes()
    facts = read_json_model(run_copy / "proof.json", Proof).engine
    assert facts.plugin is not None
    assert (facts.plugin.embedded, facts.plugin.sha256) == (True, sha256_from_file(library))
    with pytest.MonkeyPatch.context() as without:
        without.setenv(DIRECTORY_VARIABLE, str(tmp_path))
        present = command("doctor", plan, "--compute-capability", "8.0", "--json")
        assert re.search(IN_THE_ENGINE, command("inspect", plan).out)
    checks = [check for check in json.loads(present.out)["plan"]["checks"] if check["what"] == "plugin"]
    assert [check["status"] for check in checks] == ["ok", "problem"]  # the stand-in has no code for any GPU
    assert checks[0]["text"].endswith("which the engine carries")


def test_plugin_that_is_off_cannot_be_carried(run_copy: Path, tmp_path: Path, command: Command) -> None:
    """The option is refused where it would do nothing."""
    outcome = command("build", run_copy, "--engine", tmp_path / "native.plan", "--embed-plugin")
    assert outcome.code == 1
    assert "there is no plugin with --plugin off" in outcome.err


def test_without_the_option_there_is_no_plugin(run_copy: Path, tmp_path: Path, command: Command) -> None:
    """The default engine needs no library of ours."""
    outcome = command("build", run_copy, "--engine", tmp_path / "native.plan")
    assert outcome.code == 0, outcome.err
    record = json.loads((run_copy / "manifest.json").read_text())["stages"]["build"]["summary"]
    assert record["plugin_layers"] == 0
    assert "custom_layer" not in record["layers_by_type"]


def test_missing_library_is_refused_before_anything_is_built(
    run_copy: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The person learns the command that builds the library."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    outcome = command("build", run_copy, "--engine", tmp_path / "plugin.plan", "--plugin", "on")
    assert outcome.code == 1
    assert "python -m fptq_export.plugin build" in outcome.err
    assert not (tmp_path / "plugin.plan").exists()


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("--dtype", "fp32"), "the kernels compute in FP16 or BF16"),
        (("--target", "onnx"), "there is no engine with --target onnx"),
        (("--plugin", "maybe"), "--plugin"),
    ],
)
def test_what_the_plugin_cannot_do_is_refused(
    run_copy: Path, tmp_path: Path, command: Command, plugin_directory: Path, words: tuple[str, ...], cause: str
) -> None:
    """Wrong combinations end with 1 and a sentence, before a stage starts."""
    outcome = command("build", run_copy, "--engine", tmp_path / "plugin.plan", "--plugin", "on", *words)
    assert outcome.code == 1
    assert cause in outcome.err
    assert not (tmp_path / "plugin.plan").exists()
