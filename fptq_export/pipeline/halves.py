"""An encoder-decoder is two runs of the road, one a graph, each in a directory of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calib.ranks import ALONE, Ranks
from fptq_export.errors import UserError
from fptq_export.options import RunOptions
from fptq_export.pipeline.check_options import replays
from fptq_export.pipeline.models import RunModels
from fptq_export.pipeline.road import VERBS
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.speech import hears
from fptq_export.pipeline.task_options import check_task_options, options_for_half
from fptq_export.progress import Progress
from fptq_export.tasks import HALF_DIRECTORIES, SEQ2SEQ, Half, has_halves

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["runs_from_options"]

_OF_ONE_GRAPH = ("min_shapes", "opt_shapes", "max_shapes")
_HINT = "name the half that it is for: --task seq2seq-encoder or --task seq2seq-decoder, with an -o of its own"


def runs_from_options(verb: str, options: RunOptions, progress: Progress, ranks: Ranks = ALONE) -> list[RunOptions]:
    """What a command runs, one after the other: the road once, or for both halves of an encoder-decoder.

    The halves of a run in `run/` with the engine `out.plan` go to `run/encoder/` and `run/decoder/`, their engines are
    `out.encoder.plan` and `out.decoder.plan`. Options that mean something for one half only, and patterns that match
    layers of one half only, go to that one.

    Args:
        verb: A key of `VERBS`.
        options: What to do.
        progress: Where a download is reported.
        ranks: Processes that calibrate together.

    Raises:
        UserError: The model cannot be opened, or an option cannot be meant for both halves.
    """
    if "load" not in VERBS[verb] or not _is_encoder_decoder(options, progress):
        return [options]
    if replays(options):
        raise UserError("--policy", "is the policy of one graph, and an encoder-decoder has two", _HINT)
    for name in _OF_ONE_GRAPH:
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(option, "is for the inputs of one graph, and an encoder-decoder has two", _HINT)
    if ranks.size > 1:
        raise UserError("torchrun", "an encoder-decoder is two runs, and a launch does one", _HINT)
    runs = [_run_of_half(options, half, directory, progress) for half, directory in HALF_DIRECTORIES.items()]
    for half, run in reversed(tuple(zip(HALF_DIRECTORIES, runs, strict=True))):  # the decoder takes more options
        check_task_options(run, half)
    if _hears(options, progress):
        RunModels(runs[-1], RunDirectory(runs[-1].output), progress).check_data()  # the decoder reads what both do
    return runs


def _is_encoder_decoder(options: RunOptions, progress: Progress) -> bool:
    if options.task == SEQ2SEQ:
        return True
    if options.task != "auto":
        return False
    config = _config(options, progress)
    return config is not None and has_halves(config)


def _hears(options: RunOptions, progress: Progress) -> bool:
    config = _config(options, progress)
    return config is not None and hears(config)


def _config(options: RunOptions, progress: Progress) -> PreTrainedConfig | None:
    """Config of a Hugging Face model; None for files, which hold no encoder-decoder."""
    if Path(options.model).suffix in (".gguf", ".onnx"):
        return None
    from calib.hub import directory_from_model
    from calib.model_config import read_config

    directory = directory_from_model(options.model, trust_remote_code=options.trust_remote_code, progress=progress)
    return read_config(directory, options.trust_remote_code, quantized=True)


def _run_of_half(options: RunOptions, half: Half, directory: str, progress: Progress) -> RunOptions:
    engine = options.engine
    changes = {
        "task": half,
        "output": options.output / directory,
        "engine": None if engine is None else engine.with_name(f"{engine.stem}.{directory}{engine.suffix}"),
        **_patterns(options, half, progress),
    }
    return options_for_half(options, half).model_copy(update=changes)


def _patterns(options: RunOptions, half: Half, progress: Progress) -> dict[str, tuple[str, ...]]:
    """`--exclude` and `--precision` as far as they concern a half; nothing where they have their defaults."""
    defaults = RunOptions.model_fields
    if (options.exclude, options.precision) == (defaults["exclude"].default, defaults["precision"].default):
        return {}
    from calib.halves import paths_of_task
    from calib.linears import linears_from_model
    from calib.load import checkpoint_from_model, skeleton_from_checkpoint
    from calib.precision import patterns_of_part, precision_from_option

    trust = options.trust_remote_code
    checkpoint = checkpoint_from_model(
        options.model, workdir=options.output, trust_remote_code=trust, progress=progress, task=half
    )
    whole = list(linears_from_model(skeleton_from_checkpoint(checkpoint)))
    part = paths_of_task(checkpoint, whole)
    wanted = {precision_from_option(text)[0]: text for text in options.precision}
    precision = set(patterns_of_part(list(wanted), part, whole))
    return {
        "exclude": tuple(patterns_of_part(options.exclude, part, whole)),
        "precision": tuple(text for text in options.precision if precision_from_option(text)[0] in precision),
    }
