from __future__ import annotations

import math
from pathlib import Path

import pytest

from fptq_export.errors import ExitCode, GateError, UserError, UserErrors
from fptq_export.files import read_json_model, write_json_model
from fptq_export.verify.perplexity import PerplexityFigures
from fptq_export.verify.report import (
    CacheFigures,
    DecodeFigures,
    LogitFigures,
    PolygraphyFigures,
    VerifyReport,
    gate,
    gate_cache,
    ratio_from_option,
)


def _report(candidate_perplexity: float, cache_diff: float = 0.25) -> VerifyReport:
    """A report whose reference has perplexity 16, and whose cache bound is 0.5."""
    return VerifyReport(
        reference="FP32",
        candidate="model.w4a8.onnx",
        windows=1,
        window_tokens=8,
        vocabulary=100,
        reference_perplexity=PerplexityFigures(nll_sum=7 * math.log(16.0), tokens=7, perplexity=16.0),
        candidate_perplexity=PerplexityFigures(nll_sum=20.0, tokens=7, perplexity=candidate_perplexity),
        perplexity_increase=candidate_perplexity / 16.0 - 1.0,
        logits=LogitFigures(tokens=8, cosine_mean=0.9, cosine_min=0.8, kl_mean=0.1, top1_agreement=0.75),
        decode=DecodeFigures(
            prompt_tokens=4,
            steps=1,
            reference_tokens=(1, 2),
            candidate_tokens=(1, 3),
            kl=(0.0, 0.5),
            top1_agreement=0.5,
            first_divergence=1,
        ),
        cache=CacheFigures(
            steps=1,
            max_abs_diff=cache_diff,
            rms_diff=0.1,
            logit_absmax=9.0,
            rounding="fp16",
            layers=2,
            bound=0.5,
            within_bound=cache_diff <= 0.5,
        ),
    )


def test_gate_passes_at_the_limit_and_fails_just_above() -> None:
    """16 with a limit of 0.25 allows exactly 20; the next float64 does not pass."""
    gate(_report(20.0), 0.25)
    with pytest.raises(GateError):
        gate(_report(math.nextafter(20.0, 21.0)), 0.25)


def test_gate_of_nothing_allows_no_increase() -> None:
    """A limit of 0 passes an equal perplexity and fails a larger one."""
    gate(_report(16.0), 0.0)
    with pytest.raises(GateError):
        gate(_report(16.01), 0.0)


def test_gate_names_both_perplexities_and_the_limit() -> None:
    """The error has every number needed to judge it, and ends the command with code 3."""
    with pytest.raises(
        GateError, match=r"model\.w4a8\.onnx: perplexity 24 is \+50\.000% from the 16 of FP32.*\+25"
    ) as error:
        gate(_report(24.0), 0.25)
    assert error.value.exit_code == ExitCode.ACCURACY_GATE


def test_gate_fails_an_infinite_perplexity() -> None:
    """No limit is large enough for a model that predicts nothing."""
    with pytest.raises(GateError, match="inf"):
        gate(_report(math.inf), 1e6)


@pytest.mark.parametrize("perplexity", [8.0, 1e9])
def test_gate_without_a_limit_passes_anything(perplexity: float) -> None:
    """No option, no gate."""
    gate(_report(perplexity), None)


def test_gate_passes_a_better_candidate() -> None:
    """A perplexity below the reference's is never refused."""
    gate(_report(15.0), 0.0)


def test_cache_gate_passes_at_the_bound_and_fails_above() -> None:
    """The cache gate looks at the bound alone, and names it."""
    gate_cache(_report(1e9, cache_diff=0.5))
    with pytest.raises(GateError, match=r"(?s)differ by up to 0\.75.*explains at most 0\.5"):
        gate_cache(_report(16.0, cache_diff=0.75))


@pytest.mark.parametrize(
    ("text", "ratio"),
    [("3%", 0.03), ("0.03", 0.03), (" 0.1 % ", 0.001), ("0", 0.0), ("1", 1.0), ("300%", 3.0), ("5e-2", 0.05)],
)
def test_ratio_from_option_reads_both_spellings(text: str, ratio: float) -> None:
    """A percent sign divides by a hundred, exactly rounded."""
    assert ratio_from_option(text) == ratio


@pytest.mark.parametrize(
    "text", ["3", "1.01", "-1%", "-0.1", "nan", "nan%", "inf", "", "%", "3 percent", "3%%", "1e999%"]
)
def test_ratio_from_option_refuses_everything_else(text: str) -> None:
    """Negative, not a number, or a bare number above 1, which could mean either: an error with the spelling."""
    with pytest.raises(UserError, match=r"--max-ppl-increase"):
        ratio_from_option(text)


def test_report_survives_the_file(tmp_path: Path) -> None:
    """Written and read back it is equal, infinities included."""
    polygraphy = PolygraphyFigures(version="0", tokens=8, cosine_similarity=1.0, psnr_db=math.inf, l2_norm=0.0)
    report = _report(math.inf).model_copy(update={"polygraphy": polygraphy})
    write_json_model(report, tmp_path / "verify.json")
    assert read_json_model(tmp_path / "verify.json", VerifyReport) == report


def test_report_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    """A field of another version is named and not ignored."""
    path = tmp_path / "verify.json"
    path.write_text(_report(20.0).model_dump_json().replace('"windows":', '"wnidows":'), encoding="utf-8")
    with pytest.raises(UserErrors) as error:
        read_json_model(path, VerifyReport)
    assert {problem.path for problem in error.value.problems} == {"$.windows", "$.wnidows"}


def test_report_cannot_be_changed() -> None:
    """A report is what was measured."""
    with pytest.raises(ValueError, match="frozen"):
        _report(20.0).perplexity_increase = 0.0
