"""Combinations of options that cannot work, refused before anything long starts."""

from __future__ import annotations

from pathlib import Path

from calib.precision import precision_from_option
from calib.ranks import ALONE, Ranks, share_of_rank
from fptq_export.build.memory_pools import mem_pools_from_option
from fptq_export.build.targets import Target, check_target
from fptq_export.errors import UserError
from fptq_export.options import RunOptions
from fptq_export.pipeline.checkpoint import check_checkpoint_options
from fptq_export.pipeline.onnx_options import check_onnx_options, is_onnx_model
from fptq_export.pipeline.plugin import check_signed_scales, plugin_libraries
from fptq_export.policy import read_policy
from fptq_export.roofline.measured import read_cost_table

__all__ = ["check_options", "quantizes_block_by_block", "replays"]


_PAPER_ALPHA = RunOptions.model_fields["smoothquant_alpha"].default


def replays(options: RunOptions) -> bool:
    """Whether a policy file is replayed, so that nothing is calibrated."""
    return options.policy not in ("paper", "auto")


def check_options(options: RunOptions, target: Target, stages: tuple[str, ...], ranks: Ranks = ALONE) -> None:
    """Refuse what cannot work.

    Args:
        options: Each of them valid on its own.
        target: What the engine is built for.
        stages: The stages of the verb.
        ranks: Processes that calibrate together.

    Raises:
        UserError: Names the option, the cause and the way out.
    """
    if is_onnx_model(options):
        check_onnx_options(options, stages, ranks.size)
    if options.v0 > options.v1:
        raise UserError("--v0", f"is {options.v0:g}, above --v1 {options.v1:g}", "give v0 <= v1")
    if options.smoothquant_alpha != _PAPER_ALPHA and options.equalizer != "smoothquant":
        cause = f"is not used with --equalizer {options.equalizer}"
        raise UserError("--smoothquant-alpha", cause, "add --equalizer smoothquant, or leave it out")
    if options.weight_method in ("awq", "gptq+awq") and options.equalizer not in ("paper", "awq"):
        cause = f"sets --equalizer awq, but --equalizer {options.equalizer} is given"
        raise UserError(f"--weight-method {options.weight_method}", cause, "use clip or gptq with another equalizer")
    if options.max_ppl_increase is not None and not options.verify:
        raise UserError("--max-ppl-increase", "cannot be checked with --no-verify", "leave one of the two out")
    if options.min_cosine is not None and not options.verify:
        raise UserError("--min-cosine", "cannot be checked with --no-verify", "leave one of the two out")
    if options.dtype == "bf16" and options.verify and "verify" in stages:
        cause = "ONNX Runtime cannot run BF16 graphs on a CPU, so the result could not be verified"
        raise UserError("--dtype bf16", cause, "use fp16 or fp32, or add --no-verify")
    _check_precision(options)
    if replays(options):
        _check_replayed_policy(options)
    _check_auto(options)
    _check_sequential(options)
    _check_execution(options, ranks, calibrates="calibrate" in stages and not replays(options))
    if stages == ("interchange",) and options.checkpoint is None:
        raise UserError("--checkpoint", "is missing", "say where the checkpoint goes: --checkpoint out/")
    if "interchange" in stages:
        check_checkpoint_options(options)
    if "build" in stages:
        _check_build(options, target, only_verb=stages == ("build",))


def _check_execution(options: RunOptions, ranks: Ranks, *, calibrates: bool) -> None:
    if ranks.size > 1 and not calibrates:
        where = f"torchrun with {ranks.size} processes"
        raise UserError(where, "this run does not calibrate, and all else is one process", "start it without torchrun")
    if not calibrates:
        return
    share_of_rank(options.calib_size, 1, ranks)
    if options.device != "auto":
        from calib.devices import device_from_option  # torch, which other verbs do without

        device_from_option(options.device, ranks.local_rank, ranks.local_size)


def _check_precision(options: RunOptions) -> None:
    names = {precision_from_option(text)[1] for text in options.precision}
    if names and replays(options):
        cause = "a replayed policy says what each layer runs"
        raise UserError("--precision", cause, f"edit {options.policy}, or leave one of the two out")
    if options.range_calibrator != "absmax" and replays(options):
        raise UserError("--range-calibrator", "a replayed policy has its scales", "leave one of the two out")
    if options.checkpoint is not None and (odd := names - {"w4a8", "float"}):
        cause = f"checkpoints are written with w4a8 and float layers only, not {', '.join(sorted(odd))}"
        raise UserError("--checkpoint", cause, "leave one of the two out")


def _check_replayed_policy(options: RunOptions) -> None:
    path = Path(options.policy)
    if not path.is_file():
        raise UserError(f"--policy {options.policy}", "no such file", "give a policy.json, paper or auto")
    policy = read_policy(path)
    if options.engine is not None:
        check_signed_scales(policy, options)


def _check_auto(options: RunOptions) -> None:
    if options.policy == "auto":
        if options.cost_table is not None:
            read_cost_table(options.cost_table)
        return
    for name in ("effective_bits", "max_dynamic_layers", "cost_table"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                option, f"means nothing with --policy {options.policy}", "add --policy auto, or leave it out"
            )


def quantizes_block_by_block(options: RunOptions) -> bool:
    """Whether weights are quantized with the inputs that quantized blocks give."""
    return options.sequential or options.reconstruct_blocks > 0


def _check_sequential(options: RunOptions) -> None:
    if not quantizes_block_by_block(options):
        return
    option = "--reconstruct-blocks" if options.reconstruct_blocks else "--sequential"
    if replays(options):
        cause = "needs the calibration text, and a replayed policy keeps its codes or quantizes layer by layer"
        raise UserError(option, cause, "leave one of the two out")
    if options.policy == "auto":
        cause = "does not work with --policy auto, which measures weights that are quantized layer by layer"
        raise UserError(option, cause, "leave one of the two out")
    from calib.weights import WEIGHT_METHODS  # torch, which other verbs do without
    from fptq_export.pipeline.calibration import weight_method_of

    if not WEIGHT_METHODS[weight_method_of(options)].needs_hessian and not options.reconstruct_blocks:
        cause = f"changes nothing: {options.weight_method} does not look at inputs"
        raise UserError(option, cause, "use gptq or another method that does, or leave it out")


def _check_build(options: RunOptions, target: Target, *, only_verb: bool) -> None:
    if options.engine is None:
        if only_verb:
            raise UserError("--engine", "is missing", "say where the engine goes: --engine out.plan")
        return
    if options.signed_scales and options.plugin == "off" and not replays(options):
        raise UserError("--signed-scales", "only the plugin runs them", "add --plugin on, or leave it out")
    if options.embed_plugin and options.plugin == "off":
        raise UserError("--embed-plugin", "there is no plugin with --plugin off", "add --plugin on, or leave it out")
    if (options.kv_cache, options.kv_dtype) == ("static", "int8"):
        cause = "TensorRT writes float types only into a static KV cache"
        raise UserError("--kv-dtype int8", cause, "use --kv-cache concat, or leave --engine out")
    plugin_libraries(options, target)
    check_target(target)
    mem_pools_from_option(options.mem_pool_size or "")
    if target is Target.ONNX:
        raise UserError("--engine", "there is no engine with --target onnx", "leave --engine out")
