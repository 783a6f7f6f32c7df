"""A TensorRT engine as a session: its KV cache stays on the GPU between calls; and why there may be none."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fptq_export.build.engine_facts import facts_from_summary
from fptq_export.build.targets import Target, visible_gpus
from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.package.manifest import Manifest
from fptq_export.plugin.library import library_for_loading
from fptq_export.runtime.device_engine import DeviceEngine, IoTensor, Shape
from fptq_export.runtime.device_memory import DeviceMemory, Tensors
from fptq_export.runtime.limits import Limits
from fptq_export.verify.causal_inputs import PAST, SCALE, WRITE_INDICES, feed_from_ids

__all__ = ["EngineCache", "EngineCausalSession", "engine_problem", "opened_engine"]

_LOGITS = "logits"
_IDS = ("input_ids", "attention_mask", "position_ids", WRITE_INDICES)


@dataclass
class _Storage:
    """Where a cache lies, by the names of the inputs. A static cache shares it with those that were decoded from it."""

    tensors: Tensors
    written: int
    """Tokens of the longest cache that lies here."""


@dataclass(frozen=True)
class EngineCache:
    """Keys and values, and scales of INT8 codes, on the GPU."""

    storage: _Storage
    shapes: Mapping[str, Shape]
    """`past_key_values.N.key` -> [B, H, length or slots, D]."""
    batch: int
    length: int
    """Tokens in the cache."""


class EngineCausalSession:
    """A TensorRT engine of a causal language model with a KV cache.

    Inputs and outputs are those of `OnnxCausalSession`. A cache that grows is given as inputs from where the engine
    wrote it as outputs; a static one is input and output at the same address, and the engine writes the new slots only.
    Either way a cache can be decoded from twice, which copies a static one. Calls from several threads take turns.

    Args:
        engine: The engine.
        memory: What it was opened with.
        name: For reports and errors.

    Raises:
        UserErrors: The engine's inputs and outputs are not those of a causal language model.
    """

    def __init__(self, engine: DeviceEngine, memory: DeviceMemory, name: str) -> None:
        self.name = name
        self._engine, self._memory = engine, memory
        self._present_from_past = _present_from_past(engine, name)
        self._dtypes = {key: value.dtype for key, value in engine.inputs.items() if key in _IDS}
        self._slots = 0
        if WRITE_INDICES in engine.inputs:
            self._slots = min(engine.profiles[0][past].maximum[2] for past in self._present_from_past)
        self._lock = threading.Lock()

    @property
    def limits(self) -> Limits:
        """What its profiles take.

        The mask of a cache that grows is longer, by the tokens of a call; but a step behind more tokens than the cache
        may have is refused.
        """
        tops = [{name: item.maximum for name, item in profile.items()} for profile in self._engine.profiles]
        batch, tokens = (max(top["input_ids"][axis] for top in tops) for axis in range(2))
        cached = max(top[past][2] for top in tops for past in self._present_from_past)
        return Limits(tokens, cached, batch)

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], EngineCache]:
        """Run a prompt without padding: int64 [B, S] -> logits float32 [B, S, V] ([B, 1, V] of the last), cache.

        Raises:
            UserError: The engine does not take so many tokens or sequences, the GPU has no room, or the call fails.
        """
        with self._lock:
            return self._run(input_ids, self._empty(len(input_ids)))

    def decode(self, input_ids: NDArray[np.int64], cache: EngineCache) -> tuple[NDArray[np.float32], EngineCache]:
        """Run the next token(s): int64 [B, S], cache -> logits float32 [B, S, V], a new cache; the old one stays.

        Raises:
            UserError: As `prefill`; or the cache is of another number of sequences.
        """
        if len(input_ids) != cache.batch:
            cause = f"tokens of {len(input_ids)} sequences are given behind a cache of {cache.batch}"
            raise UserError(self.name, cause, "go on with the sequences of the prompt")
        with self._lock:
            return self._run(input_ids, cache)

    def _empty(self, batch: int) -> EngineCache:
        inputs = self._engine.inputs
        shapes = {
            past: (batch, inputs[past].shape[1], self._slots, inputs[past].shape[3]) for past in self._present_from_past
        }
        tensors = self._memory.place(_sizes(shapes, inputs))
        # Attention multiplies the slots that are not filled by 0, and 0 times what might lie there may be NaN.
        self._memory.clear(tensors.block)
        return EngineCache(_Storage(tensors, 0), shapes, batch, 0)

    def _run(self, ids: NDArray[np.int64], cache: EngineCache) -> tuple[NDArray[np.float32], EngineCache]:
        length = cache.length + ids.shape[1]
        if self._slots and length > self._slots:
            cause = f"its KV cache has {self._slots} slots, and {length} tokens are asked of it"
            raise UserError(self.name, cause, "give it fewer tokens, or build an engine with a larger --max-kv-len")
        feed = feed_from_ids(ids, cache.length, self._slots, self._dtypes)
        prepared = self._engine.prepared({**{name: array.shape for name, array in feed.items()}, **cache.shapes})
        old, new = self._storages(cache, length, prepared.output_shapes)
        presents = {present: new.tensors.addresses[past] for past, present in self._present_from_past.items()}
        rest = {name: shape for name, shape in prepared.output_shapes.items() if name not in presents}
        results = self._memory.place(_sizes(rest, self._engine.outputs))
        given = self._memory.upload(feed)
        self._engine.run(prepared, {**given.addresses, **old.tensors.addresses, **presents, **results.addresses})
        dtype = self._engine.outputs[_LOGITS].dtype
        logits = self._memory.download(results.addresses[_LOGITS], rest[_LOGITS], dtype)
        shapes = {past: prepared.output_shapes[present] for past, present in self._present_from_past.items()}
        return logits.astype(np.float32), EngineCache(new, shapes, cache.batch, length)

    def _storages(self, cache: EngineCache, length: int, outputs: Mapping[str, Shape]) -> tuple[_Storage, _Storage]:
        """Where the engine reads the cache, and where it writes it: a static one in the same place."""
        storage = cache.storage
        if not self._slots:
            shapes = {past: outputs[present] for past, present in self._present_from_past.items()}
            return storage, _Storage(self._memory.place(_sizes(shapes, self._engine.inputs)), length)
        if storage.written != cache.length:
            # Another cache goes on here, in the slots that this one is about to fill.
            storage = _Storage(self._memory.copy(storage.tensors), cache.length)
        storage.written = length
        return storage, storage


def engine_problem(manifest: Manifest, engine: Path | None) -> str | None:
    """Why an engine cannot be run here, in words; None where nothing is known against it."""
    if engine is None:
        return "the run has no engine; fptq-export build DIR --engine FILE writes one"
    if not engine.is_file():
        return f"{engine} is not there; fptq-export build DIR --engine FILE writes it"
    return None if visible_gpus() else "no NVIDIA GPU is seen here"


@contextmanager
def opened_engine(manifest: Manifest, engine: Path) -> Iterator[EngineCausalSession]:
    """Load an engine on the GPU with the library that built it, and its plugin: from the engine, or from beside it.

    Raises:
        UserError: TensorRT or CUDA is not installed, or refuses the engine, with what it said.
    """
    facts = facts_from_summary(manifest.stages["build"].summary)
    plugin = library_for_loading() if facts.needs_library else None
    with (
        closing(DeviceMemory()) as memory,
        closing(DeviceEngine(Target(facts.target), engine, plugin, memory, host_code=facts.carries_plugin)) as opened,
    ):
        yield EngineCausalSession(opened, memory, str(engine))


def _present_from_past(engine: DeviceEngine, name: str) -> dict[str, str]:
    """Input of a cache -> the output that goes back into it. Raises UserErrors where there is something else."""
    kinds = {past: PAST.fullmatch(past.removesuffix(SCALE)) for past in engine.inputs}
    pairs = {past: past.replace(match[0], f"present.{match[1]}.{match[2]}") for past, match in kinds.items() if match}
    needed = (*_IDS[:1], *([] if pairs else ["past_key_values.0.key"]))
    problems = [
        *(Problem(other, "input that nothing fills") for other in engine.inputs.keys() - {*_IDS, *pairs}),
        *(Problem(other, "missing input") for other in needed if other not in engine.inputs),
        *(Problem(other, "missing output") for other in (_LOGITS, *pairs.values()) if other not in engine.outputs),
    ]
    if problems:
        hint = "build it from a causal language model with a KV cache: fptq-export does"
        raise UserErrors(name, problems, hint)
    return pairs


def _sizes(shapes: Mapping[str, Shape], tensors: Mapping[str, IoTensor]) -> dict[str, int]:
    """Bytes of each tensor."""
    return {name: math.prod(shape) * tensors[name].dtype.itemsize for name, shape in shapes.items()}
