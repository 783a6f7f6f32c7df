"""An engine in the same server, as a `CausalSession`."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.range_outputs import OUTPUT_NAME
from fptq_export.triton.plan_facts import PlanTensor
from fptq_export.triton.serving.called_plan import CalledPlan
from fptq_export.verify.causal_inputs import WRITE_INDICES, feed_from_ids
from fptq_export.verify.range_output import RangeOutput

__all__ = ["PlanCache", "PlanSession"]

_DTYPES: Mapping[str, Any] = {
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
}
_LOGITS = "logits"


class _Sequence:
    """A sequence whose cache the server keeps."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class PlanCache:
    """Where a text is."""

    length: int
    tensors: Mapping[str, Any]
    """`present.N.key` -> the backend's tensor, where the text model carries the cache; empty where the server does."""
    sequence: _Sequence | None = None
    """When nothing refers to it any more, the server is told that the sequence has ended."""


class PlanSession:
    """Calls the model of an engine.

    Args:
        backend: `triton_python_backend_utils`.
        plan: The engine.
        version: Of its model.
    """

    def __init__(self, backend: Any, plan: CalledPlan, version: int) -> None:
        self.name = f"{plan.plan} version {version}"
        self._backend = backend
        self._plan = plan
        self._version = version
        self._facts = plan.facts
        self._is_static = plan.facts.cache_kind == "static"
        self._sequences = itertools.count(1)
        self.range_output = RangeOutput(plan.ranges)

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], PlanCache]:
        """Run a prompt: int64 [1, S] -> logits float32 [1, S, V], or [1, 1, V] where the engine gives the last."""
        if not self._plan.stateful:
            return self._step(input_ids, PlanCache(0, {}), self._empty_cache(len(input_ids)))
        sequence = _Sequence(next(self._sequences))
        cache = PlanCache(0, {}, sequence)
        found = self._step(input_ids, cache, [], self._backend.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START)
        # Not before the call: a sequence that did not start cannot end.
        weakref.finalize(sequence, self._end, sequence.number)
        return found

    def decode(self, input_ids: NDArray[np.int64], cache: PlanCache) -> tuple[NDArray[np.float32], PlanCache]:
        """Run the next token: int64 [1, 1], cache -> logits float32 [1, 1, V], a new cache."""
        past = [self._renamed(item.past.name, cache.tensors[item.present]) for item in self._carried()]
        return self._step(input_ids, cache, past)

    def _carried(self) -> tuple[Any, ...]:
        return () if self._plan.stateful else self._facts.cache

    def _step(
        self, input_ids: NDArray[np.int64], cache: PlanCache, past: list[Any], flags: int = 0
    ) -> tuple[NDArray[np.float32], PlanCache]:
        number = cache.sequence.number if cache.sequence is not None else 0
        outputs = self._call([*self._fed(input_ids, cache.length), *past], number, flags)
        logits = _host_array(outputs.pop(_LOGITS)).astype(np.float32)
        if OUTPUT_NAME in outputs:
            self.range_output.tell(_host_array(outputs.pop(OUTPUT_NAME)))
        return logits, PlanCache(cache.length + input_ids.shape[1], outputs, cache.sequence)

    def _fed(self, ids: NDArray[np.int64], past: int) -> list[Any]:
        dtypes = {item.name: np.dtype(_DTYPES[item.data_type]) for item in self._facts.inputs}
        arrays = feed_from_ids(ids, past, self._slots() if self._is_static else 0, dtypes)
        if WRITE_INDICES in arrays and not self._facts.batch_dims:
            # The config has a dimension beside the batch's, which the server takes away.
            arrays[WRITE_INDICES] = arrays[WRITE_INDICES][:, None]
        return [self._backend.Tensor(name, array) for name, array in arrays.items()]

    def _slots(self) -> int:
        return next(item.dims[-1] for item in self._facts.inputs if item.name == "attention_mask")

    def _tensor(self, item: PlanTensor, array: NDArray[Any]) -> Any:
        return self._backend.Tensor(item.name, np.ascontiguousarray(array, _DTYPES[item.data_type]))

    def _empty_cache(self, batch: int) -> list[Any]:
        skip = self._facts.batch_dims
        shapes = {item.past: tuple(max(dim, 0) for dim in item.past.dims[skip:]) for item in self._facts.cache}
        return [self._tensor(past, np.zeros((batch, *shape))) for past, shape in shapes.items()]

    def _renamed(self, name: str, tensor: Any) -> Any:
        """The same values under another name, where they lie: on the GPU nothing is copied."""
        return self._backend.Tensor.from_dlpack(name, tensor.to_dlpack())

    def _call(self, inputs: list[Any], number: int, flags: int) -> dict[str, Any]:
        ranges = [OUTPUT_NAME] if self.range_output.is_wanted else []
        request = self._backend.InferenceRequest(
            model_name=self._plan.plan,
            requested_output_names=[_LOGITS, *ranges, *(item.present for item in self._carried())],
            inputs=inputs,
            model_version=self._version,
            correlation_id=number,
            flags=flags,
        )
        response = request.exec()
        if response.has_error():
            cause = f"cannot run ({response.error().message()})"
            raise UserError(self.name, cause, "see the server's log; load the model, or stay below its limits")
        return {tensor.name(): tensor for tensor in response.output_tensors()}

    def _end(self, number: int) -> None:
        """Tell the server that a sequence has ended: its buffers are for another one."""
        token = np.zeros((1, 1), np.int64)
        self._call(self._fed(token, 0), number, self._backend.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END)


def _host_array(tensor: Any) -> NDArray[Any]:
    """Values of a tensor; those on a GPU are copied from it."""
    if tensor.is_cpu():
        return np.asarray(tensor.as_numpy())
    import torch.utils.dlpack

    return np.asarray(torch.utils.dlpack.from_dlpack(tensor.to_dlpack()).cpu().numpy())
