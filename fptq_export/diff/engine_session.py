"""A TensorRT engine as a session, through Polygraphy's runner; and why there may be none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from fptq_export.build.targets import Target, module_name, visible_gpus
from fptq_export.errors import UserError
from fptq_export.package.manifest import Manifest
from fptq_export.plugin.library import library_that_registers
from fptq_export.verify.sessions import CausalSession

__all__ = ["RunnerCache", "RunnerSession", "engine_problem", "opened_engine"]

_BATCH = 1
_LOGITS = "logits"
_PAST, _PRESENT = "past_key_values.", "present."
_RTX_VARIABLE = "POLYGRAPHY_USE_TENSORRT_RTX"


@dataclass(frozen=True)
class RunnerCache:
    """Keys and values, and scales of INT8 codes, as a runner gave them."""

    values: Mapping[str, NDArray[Any]]
    """`past_key_values.N.key` -> [B, H, length, D]."""
    length: int


class RunnerSession:
    """A Polygraphy runner of a causal language model with a growing KV cache, as a `CausalSession`.

    Args:
        runner: Active. Its inputs are those of `OnnxCausalSession`, without `write_indices`.
        name: For reports.
    """

    def __init__(self, runner: BaseRunner, name: str) -> None:
        self.name = name
        self._runner = runner
        self._inputs = runner.get_input_metadata(use_numpy_dtypes=False)

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], RunnerCache]:
        """Run a prompt: int64 [B, S] -> logits float32 [B, S, V], cache of S tokens."""
        empty = {
            name: np.zeros((len(input_ids), meta.shape[1], 0, meta.shape[3]), np.dtype(meta.dtype.numpy()))
            for name, meta in self._inputs.items()
            if name.startswith(_PAST)
        }
        return self.decode(input_ids, RunnerCache(empty, 0))

    def decode(self, input_ids: NDArray[np.int64], cache: RunnerCache) -> tuple[NDArray[np.float32], RunnerCache]:
        """Run the next token(s): int64 [B, S], cache -> logits float32 [B, S, V], a new cache.

        Raises:
            UserError: Polygraphy or the engine refuses the call.
        """
        batch, tokens = input_ids.shape
        length = cache.length + tokens
        positions = np.broadcast_to(np.arange(cache.length, length), (batch, tokens))
        ids = {"input_ids": input_ids, "attention_mask": np.ones((batch, length)), "position_ids": positions}
        feed = {name: np.ascontiguousarray(ids[name], self._inputs[name].dtype.numpy()) for name in ids}
        try:
            outputs = self._runner.infer({**feed, **cache.values})
        except PolygraphyException as error:
            cause = f"cannot run {tokens} tokens behind {cache.length} ({str(error).strip()})"
            raise UserError(self.name, cause, "stay below the engine's --max-input-len and --max-kv-len") from error
        # A runner may give the same buffers again at the next call.
        values = {name: np.array(outputs[name.replace(_PAST, _PRESENT, 1)]) for name in cache.values}
        return outputs[_LOGITS].astype(np.float32), RunnerCache(values, length)


def engine_problem(manifest: Manifest, engine: Path | None) -> str | None:
    """Why an engine cannot be run here and compared, in words; None where it can be."""
    if engine is None:
        return "the run has no engine; fptq-export build DIR --engine FILE writes one"
    if not engine.is_file():
        return f"{engine} is not there; fptq-export build DIR --engine FILE writes it"
    options = manifest.options
    if options.kv_cache == "static":
        return "its static KV cache is written in place, and Polygraphy's runner binds no buffer to input and output"
    if options.logits == "last":
        return "it gives logits of the last token only; the onnx column is the same model with all of them"
    if options.dtype == "bf16":
        return "its BF16 cache has no type in NumPy, which Polygraphy's runner hands it over in"
    return None if visible_gpus() else "no NVIDIA GPU is seen here"


@contextmanager
def opened_engine(manifest: Manifest, engine: Path) -> Iterator[CausalSession]:
    """Load an engine on the GPU with the library that built it.

    Raises:
        UserError: TensorRT is not installed, or refuses the engine.
    """
    target = Target(str(manifest.stages["build"].summary["target"]))
    if target == Target.TENSORRT_RTX:
        os.environ[_RTX_VARIABLE] = "1"  # Polygraphy reads it when its TensorRT backend is imported.
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, LoadPlugins, TrtRunner

    serialized: Any = BytesFromPath(str(engine))
    if manifest.options.plugin == "on":
        serialized = LoadPlugins(plugins=[str(library_that_registers())], obj=serialized)
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL), TrtRunner(EngineFromBytes(serialized)) as runner:
            yield RunnerSession(runner, "tensorrt")
    except (PolygraphyException, ImportError) as error:
        cause = f"{module_name(target)} cannot load it ({str(error).strip()})"
        raise UserError(str(engine), cause, "build it again on this machine, or leave it out with --systems") from error
