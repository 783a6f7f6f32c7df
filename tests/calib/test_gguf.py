"""GGUF files become a Hugging Face directory once, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import calib.gguf
from calib.checks import check_checkpoint
from calib.gguf import FINGERPRINT_FILE
from calib.load import Checkpoint, checkpoint_from_directory, checkpoint_from_model, model_from_checkpoint, read_tensor
from fptq_export.errors import UserError
from fptq_export.progress import NoProgress

HIDDEN, MLP, HEADS, KV_HEADS = 32, 64, 4, 2
TOKENS = ["<u>", "a", "b", "ab", *(chr(0x100 + index) for index in range(60))]
SHAPES = {
    "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP),
}  # fmt: skip


def write_gguf(path: Path, *, tied: bool = True, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Write a LLaMA of one layer with FP32 weights; give its tensors."""
    random = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    shapes.update({f"blk.0.{name}.weight": shape for name, shape in SHAPES.items()})
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * len(TOKENS))
    writer.add_token_merges(["a b"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def open_gguf(path: Path, workdir: Path) -> Checkpoint:
    return checkpoint_from_model(str(path), workdir=workdir, trust_remote_code=False, progress=NoProgress())


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_of_the_file(tmp_path: Path, tied: bool) -> None:
    """Weights are FP32 and equal; a tied head is stored once, another one by itself."""
    tensors = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    checkpoint = open_gguf(tmp_path / "tiny.gguf", tmp_path / "work")
    check_checkpoint(checkpoint, NoProgress())
    assert checkpoint.name == "tiny"
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"F32"}
    assert ("lm_head.weight" in checkpoint.tensors) == (not tied)
    down = read_tensor(checkpoint, "model.layers.0.mlp.down_proj.weight").numpy()
    assert np.array_equal(down, tensors["blk.0.ffn_down.weight"])
    head = model_from_checkpoint(checkpoint, torch.float32).get_output_embeddings().weight
    assert np.array_equal(head.detach().numpy(), tensors["token_embd.weight" if tied else "output.weight"])


def test_same_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run reuses the directory, also when the GGUF file has moved."""
    write_gguf(tmp_path / "tiny.gguf")
    open_gguf(tmp_path / "tiny.gguf", tmp_path / "work")

    def convert_again(gguf: Path, directory: Path) -> None:
        raise AssertionError(f"{gguf} converted twice into {directory}")

    monkeypatch.setattr(calib.gguf, "_write_directory", convert_again)
    (tmp_path / "tiny.gguf").rename(tmp_path / "moved.gguf")
    assert len(open_gguf(tmp_path / "moved.gguf", tmp_path / "work").tensors) == 11


def test_changed_file_is_converted_again(tmp_path: Path) -> None:
    """A file of the same name and size but other bytes replaces the directory."""
    write_gguf(tmp_path / "tiny.gguf")
    open_gguf(tmp_path / "tiny.gguf", tmp_path / "work")
    tensors = write_gguf(tmp_path / "tiny.gguf", seed=1)
    checkpoint = open_gguf(tmp_path / "tiny.gguf", tmp_path / "work")
    assert np.array_equal(read_tensor(checkpoint, "model.norm.weight").numpy(), tensors["output_norm.weight"])


def test_killed_conversion_leaves_nothing_under_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing stops half-way no checkpoint stands there, and the next run makes a whole one."""
    write_gguf(tmp_path / "tiny.gguf")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(calib.gguf, "save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            open_gguf(tmp_path / "tiny.gguf", tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []
    leftover = tmp_path / "work" / ".checkpoint.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    open_gguf(tmp_path / "tiny.gguf", tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["checkpoint"]


def test_failed_conversion_keeps_the_old_directory(tmp_path: Path) -> None:
    """A damaged new file does not destroy what an earlier one gave."""
    write_gguf(tmp_path / "tiny.gguf")
    before = open_gguf(tmp_path / "tiny.gguf", tmp_path / "work")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError):
        open_gguf(tmp_path / "tiny.gguf", tmp_path / "work")
    assert (before.directory / FINGERPRINT_FILE).is_file()
    read_tensor(before, "model.norm.weight")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    """Wherever the file ends, one error names it and nothing is written."""
    write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"tiny\.gguf"):
        open_gguf(tmp_path / "tiny.gguf", tmp_path / "work")
    assert not (tmp_path / "work" / "checkpoint").exists()


def test_other_file_with_the_suffix_is_refused(tmp_path: Path) -> None:
    """The first bytes decide, before any library reads the file."""
    (tmp_path / "tiny.gguf").write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(UserError, match="not a GGUF file"):
        open_gguf(tmp_path / "tiny.gguf", tmp_path / "work")


def test_smollm2_is_what_transformers_makes_of_it(smollm2_gguf: Path, smollm2_dir: Path, tmp_path: Path) -> None:
    """The real model: every dequantized weight, rounded to FP16, is that of an independent conversion."""
    checkpoint = open_gguf(smollm2_gguf, tmp_path)
    reference = checkpoint_from_directory(smollm2_dir, "reference")
    assert checkpoint.tensors.keys() == reference.tensors.keys()
    for name in reference.tensors:
        assert torch.equal(read_tensor(checkpoint, name).half(), read_tensor(reference, name)), name
