"""The tensors of a checkpoint under the names that the modules of the model have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from calib.tensor_files import TensorEntry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["is_outside_body", "tensors_of_causal_lm", "tensors_of_module"]


def tensors_of_causal_lm(entries: Mapping[str, TensorEntry], config: PreTrainedConfig) -> dict[str, TensorEntry]:
    """Name tensors as the causal LM does.

    Checkpoints saved from the bare model leave its prefix out, and transformers stores some heads under an older name
    (GPT-NeoX: `embed_out`).
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return dict(entries)
    model_type: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    prefix = f"{model_type.base_model_prefix}."
    renamings = get_checkpoint_conversion_mapping(model_type.__name__) or []
    if all(isinstance(renaming, WeightRenaming) for renaming in renamings):
        entries = {rename_source_key(name, renamings, [])[0]: entry for name, entry in entries.items()}
    if any(name.startswith(prefix) for name in entries):
        return dict(entries)
    return {prefix + name: entry for name, entry in entries.items()}


def tensors_of_module(entries: Mapping[str, TensorEntry], module: PreTrainedModel) -> dict[str, TensorEntry]:
    """Name tensors as a model does, by transformers' own renamings, and leave out what it does not have.

    Files of models with a head carry a prefix (`bert.`), files of bare models do not; both name some tensors as older
    versions did (`LayerNorm.gamma`). Of the body of an encoder, heads and poolers are left out. Of tied tensors a file
    may hold any; the name that the others are tied to is always there.

    Args:
        entries: By name in the files.
        module: The body of an encoder, or an encoder-decoder; may be on the meta device.
    """
    conversions = get_model_conversion_mapping(module)
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    wanted = module.state_dict()
    found = {}
    for stored, entry in entries.items():
        name, converted = rename_source_key(stored, renamings, converters, module.base_model_prefix, wanted)
        if name in wanted and converted is None:
            found[name] = entry
    tied = module.get_expanded_tied_weights_keys(all_submodels=True)
    return found | {source: found[name] for name, source in tied.items() if name in found and source not in found}


def is_outside_body(name: str, body: PreTrainedModel) -> bool:
    """Whether a stored tensor may be ignored, given its name in the file, with or without the body's prefix.

    It may if it belongs to a head or pooler, or if it is a buffer that the body computes itself: older versions stored
    position ids and rotary frequencies, partly elsewhere. A tensor of the body's own modules that the body does not
    have may not: the config then describes another model.
    """
    path = name.removeprefix(f"{body.base_model_prefix}.").split(".")
    own = {child for child, _ in body.named_children()}
    buffers = {buffer.rpartition(".")[2] for buffer, _ in body.named_buffers()}
    return path[0] not in own or path[-1] in buffers
