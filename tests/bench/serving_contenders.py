"""What `bench_serving` compares: each a function that writes tokens after a prompt and says when each was there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fptq_export.runtime import Sampling, Session
from fptq_export.runtime.cpu_session import Kernels

__all__ = [
    "GENAI_MISSING",
    "Clock",
    "Contender",
    "Written",
    "build_genai",
    "genai",
    "has_genai",
    "ours",
    "transformers",
]

Clock = Callable[[], float]
"""Seconds since some moment: of the day, or of the CPU that this process had."""
GENAI_MISSING = "onnxruntime-genai is not installed (pip install onnxruntime-genai)"


@dataclass(frozen=True)
class Written:
    """One text: its tokens, and seconds from the start to each of them."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.seconds[0]

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (len(self.seconds) - 1) / (self.seconds[-1] - self.seconds[0])


Contender = Callable[[NDArray[np.int64], int], Written]
"""Prompt tokens [S], how many new ones -> text; greedy, and never ended early."""


def ours(run: Path, threads: int, kernels: Kernels, clock: Clock) -> Contender:
    """A run in `Session`."""
    session = Session.open(run, backend="onnxruntime", threads=threads, kernels=kernels)

    def write(prompt: NDArray[np.int64], new: int) -> Written:
        start = clock()
        sampling = Sampling(max_tokens=new, ignore_eos=True)
        pieces = [(piece.token_id, clock() - start) for piece in session.stream(prompt.tolist(), sampling)]
        tokens, seconds = zip(*pieces, strict=True)
        return Written(tokens, seconds)

    return write


def transformers(checkpoint: Path, threads: int, clock: Clock) -> Contender:
    """`model.generate` of transformers in FP32, with PyTorch's fused attention."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()

    class Stopwatch(BaseStreamer):
        """Notes when tokens come; the first call brings the prompt."""

        def __init__(self) -> None:
            self.start = clock()
            self.seconds: list[float] = []

        def put(self, value: Any) -> None:
            self.seconds.append(clock() - self.start)

        def end(self) -> None:
            """Nothing is left."""

    def write(prompt: NDArray[np.int64], new: int) -> Written:
        stopwatch = Stopwatch()
        ids = torch.from_numpy(prompt[None])
        with torch.inference_mode():
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
                streamer=stopwatch,
            )
        return Written(tuple(written[0, len(prompt) :].tolist()), tuple(stopwatch.seconds[1:]))

    return write


def has_genai() -> bool:
    """Whether onnxruntime-genai is installed."""
    return importlib.util.find_spec("onnxruntime_genai") is not None


def build_genai(checkpoint: Path, output: Path, precision: str, extra: tuple[str, ...] = ()) -> Path:
    """The model as onnxruntime-genai's own builder makes it, for the CPU.

    Raises:
        subprocess.CalledProcessError: The builder fails; what it says is in the error.
    """
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(output)]
    command += ["-p", precision, "-e", "cpu", "-c", str(output / "cache")]
    if extra:
        command += ["--extra_options", *extra]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return output


def genai(directory: Path, threads: int, clock: Clock) -> Contender:
    """A model of onnxruntime-genai."""
    import onnxruntime_genai  # type: ignore[import-not-found,unused-ignore]  # an optional peer

    config = onnxruntime_genai.Config(str(directory))
    config.overlay(f'{{"model":{{"decoder":{{"session_options":{{"intra_op_num_threads":{threads}}}}}}}}}')
    model = onnxruntime_genai.Model(config)

    def write(prompt: NDArray[np.int64], new: int) -> Written:
        start = clock()
        length = len(prompt) + new
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt[None].astype(np.int32))
        tokens, seconds = [], []
        for _ in range(new):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            seconds.append(clock() - start)
        return Written(tuple(tokens), tuple(seconds))

    return write
