"""The rotated model computes what the original computes, and what cannot be rotated is refused before it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import GemmaConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from calib.checks import check_checkpoint
from calib.load import Checkpoint, checkpoint_from_directory, model_from_checkpoint
from calib.rotation import check_rotation, write_rotated
from calib.rotation.rewrite import rotated_parameter
from fptq_export.errors import UserError
from fptq_export.progress import NoProgress
from tests.support.checkpoints import edit_config
from tests.support.models import model_once

SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 80, "vocab_size": 512, "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip
FLOAT32_OVER_BFLOAT16 = 2.0**-16
"""How much smaller a rounding to 24 bits is than one to 8."""
MARGIN = 16.0
"""Storing a rotated model rounds every weight once to 24 bits, and its norms, which run in float32 in both models,
round the stream and its length: up to six roundings more of everything that the weights multiply. Their effect is of
first order, so it is that of rounding the weights of the original to 8 bits, 2^-16 times as large, once for the weights
and six times for the norms of the two models each: 13, and rounded up to 16 because signs fall differently."""

Configs = dict[str, PretrainedConfig]
ModelDirFactory = Callable[[PretrainedConfig], Path]


def configs() -> Configs:
    """Untied, tied, with biases, with biases at q/k/v only, and with norms that multiply by 1 + w."""
    return {
        "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
        "llama, tied, biases": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        "qwen": Qwen2Config(**{**SIZES, "hidden_size": 64}, tie_word_embeddings=True),
        "mistral": MistralConfig(**SIZES, tie_word_embeddings=False),
        "gemma": GemmaConfig(**SIZES, tie_word_embeddings=True),
    }


def rotated(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    write_rotated(checkpoint, directory, (), NoProgress())
    return checkpoint_from_directory(directory, "rotated")


def logits_in_float64(
    checkpoint: Checkpoint, change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Of 2 x 16 tokens, with every parameter changed first."""
    model = model_from_checkpoint(checkpoint, torch.float64)
    ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if change is not None:
            for parameter in model.parameters():
                parameter.set_(change(parameter))  # type: ignore[call-overload]
        logits: torch.Tensor = model(ids).logits
    return logits


@pytest.fixture(scope="module")
def llama(make_model_dir: ModelDirFactory) -> Checkpoint:
    """Untied, hidden size 48 = 12 x 4."""
    return checkpoint_from_directory(model_once(make_model_dir, configs()["llama"]), "llama")


@pytest.mark.parametrize("name", configs())
def test_logits_stay_what_they_are(name: str, make_model_dir: ModelDirFactory, tmp_path: Path) -> None:
    """Up to the rounding of stored weights; a wrong rotation of any one parameter changes them by their own size."""
    original = checkpoint_from_directory(model_once(make_model_dir, configs()[name]), "original")
    after = rotated(original, tmp_path)
    before = logits_in_float64(original)
    coarse = logits_in_float64(original, lambda weight: weight.bfloat16().double())
    allowed = MARGIN * FLOAT32_OVER_BFLOAT16 * (coarse - before).abs().max().item()
    assert (logits_in_float64(after) - before).abs().max().item() <= allowed
    assert allowed < 1e-3 * before.abs().max().item()


def test_rotated_directory_is_an_ordinary_model(llama: Checkpoint, tmp_path: Path) -> None:
    """It passes the checks of any checkpoint: names, shapes, values."""
    check_checkpoint(rotated(llama, tmp_path), NoProgress(), needs_tokenizer=False)


def test_only_what_touches_the_stream_changes(llama: Checkpoint, tmp_path: Path) -> None:
    """Every linear reads or writes the stream; norm weights become 1, all is float32, shapes stay."""
    after, before = rotated(llama, tmp_path), load_file(llama.directory / "model.safetensors")
    stored = load_file(after.directory / "model.safetensors")
    assert set(stored) == set(before)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    for name, tensor in stored.items():
        assert tensor.shape == before[name].shape
        assert (tensor == 1.0).all().item() is name.endswith("norm.weight")
        assert not torch.equal(tensor, before[name])


def test_what_does_not_touch_the_stream_is_kept(make_model_dir: ModelDirFactory, tmp_path: Path) -> None:
    """Biases of readers are added after the rotation is undone: bit for bit as they were."""
    original = checkpoint_from_directory(model_once(make_model_dir, configs()["llama, tied, biases"]), "llama")
    before = load_file(original.directory / "model.safetensors")
    stored = load_file(rotated(original, tmp_path).directory / "model.safetensors")
    kept = {name for name in before if torch.equal(stored[name], before[name])}
    readers = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.bias", "up_proj.bias")
    assert kept == {name for name in before if name.endswith(readers)}


def test_tied_head_gets_a_weight_of_its_own(make_model_dir: ModelDirFactory, tmp_path: Path) -> None:
    """The final norm moves into the head and not into the embedding; the config says so."""
    original = checkpoint_from_directory(model_once(make_model_dir, configs()["gemma"]), "gemma")
    assert "lm_head.weight" not in original.tensors
    after = rotated(original, tmp_path)
    assert "lm_head.weight" in after.tensors
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["dtype"]) == (False, "float32")


def test_rotating_twice_gives_the_same_bytes(llama: Checkpoint, tmp_path: Path) -> None:
    """Nothing is drawn anew."""
    first, second = (rotated(llama, tmp_path / name).directory / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_row_chunks_do_not_change_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of more than 2^24 elements go through in parts."""
    from calib.rotation import rewrite
    from calib.rotation.hadamard import rotation_of_size
    from calib.rotation.roles import ResidualRoles

    rotation = rotation_of_size(48)
    assert rotation is not None
    roles = ResidualRoles(48, frozenset(), frozenset(), {"w": None})
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    whole = rotated_parameter("w", weight, roles, rotation, None)
    monkeypatch.setattr(rewrite, "_ELEMENTS", 3 * 48)
    assert torch.equal(rotated_parameter("w", weight, roles, rotation, None), whole)


def test_copies_come_along(llama: Checkpoint, tmp_path: Path) -> None:
    """The tokenizer's files lie beside the weights."""
    write_rotated(llama, tmp_path, (llama.directory / "tokenizer.json",), NoProgress())
    assert (tmp_path / "tokenizer.json").read_bytes() == (llama.directory / "tokenizer.json").read_bytes()


def test_size_without_a_hadamard_matrix_is_refused(make_model_dir: ModelDirFactory) -> None:
    """The message names the size."""
    directory = model_once(make_model_dir, LlamaConfig(**{**SIZES, "hidden_size": 92, "num_hidden_layers": 1}))
    with pytest.raises(UserError, match="order 92"):
        check_rotation(checkpoint_from_directory(directory, "odd"))


def test_given_codes_are_refused(llama: Checkpoint) -> None:
    """INT4 codes belong to weights that are not rotated."""
    given = cast("Any", SimpleNamespace(format="gptq", layers={}))
    with pytest.raises(UserError, match="INT4 codes"):
        check_rotation(replace(llama, given=given))


def test_layer_norm_is_refused(tiny_opt_dir: Path) -> None:
    """The module is named."""
    with pytest.raises(UserError, match=r"layers\.0\.self_attn_layer_norm: .*mean of the channels"):
        check_rotation(checkpoint_from_directory(tiny_opt_dir, "opt"))


def test_tensor_that_the_checkpoint_lacks_is_refused(tiny_llama_copy: Path) -> None:
    """More layers than the file holds: found before anything is written."""
    edit_config(tiny_llama_copy, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"parameter model\.layers\.2"):
        check_rotation(checkpoint_from_directory(tiny_llama_copy, "llama"))
