"""Encoders on the whole road: the same command, other proofs, and options that mean nothing for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from calib.fake_quant import applied_policy
from calib.load import checkpoint_from_directory, model_from_checkpoint
from calib.session import TorchEncoderSession
from fptq_export.errors import UserError
from fptq_export.files import read_json_model
from fptq_export.options import RunOptions
from fptq_export.pipeline.task_options import check_task_options
from fptq_export.policy import read_policy
from fptq_export.sites import read_sites
from fptq_export.verify.encoder_report import EncoderReport
from fptq_export.verify.encoder_sessions import OnnxEncoderSession
from tests.pipeline.conftest import Command
from tests.support.models import BERT_POSITIONS, ENCODER_SIZES

SMALL = ("--dtype", "fp32", *ENCODER_SIZES)
NEARER = 0.1
"""Graph and fake quantization differ by float rounding and by INT8 codes that it tips over, which are few; a scale,
a fold or a mask that is wrong is as far off as quantization itself."""


@pytest.mark.parametrize("name", ["bert_run", "esm_run"])
def test_nothing_is_left_in_float_but_a_head(request: pytest.FixtureRequest, name: str) -> None:
    """The head that the graph does not compute stands in the policy with its reason."""
    run: Path = request.getfixturevalue(name)
    policy = read_policy(run / "policy.json")
    assert len(policy.quantized()) == 6 * (2 if name == "bert_run" else 1)
    floats = {path: layer.reason for path, layer in policy.layers.items() if layer.precision == "float"}
    assert floats.keys() == ({"contact_head.regression"} if name == "esm_run" else set())
    assert all("no MatMul" in reason for reason in floats.values())


def test_post_norm_layers_say_why_they_are_not_equalized(bert_run: Path) -> None:
    """Static or per-token by the rule, with the reader that forbids the fold; no site of the rule is there."""
    policy = read_policy(bert_run / "policy.json")
    assert not policy.equalization
    assert {layer.activation for layer in policy.layers.values()} <= {"static", "per_token"}


def test_pre_norm_sites_are_equalized_and_folded(esm_run: Path) -> None:
    """Both norms and the values, in a graph whose output stays what it is."""
    policy = read_policy(esm_run / "policy.json")
    assert set(policy.equalization) == {site.id for site in read_sites(esm_run / "sites.json").fold_sites}
    assert len(policy.equalization) == 3


@pytest.mark.parametrize("name", ["bert_run", "esm_run"])
def test_the_graph_computes_what_the_policy_says(
    request: pytest.FixtureRequest, name: str, tiny_bert_dir: Path, tiny_esm_dir: Path
) -> None:
    """W4A8 in ONNX Runtime is the torch model with fake quantization, far nearer than the float model is."""
    run: Path = request.getfixturevalue(name)
    directory = tiny_bert_dir if name == "bert_run" else tiny_esm_dir
    model = model_from_checkpoint(checkpoint_from_directory(directory, "encoder"), torch.float32)
    ids = np.random.default_rng(2).integers(40, 512, (3, 20))
    mask = np.ones_like(ids)
    mask[1, 12:] = 0
    session = TorchEncoderSession(model, "torch")
    exact = session.hidden(ids, mask)[mask == 1]
    sites, arrays = read_sites(run / "sites.json"), load_file(run / "policy.safetensors")
    with applied_policy(model, read_policy(run / "policy.json"), arrays, sites):
        expected = session.hidden(ids, mask)[mask == 1]
    actual = OnnxEncoderSession(run / "model.w4a8.onnx", threads=1).hidden(ids, mask)[mask == 1]
    error, distance = (np.sqrt(np.square(other - expected).mean()) for other in (actual, exact))
    assert error < NEARER * distance


def test_the_report_is_that_of_an_encoder(bert_run: Path) -> None:
    """Hidden states, embeddings and retrieval of nine sentences, no perplexity."""
    report = read_json_model(bert_run / "verify.json", EncoderReport)
    assert report.embeddings.vectors == 9
    assert report.hidden.vectors > 9 * 6
    assert 0.5 < report.embeddings.mean <= 1.0
    assert (bert_run / "verify.json").read_text().count("perplexity") == 0


def test_a_second_run_does_nothing_and_a_gate_is_applied(
    bert_run: Path, tiny_bert_dir: Path, tmp_path: Path, command: Command
) -> None:
    """The table shows cosines; a limit above them ends with exit code 3 and both numbers."""
    run = Path(shutil.copytree(bert_run, tmp_path / "run"))
    outcome = command(tiny_bert_dir, "-o", run, *SMALL)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("up to date") == 7
    assert "texts: cosine" in outcome.out
    assert "perplexity" not in outcome.out
    refused = command(tiny_bert_dir, "-o", run, "--min-cosine", "1", *SMALL)
    assert refused.code == 3
    assert "the limit is 1.0000" in refused.err


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("--decode-steps", "4"), "--decode-steps"),
        (("--max-ppl-increase", "3%"), "use --min-cosine"),
        (("--policy", "auto"), "--policy auto"),
        (("--rotate",), "--rotate"),
        (("--checkpoint", "ct"), "--checkpoint"),
        (("--calib-seq", "200"), f"takes {BERT_POSITIONS} tokens at most"),
        (("--eval-seq", "200"), f"takes {BERT_POSITIONS} tokens at most"),
        (("--eval-text", "random"), "--eval-text random"),
        (("--min-cosine", "97"), "--min-cosine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_options_that_mean_nothing_for_an_encoder_are_refused(
    words: tuple[str, ...], fragment: str, bert_run: Path, tiny_bert_dir: Path, tmp_path: Path, command: Command
) -> None:
    """Each names the option; none is ignored in silence."""
    run = Path(shutil.copytree(bert_run, tmp_path / "run"))
    outcome = command(tiny_bert_dir, "-o", run, *SMALL, *words)
    assert outcome.code == 1, outcome.err
    assert fragment in outcome.err


@pytest.mark.parametrize(
    ("words", "fragment"),
    [(("--max-input-len", "200"), f"takes {BERT_POSITIONS} tokens at most"), (("--max-kv-len", "64"), "no cache")],
    ids=["too long", "no cache"],
)
def test_limits_that_the_graph_does_not_have_are_refused_by_the_build(
    words: tuple[str, ...], fragment: str, bert_run: Path, tmp_path: Path, command: Command
) -> None:
    """The verb `build` opens no model, and knows them from the graph."""
    run = Path(shutil.copytree(bert_run, tmp_path / "run"))
    outcome = command("build", run, "--engine", tmp_path / "other.plan", *words)
    assert outcome.code == 1
    assert fragment in outcome.err


@pytest.mark.parametrize("option", ["min_cosine", "eval_text", "eval_sentences"])
def test_options_of_encoders_are_refused_for_language_models(option: str) -> None:
    """The reverse."""
    value = {"min_cosine": 0.9, "eval_text": "mine.txt", "eval_sentences": 7}[option]
    options = RunOptions.model_validate({"model": "m", "output": "o", option: value})
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}.*a causal language model"):
        check_task_options(options, "causal-lm")


@pytest.mark.parametrize("verb", ["eval", "diff"])
def test_perplexity_of_an_encoder_is_refused(bert_run: Path, verb: str, command: Command) -> None:
    """`eval` and `diff` point to the verb that compares encoders."""
    outcome = command(verb, bert_run)
    assert outcome.code == 1
    assert "fptq-export verify" in outcome.err
