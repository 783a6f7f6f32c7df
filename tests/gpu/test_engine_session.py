"""`Session` on real engines of the tiny LLaMA in every form, against ONNX Runtime's run of `model.w4a8.onnx`."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fptq_export.build.targets import Target
from fptq_export.cli.main import main
from fptq_export.runtime import Sampling, Session
from fptq_export.verify.decode import CacheBound, prove_cache
from fptq_export.verify.sessions import OnnxCausalSession
from tests.runtime.engines import logits_of, tokens
from tests.support.models import SMALL

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

FORMS = {
    "concat": (),
    "last": ("--logits", "last"),
    "static": ("--kv-cache", "static"),
    "static-last": ("--kv-cache", "static", "--logits", "last"),
    "int8": ("--kv-dtype", "int8"),
}
BF16 = ("--dtype", "bf16", "--no-verify")
LIMITS = ("--max-batch-size", "2", "--max-input-len", "32", "--max-kv-len", "64")
BOUND = CacheBound(rounding="int8", layers=2)
"""Of two runs whose INT8 roundings fall apart, derived there; BF16 rounds no coarser."""
RTX_MAJORS = (8, 12)
"""Compute capabilities that engines of TensorRT for RTX are built for by default."""


def built(model: Path, target: Target, directory: Path, words: tuple[str, ...]) -> Path:
    """The run directory of an engine for this GPU."""
    major, _ = torch.cuda.get_device_capability()
    if target is Target.TENSORRT_RTX and major not in RTX_MAJORS:
        pytest.skip(f"TensorRT for RTX builds no engine for compute capability {major}.x")
    run = directory / re.sub(r"\W", "-", str(target))
    place = ("-o", str(run), "--engine", str(run.with_suffix(".plan")), "--target", str(target))
    assert main([str(model), *place, *SMALL, *LIMITS, *words]) == 0
    logging.disable(logging.NOTSET)
    return run


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_graph(tiny_llama_dir: Path, target: Target, tmp_path: Path, form: str) -> None:
    """A prompt of two sequences and steps behind it; and the greedy text of one, which needs a tokenizer too."""
    run = built(tiny_llama_dir, target, tmp_path, FORMS[form])
    graph = OnnxCausalSession(run / "model.w4a8.onnx", threads=None)
    with Session.open(run, backend="tensorrt") as session:
        for found, expected in zip(logits_of(session, tokens(2)), logits_of(graph, tokens(2)), strict=True):
            bound = BOUND.relative * np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0.0, atol=bound)
        completion = session.generate("An assignment", Sampling(max_tokens=8, ignore_eos=True))
    assert len(completion.token_ids) == 8


@pytest.mark.parametrize("words", [FORMS["concat"], FORMS["static"], FORMS["int8"], BF16])
def test_steps_continue_the_prefill(
    tiny_llama_dir: Path, target: Target, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Verification's proof of a cache, on the engine: a lost or shifted one gives other logits than one long prompt."""
    run = built(tiny_llama_dir, target, tmp_path, words)
    text = tokens()[0]
    with Session.open(run, backend="tensorrt") as session:
        assert prove_cache(session.model, text[:6], text[6:].tolist(), BOUND).within_bound


def test_memory_stays(tiny_llama_dir: Path, target: Target, tmp_path: Path) -> None:
    """The hundredth text finds the memory of those before it."""
    run = built(tiny_llama_dir, target, tmp_path, ())
    with Session.open(run, backend="tensorrt") as session:
        session.generate([5] * 16, Sampling(max_tokens=32, ignore_eos=True))
        before, _ = torch.cuda.mem_get_info()
        for _ in range(100):
            session.generate([5] * 16, Sampling(max_tokens=32, ignore_eos=True))
        after, _ = torch.cuda.mem_get_info()
    assert after == before
