"""Open a model: a Hugging Face directory, a hub id or a GGUF file.

Nothing is read before it is needed: a `Checkpoint` holds names and shapes, tensors come by memory map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoTokenizer

from calib.expert_tensors import entries_of_linears, may_hold_experts
from calib.gguf import directory_from_gguf
from calib.hub import directory_from_model
from calib.model_config import MODEL_ERRORS, config_hint, first_line, read_config, task_of_model
from calib.quiet import quiet_transformers
from calib.tensor_files import TensorEntry, tensor_entries_from_directory
from calib.tensor_names import is_outside_body, tensors_of_causal_lm, tensors_of_module
from fptq_export.errors import UserError
from fptq_export.experts.unstack import stacked_experts, unstack_experts
from fptq_export.language_half import check_language_half
from fptq_export.progress import Progress
from fptq_export.tasks import CAUSAL_LM, ENCODER, VLM_DECODER, Task, auto_class, build_options

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from calib.given import GivenWeights

__all__ = [
    "Checkpoint",
    "Disagreement",
    "TensorEntry",
    "checkpoint_from_directory",
    "checkpoint_from_model",
    "disagreement_from_checkpoint",
    "model_from_checkpoint",
    "read_tensor",
    "skeleton_from_checkpoint",
    "stored_dtype",
    "tokenizer_from_checkpoint",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk."""

    directory: Path
    name: str
    """Directory name, hub id or GGUF file name without its suffix."""
    config: PreTrainedConfig
    tensors: Mapping[str, TensorEntry]
    """By torch path of the causal LM, also where the file leaves the base model's prefix out; of an encoder, by torch
    path of its body, and those of the body only. A half of an encoder-decoder or of a vision-language model
    has those of the whole."""
    trust_remote_code: bool = False
    given: GivenWeights | None = None
    """INT4 codes that came with the model; the tensors are then those codes, dequantized."""
    unstacked: bool = False
    """The model has experts, which are linears here; `tensors` name them so, however the files hold them."""
    task: Task = CAUSAL_LM
    """What the model is opened as."""


def checkpoint_from_model(
    model: str, *, workdir: Path, trust_remote_code: bool, progress: Progress, task: Task | None = None
) -> Checkpoint:
    """Open what a user calls a model.

    Args:
        model: Hugging Face directory, `.gguf` file or hub id.
        workdir: Where a GGUF file or a quantized checkpoint is dequantized, once, into `checkpoint/`.
        trust_remote_code: Run Python code that comes with the model.
        progress: Where downloads and conversions are reported.
        task: What to open it as; None takes what its config says.

    Raises:
        UserError: Nothing of that name can be opened; the message says what was tried.
    """
    path = Path(model)
    if path.suffix == ".gguf" and not path.is_dir():
        directory = directory_from_gguf(path, workdir / "checkpoint", progress=progress)
        return checkpoint_from_directory(directory, path.stem, task=task)
    if path.suffix == ".onnx":
        hint = "fptq-export MODEL.onnx --calib-data DATA"
        raise UserError(model, "is an ONNX graph, and this needs a model in torch", hint)
    directory = directory_from_model(model, trust_remote_code=trust_remote_code, progress=progress)
    name = path.resolve().name if path.is_dir() else model
    return _checkpoint_from_float_or_quantized(directory, name, workdir, trust_remote_code, progress, task)


def _checkpoint_from_float_or_quantized(
    directory: Path, name: str, workdir: Path, trust_remote_code: bool, progress: Progress, task: Task | None
) -> Checkpoint:
    # Readers of other formats open checkpoints through this module.
    from calib.given import GIVEN_ARRAYS, GivenWeights
    from calib.interchange import directory_from_quantized, quantization_from_directory

    if quantization_from_directory(directory) is None:
        return checkpoint_from_directory(directory, name, trust_remote_code=trust_remote_code, task=task)
    target, given = directory_from_quantized(
        directory, workdir / "checkpoint", trust_remote_code=trust_remote_code, progress=progress
    )
    checkpoint = checkpoint_from_directory(target, name, trust_remote_code=trust_remote_code, task=task)
    return replace(checkpoint, given=GivenWeights(given, target / GIVEN_ARRAYS))


def checkpoint_from_directory(
    directory: Path,
    name: str,
    *,
    trust_remote_code: bool = False,
    quantized: bool = False,
    task: Task | None = None,
) -> Checkpoint:
    """Open a Hugging Face directory: config and tensor headers.

    Args:
        directory: Holds `config.json` and safetensors files.
        name: What the model is called.
        trust_remote_code: Run Python code that comes with the model.
        quantized: Open a checkpoint with a `quantization_config` too; its tensors are those of its format.
        task: What to open it as; None takes what its config says.

    Raises:
        UserError: The config or a weight file is missing or unreadable, or the model is not one this tool can quantize.
        UserErrors: The shard index is wrong.
    """
    config = read_config(directory, trust_remote_code, quantized)
    found = task_of_model(config, task, directory, trust_remote_code=trust_remote_code)
    if quantized and found != CAUSAL_LM:
        cause = "is a quantized checkpoint, and only those of causal language models are read"
        raise UserError(str(directory), cause, "give the original FP16, BF16 or FP32 model")
    entries = tensor_entries_from_directory(directory)
    checkpoint = Checkpoint(directory, name, config, entries, trust_remote_code, task=found)
    if found != CAUSAL_LM:
        skeleton = skeleton_from_checkpoint(checkpoint)
        if found == VLM_DECODER:
            check_language_half(skeleton)
        return replace(checkpoint, tensors=tensors_of_module(entries, skeleton))
    checkpoint = replace(checkpoint, tensors=tensors_of_causal_lm(entries, config))
    return checkpoint if quantized or not may_hold_experts(checkpoint.tensors) else _with_unstacked_experts(checkpoint)


def _with_unstacked_experts(checkpoint: Checkpoint) -> Checkpoint:
    model = _meta_model(checkpoint)
    experts = stacked_experts(model)
    if not experts:
        return checkpoint
    tensors = entries_of_linears(checkpoint.tensors, model, experts)
    return replace(checkpoint, tensors=tensors, unstacked=True)


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor, memory-mapped (nothing is copied), in its stored dtype.

    Raises:
        UserError: The checkpoint holds no tensor of that name.
    """
    entry = checkpoint.tensors.get(name)
    if entry is None:
        raise UserError(
            f"tensor {name!r}", f"{checkpoint.directory} does not hold it", "check that the checkpoint is complete"
        )
    with safe_open(str(entry.file), framework="pt") as tensors:
        return entry.read_from(tensors)


def tokenizer_from_checkpoint(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint directory.

    Raises:
        UserError: It is missing or cannot be read.
    """
    if not any((checkpoint.directory / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            str(checkpoint.directory),
            "holds no tokenizer",
            "copy tokenizer.json beside config.json, or do without text: --calib-dataset random --no-verify",
        )
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                checkpoint.directory, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
            )
    except MODEL_ERRORS as error:
        raise UserError(
            str(checkpoint.directory), f"the tokenizer cannot be read ({first_line(error)})", "copy its files again"
        ) from error
    return tokenizer


def skeleton_from_checkpoint(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model that the config describes, on the meta device: modules and shapes, no memory; experts are linears.

    Raises:
        UserError: transformers cannot build a model from the config, or its experts are more than linears.
    """
    model = _meta_model(checkpoint)
    unstack_experts(model, static=False)
    model.eval()
    return model


def _meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    with _build_errors_as_user_errors(checkpoint), quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = auto_class(checkpoint.config, checkpoint.task).from_config(
            checkpoint.config,
            trust_remote_code=checkpoint.trust_remote_code,
            **build_options(checkpoint.config, checkpoint.task),
        )
    return model


def model_from_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights, in eval mode; experts are linears, and run on the tokens that chose them.

    Parameters are the memory map itself where `dtype` is the stored one; otherwise they are cast one at a time.
    Attention is torch's scaled dot product where the architecture has it: at least twice as fast as eager on two CPU
    cores (SmolLM2-135M, 512 tokens).

    Args:
        checkpoint: Checked by `checks.check_checkpoint`: tensors that are missing here would be drawn at random.
        dtype: Floating-point type of the parameters.
    """
    with quiet_transformers():
        model = (
            _unstacked_model(checkpoint, dtype) if checkpoint.unstacked else _from_pretrained(checkpoint, dtype=dtype)
        )
    model.eval()
    return model


def _unstacked_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Built and filled here, because transformers would stack the experts, which copies them all."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto_class(checkpoint.config, checkpoint.task).from_config(
            checkpoint.config, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
        )
    unstack_experts(model, static=False)
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    # A checkpoint may hold either of two tied names.
    aliases = {source: target for target, source in tied.items() if source not in checkpoint.tensors}
    wanted = {name: checkpoint.tensors[aliases.get(name, name)] for name in model.state_dict() if name not in tied}
    tensors: dict[str, torch.Tensor] = {}
    for file in {entry.file for entry in wanted.values()}:
        with safe_open(str(file), framework="pt") as stored:
            read = {name: entry.read_from(stored) for name, entry in wanted.items() if entry.file == file}
        tensors |= {name: it.to(dtype) if it.is_floating_point() else it for name, it in read.items()}
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    return model


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point type of the largest tensor: a model loaded in it is a memory map of the checkpoint."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    floats = [entry for entry in checkpoint.tensors.values() if entry.dtype in dtypes]
    return dtypes[max(floats, key=lambda entry: math.prod(entry.shape)).dtype]


@dataclass(frozen=True)
class Disagreement:
    """How the tensors of a checkpoint differ from the model its config describes."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Name, stored shape, shape by the config."""


def disagreement_from_checkpoint(checkpoint: Checkpoint) -> Disagreement:
    """Match tensor names and shapes with the model, on the meta device: no data is read.

    transformers does the matching, so renamed, fused and tied tensors are understood as they are when the model loads.
    Of an encoder only the body counts, and buffers that it computes itself need not be stored.

    Raises:
        UserError: transformers cannot build a model from the config.
    """
    if checkpoint.unstacked:
        return _disagreement_of_linears(checkpoint)
    with _build_errors_as_user_errors(checkpoint), quiet_transformers():
        _, info = _from_pretrained(
            checkpoint, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    mismatched = ((name, tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"])
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if checkpoint.task == ENCODER:
        body = skeleton_from_checkpoint(checkpoint)
        buffers = {name for name, _ in body.named_buffers()}
        missing = {name for name in missing if name not in buffers}
        unexpected = {name for name in unexpected if not is_outside_body(name, body)}
    return Disagreement(tuple(sorted(missing)), tuple(sorted(unexpected)), tuple(sorted(mismatched)))


def _disagreement_of_linears(checkpoint: Checkpoint) -> Disagreement:
    """The same for experts that are linears, whose tensors have the names of the model already."""
    model = skeleton_from_checkpoint(checkpoint)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    pairs = {**tied, **{source: target for target, source in tied.items()}}
    missing = (name for name in wanted if not {name, pairs.get(name, name)} & checkpoint.tensors.keys())
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unexpected = (
        name for name in checkpoint.tensors.keys() - wanted if not any(pattern.search(name) for pattern in ignored)
    )
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items() if name in wanted}
    mismatched = ((name, shape, wanted[name]) for name, shape in shapes.items() if shape != wanted[name])
    return Disagreement(tuple(sorted(missing)), tuple(sorted(unexpected)), tuple(sorted(mismatched)))


def _from_pretrained(checkpoint: Checkpoint, **options: Any) -> Any:
    return auto_class(checkpoint.config, checkpoint.task).from_pretrained(
        checkpoint.directory,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=checkpoint.trust_remote_code,
        **build_options(checkpoint.config, checkpoint.task),
        **options,
    )


@contextmanager
def _build_errors_as_user_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except MODEL_ERRORS as error:
        raise UserError(
            str(checkpoint.directory / "config.json"),
            f"no model can be built from it ({first_line(error)})",
            config_hint(error),
        ) from error
