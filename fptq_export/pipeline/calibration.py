"""Statistics and policy of a run: the way from the pipeline's options to `calib`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from calib.batches import CalibrationOptions, token_batches
from calib.choose_equalization import EqualizerOptions
from calib.decide import PolicyOptions, decide_policy, excluded_paths
from calib.hessians import hessian_writer, owners_from_sites
from calib.load import Checkpoint, model_from_checkpoint, stored_dtype, tokenizer_from_checkpoint
from calib.observe import HessianSink, observe
from calib.replay import replay_policy
from calib.stats import read_stats, write_stats
from calib.weights import WEIGHT_METHODS
from fptq_export.errors import UserError
from fptq_export.options import RunOptions
from fptq_export.policy import Policy, WeightMethod, write_policy
from fptq_export.progress import Progress
from fptq_export.sites import Sites

__all__ = ["calibrate", "decide", "needs_hessians", "replay", "summary_from_policy"]


def calibrate(
    checkpoint: Checkpoint,
    sites: Sites,
    options: RunOptions,
    stats_path: Path,
    hessians_path: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the inputs of every linear that will be quantized; Hessians too where there is a path for them."""
    _equalizer(options).check_given(checkpoint.given)
    wanted = CalibrationOptions(
        dataset=options.calib_dataset,
        size=options.calib_size,
        seq=options.calib_seq,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    needs_no_text = options.calib_dataset == "random" or options.calib_dataset.endswith(".npz")
    tokenizer = None if needs_no_text else tokenizer_from_checkpoint(checkpoint)
    batches = token_batches(wanted, tokenizer, checkpoint.config.get_text_config().vocab_size)
    paths = [linear.path for linear in sites.linears]
    excluded = excluded_paths(paths, options.exclude)
    linears = [path for path in paths if path not in excluded]
    if not linears:
        reasons = "; ".join(dict.fromkeys(linear.reason for linear in sites.unmatched)) or "all are excluded"
        raise UserError(
            checkpoint.name, f"no layer can be quantized ({reasons})", "exclude less, or take another model"
        )
    load = partial(model_from_checkpoint, checkpoint, stored_dtype(checkpoint))
    with _hessian_sink(sites, linears, hessians_path) as sink:
        stats = observe(load, batches, linears, progress, options.batch_size, sink)
    write_stats(stats, stats_path)
    return {"data": batches.description, "tokens": batches.count}


@contextmanager
def _hessian_sink(sites: Sites, linears: Sequence[str], path: Path | None) -> Iterator[HessianSink | None]:
    if path is None:
        yield None
        return
    owners = owners_from_sites(sites, linears)
    in_features = {owner: sites.linear(owner).in_features for owner in dict.fromkeys(owners.values())}
    with hessian_writer(path, in_features) as write:
        yield HessianSink(owners, write)


def needs_hessians(options: RunOptions) -> bool:
    """Whether the weight method or the equalizer of a run needs the Hessians of the inputs."""
    return WEIGHT_METHODS[_weight_method(options)].needs_hessian or _equalizer(options).needs_hessian


def _weight_method(options: RunOptions) -> WeightMethod:
    if options.weight_method == "awq":
        return "clip"
    return "gptq" if options.weight_method == "gptq+awq" else options.weight_method


def _equalizer(options: RunOptions) -> EqualizerOptions:
    alpha = options.smoothquant_alpha
    named = "awq" if options.weight_method in ("awq", "gptq+awq") else options.equalizer
    return EqualizerOptions(named, None if alpha == "auto" else alpha)


def decide(
    checkpoint: Checkpoint,
    sites: Sites,
    options: RunOptions,
    stats_path: Path,
    hessians_path: Path | None,
    policy_path: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Choose what every linear runs, quantize its weight, and write both halves of the policy."""
    rule = PolicyOptions(
        v0=options.v0,
        v1=options.v1,
        group_size=options.group_size,
        weight_method=_weight_method(options),
        signed_scales=options.signed_scales,
        exclude=options.exclude,
        equalization=_equalizer(options),
    )
    policy, arrays = decide_policy(sites, read_stats(stats_path), checkpoint, rule, progress, hessians_path)
    write_policy(policy, arrays, policy_path)
    return summary_from_policy(policy)


def replay(source: Path, checkpoint: Checkpoint, sites: Sites, policy_path: Path, progress: Progress) -> dict[str, Any]:
    """Take an edited policy back in, without calibration."""
    policy, arrays = replay_policy(source, sites, checkpoint, progress)
    write_policy(policy, arrays, policy_path)
    return summary_from_policy(policy)


def summary_from_policy(policy: Policy) -> dict[str, Any]:
    """Layers of each tier, and bits a weight averaged over the quantized weights (group scales included)."""
    quantized = list(policy.quantized().values())
    tiers = {
        tier: sum(layer.activation == tier for layer in quantized) for tier in ("static", "lae_static", "per_token")
    }
    weights = [layer.in_features * layer.out_features for layer in quantized]
    bits = sum((layer.bits_per_weight or 0.0) * count for layer, count in zip(quantized, weights, strict=True))
    return {
        "layers": tiers,
        "equalized_sites": dict(Counter(entry.method for entry in policy.equalizations().values())),
        "float_layers": len(policy.layers) - len(quantized),
        "bits_per_weight": bits / sum(weights) if weights else None,
    }
