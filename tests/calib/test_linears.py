"""The weight of a linear is [out, in], however its module stores it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calib.linears import LinearWeights, linears_from_model, weight_from_linear
from calib.load import Checkpoint, model_from_checkpoint
from fptq_export.errors import UserError


@pytest.mark.parametrize("fixture", ["llama", "gpt2"])
def test_weight_times_input_is_the_linear(fixture: str, request: pytest.FixtureRequest) -> None:
    """With the weight read from the file x W^T + b is what the module computes, for Conv1D and a tied head too."""
    checkpoint: Checkpoint = request.getfixturevalue(fixture)
    weights = LinearWeights.from_checkpoint(checkpoint)
    model: Any = model_from_checkpoint(checkpoint, torch.float32)
    linears = linears_from_model(model)
    assert weights.shapes.keys() == linears.keys()
    for path, linear in linears.items():
        weight = weights.read(path)
        assert tuple(weight.shape) == weights.shapes[path]
        assert weight.is_contiguous()
        assert torch.equal(weight, weight_from_linear(linear)), path
        row = torch.zeros(1, weight.shape[1])
        row[0, 3] = 1.0  # picks one column, so the comparison is exact
        bias = getattr(linear, "bias", None)
        expected = weight[:, 3] if bias is None else weight[:, 3] + bias
        assert torch.equal(linear(row)[0], expected), path


def test_every_linear_is_found_and_nothing_else(gpt2: Checkpoint, llama: Checkpoint) -> None:
    """Conv1D counts, embeddings and norms do not."""
    block = "transformer.h.0"
    conv1d = {f"{block}.attn.c_attn", f"{block}.attn.c_proj", f"{block}.mlp.c_fc", f"{block}.mlp.c_proj"}
    assert LinearWeights.from_checkpoint(gpt2).shapes.keys() == {*conv1d, "lm_head"}
    assert len(LinearWeights.from_checkpoint(llama).shapes) == 2 * 7 + 1


def test_unknown_linear_is_refused(llama: Checkpoint) -> None:
    """A path without a linear is named."""
    with pytest.raises(UserError, match="no such linear") as error:
        LinearWeights.from_checkpoint(llama).read("model.norm")
    assert error.value.where == "layer model.norm"
