"""Windows of mel features and the texts in them: what an encoder-decoder of speech is calibrated and compared on."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.batches import TokenBatches
from calib.load import Checkpoint, skeleton_from_checkpoint
from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.halves import feature_shape
from fptq_export.tasks import gives_hidden_states

__all__ = ["HOW_TO_WRITE", "FeatureWindows", "feature_windows"]

_FEATURES, _IDS = "input_features", "decoder_input_ids"
HOW_TO_WRITE = (
    "write it with numpy.savez(FILE, input_features=x, decoder_input_ids=ids): "
    "processor = transformers.AutoProcessor.from_pretrained(MODEL), "
    'x = processor(waves, sampling_rate=16000, return_tensors="np").input_features, ids = model.generate(x)'
)
"""For errors: where the arrays come from."""
_READ_ERRORS = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile)
"""What NumPy raises for a damaged file, and for one that would run code (`allow_pickle`)."""
_SHORTEST = 2
"""Tokens of a text: one that is read, and one that is predicted."""


@dataclass(frozen=True)
class FeatureWindows:
    """Windows of one length."""

    features: NDArray[np.float32]
    """[n, mel bins, frames]."""
    ids: NDArray[np.int64]
    """The text of each window, [n, tokens], as the decoder reads it; for an encoder no tokens, [n, 0]."""
    positions: int
    """Hidden states that the encoder gives of a window."""
    description: str
    """Where they come from, for people."""

    def batches(self) -> TokenBatches:
        """As calibration takes them: rows of tokens, or of the encoder's positions, with their features."""
        count = len(self.features)
        tokens = self.ids if self.ids.shape[1] else np.zeros((count, self.positions), np.int64)
        digest = hashlib.sha256(repr((self.features.shape, self.ids.shape)).encode())
        digest.update(self.features.astype("<f4").tobytes())
        digest.update(self.ids.astype("<i8").tobytes())
        return TokenBatches(tokens, self.description, digest.hexdigest(), self.features)


def feature_windows(checkpoint: Checkpoint, path: Path, option: str, limit: int) -> FeatureWindows:
    """Read the first windows of a file.

    Args:
        checkpoint: A half of a model that `reads_features`.
        path: `.npz` with `input_features`, floats [n, mel bins, frames] as the model's processor gives them, and, for a
            decoder, `decoder_input_ids`, integers [n, tokens] that start with what the model starts a text with.
        option: What gave the path, for errors.
        limit: Most windows.

    Raises:
        UserError: There is no such file, or it cannot be read.
        UserErrors: Arrays that are missing or have another type, size or range than the model takes; all of them.
    """
    config = checkpoint.config
    shape = feature_shape(skeleton_from_checkpoint(checkpoint).get_encoder(), config)
    encoder = gives_hidden_states(checkpoint.task)
    arrays = _arrays(path, option, (_FEATURES,) if encoder else (_FEATURES, _IDS))
    problems = [*_feature_problems(arrays.get(_FEATURES), shape)]
    if not encoder:
        problems += _id_problems(arrays.get(_IDS), config.vocab_size, config.max_target_positions)
        if not problems and len(arrays[_IDS]) != len(arrays[_FEATURES]):
            cause = f"{len(arrays[_IDS])} texts for {len(arrays[_FEATURES])} windows of features"
            problems.append(Problem(_IDS, cause))
    if problems:
        raise UserErrors(f"{option} {path}", problems, HOW_TO_WRITE)
    features = np.ascontiguousarray(arrays[_FEATURES][:limit], np.float32)
    count = len(features)
    ids = np.zeros((count, 0), np.int64) if encoder else np.ascontiguousarray(arrays[_IDS][:limit], np.int64)
    text = "" if encoder else f", a text of {ids.shape[1]} tokens each"
    description = f"{path.name}: {count} windows of {shape[1]} frames{text}"
    return FeatureWindows(features, ids, config.max_source_positions, description)


def _arrays(path: Path, option: str, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Those of the named arrays that a file has."""
    where = f"{option} {path}"
    if path.suffix != ".npz" or not path.is_file():
        raise UserError(where, "no .npz file of this name", HOW_TO_WRITE)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in names if name in stored}
    except _READ_ERRORS as error:
        raise UserError(where, f"not a readable .npz file ({error})", HOW_TO_WRITE) from None


def _feature_problems(features: NDArray[Any] | None, shape: tuple[int, int]) -> Iterator[Problem]:
    wanted = f"floats [windows, {shape[0]} mel bins, {shape[1]} frames]"
    if features is None:
        yield Problem(_FEATURES, f"missing: {wanted}")
    elif features.dtype.kind != "f" or features.ndim != 3 or features.shape[1:] != shape or not len(features):
        found = f"{features.dtype} {list(features.shape)}"
        yield Problem(_FEATURES, f"is {found}, and the model takes {wanted}; a shorter window is padded to it")
    elif not np.isfinite(features).all():
        yield Problem(_FEATURES, "holds NaN or infinite values")


def _id_problems(ids: NDArray[Any] | None, vocab_size: int, longest: int) -> Iterator[Problem]:
    wanted = f"integers [windows, {_SHORTEST} to {longest} tokens]"
    if ids is None:
        yield Problem(_IDS, f"missing: the decoder needs the text of each window, {wanted}")
    elif ids.dtype.kind not in "iu" or ids.ndim != 2 or not _SHORTEST <= ids.shape[1] <= longest:
        yield Problem(_IDS, f"is {ids.dtype} {list(ids.shape)}, and the model takes {wanted}")
    elif ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        cause = f"run from {ids.min()} to {ids.max()}, and the model's vocabulary has {vocab_size}"
        yield Problem(_IDS, f"{cause}; texts are cut or padded to one length with tokens")
