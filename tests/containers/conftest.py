"""The build context, variables that stand for the base images, and the images: folders in which the steps were run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec

from fptq_export.cpu.build import extension_path, operators_path
from fptq_export.plugin.library import LOADED_LIBRARY, REGISTERING_LIBRARY
from tests.containers.installed import link_packages, requirements_from_file
from tests.containers.steps import Machine, Recipe, Stage, build, read_recipe

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "07_containers"
ALL_STEPS = os.environ.get("FPTQ_ALL_CONTAINER_STEPS") == "1"
"""Run the steps that download and compile too; takes minutes and the network."""
_OURS = ("fptq_export", "calib", "_editable_impl_fptq_export")
"""What an editable install of this repository has in site-packages: images get the package from its wheel."""


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """The Dockerfile; where the plugin is compiled here, for one architecture."""
    return read_recipe(SAMPLE / "Dockerfile", {"ARCHITECTURES": "80"})


@pytest.fixture(scope="session")
def build_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `docker build` sends from a clone: files of the repository that the ignore file lets through.

    Its patterns start with `/` or `**`: for those the rules of .gitignore, which pathspec knows, are Docker's.
    """
    target = tmp_path_factory.mktemp("context")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    ignored = GitIgnoreSpec.from_lines((SAMPLE / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines())
    for name in names:
        if (ROOT / name).is_file() and not ignored.match_file(name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="session")
def base_image(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Variables that stand for a Python image; nothing of pytest's own environment is in them.

    pip finds the packages of this environment installed and has no index: it resolves each requirement among the
    pins, and fails where one is missing. With FPTQ_ALL_CONTAINER_STEPS=1 the image is bare, and pip downloads.
    """
    home = tmp_path_factory.mktemp("home")
    common = {"HOME": str(home), "LANG": "C.UTF-8", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_COMPILE": "1"}
    if ALL_STEPS:
        subprocess.run([sys.executable, "-m", "venv", str(home / "python")], check=True, timeout=120)
        return {**common, "PATH": os.pathsep.join([str(home / "python" / "bin"), "/usr/bin", "/bin"])}
    site = home / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.split("-")[0].split(".")[0] not in _OURS:
            (site / entry.name).symlink_to(entry)
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    return {**common, "PATH": path, "PYTHONPATH": str(site), "PIP_NO_INDEX": "1"}


@pytest.fixture(scope="session")
def images(
    recipe: Recipe, build_context: Path, base_image: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Stage]:
    """Every stage of both images, carried out."""
    machine = Machine(build_context, base_image, stand_in_for_compilers)
    return build(recipe, ["cpu", "triton"], tmp_path_factory.mktemp("images"), machine)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install -r requirements.serve.txt` would have put into the image, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    link_packages(requirements_from_file(SAMPLE / "requirements.serve.txt"), folder)
    return folder


def stand_in_for_compilers(command: str, stage: Stage) -> bool:
    """Keep `apt-get` from this machine and, but for FPTQ_ALL_CONTAINER_STEPS=1, the compilers from being run.

    Empty files stand for the plugin libraries: later steps copy them. What `make kernels` compiled here, where it did,
    stands for the CPU kernels: later steps pack and load them.
    """
    if command.startswith("apt-get"):
        return True
    if ALL_STEPS:
        return False
    if "fptq_export.plugin build" in command:
        folder = Path(stage.variables["PLUGIN"])
        folder.mkdir(parents=True)
        for name in (LOADED_LIBRARY, REGISTERING_LIBRARY):
            (folder / name).write_bytes(b"")
        return True
    if "fptq_export.cpu build" in command:
        for built in filter(Path.is_file, (extension_path(), operators_path())):
            shutil.copy2(built, stage.directory / "fptq_export" / "cpu")
        return True
    return "requirements.plugin.txt" in command
