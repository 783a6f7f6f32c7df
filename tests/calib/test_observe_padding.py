"""Calibration of encoders: padding changes no statistic."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.batches import TokenBatches
from calib.load import checkpoint_from_directory, model_from_checkpoint
from calib.observe import HessianSink, observe
from calib.padding import PADDING
from fptq_export.errors import UserError
from fptq_export.progress import NoProgress

SUM_ORDER = 64 * 2.0**-24
"""Sums over at most 64 terms in another order, relative to the largest: masked softmax, other matrix shapes."""
LENGTHS = (12, 5, 9)


def _rows() -> NDArray[np.int64]:
    tokens = np.random.default_rng(0).integers(40, 512, (len(LENGTHS), max(LENGTHS)))
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[length:] = PADDING
    return tokens


LINEARS = ("query", "dense")


def _observed(directory: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, torch.Tensor], dict[str, int]]:
    """Channel maxima, second moments times tokens, and values counted in histograms, of the padded rows."""
    checkpoint = checkpoint_from_directory(directory, "encoder")
    model = model_from_checkpoint(checkpoint, torch.float32)
    linears = [path for path, _ in model.named_modules() if path.endswith(LINEARS)]
    hessians: dict[str, torch.Tensor] = {}
    batches = TokenBatches(_rows(), "test", "0")
    sink = HessianSink({path: path for path in linears}, hessians.__setitem__)
    load = partial(model_from_checkpoint, checkpoint, torch.float32)
    stats = observe(load, batches, linears, NoProgress(), 0, sink, histograms=True)
    counted = {path: int(histogram.counts.sum()) for path, histogram in stats.histograms.items()}
    sums = {path: hessian * batches.count for path, hessian in hessians.items()}
    return dict(stats.channel_absmax), sums, counted


def _inputs_of_whole_model(directory: Path) -> dict[str, torch.Tensor]:
    """What each linear reads, [tokens, in], when the model runs as a whole, each row alone and without padding."""
    model = model_from_checkpoint(checkpoint_from_directory(directory, "encoder"), torch.float32)
    record: dict[str, list[torch.Tensor]] = {}
    for path, module in model.named_modules():
        if path.endswith(LINEARS):
            module.register_forward_pre_hook(
                lambda _module, args, path=path: record.setdefault(path, []).append(
                    args[0].reshape(-1, args[0].shape[-1])
                )
            )
    with torch.inference_mode():
        for row, length in zip(_rows(), LENGTHS, strict=True):
            model(input_ids=torch.from_numpy(row[None, :length]))
    return {path: torch.cat(inputs) for path, inputs in record.items()}


@pytest.mark.parametrize("encoder", ["tiny_bert_dir", "tiny_esm_dir"])
def test_padded_rows_measure_what_they_measure_alone(request: pytest.FixtureRequest, encoder: str) -> None:
    """Maxima, second moments and histograms of a padded batch, block by block, are those of its texts."""
    directory: Path = request.getfixturevalue(encoder)
    maxima, sums, counted = _observed(directory)
    inputs = _inputs_of_whole_model(directory)
    assert maxima.keys() == inputs.keys()
    for path, x in inputs.items():
        expected = x.abs().amax(dim=0).numpy()
        np.testing.assert_allclose(maxima[path], expected, rtol=0.0, atol=SUM_ORDER * expected.max(), err_msg=path)
        moments = x.T @ x
        difference = (sums[path] - moments).abs().max()
        assert difference <= sum(LENGTHS) * SUM_ORDER * moments.abs().max(), path
        assert counted[path] == x.numel() == sum(LENGTHS) * len(expected), path


def test_a_linear_that_does_not_read_a_row_a_token_is_refused(tiny_bert_dir: Path) -> None:
    """Where nobody can say which rows are padding, nothing is measured."""
    checkpoint = checkpoint_from_directory(tiny_bert_dir, "bert")

    def load() -> Any:
        model = model_from_checkpoint(checkpoint, torch.float32)
        dense = model.get_submodule("encoder.layer.0.intermediate.dense")
        dense.register_forward_pre_hook(lambda _module, args: (args[0][:, :1],))
        return model

    with pytest.raises(UserError, match="which of them are padding"):
        observe(load, TokenBatches(_rows(), "t", "0"), ["encoder.layer.0.intermediate.dense"], NoProgress())
