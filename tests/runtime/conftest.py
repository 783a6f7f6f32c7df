"""Engines on a double of TensorRT, which runs in ONNX Runtime and in this process's memory."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from fptq_export.build.profiles import LlmLimits
from fptq_export.graph_io import load_graph, save_graph
from fptq_export.range_outputs import RangeOutputs
from fptq_export.rewrite.fix_cache_length import FixCacheLength
from fptq_export.rewrite.graph_form import bring_into_form
from fptq_export.runtime.engine_session import EngineCausalSession, opened_engine
from tests.runtime import fake_tensorrt
from tests.runtime.engines import FORMS, LIMITS, SLOTS, manifest
from tests.runtime.fake_cuda import FakeCudart
from tests.runtime.fake_tensorrt import FakeTensorRT

Opened = Callable[..., EngineCausalSession]


@pytest.fixture(scope="session")
def graphs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny LLaMA, FP16, in each form that an engine has."""
    directory = tmp_path_factory.mktemp("forms")
    for name, form in FORMS.items():
        model = load_graph(finished_run / "run" / "model.onnx")
        bring_into_form(model, form)
        FixCacheLength(SLOTS)(model)
        save_graph(model, directory / f"{name}.onnx")
    shutil.copy(finished_run / "run" / "model.onnx.data", directory)
    return {name: directory / f"{name}.onnx" for name in FORMS}


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """TensorRT for RTX on a GPU."""
    return fake_tensorrt.installed(monkeypatch)


@pytest.fixture
def cudart(tensorrt: FakeTensorRT) -> FakeCudart:
    """CUDA's runtime library below it."""
    return tensorrt.cudart


@pytest.fixture
def opened(tensorrt: FakeTensorRT, tmp_path: Path) -> Iterator[Opened]:
    """Open an engine of a graph; closed at the end, when no device memory may be left."""
    contexts: list[AbstractContextManager[Any]] = []

    def open_(
        graph: Path, limits: tuple[LlmLimits, ...] = (LIMITS,), ranges: RangeOutputs | None = None, **options: Any
    ) -> Any:
        plan = fake_tensorrt.plan_of_graph(graph, tmp_path / "out.plan", limits, **options)
        contexts.append(opened_engine(manifest(), plan, ranges))
        return contexts[-1].__enter__()

    yield open_
    for context in contexts:
        context.__exit__(None, None, None)
    gc.collect()
    assert not tensorrt.cudart.live, "device memory is left"
    assert not tensorrt.cudart.streams
