from __future__ import annotations

import ctypes
import importlib.util
import platform
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from fptq_export.build import targets
from fptq_export.build.targets import Target, check_target, target_from_option, visible_gpus
from fptq_export.build.tensorrt import tensorrt_for_target
from fptq_export.errors import UserError


def pretend(monkeypatch: pytest.MonkeyPatch, installed: set[str], gpus: int, machine: str = "x86_64") -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None, origin=f"{name}/__init__.py") if name in installed else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(targets, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: machine)


@pytest.mark.parametrize(
    ("installed", "gpus", "expected"),
    [
        ({"tensorrt", "tensorrt_rtx"}, 1, Target.TENSORRT),
        ({"tensorrt", "tensorrt_rtx"}, 0, Target.TENSORRT_RTX),
        ({"tensorrt_rtx"}, 1, Target.TENSORRT_RTX),
        (set(), 0, Target.TENSORRT_RTX),
    ],
)
def test_default_is_tensorrt_only_with_library_and_gpu(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], gpus: int, expected: Target
) -> None:
    """TensorRT is chosen unasked only where it can build; everything else gets the builder that needs no GPU."""
    pretend(monkeypatch, installed, gpus)
    assert target_from_option(None) is expected


@pytest.mark.parametrize("text", ["tensorrt-rtx", "tensorrt_rtx", " TensorRT-RTX "])
def test_target_is_read_in_every_common_spelling(text: str) -> None:
    """Dashes, underscores and capitals are all understood."""
    assert target_from_option(text) is Target.TENSORRT_RTX


def test_requested_target_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that cannot be built here is still what was asked for: check_target refuses it, nothing falls back."""
    pretend(monkeypatch, {"tensorrt_rtx"}, 0)
    assert target_from_option("tensorrt") is Target.TENSORRT


@pytest.mark.parametrize("text", ["", "trt", "cuda", "tensorrt-rtx-cu13"])
def test_unknown_target_is_refused_with_the_known_ones(text: str) -> None:
    """A typing error names the choices."""
    with pytest.raises(UserError, match="tensorrt, tensorrt-rtx, onnx"):
        target_from_option(text)


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (Target.TENSORRT, 'pip install "fptq-export[tensorrt]"'),
        (Target.TENSORRT_RTX, 'pip install "fptq-export[rtx]"'),
    ],
)
def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, target: Target, line: str) -> None:
    """The hint is the one line to type."""
    pretend(monkeypatch, set(), 1)
    with pytest.raises(UserError) as caught:
        check_target(target)
    assert caught.value.hint == line


def test_rtx_on_arm_is_refused_before_the_install_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no wheel exists nobody is told to pip install it."""
    pretend(monkeypatch, set(), 0, machine="aarch64")
    with pytest.raises(UserError, match="x86-64") as caught:
        check_target(Target.TENSORRT_RTX)
    assert "pip" not in caught.value.hint


def test_tensorrt_without_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT builds on the GPU: without one the run must not get as far as the builder."""
    pretend(monkeypatch, {"tensorrt"}, 0)
    with pytest.raises(UserError, match="no GPU is visible"):
        check_target(Target.TENSORRT)


def test_installed_target_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that can build is left alone, and the ONNX target needs nothing at all."""
    pretend(monkeypatch, {"tensorrt"}, 1)
    check_target(Target.TENSORRT)
    pretend(monkeypatch, set(), 0, machine="riscv64")
    check_target(Target.ONNX)


def test_directory_of_that_name_is_not_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder `tensorrt` on the path, a namespace package to Python, does not count as installed."""
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(targets, "visible_gpus", lambda: 1)
    with pytest.raises(UserError, match="is not installed"):
        check_target(Target.TENSORRT)


def test_check_loads_no_library() -> None:
    """The check runs before every command, so it must not load the libraries, which takes seconds."""
    script = (
        "import sys; from fptq_export.build.targets import Target, check_target; check_target(Target.TENSORRT_RTX); "
        "print({'tensorrt', 'tensorrt_rtx', 'onnx', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"


def test_no_driver_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the CUDA driver counts zero GPUs and raises nothing."""

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert visible_gpus() == 0


def test_driver_that_does_not_start_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_ERROR_NO_DEVICE (100) from cuInit is not counted as a GPU."""

    class Driver:
        def cuInit(self, flags: int) -> int:  # noqa: N802 # the driver's name
            return 100

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert visible_gpus() == 0


def test_rtx_module_has_what_the_worker_calls() -> None:
    """The module that is imported is TensorRT for RTX, with the parts the worker relies on."""
    trt = tensorrt_for_target(Target.TENSORRT_RTX)
    assert trt.__name__ == "tensorrt_rtx"
    assert {"Builder", "OnnxParser", "ILogger", "IProgressMonitor"} <= set(dir(trt))


def test_target_without_builder_is_refused() -> None:
    """Nothing is imported for the ONNX target."""
    with pytest.raises(UserError, match="no engine builder"):
        tensorrt_for_target(Target.ONNX)


def test_broken_library_is_a_user_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installed library that does not load says so, instead of a traceback from its inside."""
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(UserError, match=r"libnvinfer\.so\.10"):
        tensorrt_for_target(Target.TENSORRT)
