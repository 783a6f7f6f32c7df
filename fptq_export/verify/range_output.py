"""The output `range_monitor` of what a session runs, for who listens: how much every call clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from fptq_export.errors import UserError
from fptq_export.range_outputs import COLUMNS, METADATA_KEY, OUTPUT_NAME, RangeOutputs

__all__ = ["RangeListener", "RangeOutput", "range_output_from_ort"]

RangeListener = Callable[[NDArray[np.float32]], None]
"""Takes the output of one call, float32 [rows, 3]; the array is the session's and changes with the next call."""


class RangeOutput:
    """What a session gives of `range_monitor`.

    Args:
        described: What the rows are; None where nothing gives that output, and no listener is ever called.
    """

    def __init__(self, described: RangeOutputs | None) -> None:
        self.described = described
        self._listeners: tuple[RangeListener, ...] = ()

    @property
    def is_wanted(self) -> bool:
        """Whether a call is to fetch the output."""
        return self.described is not None and bool(self._listeners)

    def listen(self, listener: RangeListener) -> None:
        """Call `listener` with the output of each call from now on, in the thread of the call."""
        self._listeners = (*self._listeners, listener)

    def tell(self, rows: NDArray[np.float32]) -> None:
        """A call gave these rows."""
        for listener in self._listeners:
            listener(rows)


def range_output_from_ort(path: Path, session: Any) -> RangeOutput:
    """Of a graph that ONNX Runtime has opened; the graph's metadata say what the rows are.

    Args:
        path: The graph.
        session: `onnxruntime.InferenceSession`.

    Raises:
        UserError: The metadata do not describe the output.
    """
    shape = next((value.shape for value in session.get_outputs() if value.name == OUTPUT_NAME), None)
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if shape is None or text is None:
        return RangeOutput(None)
    try:
        described = RangeOutputs.model_validate_json(text)
    except ValidationError as error:
        raise _misfit(path, f"cannot be read ({error.error_count()} wrong fields)") from None
    if shape != [len(described.rows), len(COLUMNS)]:
        raise _misfit(path, f"describe {len(described.rows)} rows, and the output is {shape}")
    return RangeOutput(described)


def _misfit(path: Path, cause: str) -> UserError:
    hint = "write the graph again: fptq-export rewrite DIR --emit-range-outputs"
    return UserError(f"{path}, metadata {METADATA_KEY!r}", cause, hint)
