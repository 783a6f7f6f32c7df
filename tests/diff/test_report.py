"""Thresholds of a diff, and its table."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from fptq_export.diff.options import Thresholds
from fptq_export.diff.report import (
    CandidateDiff,
    DiffReport,
    GreedyFigures,
    PartFigures,
    RunRecord,
    gate_thresholds,
    threshold_failures,
)
from fptq_export.diff.table import print_report
from fptq_export.errors import ExitCode, GateError
from fptq_export.verify.perplexity import PerplexityFigures
from fptq_export.verify.report import LogitFigures


def perplexity(value: float) -> PerplexityFigures:
    return PerplexityFigures(nll_sum=1.0, tokens=1, perplexity=value)


def part(kl: float, cosine: float, top1: float, psnr: float) -> PartFigures:
    return PartFigures(
        reference_perplexity=perplexity(10.0),
        candidate_perplexity=perplexity(11.0),
        perplexity_increase=0.1,
        logits=LogitFigures(tokens=8, cosine_mean=cosine, cosine_min=0.5, kl_mean=kl, top1_agreement=top1),
        top5_agreement=1.0,
        psnr_db=psnr,
    )


RUN = RunRecord(runs="torch, FP32", files={}, seconds=1.5, peak_memory_bytes=1 << 30)
CANDIDATE = CandidateDiff(
    system="onnx",
    run=RUN,
    prefill=part(kl=0.1, cosine=0.99, top1=0.9, psnr=30.0),
    decode=part(kl=0.2, cosine=0.98, top1=0.8, psnr=20.0),
    greedy=GreedyFigures(
        reference_tokens=(1, 2, 3),
        candidate_tokens=(1, 4, 3),
        first_divergence=1,
        reference_text="[b]",
        candidate_text="d",
    ),
)
REPORT = DiffReport(
    tool_version="0",
    command="fptq-export diff run/",
    environment={},
    model="tiny",
    text="builtin: 1 x 8 tokens",
    text_sha256="0",
    windows=1,
    window_tokens=8,
    head_tokens=4,
    decode_steps=3,
    thresholds=Thresholds(),
    reference=RUN,
    candidates=(CANDIDATE,),
    left_out={"tensorrt": "no NVIDIA GPU is seen here"},
)
HOLDS = Thresholds(max_ppl_increase=0.1, max_kl=0.2, min_cosine=0.98, min_psnr=20.0, min_top1=0.8)


def gated(**limits: float) -> None:
    gate_thresholds(REPORT.model_copy(update={"thresholds": Thresholds(**limits)}))


def test_limits_that_are_just_met_hold() -> None:
    """Every limit at the worse of the two figures, and none at all, pass."""
    assert threshold_failures(REPORT) == []
    assert threshold_failures(REPORT.model_copy(update={"thresholds": HOLDS})) == []


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"max_ppl_increase": 0.09}, "onnx: perplexity is +10.000% from the reference's; --max-ppl-increase allows"),
        ({"max_kl": 0.15}, "onnx: mean KL of decode is 0.2 nats; --max-kl allows 0.15"),
        ({"min_cosine": 0.985}, "onnx: mean cosine of decode is 0.98; --min-cosine asks for 0.985"),
        ({"min_psnr": 25.0}, "onnx: mean PSNR of decode is 20; --min-psnr asks for 25"),
        ({"min_top1": 0.85}, "onnx: top-1 agreement of decode is 0.8; --min-top1 asks for 0.85"),
    ],
)
def test_each_threshold_fails_alone_and_is_named(limits: dict[str, float], sentence: str) -> None:
    """The one figure beyond its limit is named with candidate, part and option; decode is not hidden by prefill."""
    with pytest.raises(GateError, match=re.escape(sentence)) as error:
        gated(**limits)
    assert error.value.exit_code == ExitCode.ACCURACY_GATE
    assert str(error.value).count("onnx:") == 1


def test_all_failures_are_named_at_once() -> None:
    """Prefill and decode beyond one limit, and another limit, are three sentences."""
    with pytest.raises(GateError) as error:
        gated(max_kl=0.05, max_ppl_increase=0.0)
    assert str(error.value).count("onnx:") == 3


def test_table_shows_texts_and_what_was_left_out() -> None:
    """The diverging texts are printed as they are (brackets are no markup), and a missing column has its reason."""
    out = io.StringIO()
    print_report(REPORT, Console(file=out, width=120))
    text = out.getvalue()
    assert "from token 1 on" in text
    assert "'[b]'" in text
    assert "tensorrt: left out, no NVIDIA GPU is seen here" in text
    assert "11.00 (10.00 +10.0%)" in text
