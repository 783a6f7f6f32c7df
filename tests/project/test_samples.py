"""Samples are run, so they cannot go stale. The conventions are in samples/README.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLES = sorted(
    path for path in (ROOT / "samples").iterdir() if path.is_dir() and not path.name.startswith(("_", "."))
)
SECTIONS = ("Introduction", "Running the sample", "Files written")
SECONDS_PER_SAMPLE = 900
"""Finds what hangs. A sample takes two minutes, and several times that where other work shares its cores."""
QUANTIZED_BEFORE = ("01_quickstart", "02_ablation", "03_weight_methods", "04_evaluate")
"""Samples that find a finished run in `run/`, as in a second run; that of 01_quickstart has its options."""
ENCODED_BEFORE = ("05_sentence_embeddings",)
"""Samples that find a finished run of the sentence encoder in `run/`."""

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


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS_PER_SAMPLE)  # with the run that some of them start from
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
def test_sample_runs_and_writes_what_it_promises(
    sample: Path, tmp_path: Path, smollm2_gguf: Path, request: pytest.FixtureRequest
) -> None:
    """Its commands succeed in a copy of the folder; promised files appear and nothing else does."""
    readme = (sample / "README.md").read_text(encoding="utf-8")
    copy = Path(shutil.copytree(sample, tmp_path / sample.name))
    if sample.name in QUANTIZED_BEFORE:
        shutil.copytree(request.getfixturevalue("smollm2_run"), copy / "run")
    if sample.name in ENCODED_BEFORE:
        shutil.copytree(request.getfixturevalue("minilm_run"), copy / "run")
    before = files_below(copy)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MODEL": str(smollm2_gguf),
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
