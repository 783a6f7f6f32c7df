"""The C++ part is built once a session, as a user builds it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fptq_export.cpu import InstructionSet, available_instruction_sets
from tests.support.cpu_kernels import built_cpu_kernels
from tests.support.emulated_avx512 import emulated_avx512


@pytest.fixture(scope="session", autouse=True)
def built_extension() -> None:
    """Build what changed; skip where this machine cannot compile."""
    built_cpu_kernels()


@pytest.fixture(params=list(InstructionSet), ids=lambda item: item.value)
def instruction_set(built_extension: None, request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    """Each instruction set in turn; AVX-512 emulated where this machine lacks it. Skip others that it does not run."""
    chosen = request.param
    assert isinstance(chosen, InstructionSet)
    if chosen in available_instruction_sets():
        yield chosen
    elif chosen is InstructionSet.AVX512_VNNI and InstructionSet.AVX2 in available_instruction_sets():
        with emulated_avx512():
            yield chosen
    else:
        pytest.skip(f"this machine does not run {chosen.value}")


@pytest.fixture
def operators_instruction_set(instruction_set: InstructionSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instruction set in turn, in the operators of sessions that the test opens."""
    monkeypatch.setenv("FPTQ_CPU_INSTRUCTION_SET", instruction_set.value)
