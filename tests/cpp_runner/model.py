"""The tiny model of samples/06_cpp_runner/tests/tiny_model.h a second time, without a cache; and its plan."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fptq_export.runtime.sampling import Sampling, chosen_token

__all__ = ["LIBRARY_VERSION", "Spec", "completion", "keys_and_values", "logits", "pairs", "write_plan"]

LIBRARY_VERSION = (1, 7, 1, 116)


@dataclass(frozen=True)
class Spec:
    """What a plan of the double holds."""

    static: bool = False
    int8: bool = False
    layers: int = 2
    heads: int = 2
    head_size: int = 4
    vocabulary: int = 37
    batch: int = 2
    input: int = 8
    past: int = 12
    ids: str = "int64"
    type: str = "float16"
    logits: str = "all"
    two_profiles: bool = False
    carries_plugin: bool = False


def write_plan(path: Path, spec: Spec) -> Path:
    """An engine for the double: a header as TensorRT for RTX writes it, and the model in words."""
    body = pairs(asdict(spec)).encode()
    header = b"vtrt".ljust(16, b"\0") + struct.pack("<Q", 32 + len(body)) + bytes(LIBRARY_VERSION) + bytes(4)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header + body)
    return path


def pairs(settings: Mapping[str, object]) -> str:
    """Settings as the double reads them: names and values between spaces, truth as 1 and 0."""
    words = {name: int(value) if isinstance(value, bool) else value for name, value in settings.items()}
    return " ".join(f"{name} {value}" for name, value in words.items())


def keys_and_values(tokens: Sequence[int], spec: Spec, layer: int, kind: int) -> NDArray[np.int64]:
    """Keys (kind 0) or values (1) of a sequence: int64 [heads, tokens, head size]."""
    ids = np.array(tokens)[None, :, None]
    positions = np.arange(len(tokens))[None, :, None]
    heads = np.arange(spec.heads)[:, None, None]
    columns = np.arange(spec.head_size)[None, None, :]
    return (7 * ids + 3 * positions + 5 * layer + 11 * kind + 2 * heads + columns) % 13 - 6


def logits(tokens: Sequence[int], spec: Spec) -> NDArray[np.float32]:
    """Logits behind the last token, float32 [V]."""
    slots = np.arange(1, len(tokens) + 1)[None, :, None]
    heads = np.arange(1, spec.heads + 1)[:, None, None]
    total = 0
    for layer in range(spec.layers):
        keys, values = (keys_and_values(tokens, spec, layer, kind) for kind in (0, 1))
        total += int((slots * ((layer + 1) * keys + heads * values)).sum())
    ids = np.arange(spec.vocabulary)
    return ((total * (ids + 3) + 5 * (len(tokens) - 1) + ids * ids) % 101 / 8).astype(np.float32)


def completion(prompt: Sequence[int], spec: Spec, sampling: Sampling, *, row: int = 0, stop: int = -1) -> list[int]:
    """What follows a prompt, computed anew from all tokens at every step; sequence `row` has the seed after `seed`."""
    generator = np.random.default_rng((sampling.seed or 0) + row)
    tokens = list(prompt)
    for _ in range(sampling.max_tokens):
        tokens.append(chosen_token(logits(tokens, spec), sampling, generator))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]
