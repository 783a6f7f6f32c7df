"""Print the perplexity of a model for every way of quantizing its activations, with float and with INT4 weights."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from calib.batches import CalibrationOptions, held_out_windows, token_batches
from calib.checks import check_checkpoint
from calib.decide import PolicyOptions, decide_policy
from calib.equalize import closed_form_scale
from calib.fake_quant import WeightPrecision, applied_policy
from calib.hessians import hessian_writer, owners_from_sites
from calib.load import Checkpoint, model_from_checkpoint, stored_dtype, tokenizer_from_checkpoint
from calib.observe import HessianSink, observe
from calib.policy_arrays import policy_arrays
from calib.precision import DEFAULT_EXCLUDE, excluded_paths
from calib.session import TorchCausalSession
from calib.stats import Stats
from calib.weights import WEIGHT_METHODS
from fptq_export.errors import FptqError
from fptq_export.pipeline.models import models_of_run
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.policy import LayerPolicy, Policy
from fptq_export.progress import ConsoleProgress, Progress
from fptq_export.sites import Sites, read_sites
from fptq_export.verify.perplexity import Perplexity, nll_from_logits

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """One way of quantizing the activations."""

    name: str
    policy: Policy
    arrays: Arrays
    quantize_activations: bool = True


@dataclass(frozen=True)
class Sizes:
    """How much text is used."""

    calib_size: int
    windows: int
    seq: int


def main() -> int:
    """Run the ablation and print the table."""
    options = parse_arguments()
    console = Console(stderr=True)
    try:
        result = ablation(options, ConsoleProgress(console))
    except FptqError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return int(error.exit_code)
    Console().print(table_from_result(result))
    for name, ratio in result["ratios"].items():
        Console().print(f"{name}: {ratio:.3f}", markup=False)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory that `fptq-export trace MODEL -o DIR` made")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows (default: 8)")
    parser.add_argument("--seq", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--calib-dataset", default="builtin", help="as fptq-export takes it (default: builtin)")
    parser.add_argument("--calib-size", type=int, default=32, help="calibration windows (default: 32)")
    parser.add_argument("--group-size", type=int, default=128, help="input channels a weight scale (default: 128)")
    parser.add_argument("--weight-method", choices=tuple(WEIGHT_METHODS), default="rtn")
    parser.add_argument("--signed-scales", action="store_true", help="negative group scales too: plugin only")
    parser.add_argument("--v0", type=float, default=15.0)
    parser.add_argument("--v1", type=float, default=150.0)
    parser.add_argument(
        "--workdir", type=Path, default=Path("work"), help="for Hessians, where the weight method needs them"
    )
    parser.add_argument("--json", type=Path, help="write the table here too")
    return parser.parse_args()


def ablation(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Calibrate, build every row, measure it with both kinds of weights."""
    sizes = Sizes(options.calib_size, options.windows, options.seq)
    if os.environ.get("FPTQ_SAMPLE_QUICK"):
        sizes = Sizes(calib_size=2, windows=1, seq=128)
    run = RunDirectory(options.run)
    checkpoint, sites = models_of_run(run, progress).quantized, read_sites(run.sites)
    check_checkpoint(checkpoint, progress)
    model = model_from_checkpoint(checkpoint, torch.float32)
    stats, hessians = calibrated_stats(checkpoint, sites, options, sizes, progress)
    rule = PolicyOptions(
        options.v0, options.v1, options.group_size, options.weight_method, signed_scales=options.signed_scales
    )
    policy, stream = decide_policy(sites, stats, checkpoint, rule, progress, hessians)
    arrays = stream.read_all()
    plain = with_layers(policy, static_without_equalization)
    plain_arrays = policy_arrays(plain, sites, stats.channel_absmax, checkpoint, progress, hessians).read_all()
    rows = [
        Row("float", plain, plain_arrays, quantize_activations=False),
        Row("float, equalized weights", policy, arrays, quantize_activations=False),
        Row("naive static", plain, plain_arrays),
        Row("FPTQ without LAE", with_layers(policy, without_equalization), plain_arrays),
        Row("FPTQ", policy, arrays),
        Row("per token", with_layers(policy, per_token), plain_arrays),
    ]
    windows = held_out_windows(tokenizer_from_checkpoint(checkpoint), sizes.windows, sizes.seq)
    figures = figures_from_rows(rows, model, sites, windows, progress)
    quantized = policy.quantized().values()
    return {
        "model": checkpoint.name,
        "calibration": stats.description,
        "held_out": f"{sizes.windows} x {sizes.seq} tokens",
        "weight_method": options.weight_method + (", signed scales" if options.signed_scales else ""),
        "group_sizes": sorted({layer.group_size for layer in quantized if layer.group_size is not None}),
        "layers": dict(Counter(str(layer.activation) for layer in quantized)),
        "perplexity": figures,
        "ratios": ratios_from_figures(figures),
    }


def calibrated_stats(
    checkpoint: Checkpoint, sites: Sites, options: argparse.Namespace, sizes: Sizes, progress: Progress
) -> tuple[Stats, Path | None]:
    """Measure the input of every linear but the head; with Hessians where the weight method needs them."""
    paths = [linear.path for linear in sites.linears]
    excluded = excluded_paths(paths, DEFAULT_EXCLUDE)
    linears = [path for path in paths if path not in excluded]
    windows = CalibrationOptions(dataset=options.calib_dataset, size=sizes.calib_size, seq=sizes.seq)
    batches = token_batches(windows, tokenizer_from_checkpoint(checkpoint), checkpoint.config.vocab_size)
    load = partial(model_from_checkpoint, checkpoint, stored_dtype(checkpoint))
    if not WEIGHT_METHODS[options.weight_method].needs_hessian:
        return observe(load, batches, linears, progress), None
    owners = owners_from_sites(sites, linears)
    path = options.workdir / "hessians.safetensors"
    with hessian_writer(path, {owner: sites.linear(owner).in_features for owner in set(owners.values())}) as write:
        return observe(load, batches, linears, progress, hessians=HessianSink(owners, write)), path


def figures_from_rows(
    rows: list[Row], model: PreTrainedModel, sites: Sites, windows: NDArray[np.int64], progress: Progress
) -> dict[str, dict[str, float]]:
    """Row name -> perplexity with float and with INT4 weights."""
    with progress.task("perplexity", 2 * len(rows) * windows.size, unit="tokens") as task:
        return {
            row.name: {
                "float": perplexity(model, row, sites, "float", windows, task.advance),
                "int4": perplexity(model, row, sites, "int4", windows, task.advance),
            }
            for row in rows
        }


def with_layers(policy: Policy, change: Callable[[LayerPolicy], LayerPolicy]) -> Policy:
    """A policy whose quantized layers are changed."""
    layers = {path: change(layer) if layer.precision == "w4a8" else layer for path, layer in policy.layers.items()}
    return policy.model_copy(update={"layers": layers})


def static_without_equalization(layer: LayerPolicy) -> LayerPolicy:
    """One INT8 scale for the tensor as it is."""
    scale = closed_form_scale(layer.input_absmax or 0.0, equalized=False)
    return layer.model_copy(update={"activation": "static", "activation_scale": scale})


def without_equalization(layer: LayerPolicy) -> LayerPolicy:
    """The tier of the rule, but never equalized."""
    return static_without_equalization(layer) if layer.activation == "lae_static" else layer


def per_token(layer: LayerPolicy) -> LayerPolicy:
    """One INT8 scale a token."""
    return layer.model_copy(update={"activation": "per_token", "activation_scale": None})


def perplexity(
    model: PreTrainedModel,
    row: Row,
    sites: Sites,
    weights: WeightPrecision,
    windows: NDArray[np.int64],
    advance: Callable[[float], None],
) -> float:
    """Perplexity of the windows, each on its own."""
    total = Perplexity()
    with applied_policy(
        model, row.policy, row.arrays, sites, weights=weights, quantize_activations=row.quantize_activations
    ):
        session = TorchCausalSession(model, row.name)
        for window in np.split(windows, len(windows)):
            logits, _ = session.prefill(window)
            total.add(*nll_from_logits(logits, window))
            advance(window.size)
    return total.figures().perplexity


def ratios_from_figures(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """The comparisons that say whether the method works."""
    fptq = figures["FPTQ"]
    return {
        "W16A8 FPTQ / FP32": fptq["float"] / figures["float"]["float"],
        "W4A8 FPTQ / the same weights with float activations": fptq["int4"]
        / figures["float, equalized weights"]["int4"],
        "W4A8 FPTQ / W4A16": fptq["int4"] / figures["float"]["int4"],
        "W4A8 naive / W4A8 FPTQ": figures["naive static"]["int4"] / fptq["int4"],
    }


def table_from_result(result: dict[str, Any]) -> Table:
    """The table that people read."""
    layers = ", ".join(f"{count} {tier}" for tier, count in result["layers"].items())
    table = Table(
        title=f"{result['model']}: perplexity of {result['held_out']}",
        caption=f"{result['calibration']}\nINT4 weights: {result['weight_method']}, group sizes "
        f"{result['group_sizes']}\nFPTQ layers: {layers}",
    )
    table.add_column("activations")
    table.add_column("FP32 weights", justify="right")
    table.add_column("INT4 weights", justify="right")
    for name, row in result["perplexity"].items():
        table.add_row(name, f"{row['float']:.2f}", f"{row['int4']:.2f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
