from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.verify.decode import CacheBound, compare_decode, prove_cache
from fptq_export.verify.perplexity import log_softmax
from fptq_export.verify.report import Rounding
from fptq_export.verify.sessions import OnnxCache, OnnxCausalSession

FLOAT64_TOLERANCE = 1000 * 2.0**-53
"""Relative: two float64 programs that add up at most a thousand terms each."""
EXACT = CacheBound("fp32", layers=1)
PROMPT = np.array([3, 1, 4, 1, 5])


def test_reference_decodes_greedily(toy: Any) -> None:
    """Each token fed back is the argmax of a prefill over all tokens before it."""
    decode, _ = compare_decode(toy, toy, PROMPT, 6, EXACT)
    text = PROMPT.tolist()
    for token in decode.reference_tokens:
        assert token == toy.prefill(np.array([text]))[0][0, -1].argmax()
        text.append(token)
    assert len(decode.reference_tokens) == 7


def test_candidate_is_fed_the_references_tokens(make_toy: Any) -> None:
    """Choices and KL of the candidate are those after the reference's text, also behind a divergence."""
    reference, candidate = make_toy("r", seed=0), make_toy("c", seed=1)
    decode, _ = compare_decode(reference, candidate, PROMPT, 6, EXACT)
    text = np.concatenate([PROMPT, decode.reference_tokens[:-1]])[None]
    r, c = (session.prefill(text)[0][0, len(PROMPT) - 1 :] for session in (reference, candidate))
    assert decode.candidate_tokens == tuple(c.argmax(-1))
    assert decode.candidate_tokens != decode.reference_tokens
    p_r, p_c = np.exp(log_softmax(r)), np.exp(log_softmax(c))
    # Decode and prefill of the toy round to float32 in another order: 2^-20 relative on logits below 16.
    np.testing.assert_allclose(decode.kl, (p_r * np.log(p_r / p_c)).sum(-1), rtol=0.0, atol=16 * 2.0**-20)
    differs = np.array(decode.candidate_tokens) != np.array(decode.reference_tokens)
    assert decode.first_divergence == differs.argmax()
    assert decode.top1_agreement == pytest.approx(1.0 - differs.mean(), rel=FLOAT64_TOLERANCE, abs=0.0)


def test_first_divergence_is_the_first_wrong_choice(toy: Any) -> None:
    """A candidate that turns away at decode step 3 diverges at choice 3 and nowhere else."""

    class Turns:
        name = "turns"
        step = 0

        def prefill(self, input_ids: NDArray[np.int64]) -> Any:
            return toy.prefill(input_ids)

        def decode(self, input_ids: NDArray[np.int64], cache: Any) -> Any:
            self.step += 1
            logits, cache = toy.decode(input_ids, cache)
            return (-logits if self.step == 3 else logits), cache

    decode, cache = compare_decode(toy, Turns(), PROMPT, 6, EXACT)
    assert decode.first_divergence == 3
    assert decode.top1_agreement == pytest.approx(6 / 7, rel=FLOAT64_TOLERANCE, abs=0.0)
    assert not cache.within_bound


class _WrongPositions(OnnxCausalSession):
    """Decode steps that sit one position too far: a subtle defect, no lost cache."""

    def decode(self, input_ids: NDArray[np.int64], cache: OnnxCache) -> Any:
        feed = self.prefill_feed(input_ids)
        feed = {
            "input_ids": feed["input_ids"],
            "attention_mask": np.ones((1, cache.length + 1), np.int64),
            "position_ids": np.array([[cache.length + 1]]),
        }
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
        return self._run({**values, **cache.values}, cache.length + 1)


class _LostCache(OnnxCausalSession):
    """Decode steps that start anew."""

    def decode(self, input_ids: NDArray[np.int64], cache: OnnxCache) -> Any:
        return self.prefill(input_ids)


def test_correct_fp16_cache_is_within_the_bound(tiny_llama: Any) -> None:
    """Decode steps of an FP16 graph equal its own prefill within the bound, which is the formula's."""
    session = OnnxCausalSession(tiny_llama.fp16, threads=1)
    figures = prove_cache(session, tiny_llama.ids[0, :8], tiny_llama.ids[0, 8:].tolist(), CacheBound("fp16", 2))
    assert figures.within_bound
    assert figures.rms_diff <= figures.max_abs_diff <= figures.bound
    assert figures.steps == 16
    assert figures.bound == pytest.approx(
        2 * math.sqrt(14) * 2.0**-10 * figures.logit_absmax, rel=FLOAT64_TOLERANCE, abs=0.0
    )


@pytest.mark.parametrize("broken", [_WrongPositions, _LostCache])
def test_broken_fp16_cache_is_outside_the_bound(tiny_llama: Any, broken: type[OnnxCausalSession]) -> None:
    """Positions off by one, and a lost cache, are both beyond what FP16 rounding explains."""
    session = broken(tiny_llama.fp16, threads=1)
    figures = prove_cache(session, tiny_llama.ids[0, :8], tiny_llama.ids[0, 8:].tolist(), CacheBound("fp16", 2))
    assert not figures.within_bound


def test_lost_cache_is_outside_the_int8_bound(tiny_llama: Any) -> None:
    """The bound for INT8 activations is wide, and a lost cache is still beyond it."""
    session = _LostCache(tiny_llama.fp16, threads=1)
    figures = prove_cache(session, tiny_llama.ids[0, :8], tiny_llama.ids[0, 8:].tolist(), CacheBound("int8", 2))
    assert not figures.within_bound


@pytest.mark.parametrize("rounding", ["fp32", "fp16", "bf16", "int8"])
def test_bound_grows_with_depth_as_its_square_root(rounding: Rounding) -> None:
    """Four times the layers, twice the bound."""
    shallow, deep = CacheBound(rounding, 8).relative, CacheBound(rounding, 32).relative
    assert deep == pytest.approx(2 * shallow, rel=FLOAT64_TOLERANCE, abs=0.0)


def test_coarser_rounding_has_a_wider_bound() -> None:
    """FP32 < FP16 < BF16, and FP16 < INT8."""
    fp32, fp16, bf16, int8 = (CacheBound(rounding, 30).relative for rounding in ("fp32", "fp16", "bf16", "int8"))
    assert fp32 < fp16 < bf16
    assert fp16 < int8 < 1.0


def test_nan_in_a_decode_step_names_the_step(toy: Any) -> None:
    """A NaN that appears in decode step 2 is an error with the session and the step."""

    class Nan:
        name = "nan.onnx"
        step = 0

        def prefill(self, input_ids: NDArray[np.int64]) -> Any:
            return toy.prefill(input_ids)

        def decode(self, input_ids: NDArray[np.int64], cache: Any) -> Any:
            self.step += 1
            logits, cache = toy.decode(input_ids, cache)
            return logits * (math.nan if self.step == 2 else 1.0), cache

    with pytest.raises(UserError, match=r"nan\.onnx, decode step 2: .*NaN"):
        compare_decode(toy, Nan(), PROMPT, 6, EXACT)
