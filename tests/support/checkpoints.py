"""Checkpoints to damage, and the sites of a LLaMA made by hand: independent of trace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calib.load import Checkpoint
from fptq_export.progress import Task
from fptq_export.sites import FoldSite, Linear, Producer, Sites

__all__ = ["CountingProgress", "edit_config", "llama_sites"]


class CountingProgress:
    """Counts what each task has done."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}
        self.totals: dict[str, float | None] = {}

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Task]:
        """Open a task that counts."""
        self.done[description] = 0.0
        self.totals[description] = total
        yield _CountingTask(self, description)


class _CountingTask:
    def __init__(self, progress: CountingProgress, description: str) -> None:
        self._progress = progress
        self._description = description

    def advance(self, amount: float = 1.0) -> None:
        """Add."""
        self._progress.done[self._description] += amount

    def update(self, completed: float, total: float | None = None) -> None:
        """Set."""
        self._progress.done[self._description] = completed


def edit_config(directory: Path, **changes: Any) -> None:
    """Change entries of `config.json`."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def llama_sites(checkpoint: Checkpoint) -> Sites:
    """What trace finds in a LLaMA: norm sites for q/k/v, gate/up and the head, `up` for down, none for o."""
    linears: list[Linear] = []
    fold_sites: list[FoldSite] = []
    for index in range(checkpoint.config.num_hidden_layers):
        layer = f"model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        _add_norm_site(
            checkpoint, f"{layer}.input_layernorm", [f"{attention}.{n}_proj" for n in "qkv"], linears, fold_sites
        )
        linears.append(_linear(checkpoint, f"{attention}.o_proj", None))
        names = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        _add_norm_site(checkpoint, f"{layer}.post_attention_layernorm", names, linears, fold_sites)
        down = _linear(checkpoint, f"{mlp}.down_proj", f"{mlp}.up_proj")
        linears.append(down)
        fold_sites.append(
            FoldSite(
                id=f"{mlp}.up_proj",
                kind="gated_mlp",
                channels=down.in_features,
                producers=(Producer(initializer=f"{mlp}.up_proj.weight", axis=1),),
                producer_linear=f"{mlp}.up_proj",
                consumers=(down.path,),
            )
        )
    _add_norm_site(checkpoint, "model.norm", ["lm_head"], linears, fold_sites)
    return Sites(linears=tuple(linears), fold_sites=tuple(fold_sites))


def _add_norm_site(
    checkpoint: Checkpoint, norm: str, consumers: Sequence[str], linears: list[Linear], fold_sites: list[FoldSite]
) -> None:
    linears.extend(_linear(checkpoint, path, norm) for path in consumers)
    fold_sites.append(
        FoldSite(
            id=norm,
            kind="norm",
            channels=checkpoint.config.hidden_size,
            producers=(Producer(initializer=f"{norm}.weight", axis=0),),
            consumers=tuple(consumers),
        )
    )


def _linear(checkpoint: Checkpoint, path: str, site: str | None) -> Linear:
    out_features, in_features = checkpoint.tensors[f"{path}.weight"].shape
    return Linear(
        path=path,
        node=f"{path}/MatMul",
        weight=f"{path}.weight",
        weight_transposed=False,
        bias=None,
        in_features=in_features,
        out_features=out_features,
        input=site or path,
        site=site,
        no_site_reason=None if site else "the input comes from a reshape",
    )
