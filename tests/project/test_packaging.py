"""What pip installs: the wheel's contents, the declared dependencies, the pins."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fptq_export
from fptq_export.plugin.library import DIRECTORY_VARIABLE, LOADED_LIBRARY, REGISTERING_LIBRARY
from fptq_export.sources import build_root, source_root

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
    "calib/auto",
    "calib/interchange",
    "calib/lora",
    "calib/rotation",
    "calib/text",
    "calib/weights",
    "fptq_export",
    "fptq_export/activations",
    "fptq_export/build",
    "fptq_export/cli",
    "fptq_export/cpu",
    "fptq_export/doctor",
    "fptq_export/debug",
    "fptq_export/diff",
    "fptq_export/evaluate",
    "fptq_export/experts",
    "fptq_export/inspect",
    "fptq_export/monitor",
    "fptq_export/observe",
    "fptq_export/package",
    "fptq_export/pipeline",
    "fptq_export/plugin",
    "fptq_export/report",
    "fptq_export/report/templates",
    "fptq_export/rewrite",
    "fptq_export/roofline",
    "fptq_export/runtime",
    "fptq_export/serve",
    "fptq_export/trace",
    "fptq_export/triton",
    "fptq_export/triton/serving",
    "fptq_export/verify",
}
"""Folders with files in the wheel. A new package is added here on purpose."""
SOURCES = "fptq_export/plugin/sources/"
"""The C++ sources in the wheel."""
SUFFIXES = {".css", ".j2", ".js", ".json", ".py", ".txt", ".typed"}
"""Kinds of files in our packages: the page of a report (three of them), counts of the time model, code, the built-in
text, the typing marker."""

OPTIONAL_IMPORTS = {
    *("datasets", "google", "jinja2", "lm_eval", "markupsafe", "matplotlib", "pynvml", "pytriton", "tensorrt"),
    *("fastapi", "prometheus_client", "starlette", "uvicorn"),
    *("tensorrt_rtx", "triton_python_backend_utils", "tritonclient"),
}
"""Imported only where an extra installs them (google.protobuf with tritonclient), or where Triton gives them."""


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the repository holds, without anything that was built in it."""
    tree = tmp_path_factory.mktemp("tree")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    for name in listed:
        if name.partition("/")[0] not in {"tests", "samples"} and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    return tree


def build_wheel(tree: Path, target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel of a tree, without network."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(tree)]
    environment = {name: value for name, value in os.environ.items() if name != DIRECTORY_VARIABLE} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)


def only_wheel(done: subprocess.CompletedProcess[str], target: Path) -> Path:
    """The wheel that a build left."""
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(clean_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built wheel of a tree in which nothing was built."""
    target = tmp_path_factory.mktemp("wheel")
    return only_wheel(build_wheel(clean_tree, target), target)


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
    """Names of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def plugin_library(path: Path, kernels: str = "cuda", version: str = fptq_export.__version__) -> None:
    """A library that says what it was built from, and is nothing else: all that packing looks at."""
    plugins = ROOT / "plugins"
    headers = path.parent / "headers"
    headers.mkdir(exist_ok=True)
    header = "#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 14\n"
    (headers / "NvInferVersion.h").write_text(header, encoding="utf-8")
    texts = {"FPTQ_VERSION": version, "FPTQ_KERNELS": kernels, "FPTQ_ARCHITECTURES": "80"}
    command = ["g++", "-shared", "-fPIC", f"-I{headers}", f"-I{plugins / 'include'}", str(plugins / "src" / "info.cpp")]
    command += [*(f'-D{name}="{text}"' for name, text in texts.items()), "-o", str(path)]
    subprocess.run(command, check=True, timeout=60)


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A folder with both libraries."""
    if shutil.which("g++") is None:
        pytest.skip("the stand-ins for the plugin libraries need g++")
    directory = tmp_path / "libraries"
    directory.mkdir()
    for name in (LOADED_LIBRARY, REGISTERING_LIBRARY):
        plugin_library(directory / name)
    return directory


def test_wheel_without_built_libraries_is_pure(wheel: Path, wheel_names: list[str]) -> None:
    """Nothing built: one wheel for every platform, without a shared library."""
    assert wheel.name.endswith("-py3-none-any.whl")
    assert [name for name in wheel_names if name.endswith(".so")] == []


def test_wheel_with_the_plugin_is_for_a_platform_and_is_found(
    clean_tree: Path, libraries: Path, tmp_path: Path
) -> None:
    """The libraries travel, the tag names the platform and no Python, and an install of it finds them by itself."""
    target, site = tmp_path / "dist", tmp_path / "site"
    found = only_wheel(build_wheel(clean_tree, target, **{DIRECTORY_VARIABLE: str(libraries)}), target)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert found.name.endswith(f"-py3-none-{platform}.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(found)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    code = "import fptq_export; info = fptq_export.plugin_info(); print(info.library, info.version, info.architectures)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop(DIRECTORY_VARIABLE, None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    expected = (site / "fptq_export" / "plugin" / "lib" / LOADED_LIBRARY).resolve()
    assert done.stdout.split() == [str(expected), fptq_export.__version__, "(80,)"], done.stderr


def test_wheel_with_the_cpu_extension_is_for_one_python(clean_tree: Path, tmp_path: Path) -> None:
    """The extension of this Python travels, and the tag says which Python that is."""
    tree, target = tmp_path / "tree", tmp_path / "dist"
    shutil.copytree(clean_tree, tree)
    extension = f"_w4a8_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    (tree / "fptq_export" / "cpu" / extension).write_bytes(b"stand-in")
    found = only_wheel(build_wheel(tree, target), target)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-" in found.name
    with zipfile.ZipFile(found) as archive:
        assert archive.read(f"fptq_export/cpu/{extension}") == b"stand-in"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernels": "double"}, "kernels 'double'"),
        ({"version": "0.0.1"}, "is version 0.0.1"),
        (None, "libfptq_trt_static.so is missing"),
    ],
)
def test_library_that_is_not_ours_to_ship_stops_the_build(
    clean_tree: Path, libraries: Path, tmp_path: Path, change: dict[str, str] | None, text: str
) -> None:
    """A test double, another version or one library of two is never packed in silence."""
    if change is None:
        (libraries / REGISTERING_LIBRARY).unlink()
    else:
        plugin_library(libraries / LOADED_LIBRARY, **change)
    done = build_wheel(clean_tree, tmp_path / "dist", **{DIRECTORY_VARIABLE: str(libraries)})
    assert done.returncode != 0
    assert text in done.stdout + done.stderr
    assert list(tmp_path.glob("dist/*.whl")) == []


def test_wheel_carries_the_sources_that_the_builds_need(wheel: Path, tmp_path: Path) -> None:
    """An installed package finds its own sources, whole, and builds outside itself."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    sources = source_root(tmp_path / "fptq_export")
    packed = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file()}
    wanted = {"CMakeLists.txt", *(f"{folder}/" for folder in ("cpu", "include", "src"))}
    repository = {str(path.relative_to(ROOT / "plugins")) for path in (ROOT / "plugins").rglob("*") if path.is_file()}
    assert packed == {name for name in repository if name == "CMakeLists.txt" or name.startswith(tuple(wanted))}
    assert tmp_path not in build_root(tmp_path / "fptq_export").parents


def test_checkout_builds_in_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources and build folder of a checkout are in it; those of a wheel are in the user's cache."""
    assert source_root() == ROOT / "plugins"
    assert build_root() == ROOT / "build"
    (tmp_path / "plugin" / "sources").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build_root(tmp_path) == tmp_path / "cache" / "fptq-export"


def test_wheel_holds_the_written_list_of_packages(wheel_names: list[str]) -> None:
    """Nothing but the two packages and the metadata is installed; no tests, no samples."""
    assert {name.partition("/")[0] for name in wheel_names} == TOP_LEVEL
    folders = {str(Path(name).parent) for name in wheel_names if ".dist-info" not in name and SOURCES not in name}
    assert folders == PACKAGES


def test_wheel_metadata_is_complete(wheel_names: list[str]) -> None:
    """Licence and console script are in the wheel."""
    assert {name.partition(".dist-info/")[2] for name in wheel_names if ".dist-info/" in name} == DIST_INFO


def test_wheel_holds_every_module_and_no_other_kind_of_file(wheel_names: list[str]) -> None:
    """No module is forgotten, and no model file, cache or document slips in."""
    packed = {name for name in wheel_names if ".dist-info" not in name and SOURCES not in name}
    assert {Path(name).suffix for name in packed} <= SUFFIXES
    sources = {str(path.relative_to(ROOT)) for top in ("fptq_export", "calib") for path in (ROOT / top).rglob("*.py")}
    assert {name for name in packed if name.endswith(".py")} == sources


def test_wheel_holds_the_page_of_a_report(wheel_names: list[str]) -> None:
    """Template, style and script are in the wheel: without one of them there is no report."""
    names = {f"fptq_export/report/templates/report.{kind}" for kind in ("css", "html.j2", "js")}
    assert names <= set(wheel_names)


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
