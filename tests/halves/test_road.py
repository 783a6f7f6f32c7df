"""An encoder-decoder on the whole road: one command, two runs, two engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from calib.fake_quant import applied_policy
from fptq_export.files import read_json_model
from fptq_export.options import RunOptions
from fptq_export.package.manifest import Manifest
from fptq_export.pipeline.halves import runs_from_options
from fptq_export.policy import read_policy
from fptq_export.progress import NoProgress
from fptq_export.sites import read_sites
from fptq_export.verify.encoder_report import EncoderReport
from fptq_export.verify.report import VerifyReport
from tests.families.support_table import Record
from tests.families.test_parity import PARITY, TIERS
from tests.halves.conftest import FAMILY_OF_HALF, HALVES
from tests.pipeline.conftest import Command, command
from tests.support.halves import TeacherForced, decoder_feed, seq2seq_model
from tests.support.traced import encoder_feed, run

__all__ = ["command"]

LINEARS = {"encoder": 6, "decoder": 11}
"""Of one layer q, k, v, o and two of the MLP; the decoder has three there, and q, k, v, o once more, for the source."""


@pytest.mark.parametrize("half", HALVES)
def test_each_half_has_an_engine_that_holds_its_linears(t5_run: Path, half: str, record: Record) -> None:
    """The layer list is compared with the half's policy."""
    with record.cell(FAMILY_OF_HALF[half], "engine") as cell:
        summary = read_json_model(t5_run / half / "manifest.json", Manifest).stages["build"].summary
        assert (t5_run.parent / f"out.{half}.plan").stat().st_size > 0
        assert summary["quantized_linears"] == LINEARS[half]
        cell.text = "built"


@pytest.mark.parametrize("half", HALVES)
def test_every_tier_is_in_the_policy_of_a_half(t5_run: Path, half: str, record: Record) -> None:
    """Nothing but the head stays float; static, equalized and per-token inputs each stand in the policy."""
    with record.cell(FAMILY_OF_HALF[half], "policies") as cell:
        policy = read_policy(t5_run / half / "policy.json")
        assert len(policy.quantized()) == LINEARS[half]
        assert policy.layers.keys() - policy.quantized().keys() == ({"lm_head"} if half == "decoder" else set())
        assert {layer.activation for layer in policy.quantized().values()} == set(TIERS)
        assert all(path.startswith(f"{half}.") or path == "lm_head" for path in policy.layers)
        cell.text = ", ".join(TIERS.values())


@pytest.mark.parametrize("half", HALVES)
def test_the_graph_computes_what_the_policy_says(
    t5_run: Path, half_dirs: dict[str, Path], half: str, record: Record
) -> None:
    """W4A8 in ONNX Runtime is the torch model with fake quantization, within the rounding of INT8 codes."""
    with record.cell(FAMILY_OF_HALF[half], "parity") as cell:
        source, ids = (np.random.default_rng(seed).integers(2, 512, (2, 12)) for seed in (1, 2))
        directory, model = t5_run / half, seq2seq_model(half_dirs[half])
        with torch.inference_mode():
            hidden = model.encoder(input_ids=torch.from_numpy(source)).last_hidden_state.numpy()
            floating = TeacherForced(model, half, source)(torch.from_numpy(ids)).logits.numpy()
            arrays, sites = load_file(directory / "policy.safetensors"), read_sites(directory / "sites.json")
            with applied_policy(model, read_policy(directory / "policy.json"), arrays, sites):
                expected = TeacherForced(model, half, source)(torch.from_numpy(ids)).logits.numpy()
        graph = directory / "model.w4a8.onnx"
        feed, output = (
            (encoder_feed(ids), "last_hidden_state")
            if half == "encoder"
            else (decoder_feed(graph, ids, hidden), "logits")
        )
        allowed = PARITY * np.abs(expected).max()
        np.testing.assert_allclose(run(graph, feed)[output], expected, rtol=0.0, atol=allowed)
        assert np.abs(floating - expected).max() > 3 * allowed, "quantization would not be seen"
        cell.text = "equal"


def test_each_half_is_verified_in_its_own_way(t5_run: Path) -> None:
    """Cosines of the encoder; perplexity, decoding and the cache of the decoder, on the second half of a window."""
    encoder = read_json_model(t5_run / "encoder" / "verify.json", EncoderReport)
    decoder = read_json_model(t5_run / "decoder" / "verify.json", VerifyReport)
    assert 0.5 < encoder.embeddings.mean <= 1.0
    assert (decoder.windows, decoder.window_tokens) == (1, 40)
    assert decoder.cache.within_bound
    assert decoder.logits.cosine_mean > 0.5


def test_one_half_alone_replays_its_policy(t5_run: Path, t5_dir: Path, tmp_path: Path, command: Command) -> None:
    """`--task` names it, and its directory goes on where the run of both left it."""
    copy = Path(shutil.copytree(t5_run / "decoder", tmp_path / "decoder"))
    path = copy / "policy.json"
    edited = json.loads(path.read_text())
    layer = edited["layers"]["decoder.block.0.layer.0.SelfAttention.o"]
    layer |= {"activation": "per_token", "activation_scale": None}
    path.write_text(json.dumps(edited))
    words = ("--dtype", "fp32", "--task", "seq2seq-decoder", "--policy", path, "--no-verify")
    outcome = command(t5_dir, "-o", copy, *words)
    assert outcome.code == 0, outcome.err
    assert "trace: up to date" in outcome.err
    per_token = [name for name, it in read_policy(path).layers.items() if it.activation == "per_token"]
    assert "decoder.block.0.layer.0.SelfAttention.o" in per_token


def test_options_go_to_the_half_that_they_concern(t5_dir: Path, tmp_path: Path) -> None:
    """Gates to the half that is measured so, patterns to where they match; one that matches nothing stays with both."""
    options = RunOptions(
        model=str(t5_dir),
        output=tmp_path / "run",
        engine=tmp_path / "out.plan",
        exclude=("lm_head", "wo$", "blok"),
        precision=("encoder.*wi_0=w8a8",),
        min_cosine=0.9,
        max_ppl_increase=0.1,
    )
    encoder, decoder = runs_from_options("run", options, NoProgress())
    assert (encoder.exclude, encoder.precision) == (("wo$", "blok"), ("encoder.*wi_0=w8a8",))
    assert (decoder.exclude, decoder.precision) == (("lm_head", "wo$", "blok"), ())
    assert (encoder.min_cosine, encoder.max_ppl_increase) == (0.9, None)
    assert (decoder.min_cosine, decoder.max_ppl_increase) == (None, 0.1)
    assert (encoder.output, decoder.output) == (tmp_path / "run" / "encoder", tmp_path / "run" / "decoder")
    assert (encoder.engine, decoder.engine) == (tmp_path / "out.encoder.plan", tmp_path / "out.decoder.plan")


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("--policy", "auto"), ("--policy auto", "decoder of an encoder-decoder")),
        (("--policy", "POLICY"), ("--policy", "has two")),
        (("--kv-cache", "static"), ("--kv-cache", "grows with every call")),
        (("--logits", "last"), ("--logits",)),
        (("--rotate",), ("--rotate",)),
        (("--adapter", "lora"), ("--adapter",)),
        (("--sequential", "--weight-method", "gptq"), ("--sequential",)),
        (("--checkpoint", "ct"), ("--checkpoint",)),
        (("--max-shapes", "input_ids:1x8"), ("--max-shapes", "--task seq2seq-decoder")),
        (("--task", "causal-lm"), ("no causal language model", "t5")),
        (("--task", "encoder"), ("no encoder", "t5")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_is_not_for_encoder_decoders_is_refused_before_any_work(
    words: tuple[str, ...], fragments: tuple[str, ...], t5_run: Path, t5_dir: Path, tmp_path: Path, command: Command
) -> None:
    """Each names the option; nothing was written."""
    words = tuple(str(t5_run / "decoder" / "policy.json") if word == "POLICY" else word for word in words)
    outcome = command(t5_dir, "-o", tmp_path / "run", *words)
    assert outcome.code == 1, outcome.err
    assert all(fragment in outcome.err for fragment in fragments), outcome.err
    assert not list(tmp_path.rglob("*.onnx"))


def test_one_command_plans_both_halves(
    t5_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """Without `--task`, an encoder-decoder is two runs with a directory and an engine each."""
    monkeypatch.chdir(tmp_path)  # short paths: the table breaks long ones
    outcome = command(t5_dir, "-o", "run", "--engine", "out.plan", "--dry-run")
    assert outcome.code == 0, outcome.err
    for half in HALVES:
        assert f"run/{half}/model.w4a8.onnx" in outcome.out
        assert f"out.{half}.plan" in outcome.out
    assert not list(tmp_path.iterdir())


def test_a_verb_on_the_directory_of_both_names_the_halves(t5_run: Path, tmp_path: Path, command: Command) -> None:
    """Verbs on directories take one half; `eval` and `diff` refuse one: it is no language model."""
    outcome = command("build", t5_run, "--engine", tmp_path / "out.plan")
    assert outcome.code == 1
    assert str(t5_run / "encoder") in outcome.err
    for verb in ("eval", "diff"):
        refused = command(verb, t5_run / "decoder")
        assert refused.code == 1
        assert "fptq-export verify" in refused.err
