"""Checkpoints of encoders, however they were saved: names, heads, and what does not belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.load import checkpoint_from_directory, disagreement_from_checkpoint, read_tensor, skeleton_from_checkpoint
from fptq_export.errors import UserError

Tensors = dict[str, torch.Tensor]
WEIGHT = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def change(tiny_bert_dir: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], Tensors]], Path]:
    """Give a function that copies the tiny BERT with other tensors."""

    def changed(edit: Callable[[Tensors], Tensors]) -> Path:
        directory = Path(shutil.copytree(tiny_bert_dir, tmp_path / "bert"))
        file = directory / "model.safetensors"
        tensors = edit(load_file(file))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
        return directory

    return changed


def _bare(tensors: Tensors) -> Tensors:
    """As `BertModel.save_pretrained` writes them, with its pooler."""
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    return {**bare, "pooler.dense.weight": torch.zeros(64, 64), "pooler.dense.bias": torch.zeros(64)}


def _old(tensors: Tensors) -> Tensors:
    """As early versions wrote them: other names in norms, a buffer that is computed today."""
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in tensors.items():
        short = ".".join(name.split(".")[-2:])
        old[name.replace(short, names.get(short, short))] = tensor
    return {**old, "bert.embeddings.position_ids": torch.arange(96)[None]}


@pytest.mark.parametrize("edit", [dict, _bare, _old], ids=["masked LM", "bare model", "old names"])
def test_every_form_of_a_file_has_the_names_of_the_body(
    change: Callable[..., Path], tiny_bert_dir: Path, edit: Callable[[Tensors], Tensors]
) -> None:
    """Prefix, head, pooler, renamed norms and stale buffers: the body's tensors are found, and nothing else is."""
    checkpoint = checkpoint_from_directory(change(edit), "bert")
    assert checkpoint.task == "encoder"
    assert set(checkpoint.tensors) == set(skeleton_from_checkpoint(checkpoint).state_dict())
    expected = load_file(tiny_bert_dir / "model.safetensors")
    assert torch.equal(read_tensor(checkpoint, WEIGHT), expected[f"bert.{WEIGHT}"])
    norm = "encoder.layer.1.output.LayerNorm.bias"
    assert torch.equal(read_tensor(checkpoint, norm), expected[f"bert.{norm}"])
    disagreement = disagreement_from_checkpoint(checkpoint)
    assert (disagreement.missing, disagreement.unexpected, disagreement.mismatched) == ((), (), ())


def test_old_names_of_esm_are_resolved(tiny_esm_dir: Path) -> None:
    """ESM-2 is saved with the norm names of early versions; rotary frequencies are stored where they once were."""
    stored = load_file(tiny_esm_dir / "model.safetensors")
    assert any(name.endswith("LayerNorm.gamma") for name in stored), "the case is the one that is meant"
    checkpoint = checkpoint_from_directory(tiny_esm_dir, "esm")
    assert set(checkpoint.tensors) == set(skeleton_from_checkpoint(checkpoint).state_dict())
    assert disagreement_from_checkpoint(checkpoint).unexpected == ()


@pytest.mark.parametrize(
    ("edit", "kind", "name"),
    [
        (lambda tensors: {n: t for n, t in tensors.items() if "0.attention.self.query" not in n}, "missing", WEIGHT),
        (
            lambda tensors: {**tensors, "bert.encoder.layer.2.output.dense.bias": torch.zeros(64)},
            "unexpected",
            "encoder.layer.2.output.dense.bias",
        ),
        (
            lambda tensors: {**tensors, f"bert.{WEIGHT}": torch.zeros(32, 64)},
            "mismatched",
            WEIGHT,
        ),
    ],
    ids=["missing", "a layer too many", "another shape"],
)
def test_another_model_s_weights_are_found_out(
    change: Callable[..., Path], edit: Callable[[Tensors], Tensors], kind: str, name: str
) -> None:
    """What is ignored outside the body is not ignored inside it."""
    disagreement = disagreement_from_checkpoint(checkpoint_from_directory(change(edit), "bert"))
    assert name in str(getattr(disagreement, kind))


def test_quantized_encoders_are_refused(tiny_bert_dir: Path) -> None:
    """Their formats are read for language models only."""
    with pytest.raises(UserError, match="only those of causal language models are read"):
        checkpoint_from_directory(tiny_bert_dir, "bert", quantized=True)


def test_a_decoder_opens_as_its_body_on_request(tiny_llama_dir: Path) -> None:
    """Embedding models made of decoders: the prefix goes, and so does the head."""
    checkpoint = checkpoint_from_directory(tiny_llama_dir, "llama", task="encoder")
    assert "layers.0.self_attn.q_proj.weight" in checkpoint.tensors
    assert not any(name.startswith(("model.", "lm_head")) for name in checkpoint.tensors)
    assert disagreement_from_checkpoint(checkpoint).unexpected == ()


def test_the_real_minilm_opens(minilm_dir: Path) -> None:
    """Six layers of six linears, saved from the bare model with a pooler and position ids."""
    checkpoint = checkpoint_from_directory(minilm_dir, "minilm")
    assert json.loads((minilm_dir / "config.json").read_text())["architectures"] == ["BertModel"]
    assert checkpoint.task == "encoder"
    assert len([name for name in checkpoint.tensors if name.endswith(("dense.weight", "query.weight"))]) == 6 * 4
    assert disagreement_from_checkpoint(checkpoint).unexpected == ()
