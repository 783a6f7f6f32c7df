"""A TensorRT engine on the GPU: what it reads and gives, which shapes it takes, and one call of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fptq_export.build.deserialize import deserialized_engine, logger_into
from fptq_export.build.targets import Target
from fptq_export.build.tensorrt import tensorrt_for_target
from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.runtime.device_memory import DeviceMemory

__all__ = ["DeviceEngine", "IoTensor", "Prepared", "Shape", "ShapeLimits"]

Shape = tuple[int, ...]
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT8": np.dtype(np.int8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
}
_SHOWN_ERRORS = 5
_REBUILD = "fptq-export doctor ENGINE says what it needs; build it again for this machine"


@dataclass(frozen=True)
class IoTensor:
    """An input or an output."""

    shape: Shape
    """-1 where it is open."""
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class ShapeLimits:
    """Shapes that one optimization profile takes of one input."""

    minimum: Shape
    maximum: Shape

    def hold(self, shape: Shape) -> bool:
        """Whether a shape lies between them."""
        return len(shape) == len(self.maximum) and all(
            low <= size <= high for low, size, high in zip(self.minimum, shape, self.maximum, strict=True)
        )

    def __str__(self) -> str:
        return f"{list(self.minimum)} to {list(self.maximum)}"


@dataclass
class Prepared:
    """An execution context, and what it was told."""

    context: Any
    shapes: dict[str, Shape] = field(default_factory=dict)
    """Of the inputs; empty where they are not all set."""
    output_shapes: dict[str, Shape] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)


class DeviceEngine:
    """A deserialized engine, with one execution context for each optimization profile that is used.

    Args:
        target: Whose library built it.
        path: Its file.
        plugin: Library of the plugins it needs.
        memory: Whose stream it runs on.
        host_code: Whether code that the file brings may run, as `deserialized_engine` says.

    Raises:
        UserError: The library is missing or refuses the engine, with what it said; or a tensor has a type or a place
            that is not known here.
    """

    def __init__(
        self, target: Target, path: Path, plugin: Path | None, memory: DeviceMemory, *, host_code: bool = False
    ) -> None:
        self._trt = trt = tensorrt_for_target(target)
        self._path, self._memory = path, memory
        self._errors: list[str] = []
        self._logger = logger_into(trt, self._errors)
        self._runtime = trt.Runtime(self._logger)
        self._engine: Any = deserialized_engine(trt, self._runtime, path, plugin, host_code=host_code)
        if self._engine is None:
            raise self._refusal(f"{trt.__name__} {trt.__version__} cannot load it", _REBUILD)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._check(names)
        self.inputs = {name: self._tensor(name) for name in names if self._is_input(name)}
        self.outputs = {name: self._tensor(name) for name in names if name not in self.inputs}
        self.profiles = tuple(self._limits(index) for index in range(self._engine.num_optimization_profiles))
        sizes = [sum(math.prod(item.maximum) for item in limits.values()) for limits in self.profiles]
        self._narrowest_first = sorted(range(len(sizes)), key=sizes.__getitem__)
        self._contexts: dict[int, Prepared] = {}

    def prepared(self, shapes: Mapping[str, Shape]) -> Prepared:
        """The context for a call with inputs of these shapes, and what it gives.

        Of the profiles that take them it is the one with the smallest largest shapes: a profile's kernels are chosen
        for what it takes. Nothing is done where the last call of that profile had the same shapes, as each decode step
        with a static cache has.

        Raises:
            UserError: No profile takes a shape: says what each takes of the first input that it does not take. Or
                TensorRT refuses one, or does not know the shape of an output before it runs.
        """
        for known in self._contexts.values():
            if known.shapes == shapes:
                return known
        found = self._context(self._profile_for(shapes))
        found.shapes = {}
        self._errors.clear()
        for name, shape in shapes.items():
            if not found.context.set_input_shape(name, shape):
                raise self._refusal(f"refuses the shape {list(shape)} of {name}", _REBUILD)
        found.output_shapes = {name: tuple(found.context.get_tensor_shape(name)) for name in self.outputs}
        for name, shape in found.output_shapes.items():
            if min(shape, default=0) < 0:
                raise self._refusal(f"does not say the shape of {name} before it runs ({list(shape)})", _REBUILD)
        found.shapes = dict(shapes)
        return found

    def run(self, prepared: Prepared, addresses: Mapping[str, int]) -> None:
        """Enqueue one call.

        Args:
            prepared: Of the latest `prepared`.
            addresses: Every input and output -> where it is on the GPU.

        Raises:
            UserError: TensorRT does not run it.
        """
        self._errors.clear()
        for name, address in addresses.items():
            if prepared.addresses.get(name) == address:
                continue
            if not prepared.context.set_tensor_address(name, address):
                raise self._refusal(f"refuses the address of {name}", _REBUILD)
            prepared.addresses[name] = address
        if not prepared.context.execute_async_v3(self._memory.stream):
            raise self._refusal("does not run", _REBUILD)

    def close(self) -> None:
        """Free the contexts, then the engine."""
        self._contexts.clear()
        self._engine = None

    def _profile_for(self, shapes: Mapping[str, Shape]) -> int:
        for index in self._narrowest_first:
            if all(self.profiles[index][name].hold(shape) for name, shape in shapes.items()):
                return index
        raise self._out_of_range(shapes)

    def _context(self, profile: int) -> Prepared:
        if self._engine is None:
            raise UserError(str(self._path), "is closed", "open the session again")
        if profile not in self._contexts:
            self._errors.clear()
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, self._memory.stream):
                hint = "free memory of the GPU, or build an engine with smaller --max-... options"
                raise self._refusal("gives no execution context", hint)
            self._contexts[profile] = Prepared(context)
        return self._contexts[profile]

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _tensor(self, name: str) -> IoTensor:
        return IoTensor(tuple(self._engine.get_tensor_shape(name)), _DTYPES[self._engine.get_tensor_dtype(name).name])

    def _limits(self, profile: int) -> dict[str, ShapeLimits]:
        found = {}
        for name, tensor in self.inputs.items():
            ends: Any = (tensor.shape,) * 3
            if min(tensor.shape, default=0) < 0:
                ends = self._engine.get_tensor_profile_shape(name, profile)
            found[name] = ShapeLimits(tuple(ends[0]), tuple(ends[2]))
        return found

    def _check(self, names: list[str]) -> None:
        device = self._trt.TensorLocation.DEVICE
        types = {name: str(self._engine.get_tensor_dtype(name).name) for name in names}
        problems = [Problem(name, f"has the type {kind}") for name, kind in types.items() if kind not in _DTYPES]
        problems += [
            Problem(name, "is read in the memory of the CPU")
            for name in names
            if self._engine.get_tensor_location(name) != device
        ]
        if problems:
            raise UserErrors(str(self._path), problems, "build an engine of a graph that fptq-export wrote")

    def _out_of_range(self, shapes: Mapping[str, Shape]) -> UserError:
        takes = []
        for limits in self.profiles:
            name = next(name for name, shape in shapes.items() if not limits[name].hold(shape))
            takes.append(f"{name} is {list(shapes[name])}, and the engine takes {limits[name]}")
        hint = "stay below its --max-batch-size, --max-input-len and --max-kv-len, or build it with larger ones"
        return UserError(str(self._path), "; or ".join(dict.fromkeys(takes)), hint)

    def _refusal(self, cause: str, hint: str) -> UserError:
        said = "; ".join(self._errors[:_SHOWN_ERRORS])
        return UserError(str(self._path), f"{cause} ({said})" if said else cause, hint)
