"""What the images install: enough to serve with, nothing that serving does not import, and no torch."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from fptq_export.cpu.build import extension_path, operators_path
from fptq_export.cpu.extension import BUILD_COMMAND
from fptq_export.runtime import Sampling, Session
from tests.containers.conftest import SAMPLE
from tests.containers.installed import requirements_from_file
from tests.containers.steps import Stage

LISTED = requirements_from_file(SAMPLE / "requirements.serve.txt")
PROMPT = "The licence of a program"
TOKENS = 4
IMPORTED_LATER = {"jinja2"}
"""Needed once a chat comes: the model of the test has no chat template."""
_ANSWER = f"""
import json, sys
from fptq_export.runtime import Sampling, Session
with Session.open(sys.argv[1], backend="onnxruntime", threads=1) as session:
    completion = session.generate({PROMPT!r}, Sampling(max_tokens={TOKENS}, ignore_eos=True))
imported = sorted({{name.partition(".")[0] for name in sys.modules}})
print(json.dumps({{"token_ids": completion.token_ids, "runs": session.model.name, "imported": imported}}))
"""


@dataclass(frozen=True)
class Answer:
    """What a Python of the image gave."""

    token_ids: list[int]
    runs: str
    """Name of the model, which says what computes its linears."""
    imported: list[str]
    """Modules and packages, top level."""


Ask = Callable[[str, str], Answer]
"""Image and program -> what its Python gives."""


@pytest.fixture(scope="session")
def ask(images: Mapping[str, Stage], base_image: Mapping[str, str], installed: Path, finished_run: Path) -> Ask:
    """The Python of an image answers from a run directory, with the packages that the image installs."""

    def answer(image: str, program: str) -> Answer:
        stage = images[image]
        done = subprocess.run(
            [f"{stage.variables['VENV']}/bin/python", "-c", program, str(finished_run / "run")],
            env={**base_image, **stage.variables, "PYTHONPATH": str(installed)},
            cwd=stage.root,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Answer(**json.loads(done.stdout))

    return answer


@pytest.fixture(scope="session")
def answer(ask: Ask) -> Answer:
    """What the CPU image gives once it has imported its server."""
    return ask("cpu", f"import fptq_export.serve.app, fptq_export.serve.server\n{_ANSWER}")


def test_image_answers_as_this_environment_does(answer: Answer, finished_run: Path) -> None:
    """The packages of the image are enough, and the text is that of a full install."""
    with Session.open(finished_run / "run", backend="onnxruntime", threads=1) as session:
        expected = session.generate(PROMPT, Sampling(max_tokens=TOKENS, ignore_eos=True))
    assert tuple(answer.token_ids) == expected.token_ids


@pytest.mark.parametrize("image", ["cpu", "triton"])
def test_image_runs_the_cpu_kernels(ask: Ask, image: str) -> None:
    """They are where the package looks for them, and load without what compiled them."""
    if not (operators_path().is_file() and extension_path().is_file()):
        pytest.skip(f"the CPU kernels are not built here, so none stand for the image's; next: {BUILD_COMMAND}")
    assert ask(image, _ANSWER).runs == "model.w4a8.onnx (CPU kernels)"


def test_image_installs_no_torch(installed: Path) -> None:
    """Torch and transformers, gigabytes of them, are neither listed nor required by what is."""
    assert {"torch", "transformers"}.isdisjoint(path.name for path in installed.iterdir())


def test_every_listed_package_is_imported(answer: Answer) -> None:
    """What serving stops to need leaves the image."""
    distributions = packages_distributions()
    used = {canonicalize_name(name) for module in answer.imported for name in distributions.get(module, [])}
    assert {canonicalize_name(requirement.name) for requirement in LISTED} - used == IMPORTED_LATER
