"""What tracing runs under: tensors without values, and nothing recorded that the graph does not hold."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._dynamo.config
import torch.fx.config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = ["fake_tracing"]

_COLLECT_AFTER = 50_000
"""Objects that are made before the youngest are looked through for garbage; Python's own number is 700. Nearly all that
tracing makes stays, so that looking costs a fifteenth of its time, and finds too little to lower the peak."""
_LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter", "torch.export")


@contextmanager
def fake_tracing() -> Iterator[None]:
    """Build and export a model without memory for its weights, and without gradients.

    torch remembers the result of every operator on fake tensors. With dynamic dimensions a lookup costs as much
    symbolic arithmetic as the operator, and an entry more: without them a model of two layers is traced in a fifth less
    time, one of ten in the same.
    """
    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    unrecorded, rare = _without_stack_traces(), _rare_collections()
    with uncached, FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad(), unrecorded, rare, _quiet():
        yield


@contextmanager
def _rare_collections() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Of every node torch notes the Python stack, which `strip_trace_metadata` would drop. Older versions always do."""
    before = getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence notes of torch's exporter that name nothing the user could change."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
