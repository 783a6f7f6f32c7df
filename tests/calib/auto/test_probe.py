"""Sensitivity: the Fisher weights are those of theory where theory is known, and predict the KL that is measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from calib.auto.judge import log_probs_from_windows
from calib.auto.probe import DRAWS, Probe, probe_linears
from calib.linears import weight_from_linear
from calib.load import Checkpoint, model_from_checkpoint
from fptq_export.progress import NoProgress

SANITY_FACTOR = 2.0
"""The rank-one form has no error bound; on a random model its parts are nearly independent: it must be this close."""


class HeadOnly(nn.Module):
    """Embedding and head: the logits are the linear's output, so that its Fisher information is known."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        """Where gradients start."""
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        """Ids to logits, as a causal LM of transformers."""
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


def test_channel_weights_are_those_of_the_softmax() -> None:
    """E[g^2] of a logit is p (1 - p): sums over tokens and draws agree within five standard errors."""
    torch.manual_seed(0)
    model = HeadOnly(8, 16)
    windows = torch.randint(0, 8, (16, 128))
    probe = probe_linears(model, windows, ["head"], NoProgress())["head"]  # type: ignore[arg-type]
    logits = probe.inputs @ model.head.weight.T
    p = logits.softmax(-1).double()
    expected = DRAWS * (p * (1 - p)).sum(0)
    # g^2 is (1-p)^2 with probability p and p^2 otherwise: its variance is p (1-p) (1-2p)^2.
    deviation = (DRAWS * (p * (1 - p) * (1 - 2 * p) ** 2).sum(0)).sqrt()
    assert ((probe.channel_weights - expected).abs() <= 5 * deviation).all()


def test_rows_that_are_left_out_are_stood_for() -> None:
    """A window longer than what is kept gives weights that sum to that of all its tokens, about."""
    torch.manual_seed(0)
    model = HeadOnly(8, 16)
    windows = torch.randint(0, 8, (2, 1024))
    probe = probe_linears(model, windows, ["head"], NoProgress())["head"]  # type: ignore[arg-type]
    assert probe.inputs.shape == (2 * 256, 16)
    p = model(windows, use_cache=False).logits.softmax(-1)
    # |p - y|^2 of a token lies in [0, 2], so its deviation is at most 1; 512 tokens with 4 draws each are averaged.
    deviation = 1 / (512 * DRAWS) ** 0.5
    per_token = float(probe.channel_weights.sum()) / (DRAWS * windows.numel())
    assert abs(per_token - float((p * (1 - p)).sum(-1).mean())) <= 5 * deviation


def test_kl_is_quadratic() -> None:
    """No error, no harm; twice the error, four times the harm, to the bit."""
    generator = torch.Generator().manual_seed(0)
    probe = Probe(torch.empty(5, 2), torch.rand(5, generator=generator), torch.rand(3, generator=generator))
    error = torch.randn(5, 3, generator=generator)
    assert probe.kl_of(torch.zeros(5, 3)) == 0.0
    assert probe.kl_of(2 * error) == 4 * probe.kl_of(error)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_predicted_kl_is_the_measured_one(llama: Checkpoint, name: str) -> None:
    """Random errors in the output of one linear move the prediction as far as the probe says."""
    path = f"model.layers.0.{name}"
    model = model_from_checkpoint(llama, torch.float32)
    windows = torch.randint(0, 100, (2, 64), generator=torch.Generator().manual_seed(1))
    probe = probe_linears(model, windows, [path], NoProgress())[path]
    expected = log_probs_from_windows(model, windows)
    generator = torch.Generator().manual_seed(2)
    exact = probe.inputs @ weight_from_linear(model.get_submodule(path)).T
    errors = 0.03 * exact.std() * torch.randn(exact.shape, generator=generator)
    parts = iter(errors.split(windows.shape[1]))
    with model.get_submodule(path).register_forward_hook(lambda _module, _args, output: output + next(parts)):
        after = log_probs_from_windows(model, windows)
    kl = sum(float((a.exp() * (a - b)).sum(dtype=torch.float64)) for a, b in zip(expected, after, strict=True))
    measured = kl / windows.numel()
    assert measured / SANITY_FACTOR <= probe.kl_of(errors) <= measured * SANITY_FACTOR
