"""`FptqCachedAttention`: attention in float64, the cache in place, and refusals with a reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fptq_export.cpu.cached_attention import KEY_PANEL, MAX_HEAD_SIZE
from fptq_export.rewrite.cache_in_place import CACHED_ATTENTION
from fptq_export.rewrite.lower_to_cpu import CPU_DOMAIN
from fptq_export.verify.ort_values import array_from_ort_value
from tests.support.ort_operators import session_of as operator_session
from tests.support.w4a8_cases import EXP_ROUNDINGS, FP32_UNIT_ROUNDOFF, assert_same_bits, assert_within

Arrays = dict[str, NDArray[Any]]
HEADER = Path(__file__).parents[3] / "plugins/cpu/attention_cpu.h"
ROTATION_ROUNDINGS = 4
"""Of a rotated and scaled number: two products, a sum, a product."""


@dataclass(frozen=True)
class Sizes:
    """Of a text that goes on behind `past` tokens."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    size: int
    past: int
    rotates: bool = True

    @property
    def total(self) -> int:
        """Tokens in the cache after the call."""
        return self.past + self.tokens

    @property
    def slots(self) -> int:
        """Of the cache."""
        return -(-self.total // KEY_PANEL) * KEY_PANEL + KEY_PANEL


CASES = (
    Sizes(1, 1, 9, 3, 64, 0),
    Sizes(1, 1, 9, 3, 64, 300),
    Sizes(2, 5, 4, 2, 16, 11),
    Sizes(1, 40, 6, 2, 80, 130),
    Sizes(1, 3, 2, 2, 256, 17, rotates=False),
    Sizes(2, 33, 2, 1, 32, 0),
)


def numbers(sizes: Sizes, seed: int = 0) -> Arrays:
    """q, k and v of the whole text, [batch, total, heads x size], and the angles of its tokens."""
    rng = np.random.default_rng(seed)
    shape = (sizes.batch, sizes.total)
    found = {
        name: rng.standard_normal((*shape, heads * sizes.size)).astype(np.float32)
        for name, heads in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads))
    }
    angle = rng.uniform(0, 7, (*shape, sizes.size // 2))
    return found | {"cosines": np.cos(angle).astype(np.float32), "sines": np.sin(angle).astype(np.float32)}


def session_of(sizes: Sizes, threads: int = 1, **changes: Any) -> onnxruntime.InferenceSession:
    """One node; `changes`: attributes of it."""
    names = ["q", "k", "v", "past_key", "past_value", "total", *(["cosines", "sines"] if sizes.rotates else [])]
    attributes = {"num_heads": sizes.heads, "kv_num_heads": sizes.kv_heads, "scale": sizes.size**-0.5, **changes}
    outputs = ["y", "present_key", "present_value"]
    node = helper.make_node(CACHED_ATTENTION, names, outputs, domain=CPU_DOMAIN, **attributes)
    types = {name: TensorProto.INT32 if name == "total" else TensorProto.FLOAT for name in names[1:]}
    return operator_session(node, {}, None, threads, **types)


def empty_cache(sizes: Sizes) -> Arrays:
    """Memory that nothing was written to: NaN, which would be seen in every sum."""
    shape = (sizes.batch, sizes.kv_heads, sizes.slots, sizes.size)
    return {name: np.full(shape, np.nan, np.float32) for name in ("past_key", "past_value")}


def run(
    session: onnxruntime.InferenceSession,
    sizes: Sizes,
    given: Arrays,
    cache: Mapping[str, NDArray[Any]],
    start: int,
    end: int,
) -> tuple[NDArray[np.float32], Arrays]:
    """Tokens from `start` to `end` behind a cache of `start`."""
    names = ["q", "k", "v", *(["cosines", "sines"] if sizes.rotates else [])]
    feed = {name: np.ascontiguousarray(given[name][:, start:end]) for name in names}
    y, *present = session.run(None, {**feed, **cache, "total": np.array(end, np.int32)})
    return y, dict(zip(("past_key", "past_value"), present, strict=True))


def rotated(sizes: Sizes, given: Arrays, name: str, *, magnitudes: bool = False) -> NDArray[np.float64]:
    """Q or k, [batch, total, heads, size]; or the sum of the magnitudes that each number is a sum of."""
    x = given[name].astype(np.float64).reshape(sizes.batch, sizes.total, -1, sizes.size)
    if not sizes.rotates:
        return np.abs(x) if magnitudes else x
    cosines, sines = (given[part].astype(np.float64)[:, :, None] for part in ("cosines", "sines"))
    first, last = np.split(x, 2, axis=-1)
    if magnitudes:
        first, last, cosines, sines = (np.abs(part) for part in (first, last, cosines, -sines))
        return np.concatenate([first * cosines + last * sines, last * cosines + first * sines], axis=-1)
    return np.concatenate([first * cosines - last * sines, last * cosines + first * sines], axis=-1)


def exact(sizes: Sizes, given: Arrays) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attention of the last tokens in float64 and how far FP32 may be from it, [batch, tokens, heads x size].

    With u = 2^-24 a score is off by at most d = (size + 2 x ROTATION_ROUNDINGS) u |q| |k| scale, and by u times itself
    where the largest is taken out. So a weight is off by the factor e^(2 d) at most, twice as its own sum is, too, and
    each mix of n values by n + EXP_ROUNDINGS more roundings, the sum of the weights again as much (Higham, lemma 3.1).
    """
    q, k = (rotated(sizes, given, name) for name in ("q", "k"))
    q_size, k_size = (rotated(sizes, given, name, magnitudes=True) for name in ("q", "k"))
    v = given["v"].astype(np.float64).reshape(sizes.batch, sizes.total, sizes.kv_heads, sizes.size)
    group = sizes.heads // sizes.kv_heads
    k, k_size, v = (np.repeat(part, group, axis=2) for part in (k, k_size, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q[:, sizes.past :], k) * sizes.size**-0.5
    share = (sizes.size + 2 * ROTATION_ROUNDINGS) * FP32_UNIT_ROUNDOFF
    off = share * np.einsum("bqhd,bkhd->bhqk", q_size[:, sizes.past :], k_size) * sizes.size**-0.5
    seen = np.arange(sizes.total)[None] <= np.arange(sizes.past, sizes.total)[:, None]
    off = np.where(seen, off + 2 * FP32_UNIT_ROUNDOFF * np.abs(scores), 0.0).max(axis=-1)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    roundings = 2 * (sizes.total + EXP_ROUNDINGS) * FP32_UNIT_ROUNDOFF
    relative = np.expm1(4 * off) + roundings / (1 - roundings)
    y, size = (np.einsum("bhqk,bkhd->bqhd", weights, part) for part in (v, np.abs(v)))
    shape = (sizes.batch, sizes.tokens, -1)
    return y.reshape(shape), (size * relative.transpose(0, 2, 1)[..., None]).reshape(shape)


@pytest.mark.parametrize("sizes", CASES, ids=str)
@pytest.mark.usefixtures("operators_instruction_set")
def test_attention_is_within_the_roundings_of_fp32(sizes: Sizes) -> None:
    """Behind a cache that was filled by another call, several texts at once, on every instruction set."""
    given, session = numbers(sizes), session_of(sizes)
    cache = empty_cache(sizes)
    if sizes.past:
        _, cache = run(session, sizes, given, cache, 0, sizes.past)
    y, _ = run(session, sizes, given, cache, sizes.past, sizes.total)
    expected, bound = exact(sizes, given)
    assert_within(y, expected, bound)


@pytest.mark.usefixtures("operators_instruction_set")
def test_exponentials_are_as_exact_as_their_bound_says() -> None:
    """Scores without a rounding, d and 0, and values 1 and 0: the weight e^d / (1 + e^d) is seen as it is.

    Its parts above and below are exponentials; a sum, a product with 1 and a quotient round once each at most.
    """
    d = -np.linspace(0.0, 80.0, 4001, dtype=np.float32)
    sizes = Sizes(len(d), 2, 1, 1, KEY_PANEL, 0, rotates=False)
    given = {name: np.zeros((len(d), 2, KEY_PANEL), np.float32) for name in ("q", "k", "v")}
    given["q"][:, 1, 0] = given["v"][:, 0, 0] = 1.0
    given["k"][:, 0, 0] = d
    y, _ = run(session_of(sizes, scale=1.0), sizes, given, empty_cache(sizes), 0, 2)
    power = np.exp(d.astype(np.float64))
    weight = power / (1 + power)
    assert_within(y[:, 1, 0], weight, (2 * EXP_ROUNDINGS + 3) * FP32_UNIT_ROUNDOFF * weight)


@pytest.mark.parametrize("sizes", CASES, ids=str)
@pytest.mark.usefixtures("operators_instruction_set")
def test_row_does_not_depend_on_the_others(sizes: Sizes) -> None:
    """A token alone has the bits that it has in a prompt, on one thread and on two."""
    given = numbers(sizes)
    whole, _ = run(session_of(sizes), sizes, given, empty_cache(sizes), 0, sizes.total)
    session, cache, start = session_of(sizes, threads=2), empty_cache(sizes), max(0, sizes.total - 3)
    if start:
        y, cache = run(session, sizes, given, cache, 0, start)
        assert_same_bits(y, whole[:, :start], "two threads")
    for token in range(start, sizes.total):
        y, cache = run(session, sizes, given, cache, token, token + 1)
        assert_same_bits(y, whole[:, token : token + 1], f"token {token}")


def test_cache_is_written_in_place_where_both_are_one() -> None:
    """With past and present bound to the same memory nothing else is written; apart, the past stays as it was."""
    sizes = Sizes(1, 4, 4, 2, 16, 6)
    given, session = numbers(sizes), session_of(sizes)
    _, filled = run(session, sizes, given, empty_cache(sizes), 0, sizes.past)
    before = {name: array.copy() for name, array in filled.items()}
    expected, apart = run(session, sizes, given, filled, sizes.past, sizes.total)
    for name, array in filled.items():
        assert_same_bits(array, before[name], name)
    binding, values = session.io_binding(), {}
    for name, array in filled.items():
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, values[name])
        binding.bind_ortvalue_output(name.replace("past", "present"), values[name])
    for name in ("q", "k", "v", "cosines", "sines"):
        binding.bind_cpu_input(name, np.ascontiguousarray(given[name][:, sizes.past :]))
    binding.bind_cpu_input("total", np.array(sizes.total, np.int32))
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    assert_same_bits(binding.copy_outputs_to_cpu()[2], expected, "y")
    for name, array in apart.items():
        assert_same_bits(array_from_ort_value(values[name]), array, name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"kv_num_heads": 3}, "not a multiple"), ({"num_heads": 0}, "not a multiple")],
    ids=["heads", "no_head"],
)
def test_heads_that_do_not_fit_are_refused(changes: dict[str, int], reason: str) -> None:
    """When the session is made."""
    with pytest.raises(Exception, match=reason):  # ONNX Runtime's errors share no base class
        session_of(Sizes(1, 1, 4, 2, 16, 0), **changes)


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("total", np.array(80, np.int32), "no room"),
        ("total", np.array(1, np.int32), "no room"),
        ("k", np.zeros((1, 2, 16), np.float32), "keys, values and their cache"),
        ("past_value", np.zeros((1, 2, 16, 16), np.float32), "keys, values and their cache"),
        ("q", np.zeros((1, 2, 32), np.float32), "queries and the cache"),
        ("sines", np.zeros((1, 2, 4), np.float32), "cosines and sines"),
    ],
    ids=["too_long", "shorter_than_the_new_tokens", "keys", "cache_of_values", "queries", "angles"],
)
def test_shapes_that_do_not_fit_are_refused(name: str, array: NDArray[Any], reason: str) -> None:
    """At the call, before anything is written."""
    sizes = Sizes(1, 2, 4, 2, 16, 0)
    feed = {**numbers(sizes), **empty_cache(sizes), "total": np.array(2, np.int32), name: array}
    with pytest.raises(Exception, match=reason):  # ONNX Runtime's errors share no base class
        session_of(sizes).run(None, feed)


@pytest.mark.parametrize("size", [24, MAX_HEAD_SIZE + KEY_PANEL])
def test_head_of_another_size_is_refused(size: int) -> None:
    """With the size and those that are taken; the rewrite leaves such models alone."""
    sizes = Sizes(1, 1, 2, 1, size, 0)
    feed = {**numbers(sizes), **empty_cache(sizes), "total": np.array(1, np.int32)}
    with pytest.raises(Exception, match=f"a head of {size} channels.*multiples of 16.*up to 256"):  # as above
        session_of(sizes).run(None, feed)


def test_sizes_are_those_of_the_kernel() -> None:
    """Rewrites and sessions would lay a cache out otherwise than the kernel reads it."""
    header = HEADER.read_text(encoding="utf-8")
    defined = dict(re.findall(r"#define (FPTQ_CPU_\w+) (\d+)", header))
    assert defined == {"FPTQ_CPU_PANEL": str(KEY_PANEL), "FPTQ_CPU_MAX_HEAD_SIZE": str(MAX_HEAD_SIZE)}


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the name of the variable."""
    monkeypatch.setenv("FPTQ_CPU_INSTRUCTION_SET", "sse9")
    with pytest.raises(Exception, match="FPTQ_CPU_INSTRUCTION_SET=sse9"):  # ONNX Runtime's errors share no base class
        session_of(CASES[0])
