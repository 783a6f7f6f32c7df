"""Tracing changes settings of torch for as long as it takes."""

from __future__ import annotations

import gc
import logging
import warnings

import pytest
import torch
import torch._dynamo.config
import torch.fx.config

from fptq_export.trace.fake_tracing import fake_tracing


def settings() -> tuple[object, ...]:
    """What tracing sets."""
    fake = torch._dynamo.config.fake_tensor_cache_enabled
    loggers = [logging.getLogger(name).level for name in ("torch.onnx", "torch.export")]
    stacks, gradients = torch.fx.config.do_not_emit_stack_traces, torch.is_grad_enabled()
    return fake, stacks, gradients, gc.get_threshold(), *loggers, list(warnings.filters)


def test_tensors_have_no_values_and_no_cache() -> None:
    """A weight of 4 TB takes no memory, and results of operators are not remembered, which costs more than it saves."""
    with fake_tracing():
        weight = torch.empty(1 << 20, 1 << 20)
        mode = torch._subclasses.fake_tensor.FakeTensorMode()
        assert isinstance(weight, torch._subclasses.FakeTensor)
        assert not weight.fake_mode.cache_enabled
        assert not mode.cache_enabled


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_settings_of_torch_are_restored(error: type[Exception] | None) -> None:
    """A model that is built afterwards, in the same process, runs as before; after a failed trace too."""
    before = settings()
    try:
        with fake_tracing():
            assert settings() != before
            if error is not None:
                raise error
    except RuntimeError:
        assert error is not None
    assert settings() == before
