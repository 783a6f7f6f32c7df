"""Samples are run, so they cannot go stale. The conventions are in samples/README.md."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fptq_export.cli import main

ROOT = Path(__file__).parents[2]
SAMPLES = sorted(
    path for path in (ROOT / "samples").iterdir() if path.is_dir() and not path.name.startswith(("_", "."))
)
SECTIONS = ("Introduction", "Running the sample", "Files written")
SECONDS_PER_SAMPLE = 900
"""Finds what hangs. A sample takes two minutes, and several times that where other work shares its cores."""
STARTS = {
    "01_quickstart": ("smollm2_gguf", "smollm2_run"),
    "02_ablation": ("three_tiers_dir", "three_tiers_run"),
    "03_weight_methods": ("three_tiers_dir", "three_tiers_run"),
    "04_evaluate": ("smollm2_gguf", "smollm2_run"),
    "05_sentence_embeddings": ("smollm2_gguf", "minilm_run"),
}
"""Sample -> fixtures of its `MODEL`, and of what it finds in `run/`, as in a second run; that of 01_quickstart has its
options. 02 and 03 stay in torch, with fake quantization, as one of the systems of 04 does on SmolLM2."""
MODEL_ALONE = ("smollm2_gguf",)
"""Of the samples that find nothing."""
LOUD = {0: 10.0, 1: 100.0}
"""Layer -> factor of its norms, whose output is around 4 at most: all three tiers, as in SmolLM2."""

_SECTION = re.compile(r"^## +(.+?) *$", re.MULTILINE)
_BASH = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROMISE = re.compile(r"^- `([^`]+)`", re.MULTILINE)


def sections_of(readme: str) -> dict[str, str]:
    """Heading -> text of each second-level section."""
    parts = _SECTION.split(readme)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands_of(readme: str) -> str:
    """The fenced bash blocks under "Running the sample", in order, as one script."""
    return "\n".join(_BASH.findall(sections_of(readme)["Running the sample"]))


def promised_files(readme: str) -> set[str]:
    """The relative paths listed under "Files written"; folders without their trailing slash."""
    return {path.rstrip("/") for path in _PROMISE.findall(sections_of(readme)["Files written"])}


def unexpected(before: set[str], after: set[str], promised: set[str]) -> set[str]:
    """What appeared and was not promised, neither itself nor as part of a promised folder."""
    return {
        path for path in after - before if not any(path == name or path.startswith(f"{name}/") for name in promised)
    }


def files_below(folder: Path) -> set[str]:
    """Relative paths of all files in a folder, without bytecode."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if "__pycache__" not in path}


def test_there_is_a_sample() -> None:
    """The folder is not empty, so the tests below say something."""
    assert SAMPLES != []


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
def test_sample_has_its_sections_and_a_number(sample: Path) -> None:
    """A reader finds what it shows, how to run it and what it writes."""
    assert re.fullmatch(r"\d{2}_[a-z0-9_]+", sample.name)
    assert set(SECTIONS) <= set(sections_of((sample / "README.md").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def three_tiers_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA with loud layers."""
    directory = Path(shutil.copytree(tiny_llama_dir, tmp_path_factory.mktemp("loud") / "model"))
    tensors = load_file(directory / "model.safetensors")
    for layer, factor in LOUD.items():
        tensors[f"model.layers.{layer}.input_layernorm.weight"] *= np.float32(factor)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def three_tiers_run(three_tiers_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` with what `fptq-export trace` writes."""
    run = tmp_path_factory.mktemp("traced") / "run"
    assert main(["trace", str(three_tiers_dir), "-o", str(run)]) == 0
    logging.disable(logging.NOTSET)
    return run


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS_PER_SAMPLE)  # with the run that it starts from
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
def test_sample_runs_and_writes_what_it_promises(sample: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Its commands succeed in a copy of the folder; promised files appear and nothing else does."""
    readme = (sample / "README.md").read_text(encoding="utf-8")
    copy = Path(shutil.copytree(sample, tmp_path / sample.name))
    model, *runs = (request.getfixturevalue(name) for name in STARTS.get(sample.name, MODEL_ALONE))
    for run in runs:
        shutil.copytree(run, copy / "run")
    before = files_below(copy)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MODEL": str(model),
        "FPTQ_SAMPLE_QUICK": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands_of(readme)],
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS_PER_SAMPLE,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    promised = promised_files(readme)
    assert {name for name in promised if not (copy / name).exists()} == set(), "promised but not written"
    assert unexpected(before, files_below(copy), promised) == set(), "written but not promised"
    if sample.name == "02_ablation":
        tiers = json.loads((copy / "ablation.json").read_text(encoding="utf-8"))["layers"]
        assert tiers.keys() == {"static", "lae_static", "per_token"}, "a row of the table did nothing"


README = """# A sample

## Introduction

It shows.

## Running the sample

```bash
echo one
```

Then:

```bash
echo two
```

```text
echo never
```

## Files written

- `out/`: everything
- `table.txt`
"""


def test_reader_takes_bash_blocks_only() -> None:
    """Blocks in another language are text for people, not commands."""
    assert commands_of(README) == "echo one\n\necho two\n"


def test_files_outside_the_promise_are_reported() -> None:
    """A stray file is found; a file of a promised folder and one that was there before are left alone."""
    promised = promised_files(README)
    assert promised == {"out", "table.txt"}
    after = {"README.md", "out/a/b.onnx", "table.txt", "output.log"}
    assert unexpected({"README.md"}, after, promised) == {"output.log"}
