"""Against the library that owns the format: it reads what we write, and we read what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calib.decide import PolicyOptions, decide_policy
from calib.fake_quant import apply_policy
from calib.load import model_from_checkpoint
from calib.stats import Stats
from fptq_export.packing import int4_from_packed
from fptq_export.progress import NoProgress
from tests.calib.interchange.conftest import Decide, ReadBack, logits
from tests.support.quantized import QuantizedCheckpoint
from tests.support.traced import FP32_LOGITS


def quantization_config(directory: Path) -> QuantizationConfig:
    raw = json.loads((directory / "config.json").read_text())["quantization_config"]
    return QuantizationConfig.model_validate(raw)


@pytest.mark.parametrize("tiers", ["mixed", "per_token"])
def test_written_config_is_the_w4a8_preset(decide: Decide, tmp_path: Path, tiers: Any) -> None:
    """The library reads it, and the weights of each group, and dynamic inputs, are those of its preset W4A8."""
    config = quantization_config(decide("llama", tiers).write(tmp_path / "out"))
    preset = preset_name_to_scheme("W4A8", [])
    for scheme in config.config_groups.values():
        assert scheme.weights == preset.weights.model_copy(update={"group_size": 32})
        if scheme.input_activations.dynamic:
            assert scheme.input_activations == preset.input_activations
    assert config.quantization_status == QuantizationStatus.COMPRESSED


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_packed_words_are_the_library_s(decide: Decide, tmp_path: Path, family: str) -> None:
    """It unpacks our words into our codes, and packs the codes into our words."""
    decided = decide(family, "mixed")
    tensors = load_file(decided.write(tmp_path / "out", layout="pack-quantized") / "model.safetensors")
    for path in decided.policy.quantized():
        codes = torch.from_numpy(int4_from_packed(decided.arrays.read(f"{path}.weight_codes")))
        packed, shape = tensors[f"{path}.weight_packed"], tensors[f"{path}.weight_shape"]
        assert torch.equal(unpack_from_int32(packed, 4, torch.Size(shape.tolist())), codes)
        assert torch.equal(pack_to_int32(codes, 4), packed)


@pytest.mark.parametrize("layout", ["int-quantized", "pack-quantized"])
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_runs_what_we_write(
    decide: Decide, read_back: ReadBack, tmp_path: Path, family: str, layout: str
) -> None:
    """With static inputs, equalized and not, its logits are those of our fake-quant model, up to float32 sums.

    Per-token scales differ by design (its range is 127.5 steps, ours 127), so they are left out.
    """
    decided = decide(family, "equalized")
    out = decided.write(tmp_path / "out", layout=layout)
    back = read_back(out)
    stats = Stats(decided.maxima, 48, "test")
    policy, stream = decide_policy(decided.sites, stats, back, PolicyOptions(), NoProgress())
    arrays = stream.read_all()
    ours = model_from_checkpoint(back, torch.float32)
    apply_policy(ours, policy, arrays, decided.sites)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    wanted = logits(theirs.eval())
    assert np.abs(logits(ours) - wanted).max() <= FP32_LOGITS * np.abs(wanted).max()


@pytest.mark.parametrize("layout", ["int-quantized", "pack-quantized"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_checkpoint_of_the_library_keeps_its_codes(
    tiny_llama_dir: Path, tmp_path: Path, read_back: ReadBack, layout: str, dtype: torch.dtype
) -> None:
    """Codes bit for bit; scales too where float16 holds them, and a note where it does not."""
    scheme = preset_name_to_scheme("W4A8", ["Linear"])
    scheme.weights.group_size = 32
    tensors = load_file(tiny_llama_dir / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name).to(dtype)
        scale = (weight.float().unflatten(-1, (-1, 32)).abs().amax(-1) / 7.5).to(dtype)
        parts = BaseCompressor.get_value_from_registry(layout).compress(
            {"weight": weight, "weight_scale": scale}, scheme
        )
        tensors.update({f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()})
        packed = parts.get("weight_packed")
        codes = unpack_from_int32(packed, 4, weight.shape) if packed is not None else parts["weight"]
        expected[name.removesuffix(".weight")] = codes.to(torch.int8), scale
    out = tmp_path / "theirs"
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    theirs = QuantizationConfig(
        config_groups={"group_0": scheme}, format=layout, quantization_status="compressed", ignore=["lm_head"]
    )
    config["quantization_config"] = {**json.loads(theirs.model_dump_json()), "version": "0.20.0"}
    (out / "config.json").write_text(json.dumps(config))
    given = read_back(out).given
    assert given is not None
    assert given.layers.keys() == expected.keys()
    for path, (codes, scale) in expected.items():
        packed_codes, scales = given.read(path)
        assert np.array_equal(int4_from_packed(packed_codes), codes.numpy())
        assert np.array_equal(scales, scale.to(torch.float16).numpy())
        exact = torch.equal(scale.to(torch.float16).to(dtype), scale)
        assert given.layers[path].note == ("" if exact else "group scales rounded to float16")
        assert given.layers[path].activation == "per_token"


def test_awq_codes_are_those_the_library_converts(
    quantized: Callable[..., QuantizedCheckpoint], read_back: ReadBack
) -> None:
    """Its converter from AutoAWQ, an independent reading of the layout, finds the same codes."""
    checkpoint = quantized("awq")
    tensors = load_file(checkpoint.directory / "model.safetensors")
    converted = AutoAWQConverter(group_size=32).process(tensors)
    given = read_back(checkpoint.directory).given
    assert given is not None
    for path in given.layers:
        codes, scales = given.read(path)
        shape = torch.Size(converted[f"{path}.weight_shape"].tolist())
        theirs = unpack_from_int32(converted[f"{path}.weight_packed"], 4, shape)
        assert np.array_equal(int4_from_packed(codes), theirs.numpy())
        assert np.array_equal(scales, converted[f"{path}.weight_scale"].numpy())
