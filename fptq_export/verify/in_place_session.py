"""A causal language model whose cache is one buffer that the graph writes into."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fptq_export.cpu.cached_attention import KEY_PANEL
from fptq_export.errors import UserError
from fptq_export.range_outputs import COLUMNS, OUTPUT_NAME
from fptq_export.verify.causal_inputs import PAST, feed_from_ids
from fptq_export.verify.ort_values import DTYPE_FROM_ORT_TYPE, array_from_ort_value, float32_from_ort_value
from fptq_export.verify.range_output import range_output_from_ort
from fptq_export.verify.sessions import ORT_ERRORS, OrtForm, first_line, session_from_path

__all__ = ["InPlaceCache", "InPlaceCausalSession"]

_LEAST_SLOTS = 256
"""Of a cache, a multiple of `KEY_PANEL`; it doubles where they are used up."""
_RUN_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, RuntimeError)
"""A run with bound values raises the second."""
_PAST, _PRESENT = "past_key_values", "present"


@dataclass
class _Buffer:
    """Keys and values of one text, bound to the graph as past and present at once."""

    binding: Any
    values: dict[str, Any]
    """`past_key_values.N.key` -> OrtValue float32 [B, H, slots, D], keys in the order of the operator."""
    slots: int
    logits: Any
    """OrtValue float32 [B, 1, V]."""
    ranges: Any
    """OrtValue float32 [rows, 3], the output `range_monitor`; None where the graph has none."""
    filled: int = 0
    """Tokens that were written last: a cache of another length is one that the text went on from already."""


@dataclass(frozen=True)
class InPlaceCache:
    """The first `length` tokens of a buffer; not to be used from two threads at once."""

    length: int
    _buffer: _Buffer = field(repr=False)


class InPlaceCausalSession:
    """ONNX Runtime (CPU) on a graph whose `FptqCachedAttention` writes keys and values where the caller keeps them.

    As `OnnxCausalSession`, but no call copies the cache. A cache that was decoded from can be decoded from again: the
    second time, its tokens are copied into a buffer of their own. Logits are float32 [B, 1, V], of the last token.

    Args:
        path: The portable graph; its weights lie beside it.
        form: Its form with the cache in place.
        threads: Threads inside an operator; None lets ONNX Runtime take every core.
        name: What reports call it.
        spin: As for `OnnxCausalSession`.

    Raises:
        UserError: ONNX Runtime cannot open it.
    """

    def __init__(self, path: Path, form: OrtForm, *, threads: int | None, name: str, spin: bool = False) -> None:
        self.name = name
        self._path = path
        self._session = session_from_path(path, threads, "all", form, spin=spin)
        self.range_output = range_output_from_ort(path, self._session)
        self._shapes = {
            value.name: (int(value.shape[1]), int(value.shape[3]))
            for value in self._session.get_inputs()
            if PAST.fullmatch(value.name)
        }
        self._vocabulary = next(value.shape[-1] for value in self._session.get_outputs() if value.name == "logits")
        self._dtypes = {
            value.name: DTYPE_FROM_ORT_TYPE[value.type]
            for value in self._session.get_inputs()
            if value.name not in self._shapes
        }

    @property
    def layers(self) -> int:
        """Layers that have a KV cache."""
        return len(self._shapes) // 2

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], InPlaceCache]:
        """Run a prompt without padding: [B, S] -> logits [B, 1, V], cache of S tokens.

        Raises:
            UserError: ONNX Runtime cannot run the graph on these tokens.
        """
        batch, length = input_ids.shape
        return self._run(input_ids, InPlaceCache(0, self._new_buffer(batch, length)))

    def decode(self, input_ids: NDArray[np.int64], cache: InPlaceCache) -> tuple[NDArray[np.float32], InPlaceCache]:
        """Run the next token(s): [B, S], cache -> logits [B, 1, V], a cache with them; the given one stays as it is.

        Raises:
            UserError: ONNX Runtime cannot run the graph on these tokens.
        """
        buffer, needed = cache._buffer, cache.length + input_ids.shape[1]
        if cache.length != buffer.filled or needed > buffer.slots:
            cache = InPlaceCache(cache.length, self._copied(buffer, cache.length, needed))
        return self._run(input_ids, cache)

    def _new_buffer(self, batch: int, length: int) -> _Buffer:
        slots = _LEAST_SLOTS
        while slots < length:
            slots *= 2
        values = {
            name: ort.OrtValue.ortvalue_from_shape_and_type([batch, heads, slots, size], np.float32)
            for name, (heads, size) in self._shapes.items()
        }
        logits = ort.OrtValue.ortvalue_from_shape_and_type([batch, 1, self._vocabulary], np.float32)
        binding = self._session.io_binding()
        binding.bind_ortvalue_output("logits", logits)
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace(_PAST, _PRESENT, 1), value)
        return _Buffer(binding, values, slots, logits, self._bound_ranges(binding))

    def _bound_ranges(self, binding: Any) -> Any:
        described = self.range_output.described
        if described is None:
            return None
        ranges = ort.OrtValue.ortvalue_from_shape_and_type([len(described.rows), len(COLUMNS)], np.float32)
        binding.bind_ortvalue_output(OUTPUT_NAME, ranges)
        return ranges

    def _copied(self, buffer: _Buffer, length: int, needed: int) -> _Buffer:
        """The first tokens of a buffer in another one with enough slots."""
        batch = next(iter(buffer.values.values())).shape()[0]
        copy = self._new_buffer(batch, needed)
        whole = -(-length // KEY_PANEL) * KEY_PANEL
        for name, value in buffer.values.items():
            array_from_ort_value(copy.values[name])[:, :, :whole] = array_from_ort_value(value)[:, :, :whole]
        copy.filled = length
        return copy

    def _run(self, ids: NDArray[np.int64], cache: InPlaceCache) -> tuple[NDArray[np.float32], InPlaceCache]:
        buffer, total = cache._buffer, cache.length + ids.shape[1]
        for name, array in feed_from_ids(ids, cache.length, 0, self._dtypes).items():
            buffer.binding.bind_cpu_input(name, array)
        try:
            self._session.run_with_iobinding(buffer.binding)
        except _RUN_ERRORS as error:
            raise UserError(
                str(self._path),
                f"ONNX Runtime cannot run it ({first_line(error)})",
                "check that the tokens come from this model's tokenizer, and export the model again",
            ) from error
        buffer.filled = total
        if self.range_output.is_wanted:
            self.range_output.tell(array_from_ort_value(buffer.ranges))
        return float32_from_ort_value(buffer.logits), InPlaceCache(total, buffer)
