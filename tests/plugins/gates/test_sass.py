"""The reader of machine code, on pieces of our own kernels: it must see what the gates look for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.gates import sass
from tests.plugins.gates.checks import Code, gemm_problems
from tests.plugins.gates.kernels import GemmKernel, GemvKernel, gemm_from_name, gemv_from_name

SNIPPETS = Path(__file__).parent / "snippets"
KERNEL = GemmKernel(16, 128, 16, 32, 6, "per_channel", 0)
"""That of the listing."""
LOOP_LABEL = "`(.L_x_loop)"
OUT = "\n.L_x_out:\n        /*fffe*/                   {} ;\n"


def snippet(name: str = "gemm_sm_80.sass") -> str:
    return (SNIPPETS / name).read_text(encoding="utf-8")


def only_function(text: str) -> sass.Function:
    (function,) = sass.functions_from_sass(text).values()
    return function


def with_line(text: str, line: str) -> str:
    """The listing with one more instruction in front of the branch that ends the main loop."""
    lines = text.splitlines()
    end = max(index for index, each in enumerate(lines) if "BRA" in each and LOOP_LABEL in each)
    return "\n".join([*lines[:end], f"        /*ffff*/                   {line} ;", *lines[end:]])


def code(text: str, *, registers: int = 64, stack: int = 0, local: int = 0) -> Code:
    return Code(only_function(text), sass.Resources(registers, stack, local))


def test_main_loop_is_the_backward_branch_around_the_imma() -> None:
    """The loop starts at its label and ends at its branch; what is before and behind is left out."""
    loop = sass.main_loop(only_function(snippet()))
    counts = sass.mnemonic_counts(loop)
    assert counts["IMMA"] == KERNEL.imma
    assert counts["LDGSTS"] == KERNEL.async_copies
    assert counts["EXIT"] == counts["STG"] == 0
    assert loop[-1].mnemonic == "BRA"


def test_function_without_loop_is_refused() -> None:
    """A listing without tensor-core instructions in a loop is an error, not a loop of nothing."""
    text = snippet().replace("IMMA.16832", "NOPE.16832")
    with pytest.raises(ValueError, match="no loop contains IMMA"):
        sass.main_loop(only_function(text))


def test_predicates_and_suffixes_are_taken_apart() -> None:
    """A guarded instruction is counted under its mnemonic, whatever its guard and suffixes."""
    text = ".text.f:\n        /*0000*/              @!UP1 LDGSTS.E.BYPASS.128 [R3+0x7000], [R114.64], !P0 ;\n"
    (instruction,) = only_function(text).instructions
    assert (instruction.mnemonic, instruction.predicate) == ("LDGSTS", "!UP1")
    assert instruction.opcode == "LDGSTS.E.BYPASS.128"


def test_names_become_kernels() -> None:
    """Tile, scheme and group size are read from the mangled name; other functions are none."""
    names = snippet("names.txt").split()
    kernels = [gemm_from_name(name) or gemv_from_name(name) for name in names]
    assert kernels == [
        GemmKernel(128, 128, 64, 64, 4, "two_level", 16),
        KERNEL,
        GemvKernel(3, "group", 128),
        None,
    ]


def test_resources_are_read_for_each_function() -> None:
    """Registers, stack and local memory belong to the function named above them."""
    found = sass.resources_from_text(snippet("res_usage.txt"))
    assert list(found.values()) == [sass.Resources(204, 0, 0), sass.Resources(70, 16, 8)]


def test_sound_code_passes() -> None:
    """The unchanged snippet has no problem: each refusal below is due to its one change."""
    assert gemm_problems(KERNEL, "80", code(snippet())) == []


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("LDL R4, [R1+0x10]", "LDL"),
        ("STL.64 [R1], R4", "STL"),
        ("I2F R4, R5", "I2F"),
        ("I2FP.F32.S32 R4, R5", "I2FP"),
        ("CALL.ABS.NOINC R20", "CALL"),
        ("IMMA.16832.S8.S8 R8, R4.ROW, R2.COL, R8", "IMMA"),
        ("LDGSTS.E.BYPASS.128 [R3], [R4.64]", "LDGSTS"),
    ],
)
def test_forbidden_instruction_is_found(line: str, word: str) -> None:
    """Each forbidden or surplus instruction in the loop is named, with kernel and architecture."""
    problems = gemm_problems(KERNEL, "80", code(with_line(snippet(), line)))
    assert len(problems) == 1
    assert word in problems[0]
    assert problems[0].startswith(f"{KERNEL}, sm_80: ")


def test_local_memory_outside_the_loop_is_found() -> None:
    """A spill in the epilogue fails, too."""
    text = snippet() + "        /*fff0*/                   STL [R1], R4 ;\n"
    assert any("STL" in problem for problem in gemm_problems(KERNEL, "80", code(text)))


def test_saturating_imma_is_found() -> None:
    """An IMMA that saturates would hide an overflow."""
    text = snippet().replace("IMMA.16832.S8.S8 ", "IMMA.16832.S8.S8.SAT ", 1)
    assert any("SAT" in problem for problem in gemm_problems(KERNEL, "80", code(text)))


def test_call_that_can_return_is_found() -> None:
    """The far jump out of the loop that ptxas writes as a call is accepted; with a RET it is not."""
    jump = with_line(snippet(), "@P4 CALL.REL.NOINC `(.L_x_out)")
    assert gemm_problems(KERNEL, "80", code(jump + OUT.format("EXIT"))) == []
    (problem,) = gemm_problems(KERNEL, "80", code(jump + OUT.format("RET.REL.NODEC R20")))
    assert "CALL" in problem


@pytest.mark.parametrize(
    ("resources", "word"), [({"registers": 255}, "registers"), ({"stack": 16}, "stack"), ({"local": 8}, "local")]
)
def test_surplus_resource_is_found(resources: dict[str, int], word: str) -> None:
    """Too many registers, a stack, and local memory are each refused."""
    (problem,) = gemm_problems(KERNEL, "80", code(snippet(), **resources))
    assert word in problem


def test_missing_async_copies_are_found() -> None:
    """Copies that go through registers instead of cp.async are a problem."""
    text = snippet().replace("LDGSTS.E", "LDG.E")
    assert any("LDGSTS" in problem for problem in gemm_problems(KERNEL, "80", code(text)))


def test_loop_over_budget_is_found() -> None:
    """A loop with too many other instructions is refused with their number; NOPs do not count."""
    text = snippet()
    for _ in range(400):
        text = with_line(text, "NOP")
    assert gemm_problems(KERNEL, "80", code(text)) == []
    for _ in range(400):
        text = with_line(text, "MOV R4, R5")
    (problem,) = gemm_problems(KERNEL, "80", code(text))
    assert "non-MMA instructions for each IMMA" in problem
