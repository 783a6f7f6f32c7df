"""LoRA adapters of tiny models, made by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["lora_adapter"]


def lora_adapter(base: Path, directory: Path, **settings: Any) -> Path:
    """Save an adapter of a checkpoint with random A and B; peft starts with B = 0, which would change nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    # Else peft stores the whole head beside the adapter of a head.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return directory
