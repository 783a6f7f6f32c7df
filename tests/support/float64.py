"""A model in torch with every number in float64, and equalization folded into its parameters by hand.

Nothing of the ONNX pass is used: what `sites.json` says is carried out on torch's parameters, in torch's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from calib.load import checkpoint_from_directory, model_from_checkpoint
from fptq_export.sites import FoldSite, Producer

__all__ = ["fold", "lognormal_scales", "model_in_float64", "output_in_float64"]

_SIGMA = 1.5
"""Of ln s: channels differ by factors of a thousand."""


class _Float64(TorchFunctionMode):
    """Takes float64 wherever the model's code asks for float32, as norms, rotary embeddings, softmax and routers do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def model_in_float64(directory: Path) -> nn.Module:
    """The model of a checkpoint, its experts as linears, of an encoder the body.

    Parameters that share storage are set apart, so that each can be changed alone.
    """
    checkpoint = checkpoint_from_directory(directory, directory.name)
    model: nn.Module = model_from_checkpoint(checkpoint, torch.float64).double()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return model.eval()


def output_in_float64(model: nn.Module, ids: NDArray[np.int64]) -> torch.Tensor:
    """Logits [batch, sequence, vocab], or an encoder's hidden states, without a float32 step anywhere."""
    with torch.inference_mode(), _Float64():
        given: Any = model(input_ids=torch.from_numpy(ids))
    output: torch.Tensor = given["logits" if "logits" in given else "last_hidden_state"]
    assert output.dtype == torch.float64
    return output


def lognormal_scales(sites: Iterable[FoldSite]) -> dict[str, NDArray[np.float32]]:
    """Site id -> random s, equal where heads share values."""
    random = np.random.default_rng(0)
    return {site.id: site.tied(random.lognormal(sigma=_SIGMA, size=site.channels).astype(np.float32)) for site in sites}


def fold(model: nn.Module, site: FoldSite, scale: NDArray[np.float32]) -> None:
    """Divide what produces a tensor and multiply what reads it, in place."""
    s = torch.from_numpy(scale.astype(np.float64))
    rows = torch.from_numpy(site.producer_scale(scale).astype(np.float64))
    with torch.no_grad():
        for producer in site.producers:
            _divide(model, producer, rows)
        for path in site.consumers:
            module = model.get_submodule(path)
            module.get_parameter("weight").mul_(s[:, None] if isinstance(module, Conv1D) else s)


def _divide(model: nn.Module, producer: Producer, s: torch.Tensor) -> None:
    path, _, name = producer.initializer.rpartition(".")
    module = model.get_submodule(path)
    parameter = module.get_parameter(name).detach()
    rows = slice(*(producer.span or (0, len(s))))
    if isinstance(module, nn.Linear) and name == "weight":
        parameter[rows] /= s[:, None]
    else:
        parameter[..., rows] += producer.offset
        parameter[..., rows] /= s
        parameter[..., rows] -= producer.offset
