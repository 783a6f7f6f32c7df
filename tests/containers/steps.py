"""Carries out a Dockerfile below a directory, without containers: each stage has a folder of its own as its root.

Nothing is isolated, so a step may use no path that is not an ARG or made from one: an absolute path in `ARG`, `ENV` or
`WORKDIR` is moved below the stage's folder, and `COPY` writes there. `USER` is recorded, not switched to.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import WordSplitter

__all__ = ["Instruction", "Machine", "Recipe", "Stage", "build", "read_recipe"]

SECONDS_PER_STEP = 600
"""Finds what hangs: a step compiles for some minutes at most."""
_RECORDED = ("USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD", "LABEL", "STOPSIGNAL")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `RUN`, and what follows with its continuation lines joined."""

    name: str
    value: str


@dataclass(frozen=True)
class Recipe:
    """A Dockerfile: its global arguments, and the base and the instructions of each stage in order."""

    arguments: Mapping[str, str]
    bases: Mapping[str, str]
    """Stage -> what `FROM` names, arguments filled in."""
    stages: Mapping[str, tuple[Instruction, ...]]

    def needed_by(self, target: str) -> list[str]:
        """The target and the stages it copies from or starts from, each after those it needs."""
        names: list[str] = []
        sources = [self.bases[target], *filter(None, map(_copied_stage, self.stages[target]))]
        for source in (name for name in sources if name in self.stages):
            names += [name for name in self.needed_by(source) if name not in names]
        return [*names, target]


@dataclass
class Stage:
    """What carrying out a stage left behind."""

    root: Path
    directory: Path
    """The working directory."""
    variables: dict[str, str] = field(default_factory=dict)
    """Arguments and environment; paths below `root`."""
    recorded: dict[str, str] = field(default_factory=dict)
    """The last value of each instruction that says how the image runs."""
    ran: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """`RUN` steps that the caller kept from running."""

    def below_root(self, path: str) -> Path:
        """Where an absolute path of the image stands here; a relative one is in the working directory."""
        if Path(path).is_relative_to(self.root):
            return Path(path)
        return self.root / path.lstrip("/") if path.startswith("/") else self.directory / path

    def command(self, name: str) -> list[str]:
        """The words of `ENTRYPOINT` or `CMD`."""
        words: list[str] = json.loads(self.recorded[name])
        return words


def read_recipe(dockerfile: Path, build_arguments: Mapping[str, str] | None = None) -> Recipe:
    """Parse a Dockerfile."""
    given = dict(build_arguments or {})
    parser = DockerfileParser(fileobj=StringIO(dockerfile.read_text(encoding="utf-8")))
    arguments: dict[str, str] = {}
    bases: dict[str, str] = {}
    stages: dict[str, list[Instruction]] = {}
    for entry in parser.structure:
        name, value = entry["instruction"].upper(), entry["value"]
        if name == "COMMENT":
            continue
        if name == "FROM":
            base, _, stage = words_of(value, arguments)
            bases[stage], stages[stage] = base, []
        elif stages:
            stages[next(reversed(stages))].append(Instruction(name, value))
        else:
            key, _, default = value.partition("=")
            arguments[key] = given.get(key, default)
    return Recipe(arguments, bases, {stage: tuple(steps) for stage, steps in stages.items()})


def words_of(text: str, variables: Mapping[str, str] | None = None) -> list[str]:
    """Split as Docker does, quotes removed; variables are filled in where they are given."""
    values = None if variables is None else dict(variables)
    return [word for word in WordSplitter(text, args=values).split() if word is not None]


@dataclass(frozen=True)
class Machine:
    """What stands for Docker."""

    context: Path
    """What `docker build` would send."""
    environment: Mapping[str, str]
    """Stands for the base images: PATH, and what keeps tools from the network."""
    stand_in: Callable[[str, Stage], bool]
    """Called with each `RUN`; where it returns True it has done what later steps need, and the command does not run."""


def build(recipe: Recipe, targets: Sequence[str], root: Path, machine: Machine) -> dict[str, Stage]:
    """Carry out targets and the stages they need, each once.

    Args:
        recipe: The Dockerfile.
        targets: Names of stages.
        root: A directory; each stage gets a folder in it.
        machine: Context and environment.

    Returns:
        The stages by name, in the order in which they were carried out.

    Raises:
        AssertionError: A step failed, or an instruction is not known here.
    """
    stages: dict[str, Stage] = {}
    for name in dict.fromkeys(name for target in targets for name in recipe.needed_by(target)):
        stages[name] = _begun(stages.get(recipe.bases[name]), root / name, machine)
        for instruction in recipe.stages[name]:
            _carry_out(instruction, name, stages, recipe.arguments, machine)
    return stages


def _begun(origin: Stage | None, folder: Path, machine: Machine) -> Stage:
    """A stage before its first instruction: a copy of the stage it starts from, or what a base image has."""
    if origin is None:
        folder.mkdir(parents=True)
        return Stage(root=folder, directory=folder, variables={"PATH": machine.environment["PATH"]})
    shutil.copytree(origin.root, folder, symlinks=True)

    def moved(text: str) -> str:
        return text.replace(str(origin.root), str(folder))

    variables = {name: moved(value) for name, value in origin.variables.items()}
    return Stage(folder, Path(moved(str(origin.directory))), variables, dict(origin.recorded))


def _carry_out(
    instruction: Instruction, name: str, stages: Mapping[str, Stage], arguments: Mapping[str, str], machine: Machine
) -> None:
    stage, value = stages[name], instruction.value
    match instruction.name:
        case "ARG":
            argument, _, default = value.partition("=")
            stage.variables[argument] = _value(arguments.get(argument, default), stage)
        case "ENV":
            for word in filter(None, WordSplitter(value).split(dequote=False)):
                variable, _, text = word.partition("=")
                stage.variables[variable] = _value(text, stage)
        case "WORKDIR":
            stage.directory = stage.below_root(_value(value, stage))
            stage.directory.mkdir(parents=True, exist_ok=True)
        case "COPY":
            _copy(value, stage, stages, machine.context)
        case "RUN" if machine.stand_in(value, stage):
            stage.left_out.append(value)
        case "RUN":
            _run(value, stage, machine.environment)
        case other:
            assert other in _RECORDED, f"{other} is not known here"
            stage.recorded[other] = value


def _value(text: str, stage: Stage) -> str:
    """A value, quotes removed and variables filled in; an absolute path is moved below the root."""
    value = WordSplitter(text, args=stage.variables).dequote()
    return f"{stage.root}{value}" if text.startswith("/") else value


def _run(command: str, stage: Stage, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=stage.directory,
        env={**environment, **stage.variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS_PER_STEP,
        check=False,
    )
    assert done.returncode == 0, f"RUN {command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    stage.ran.append(command)


def _copy(value: str, stage: Stage, stages: Mapping[str, Stage], context: Path) -> None:
    words = words_of(value, stage.variables)
    *sources, target = [word for word in words if not word.startswith("--")]
    origin = _copied_stage(Instruction("COPY", value))
    destination = stage.below_root(target)
    into_folder = target.endswith("/") or len(sources) > 1
    for source in sources:
        path = context / source if origin is None else stages[origin].root / Path(source).relative_to(stage.root)
        assert path.exists(), f"COPY {value}: {path} is not there"
        if path.is_dir():  # as Docker does: its contents
            shutil.copytree(path, destination, dirs_exist_ok=True, symlinks=True)
            continue
        copy = destination / path.name if into_folder else destination
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def _copied_stage(instruction: Instruction) -> str | None:
    """The stage that a `COPY --from` names."""
    if instruction.name != "COPY":
        return None
    flags = [word for word in words_of(instruction.value) if word.startswith("--from=")]
    return flags[0].partition("=")[2] if flags else None
