"""A folder with some of the installed packages: what `pip install -r FILE` would have put into a bare environment."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

__all__ = ["link_packages", "requirements_from_file"]


def requirements_from_file(path: Path) -> list[Requirement]:
    """The requirements of a file that has one a line, and comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def link_packages(requirements: Iterable[Requirement], folder: Path) -> list[str]:
    """Link packages, and all that they require, into an empty folder for PYTHONPATH.

    Returns:
        Their names.

    Raises:
        PackageNotFoundError: One is not installed here.
    """
    waiting = list(requirements)
    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    while waiting:
        requirement = waiting.pop()
        key = (requirement.name.lower(), frozenset(requirement.extras))
        if key not in found:
            found[key] = distribution(requirement.name)
            waiting += _required_by(found[key], requirement.extras)
    for installed in found.values():
        for name in {path.parts[0] for path in installed.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / name).exists():
                (folder / name).symlink_to(str(installed.locate_file(name)))
    return sorted({name for name, _ in found})


def _required_by(installed: Distribution, extras: Iterable[str]) -> list[Requirement]:
    """What a package requires here, with those extras."""
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [
        requirement
        for requirement in map(Requirement, installed.requires or ())
        if requirement.marker is None or any(requirement.marker.evaluate(given) for given in environments)
    ]
