"""Following the residual stream: what a rotation may change, and every structure for which it would not be exact."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from calib.rotation.labels import Channels
from calib.rotation.roles import ResidualRoles, roles_from_model
from fptq_export.errors import UserError

SIZE = 8
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 512, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def roles(model: nn.Module) -> ResidualRoles:
    return roles_from_model(cast("Any", model.eval()))


def roles_of_config(name: str, **changes: Any) -> ResidualRoles:
    import transformers

    config: PretrainedConfig = getattr(transformers, name)(**{**SIZES, **changes})
    with torch.device("meta"):
        return roles(AutoModelForCausalLM.from_config(config))


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale to length sqrt(n), then channel by channel."""
        length = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x.float() * length).type_as(x)


class Toy(nn.Module):
    """Embedding, one block that a test writes, norm, head."""

    def __init__(self, block: Callable[[Toy, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.table = nn.Embedding(16, SIZE)
        self.positions = nn.Embedding(16, SIZE)
        self.norm, self.other_norm, self.last = Norm(), Norm(), Norm()
        self.up, self.down = nn.Linear(SIZE, 24), nn.Linear(24, SIZE)
        self.square = nn.Linear(SIZE, SIZE)
        self.gain = nn.Parameter(torch.ones(SIZE))
        self.head = nn.Linear(SIZE, 16, bias=False)
        self.block = block
        self.to("meta")

    def get_input_embeddings(self) -> nn.Module:
        """As transformers has it."""
        return self.table

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """A plain MLP."""
        y: torch.Tensor = self.down(F.silu(self.up(x)))
        return y

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Token ids -> logits."""
        return SimpleNamespace(logits=self.head(self.last(self.block(self, self.table(input_ids)))))


PRE_NORM: Callable[[Toy, torch.Tensor], torch.Tensor] = lambda m, x: x + m.mlp(m.norm(x))  # noqa: E731


def test_roles_of_a_plain_block() -> None:
    """Tables and writers are rotated, readers take over the norm before them; nothing else is touched."""
    found = roles(Toy(PRE_NORM))
    assert found.tables == {"table.weight"}
    assert found.writers == {"down.weight", "down.bias"}
    assert dict(found.readers) == {"up.weight": Channels("norm.weight"), "head.weight": Channels("last.weight")}
    assert found.norms() == {"norm.weight": 1.0, "last.weight": 1.0}


@pytest.mark.parametrize(
    "block",
    [
        lambda m, x: x * 3.0 + m.mlp(m.norm(x)) / 2.0,
        lambda m, x: x + (m.mlp(m.norm(x)) + m.square(m.norm(x))),
        lambda m, x: x + m.mlp(m.norm(x)) + m.square(m.other_norm(x)),
        lambda m, x: x + m.positions(torch.zeros(4, dtype=torch.int64, device="meta")) + m.mlp(m.norm(x)),
        lambda m, x: (x.view(-1, SIZE) + m.mlp(m.norm(x.reshape(-1, SIZE)))).view(x.shape),
        lambda m, x: x + torch.sigmoid(m.up(m.norm(x))).sum(-1, keepdim=True) * m.mlp(m.norm(x)),
        lambda m, x: x + m.down(F.silu(m.up(F.rms_norm(x, (SIZE,), m.norm.weight, 1e-6)))),
        lambda m, x: x + m.down(m.up(x / x.square().sum(-1, keepdim=True).sqrt())),
        lambda m, x: (x + m.mlp(m.norm(x)))[:, -1:, :],
    ],
    ids=["scaled", "parallel", "two norms", "positions", "flat", "gated token", "rms_norm", "no weight", "last token"],
)
def test_exact_structures_are_accepted(block: Callable[[Toy, torch.Tensor], torch.Tensor]) -> None:
    """Numbers a token, sums of writers, learned positions and views: a rotation moves through all of them."""
    assert "down.weight" in roles(Toy(block)).writers


@pytest.mark.parametrize(
    ("block", "cause"),
    [
        (lambda m, x: x + m.mlp(F.layer_norm(x, (SIZE,), m.norm.weight)), "subtracts the mean"),
        (lambda m, x: x + m.mlp(x - x.mean(-1, keepdim=True)), "subtracts the mean"),
        (lambda m, x: x + m.norm(m.mlp(x)), "no linear wrote"),
        (lambda m, x: m.norm(x + m.mlp(x)) + m.mlp(x), "add reads what the norm weight"),
        (lambda m, x: x + F.silu(m.mlp(m.norm(x))), "no linear wrote"),
        (lambda m, x: x + m.gain, "no linear wrote"),
        (lambda m, x: x + F.silu(m.up(m.norm(x))).sum(-1, keepdim=True), "no linear wrote"),
        (lambda m, x: x * torch.rand(SIZE, device="meta") + m.mlp(m.norm(x)), "mul reads the residual stream"),
        (lambda m, x: x + m.mlp(F.silu(x)), "silu reads the residual stream"),
        (lambda m, x: x + m.mlp(m.norm(x).clamp(-1, 1)), "clamp reads what the norm weight"),
        (lambda m, x: x + m.mlp(m.norm(m.norm(x))), "reads what the norm weight"),
        (lambda m, x: torch.stack((x, x)).sum(0) + m.mlp(m.norm(x)), "stack reads the residual stream"),
        (lambda m, x: x.flip(-1) + m.mlp(m.norm(x)), "flip reads the residual stream"),
        (lambda m, x: x[..., torch.arange(SIZE, device="meta")] + m.mlp(m.norm(x)), "__getitem__"),
        (lambda m, x: x.view(-1, 4, SIZE // 2).reshape(x.shape) + m.mlp(m.norm(x)), "view reads"),
        (lambda m, x: x.add_(m.mlp(m.norm(x))), "add_ reads the residual stream"),
        (lambda m, x: x + m.mlp(m.norm(x)) @ m.square.weight, "no linear wrote"),
        (lambda m, x: x + m.mlp(x @ m.square.weight), "matmul reads the residual stream"),
        (lambda m, x: x + m.mlp(m.norm(x)) * float(m.up(m.norm(x)).sum()), "cannot be followed"),
    ],
    ids=[
        *("layer_norm", "mean by hand", "post norm", "scaled stream", "activation", "parameter", "broadcast"),
        *("per channel", "silu", "clamp", "two norms in a row", "streams", "flip", "gather", "split", "in place"),
        *("writes by matmul", "reads by matmul", "values"),
    ],
)  # fmt: skip
def test_inexact_structures_are_refused(block: Callable[[Toy, torch.Tensor], torch.Tensor], cause: str) -> None:
    """Each is named with the function that a rotation cannot be moved through."""
    with pytest.raises(UserError) as caught:
        roles(Toy(block))
    assert cause in caught.value.cause
    assert "--rotate" in caught.value.hint


@pytest.mark.parametrize(
    ("block", "name"),
    [
        (lambda m, x: x + m.mlp(m.norm(x)) + m.square(F.silu(m.mlp(m.norm(x)))), "down"),
        (lambda m, x: x + m.square(m.norm(x)) + m.square(F.silu(m.mlp(m.norm(x)))), "square.weight"),
        (lambda m, x: x + m.mlp(m.norm(x)) + m.square(torch.rand(1, 4, SIZE, device="meta") * m.norm.weight), "norm."),
        (lambda m, x: x + m.square(m.norm(x)) + m.square(m.other_norm(x)), "square.weight"),
        (
            lambda m, x: x + m.mlp(m.norm(x)) + F.linear(x, m.table.weight, None)[..., :SIZE].sum() * m.square(x),
            "table",
        ),
    ],
    ids=["written and read", "two inputs", "norm used twice", "after two norms", "table is a linear"],
)
def test_parameter_with_two_roles_is_refused(block: Callable[[Toy, torch.Tensor], torch.Tensor], name: str) -> None:
    """It would have to change and to stay: the parameter is named."""
    with pytest.raises(UserError, match=f"parameter {name}"):
        roles(Toy(block))


def test_model_that_gives_its_stream_is_refused() -> None:
    """Without a head that undoes the rotation, the output itself would be rotated."""
    toy = Toy(PRE_NORM)
    toy.head = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(UserError, match="no linear head"):
        roles(toy)


@pytest.mark.parametrize(
    ("config", "readers", "norms"),
    [
        ("LlamaConfig", 11, {1.0}),
        ("Qwen2Config", 11, {1.0}),
        ("MistralConfig", 11, {1.0}),
        ("Phi3Config", 5, {1.0}),
        ("GraniteConfig", 11, {1.0}),
        ("GemmaConfig", 11, {0.0}),
    ],
)
def test_known_models_are_understood(config: str, readers: int, norms: set[float]) -> None:
    """Pre-norm models with RMSNorm; Gemma's norm weight becomes 0, for it multiplies by 1 + w."""
    found = roles_of_config(config)
    assert (len(found.readers), len(found.norms()), set(found.norms().values())) == (readers, 5, norms)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ("OPTConfig", "subtracts the mean"),
        ("CohereConfig", "subtracts the mean"),
        ("Gemma2Config", "no linear wrote"),
        ("Olmo2Config", "no linear wrote"),
        ("Qwen3MoeConfig", "reads what the norm weight"),
    ],
)
def test_known_models_that_cannot_be_rotated(config: str, cause: str) -> None:
    """LayerNorm, norms after the sublayers, experts that gather tokens: refused by what they do."""
    changes: dict[str, Any] = {"ffn_dim": 128, "word_embed_proj_dim": 64} if config == "OPTConfig" else {}
    with pytest.raises(UserError) as caught:
        roles_of_config(config, **changes, **({"num_experts": 16} if config == "Qwen3MoeConfig" else {}))
    assert cause in caught.value.cause
