"""Tiny mixtures of experts, and what transformers' own code says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fptq_export.sites import FoldSite, Linear, Producer, SiteKind, Sites

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from calib.load import Checkpoint

__all__ = [
    "EXPERTS",
    "LAYERS",
    "Routed",
    "mixtral_sites",
    "routed_inputs",
    "stacked_model",
    "tiny_mixtral",
    "tiny_qwen3_moe",
]

EXPERTS, LAYERS = 4, 2
_SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "intermediate_size": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tiny_mixtral() -> PretrainedConfig:
    """Two of four experts a token, with weights that sum to 1; files hold `w1`, `w3` and `w2` of each expert."""
    from transformers import MixtralConfig

    return MixtralConfig(**_SIZES, num_hidden_layers=LAYERS, num_local_experts=EXPERTS, num_experts_per_tok=2)


def tiny_qwen3_moe() -> PretrainedConfig:
    """One layer of four experts, QK norm; two experts a token, whose weights do not sum to 1."""
    from transformers import Qwen3MoeConfig

    routing = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": False}
    return Qwen3MoeConfig(**{**_SIZES, **routing, "num_hidden_layers": 1, "head_dim": 16})


def stacked_model(directory: Path, dtype: torch.dtype) -> Any:
    """The model as transformers loads and runs it, one expert after the other."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()


@dataclass
class Routed:
    """What the experts of one layer are called with."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    chosen: list[torch.Tensor] = field(default_factory=list)

    def of_expert(self, expert: int) -> NDArray[np.float32]:
        """Tokens that chose an expert, [tokens, hidden]."""
        x, index = torch.cat(self.inputs), torch.cat(self.chosen)
        result: NDArray[np.float32] = x[(index == expert).any(dim=1)].numpy()
        return result


def routed_inputs(model: Any, tokens: torch.Tensor) -> list[Routed]:
    """Run transformers' model and record each layer's experts."""
    layers: list[Routed] = []
    for block in model.model.layers:
        routed = Routed()
        layers.append(routed)

        def record(_: nn.Module, args: tuple[torch.Tensor, ...], routed: Routed = routed) -> None:
            routed.inputs.append(args[0])
            routed.chosen.append(args[1])

        block.mlp.experts.register_forward_pre_hook(record)
    with torch.inference_mode():
        model(input_ids=tokens)
    return layers


def mixtral_sites(checkpoint: Checkpoint) -> Sites:
    """What trace finds in the MoE blocks of a Mixtral, and nothing of its attention."""
    linears: list[Linear] = []
    fold_sites: list[FoldSite] = []
    for layer in range(LAYERS):
        block, norm = f"model.layers.{layer}.mlp", f"model.layers.{layer}.post_attention_layernorm"
        router = _linear(checkpoint, f"{block}.gate", norm, float_reason=f"it scores the experts of {block}.experts")
        readers = [router]
        for expert in range(EXPERTS):
            path = f"{block}.experts.{expert}"
            readers += [_linear(checkpoint, f"{path}.{name}", norm, expert=path) for name in ("gate_proj", "up_proj")]
            down = _linear(checkpoint, f"{path}.down_proj", f"{path}.up_proj", expert=path)
            linears.append(down)
            weight = Producer(initializer=f"{path}.up_proj.weight", axis=1)
            fold_sites.append(_site("gated_mlp", [weight], [down], producer_linear=f"{path}.up_proj"))
        linears += readers
        fold_sites.append(_site("norm", [Producer(initializer=f"{norm}.weight", axis=0)], readers))
    return Sites(linears=tuple(linears), fold_sites=tuple(fold_sites))


def _linear(checkpoint: Checkpoint, path: str, site: str, **more: str) -> Linear:
    out_features, in_features = checkpoint.tensors[f"{path}.weight"].shape
    return Linear(
        path=path,
        node=f"{path}/MatMul",
        weight=f"{path}.weight",
        weight_transposed=False,
        bias=None,
        in_features=in_features,
        out_features=out_features,
        input=f"input of {site}",
        site=site,
        no_site_reason=None,
        **more,
    )


def _site(
    kind: SiteKind, producers: list[Producer], consumers: list[Linear], producer_linear: str | None = None
) -> FoldSite:
    return FoldSite(
        id=str(consumers[0].site),
        kind=kind,
        channels=consumers[0].in_features,
        producers=tuple(producers),
        producer_linear=producer_linear,
        consumers=tuple(linear.path for linear in consumers),
    )
