"""Checkpoints of tiny random models, each made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "BERT_POSITIONS",
    "ENCODER_SIZES",
    "ESM_MASK",
    "SMALL",
    "model_once",
    "tiny_bart",
    "tiny_bert",
    "tiny_esm",
    "tiny_gemma",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_opt",
    "tiny_t5",
    "tiny_whisper",
]

SMALL = ("--calib-size", "2", "--calib-seq", "64", "--eval-windows", "1", "--eval-seq", "80", "--decode-steps", "4")
"""Enough for every code path. The window is longer than the prompt of the decode comparison."""
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
_SPREAD = 0.15
"""Standard deviation of the weights: about 1/sqrt(64), so that every layer sways the logits. With transformers' 0.02
the logits are those of the embedding, and a layer could be wrong unseen."""

BERT_POSITIONS = 96
ENCODER_SIZES = ("--calib-size", "2", "--calib-seq", "64", "--eval-seq", "64", "--eval-sentences", "9")
"""Options of a short run of a tiny encoder; there are more sentences than run at a time."""
ESM_MASK = 32
"""Token of ESM-2 that stands for a masked residue."""

_directories: dict[str, Path] = {}


def model_once(make_model_dir: Callable[[PretrainedConfig], Path], config: PretrainedConfig) -> Path:
    """The directory of a model, made with the first call for its config."""
    key = config.to_json_string()
    if key not in _directories:
        _directories[key] = make_model_dir(config)
    return _directories[key]


def tiny_llama(*, intermediate_size: int = 128, tie_word_embeddings: bool = False) -> PretrainedConfig:
    """RMSNorm, gated MLP, grouped-query attention, untied head; two layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **_SIZES,
        num_hidden_layers=2,
        intermediate_size=intermediate_size,
        num_key_value_heads=2,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=_SPREAD,
    )


def tiny_gpt2() -> PretrainedConfig:
    """Linears that are stored [in, out] (`Conv1D`), q, k and v in one, tied head; one layer."""
    from transformers import GPT2Config

    return GPT2Config(n_embd=64, n_head=4, n_layer=1, n_positions=512, vocab_size=512, initializer_range=_SPREAD)


def tiny_opt() -> PretrainedConfig:
    """LayerNorm with bias, ReLU MLP on two-dimensional tensors, biases, tied head; two layers."""
    from transformers import OPTConfig

    return OPTConfig(**_SIZES, num_hidden_layers=2, ffn_dim=128, word_embed_proj_dim=64, init_std=_SPREAD)


def tiny_gemma() -> PretrainedConfig:
    """Norms that multiply by 1 + w, GELU-gated MLP, tied head; one layer."""
    from transformers import GemmaConfig

    return GemmaConfig(
        **_SIZES,
        num_hidden_layers=1,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        initializer_range=_SPREAD,
    )


def tiny_bart() -> PretrainedConfig:
    """Encoder-decoder with LayerNorm after each addition, biases, learned positions, body below `model`; one layer."""
    from transformers import BartConfig

    layers = {"layers": 1, "attention_heads": 4, "ffn_dim": 128}
    halves: dict[str, Any] = {f"{half}_{name}": it for half in ("encoder", "decoder") for name, it in layers.items()}
    tokens: dict[str, Any] = {"decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 0}
    return BartConfig(**halves, **tokens, d_model=64, vocab_size=512, max_position_embeddings=128, init_std=_SPREAD)


def tiny_bert() -> PretrainedConfig:
    """LayerNorm after each addition, GELU MLP, biases, two segments; two layers."""
    from transformers import BertConfig

    sizes = {**_SIZES, "max_position_embeddings": BERT_POSITIONS}
    return BertConfig(**sizes, num_hidden_layers=2, intermediate_size=128, pad_token_id=1, initializer_range=_SPREAD)


def tiny_esm() -> PretrainedConfig:
    """LayerNorm before attention and MLP, rotary positions, token dropout, GELU written out; one layer."""
    from transformers import EsmConfig

    return EsmConfig(
        **_SIZES,
        num_hidden_layers=1,
        intermediate_size=128,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        mask_token_id=ESM_MASK,
        pad_token_id=1,
        initializer_range=_SPREAD,
    )


def tiny_t5(*, gated: bool, layers: int = 1) -> PretrainedConfig:
    """Relative positions, RMSNorm; T5 1.1 (GELU-gated MLP, plain head) or the original (ReLU, scaled and tied head).

    From the second layer on, layers are given the position bias that the first one made.
    """
    from transformers import T5Config

    sizes: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "vocab_size": 512}
    tokens: dict[str, Any] = {"decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 1}
    head: dict[str, Any] = {"tie_word_embeddings": not gated}
    mlp = "gated-gelu" if gated else "relu"
    return T5Config(**sizes, **tokens, **head, num_layers=layers, feed_forward_proj=mlp)


def tiny_whisper() -> PretrainedConfig:
    """Two convolutions before the encoder, LayerNorm before each part, keys without a bias, tied head; one layer."""
    from transformers import WhisperConfig

    layers = {"layers": 1, "attention_heads": 4, "ffn_dim": 128}
    halves: dict[str, Any] = {f"{half}_{name}": it for half in ("encoder", "decoder") for name, it in layers.items()}
    tokens: dict[str, Any] = {"decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 1}
    tables: dict[str, Any] = {"num_mel_bins": 16, "max_source_positions": 12, "max_target_positions": 96}
    return WhisperConfig(**halves, **tokens, **tables, d_model=64, vocab_size=512, init_std=_SPREAD)
