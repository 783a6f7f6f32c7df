"""`--dry-run`: what would be written, how large it gets and how much memory it takes."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from calib.sizes import ModelSizes, sizes_from_model
from fptq_export.build.targets import Target, target_from_option
from fptq_export.errors import UserError
from fptq_export.options import RunOptions
from fptq_export.pipeline.halves import runs_from_options
from fptq_export.pipeline.onnx_options import is_onnx_model
from fptq_export.pipeline.road import VERBS
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.task_options import wanted_task
from fptq_export.progress import NoProgress

__all__ = ["estimated_sizes", "peak_memory_bytes", "print_plans"]

_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_LIBRARIES_BYTES = 1 << 30
"""torch, ONNX Runtime and the logits of one window, measured on SmolLM2-135M and rounded up."""
_MIB = 1 << 20


def print_plans(verb: str, options: RunOptions, console: Console) -> None:
    """Print the stages of a verb with the files each would write, for each run of it; writes nothing itself.

    Raises:
        UserError: The model cannot be opened, or is an ONNX graph.
    """
    if is_onnx_model(options):
        raise UserError("--dry-run", "estimates models from Hugging Face, not ONNX graphs", "leave it out")
    for run in runs_from_options(verb, options, NoProgress()):
        _print_plan(verb, run, console)


def _print_plan(verb: str, options: RunOptions, console: Console) -> None:
    patterns = options.exclude, options.precision
    trust, task = options.trust_remote_code, wanted_task(options)
    sizes = sizes_from_model(options.model, *patterns, NoProgress(), trust_remote_code=trust, task=task)
    target = target_from_option(options.target)
    table = Table(
        "stage", "writes", title=f"{options.model}: {sizes.parameters / 1e6:,.1f} M weights", title_justify="left"
    )
    table.add_column("about", justify="right")
    expected = estimated_sizes(sizes, options)
    for stage in VERBS[verb]:
        if (stage == "rotate" and not options.rotate) or (stage == "merge" and options.adapter is None):
            continue
        if stage == "interchange" and options.checkpoint is None:
            continue
        if stage == "build" and (options.engine is None or target is Target.ONNX):
            continue
        name, size = expected[stage]
        table.add_row(stage, name, f"{size / _MIB:,.0f} MiB" if size else "")
    console.print(table)
    console.print(
        f"{sizes.quantized / 1e6:,.1f} M weights become INT4 (group size {options.group_size} where it divides)"
    )
    if sizes.int8:
        console.print(f"{sizes.int8 / 1e6:,.1f} M weights become INT8")
    console.print(f"peak memory: about {peak_memory_bytes(sizes) / (1 << 30):.1f} GiB; target: {target}")


def estimated_sizes(sizes: ModelSizes, options: RunOptions) -> dict[str, tuple[str, int]]:
    """Stage -> (main file, bytes): float weights in the graph's type, INT4 ones at half a byte plus FP16 scales."""
    directory = RunDirectory(options.output)
    width = _BYTES[options.dtype]
    packed = int(sizes.quantized * (0.5 + 2 / options.group_size)) + sizes.int8
    small = packed + (sizes.parameters - sizes.quantized - sizes.int8) * width
    unpacked = options.checkpoint_format == "int-quantized"
    return {
        "load": ("", 0),
        "merge": (str(directory.merged), sizes.parameters * _BYTES["fp32"]),
        "rotate": (str(directory.rotated), sizes.parameters * _BYTES["fp32"]),
        "trace": (str(directory.model), sizes.parameters * width),
        "calibrate": (str(directory.stats), 0),
        "policy": (str(directory.policy), packed),
        "rewrite": (str(directory.w4a8), small),
        "verify": (str(directory.verify), 0),
        "interchange": (str(options.checkpoint), small + sizes.quantized // 2 if unpacked else small),
        "build": (str(options.engine), small),
        "package": (str(directory.path), 0),
    }


def peak_memory_bytes(sizes: ModelSizes) -> int:
    """The FP32 model of calibration and verification, the unpacked W4A8 model in ONNX Runtime, and the libraries."""
    return 2 * 4 * sizes.parameters + _LIBRARIES_BYTES
