"""Print the perplexity of a W4A8 model for every weight method, and of ModelOpt's W4A16 INT4 AWQ beside them."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from calib.batches import CalibrationOptions, TokenBatches, held_out_windows, token_batches
from calib.checks import check_checkpoint
from calib.choose_equalization import EqualizerOptions
from calib.decide import PolicyOptions, decide_policy
from calib.fake_quant import applied_policy
from calib.hessians import HESSIANS_FILE, hessian_writer, owners_from_sites
from calib.load import (
    Checkpoint,
    model_from_checkpoint,
    stored_dtype,
    tokenizer_from_checkpoint,
)
from calib.observe import HessianSink, observe
from calib.precision import DEFAULT_EXCLUDE, excluded_paths
from calib.session import TorchCausalSession
from calib.stats import Stats
from calib.weights import WEIGHT_METHODS
from fptq_export.errors import FptqError
from fptq_export.files import write_text
from fptq_export.pipeline.models import models_of_run
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.policy import Equalizer, Policy, WeightMethod
from fptq_export.progress import ConsoleProgress, Progress
from fptq_export.sites import Sites, read_sites
from fptq_export.verify.perplexity import Perplexity, nll_from_logits

PER_TOKEN = PolicyOptions(v0=0.0, v1=0.0)
"""Thresholds that make every layer per-token: what the activations cost at least."""
Figures = tuple[float | None, float | None, float | None]
"""Of a row: seconds, perplexity with the paper's tiers, perplexity per token."""
Job = Callable[[], Figures]


@dataclass(frozen=True)
class Row:
    """One way of quantizing."""

    name: str
    seconds: float | None
    """Time for the weights, without calibration."""
    paper: float | None
    """Perplexity with the paper's activation tiers."""
    per_token: float | None
    """Perplexity with one INT8 scale a token everywhere."""


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    checkpoint: Checkpoint
    sites: Sites
    stats: Stats
    hessians: Path
    model: PreTrainedModel
    windows: NDArray[np.int64]
    group_size: int
    progress: Progress


def main() -> int:
    """Run every method and print the table."""
    options = parse_arguments()
    console = Console(stderr=True)
    try:
        result = measure(options, ConsoleProgress(console))
    except FptqError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return int(error.exit_code)
    Console().print(table_from_result(result))
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory that `fptq-export trace MODEL -o DIR` made")
    parser.add_argument("--group-size", type=int, default=64, help="input channels a weight scale (default: 64)")
    parser.add_argument("--methods", nargs="+", choices=tuple(WEIGHT_METHODS), default=tuple(WEIGHT_METHODS))
    parser.add_argument("--equalizers", nargs="+", choices=get_args(Equalizer), default=("paper",))
    parser.add_argument("--windows", type=int, default=8, help="held-out windows (default: 8)")
    parser.add_argument("--seq", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--calib-size", type=int, default=64, help="calibration windows (default: 64)")
    parser.add_argument("--workdir", type=Path, default=Path("work"), help="for the Hessians (default: work)")
    parser.add_argument(
        "--json", type=Path, default=Path("weight_methods.json"),
        help="the table; rows that it holds already are not measured again (default: weight_methods.json)",
    )  # fmt: skip
    return parser.parse_args()


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Calibrate once, then quantize and measure with every method."""
    if os.environ.get("FPTQ_SAMPLE_QUICK"):
        options.calib_size, options.windows, options.seq, options.methods = 2, 1, 128, ("rtn",)
    run = RunDirectory(options.run)
    checkpoint, sites = models_of_run(run, progress).quantized, read_sites(run.sites)
    check_checkpoint(checkpoint, progress)
    tokenizer = tokenizer_from_checkpoint(checkpoint)
    sizes = CalibrationOptions(size=options.calib_size, seq=options.seq)
    batches = token_batches(sizes, tokenizer, checkpoint.config.get_text_config().vocab_size)
    stats = calibrate(checkpoint, sites, batches, options.workdir / HESSIANS_FILE, progress)
    setting = Setting(
        checkpoint, sites, stats, options.workdir / HESSIANS_FILE, model_from_checkpoint(checkpoint, torch.float32),
        held_out_windows(tokenizer, options.windows, options.seq), options.group_size, progress,
    )  # fmt: skip
    result = {
        "model": checkpoint.name,
        "calibration": batches.description,
        "held_out": f"{options.windows} x {options.seq} tokens",
        "group_size": options.group_size,
    }
    rows = measured_rows(jobs_from_setting(setting, batches, options), result, options.json)
    return {**result, "rows": [vars(row) for row in rows]}


def jobs_from_setting(setting: Setting, batches: TokenBatches, options: argparse.Namespace) -> dict[str, Job]:
    """Name of each row, in the order of the table, and what measures it."""
    jobs: dict[str, Job] = {"FP32": lambda: (None, perplexity(setting.model, setting.windows), None)}
    if importlib.util.find_spec("modelopt") is not None:
        jobs["ModelOpt INT4 AWQ, W4A16 (with calibration)"] = lambda: modelopt_figures(setting, batches)
    for equalizer in options.equalizers:
        for method in options.methods:
            for signed in (False, True):
                name = f"{method}, {equalizer}" if equalizer != "paper" else method
                jobs[f"{name}, signed scales" if signed else name] = partial(
                    figures_of_method, setting, method, equalizer, signed=signed
                )
    return jobs


def measured_rows(jobs: dict[str, Job], settings: dict[str, Any], file: Path) -> list[Row]:
    """Run every job whose row an interrupted run with the same settings has not left; each row is kept at once."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    same = all(kept.get(name) == value for name, value in settings.items())
    known = {row["name"]: Row(**row) for row in kept["rows"]} if same and kept else {}
    for name, job in jobs.items():
        if name not in known:
            known[name] = Row(name, *job())
            rows = [vars(row) for row in known.values()]
            write_text(json.dumps({**settings, "rows": rows}, indent=2) + "\n", file)
    return [known[name] for name in jobs]


def calibrate(checkpoint: Checkpoint, sites: Sites, batches: TokenBatches, hessians: Path, progress: Progress) -> Stats:
    """Ranges and Hessians of the inputs of every linear but the head."""
    paths = [linear.path for linear in sites.linears]
    excluded = excluded_paths(paths, DEFAULT_EXCLUDE)
    linears = [path for path in paths if path not in excluded]
    owners = owners_from_sites(sites, linears)
    load = partial(model_from_checkpoint, checkpoint, stored_dtype(checkpoint))
    with hessian_writer(hessians, {owner: sites.linear(owner).in_features for owner in set(owners.values())}) as write:
        return observe(load, batches, linears, progress, hessians=HessianSink(owners, write))


def figures_of_method(setting: Setting, name: WeightMethod, equalizer: Equalizer, *, signed: bool) -> Figures:
    """Quantize with one method and measure both kinds of activations."""
    results: list[float] = []
    for rule in (PolicyOptions(), PER_TOKEN):
        options = replace(
            rule, group_size=setting.group_size, weight_method=name, signed_scales=signed,
            equalization=EqualizerOptions(equalizer),
        )  # fmt: skip
        policy, stream = decide_policy(
            setting.sites, setting.stats, setting.checkpoint, options, setting.progress, setting.hessians
        )
        started = time.monotonic()
        arrays = stream.read_all()
        seconds = time.monotonic() - started
        results.append(perplexity_of_policy(setting, policy, arrays))
    paper, per_token = results
    return seconds, paper, per_token


def perplexity_of_policy(setting: Setting, policy: Policy, arrays: dict[str, NDArray[Any]]) -> float:
    """Perplexity of the model with the policy's fake quantization."""
    with applied_policy(setting.model, policy, arrays, setting.sites):
        return perplexity(setting.model, setting.windows)


def perplexity(model: PreTrainedModel, windows: NDArray[np.int64]) -> float:
    """Perplexity of the windows, each on its own."""
    total = Perplexity()
    session = TorchCausalSession(model, "sample")
    for window in np.split(windows, len(windows)):
        logits, _ = session.prefill(window)
        total.add(*nll_from_logits(logits, window))
    return total.figures().perplexity


def modelopt_figures(setting: Setting, batches: TokenBatches) -> Figures:
    """W4A16 by NVIDIA Model Optimizer's INT4 AWQ (`pip install nvidia-modelopt`)."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if entry.get("quantizer_name") == "*weight_quantizer":
            entry["cfg"]["block_sizes"] = {-1: setting.group_size, "type": "static"}
    model = copy.deepcopy(setting.model)
    tokens = torch.from_numpy(batches.tokens)

    def forward_loop(module: Callable[..., Any]) -> None:
        with torch.inference_mode():
            for ids in tokens.split(4):
                module(input_ids=ids, use_cache=False)

    started = time.monotonic()
    mtq.quantize(model, config, forward_loop)
    seconds = time.monotonic() - started
    return seconds, perplexity(model, setting.windows), None


def table_from_result(result: dict[str, Any]) -> Table:
    """The table that people read."""
    table = Table(
        title=f"{result['model']}: perplexity of {result['held_out']}, group size {result['group_size']}",
        caption=result["calibration"],
    )
    table.add_column("weights")
    for column in ("seconds", "paper's tiers", "x FP32", "per token", "x FP32"):
        table.add_column(column, justify="right")
    base = result["rows"][0]["paper"]
    for row in result["rows"]:
        cells = [row["name"], "" if row["seconds"] is None else f"{row['seconds']:.0f}"]
        for value in (row["paper"], row["per_token"]):
            cells += ["", ""] if value is None else [f"{value:.2f}", f"{value / base:.3f}"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
