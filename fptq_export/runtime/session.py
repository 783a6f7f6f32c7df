"""`Session`: a model that was exported, ready to write text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.runtime.cpu_session import Kernels, cpu_session
from fptq_export.runtime.engine_session import opened_engine
from fptq_export.runtime.generation import Completion, Generation, Piece, completion_from_pieces, now
from fptq_export.runtime.limits import Limits
from fptq_export.runtime.ranges import range_monitor_of
from fptq_export.runtime.sampling import Sampling
from fptq_export.runtime.source import Backend, Source, backend_for, limits_of, ranges_of_source, source_from_path
from fptq_export.runtime.text import TextTokenizer, tokenizer_from_directory
from fptq_export.verify.sessions import CausalSession

__all__ = ["Prompt", "Session"]

Prompt = str | Sequence[int]
"""Text, or tokens."""


class Session:
    """A causal language model and its tokenizer.

    `Session.open` finds both in a run directory; this constructor takes them from elsewhere.

    Args:
        model: Calls of it may come from several threads only if it says so itself (ONNX Runtime does).
        tokenizer: Without one, prompts are token ids and answers have no text.
        limits: Of the model.
        backend: What runs the model.
        note: Why it is not the engine, where one might expect it.
    """

    def __init__(
        self,
        model: CausalSession,
        tokenizer: TextTokenizer | None = None,
        limits: Limits | None = None,
        *,
        backend: Backend = "onnxruntime",
        note: str = "",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self.backend: Backend = backend
        self.note = note
        self.ranges = range_monitor_of(model)
        """What static layers have clipped so far; None where the model has no output `range_monitor`."""
        self._resources = ExitStack()

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        engine: str | Path | None = None,
        backend: Backend | Literal["auto"] = "auto",
        threads: int | None = None,
        kernels: Kernels = "auto",
    ) -> Session:
        """Open what `fptq-export` wrote.

        Args:
            source: Run directory, engine, or ONNX graph.
            engine: An engine of the run; by default the last one built.
            backend: `auto` takes the engine where there is one and a GPU, else the portable graph in ONNX Runtime;
                `note` then says why.
            threads: Of ONNX Runtime, inside an operator; None takes every core.
            kernels: With `onnxruntime`, what computes the W4A8 linears: `cpu` is `fptq_export.cpu`, which is faster and
                has to be built; `stock` is ONNX Runtime's own operators; `auto` takes the first where it is built.
                `model.name` says which of the two runs.

        Raises:
            UserError: A file is missing or wrong, the kernels are asked for and not built, or the engine will not load
                here; it says why, as `doctor` does.
        """
        found = source_from_path(Path(source), None if engine is None else Path(engine))
        choice = backend_for(found, backend)
        with ExitStack() as resources:
            model, limits = _model(found, choice.backend, threads, kernels, resources)
            tokenizer = tokenizer_from_directory(found.directory)
            session = cls(model, tokenizer, limits, backend=choice.backend, note=choice.note)
            session._resources = resources.pop_all()
        return session

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Free the engine."""
        self._resources.close()

    def prefill(self, input_ids: Any) -> tuple[Any, Any]:
        """Run a prompt: integers [B, S] -> logits float32 [B, S, V] ([B, 1, V] where the graph gives the last), cache.

        NumPy arrays give NumPy arrays, torch tensors give torch tensors.
        """
        logits, cache = self.model.prefill(_array(input_ids))
        return _like(input_ids, logits), cache

    def decode(self, input_ids: Any, cache: Any) -> tuple[Any, Any]:
        """Run one more token: integers [B, 1], cache -> logits float32 [B, 1, V], cache with that token."""
        logits, cache = self.model.decode(_array(input_ids), cache)
        return _like(input_ids, logits), cache

    def tokens(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt.

        Raises:
            UserError: It is a text, and there is no tokenizer.
        """
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise UserError(
                self.model.name,
                "there is no tokenizer.json beside the model",
                "give token ids, or copy the model's tokenizer files into the run directory",
            )
        return self.tokenizer.encode(prompt)

    def generation(self, prompt: Prompt, sampling: Sampling | None = None) -> Generation:
        """A text that is written step by step.

        Raises:
            UserError: The prompt is empty, too long, or holds what is no token.
        """
        return Generation(self.model, self.tokens(prompt), sampling or Sampling(), self.tokenizer, self.limits)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Piece]:
        """Write a text, piece by piece.

        Raises:
            UserError: As `generation`, before the first piece; or the model cannot run.
        """
        generation = self.generation(prompt, sampling)
        return _pieces(generation)

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Completion:
        """Write a whole text.

        Raises:
            UserError: As `stream`.
        """
        generation = self.generation(prompt, sampling)
        started = now()
        pieces = [(piece, now()) for piece in _pieces(generation)]
        return completion_from_pieces(pieces, generation.prompt_tokens, started)


def _pieces(generation: Generation) -> Iterator[Piece]:
    while not generation.is_done:
        yield generation.step()


def _model(
    source: Source, backend: Backend, threads: int | None, kernels: Kernels, resources: ExitStack
) -> tuple[CausalSession, Limits]:
    if backend == "onnxruntime":
        return cpu_session(source.graph, threads, kernels), limits_of(source)
    if source.manifest is None or source.engine is None:
        raise AssertionError("an engine is chosen only where a manifest names it")
    opened = opened_engine(source.manifest, source.engine, ranges_of_source(source))
    model = resources.enter_context(opened)
    return model, model.limits


def _array(input_ids: Any) -> NDArray[np.int64]:
    """Ids of NumPy, torch or lists, as [B, S]."""
    ids = np.asarray(input_ids.cpu() if _is_torch(input_ids) else input_ids)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        cause = f"are {ids.dtype} of shape {list(ids.shape)}"
        raise UserError("input_ids", cause, "give integers [batch, tokens], one token at least")
    return ids.astype(np.int64)


def _like(given: Any, logits: NDArray[np.float32]) -> Any:
    if not _is_torch(given):
        return logits
    import torch

    return torch.from_numpy(logits).to(given.device)


def _is_torch(value: Any) -> bool:
    """Without an import of torch, which a NumPy user need not wait for."""
    return type(value).__module__.partition(".")[0] == "torch"
