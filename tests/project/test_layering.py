"""The road goes one way: who may import whom (CONTRIBUTING.md, "The road goes one way")."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVES = frozenset(
    {
        "cpu",
        "equalized_inputs",
        "errors",
        "experts",
        "files",
        "graph_io",
        "halves",
        "language_half",
        "memory",
        "numerics",
        "options",
        "packing",
        "policy",
        "progress",
        "range_outputs",
        "roofline",
        "sites",
        "sources",
        "stored_tensor",
        "tasks",
        "tensor_writer",
    }
)
DRIVERS = frozenset(
    {
        *("__main__", "activations", "cli", "debug", "diff", "doctor", "evaluate", "inspect", "monitor"),
        *("pipeline", "report", "runtime", "serve", "triton"),
    }
)
"""May import everything; nothing but drivers may import them."""
STAGES = frozenset({"build", "observe", "package", "plugin", "rewrite", "trace", "verify"})
TENSORRT_HOME = "fptq_export.build.tensorrt"
TENSORRT = frozenset({"tensorrt", "tensorrt_rtx"})
HEAVY = ("torch", "transformers", "onnxruntime", "tensorrt", "tensorrt_rtx", "fastapi", "uvicorn", "prometheus_client")
"""What no one waits for who only asks for help or reads a policy."""


def imported_names(source: str) -> Iterator[str]:
    """Every module a source imports, anywhere in it, also under TYPE_CHECKING and by `import_module("...")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "relative imports are banned by ruff (TID252)"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called_name(node) in {"import_module", "__import__"}:
            yield from (argument.value for argument in node.args[:1] if _is_string(argument))  # type: ignore[attr-defined]


def _called_name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def room_of(module: str) -> str:
    """`fptq_export.rewrite.passes` -> `rewrite`; leaves -> `leaf`; `calib.x` -> `calib`; the rest -> `driver`."""
    top, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    if top == "calib":
        return "calib"
    if name in STAGES:
        return name
    return "leaf" if name in LEAVES else "driver"


def violations(module: str, source: str) -> list[str]:
    """Each import of a module that the layering forbids, as a sentence."""
    room = room_of(module)
    found = []
    for name in dict.fromkeys(imported_names(source)):
        top = name.partition(".")[0]
        if top in TENSORRT and module != TENSORRT_HOME:
            found.append(f"{module} imports {name}: only {TENSORRT_HOME} may")
        if top not in {"fptq_export", "calib"} or room == "driver" or name == "fptq_export":
            continue
        target = room_of(name)
        if target == "driver" and name.startswith("fptq_export.__version__"):
            continue
        allowed = {"leaf"} if room == "leaf" else {"leaf", room}
        if target not in allowed:
            found.append(f"{module} ({room}) imports {name} ({target})")
    return found


def our_modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the two packages."""
    modules = {}
    for path in sorted([*ROOT.glob("fptq_export/**/*.py"), *ROOT.glob("calib/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = our_modules()


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_room_may(module: str) -> None:
    """A stage imports itself and leaves, a leaf imports leaves, and one module imports TensorRT."""
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_every_stage_and_leaf_of_the_lists_exists() -> None:
    """The lists above name real rooms: a renamed stage cannot slip out of the check."""
    names = {module.split(".")[1] for module in MODULES if module.startswith("fptq_export.")}
    assert names >= LEAVES | STAGES


def test_every_top_module_is_a_stage_a_leaf_or_a_driver() -> None:
    """A new module or folder beside the stages is put on one of the lists on purpose."""
    top = {module.split(".")[1] for module in MODULES if module.startswith("fptq_export.")}
    assert top - STAGES - LEAVES - DRIVERS == set(), "add it to STAGES, LEAVES (import leaves only) or DRIVERS"


def test_leaves_are_imported_by_more_than_the_drivers() -> None:
    """The scan sees imports at all: each stage that has code imports a leaf."""
    sources = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}
    uses = {room_of(name) for source in sources.values() for name in imported_names(source) if name.startswith("fptq")}
    assert "leaf" in uses


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fptq_export.rewrite.passes", "from fptq_export.trace.find_sites import sites_from_graph"),
        ("fptq_export.rewrite.passes", "from fptq_export import trace"),
        ("fptq_export.rewrite.passes", "from fptq_export import pipeline"),
        ("fptq_export.verify.compare", "import fptq_export.cli"),
        ("fptq_export.verify.compare", "def late() -> None:\n    from calib.load import load"),
        ("fptq_export.policy", "from fptq_export.rewrite.functions import body"),
        ("fptq_export.policy", "from fptq_export.pipeline import run"),
        ("calib.decide", "from fptq_export.rewrite import functions"),
        ("calib.decide", "from fptq_export.pipeline import run"),
        ("fptq_export.build.engine", "import tensorrt as trt"),
        ("fptq_export.build.engine", "import importlib\ntrt = importlib.import_module('tensorrt_rtx')"),
        ("fptq_export.pipeline", "if TYPE_CHECKING:\n    import tensorrt_rtx"),
    ],
)
def test_forbidden_import_is_refused(module: str, source: str) -> None:
    """Each kind of import against the road is found, also inside functions and by name."""
    assert len(violations(module, source)) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fptq_export.rewrite.passes", "from fptq_export.rewrite.functions import body"),
        ("fptq_export.rewrite.passes", "from fptq_export import policy"),
        ("fptq_export.rewrite.passes", "from fptq_export import __version__"),
        ("fptq_export.policy", "from fptq_export.files import atomic_path"),
        ("calib.decide", "from fptq_export.policy import Policy\nfrom calib.weights.rtn import codes"),
        ("fptq_export.pipeline", "from fptq_export.rewrite.passes import run\nfrom calib.decide import decide"),
        ("fptq_export.build.tensorrt", "import tensorrt_rtx"),
        ("fptq_export.build.engine", "NAME = 'tensorrt'  # a word, not an import"),
    ],
)
def test_permitted_import_is_left_alone(module: str, source: str) -> None:
    """What the rules allow is not reported."""
    assert violations(module, source) == []


def heavy_modules_after(statement: str) -> list[str]:
    """Run a statement in a fresh interpreter and list which heavy modules it loaded."""
    report = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\n{report}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(ast.literal_eval(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import fptq_export",
        "import fptq_export.cli",
        "import calib",
        "import " + ", ".join(f"fptq_export.{leaf}" for leaf in sorted(LEAVES)),
    ],
    ids=["package", "cli", "calib", "leaves"],
)
def test_import_loads_nothing_heavy(statement: str) -> None:
    """Importing the package, its command line or a leaf loads neither torch nor a runtime nor TensorRT."""
    assert heavy_modules_after(statement) == []


def test_runtime_loads_no_torch() -> None:
    """Who serves a model waits for ONNX Runtime, and neither for torch nor for transformers."""
    assert heavy_modules_after("import fptq_export.runtime") == ["onnxruntime"]


def test_heavy_import_would_be_seen() -> None:
    """The check above can fail: a statement that loads ONNX Runtime is reported."""
    assert heavy_modules_after("import onnxruntime") == ["onnxruntime"]
