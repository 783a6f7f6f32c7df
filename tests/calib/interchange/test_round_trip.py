"""A policy written as a compressed-tensors checkpoint and read again is the same policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from calib.decide import PolicyOptions, decide_policy
from calib.fake_quant import apply_policy
from calib.load import model_from_checkpoint
from calib.stats import Stats
from fptq_export.progress import NoProgress
from tests.calib.interchange.conftest import Decide, Decided, ReadBack, logits
from tests.support.traced import FP32_LOGITS

CASES = [(family, tiers) for family in ("llama", "opt") for tiers in ("mixed", "static", "equalized", "per_token")]
LAYOUTS = ("int-quantized", "pack-quantized")


def stored_arrays(decided: Decided) -> dict[str, Any]:
    return load_file(decided.arrays.path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "tiers"), CASES)
def test_codes_and_scales_keep_every_bit(
    decide: Decide, read_back: ReadBack, tmp_path: Path, family: str, tiers: Any, layout: str
) -> None:
    """Codes, group scales and activation scales, for every tier, equalized or not, in both layouts."""
    decided = decide(family, tiers)
    given = read_back(decided.write(tmp_path / "out", layout=layout)).given
    assert given is not None
    quantized = decided.policy.quantized()
    assert given.layers.keys() == quantized.keys()
    for path, layer in quantized.items():
        codes, scales = given.read(path)
        assert np.array_equal(codes, decided.arrays.read(f"{path}.weight_codes"))
        assert scales.tobytes() == decided.arrays.read(f"{path}.weight_scales").tobytes()
        assert given.layers[path].activation_scale == layer.activation_scale
        assert given.layers[path].note == ""


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_policy_of_the_written_checkpoint_runs_the_same(
    decide: Decide, read_back: ReadBack, tmp_path: Path, family: str
) -> None:
    """Tiers come back, `lae_static` as `static`: its equalization is in the weights now."""
    decided = decide(family, "mixed")
    back = read_back(decided.write(tmp_path / "out"))
    policy, stream = decide_policy(
        decided.sites, Stats(decided.maxima, 48, "test"), back, PolicyOptions(), NoProgress()
    )
    arrays = stream.read_all()
    assert policy.quantized().keys() == decided.policy.quantized().keys()
    for path, layer in decided.policy.quantized().items():
        now = policy.layers[path]
        assert now.activation == ("static" if layer.activation == "lae_static" else layer.activation)
        assert now.activation_scale == layer.activation_scale
        assert now.weight_method == "given"
        assert np.array_equal(arrays[f"{path}.weight_codes"], decided.arrays.read(f"{path}.weight_codes"))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
def test_equalization_is_folded_into_the_float_tensors(
    decide: Decide, read_back: ReadBack, tmp_path: Path, family: str
) -> None:
    """With float activations the written model computes what the equalized policy computes: norms, rows and biases.

    Gemma's norms multiply by 1 + w.
    """
    decided = decide(family, "equalized")
    expected = model_from_checkpoint(decided.checkpoint, torch.float32)
    apply_policy(expected, decided.policy, stored_arrays(decided), decided.sites, quantize_activations=False)
    written = model_from_checkpoint(read_back(decided.write(tmp_path / "out")), torch.float32)
    wanted = logits(expected)
    assert np.abs(logits(written) - wanted).max() <= FP32_LOGITS * np.abs(wanted).max()


def test_unfolded_norms_would_be_seen(decide: Decide, read_back: ReadBack, tmp_path: Path) -> None:
    """The comparison above can fail: with the norms of the original model the logits are others."""
    decided = decide("llama", "equalized")
    out = decided.write(tmp_path / "out")
    wanted = logits(model_from_checkpoint(read_back(out), torch.float32))
    original = load_file(decided.checkpoint.directory / "model.safetensors")
    tensors = load_file(out / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    assert not np.array_equal(tensors[norm], original[norm])
    model = model_from_checkpoint(read_back(out), torch.float32)
    with torch.no_grad():
        model.get_parameter(norm).copy_(torch.from_numpy(original[norm]))
    assert np.abs(logits(model) - wanted).max() > FP32_LOGITS * np.abs(wanted).max()


def test_excluded_consumer_of_an_equalized_norm_is_written_equalized(
    decide: Decide, read_back: ReadBack, tmp_path: Path
) -> None:
    """A linear that stays float and reads an equalized tensor has its columns multiplied by s."""
    decided = decide("llama", "equalized")
    path = "model.layers.0.self_attn.k_proj"
    layer = decided.policy.layers[path].model_copy(
        update={"precision": "float", "activation": None, "activation_scale": None, "group_size": None}
    )
    policy = decided.policy.model_copy(update={"layers": {**decided.policy.layers, path: layer}})
    kept = Decided(decided.checkpoint, decided.sites, policy, decided.arrays, decided.maxima)
    expected = model_from_checkpoint(kept.checkpoint, torch.float32)
    apply_policy(expected, policy, stored_arrays(kept), kept.sites, quantize_activations=False)
    wanted = logits(expected)
    back = read_back(kept.write(tmp_path / "out"))
    assert back.given is not None
    assert path not in back.given.layers
    assert (
        np.abs(logits(model_from_checkpoint(back, torch.float32)) - wanted).max() <= FP32_LOGITS * np.abs(wanted).max()
    )


def test_per_token_option_drops_static_scales(decide: Decide, read_back: ReadBack, tmp_path: Path) -> None:
    """What vLLM runs: no input is static any more, and codes stay."""
    decided = decide("llama", "static")
    out = decided.write(tmp_path / "out", per_token=True)
    given = read_back(out).given
    assert given is not None
    assert {layer.activation for layer in given.layers.values()} == {"per_token"}
    assert not [name for name in load_file(out / "model.safetensors") if name.endswith("input_scale")]


def test_fp16_is_what_the_config_says(decide: Decide, tmp_path: Path) -> None:
    """Float tensors are float16 and so is the config, so that no loader rounds the group scales."""
    out = decide("llama", "mixed").write(tmp_path / "out", dtype="fp16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    dtypes = {tensor.dtype for name, tensor in load_file(out / "model.safetensors").items() if "input" not in name}
    assert dtypes == {np.dtype(np.int8), np.dtype(np.float16)}


def test_opening_again_converts_nothing(decide: Decide, read_back: ReadBack, tmp_path: Path) -> None:
    """The float model is made once; a changed checkpoint is converted again."""
    out = decide("llama", "static").write(tmp_path / "out")
    made = read_back(out).directory / "given.json"
    before = made.stat().st_mtime_ns
    assert read_back(out).directory == made.parent
    assert made.stat().st_mtime_ns == before
    config = out / "config.json"
    config.write_text(config.read_text() + "\n")
    read_back(out)
    assert made.stat().st_mtime_ns != before
