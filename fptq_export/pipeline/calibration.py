"""Statistics and policy of a run: the way from the pipeline's options to `calib`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from calib.auto import AutoOptions, Measured, can_plot, decide_auto, plot_report, write_auto_report
from calib.batches import CalibrationOptions, TokenBatches, token_batches
from calib.choose_equalization import EqualizerOptions
from calib.decide import PolicyOptions, decide_policy
from calib.devices import device_from_option
from calib.documents import needs_tokenizer
from calib.graph_weights import GraphWeights
from calib.halves import calibrated_model_from_checkpoint
from calib.hessians import hessian_writer, owners_from_sites
from calib.load import Checkpoint, stored_dtype, tokenizer_from_checkpoint
from calib.observe import Execution, HessianSink, observe
from calib.precision import excluded_paths, float_paths
from calib.ranks import Ranks, share_of_rank
from calib.replay import replay_policy
from calib.sequential import Sequential, check_sequential_given
from calib.state import CalibrationState
from calib.stats import read_stats, write_stats
from calib.weights import WEIGHT_METHODS
from fptq_export.errors import UserError
from fptq_export.options import RunOptions
from fptq_export.pipeline.check_options import quantizes_block_by_block
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.speech import calibration_windows, hears
from fptq_export.pipeline.stages import StageRunner
from fptq_export.pipeline.task_options import check_length
from fptq_export.policy import Policy, WeightMethod, mean_bits, write_policy
from fptq_export.progress import Progress
from fptq_export.sites import Sites
from fptq_export.tasks import gives_hidden_states

__all__ = [
    "Job",
    "calibrate",
    "decide",
    "decide_by_budget",
    "measure",
    "measured_parts",
    "needs_hessians",
    "replay",
    "summary_from_policy",
    "weight_method_of",
]


class Job(BaseModel):
    """What every rank has to know to measure its share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: RunOptions
    key: str
    """Of the stage: what an earlier process finished is used if it worked on the same."""
    linears: tuple[str, ...]
    owners: dict[str, str] | None
    """Linear -> the linear that its Hessian is kept under; None where no Hessians are measured."""
    in_features: dict[str, int]
    """Size of the Hessian of each owner."""
    shape: tuple[int, int]
    """Windows, and tokens in a window."""
    description: str
    sha256: str


def calibrate(
    checkpoint: Checkpoint,
    sites: Sites,
    options: RunOptions,
    hessians_path: Path | None,
    key: str,
    ranks: Ranks,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the inputs of every linear that will be quantized; Hessians too where there is a path for them."""
    _equalizer(options).check_given(checkpoint.given)
    if not hears(checkpoint.config):
        check_length("--calib-seq", options.calib_seq, sites)
    if quantizes_block_by_block(options):
        check_sequential_given(checkpoint.given)
    batches = _batches(checkpoint, options)
    paths = [linear.path for linear in sites.linears]
    stays_float = set(float_paths(paths, options.exclude, options.precision))
    stays_float.update(linear.path for linear in sites.linears if linear.float_reason is not None)
    linears = [path for path in paths if path not in stays_float]
    if not linears:
        reasons = "; ".join(dict.fromkeys(linear.reason for linear in sites.unmatched)) or "all are excluded"
        raise UserError(
            checkpoint.name, f"no layer can be quantized ({reasons})", "exclude less, or take another model"
        )
    owners = None if hessians_path is None else owners_from_sites(sites, linears)
    job = Job(
        options=options,
        key=key,
        linears=tuple(linears),
        owners=owners,
        in_features={owner: sites.linear(owner).in_features for owner in (owners or {}).values()},
        shape=batches.tokens.shape,
        description=batches.description,
        sha256=batches.sha256,
    )
    share_of_rank(len(batches.tokens), 1, ranks)
    ranks.offer(job.model_dump_json())
    ranks.broadcast_(torch.from_numpy(batches.tokens))
    with ranks.together():
        pass  # the others open the model
    device = measure(job, checkpoint, batches, ranks, progress)
    return {"data": batches.description, "tokens": batches.count, "device": device, "processes": ranks.size}


def _batches(checkpoint: Checkpoint, options: RunOptions) -> TokenBatches:
    if hears(checkpoint.config):
        return calibration_windows(checkpoint, options).batches()
    wanted = CalibrationOptions(
        dataset=options.calib_dataset,
        size=options.calib_size,
        seq=options.calib_seq,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    tokenizer = tokenizer_from_checkpoint(checkpoint) if needs_tokenizer(options.calib_dataset) else None
    vocab_size = checkpoint.config.get_text_config().vocab_size
    return token_batches(wanted, tokenizer, vocab_size, encoder=gives_hidden_states(checkpoint.task))


def measure(job: Job, checkpoint: Checkpoint, batches: TokenBatches, ranks: Ranks, progress: Progress) -> str:
    """Measure this rank's share; rank 0 writes what all have measured.

    Returns:
        The device it ran on.

    Raises:
        UserError: Anything the user can mend, on this rank.
        AnotherRankError: Another rank failed.
    """
    directory = RunDirectory(job.options.output)
    device = _device(job.options, ranks)
    state = CalibrationState(directory.calibration_state, job.key, ranks, hessians=job.owners is not None)
    execution = Execution(device, ranks, state, job.options.max_memory)
    load = partial(calibrated_model_from_checkpoint, checkpoint, stored_dtype(checkpoint))
    with _hessian_sink(job, directory.hessians, state) as sink:
        counts = needs_histograms(job.options)
        stats = observe(
            load, batches, job.linears, progress, job.options.batch_size, sink, execution, histograms=counts
        )
        with ranks.together():
            if ranks.rank == 0:
                write_stats(stats, directory.stats)
    state.remove()
    return device.type


def _device(options: RunOptions, ranks: Ranks) -> torch.device:
    """The device of this rank; GPUs for all ranks or for none."""
    with ranks.together():
        device = device_from_option(options.device, ranks.local_rank, ranks.local_size)
    everywhere = torch.tensor([device.type == "cuda"], dtype=torch.int64)
    ranks.min_(everywhere)
    with ranks.together():
        if device.type == "cuda" and not everywhere:
            cause = "some of the processes see a GPU, others see none"
            raise UserError(f"--device {options.device}", cause, "use --device cpu, or machines that all have GPUs")
    if device.type == "cuda":
        ranks.use_gpu(device)
    return device


@contextmanager
def _hessian_sink(job: Job, path: Path, state: CalibrationState) -> Iterator[HessianSink | None]:
    """Where Hessians go: into the file on rank 0, nowhere on others."""
    if job.owners is None:
        yield None
        return
    if state.hessians is None:
        yield HessianSink(job.owners, lambda _path, _hessian: None)
        return
    finished = set(state.stats.channel_absmax) if state.stats is not None else set()
    written = finished & set(job.in_features)
    with hessian_writer(path, job.in_features, draft=state.hessians, written=written) as write:
        yield HessianSink(job.owners, write)


def needs_histograms(options: RunOptions) -> bool:
    """Whether the range calibrator of a run needs histograms of the inputs."""
    return options.range_calibrator != "absmax"


def measured_parts(sites: Sites, options: RunOptions) -> dict[str, Any]:
    """What decides, beside the calibration options themselves, whether statistics can be used again."""
    parts: dict[str, Any] = {"histograms": True} if needs_histograms(options) else {}
    changed = _measured_otherwise(sites, options)
    return {**parts, "measured_otherwise": changed} if changed else parts


def _measured_otherwise(sites: Sites, options: RunOptions) -> list[str]:
    """Linears that are measured because of `--precision` though `--exclude` names them, and the reverse."""
    paths = [linear.path for linear in sites.linears]
    excluded = set(excluded_paths(paths, options.exclude))
    return sorted(excluded.symmetric_difference(float_paths(paths, options.exclude, options.precision)))


def needs_hessians(options: RunOptions) -> bool:
    """Whether the weight method or the equalizer of a run needs the Hessians of the inputs."""
    return WEIGHT_METHODS[weight_method_of(options)].needs_hessian or _equalizer(options).needs_hessian


def hessian_files(options: RunOptions, directory: RunDirectory, runner: StageRunner) -> tuple[Path, ...]:
    """Hessians where they are needed, or there already: another weight method does not calibrate again."""
    wanted = needs_hessians(options) or runner.wrote("calibrate", directory.hessians)
    return (directory.hessians,) if wanted else ()


def weight_method_of(options: RunOptions) -> WeightMethod:
    """The weight method, where the option names an equalizer too."""
    if options.weight_method == "awq":
        return "clip"
    return "gptq" if options.weight_method == "gptq+awq" else options.weight_method


def _equalizer(options: RunOptions) -> EqualizerOptions:
    alpha = options.smoothquant_alpha
    named = "awq" if options.weight_method in ("awq", "gptq+awq") else options.equalizer
    return EqualizerOptions(named, None if alpha == "auto" else alpha)


def decide(
    checkpoint: Checkpoint | GraphWeights,
    sites: Sites,
    options: RunOptions,
    directory: RunDirectory,
    hessians_path: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Choose what every linear runs, quantize its weight, and write both halves of the policy."""
    rule, stats = _policy_options(options), read_stats(directory.stats)
    sequential = None
    if quantizes_block_by_block(options) and not isinstance(checkpoint, GraphWeights):
        sequential = _sequential(checkpoint, options, directory)
    policy, arrays = decide_policy(sites, stats, checkpoint, rule, progress, hessians_path, sequential)
    write_policy(policy, arrays, directory.policy)
    return summary_from_policy(policy)


def _sequential(checkpoint: Checkpoint, options: RunOptions, directory: RunDirectory) -> Sequential:
    return Sequential(
        load=partial(calibrated_model_from_checkpoint, checkpoint, stored_dtype(checkpoint)),
        batches=_batches(checkpoint, options),
        batch_size=options.batch_size,
        device=device_from_option(options.device),
        reconstruction_steps=options.reconstruct_blocks,
        seed=options.seed,
        max_memory=options.max_memory,
        spill=directory.block_state,
    )


def decide_by_budget(
    checkpoint: Checkpoint,
    sites: Sites,
    options: RunOptions,
    directory: RunDirectory,
    hessians_path: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Choose under the budget of `--policy auto`; writes the policy and `auto.json`."""
    limit = options.max_ppl_increase
    auto = AutoOptions(
        effective_bits=options.effective_bits,
        max_kl=None if limit is None else math.log1p(limit),
        max_dynamic_layers=options.max_dynamic_layers,
        cost_table=options.cost_table,
    )
    measured = Measured(sites, read_stats(directory.stats), checkpoint, hessians_path)
    tokens = _batches(checkpoint, options).tokens
    decision = decide_auto(measured, _policy_options(options), auto, tokens, progress)
    write_policy(decision.policy, decision.arrays, directory.policy)
    write_auto_report(decision.report, directory.auto)
    if can_plot():
        plot_report(decision.report, directory.pareto)
    return {**summary_from_policy(decision.policy), "auto": decision.report.model_dump(mode="json", exclude={"pareto"})}


def _policy_options(options: RunOptions) -> PolicyOptions:
    return PolicyOptions(
        v0=options.v0,
        v1=options.v1,
        group_size=options.group_size,
        weight_method=weight_method_of(options),
        signed_scales=options.signed_scales,
        exclude=options.exclude,
        equalization=_equalizer(options),
        precision=options.precision,
        range_calibrator=options.range_calibrator,
        percentile=options.percentile,
    )


def replay(
    source: Path, checkpoint: Checkpoint | GraphWeights, sites: Sites, policy_path: Path, progress: Progress
) -> dict[str, Any]:
    """Take an edited policy back in, without calibration."""
    policy, arrays = replay_policy(source, sites, checkpoint, progress)
    write_policy(policy, arrays, policy_path)
    return summary_from_policy(policy)


def summary_from_policy(policy: Policy) -> dict[str, Any]:
    """Layers of each tier and precision, convolutions of each precision, and bits a weight (scales included).

    `bits_per_weight` is averaged over the quantized weights, `effective_bits` over the weights of all linears.
    """
    quantized = list(policy.quantized().values())
    tiers = {
        tier: sum(layer.activation == tier for layer in quantized) for tier in ("static", "lae_static", "per_token")
    }
    convolutions = Counter(entry.precision for entry in policy.convolutions.values())
    return {
        "layers": tiers,
        **({"convolutions": dict(sorted(convolutions.items()))} if convolutions else {}),
        "equalized_sites": dict(Counter(entry.method for entry in policy.equalizations().values())),
        "float_layers": len(policy.layers) - len(quantized),
        "precisions": dict(sorted(Counter(layer.precision for layer in policy.layers.values()).items())),
        "bits_per_weight": mean_bits(quantized),
        "effective_bits": mean_bits(policy.layers.values()),
    }
