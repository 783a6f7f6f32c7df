"""The C++ part is built once a session, as a user builds it."""

from __future__ import annotations

import pytest

from fptq_export.cpu import InstructionSet, available_instruction_sets
from tests.support.cpu_kernels import built_cpu_kernels


@pytest.fixture(scope="session", autouse=True)
def built_extension() -> None:
    """Build what changed; skip where this machine cannot compile."""
    built_cpu_kernels()


@pytest.fixture(params=list(InstructionSet), ids=lambda item: item.value)
def instruction_set(built_extension: None, request: pytest.FixtureRequest) -> InstructionSet:
    """Each instruction set in turn; skip what this machine does not run."""
    chosen = request.param
    assert isinstance(chosen, InstructionSet)
    if chosen not in available_instruction_sets():
        pytest.skip(f"this machine does not run {chosen.value}")
    return chosen
