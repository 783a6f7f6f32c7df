"""Encoders that run: tokens to hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.verify.sessions import ORT_ERRORS, GraphOptimization, first_line, session_from_path

__all__ = ["EncoderSession", "OnnxEncoderSession"]

_INPUTS = ("input_ids", "attention_mask")
_SEGMENTS = "token_type_ids"
_OUTPUT = "last_hidden_state"
_INTEGERS: Mapping[str, np.dtype[Any]] = {"tensor(int64)": np.dtype(np.int64), "tensor(int32)": np.dtype(np.int32)}


class EncoderSession(Protocol):
    """An encoder that can be compared: graph, torch module or engine."""

    @property
    def name(self) -> str:
        """What reports and errors call it."""

    def hidden(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run texts: int64 [B, S] and a mask of 1 and 0 -> hidden states float32 [B, S, H]."""


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
        try:
            (hidden,) = self._session.run([_OUTPUT], feed)
        except ORT_ERRORS as error:
            raise UserError(
                str(self._path),
                f"ONNX Runtime cannot run it ({first_line(error)})",
                "check that the tokens come from this model's tokenizer and that texts are not longer than it allows",
            ) from error
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
