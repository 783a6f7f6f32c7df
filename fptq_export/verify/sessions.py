"""Causal language models that run: one call for the prompt, one a token after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.range_outputs import OUTPUT_NAME
from fptq_export.verify.all_logits import gives_last_only, graph_with_all_logits
from fptq_export.verify.causal_inputs import PAST, PRESENT, SCALE, WRITE_INDICES, feed_from_ids
from fptq_export.verify.ort_form import ORT_ERRORS, OrtForm, first_line, register_operators
from fptq_export.verify.ort_values import (
    DTYPE_FROM_ORT_TYPE,
    array_from_ort_value,
    float32_from_ort_value,
    ort_value_from_array,
)
from fptq_export.verify.range_output import range_output_from_ort

__all__ = [
    "FLOAT_TYPES",
    "INTEGER_TYPES",
    "ORT_ERRORS",
    "CausalSession",
    "GraphOptimization",
    "OnnxCache",
    "OnnxCausalSession",
    "OrtForm",
    "first_line",
    "session_from_path",
]

GraphOptimization = Literal["none", "basic", "extended", "all"]
"""How far ONNX Runtime rewrites a graph before it runs it."""

_OPTIMIZATION_LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
INTEGER_TYPES = ("tensor(int64)", "tensor(int32)")
FLOAT_TYPES = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
_INT8_TYPES = ("tensor(int8)",)
_SLOTS = 64
"""A static cache of open length grows by so many slots at a time."""
_FLOAT32_ACCURACY = "1"
_FATAL_ONLY = 4
"""ONNX Runtime severity; its errors reach us as exceptions, so its own lines on stderr would say them twice."""


class CausalSession(Protocol):
    """A causal language model that can be compared: graph, torch module or engine. Its cache is opaque."""

    @property
    def name(self) -> str:
        """What reports and errors call it."""

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], Any]:
        """Run a prompt: int64 [B, S] -> logits float32 [B, S, V], cache of S tokens."""

    def decode(self, input_ids: NDArray[np.int64], cache: Any) -> tuple[NDArray[np.float32], Any]:
        """Run one more token: int64 [B, 1], cache -> logits float32 [B, 1, V], cache with that token."""


@dataclass(frozen=True)
class OnnxCache:
    """Keys and values as ONNX Runtime returned them, by the name of the input they go back into."""

    values: Mapping[str, Any]
    """`past_key_values.N.key` -> OrtValue [B, H, length, D], in the dtype of the graph; not copied. A static cache is
    [B, H, slots, D] with slots >= length. INT8 codes have scales [B, H, length, 1] beside them."""
    length: int
    """Tokens in the cache."""


@dataclass(frozen=True)
class _PastInput:
    dtype: np.dtype[Any]
    heads: int
    head_size: int
    slots: int | None
    """Length of a static cache, where the graph fixes it."""


@dataclass(frozen=True)
class _Signature:
    ids: Mapping[str, np.dtype[Any]]
    past: Mapping[str, _PastInput]
    past_from_present: Mapping[str, str]

    @property
    def is_static(self) -> bool:
        """Whether the cache is written in place."""
        return WRITE_INDICES in self.ids

    @property
    def fixed_slots(self) -> int | None:
        """Length of a static cache, where the graph fixes it."""
        return next(iter(self.past.values())).slots


class OnnxCausalSession:
    """ONNX Runtime (CPU) on a causal language model with a KV cache.

    Inputs of the graph: `input_ids` [B, S], `attention_mask` [B, past+S], `position_ids` [B, S] and, for each layer N,
    `past_key_values.N.key` and `.value` [B, H, past, D], where past may be 0. Outputs: `logits` [B, S, V], or [B, 1, V]
    for the last token, and `present.N.key` and `.value`. Beside INT8 codes lie `past_key_values.N.key_scale`
    [B, H, past, 1] and so on. A static cache is [B, H, slots, D] before and after, the mask
    [B, slots], and `write_indices` [B] says how many slots are filled; where slots are a dynamic dimension, the session
    gives the cache more of them when they are used up. Dtypes, heads and head sizes are those of the graph; weights
    may be external data.

    Args:
        path: The ONNX file.
        threads: Threads inside an operator; None lets ONNX Runtime take every core.
        name: What reports call it; the file name by default.
        optimization: Graph optimization level. `all` is ONNX Runtime's default, and halves the time of a decode step
            on FP16 graphs: the weights are widened to FP32 once, and not at every call.
        all_logits: Run the form of the graph that gives the logits of every token, where the file gives those of the
            last one (`all_logits`).
        form: Run this in place of the file.
        spin: Let idle threads wait for work without giving up their core: faster, and only for a session that has the
            cores to itself.

    Raises:
        UserError: The file is missing, is not a graph ONNX Runtime can run, or its inputs and outputs are not those
            above; all that is missing is listed.
    """

    inputs: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("input_ids", "attention_mask", "position_ids"), INTEGER_TYPES
    )
    """Inputs beside the cache -> types they may have."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None,
        name: str | None = None,
        optimization: GraphOptimization = "all",
        all_logits: bool = False,
        form: OrtForm | None = None,
        spin: bool = False,
    ) -> None:
        self.name = path.name if name is None else name
        self._path = path
        self._given: Mapping[str, NDArray[Any]] = {}
        if form is None and all_logits and gives_last_only(path):
            graph: bytes | OrtForm | None = graph_with_all_logits(path)
        else:
            graph = form
        self._session = session_from_path(path, threads, optimization, graph, spin=spin)
        self._signature = _signature_from_session(path, self._session, self.inputs)
        self._outputs = ["logits", *self._signature.past_from_present]
        self.range_output = range_output_from_ort(path, self._session)

    @property
    def layers(self) -> int:
        """Layers that have a KV cache."""
        return sum(name.endswith(".key") for name in self._signature.past)

    def prefill_feed(self, input_ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Every input of the graph for a prompt without padding, in the graph's dtypes; the past has no tokens.

        Raises:
            UserError: The graph's cache is shorter than the prompt.
        """
        batch, length = input_ids.shape
        slots = self._slots_for(length) if self._signature.is_static else 0
        feed = self._ids_feed(input_ids, 0, slots)
        for name, past in self._signature.past.items():
            feed[name] = np.zeros((batch, past.heads, slots, past.head_size), past.dtype)
        return feed

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], OnnxCache]:
        """Run a prompt without padding: [B, S] -> logits [B, S, V], cache of S tokens.

        Raises:
            UserError: ONNX Runtime cannot run the graph on these tokens, or its cache is too short for them.
        """
        feed = {name: ort_value_from_array(array) for name, array in self.prefill_feed(input_ids).items()}
        return self._run(feed, input_ids.shape[1])

    def decode(self, input_ids: NDArray[np.int64], cache: OnnxCache) -> tuple[NDArray[np.float32], OnnxCache]:
        """Run the next token(s): [B, S], cache -> logits [B, S, V], a new cache; the given one stays as it is.

        Raises:
            UserError: ONNX Runtime cannot run the graph on these tokens, or its cache is too short for them.
        """
        ids_feed, past = self._next_feed(input_ids, cache)
        feed = {name: ort_value_from_array(array) for name, array in ids_feed.items()}
        return self._run({**feed, **past}, cache.length + input_ids.shape[1])

    def decode_feed(self, input_ids: NDArray[np.int64], cache: OnnxCache) -> dict[str, NDArray[Any]]:
        """Every input of the graph for the next token(s), in the graph's dtypes; the past is a copy of the cache."""
        ids_feed, past = self._next_feed(input_ids, cache)
        return {**ids_feed, **{name: array_from_ort_value(value).copy() for name, value in past.items()}}

    def _next_feed(self, ids: NDArray[np.int64], cache: OnnxCache) -> tuple[dict[str, Any], Mapping[str, Any]]:
        length = cache.length + ids.shape[1]
        slots = self._slots_for(length) if self._signature.is_static else 0
        past = {name: _with_slots(value, slots) for name, value in cache.values.items()} if slots else cache.values
        return self._ids_feed(ids, cache.length, slots), past

    def _slots_for(self, length: int) -> int:
        """Length of a static cache for so many tokens."""
        fixed = self._signature.fixed_slots
        if fixed is not None and length > fixed:
            cause = f"its KV cache has {fixed} slots, and {length} tokens are asked of it"
            raise UserError(str(self._path), cause, "give it fewer tokens, or a graph with a longer cache")
        return fixed if fixed is not None else -(-length // _SLOTS) * _SLOTS

    def _ids_feed(self, input_ids: NDArray[np.int64], past_length: int, slots: int) -> dict[str, NDArray[Any]]:
        return feed_from_ids(input_ids, past_length, slots, self._signature.ids, self._given)

    def _run(self, feed: Mapping[str, Any], length: int) -> tuple[NDArray[np.float32], OnnxCache]:
        try:
            ranges = [OUTPUT_NAME] if self.range_output.is_wanted else []
            logits, *presents = self._session.run_with_ort_values([*self._outputs, *ranges], feed)
        except ORT_ERRORS as error:
            raise UserError(
                str(self._path),
                f"ONNX Runtime cannot run it ({first_line(error)})",
                "check that the tokens come from this model's tokenizer, and export the model again",
            ) from error
        if ranges:
            self.range_output.tell(float32_from_ort_value(presents.pop()))
        past_names = self._signature.past_from_present.values()
        return float32_from_ort_value(logits), OnnxCache(dict(zip(past_names, presents, strict=True)), length)


def session_from_path(
    path: Path,
    threads: int | None,
    optimization: GraphOptimization,
    graph: bytes | OrtForm | None = None,
    *,
    spin: bool = False,
) -> Any:
    """A session of a file, or of a graph whose weights lie beside that file; arguments as for `OnnxCausalSession`.

    Raises:
        UserError: ONNX Runtime cannot open it.
    """
    if not path.is_file():
        raise UserError(str(path), "no such file", "run the stage that writes it first")
    options = ort.SessionOptions()
    options.graph_optimization_level = _OPTIMIZATION_LEVELS[optimization]
    options.log_severity_level = _FATAL_ONLY
    # Idle threads that spin take the cores from whatever runs next to them: where two are compared, the other session.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    # The default, 4, quantizes the activations of every block-INT4 MatMul once more, in blocks.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FLOAT32_ACCURACY)
    # Read only where the graph comes as bytes: a file is its own place.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if threads is not None:
        options.intra_op_num_threads = threads
    if isinstance(graph, OrtForm):
        register_operators(options, graph.operators)
        graph = graph.graph
    try:
        return ort.InferenceSession(str(path) if graph is None else graph, options, providers=["CPUExecutionProvider"])
    except ort_errors.NotImplemented as error:
        raise UserError(
            str(path),
            f"ONNX Runtime has no CPU kernel for an operator of this graph ({first_line(error)})",
            "BF16 graphs are the usual case: verify an FP16 or FP32 export of the same model",
        ) from error
    except ORT_ERRORS as error:
        raise UserError(
            str(path),
            f"ONNX Runtime cannot open it ({first_line(error)})",
            "see that the weights file lies beside it whole, or export the model again",
        ) from error


def _with_slots(value: Any, slots: int) -> Any:
    """A static cache with at least so many slots; the same one where it has them."""
    batch, heads, found, size = value.shape()
    if found >= slots:
        return value
    longer = np.zeros((batch, heads, slots, size), DTYPE_FROM_ORT_TYPE[value.data_type()])
    longer[:, :, :found] = array_from_ort_value(value)
    return ort_value_from_array(longer)


def _signature_from_session(path: Path, session: Any, types: Mapping[str, tuple[str, ...]]) -> _Signature:
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    cached = {match.groups() for name in inputs if (match := PAST.fullmatch(name))}
    cached |= {match.groups() for name in outputs if (match := PRESENT.fullmatch(name))}
    keys = sorted(cached or {("0", "key"), ("0", "value")}, key=lambda key: (int(key[0]), key[1]))
    layers = dict.fromkeys(layer for layer, _ in keys)
    pairs = {
        f"present.{layer}.{kind}": f"past_key_values.{layer}.{kind}" for layer in layers for kind in ("key", "value")
    }
    codes = [past for past in pairs.values() if past + SCALE in inputs]
    floats = [past for past in pairs.values() if past not in codes] + [past + SCALE for past in codes]
    pairs |= {f"{present}{SCALE}": past + SCALE for present, past in pairs.items() if past in codes}
    ids = {**types, **({WRITE_INDICES: INTEGER_TYPES} if WRITE_INDICES in inputs else {})}
    problems = [
        *(problem for name in ids for problem in _type_problems("input", (name,), inputs, ids[name])),
        *_type_problems("input", floats, inputs, FLOAT_TYPES),
        *_type_problems("input", codes, inputs, _INT8_TYPES),
        *_shape_problems(pairs.values(), inputs),
        *_type_problems("output", ("logits",), outputs, FLOAT_TYPES),
        *_type_problems("output", pairs, outputs, (*FLOAT_TYPES, *_INT8_TYPES)),
        *(Problem(name, "input that nothing fills") for name in inputs.keys() - {*ids, *pairs.values()}),
    ]
    if problems:
        hint = "export it as a causal language model with a KV cache: fptq-export trace does"
        raise UserErrors(str(path), problems, hint)
    past = {}
    for name in pairs.values():
        _, heads, slots, head_size = inputs[name].shape
        fixed = slots if isinstance(slots, int) and WRITE_INDICES in inputs else None
        past[name] = _PastInput(DTYPE_FROM_ORT_TYPE[inputs[name].type], heads, head_size, fixed)
    return _Signature({name: DTYPE_FROM_ORT_TYPE[inputs[name].type] for name in ids}, past, pairs)


def _type_problems(kind: str, names: Any, found: Mapping[str, Any], types: tuple[str, ...]) -> list[Problem]:
    missing = [Problem(name, f"missing {kind}") for name in names if name not in found]
    wrong = [
        Problem(name, f"{kind} is {found[name].type}, not {' or '.join(types)}")
        for name in names
        if name in found and found[name].type not in types
    ]
    return [*missing, *wrong]


def _shape_problems(names: Any, inputs: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for name in names:
        shape = inputs[name].shape if name in inputs else [None, 1, None, 1]
        if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
            problems.append(
                Problem(name, f"shape {shape} is not [batch, heads, past, head size], the 2nd and 4th fixed")
            )
    return problems
