"""The float weights of a graph that the user gave, instead of a checkpoint: read one at a time, from `model.onnx`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph
from fptq_export.sites import Sites

__all__ = ["GraphWeights"]


@dataclass(frozen=True)
class GraphWeights:
    """Weights of a prepared graph by the path of their layer."""

    name: str
    """What the model is called."""
    path: Path
    """The prepared graph; its weights lie beside it."""
    sites: Sites
    given: None = None
    """A graph brings no INT4 codes: one that is quantized already is refused."""

    @cached_property
    def _initializers(self) -> Mapping[str, ir.Value]:
        return dict(load_graph(self.path).graph.initializers)

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Path of each linear -> (out, in)."""
        return {linear.path: (linear.out_features, linear.in_features) for linear in self.sites.linears}

    def read(self, path: str) -> torch.Tensor:
        """The weight of one linear, float32 [out, in].

        Raises:
            UserError: The graph has no such linear.
        """
        if path not in self.shapes:
            raise UserError(f"layer {path}", "the graph has no such linear", "trace the model again")
        linear = self.sites.linear(path)
        weight = self._array(linear.weight)
        return torch.from_numpy(np.ascontiguousarray(weight if linear.weight_transposed else weight.T))

    def read_convolution(self, weight: str) -> NDArray[np.float32]:
        """The weight of a convolution by the name of its initializer, float32 in its own shape."""
        return self._array(weight)

    def _array(self, name: str) -> NDArray[np.float32]:
        tensor = self._initializers[name].const_value
        if tensor is None:
            raise RuntimeError(f"initializer {name!r} has no value")
        return tensor.numpy().astype(np.float32)
