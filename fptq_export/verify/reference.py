"""`model.w4a8.onnx` in ONNX's reference evaluator, with the W4A8 linears computed as the kernels compute them.

ONNX Runtime runs the function body of a W4A8 node, which multiplies rounded floats. Here the node itself is run, by the
CPU kernels (`fptq_export.cpu`): INT8 codes, exact INT32 sums inside each group, one rounding to the output type. Every
other node is NumPy. So this is an oracle of its own, slower than ONNX Runtime, for a Polygraphy `Comparator` or alone:

    evaluator = reference_from_path(Path("model.w4a8.onnx"))
    outputs = evaluator.run(None, feed)

    runners = [ReferenceRunner(path), OnnxrtRunner(lambda: body_session_from_path(path))]
    results = Comparator.run(runners, data_loader=[feed])

Polygraphy's own `SessionFromOnnx` is not what to compare with: by default ONNX Runtime quantizes the activations of a
block-INT4 MatMul once more, in blocks, which is another computation than the graph's. Even so, the logits of a deep
model are not close: an INT8 code next to a rounding boundary falls on either side in two correct runs
(`decode.CacheBound`).
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from fptq_export import cpu
from fptq_export.errors import Problem, UserError, UserErrors

__all__ = [
    "FptqW4A8GemmPerToken",
    "FptqW4A8GemmStatic",
    "ReferenceRunner",
    "body_session_from_path",
    "reference_from_path",
]

_DOMAIN = "fptq"
_STANDARD_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class _Linear(OpRun):
    """One W4A8 node. Its weight is packed on the first call and again only when another one arrives."""

    op_domain = _DOMAIN
    threads = 1

    def __init__(self, onnx_node: onnx.NodeProto, run_params: dict[str, Any], schema: Any = None) -> None:
        super().__init__(onnx_node, run_params, schema)
        self._source: tuple[NDArray[Any], NDArray[Any]] | None = None
        self._packed: cpu.PackedWeight | None = None

    def weight(self, codes: NDArray[Any], scales: NDArray[Any], group_size: int) -> cpu.PackedWeight:
        """The packed weight; codes INT4 [in, out], scales [in/group_size, out], as the node has them."""
        if (
            self._packed is None
            or self._source is None
            or self._source[0] is not codes
            or self._source[1] is not scales
        ):
            half = scales.astype(np.float16)
            if not np.array_equal(half.astype(scales.dtype), scales):
                cause = f"group scales of type {scales.dtype} that are no FP16 numbers"
                raise UserError(str(self.onnx_node.name), cause, "rewrite the model again: policies hold FP16 scales")
            try:
                self._packed = cpu.packed_weight_from_codes(codes.astype(np.int8).T, half.T, group_size)
            except ValueError as error:
                hint = "is this a model.w4a8.onnx? Its weights are INT4 [in, out]"
                raise UserError(str(self.onnx_node.name), str(error), hint) from error
            self._source = (codes, scales)
        return self._packed

    def linear(
        self, x: NDArray[Any], codes: NDArray[Any], scales: NDArray[Any], x_scale: float | None, group_size: int
    ) -> NDArray[Any]:
        """X [..., in] of FP16, BF16 or FP32 -> y [..., out] of the same type.

        The kernels know no BF16: such an x is widened, which is exact, and y is rounded to FP32 and then to BF16.
        """
        weight = self.weight(codes, scales, group_size)
        shape = (*x.shape[:-1], weight.out_channels)
        if 0 in shape:
            return np.zeros(shape, dtype=x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        rows = rows.astype(np.float32) if x.dtype == _BFLOAT16 else rows
        y = cpu.w4a8_linear(rows, weight, x_scale, output_type=rows.dtype, threads=self.threads)
        return y.reshape(shape).astype(x.dtype, copy=False)


class FptqW4A8GemmStatic(_Linear):
    """`FptqW4A8GemmStatic(x, weight_codes, weight_scales, x_scale) -> y`."""

    def _run(
        self, x: NDArray[Any], codes: NDArray[Any], scales: NDArray[Any], x_scale: NDArray[Any], **attributes: Any
    ) -> tuple[NDArray[Any]]:
        return (self.linear(x, codes, scales, float(x_scale.reshape(())), attributes["group_size"]),)


class FptqW4A8GemmPerToken(_Linear):
    """`FptqW4A8GemmPerToken(x, weight_codes, weight_scales) -> y`."""

    def _run(
        self, x: NDArray[Any], codes: NDArray[Any], scales: NDArray[Any], **attributes: Any
    ) -> tuple[NDArray[Any]]:
        return (self.linear(x, codes, scales, None, attributes["group_size"]),)


_OPERATORS: tuple[type[_Linear], ...] = (FptqW4A8GemmStatic, FptqW4A8GemmPerToken)


def reference_from_path(path: Path, *, threads: int = 1) -> ReferenceEvaluator:
    """An evaluator of a model whose W4A8 nodes run on the CPU kernels.

    Args:
        path: `model.w4a8.onnx`; its external data lies beside it.
        threads: Most threads of one linear.

    Raises:
        UserError: The file is missing or unreadable, has no W4A8 node, or `fptq_export.cpu` is not built.
        UserErrors: It has operators that nothing here computes.
    """
    cpu.available_instruction_sets()  # says now that the C++ part is missing, not in the middle of a run
    if not path.is_file():
        raise UserError(str(path), "no such file", "run the stage that writes it first")
    try:
        model = onnx.load(str(path))
    except Exception as error:
        # protobuf raises a DecodeError class that differs between its C and Python implementations.
        cause = f"cannot be read as ONNX ({error})"
        raise UserError(str(path), cause, "see that the weights file lies beside it whole") from error
    _check_operators(path, model)
    operators = [type(operator.__name__, (operator,), {"threads": threads}) for operator in _OPERATORS]
    return ReferenceEvaluator(model, new_ops=operators)


def body_session_from_path(path: Path) -> ort.InferenceSession:
    """A session of ONNX Runtime that computes the function bodies as they are written, for an `OnnxrtRunner`."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # FP32
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """The evaluator as a Polygraphy runner, for `Comparator.run` beside an `OnnxrtRunner` of the same file.

    Args:
        path: `model.w4a8.onnx`; read when the runner is activated.
        name: Polygraphy's name for it.
        threads: Most threads of one linear.
    """

    def __init__(self, path: Path, name: str | None = None, *, threads: int = 1) -> None:
        super().__init__(name=name, prefix="fptq-reference")
        self._path = path
        self._threads = threads
        self._evaluator: ReferenceEvaluator | None = None

    def activate_impl(self) -> None:
        """Load the model."""
        self._evaluator = reference_from_path(self._path, threads=self._threads)

    def deactivate_impl(self) -> None:
        """Forget the model."""
        self._evaluator = None

    @functools.cached_property
    def _inputs(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for value in onnx.load(str(self._path), load_external_data=False).graph.input:
            tensor = value.type.tensor_type
            shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim)
            metadata.add(value.name, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape=shape)
        return metadata

    def get_input_metadata_impl(self) -> TensorMetadata:
        """The graph's inputs; dimensions without a number are dynamic."""
        return self._inputs

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        """Run the graph and time it."""
        assert self._evaluator is not None, "Polygraphy activates a runner before it infers"
        started = time.perf_counter()
        # FP16 masks and sigmoids overflow to infinities that the graph means; NumPy would warn of each.
        with np.errstate(over="ignore", invalid="ignore"):
            outputs = self._evaluator.run(None, dict(feed_dict))
        self.inference_time = time.perf_counter() - started
        return OrderedDict(zip(self._evaluator.output_names, outputs, strict=True))


def _check_operators(path: Path, model: onnx.ModelProto) -> None:
    ours = {(_DOMAIN, operator.__name__) for operator in _OPERATORS}
    functions = {(function.domain, function.name) for function in model.functions}
    nodes = [*_nodes(model.graph.node), *(node for function in model.functions for node in _nodes(function.node))]
    known = ours | functions
    unknown = [
        Problem(f'$.graph.node["{node.name}"]', f"{node.domain}.{node.op_type} has no function body")
        for node in nodes
        if node.domain not in _STANDARD_DOMAINS and (node.domain, node.op_type) not in known
    ]
    if unknown:
        raise UserErrors(str(path), unknown, "give model.w4a8.onnx: graphs lowered for an engine are not portable")
    if not any((node.domain, node.op_type) in ours for node in nodes):
        raise UserError(str(path), "has no W4A8 linear", "give model.w4a8.onnx; ONNX Runtime runs the other files")


def _nodes(nodes: Any) -> Iterator[onnx.NodeProto]:
    """Every node, those of the branches and bodies of control flow included."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)
