"""Tiny vision-language models, what torch makes of an image, and graphs that read embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tests.support.traced import causal_feed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["IMAGE_TOKEN", "embeds_feed", "seen_by_torch", "tiny_llava", "tiny_smolvlm", "vision_language_model"]

IMAGE_TOKEN = 5
_SIDE, _PATCH = 28, 14
_TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
_VISION: dict[str, Any] = {"image_size": _SIDE, "patch_size": _PATCH, "num_attention_heads": 2}


def tiny_llava() -> PretrainedConfig:
    """A LLaMA of one layer behind a CLIP that has more weights than it; untied head; 4 tokens an image."""
    from transformers import LlavaConfig

    vision = {"model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
    return LlavaConfig(
        text_config=_TEXT,
        vision_config={**_VISION, **vision},
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )


def tiny_smolvlm() -> PretrainedConfig:
    """A LLaMA of one layer behind a SigLIP, its head tied to its embedding; 1 token an image."""
    from transformers import SmolVLMConfig

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return SmolVLMConfig(
        text_config=_TEXT,
        vision_config={**_VISION, **vision},
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        tie_word_embeddings=True,
    )


def vision_language_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model of a checkpoint, as transformers loads it; parameters that share storage are set apart."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    for module in model.to(dtype).modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return model.eval()


def seen_by_torch(model: Any, image_tokens: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the whole model makes of two texts with an image each.

    Args:
        model: Vision-language model in float32.
        image_tokens: How many tokens stand for an image.

    Returns:
        What its decoder reads, float32 [2, S, H], and its logits, float32 [2, S, V].
    """
    random = np.random.default_rng(3)
    ids = random.integers(8, 512, (2, 9))
    ids[:, 2 : 2 + image_tokens] = IMAGE_TOKEN
    pixels = torch.from_numpy(random.standard_normal((2, 3, _SIDE, _SIDE)).astype(np.float32))
    if model.config.model_type == "smolvlm":  # takes several images a text
        pixels = pixels[:, None]
    read: list[torch.Tensor] = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda _module, _args, given: read.append(given["inputs_embeds"]), with_kwargs=True
    )
    with hook, torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(ids), pixel_values=pixels).logits
    (embeds,) = read
    assert not torch.equal(embeds, model.get_input_embeddings()(torch.from_numpy(ids))), "the image is not seen"
    return embeds.numpy(), logits.numpy()


def embeds_feed(
    graph: Path, embeds: NDArray[np.float32], past: dict[str, NDArray[Any]] | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs of a graph that reads embeddings [batch, sequence, H], all visible, behind a past or none."""
    feed = causal_feed(graph, np.zeros(embeds.shape[:2], np.int64), past)
    del feed["input_ids"]
    return {**feed, "inputs_embeds": embeds}
