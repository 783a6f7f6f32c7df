"""What a model is exported as: a causal language model with a cache, or an encoder that gives hidden states.

Which of the two a checkpoint is follows from its config and from transformers' own mappings; there is no list of
families here. transformers is imported by the functions, not by the module.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["CAUSAL_LM", "ENCODER", "Task", "auto_class", "build_options", "task_from_config"]

Task = Literal["causal-lm", "encoder"]
CAUSAL_LM: Final = "causal-lm"
ENCODER: Final = "encoder"


def task_from_config(
    config: PreTrainedConfig, wanted: Task | None = None, *, trust_remote_code: bool = False
) -> Task | None:
    """What a model is.

    Rules, the first that holds:
        1. A wanted task is taken where transformers, or trusted code of the model, has a class for it. An encoder is
           then the body of any model that is not an encoder-decoder, a decoder's too.
        2. The config names its class and that is the causal one of its type: a causal language model.
        3. The type has a masked language model and is neither a decoder nor an encoder-decoder: an encoder.
        4. The type has a causal language model.

    Returns:
        None where no rule holds.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

    remote = getattr(config, "auto_map", {}) if trust_remote_code else {}
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING or "AutoModelForMaskedLM" in remote
    if wanted == CAUSAL_LM:
        return CAUSAL_LM if causal else None
    if wanted == ENCODER:
        has_body = kind in MODEL_MAPPING or "AutoModel" in remote
        return ENCODER if has_body and not config.is_encoder_decoder else None
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    if causal_class is not None and causal_class.__name__ in (config.architectures or ()):
        return CAUSAL_LM
    if masked and not config.is_encoder_decoder and not getattr(config, "is_decoder", False):
        return ENCODER
    return CAUSAL_LM if causal else None


def auto_class(task: Task) -> Any:
    """The class of transformers that builds and loads models of a task."""
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModel if task == ENCODER else AutoModelForCausalLM


def build_options(config: PreTrainedConfig, task: Task) -> dict[str, Any]:
    """What `auto_class` has to be told: an encoder's hidden states do not depend on its pooler, so it gets none."""
    from transformers import MODEL_MAPPING

    if task != ENCODER or type(config) not in MODEL_MAPPING:
        return {}
    model_class: Any = MODEL_MAPPING[type(config)]
    if isinstance(model_class, tuple):
        return {}
    takes = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
