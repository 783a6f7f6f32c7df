"""TensorRT without a GPU: the API that the runtime calls, with ONNX Runtime behind it and `fake_cuda` below.

Inputs are read, and outputs written, at the addresses that were set. A plan is a small JSON file that names a graph.
"""

# ruff: noqa: D102, N802  methods have the names of TensorRT, whose documentation says what they do

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import polygraphy.cuda.cuda
import pytest
from numpy.typing import NDArray

from fptq_export.build.profiles import LlmLimits, inputs_from_onnx, profile_for_inputs
from fptq_export.runtime import device_engine, engine_session, source
from fptq_export.verify.ort_values import DTYPE_FROM_ORT_TYPE, array_from_ort_value, ort_value_from_array
from fptq_export.verify.sessions import session_from_path
from tests.runtime.fake_cuda import FakeCudart, cuda_over

__all__ = ["FakeTensorRT", "Severity", "installed", "plan_of_graph"]

TYPES = {"FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16}
TYPES |= {"INT8": np.int8, "INT32": np.int32, "INT64": np.int64}
NAMES = {np.dtype(value): key for key, value in TYPES.items()}


class Severity(IntEnum):
    """TensorRT's."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """What takes TensorRT's words."""

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class TensorIOMode(Enum):
    """Side of the engine."""

    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    """Where a tensor must be."""

    DEVICE = 0
    HOST = 1


class IPluginRegistry:
    """Libraries of plugins; one may be loaded once."""

    def __init__(self) -> None:
        self.all_creators: list[Any] = []

    def load_library(self, path: str) -> None:
        """Take our library, and no other."""
        assert not self.all_creators, "the plugins are registered already"
        if Path(path).name == "libfptq_trt.so":
            self.all_creators.append(SimpleNamespace(name="FptqW4A8GemmStatic", plugin_namespace="fptq"))


class FakeTensorRT:
    """The module."""

    __name__ = "tensorrt_rtx"
    __version__ = "1.7.1.116"

    def __init__(self, cudart: FakeCudart) -> None:
        self.ILogger, self.TensorIOMode, self.TensorLocation = ILogger, TensorIOMode, TensorLocation
        self.cudart = cudart
        self.registry = IPluginRegistry()
        self.engines: list[ICudaEngine] = []
        """All that were opened."""

    def get_plugin_registry(self) -> IPluginRegistry:
        return self.registry

    def Runtime(self, logger: ILogger) -> Runtime:
        return Runtime(self, logger)


class Runtime:
    """Opens plans."""

    engine_host_code_allowed = False

    def __init__(self, module: FakeTensorRT, logger: ILogger) -> None:
        self._module, self._logger = module, logger

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        """None, with words to the logger, where it is no plan, lacks its plugin, or brings one that may not run."""
        if not plan.startswith(b"{"):
            self._logger.log(Severity.WARNING, "this is only a warning")
            self._logger.log(Severity.ERROR, "Serialization assertion magicTagRead == kMAGIC_TAG failed")
            return None
        document = json.loads(plan)
        if document["plugin"] and not self._module.registry.all_creators:
            self._logger.log(Severity.ERROR, "Could not find plugin FptqW4A8GemmStatic")
            return None
        if document["embedded"] and not self.engine_host_code_allowed:
            self._logger.log(Severity.ERROR, "host code is not allowed")
            return None
        self._module.engines.append(ICudaEngine(document, self._logger, self._module.cudart))
        return self._module.engines[-1]


class ICudaEngine:
    """A graph in ONNX Runtime that looks like an engine."""

    def __init__(self, document: Mapping[str, Any], logger: ILogger, cudart: FakeCudart) -> None:
        self._session = session_from_path(Path(document["graph"]), 1, "all")
        self._document, self._logger, self._cudart = document, logger, cudart
        self._inputs: dict[str, Any] = {value.name: value for value in self._session.get_inputs()}
        self._outputs: dict[str, Any] = {value.name: value for value in self._session.get_outputs()}
        self._contexts: list[IExecutionContext] = []
        self._refuses: set[str] = set()
        """Calls that fail, for tests."""

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._document["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self._inputs | self._outputs)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._document["host"] else TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        value = (self._inputs | self._outputs)[name]
        return SimpleNamespace(name=self._document["types"].get(name, NAMES[DTYPE_FROM_ORT_TYPE[value.type]]))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        value = (self._inputs | self._outputs)[name]
        return tuple(dim if isinstance(dim, int) else -1 for dim in value.shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._document["profiles"][profile_index][name]]

    def create_execution_context(self) -> IExecutionContext | None:
        if "create_execution_context" in self._refuses:
            self._logger.log(Severity.ERROR, "Requested amount of GPU memory could not be allocated")
            return None
        self._contexts.append(IExecutionContext(self))
        return self._contexts[-1]


class IExecutionContext:
    """Shapes and addresses of one call."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._calls = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return stream_handle in self._engine._cudart.streams

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        minimum, _, maximum = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = all(low <= dim <= high for low, dim, high in zip(minimum, shape, maximum, strict=True))
        if not fits:
            self._engine._logger.log(Severity.ERROR, f"{name} {shape} is outside the profile")
            return False
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """An output's, from the symbols that it shares with the inputs."""
        engine = self._engine
        if name in engine._inputs:
            return self._shapes[name]
        sizes = {
            dim: size
            for key, shape in self._shapes.items()
            for dim, size in zip(engine._inputs[key].shape, shape, strict=True)
        }
        return tuple(dim if isinstance(dim, int) else _size(dim, sizes) for dim in engine._outputs[name].shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory, "TensorRT takes no null pointer"
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Read the inputs where they are, run the graph, and write the outputs where they shall be."""
        engine = self._engine
        assert stream_handle in engine._cudart.streams
        if "execute_async_v3" in engine._refuses:
            engine._logger.log(Severity.ERROR, "Cuda Runtime (an illegal memory access was encountered)")
            return False
        if "write_indices" in engine._inputs:
            for name in engine._outputs:
                past = name.replace("present.", "past_key_values.")
                assert past == name or self._addresses[name] == self._addresses[past], f"{name} is not in place"
        feed = {name: ort_value_from_array(self._input(name)) for name in engine._inputs}
        values = engine._session.run_with_ort_values(list(engine._outputs), feed)
        for name, value in zip(engine._outputs, values, strict=True):
            array = array_from_ort_value(value)
            assert array.shape == self.get_tensor_shape(name), name
            stored = np.ascontiguousarray(array.astype(self._type(name)))
            self._memory(name)[:] = np.frombuffer(stored.tobytes(), np.uint8)
        self._calls += 1
        return True

    def _input(self, name: str) -> NDArray[Any]:
        array = np.frombuffer(self._memory(name).tobytes(), self._type(name)).reshape(self._shapes[name])
        return np.ascontiguousarray(array.astype(DTYPE_FROM_ORT_TYPE[self._engine._inputs[name].type]))

    def _memory(self, name: str) -> NDArray[np.uint8]:
        size = int(np.prod(self.get_tensor_shape(name))) * np.dtype(self._type(name)).itemsize
        return self._engine._cudart.view(self._addresses[name], size)

    def _type(self, name: str) -> Any:
        return TYPES[self._engine.get_tensor_dtype(name).name]


def installed(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Put the double in the place of TensorRT and CUDA, on a machine with one GPU that is fit for everything."""
    found = FakeTensorRT(FakeCudart())
    monkeypatch.setattr(polygraphy.cuda.cuda, "G_CUDA", cuda_over(found.cudart))
    monkeypatch.setattr(device_engine, "tensorrt_for_target", lambda _: found)
    monkeypatch.setattr(engine_session, "visible_gpus", lambda: 1)
    monkeypatch.setattr(source, "machine_of_here", lambda: None)
    monkeypatch.setattr(source, "report_on_plan", lambda *_: SimpleNamespace(checks=()))
    return found


def _size(dim: str, sizes: Mapping[Any, int]) -> int:
    """A symbol, or the sum of some; -1 where that is not known."""
    terms = [sizes.get(term.strip(), -1) for term in dim.split("+")]
    return sizes[dim] if dim in sizes else -1 if -1 in terms else sum(terms)


def plan_of_graph(
    graph: Path,
    path: Path,
    limits: Sequence[LlmLimits],
    *,
    types: Mapping[str, str] | None = None,
    host: Sequence[str] = (),
    plugin: bool = False,
    embedded: bool = False,
) -> Path:
    """Write a plan.

    Args:
        graph: What runs.
        path: The file.
        limits: Of each optimization profile.
        types: Tensor -> name of the type that it has in the engine, where that is another than in the graph.
        host: Tensors that must be in the CPU's memory.
        plugin: Whether it needs the plugin beside it.
        embedded: Whether it carries the plugin.
    """
    profiles = []
    for limit in limits:
        profile = profile_for_inputs(inputs_from_onnx(graph), limit)
        assert profile is not None, "the graph has dynamic inputs"
        profiles.append({item.name: (item.minimum, item.optimum, item.maximum) for item in profile.ranges})
    kinds = {"types": types or {}, "host": host, "plugin": plugin, "embedded": embedded}
    document = {"graph": str(graph), "profiles": profiles, **kinds}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
