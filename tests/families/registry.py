"""The model families of the support table: one entry a family, a tiny model each.

A new entry is all that a new family needs: every test of this folder runs over `FAMILIES`. The cells of `HALVES`,
`SPEECH_HALVES` and `LANGUAGE_HALF` are tests of `tests/halves`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "DECODERS",
    "ENCODERS",
    "FAMILIES",
    "HALVES",
    "LANGUAGE_HALF",
    "ROWS",
    "SPEECH_HALVES",
    "Family",
    "config_of",
]

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
_WINDOW = 8
"""Sliding window; the tests' sequences are longer."""


@dataclass(frozen=True)
class Family:
    """One row of the support table."""

    name: str
    """As people call it."""
    config: str
    """Class in `transformers`."""
    settings: Mapping[str, Any]
    """Its arguments: the quirks of the family, at tiny sizes. One layer unless a second one differs. Empty where there
    is a `run`, whose model has its own."""
    sites: tuple[tuple[str, str], ...]
    """Every fold site in order of use: (kind, last names of the linears that read it)."""
    no_site: Mapping[str, str]
    """End of the path of each linear that the FPTQ rule finds no site for -> words of the reason."""
    routers: tuple[str, ...] = ()
    """Ends of the paths of the linears that keep the float precision."""
    outside: tuple[str, ...] = ()
    """Paths of the linears of the model that its graph does not compute."""
    run: str | None = None
    """Fixture of a finished run whose graph and engine are used, as of encoders; None to trace and build here."""

    @property
    def output(self) -> str:
        """Output of the graph that is compared."""
        return "logits" if self.run is None else "last_hidden_state"

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


def _experts(readers: str, down_projections: int) -> tuple[tuple[str, str], ...]:
    """Sites where the experts, and what else reads their norm, stand in the place of one MLP."""
    return (_GATED[0], ("norm", readers), *_GATED[2:3] * down_projections, *_GATED[3:])


_OFFSET = tuple((kind.replace("norm", "offset_norm"), linears) for kind, linears in _GATED)
_ATTENTION = {"o_proj": "Reshape"}
_GELU = {"dense": "Reshape", "dense_4h_to_h": "Gelu"}
_EXPERTS = 3
_CHOSEN = 2
_MIXTURE: Mapping[str, Any] = {
    **_GROUPED, "num_experts": _EXPERTS, "num_experts_per_tok": _CHOSEN, "moe_intermediate_size": 64,
}  # fmt: skip
_GATE_UP = "gate_proj up_proj"
_LLAMA_3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
_GEMMA = {**_GROUPED, "head_dim": 16, "sliding_window": _WINDOW}
_SOFT_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
"""So low that the logits of the tests reach them."""
_BOTH_ATTENTIONS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0,
}  # fmt: skip

DECODERS = (
    Family("LLaMA 3", "LlamaConfig", {**_GROUPED, "rope_parameters": _LLAMA_3_ROPE}, _GATED, _ATTENTION),
    Family("Mistral", "MistralConfig", {**_GROUPED, "sliding_window": _WINDOW}, _GATED, _ATTENTION),
    Family("Qwen2", "Qwen2Config", _GROUPED, _GATED, _ATTENTION),
    Family("Qwen3", "Qwen3Config", {**_GROUPED, "head_dim": 16}, _GATED, _ATTENTION),
    Family("Gemma 2", "Gemma2Config", {**_GEMMA, **_SOFT_CAPS}, _OFFSET, _ATTENTION),
    Family(
        "Gemma 3",
        "Gemma3TextConfig",
        {**_GEMMA, **_BOTH_ATTENTIONS},
        (*_OFFSET[:3], *_OFFSET[:4], *_OFFSET[4:] * 2),
        _ATTENTION,
    ),
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
        "BLOOM",
        "BloomConfig",
        {"hidden_size": 64, **_SHORT_NAMES},
        (("norm", "query_key_value"), ("norm", "dense_h_to_4h"), ("norm", "lm_head")),
        {"dense": "Reshape", "dense_4h_to_h": "Mul"},
    ),
    Family(
        "GPT-2",
        "GPT2Config",
        _SHORT_NAMES,
        (("norm", "c_attn"), ("norm", "c_fc"), ("norm", "lm_head"), ("attention_value", "c_proj")),
        {"attn.c_proj": "Reshape", "mlp.c_proj": "Mul"},
    ),
    Family(
        "GPT-NeoX",
        "GPTNeoXConfig",
        {**_SIZES, "intermediate_size": 128},
        (("norm", "query_key_value"), ("norm", "dense_h_to_4h"), ("norm", "lm_head")),
        _GELU,
    ),
    Family(
        "Falcon",
        "FalconConfig",
        {**_SIZES, "num_kv_heads": 1},
        (("norm", "query_key_value dense_h_to_4h"), ("norm", "lm_head")),
        _GELU,
    ),
    Family(
        "Falcon, new decoder",
        "FalconConfig",
        {**_SIZES, "num_kv_heads": 2, "new_decoder_architecture": True},
        (("norm", "query_key_value"), ("norm", "dense_h_to_4h"), ("norm", "lm_head")),
        _GELU,
    ),
    Family("StableLM", "StableLmConfig", {**_GROUPED, "use_qkv_bias": True}, _GATED, _ATTENTION),
    Family("Granite", "GraniteConfig", {**_GROUPED, **_MULTIPLIERS}, _GATED, _ATTENTION),
    Family(
        "OLMo 2",
        "Olmo2Config",
        _GROUPED,
        (("gated_mlp", "down_proj"), ("norm", "lm_head"), ("attention_value", "o_proj")),
        {**dict.fromkeys((*_QKV.split(), "gate_proj", "up_proj"), "also read by Add"), **_ATTENTION},
    ),
    Family(
        "Mixtral",
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": _EXPERTS, "num_experts_per_tok": _CHOSEN},
        _experts(f"gate{f' {_GATE_UP}' * _EXPERTS}", _EXPERTS),
        _ATTENTION,
        routers=("mlp.gate",),
    ),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeConfig",
        {**_MIXTURE, "shared_expert_intermediate_size": 128},
        _experts(f"gate{f' {_GATE_UP}' * (_EXPERTS + 1)} shared_expert_gate", _EXPERTS + 1),
        _ATTENTION,
        routers=("mlp.gate",),
    ),
    Family(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        {**_MIXTURE, "head_dim": 16},
        _experts(f"{f'{_GATE_UP} ' * _EXPERTS}gate", _EXPERTS),
        _ATTENTION,
        routers=("mlp.gate",),
    ),
)
"""Language models, with a cache and logits."""

ENCODERS = (
    Family(
        "BERT",
        "BertConfig",
        {},
        (("attention_value", "dense"),) * 2,
        {
            **dict.fromkeys(("query", "key", "value", "intermediate.dense"), "also read by Add"),
            "attention.output.dense": "Reshape",
            "output.dense": "Gelu",
        },
        run="bert_run",
    ),
    Family(
        "ESM-2",
        "EsmConfig",
        {},
        (("norm", "query key value"), ("norm", "dense"), ("attention_value", "dense")),
        {"attention.output.dense": "Reshape", "output.dense": "Mul"},
        outside=("contact_head.regression",),
        run="esm_run",
    ),
)
"""Hidden states and no cache."""

FAMILIES = (*DECODERS, *ENCODERS)

HALVES = (
    Family(
        "T5, encoder",
        "T5Config",
        {},
        (("norm", "q k v"), ("norm", "wi"), ("attention_value", "o"), ("relu_mlp", "wo")),
        {"SelfAttention.o": "Reshape", "wo": "Relu"},
        run="t5_run",
    ),
    Family(
        "T5 1.1, decoder",
        "T5Config",
        {},
        (
            ("norm", "q k v"),
            ("norm", "q"),
            ("norm", "wi_0 wi_1"),
            ("gated_mlp", "wo"),
            ("norm", "lm_head"),
            ("attention_value", "o"),
            ("attention_value", "o"),
        ),
        {
            "Attention.o": "Reshape",
            **dict.fromkeys(("EncDecAttention.k", "EncDecAttention.v"), "graph input 'encoder_hidden_states'"),
        },
        run="t5_run",
    ),
)
"""Of encoder-decoders, one graph each."""

_LEFT_BY_GELU = {"out_proj": "Reshape", "fc2": "Gelu"}
SPEECH_HALVES = (
    Family(
        "Whisper, encoder",
        "WhisperConfig",
        {},
        (("norm", "k_proj v_proj q_proj"), ("norm", "fc1"), ("attention_value", "out_proj")),
        _LEFT_BY_GELU,
        run="whisper_run",
    ),
    Family(
        "Whisper, decoder",
        "WhisperConfig",
        {},
        (
            ("norm", "k_proj v_proj q_proj"),
            ("norm", "q_proj"),
            ("norm", "fc1"),
            ("norm", "proj_out"),
            ("attention_value", "out_proj"),
            ("attention_value", "out_proj"),
        ),
        {
            **_LEFT_BY_GELU,
            **dict.fromkeys(("encoder_attn.k_proj", "encoder_attn.v_proj"), "graph input 'encoder_hidden_states'"),
        },
        run="whisper_run",
    ),
)
"""Of an encoder-decoder that reads mel features."""

LANGUAGE_HALF = Family("LLaVA, language half", "LlavaConfig", {}, _GATED, _ATTENTION, run="llava_run")
"""Of a vision-language model, behind its embeddings."""

ROWS = (*FAMILIES, *HALVES, *SPEECH_HALVES, LANGUAGE_HALF)
"""In the order of the support table."""


def config_of(family: Family) -> PretrainedConfig:
    """The tiny config of a family."""
    import transformers

    config: PretrainedConfig = getattr(transformers, family.config)(**family.settings)
    return config
