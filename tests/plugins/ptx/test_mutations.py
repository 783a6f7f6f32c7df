"""Tests of the comparison: mistakes in ptx_ops.h, which the emulator cannot see, as edits of the PTX text."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from tests.plugins.emulation.harness import Kernels
from tests.plugins.emulation.weights import GROUP, PER_CHANNEL, TWO_LEVEL
from tests.plugins.ptx.agreement import FEW_TILES, assert_gemm_agrees, assert_gemv_agrees
from tests.plugins.ptx.compile import Compiled
from tests.plugins.ptx.launch import Interpreted, Program
from tests.plugins.ptx.ptx_parser import PtxError

FOUR = r"\{(%\w+), (%\w+), (%\w+), (%\w+)\}"


@dataclass(frozen=True)
class Mutation:
    """Replace what `pattern` matches, everywhere in the kernels that a case launches."""

    name: str
    pattern: str
    new: str
    scheme: tuple[int, int]
    gemv_rows: int = 0
    """0: the GEMM."""


GROUP_64, GROUP_32, GROUP_16, LEVELS_32 = (GROUP, 64), (GROUP, 32), (GROUP, 16), (TWO_LEVEL, 32)
CHANNEL = (PER_CHANNEL, 0)
MMA_A = rf"(k32\.row\.col\S+ {FOUR}, )\{{(%\w+), (%\w+), (%\w+), (%\w+)\}}"
MUTATIONS = (
    Mutation("rows and columns of A swapped", MMA_A, r"\1{\6, \8, \7, \9}", CHANNEL),
    Mutation("A upside down", MMA_A, r"\1{\7, \6, \9, \8}", CHANNEL),
    Mutation("the steps of B swapped", r"\{(%\w+), (%\w+)\}, (\{[^}]*\};)", r"{\2, \1}, \3", CHANNEL),
    Mutation("B is signed", r"s32\.s8\.u8\.s32", "s32.s8.s8.s32", LEVELS_32),
    Mutation("A is not signed", r"s32\.s8\.s8\.s32", "s32.u8.s8.s32", GROUP_64),
    Mutation("rows of D swapped", rf"(mma\S+) {FOUR}", r"\1 {\4, \5, \2, \3}", GROUP_64),
    Mutation("rows of A swapped, k16", r"(k16\.row\S+ \{[^}]*\}, )\{(%\w+), (%\w+)\}", r"\1{\3, \2}", GROUP_16),
    Mutation("ldmatrix transposes", r"m8n8\.x4\.shared", "m8n8.x4.trans.shared", CHANNEL),
    Mutation("ldmatrix in another order", rf"(ldmatrix\S+) {FOUR}", r"\1 {\2, \4, \3, \5}", CHANNEL),
    Mutation("waits for one group too few", r"wait_group 4", "wait_group 5", CHANNEL),
    Mutation("waits for nothing", r"cp\.async\.wait_group \d+;", "", CHANNEL),
    Mutation("never commits", r"cp\.async\.commit_group;", "", CHANNEL),
    Mutation("copies past the end", r"(cp\.async\.cg[^;]*, 16), %\w+;", r"\1;", GROUP_16),
    Mutation("no barrier (GEMM)", r"(wait_group 4;\s*)bar\.sync\s+0;", r"\1", CHANNEL),
    Mutation("no barrier (quantize)", r"(st\.shared\.u32\s[^;]*;\s*\$\w+:\s*)bar\.sync\s+0;", r"\1", CHANNEL),
    Mutation("no barrier (GEMV)", r"bar\.sync\s+0;", "", CHANNEL, gemv_rows=1),
    Mutation("another byte of the scale pair", r"\b4369\b", "8738", LEVELS_32, gemv_rows=1),
    Mutation("another byte of the scale pair (GEMM)", r"\b4369\b", "0", LEVELS_32),
    Mutation("scale pairs as they lie", r"\.x4\.trans\.", ".x4.", LEVELS_32),
    Mutation("the factor of another pair", r"\b17474\b", "17472", LEVELS_32),
    Mutation("the offset of another pair", r"\b13107\b", "4369", LEVELS_32),
    Mutation("dp4a with its operands swapped", r"(dp4a\.s32\.u32 %\w+), (%\w+), (%\w+)", r"\1, \3, \2", LEVELS_32, 1),
    Mutation("dp4a is signed", r"dp4a\.s32\.u32", "dp4a.s32.s32", LEVELS_32, 1),
    Mutation("shuffles down", r"shfl\.sync\.bfly", "shfl.sync.down", GROUP_64, 1),
    Mutation("weights in another order", rf"(no_allocate\S+) {FOUR}", r"\1 {\2, \4, \3, \5}", GROUP_64, 1),
    Mutation("codes rounded to zero", r"cvt\.rni\.f32", "cvt.rzi.f32", GROUP_32),
    Mutation("codes not saturated", r"min\.f32\s+(%\w+), (%\w+), \w+;", r"mov.f32 \1, \2;", CHANNEL, 2),
    Mutation("scales as BF16", r"cvt\.f32\.f16", "cvt.f32.bf16", GROUP_32),
    Mutation("output in the other type", r"cvt\.rn\.f16\.f32", "cvt.rn.bf16.f32", GROUP_32),
    Mutation("FP16 for BF16", r"cvt\.rn\.bf16\.f32", "cvt.rn.f16.f32", GROUP_32, 2),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_caught(emulated: Kernels, product: Compiled, mutation: Mutation) -> None:
    """An edit of the PTX text makes the interpreter refuse it, or gives other bits than the emulator."""
    changed = 0

    def edit(text: str) -> str:
        nonlocal changed
        text, count = re.subn(mutation.pattern, mutation.new, text)
        changed += count
        return text

    mutant = Interpreted(product.library, Program(product.modules(), edit))
    with pytest.raises((AssertionError, PtxError)):  # noqa: PT012 - one call, which of the two the mutation says
        if mutation.gemv_rows:
            assert_gemv_agrees(emulated, mutant, mutation.gemv_rows, *mutation.scheme)
        else:
            assert_gemm_agrees(emulated, mutant, FEW_TILES[0], *mutation.scheme, 1)
    assert changed > 0, "the pattern is no longer in the text"


REFUSED = (
    ("fma.rn.f32", "fma.rn.ftz.f32", GROUP_64),
    ("div.rn.f32", "div.full.f32", GROUP_64),
    ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "ldmatrix.sync.aligned.m8n16.x4.shared.b8", GROUP_64),
    ("cp.async.cg.shared", "cp.async.bulk.shared", GROUP_64),
    ("ld.global.nc", "ld.global.volatile", GROUP_64),
)


@pytest.mark.parametrize(("old", "new", "scheme"), REFUSED, ids=[new for _, new, _ in REFUSED])
def test_an_unknown_opcode_is_named(
    emulated: Kernels, product: Compiled, old: str, new: str, scheme: tuple[int, int]
) -> None:
    """An instruction, or a modifier, that the interpreter does not know stops it; nothing is ignored."""
    mutant = Interpreted(product.library, Program(product.modules(), lambda text: text.replace(old, new)))
    with pytest.raises(PtxError, match=rf"unknown opcode {re.escape(new)}"):
        assert_gemm_agrees(emulated, mutant, FEW_TILES[0], *scheme, 1)
