"""The halves of an encoder-decoder in torch: its encoder, and its decoder with the head.

Both keep the torch paths of the whole model, so that a policy speaks of `encoder.block.0...` and `decoder.block.0...`
as the checkpoint does. Cutting works on modules of any size: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

from fptq_export.errors import UserError
from fptq_export.tasks import SEQ2SEQ_ENCODER, Half

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["cut_to_decoder", "cut_to_encoder", "encoder_path", "feature_shape", "paths_of_half"]


def encoder_path(model: PreTrainedModel) -> str:
    """Torch path of the encoder.

    Raises:
        UserError: The model has no module that is its encoder.
    """
    encoder = model.get_encoder()
    path = next((path for path, module in model.named_modules() if module is encoder), "")
    if not path:
        raise UserError(type(model).__name__, "has no encoder beside its decoder", "export an encoder-decoder like T5")
    return path


def paths_of_half(paths: Iterable[str], encoder: str, half: Half) -> list[str]:
    """The paths of modules that belong to a half, in their order.

    Args:
        paths: Torch paths of modules of the whole model.
        encoder: Path of the encoder.
        half: Which half; whatever lies outside the encoder is the decoder's.
    """
    return [path for path in paths if f"{path}.".startswith(f"{encoder}.") == (half == SEQ2SEQ_ENCODER)]


def feature_shape(encoder: nn.Module, config: PreTrainedConfig) -> tuple[int, int]:
    """Size of a window of features, (mel bins, frames), which the model's code fixes: one for each of its positions.

    Args:
        encoder: That of a model that `reads_features`; its convolutions have strides, so it has fewer positions.
        config: Of the model.
    """
    from torch.nn import Conv1d

    strides = prod(module.stride[0] for module in encoder.modules() if isinstance(module, Conv1d))
    return config.num_mel_bins, config.max_source_positions * strides


def cut_to_encoder(model: PreTrainedModel) -> nn.Module:
    """Remove everything beside the encoder from a model, in place; the embedding that the encoder uses is its own.

    Returns:
        The encoder, at its path.
    """
    module: nn.Module = model
    for name in encoder_path(model).split("."):
        for other in [child for child, _ in module.named_children() if child != name]:
            delattr(module, other)
        module = module.get_submodule(name)
    return module


def cut_to_decoder(model: PreTrainedModel) -> nn.Module:
    """Take the encoder out of a model, in place: what remains runs on given `encoder_outputs`.

    Returns:
        The encoder, which the model no longer holds.
    """
    parent, _, name = encoder_path(model).rpartition(".")
    holder = model.get_submodule(parent)
    encoder = holder.get_submodule(name)
    delattr(holder, name)
    return encoder
