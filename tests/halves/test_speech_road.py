"""Whisper on the whole road: features in place of text, one command, two runs, two engines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from calib.fake_quant import applied_policy
from calib.features import feature_windows
from calib.halves import calibrated_model_from_checkpoint, paths_of_task
from calib.linears import linears_from_model
from calib.load import checkpoint_from_directory, skeleton_from_checkpoint
from calib.observe import HessianSink, observe
from fptq_export.build.proof import Proof
from fptq_export.files import read_json_model
from fptq_export.package.manifest import Manifest
from fptq_export.policy import read_policy
from fptq_export.progress import NoProgress
from fptq_export.sites import read_sites
from fptq_export.tasks import SEQ2SEQ_DECODER, SEQ2SEQ_ENCODER, Task
from fptq_export.verify.encoder_report import EncoderReport
from fptq_export.verify.report import VerifyReport
from tests.families.support_table import Record
from tests.families.test_parity import PARITY, TIERS
from tests.halves.conftest import HALVES, SPEECH_FAMILY_OF_HALF
from tests.pipeline.conftest import Command, command
from tests.support.halves import SpeechForced, check_statistics, seq2seq_model, speech_feed
from tests.support.traced import run

__all__ = ["command"]

LINEARS = {"encoder": 6, "decoder": 10}
"""Of one layer q, k, v, out and two of the MLP; the decoder has q, k, v and out once more, for the source."""
Arrays = dict[str, NDArray[Any]]


@pytest.mark.parametrize("half", HALVES)
def test_each_half_has_an_engine_that_holds_its_linears(whisper_run: Path, half: str, record: Record) -> None:
    """The layer list is compared with the half's policy."""
    with record.cell(SPEECH_FAMILY_OF_HALF[half], "engine") as cell:
        summary = read_json_model(whisper_run / half / "manifest.json", Manifest).stages["build"].summary
        assert (whisper_run.parent / f"out.{half}.plan").stat().st_size > 0
        assert summary["quantized_linears"] == LINEARS[half]
        cell.text = "built"


def test_the_engine_takes_no_more_tokens_than_there_are_positions(whisper_run: Path) -> None:
    """New tokens and the cache each end with the decoder's table, whatever the default limits are."""
    profiles = read_json_model(whisper_run / "decoder" / "proof.json", Proof).engine.profiles
    assert profiles is not None
    largest = {item.name: item.maximum for item in profiles[0]}
    assert largest["input_ids"] == (4, 96)
    assert largest["past_key_values.0.key"] == (4, 4, 96, 16)
    assert largest["encoder_hidden_states"] == (4, 12, 64)


@pytest.mark.parametrize("half", HALVES)
def test_every_tier_is_in_the_policy_of_a_half(whisper_run: Path, half: str, record: Record) -> None:
    """Nothing but the head, which is called `proj_out`, stays float by default."""
    with record.cell(SPEECH_FAMILY_OF_HALF[half], "policies") as cell:
        policy = read_policy(whisper_run / half / "policy.json")
        assert len(policy.quantized()) == LINEARS[half]
        assert policy.layers.keys() - policy.quantized().keys() == ({"proj_out"} if half == "decoder" else set())
        assert {layer.activation for layer in policy.quantized().values()} == set(TIERS)
        cell.text = ", ".join(TIERS.values())


@pytest.mark.parametrize("half", HALVES)
def test_the_graph_computes_what_the_policy_says(
    whisper_run: Path, whisper_dir: Path, features_file: Path, half: str, record: Record
) -> None:
    """W4A8 in ONNX Runtime is the torch model with fake quantization, within the rounding of INT8 codes."""
    with record.cell(SPEECH_FAMILY_OF_HALF[half], "parity") as cell:
        features, ids = (array[:2] for array in np.load(features_file).values())
        directory, model = whisper_run / half, seq2seq_model(whisper_dir)
        forced = SpeechForced(model, half, features)
        with torch.inference_mode():
            hidden = SpeechForced(model, "encoder", features)(torch.empty(0)).logits.numpy()
            floating = forced(torch.from_numpy(ids)).logits.numpy()
            arrays, sites = load_file(directory / "policy.safetensors"), read_sites(directory / "sites.json")
            with applied_policy(model, read_policy(directory / "policy.json"), arrays, sites):
                expected = forced(torch.from_numpy(ids)).logits.numpy()
        graph = directory / "model.w4a8.onnx"
        feed, output = (
            ({"input_features": features}, "last_hidden_state")
            if half == "encoder"
            else (speech_feed(graph, ids, hidden), "logits")
        )
        allowed = PARITY * np.abs(expected).max()
        np.testing.assert_allclose(run(graph, feed)[output], expected, rtol=0.0, atol=allowed)
        assert np.abs(floating - expected).max() > 3 * allowed, "quantization would not be seen"
        cell.text = "equal"


def test_each_half_is_verified_on_features(whisper_run: Path) -> None:
    """Cosines of the encoder; perplexity, decoding and the cache of the decoder. What was seen before is said to be."""
    encoder = read_json_model(whisper_run / "encoder" / "verify.json", EncoderReport)
    decoder = read_json_model(whisper_run / "decoder" / "verify.json", VerifyReport)
    assert encoder.text == "features.npz: 6 windows of 24 frames, which calibration has seen"
    assert (encoder.hidden.vectors, encoder.embeddings.vectors) == (6 * 12, 6)
    assert encoder.hidden.mean > 0.9
    assert (decoder.windows, decoder.window_tokens) == (6, 20)
    assert decoder.cache.within_bound
    assert decoder.logits.cosine_mean > 0.9


@pytest.mark.parametrize("task", [SEQ2SEQ_ENCODER, SEQ2SEQ_DECODER])
def test_block_by_block_measures_what_the_whole_model_reads(whisper_dir: Path, features_file: Path, task: Task) -> None:
    """Maxima and second moments of every linear's input, in batches of two."""
    checkpoint = checkpoint_from_directory(whisper_dir, "model", task=task)
    linears = paths_of_task(checkpoint, linears_from_model(skeleton_from_checkpoint(checkpoint)))
    hessians: dict[str, torch.Tensor] = {}
    sink = HessianSink({path: path for path in linears}, hessians.__setitem__)
    load = partial(calibrated_model_from_checkpoint, checkpoint, torch.float32)
    windows = feature_windows(checkpoint, features_file, "--calib-data", 5)
    batches = windows.batches()
    stats = observe(load, batches, linears, NoProgress(), 2, sink)
    inputs = _whole(whisper_dir, features_file, linears)
    assert stats.channel_absmax.keys() == inputs.keys() == set(linears)
    assert batches.count == 5 * (12 if task == SEQ2SEQ_ENCODER else 20)
    check_statistics(stats.channel_absmax, hessians, inputs, batches.count)


def _whole(directory: Path, file: Path, linears: list[str]) -> dict[str, NDArray[np.float32]]:
    """What each linear reads when transformers runs the whole model on the first five windows: [rows, in]."""
    model = seq2seq_model(directory)
    record: dict[str, NDArray[np.float32]] = {}
    for path in linears:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _module, args, path=path: record.update({path: args[0].reshape(-1, args[0].shape[-1]).numpy()})
        )
    features, ids = (torch.from_numpy(array[:5]) for array in np.load(file).values())
    with torch.inference_mode():
        model(input_features=features, decoder_input_ids=ids)
    return record


def _without_ids(arrays: Arrays) -> None:
    del arrays["decoder_input_ids"]


def _shorter(arrays: Arrays) -> None:
    arrays["input_features"] = arrays["input_features"][..., :-1]


def _not_finite(arrays: Arrays) -> None:
    arrays["input_features"][0, 0, 0] = np.nan


def _other_vocabulary(arrays: Arrays) -> None:
    arrays["decoder_input_ids"][0, 1] = 512


def _other_count(arrays: Arrays) -> None:
    arrays["decoder_input_ids"] = arrays["decoder_input_ids"][1:]


def _too_long(arrays: Arrays) -> None:
    arrays["decoder_input_ids"] = np.tile(arrays["decoder_input_ids"], 5)


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (_without_ids, ("decoder_input_ids", "missing", "model.generate")),
        (_shorter, ("[6, 16, 23]", "24 frames", "padded")),
        (_not_finite, ("input_features", "NaN")),
        (_other_vocabulary, ("run from", "512", "vocabulary")),
        (_other_count, ("5 texts for 6 windows",)),
        (_too_long, ("[6, 100]", "2 to 96 tokens")),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_features_that_do_not_fit_are_refused_before_any_work(
    damage: Callable[[Arrays], None],
    fragments: tuple[str, ...],
    whisper_dir: Path,
    features_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    """What the decoder needs is missed before the encoder is traced."""
    arrays = dict(np.load(features_file))
    damage(arrays)
    file = tmp_path / "bad.npz"
    np.savez(file, **arrays)
    outcome = command(whisper_dir, "-o", tmp_path / "run", "--calib-data", file)
    assert outcome.code == 1, outcome.err
    assert all(fragment in outcome.err for fragment in ("--calib-data", *fragments)), outcome.err
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ((), ("--calib-data", "no built-in speech", "input_features", "AutoProcessor")),
        (("--calib-data", "absent.npz"), ("absent.npz", "no .npz file")),
        (("--calib-data", "FILE", "--calib-dataset", "random"), ("--calib-dataset", "use --calib-data")),
        (("--calib-data", "FILE", "--calib-seq", "8"), ("--calib-seq", "as long as")),
        (("--calib-data", "FILE", "--decode-steps", "77"), ("--decode-steps", "room for 76")),
        (("--calib-data", "FILE", "--policy", "auto"), ("--policy auto", "decoder of an encoder-decoder")),
        (("--calib-data", "FILE", "--task", "encoder"), ("no encoder", "whisper")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_speech_is_not_given_or_does_not_take_is_refused(
    words: tuple[str, ...],
    fragments: tuple[str, ...],
    whisper_dir: Path,
    features_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    """Each says what is missing, or names the option; nothing was written."""
    given = tuple(str(features_file) if word == "FILE" else word for word in words)
    outcome = command(whisper_dir, "-o", tmp_path / "run", *given)
    assert outcome.code == 1, outcome.err
    assert all(fragment in outcome.err for fragment in fragments), outcome.err
    assert not list(tmp_path.rglob("*.onnx"))


def test_verbs_that_read_text_refuse_a_model_of_speech(whisper_run: Path, command: Command) -> None:
    """`stats` runs a text through the model; it names what compares such a model instead."""
    outcome = command("stats", whisper_run / "decoder")
    assert outcome.code == 1, outcome.err
    assert "reads mel features" in outcome.err
