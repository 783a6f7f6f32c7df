"""Random W4A8 problems, what `numerics` says of them, and how far FP32 arithmetic may be from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fptq_export import numerics

FP32_UNIT_ROUNDOFF = 2.0**-24
FP16_UNIT_ROUNDOFF = 2.0**-11
FP16_HALF_STEP = 2.0**-25
"""Half the distance of FP16 numbers near zero: the rounding error of a result that is not normal."""

EXP_ROUNDINGS = 5
"""Of e^x in the kernels, in units of 2^-24 of it. With |r| <= 0.35, e^r is between 0.70 and 1.42; its power of two is
exact. Seven fused multiply-adds round once each, and the next one takes |r| of that: 1.42 / (1 - 0.35) = 2.2, or 3.1 of
the smallest. The two roundings of r and ln 2 in two parts give 2 x 0.35 and 0.1, the series cut off 2^-3 / 0.7."""


@dataclass(frozen=True)
class Case:
    """A problem with codes and scales; group scales are of either sign."""

    x: NDArray[np.float32]  # [tokens, in]
    w_codes: NDArray[np.int8]  # [out, in]
    w_scale: NDArray[np.float16]  # [out, in/group_size]
    bias: NDArray[np.float32]  # [out]
    group_size: int

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return int(self.w_scale.shape[1])

    def quantized(self, x_scale: float | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Activation codes [tokens, in] and scales [tokens, 1]; x_scale None is per token."""
        if x_scale is None:
            scale = numerics.per_token_scale(self.x)
        else:
            scale = np.full((len(self.x), 1), x_scale, dtype=np.float32)
        return numerics.quantize_activation(self.x, scale), scale

    def group_sums(self, x_scale: float | None) -> NDArray[np.int64]:
        """Exact sums inside each group, [tokens, out, groups]."""
        codes, _ = self.quantized(x_scale)
        shape = (-1, self.groups, self.group_size)
        weight = self.w_codes.astype(np.int64).reshape(shape)
        return np.asarray(np.einsum("tgk,ngk->tng", codes.reshape(shape), weight), dtype=np.int64)

    def linear(self, x_scale: float | None, bias: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """`numerics.w4a8_linear` of the problem, [tokens, out]."""
        codes, scale = self.quantized(x_scale)
        return numerics.w4a8_linear(codes, scale, self.w_codes, self.w_scale, self.group_size, bias)

    def fp32_bound(self, x_scale: float | None, bias: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """Largest error of FP32 arithmetic against `linear`, [tokens, out].

        u = 2^-24. Every group adds one rounding (a fused multiply-add) to the running sum; converting its INT32 sum
        adds one more where that is above 2^24; the last multiply-add, with activation scale and bias, adds one. So a
        term is rounded at most groups + 2 times: |error| <= gamma (sum over groups |sum x scale| x_scale + |bias|)
        with gamma = (groups + 2) u / (1 - (groups + 2) u) (Higham, Accuracy and Stability, 2002, lemma 3.1).
        """
        _, scale = self.quantized(x_scale)
        terms = np.abs(self.group_sums(x_scale) * self.w_scale.astype(np.float64)).sum(axis=-1)
        magnitude = terms * scale.astype(np.float64) + (0.0 if bias is None else np.abs(bias.astype(np.float64)))
        roundings = (self.groups + 2) * FP32_UNIT_ROUNDOFF
        return np.asarray(roundings / (1.0 - roundings) * magnitude)

    def fp16_bound(self, x_scale: float | None, bias: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """As `fp32_bound`, for a result rounded once more, to FP16."""
        error = self.fp32_bound(x_scale, bias)
        return error + FP16_UNIT_ROUNDOFF * (np.abs(self.linear(x_scale, bias)) + error) + FP16_HALF_STEP


def make_case(tokens: int, out: int, channels: int, group_size: int, seed: int = 0) -> Case:
    """A random problem whose codes use their whole range."""
    rng = np.random.default_rng([seed, tokens, out, channels, group_size])
    return Case(
        x=rng.standard_normal((tokens, channels)).astype(np.float32) * rng.uniform(0.1, 10.0, (tokens, 1)).astype("f4"),
        w_codes=rng.integers(-8, 8, (out, channels), dtype=np.int8),
        w_scale=(rng.standard_normal((out, channels // group_size)) * 0.01).astype(np.float16),
        bias=rng.standard_normal(out).astype(np.float32),
        group_size=group_size,
    )


def assert_same_integers(got: NDArray[np.integer], expected: NDArray[np.integer], what: str) -> None:
    """Bit-exact comparison that names the first wrong coordinate."""
    assert got.shape == expected.shape, f"{what}: shape {got.shape} instead of {expected.shape}"
    wrong = np.argwhere(got != expected)
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(f"{what}: {len(wrong)} of {got.size} differ, first {got[at]} != {expected[at]} at {at}")


def assert_same_bits(got: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Comparison of floats as bit patterns."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} instead of {expected.dtype}"
    integer = np.dtype(f"u{got.dtype.itemsize}")
    assert_same_integers(np.ascontiguousarray(got).view(integer), np.ascontiguousarray(expected).view(integer), what)


def assert_within(got: NDArray[np.floating], expected: NDArray[np.float64], bound: NDArray[np.float64]) -> None:
    """Each element is within its own bound; the message names the worst."""
    assert got.shape == expected.shape
    error = np.abs(got.astype(np.float64) - expected)
    excess = np.where(np.isnan(error), np.inf, error) - bound
    at = np.unravel_index(int(np.argmax(excess)), excess.shape)
    assert excess[at] <= 0.0, (
        f"{got[at]} instead of {expected[at]} at {at}: error {error[at]:.3g}, bound {bound[at]:.3g}"
    )
