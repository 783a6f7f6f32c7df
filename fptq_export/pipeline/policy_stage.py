"""The stage that writes the policy: by the paper's rule, under a budget, or from an edited file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptq_export.options import RunOptions
from fptq_export.pipeline.check_options import quantizes_block_by_block, replays
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.stages import Stage
from fptq_export.policy import arrays_path
from fptq_export.progress import Progress
from fptq_export.sites import Sites

if TYPE_CHECKING:
    from calib.graph_weights import GraphWeights
    from calib.load import Checkpoint

__all__ = ["PolicyInputs", "policy_stage"]

_RULE_OPTIONS = (
    *("v0", "v1", "equalizer", "smoothquant_alpha", "group_size", "weight_method", "signed_scales"),
    *("exclude", "precision", "range_calibrator", "percentile"),
)
_TEXT_OPTIONS = ("calib_dataset", "calib_size", "calib_seq", "seed")
_AUTO_OPTIONS = (*_RULE_OPTIONS, "effective_bits", "max_ppl_increase", "max_dynamic_layers", *_TEXT_OPTIONS)
_SEQUENTIAL_OPTIONS = ("sequential", "reconstruct_blocks", "batch_size", *_TEXT_OPTIONS)


@dataclass(frozen=True)
class PolicyInputs:
    """What the stage reads beside the files of the run directory."""

    weights: tuple[Path, ...]
    tokenizer: tuple[Path, ...]
    hessians: tuple[Path, ...]
    """The Hessians, where there are any."""
    checkpoint: Callable[[], Checkpoint | GraphWeights]
    """What holds the float weights."""
    sites: Callable[[], Sites]


def policy_stage(options: RunOptions, directory: RunDirectory, inputs: PolicyInputs, progress: Progress) -> Stage:
    """Say what the policy of a run depends on and how it is made."""
    outputs = (directory.policy, arrays_path(directory.policy))
    measured = (directory.stats, *inputs.hessians, directory.sites, *inputs.weights)
    edited = (directory.policy, "--policy")
    if replays(options):
        source = Path(options.policy)
        beside = source.with_name(directory.hessians.name)
        files = (source, arrays_path(source), *([beside] if beside.is_file() else []), directory.sites, *inputs.weights)
        return Stage("policy", {}, files, outputs, lambda: _replay(source, directory, inputs, progress))
    if options.policy == "auto":
        text = Path(options.calib_dataset)
        optional = [path for path in (text, options.cost_table) if path is not None and path.is_file()]
        return Stage(
            "policy",
            {"rule": "auto", **_parts(options, _AUTO_OPTIONS)},
            (*measured, *inputs.tokenizer, *optional),
            (*outputs, directory.auto, *([directory.pareto] if _can_plot() else [])),
            lambda: _decide_by_budget(options, directory, inputs, progress),
            edited,
        )
    parts = _parts(options, _RULE_OPTIONS)
    if quantizes_block_by_block(options):
        parts |= _parts(options, _SEQUENTIAL_OPTIONS)
        text = Path(options.calib_dataset)
        measured = (*measured, *inputs.tokenizer, *([text] if text.is_file() else []))
    return Stage("policy", parts, measured, outputs, lambda: _decide(options, directory, inputs, progress), edited)


def _can_plot() -> bool:
    from calib.auto import can_plot

    return can_plot()


def _parts(options: RunOptions, names: tuple[str, ...]) -> dict[str, Any]:
    return options.model_dump(mode="json", include=set(names))


def _replay(source: Path, directory: RunDirectory, inputs: PolicyInputs, progress: Progress) -> Mapping[str, Any]:
    from fptq_export.pipeline.calibration import replay

    return replay(source, inputs.checkpoint(), inputs.sites(), directory.policy, progress)


def _decide(
    options: RunOptions, directory: RunDirectory, inputs: PolicyInputs, progress: Progress
) -> Mapping[str, Any]:
    from fptq_export.pipeline.calibration import decide

    hessians = next(iter(inputs.hessians), None)
    return decide(inputs.checkpoint(), inputs.sites(), options, directory, hessians, progress)


def _decide_by_budget(
    options: RunOptions, directory: RunDirectory, inputs: PolicyInputs, progress: Progress
) -> Mapping[str, Any]:
    from calib.load import Checkpoint
    from fptq_export.pipeline.calibration import decide_by_budget

    hessians, checkpoint = next(iter(inputs.hessians), None), inputs.checkpoint()
    if not isinstance(checkpoint, Checkpoint):
        raise RuntimeError("--policy auto runs the torch model, and a graph has none")
    return decide_by_budget(checkpoint, inputs.sites(), options, directory, hessians, progress)
