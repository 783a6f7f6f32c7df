"""What pip installs: the wheel's contents, the declared dependencies, the pins."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fptq_export

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

TOP_LEVEL = {"calib", "fptq_export", f"fptq_export-{fptq_export.__version__}.dist-info"}
DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
PACKAGES = {
    "calib",
    "calib/text",
    "calib/weights",
    "fptq_export",
    "fptq_export/build",
    "fptq_export/cli",
    "fptq_export/cpu",
    "fptq_export/package",
    "fptq_export/pipeline",
    "fptq_export/plugin",
    "fptq_export/rewrite",
    "fptq_export/trace",
    "fptq_export/verify",
}
"""Folders with files in the wheel. A new package is added here on purpose."""
SUFFIXES = {".py", ".txt", ".typed"}
"""Kinds of files in our packages: code, the built-in text, the typing marker."""

OPTIONAL_IMPORTS = {"tensorrt", "tensorrt_rtx"}
"""Imported only where an extra installs them."""


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a freshly built wheel; built without network."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_holds_the_written_list_of_packages(wheel_names: list[str]) -> None:
    """Nothing but the two packages and the metadata is installed; no tests, no samples."""
    assert {name.partition("/")[0] for name in wheel_names} == TOP_LEVEL
    folders = {str(Path(name).parent) for name in wheel_names if ".dist-info" not in name}
    assert folders == PACKAGES


def test_wheel_metadata_is_complete(wheel_names: list[str]) -> None:
    """Licence and console script are in the wheel."""
    assert {name.partition(".dist-info/")[2] for name in wheel_names if ".dist-info/" in name} == DIST_INFO


def test_wheel_holds_every_module_and_no_other_kind_of_file(wheel_names: list[str]) -> None:
    """No module is forgotten, and no model file, cache or document slips in."""
    packed = {name for name in wheel_names if ".dist-info" not in name}
    assert {Path(name).suffix for name in packed} <= SUFFIXES
    sources = {str(path.relative_to(ROOT)) for top in ("fptq_export", "calib") for path in (ROOT / top).rglob("*.py")}
    assert {name for name in packed if name.endswith(".py")} == sources


def test_every_third_party_import_is_declared() -> None:
    """A fresh install has all that the packages import, and nothing that they do not."""
    distributions = packages_distributions()
    imported = {
        name for top in ("fptq_export", "calib") for name in _third_party_imports(ROOT / top)
    } - OPTIONAL_IMPORTS
    used = {canonicalize_name(distributions[name][0]) for name in imported}
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert used <= declared, f"imported but not declared: {sorted(used - declared)}"
    assert declared <= used, f"declared but not imported: {sorted(declared - used)}"


def test_every_direct_dependency_has_a_floor_and_a_pin_above_it() -> None:
    """The pins in constraints.txt satisfy the floors in pyproject.toml."""
    pins = _pins()
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["rtx"], *extras["dev"]]:
        requirement = Requirement(text)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pin), f"{text} does not allow the pinned {pin}"
    unbounded = [text for text in PROJECT["dependencies"] if not Requirement(text).specifier]
    assert unbounded == []


def test_constraints_are_exact_and_carry_no_local_path() -> None:
    """Each line pins one public version: no URL, no path, no build suffix that exists on one machine only."""
    lines = [line for line in _constraint_lines() if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9A-Za-z.]+", line)]
    assert lines == []
    assert len(_pins()) == len(_constraint_lines()), "a package is pinned twice"


def test_console_script_is_the_main_of_the_command_line() -> None:
    """`fptq-export` starts fptq_export.cli:main, and that function exists."""
    assert PROJECT["scripts"] == {"fptq-export": "fptq_export.cli:main"}
    tree = ast.parse((ROOT / "fptq_export" / "cli" / "main.py").read_text(encoding="utf-8"))
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def _third_party_imports(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"fptq_export", "calib"}


def _constraint_lines() -> list[str]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _pins() -> dict[str, str]:
    return {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in _constraint_lines())}
