"""Prefill, decode and sampling of the C++ runner against a model without a cache."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fptq_export.runtime.sampling import Sampling
from tests.cpp_runner.conftest import Runner
from tests.cpp_runner.model import Spec, completion, write_plan

PROMPTS = ([5, 9, 30, 2], [1], [7, 7, 7, 8], [4, 3, 2, 1])
"""Three of one length, so a batch of two and one of one, and one alone."""
LONGEST = 9
"""The cache holds 12 tokens before a call: those of a prompt of 4, and 8 of the 9 that follow."""
NUMBERS = re.compile(r"double: (\d+) calls, (\d+) captures, (\d+) launches")


def prompt_words(prompts: tuple[list[int], ...] = PROMPTS) -> list[str]:
    """`--ids` for each."""
    return [word for prompt in prompts for word in ("--ids", ",".join(map(str, prompt)))]


@pytest.mark.parametrize(
    "spec",
    [
        Spec(),
        Spec(int8=True, ids="int32", logits="last"),
        Spec(type="float32", two_profiles=True, batch=3),
        Spec(static=True, type="bfloat16"),
        Spec(static=True, int8=True, logits="last", batch=1),
        Spec(static=True, ids="int32", two_profiles=True, layers=1, heads=3),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_the_model_without_a_cache(on_double: Runner, tmp_path: Path, spec: Spec) -> None:
    """Both forms of the cache, floats and codes, batches, one profile or two: every token of every prompt."""
    plan = write_plan(tmp_path / "out.plan", spec)
    done = on_double("generate", plan, *prompt_words(), "--max-tokens", LONGEST)
    assert done.code == 0, done.err
    assert done.tokens == [completion(prompt, spec, Sampling(max_tokens=LONGEST)) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=LONGEST, temperature=1.3, seed=7),
        Sampling(max_tokens=LONGEST, temperature=2.5, top_k=5, seed=2**40 + 3),
        Sampling(max_tokens=LONGEST, temperature=4.0, top_p=0.6, seed=0),
        Sampling(max_tokens=LONGEST, temperature=0.5, top_k=100, top_p=0.95, seed=11),
    ],
    ids=lambda sampling: f"t{sampling.temperature}-k{sampling.top_k}-p{sampling.top_p}",
)
def test_drawn_tokens_are_those_of_the_python_session(on_double: Runner, tmp_path: Path, sampling: Sampling) -> None:
    """Same seed, same tokens as `chosen_token` draws; each prompt of a call has a seed of its own."""
    spec = Spec()
    plan = write_plan(tmp_path / "out.plan", spec)
    words = ["--temperature", sampling.temperature, "--top-k", sampling.top_k, "--top-p", sampling.top_p]
    words += ["--seed", sampling.seed, "--max-tokens", LONGEST]
    done = on_double("generate", plan, *prompt_words(), *words)
    assert done.code == 0, done.err
    assert done.tokens == [completion(prompt, spec, sampling, row=row) for row, prompt in enumerate(PROMPTS)]


def test_stop_token_ends_its_sequence_only(on_double: Runner, tmp_path: Path) -> None:
    """The stop token is the last of its answer; the other sequence of the batch goes on as if alone."""
    spec = Spec()
    plan = write_plan(tmp_path / "out.plan", spec)
    prompts = (PROMPTS[0], PROMPTS[3])
    sampling = Sampling(max_tokens=LONGEST)
    stop = completion(prompts[0], spec, sampling)[2]
    expected = [completion(prompt, spec, sampling, stop=stop) for prompt in prompts]
    assert [len(ids) for ids in expected] == [3, LONGEST]
    done = on_double("generate", plan, *prompt_words(prompts), "--max-tokens", LONGEST, "--stop-ids", f"36,{stop}")
    assert done.tokens == expected


def test_graph_gives_the_same_tokens_in_one_launch_a_step(on_double: Runner, tmp_path: Path) -> None:
    """With a static cache the second decode step is captured, and that and all later ones are launches."""
    spec = Spec(static=True)
    plan = write_plan(tmp_path / "out.plan", spec)
    words = ("generate", plan, *prompt_words((PROMPTS[0],)), "--max-tokens", LONGEST)
    done = on_double(*words, "--cuda-graph", double={"report": True})
    assert done.tokens == [completion(PROMPTS[0], spec, Sampling(max_tokens=LONGEST))]
    numbers = NUMBERS.search(done.err)
    assert numbers is not None, done.err
    calls, captures, launches = map(int, numbers.groups())
    # Prefill and the first step are calls of their own; what a graph launches is a call of the engine too.
    assert (calls, captures, launches) == (LONGEST, 1, LONGEST - 2)


@pytest.mark.parametrize("static", [False, True])
def test_full_cache_ends_the_answer_and_is_said(on_double: Runner, tmp_path: Path, static: bool) -> None:
    """As many tokens as fit, the last of which needs no slot."""
    spec = Spec(static=static)
    room = spec.past + 1 if not static else spec.past + spec.input
    plan = write_plan(tmp_path / "out.plan", spec)
    done = on_double("generate", plan, "--ids", "5,9,30,2", "--max-tokens", 100)
    expected = completion(PROMPTS[0], spec, Sampling(max_tokens=room - len(PROMPTS[0]) + 1))
    assert done.tokens == [expected]
    assert f"the KV cache is full after {len(expected)} tokens" in done.err


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("--ids", "1,2,3,4,5,6,7,8,9"), "has 9 tokens, and the engine takes at most 8"),
        (("--ids", "36", "--ids", "37"), "prompt 1: token 37 is not in the vocabulary of 37"),
        (("--ids", "1,-1"), "token -1 is not in the vocabulary"),
        (("--ids", "1,x"), "'x' is no such number"),
        (("--ids", ""), "'' is no such number"),
        (("--ids", "1", "--cuda-graph"), "KV cache grows"),
        (("--ids", "1", "--temperature", "-1"), "--temperature"),
        (("--ids", "1", "--temperature", "nan"), "--temperature"),
        (("--ids", "1", "--top-p", "0"), "--top-p"),
        (("--ids", "1", "--top-k", "-2"), "--top-k"),
        (("--ids", "1", "--max-tokens", "0"), "--max-tokens"),
        (("--ids", "1", "--max-tokens"), "needs a value"),
        (("--ids", "1", "--beams", "4"), "--beams: is no option"),
        (("--ids", "1", "second.plan"), "one word too many"),
        ((), "needs either --ids or --load-inputs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_refusals_are_one_sentence(on_double: Runner, tmp_path: Path, words: tuple[str, ...], cause: str) -> None:
    """Exit code 1, nothing on standard output, the cause in one line and at most one line of advice."""
    done = on_double("generate", write_plan(tmp_path / "out.plan", Spec()), *words)
    assert (done.code, done.out) == (1, "")
    lines = done.err.splitlines()
    assert cause in lines[0]
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  -> "))


@pytest.mark.parametrize("number", [1, 3, 12])
def test_failing_allocation_leaks_nothing(on_double: Runner, tmp_path: Path, number: int) -> None:
    """Whatever was allocated before is freed: the double would abort."""
    plan = write_plan(tmp_path / "out.plan", Spec(int8=True))
    done = on_double("generate", plan, "--ids", "1", double={"fail_allocation": number})
    assert done.code == 1
    assert "out of memory" in done.err
