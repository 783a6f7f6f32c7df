"""A TensorRT engine on the GPU, with torch for its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fptq_export.build.targets import Target
from fptq_export.build.tensorrt import tensorrt_for_target

TORCH_TYPES = {"HALF": torch.float16, "FLOAT": torch.float32, "INT64": torch.int64, "INT32": torch.int32}


class EngineRun:
    """An engine, with the plugin where it has any, and one context."""

    def __init__(self, target: Target, plan: bytes, library: Path | None = None) -> None:
        self._trt = tensorrt_for_target(target)
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)
        if library is not None:
            self._trt.get_plugin_registry().load_library(str(library))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        assert self._engine is not None, "the engine does not load"
        self._context = self._engine.create_execution_context()

    def prepare(self, feed: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        """Bind inputs and outputs; returns the outputs' tensors."""
        self._tensors: dict[str, torch.Tensor] = {}
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        for name in inputs:
            dtype = TORCH_TYPES[self._engine.get_tensor_dtype(name).name]
            tensor = torch.from_numpy(np.ascontiguousarray(feed[name])).to("cuda", dtype)
            assert self._context.set_input_shape(name, tuple(tensor.shape))
            # An empty cache still needs an address.
            self._tensors[name] = tensor if tensor.numel() else torch.zeros(1, dtype=dtype, device="cuda")
        for name in set(names) - set(inputs):
            dtype = TORCH_TYPES[self._engine.get_tensor_dtype(name).name]
            shape = tuple(self._context.get_tensor_shape(name))
            self._tensors[name] = torch.empty(shape, dtype=dtype, device="cuda")
        for name, tensor in self._tensors.items():
            assert self._context.set_tensor_address(name, tensor.data_ptr())
        return {name: self._tensors[name] for name in set(names) - set(inputs)}

    def enqueue(self) -> None:
        """Enqueue on torch's current stream."""
        assert self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
