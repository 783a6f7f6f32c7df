"""What is asked of the machine code of a kernel; each answer is a list of problems, one sentence each."""

from __future__ import annotations

from dataclasses import dataclass

from tests.plugins.gates.budgets import budget
from tests.plugins.gates.kernels import GemmKernel, GemvKernel
from tests.plugins.gates.sass import Function, Resources, main_loop, mnemonic_counts, returning_calls

__all__ = ["Code", "gemm_problems", "gemv_problems", "memory_problems", "others_per_imma"]

_CONVERSIONS = frozenset({"I2F", "I2FP"})
_LOCAL_MEMORY = frozenset({"LDL", "STL"})


@dataclass(frozen=True)
class Code:
    """A kernel as it was compiled."""

    function: Function
    resources: Resources


def others_per_imma(function: Function) -> float:
    """Instructions of the main loop that are neither IMMA nor NOP, for each IMMA."""
    counts = mnemonic_counts(main_loop(function))
    return (counts.total() - counts["IMMA"] - counts["NOP"]) / counts["IMMA"]


def memory_problems(code: Code, max_registers: int) -> list[str]:
    """More registers than planned, a stack, or local memory."""
    found = []
    counts = mnemonic_counts(code.function.instructions)
    if code.resources.registers > max_registers:
        found.append(f"{code.resources.registers} registers, more than {max_registers}")
    if code.resources.stack:
        found.append(f"{code.resources.stack} bytes of stack")
    if code.resources.local:
        found.append(f"{code.resources.local} bytes of local memory")
    found += [f"{counts[name]} {name}" for name in sorted(_LOCAL_MEMORY) if counts[name]]
    return found


def gemm_problems(kernel: GemmKernel, architecture: str, code: Code) -> list[str]:
    """What is wrong with a GEMM kernel."""
    loop = main_loop(code.function)
    counts = mnemonic_counts(loop)
    found = memory_problems(code, kernel.registers)
    if counts["IMMA"] != kernel.imma:
        found.append(f"{counts['IMMA']} IMMA in the main loop instead of {kernel.imma}")
    if counts["LDGSTS"] != kernel.async_copies:
        found.append(f"{counts['LDGSTS']} LDGSTS in the main loop instead of {kernel.async_copies}")
    found += [f"{counts[name]} {name} in the main loop" for name in sorted(_CONVERSIONS) if counts[name]]
    found += [f"{call.opcode} {call.operands} in the main loop" for call in returning_calls(code.function, loop)]
    saturating = sum(each.mnemonic == "IMMA" and ".SAT" in each.opcode for each in loop)
    if saturating:
        found.append(f"{saturating} IMMA with SAT in the main loop")
    others = others_per_imma(code.function)
    if others > budget(kernel):
        found.append(f"{others:.2f} non-MMA instructions for each IMMA, more than {budget(kernel):.2f}")
    return [f"{kernel}, sm_{architecture}: {problem}" for problem in found]


def gemv_problems(kernel: GemvKernel, architecture: str, code: Code) -> list[str]:
    """What is wrong with a GEMV kernel."""
    loop = main_loop(code.function, "IDP")
    counts = mnemonic_counts(loop)
    found = memory_problems(code, kernel.registers)
    if counts["IDP"] != kernel.dot_products:
        found.append(f"{counts['IDP']} IDP in the main loop instead of {kernel.dot_products}")
    wide = sum(each.mnemonic == "LDG" and ".128" in each.opcode for each in loop)
    if wide != kernel.DEPTH:
        found.append(f"{wide} 16-byte loads of weights in the main loop instead of {kernel.DEPTH}")
    found += [f"{counts[name]} {name} in the main loop" for name in sorted(_CONVERSIONS) if counts[name]]
    found += [f"{call.opcode} {call.operands} in the main loop" for call in returning_calls(code.function, loop)]
    return [f"{kernel}, sm_{architecture}: {problem}" for problem in found]
