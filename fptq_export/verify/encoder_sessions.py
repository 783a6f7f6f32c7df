"""Encoders that run: tokens to hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.verify.ort_values import DTYPE_FROM_ORT_TYPE
from fptq_export.verify.sessions import FLOAT_TYPES, ORT_ERRORS, GraphOptimization, first_line, session_from_path

__all__ = ["EncoderSession", "FeatureSession", "OnnxEncoderSession", "OnnxFeatureSession"]

_INPUTS = ("input_ids", "attention_mask")
_SEGMENTS = "token_type_ids"
_FEATURES = "input_features"
_OUTPUT = "last_hidden_state"
_TOKENS_HINT = "check that the tokens come from this model's tokenizer and that texts are not longer than it allows"
_INTEGERS: Mapping[str, np.dtype[Any]] = {"tensor(int64)": np.dtype(np.int64), "tensor(int32)": np.dtype(np.int32)}


class EncoderSession(Protocol):
    """An encoder that can be compared: graph, torch module or engine."""

    @property
    def name(self) -> str:
        """What reports and errors call it."""

    def hidden(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run texts: int64 [B, S] and a mask of 1 and 0 -> hidden states float32 [B, S, H]."""


class FeatureSession(Protocol):
    """An encoder of speech that can be compared."""

    @property
    def name(self) -> str:
        """What reports and errors call it."""

    def hidden(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run windows: float32 [B, mel bins, frames] -> hidden states float32 [B, S, H]."""


class OnnxEncoderSession:
    """ONNX Runtime (CPU) on an encoder.

    Inputs of the graph: `input_ids`, `attention_mask` and, where it has one, `token_type_ids`, which is given zeros:
    every text is one segment. Output: `last_hidden_state` [B, S, H].

    Args:
        path: The ONNX file.
        threads: Threads inside an operator; None lets ONNX Runtime take every core.
        name: What reports call it; the file name by default.
        optimization: Graph optimization level.

    Raises:
        UserError: The file is missing, or is not a graph ONNX Runtime can run.
        UserErrors: Its inputs and outputs are not those above; all that is missing is listed.
    """

    def __init__(
        self, path: Path, *, threads: int | None, name: str | None = None, optimization: GraphOptimization = "all"
    ) -> None:
        self.name = path.name if name is None else name
        self._path = path
        self._session = session_from_path(path, threads, optimization)
        self._dtypes = _input_dtypes(path, self._session)

    def hidden(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run texts: int64 [B, S] and a mask of 1 and 0 -> hidden states float32 [B, S, H].

        Raises:
            UserError: ONNX Runtime cannot run the graph on these tokens.
        """
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask, _SEGMENTS: np.zeros_like(input_ids)}
        feed = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in self._dtypes.items()}
        return _hidden(self._session, self._path, feed, _TOKENS_HINT)


class OnnxFeatureSession:
    """ONNX Runtime (CPU) on an encoder of speech.

    Input of the graph: `input_features` [B, mel bins, frames]. Output: `last_hidden_state` [B, S, H].

    Args:
        path: The ONNX file.
        threads: Threads inside an operator; None lets ONNX Runtime take every core.
        name: What reports call it; the file name by default.

    Raises:
        UserError: The file is missing, or is not a graph ONNX Runtime can run.
        UserErrors: Its inputs and outputs are not those above.
    """

    def __init__(self, path: Path, *, threads: int | None, name: str | None = None) -> None:
        self.name = path.name if name is None else name
        self._path = path
        self._session = session_from_path(path, threads, "all")
        types = {value.name: value.type for value in self._session.get_inputs()}
        problems = [Problem(name, "input that nothing fills") for name in types if name != _FEATURES]
        if types.get(_FEATURES) not in FLOAT_TYPES:
            problems.append(Problem(_FEATURES, f"input is {types.get(_FEATURES)}, not {' or '.join(FLOAT_TYPES)}"))
        if problems:
            raise UserErrors(str(path), problems, "export it as an encoder of speech: fptq-export trace does")
        self._dtype = DTYPE_FROM_ORT_TYPE[types[_FEATURES]]

    def hidden(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run windows: float32 [B, mel bins, frames] -> hidden states float32 [B, S, H].

        Raises:
            UserError: ONNX Runtime cannot run the graph on these windows.
        """
        feed = {_FEATURES: np.ascontiguousarray(features, self._dtype)}
        return _hidden(self._session, self._path, feed, "give features of the size that the graph takes")


def _hidden(session: Any, path: Path, feed: Mapping[str, NDArray[Any]], hint: str) -> NDArray[np.float32]:
    try:
        (hidden,) = session.run([_OUTPUT], feed)
    except ORT_ERRORS as error:
        raise UserError(str(path), f"ONNX Runtime cannot run it ({first_line(error)})", hint) from error
    result: NDArray[np.float32] = hidden.astype(np.float32)
    return result


def _input_dtypes(path: Path, session: Any) -> dict[str, np.dtype[Any]]:
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    known = (*_INPUTS, _SEGMENTS)
    problems = [
        *(Problem(name, "missing input") for name in _INPUTS if name not in inputs),
        *([] if _OUTPUT in outputs else [Problem(_OUTPUT, "missing output")]),
        *(Problem(name, "input that nothing fills") for name in inputs if name not in known),
        *(
            Problem(name, f"input is {found.type}, not {' or '.join(_INTEGERS)}")
            for name, found in inputs.items()
            if name in known and found.type not in _INTEGERS
        ),
    ]
    if problems:
        raise UserErrors(str(path), problems, "export it as an encoder: fptq-export trace --task encoder does")
    return {name: _INTEGERS[found.type] for name, found in inputs.items()}
