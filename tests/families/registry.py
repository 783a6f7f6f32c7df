"""The model families of the support table: one entry a family, a tiny model each.

A new entry is all that a new family needs: every test of this folder runs over `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FAMILIES", "Family", "config_of"]

_SPREAD = 0.15
"""Standard deviation of the weights: about 1/sqrt(64), so that every layer sways the logits."""
_SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "initializer_range": _SPREAD,
}
_GROUPED: Mapping[str, Any] = {**_SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
_SHORT_NAMES: Mapping[str, Any] = {
    "n_embd": 64,
    "n_layer": 1,
    "n_head": 4,
    "vocab_size": 512,
    "n_positions": 512,
    "initializer_range": _SPREAD,
}
_QKV = "q_proj k_proj v_proj"


@dataclass(frozen=True)
class Family:
    """One row of the support table."""

    name: str
    """As people call it."""
    config: str
    """Class in `transformers`."""
    settings: Mapping[str, Any]
    """Its arguments: the quirks of the family, at tiny sizes. One layer unless a second one differs."""
    sites: tuple[tuple[str, str], ...]
    """Every fold site in order of use: (kind, last names of the linears that read it)."""
    no_site: Mapping[str, str]
    """End of the path of each linear that the FPTQ rule finds no site for -> words of the reason."""

    @property
    def key(self) -> str:
        """What selects the family on the command line: `pytest -k llama-3`."""
        return self.name.lower().replace(",", "").replace(" ", "-")


_GATED = (
    ("norm", _QKV),
    ("norm", "gate_proj up_proj"),
    ("gated_mlp", "down_proj"),
    ("norm", "lm_head"),
    ("attention_value", "o_proj"),
)
_ATTENTION = {"o_proj": "Reshape"}
_LLAMA_3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip

FAMILIES = (
    Family("LLaMA 3", "LlamaConfig", {**_GROUPED, "rope_parameters": _LLAMA_3_ROPE}, _GATED, _ATTENTION),
    Family(
        "Phi-3",
        "Phi3Config",
        {**_GROUPED, "pad_token_id": 0},
        (
            ("norm", "qkv_proj"),
            ("norm", "gate_up_proj"),
            ("gated_mlp", "down_proj"),
            ("norm", "lm_head"),
            ("attention_value", "o_proj"),
        ),
        _ATTENTION,
    ),
    Family(
        "OPT",
        "OPTConfig",
        {**_SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": _SPREAD},
        (
            ("norm", "k_proj v_proj q_proj"),
            ("norm", "fc1"),
            ("norm", "lm_head"),
            ("attention_value", "out_proj"),
            ("relu_mlp", "fc2"),
        ),
        {"out_proj": "Reshape", "fc2": "Relu"},
    ),
    Family(
        "GPT-2",
        "GPT2Config",
        _SHORT_NAMES,
        (("norm", "c_attn"), ("norm", "c_fc"), ("norm", "lm_head"), ("attention_value", "c_proj")),
        {"attn.c_proj": "Reshape", "mlp.c_proj": "Mul"},
    ),
    Family("StableLM", "StableLmConfig", {**_GROUPED, "use_qkv_bias": True}, _GATED, _ATTENTION),
)


def config_of(family: Family) -> PretrainedConfig:
    """The tiny config of a family."""
    import transformers

    config: PretrainedConfig = getattr(transformers, family.config)(**family.settings)
    return config
