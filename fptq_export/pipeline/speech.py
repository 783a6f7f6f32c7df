"""An encoder-decoder of speech on the road: it reads windows of mel features that the user gives, and no text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.options import RunOptions
from fptq_export.pipeline.check_options import replays
from fptq_export.tasks import gives_hidden_states, has_halves, reads_features

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from calib.features import FeatureWindows
    from calib.load import Checkpoint

__all__ = [
    "calibration_windows",
    "check_data",
    "check_data_options",
    "check_processes",
    "data_files",
    "evaluation_option",
    "evaluation_windows",
    "hears",
]

_MEANINGLESS = {
    "calib_dataset": "speech is calibrated on features: use --calib-data",
    "calib_seq": "windows and texts are as long as in --calib-data",
    "eval_text": "speech is compared on features: use --eval-data",
    "eval_seq": "windows and texts are as long as in --eval-data",
}
DataOption = Literal["calib_data", "eval_data"]
_DATA: Mapping[DataOption, str] = {"calib_data": "--calib-data", "eval_data": "--eval-data"}


def hears(config: PreTrainedConfig) -> bool:
    """Whether what is exported of a model is calibrated on features."""
    return has_halves(config) and reads_features(config)


def check_data_options(options: RunOptions, config: PreTrainedConfig) -> None:
    """Refuse data that a model from Hugging Face does not take, and data that is missing.

    Args:
        options: Of the run.
        config: Of the model.

    Raises:
        UserErrors: Names every such option.
    """
    if not hears(config):
        problems = [
            Problem(option, "is for .onnx models and speech; use --calib-dataset and --eval-text")
            for name, option in _DATA.items()
            if getattr(options, name) is not None
        ]
        if problems:
            raise UserErrors(f"options for {options.model}", problems, "leave them out")
        return
    found = [*_speech_problems(options)]
    if found:
        from calib.features import HOW_TO_WRITE

        raise UserErrors(f"options for {options.model}, which reads mel features", found, HOW_TO_WRITE)


def _speech_problems(options: RunOptions) -> Iterator[Problem]:
    for name, cause in _MEANINGLESS.items():
        if getattr(options, name) != RunOptions.model_fields[name].default:
            yield Problem(f"--{name.replace('_', '-')}", cause)
    if options.calib_data is None and not replays(options):
        yield Problem("--calib-data", "is missing: there is no built-in speech. Give a .npz file of features")
    elif options.verify and not any(getattr(options, name) for name in _DATA):
        yield Problem("--eval-data", "is missing, and so is --calib-data: give one of them, or --no-verify")


def check_data(checkpoint: Checkpoint, options: RunOptions) -> None:
    """Read the features of a run, so that what is wrong with them is said before anything long starts.

    Raises:
        UserError: A file is missing or unreadable, or decoding would leave the model's table of positions.
        UserErrors: Arrays that the model does not take.
    """
    if not hears(checkpoint.config):
        return
    if not replays(options):
        calibration_windows(checkpoint, options)
    if options.verify:
        windows = evaluation_windows(checkpoint, options)
        _check_decoding(windows.ids.shape[1], options.decode_steps, checkpoint.config.max_target_positions)


def _check_decoding(tokens: int, steps: int, longest: int) -> None:
    from fptq_export.verify.compare import PROMPT_TOKENS

    prompt = min(tokens, PROMPT_TOKENS)
    if prompt + steps > longest:
        cause = f"behind {prompt} tokens there is room for {longest - prompt} in the model's table of positions"
        raise UserError(f"--decode-steps {steps}", cause, "give fewer, or shorter texts")


def check_processes(config: PreTrainedConfig, processes: int) -> None:
    """Refuse several processes for a model of speech. Raises UserError."""
    if processes > 1 and hears(config):
        where = f"torchrun with {processes} processes"
        raise UserError(where, "models of speech are calibrated in one", "start it without torchrun")


def data_files(options: RunOptions, *names: DataOption) -> tuple[Path, ...]:
    """The files of features that are given by options."""
    paths: tuple[Path | None, ...] = tuple(getattr(options, name) for name in names)
    return tuple(path for path in paths if path is not None and path.is_file())


def evaluation_option(options: RunOptions) -> DataOption:
    """The option whose features a model of speech is compared on: what calibration read, where no other is given."""
    return "calib_data" if options.eval_data is None else "eval_data"


def calibration_windows(checkpoint: Checkpoint, options: RunOptions) -> FeatureWindows:
    """The first `--calib-size` windows of `--calib-data`. Raises as `feature_windows`."""
    from calib.features import feature_windows

    if options.calib_data is None:
        raise RuntimeError("--calib-data is missing")
    return feature_windows(checkpoint, options.calib_data, "--calib-data", options.calib_size)


def evaluation_windows(checkpoint: Checkpoint, options: RunOptions) -> FeatureWindows:
    """The first windows that a half is compared on, `--eval-sentences` of an encoder and `--eval-windows` of a decoder.

    Raises:
        UserError: There is no such file, or an encoder has less than two windows to compare.
        UserErrors: As `feature_windows`.
    """
    from calib.features import feature_windows

    name = evaluation_option(options)
    path: Path | None = getattr(options, name)
    if path is None:
        raise RuntimeError("--eval-data is missing")
    limit = options.eval_sentences if gives_hidden_states(checkpoint.task) else options.eval_windows
    windows = feature_windows(checkpoint, path, _DATA[name], limit)
    seen = ", which calibration has seen" if options.eval_data in (None, options.calib_data) else ""
    return replace(windows, description=f"{windows.description}{seen}")
