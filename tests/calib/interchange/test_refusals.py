"""What a quantized checkpoint cannot be read or written for, and the words that say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from calib.load import Checkpoint, checkpoint_from_directory
from fptq_export.errors import UserError
from fptq_export.policy import LayerPolicy, Policy, PolicyArrays, Rule, arrays_path, write_policy
from fptq_export.sites import Sites
from tests.calib.interchange.conftest import Decide, Decided, ReadBack
from tests.support.quantized import QuantizedCheckpoint

Quantized = Callable[..., QuantizedCheckpoint]
Tensors = dict[str, Any]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def compressed(decide: Decide, tmp_path: Path) -> QuantizedCheckpoint:
    """A compressed-tensors checkpoint, packed, with static and per-token inputs."""
    directory = decide("llama", "mixed").write(tmp_path / "ct", layout="pack-quantized")
    return QuantizedCheckpoint(directory, {}, {})


def edit_scheme(checkpoint: QuantizedCheckpoint, part: str, **changes: Any) -> None:
    raw = json.loads((checkpoint.directory / "config.json").read_text())["quantization_config"]
    for scheme in raw["config_groups"].values():
        scheme[part] = {**scheme[part], **changes}
    checkpoint.edit_config(config_groups=raw["config_groups"])


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("weights", {"num_bits": 8}, "only int4 is supported"),
        ("weights", {"type": "float"}, "only int4 is supported"),
        ("weights", {"symmetric": False}, "asymmetric"),
        ("weights", {"actorder": "group"}, "activation order"),
        ("weights", {"strategy": "tensor", "group_size": None}, "'tensor' is not supported"),
        ("weights", {"group_size": 0}, "needs a positive one"),
        ("weights", {"dynamic": True}, "no codes"),
        ("weights", {"new_entry": 1}, "Extra inputs are not permitted"),
        ("input_activations", {"num_bits": 4}, "only int8 is supported"),
        ("input_activations", {"type": "float"}, "only int8 is supported"),
        ("input_activations", {"symmetric": False}, "asymmetric"),
        ("input_activations", {"strategy": "group", "dynamic": True}, "dynamic per group is not supported"),
    ],
)
def test_scheme_that_no_kernel_runs_is_refused(
    compressed: QuantizedCheckpoint, read_back: ReadBack, part: str, changes: dict[str, Any], message: str
) -> None:
    """Other bits, zero points, activation order and unknown entries are named with their JSON path."""
    edit_scheme(compressed, part, **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_back(compressed.directory)
    assert f"$.quantization_config.config_groups.group_0.{part}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.0.0"}, "'1.0.0' is unknown"),
        ({"format": "marlin-24", "config_groups": {}}, "no linear of the model is quantized"),
        ({"quantization_status": "frozen"}, "only 'compressed' holds INT4 codes"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "would be lost"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "would be lost"),
        ({"ignore": ["re:("]}, "not a regular expression"),
        ({"something_new": True}, "Extra inputs are not permitted"),
        ({"quant_method": "bitsandbytes"}, "cannot be read"),
    ],
)
def test_config_that_is_not_understood_is_refused(
    compressed: QuantizedCheckpoint, read_back: ReadBack, changes: dict[str, Any], message: str
) -> None:
    """Unknown versions, formats and features, before any tensor is read."""
    compressed.edit_config(**changes)
    with pytest.raises(UserError, match=message):
        read_back(compressed.directory)


def test_every_problem_of_a_config_is_listed(compressed: QuantizedCheckpoint, read_back: ReadBack) -> None:
    """One edit can mend them all."""
    edit_scheme(compressed, "weights", num_bits=3, symmetric=False)
    with pytest.raises(UserError) as caught:
        read_back(compressed.directory)
    assert "num_bits" in str(caught.value)
    assert "symmetric" in str(caught.value)


def test_unknown_layout_is_refused(compressed: QuantizedCheckpoint, read_back: ReadBack) -> None:
    """A storage format of the library that this tool does not read is named."""
    raw = json.loads((compressed.directory / "config.json").read_text())["quantization_config"]
    groups = {name: {**scheme, "format": "marlin-24"} for name, scheme in raw["config_groups"].items()}
    compressed.edit_config(config_groups=groups)
    with pytest.raises(UserError, match="'marlin-24' is not supported"):
        read_back(compressed.directory)


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[f"{Q}.{name}"]

    return change


def put(name: str, value: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.{name}"] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("weight_scale"), "missing.*weight_scale"),
        (drop("weight_packed"), "missing.*weight_packed"),
        (drop("input_scale"), "missing.*input_scale"),
        (put("weight_scale", np.ones((64, 3), np.float16)), r"\[64, 3\]; \[64, 2\] is expected"),
        (put("weight_scale", np.ones((64, 2), np.int32)), "is I32; F16"),
        (put("weight_packed", np.zeros((64, 7), np.int32)), r"\[64, 7\]; \[64, 8\] is expected"),
        (put("weight_shape", np.array([64, 128])), r"weight_shape says \[64, 128\]"),
        (put("weight_scale", np.full((64, 2), np.nan, np.float16)), "float16 cannot hold"),
        (put("weight_scale", np.full((64, 2), 1e6, np.float32)), "1e.06, which float16 cannot hold"),
        (put("weight_scale", np.zeros((64, 2), np.float16)), "is 0, which is zero in float16"),
        (put("input_scale", np.zeros(1, np.float32)), "input_scale is 0"),
        (put("weight_zero_point", np.ones((64, 2), np.int8)), "asymmetric"),
        (put("weight_g_idx", np.zeros(64, np.int32)), "activation order"),
        (put("stray", np.zeros(3, np.int32)), "belongs to no quantized linear"),
    ],
)
def test_wrong_tensor_of_a_compressed_checkpoint_is_refused(
    compressed: QuantizedCheckpoint, read_back: ReadBack, change: Any, message: str
) -> None:
    """Missing scales, wrong shapes, zero points and values that are no scale, by layer or tensor name."""
    compressed.edit_tensors(change)
    with pytest.raises(UserError, match=message) as caught:
        read_back(compressed.directory)
    assert Q in str(caught.value)


def test_code_outside_int4_is_refused(decide: Decide, tmp_path: Path, read_back: ReadBack) -> None:
    """An int8 tensor that claims to be INT4 is checked."""
    checkpoint = QuantizedCheckpoint(decide("llama", "static").write(tmp_path / "ct"), {}, {})
    checkpoint.edit_tensors(put("weight", np.full((64, 64), 8, np.int8)))
    with pytest.raises(UserError, match=r"its codes lie in \[8, 8\]"):
        read_back(checkpoint.directory)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("gptq", {"bits": 8}, "bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format"),
        ("gptq", {"checkpoint_format": None, "format": "gemm"}, "format"),
        ("gptq", {"group_size": 8}, "groups of 8 do not divide|is expected"),
        ("gptq", {"dynamic": {"-:lm_head": {}}}, "dynamic"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format"),
        ("awq", {"bits": 3}, "bits"),
        ("awq", {"version": "gemv"}, "version"),
    ],
)
def test_other_gptq_and_awq_layouts_are_refused(
    quantized: Quantized, read_back: ReadBack, layout: str, changes: dict[str, Any], message: str
) -> None:
    """Their tensors would be read as something else."""
    checkpoint = quantized(layout)
    checkpoint.edit_config(**changes)
    with pytest.raises(UserError, match=message):
        read_back(checkpoint.directory)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("gptq", put("g_idx", np.arange(64, dtype=np.int32)[::-1] // 32), "activation order"),
        ("gptq", put("qzeros", np.zeros((2, 8), np.int32)), "asymmetric.*e.g. 1"),
        ("gptq_v2", put("qzeros", np.full((2, 8), 0x77777777, np.int32)), "asymmetric.*e.g. 7"),
        ("awq", put("qzeros", np.full((2, 8), 0x77777777, np.int32)), "asymmetric.*e.g. 7"),
        ("gptq", drop("scales"), "missing.*scales"),
        ("awq", put("qweight", np.zeros((8, 64), np.int32)), r"\[8, 64\]; \[64, 8\] is expected"),
    ],
)
def test_gptq_or_awq_layer_that_cannot_be_kept_is_refused(
    quantized: Quantized, read_back: ReadBack, layout: str, change: Any, message: str
) -> None:
    """Asymmetric codes and groups in activation order, with the layer and the reason."""
    checkpoint = quantized(layout)
    checkpoint.edit_tensors(change)
    with pytest.raises(UserError, match=message) as caught:
        read_back(checkpoint.directory)
    assert Q in str(caught.value)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/model.safetensors", "a\\..\\b.safetensors"])
def test_shard_outside_the_checkpoint_is_refused(
    compressed: QuantizedCheckpoint, read_back: ReadBack, file: str
) -> None:
    """An index cannot make the reader open files elsewhere."""
    weights = compressed.directory / "model.safetensors"
    names = list(load_file(weights))
    weights.rename(compressed.directory.parent / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, file)}
    (compressed.directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a file name inside the checkpoint directory"):
        read_back(compressed.directory)


def test_failed_conversion_leaves_nothing(compressed: QuantizedCheckpoint, read_back: ReadBack, tmp_path: Path) -> None:
    """A refusal halfway does not leave a directory that the next run would take for a model."""
    compressed.edit_tensors(put("weight_zero_point", np.ones((64, 2), np.int8)))
    with pytest.raises(UserError, match="asymmetric"):
        read_back(compressed.directory)
    assert list((tmp_path / "opened-ct").iterdir()) == []


@pytest.mark.parametrize(
    ("update", "message"),
    [({"signed_scales": True}, "signed"), ({"precision": "w4a8", "group_size": 32}, "tied")],
)
def test_policy_that_the_format_cannot_hold_is_refused(
    decide: Decide, tmp_path: Path, update: dict[str, Any], message: str
) -> None:
    """Negative scales, and a head that shares its weight with the embedding."""
    decided = decide("opt", "static")
    path = "lm_head" if message == "tied" else next(iter(decided.policy.quantized()))
    layer = decided.policy.layers[path].model_copy(update=update)
    policy = decided.policy.model_copy(update={"layers": {**decided.policy.layers, path: layer}})
    changed = Decided(decided.checkpoint, decided.sites, policy, decided.arrays, decided.maxima)
    with pytest.raises(UserError, match=message):
        changed.write(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_conv1d_is_refused(gpt2: Checkpoint, tmp_path: Path) -> None:
    """GPT-2 stores [in, out]: loaders of the format would take the codes for [out, in], of a square weight unseen."""
    path = "transformer.h.0.attn.c_proj"
    layer = LayerPolicy(
        precision="w4a8", activation="per_token", reason="test", in_features=64, out_features=64, group_size=32
    )
    policy = Policy(model="gpt2", rule=Rule(), layers={path: layer})
    write_policy(policy, {}, tmp_path / "policy.json")
    arrays = PolicyArrays(arrays_path(tmp_path / "policy.json"))
    decided = Decided(gpt2, Sites(linears=(), fold_sites=()), policy, arrays, {})
    with pytest.raises(UserError, match=r"torch\.nn\.Linear only") as caught:
        decided.write(tmp_path / "out")
    assert caught.value.where == f"layer {path}"
    assert list((tmp_path / "out").iterdir()) == []


def test_value_beyond_float16_is_refused(decide: Decide, tmp_path: Path) -> None:
    """A float tensor that overflows is named instead of being written as infinity."""
    decided = decide("llama", "static")
    directory = tmp_path / "wide"
    directory.mkdir()
    tensors = load_file(decided.checkpoint.directory / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text((decided.checkpoint.directory / "config.json").read_text())
    wide = Decided(
        checkpoint_from_directory(directory, "wide"), decided.sites, decided.policy, decided.arrays, decided.maxima
    )
    with pytest.raises(UserError, match=r"model.norm.weight.*does not fit float16"):
        wide.write(tmp_path / "out", dtype="fp16")
