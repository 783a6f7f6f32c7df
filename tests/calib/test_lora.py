"""Adapters are merged as peft merges them, bit for bit; what is not exactly W + scaling B A is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.load import Checkpoint, checkpoint_from_directory
from calib.lora import adapter_from_directory, check_merge, write_merged
from fptq_export.errors import UserError
from fptq_export.progress import NoProgress
from tests.support.adapters import lora_adapter
from tests.support.experts import tiny_mixtral
from tests.support.models import model_once, tiny_gpt2, tiny_llama

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "rank-stabilised": {**PLAIN, "use_rslora": True},
    "patterns": {
        **PLAIN,
        "rank_pattern": {"down_proj": 8, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "head": {"r": 4, "target_modules": ["lm_head"], "init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module")
def llama(make_model_dir: ModelDirFactory) -> Path:
    """Two layers in FP32, head not tied."""
    return model_once(make_model_dir, tiny_llama())


@pytest.fixture(scope="module")
def mixtral(make_model_dir: ModelDirFactory) -> Path:
    """Two layers of experts, whose files have other names than the model."""
    return model_once(make_model_dir, tiny_mixtral())


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain LoRA of query and down projections. Not to be changed: copy it."""
    return lora_adapter(llama, tmp_path_factory.mktemp("adapter"), **PLAIN)


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def _opened(directory: Path) -> Checkpoint:
    return checkpoint_from_directory(directory, "base")


def _merged(base: Path, adapter: Path, directory: Path) -> dict[str, torch.Tensor]:
    write_merged(_opened(base), adapter_from_directory(adapter), directory, (), NoProgress())
    return load_file(directory / "model.safetensors")


def _merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: torch.nn.Module = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return dict(merged.state_dict())


def _assert_merged(base: Path, adapter: Path, directory: Path, changed: int) -> None:
    """All tensors are those of peft's merge, as many as said differ from the base, and all are float32."""
    merged, expected = _merged(base, adapter, directory), _merged_by_peft(base, adapter)
    before = load_file(base / "model.safetensors")
    assert merged.keys() == before.keys()
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    assert sum(not torch.equal(tensor, before[name].float()) for name, tensor in merged.items()) == changed


@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_are_those_of_peft(settings: str, llama: Path, tmp_path: Path) -> None:
    """Every way to give rank and scale: the same float32 numbers, bit for bit, and nothing else is touched."""
    adapter = lora_adapter(llama, tmp_path / "adapter", **SETTINGS[settings])
    _assert_merged(llama, adapter, tmp_path / "merged", changed=1 if settings == "head" else 4)


def test_weights_that_are_stored_transposed_are_those_of_peft(make_model_dir: ModelDirFactory, tmp_path: Path) -> None:
    """GPT-2 stores [in, out], and the difference of c_attn is not square."""
    base = model_once(make_model_dir, tiny_gpt2())
    adapter = lora_adapter(base, tmp_path / "adapter", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    _assert_merged(base, adapter, tmp_path / "merged", changed=1)


def test_half_models_are_merged_in_float32(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """An FP16 model and a BF16 adapter: nothing is rounded to either type again."""
    base = Path(shutil.copytree(llama, tmp_path / "half"))
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    short = Path(shutil.copytree(adapter, tmp_path / "bf16"))
    tensors = load_file(short / "adapter_model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, short / "adapter_model.safetensors")
    _assert_merged(base, short, tmp_path / "merged", changed=4)


def test_merged_model_is_opened_as_what_it_was(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """Config with the stored type and all else as it was, and the files that came along."""
    write_merged(_opened(llama), adapter_from_directory(adapter), tmp_path, (llama / "tokenizer.json",), NoProgress())
    before, after = (json.loads((path / "config.json").read_text()) for path in (llama, tmp_path))
    assert after == {**before, "dtype": "float32"}
    assert (tmp_path / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert _opened(tmp_path).tensors.keys() == _opened(llama).tensors.keys()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("layer_replication", [[0, 2], [0, 2]]),
        ("init_lora_weights", "pissa"),
        ("setting_of_next_year", {"on": 1}),
        ("r", 0),
        ("lora_alpha", "8"),
        ("rank_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"(": 1}),
    ],
)
def test_setting_that_makes_more_than_a_sum_is_refused(setting: str, value: object, copy: Path) -> None:
    """By its name, with the way out; also one that nobody knows yet."""
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    with pytest.raises(UserError, match=rf"\$\.{setting}") as caught:
        adapter_from_directory(copy)
    assert "merge_and_unload" in caught.value.hint


def test_directory_without_config_is_refused(copy: Path, tmp_path: Path) -> None:
    """A missing directory and one of something else are told apart."""
    (copy / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        adapter_from_directory(copy)
    with pytest.raises(UserError, match="no such directory"):
        adapter_from_directory(tmp_path / "nowhere")


def test_pickled_weights_are_refused(copy: Path) -> None:
    """Before the file is opened: a pickle runs code."""
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        adapter_from_directory(copy)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda tensors: tensors.pop(QUERY), "has no partner"),
        (lambda tensors: tensors.update({QUERY: tensors[QUERY][:2]}), r"has shape \[2, 64\], .* the rank 4"),
        (
            lambda tensors: tensors.update({QUERY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}),
            "is neither A nor B of a linear",
        ),
    ],
    ids=["no partner", "another rank", "another kind"],
)
def test_tensors_that_do_not_fit_the_config_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], fragment: str, copy: Path
) -> None:
    """The tensor is named; none is left out in silence."""
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match=fragment):
        adapter_from_directory(copy)


def test_adapter_of_another_model_is_refused_before_any_weight_is_read(
    adapter: Path, make_model_dir: ModelDirFactory, tiny_opt_dir: Path
) -> None:
    """All linears that the base lacks, or has in another shape, at once, with the model the adapter asks for."""
    wider = model_once(make_model_dir, tiny_llama(intermediate_size=96))
    with pytest.raises(UserError) as caught:
        check_merge(_opened(wider), adapter_from_directory(adapter))
    problems = caught.value.cause
    assert problems.count("down_proj") == 2
    assert "a weight of [64, 128], and that of base is [64, 96]" in problems
    assert "q_proj" not in problems
    assert "trained on" in caught.value.hint
    with pytest.raises(UserError) as caught:
        check_merge(_opened(tiny_opt_dir), adapter_from_directory(adapter))
    assert caught.value.cause.count("no linear of this name") == 4


def test_tied_head_is_refused(llama: Path, make_model_dir: ModelDirFactory, tmp_path: Path) -> None:
    """Its weight is the embedding's, which the adapter does not mean to change."""
    base = model_once(make_model_dir, tiny_llama(tie_word_embeddings=True))
    adapter = lora_adapter(llama, tmp_path / "adapter", **SETTINGS["head"])
    with pytest.raises(UserError, match="tied to another one"):
        check_merge(_opened(base), adapter_from_directory(adapter))


def test_weights_that_are_not_finite_are_refused(llama: Path, copy: Path, tmp_path: Path) -> None:
    """The linear is named, and no model stands there."""
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[QUERY][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj.*NaN"):
        _merged(llama, copy, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_model_that_came_with_codes_is_refused(llama: Path, adapter: Path) -> None:
    """INT4 codes are kept bit for bit, so nothing can be added to them."""
    base = replace(_opened(llama), given=cast("Any", SimpleNamespace(format="gptq")))
    with pytest.raises(UserError, match="came with INT4 codes"):
        check_merge(base, adapter_from_directory(adapter))


@pytest.mark.parametrize(
    ("model", "module", "stored"),
    [
        ("llama", "layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight"),
        ("tiny_bert_dir", "encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.query.weight"),
        ("tiny_bert_dir", "bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.output.dense.weight"),
        ("mixtral", "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.v_proj.weight"),
    ],
    ids=["body of a decoder", "body of an encoder", "encoder with its head", "beside experts"],
)
def test_linear_is_found_under_the_name_of_the_file(
    model: str, module: str, stored: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With and without the prefix of the body, and beside experts in a layout of their own: one weight changes."""
    base: Path = request.getfixturevalue(model)
    before = load_file(base / "model.safetensors")
    out_features, in_features = before[stored].shape
    a, b = torch.ones(2, in_features), torch.full((out_features, 2), 0.25)
    names = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    merged = _merged(base, tmp_path, tmp_path / "merged")
    assert merged.keys() == before.keys()
    assert torch.equal(merged[stored], before[stored] + 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.items() if name != stored)
