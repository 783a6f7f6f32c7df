"""The serving bench on a tiny model: all contenders write what they are asked for, and the ratios are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from tests.bench.bench_serving import Row, Spec, measure, ratios, rows, table
from tests.bench.serving_contenders import (
    GENAI_MISSING,
    Contender,
    Written,
    build_genai,
    genai,
    has_genai,
    ours,
    transformers,
)
from tests.support.cpu_kernels import built_cpu_kernels
from tests.support.policies import mixed_tiers
from tests.support.rewritten import rewritten_with
from tests.support.traced import Traced

PROMPT = np.arange(5, 21)
NEW = 5


class Ticks:
    """A clock that is one second later whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """The next second."""
        self.now += 1.0
        return self.now


@pytest.fixture(scope="module")
def graph(llama_fp16: Traced, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The portable graph of the tiny LLaMA."""
    built_cpu_kernels()
    tiers = mixed_tiers(llama_fp16.sites, ("lm_head",))
    ids = np.random.default_rng(7).integers(0, 512, (2, 8))
    return rewritten_with(llama_fp16, tiers, ids, tmp_path_factory.mktemp("serving")).w4a8


@pytest.mark.parametrize("name", ["cpu", "stock", "transformers", "genai"])
def test_contender_writes_what_it_is_asked_for(name: str, graph: Path, llama_fp16: Traced, tmp_path: Path) -> None:
    """As many tokens as asked, none of them ahead of the others, and the same ones again."""
    if name == "genai" and not has_genai():
        pytest.skip(GENAI_MISSING)
    clock = Ticks()
    write: Contender
    if name == "transformers":
        write = transformers(llama_fp16.checkpoint, 1, clock)
    elif name == "genai":
        write = genai(build_genai(llama_fp16.checkpoint, tmp_path, "fp32"), 1, clock)
    else:
        write = ours(graph, 1, "cpu" if name == "cpu" else "stock", clock)
    first, second = measure({name: write}, PROMPT, NEW, 2)[name]
    assert len(first.tokens) == len(first.seconds) == NEW
    assert list(first.seconds) == sorted(set(first.seconds))
    assert first.tokens == second.tokens
    assert first.rate == pytest.approx(1.0, rel=1e-12, abs=0.0)  # a tick a token: sums of whole numbers


def test_ratio_is_to_the_better_peer() -> None:
    """Above 1 is faster: less time to the first token, more tokens a second; each against the best at that."""
    mine = Row("ours", True, 0.2, 90.0)
    found = [mine, Row("a", False, 0.1, 60.0), Row("b", False, 0.4, 100.0)]
    assert ratios(mine, found) == (0.5, 0.9)


def never(prompt: NDArray[np.int64], new: int) -> Written:
    """A contender that is not opened."""
    raise AssertionError("nothing is measured here")


def test_medians_and_table() -> None:
    """One slow text does not count, and every row is named."""
    found = [Spec(name, name == "ours", lambda: never) for name in ("ours", "peer")]
    texts = [Written((1, 2), (first, first + 1.0)) for first in (0.1, 0.2, 9.0)]
    row, other = rows(found, {"ours": texts, "peer": texts}, {"ours": 2_000_000})
    assert row.first_seconds == 0.2
    assert other.peak_bytes is None
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table([row, other], "title"))
    assert "ours" in capture.get()
    assert "peer" in capture.get()
