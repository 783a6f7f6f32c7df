"""A LLaMA-shaped checkpoint of random BF16 weights, of any size: written shard by shard, one tensor in memory."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig

from fptq_export.tensor_writer import TensorSpec, tensor_writer

__all__ = ["LlamaShape", "write_random_llama"]

_INDEX_FILE = "model.safetensors.index.json"
_BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a LLaMA with as many key and value heads as query heads; the defaults are those of LLaMA-7B."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    vocab: int = 32000

    def config(self) -> LlamaConfig:
        """Its config; the head is not tied."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocab,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )

    def shards(self) -> Iterator[dict[str, TensorSpec]]:
        """Name -> type and shape of every tensor: one file for what lies outside the layers, then one for each."""
        table = TensorSpec(_BF16, (self.vocab, self.hidden))
        norm = TensorSpec(_BF16, (self.hidden,))
        yield {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": norm}
        square = TensorSpec(_BF16, (self.hidden, self.hidden))
        wide = TensorSpec(_BF16, (self.intermediate, self.hidden))
        block = {
            **{f"self_attn.{name}_proj": square for name in "qkvo"},
            "mlp.gate_proj": wide,
            "mlp.up_proj": wide,
            "mlp.down_proj": TensorSpec(_BF16, (self.hidden, self.intermediate)),
            "input_layernorm": norm,
            "post_attention_layernorm": norm,
        }
        for layer in range(self.layers):
            yield {f"model.layers.{layer}.{name}.weight": spec for name, spec in block.items()}


def write_random_llama(directory: Path, shape: LlamaShape, seed: int = 0) -> int:
    """Write config, index and shards; no tokenizer.

    Linears are normal with variance 1 / in, so that activations neither vanish nor grow; norm weights spread around 1.

    Returns:
        Bytes of all tensors.
    """
    directory.mkdir(parents=True)
    shape.config().save_pretrained(directory)
    rng = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for index, specs in enumerate(shape.shards()):
        file = f"model-{index:05d}.safetensors"
        with tensor_writer(directory / file, specs) as writer:
            for name, spec in specs.items():
                writer.write(name, _random_tensor(rng, spec))
        weight_map.update(dict.fromkeys(specs, file))
        total += sum(spec.nbytes for spec in specs.values())
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / _INDEX_FILE).write_text(json.dumps(index_json), encoding="utf-8")
    return total


def _random_tensor(rng: np.random.Generator, spec: TensorSpec) -> NDArray[np.generic]:
    # Quantiles are looked up: drawing billions of normal numbers takes longer than the run that is measured.
    quantiles = _normal_quantiles()
    if len(spec.shape) == 1:
        quantiles = np.float32(1.0) + np.float32(0.1) * quantiles
    else:
        quantiles = quantiles * np.float32(1.0 / math.sqrt(spec.shape[1]))
    return quantiles.astype(spec.dtype)[rng.integers(0, quantiles.size, spec.shape, dtype=np.uint16)]


@functools.cache
def _normal_quantiles() -> NDArray[np.float32]:
    """2^16 equally likely values of a normal distribution, float32."""
    probabilities = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    quantiles: NDArray[np.float32] = torch.special.ndtri(probabilities).to(torch.float32).numpy()
    return quantiles
