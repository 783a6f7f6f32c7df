"""The language half of a vision-language model in torch: its decoder behind the embeddings, and the head.

What turns images into embeddings is taken out and stays in torch; the caller puts embeddings of tokens and of images
into one sequence. Torch paths stay those of the whole model. That a half can be cut off follows from what transformers'
own modules take, so there is no list of families: all that an image does must come through its embeddings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fptq_export.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["EMBEDDINGS", "check_language_half", "cut_to_language_half", "is_outside", "modules_outside"]

EMBEDDINGS = "embeddings"
"""Tensor [vocab, hidden] of a file beside the graph: row i is the embedding of token i."""
_NEEDED = frozenset({"attention_mask", "inputs_embeds", "past_key_values", "position_ids"})
_BESIDE_NEEDED = frozenset({"input_ids", "use_cache", "labels", "logits_to_keep", "cache_position", "return_dict"})
_TYPES_OF_TOKENS = frozenset({"mm_token_type_ids", "token_type_ids"})
_HINT = "give a model whose images reach the decoder as embeddings alone (LLaVA, SmolVLM, InternVL, ...)"


def check_language_half(model: PreTrainedModel) -> None:
    """Refuse a model whose decoder needs more of an image than its embeddings.

    Args:
        model: The whole vision-language model; may be on the meta device.

    Raises:
        UserError: Says what it needs.
    """
    whole, decoder = _parameters(model.forward), model.get_decoder()
    further = _parameters(decoder.forward) - _NEEDED - _BESIDE_NEEDED
    further = {name for name in further if not name.startswith("output_")}
    cause = None
    if hasattr(model.base_model, "get_rope_index"):
        cause = "places images in several dimensions (M-RoPE), and position_ids of the graph have one"
    elif types := whole & _TYPES_OF_TOKENS:
        cause = f"masks images by the types of tokens ({', '.join(sorted(types))}), which embeddings do not tell"
    elif further:
        cause = f"hands its decoder more than embeddings ({', '.join(sorted(further))})"
    elif missing := _NEEDED - whole:
        cause = f"takes no {' and no '.join(sorted(missing))}"
    elif not all(_kept_paths(model)):
        cause = "has no decoder with a head beside it"
    if cause is not None:
        raise UserError(type(model).__name__, cause, _HINT)


def modules_outside(model: PreTrainedModel) -> tuple[str, ...]:
    """Torch paths of the modules with weights that lie outside the language half, each as near to the root as can be.

    Args:
        model: Passed `check_language_half`.
    """
    return tuple(path for path, module in _outside(model) if next(module.parameters(), None) is not None)


def is_outside(path: str, outside: tuple[str, ...]) -> bool:
    """Whether a module or parameter lies in one of the modules that lie outside."""
    return any(f"{path}.".startswith(f"{module}.") for module in outside)


def cut_to_language_half(model: PreTrainedModel) -> None:
    """Remove what only images need from a model, in place; it still runs on tokens or on embeddings.

    Args:
        model: Passed `check_language_half`.
    """
    for path, _ in list(_outside(model)):
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)


def _outside(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    kept = _kept_paths(model)
    pending: list[tuple[str, Any]] = [("", model)]
    while pending:
        prefix, parent = pending.pop(0)
        for name, module in parent.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if any(keep.startswith(f"{path}.") for keep in kept):
                pending.append((path, module))
            elif path not in kept:
                yield path, module


def _kept_paths(model: PreTrainedModel) -> tuple[str, str]:
    """Paths of the decoder and of the head; empty where there is none."""
    wanted = (model.get_decoder(), model.get_output_embeddings())
    decoder, head = (next((path for path, found in model.named_modules() if found is module), "") for module in wanted)
    return decoder, head


def _parameters(forward: Callable[..., Any]) -> set[str]:
    named = inspect.signature(forward).parameters.values()
    return {parameter.name for parameter in named if parameter.kind is not parameter.VAR_KEYWORD}
