"""lm-eval's requests answered through `logits(ids)`: the numbers of lm-eval's own models, and of our own perplexity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM

from fptq_export.errors import UserError
from fptq_export.evaluate.language_model import HarnessModel, refuse_sampling
from fptq_export.evaluate.models import perplexity_from_windows
from fptq_export.progress import NoProgress
from tests.evaluate.conftest import LetterModel, LetterTokenizer, Request, Tiny

MAX_LENGTH = 24
"""Inputs of the comparison with HFLM: some requests are longer."""
FLOAT64_TOLERANCE = 1000 * 2.0**-53
"""Relative: two float64 programs that add up at most a thousand terms each."""
LOG_SOFTMAX_ROUNDING = 4 * 2.0**-24
"""Relative. Both run the same module on the same input, so their logits are equal; HFLM then rounds to float32 the
shifted logit, the logarithm of the sum, their difference, and each partial sum over the tokens."""
SUM_ROUNDING = 512 * 2.0**-24
"""In nats, for each token: a float32 sum of 512 exponentials is off by that much of itself, and its logarithm by as
much."""


def harness(tiny: Tiny, max_length: int = MAX_LENGTH) -> HarnessModel:
    return HarnessModel(tiny.model, tiny.tokenizer, max_length, NoProgress())


def letters(model: LetterModel, max_length: int) -> HarnessModel:
    return HarnessModel(model, LetterTokenizer(), max_length, NoProgress())  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def hflm(tiny: Tiny) -> Any:
    """lm-eval's own way of running the same torch module."""
    return HFLM(
        pretrained=tiny.torch_model, tokenizer=tiny.tokenizer, max_length=MAX_LENGTH, batch_size=1, device="cpu"
    )


def tolerance(tiny: Tiny, text: str, tokens: int) -> float:
    """How far HFLM's float32 may lie from float64 over so many tokens; the sum over tokens is no larger than they."""
    logits = tiny.model.logits(np.asarray(tiny.tokenizer.encode(text)[-MAX_LENGTH:]))
    spread = float((logits.max(axis=-1) - logits.min(axis=-1)).max()) + np.log(logits.shape[-1])
    return float(tokens * (tokens * LOG_SOFTMAX_ROUNDING * spread + SUM_ROUNDING))


REQUESTS = [
    ("The assignment binds a", " name"),
    ("The assignment binds a", " value to it, once and for all"),
    ("A space at the end ", "belongs to what follows"),
    ("", "A text without context"),
    ("x", "y"),
    ("If the target list is a single target in parentheses, the object is assigned to it, and so on,", " always"),
    ("x = ", "1, 2, 3, 4, 5"),
]
"""Context and continuation; the sixth is cut on the left."""


def test_log_likelihoods_are_those_of_lm_evals_own_model(tiny: Tiny, hflm: Any) -> None:
    """Context, empty context, spaces between, and what is too long are read as HFLM reads them."""
    requests = [Request(pair) for pair in REQUESTS]
    ours, theirs = harness(tiny).loglikelihood(requests), hflm.loglikelihood(requests, disable_tqdm=True)
    assert len(tiny.tokenizer.encode("".join(REQUESTS[5]))) > MAX_LENGTH + 1
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (value, _), (expected, _), (context, continuation) in zip(ours, theirs, REQUESTS, strict=True):
        tokens = len(tiny.tokenizer.encode(continuation))
        bound = tolerance(tiny, context + continuation, tokens)
        assert value == pytest.approx(expected, rel=0.0, abs=bound), continuation


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_model(tiny: Tiny, hflm: Any) -> None:
    """Texts shorter, as long as and longer than an input, the last window included, add up as HFLM adds them."""
    long = "The following table lists the operators, from the one that binds least to the one that binds most."
    texts = ["x = 1", long, long * 3, str(tiny.tokenizer.decode(tiny.tokenizer.encode(long)[:MAX_LENGTH]))]
    requests = [Request((text,)) for text in texts]
    theirs = hflm.loglikelihood_rolling(requests, disable_tqdm=True)
    for text, value, expected in zip(texts, harness(tiny).loglikelihood_rolling(requests), theirs, strict=True):
        tokens = len(tiny.tokenizer.encode(text))
        assert value == pytest.approx(expected, rel=0.0, abs=tolerance(tiny, text, tokens))


def test_greedy_continuations_are_those_of_generate(tiny: Tiny, hflm: Any) -> None:
    """One run a token without a cache gives the text of transformers' generate, up to the stop."""
    settings = {"until": ["e"], "max_gen_toks": 8, "do_sample": False}
    requests = [Request((context, dict(settings))) for context in ("x = ", "The loop ends with", "def f(a, b, c):")]
    assert harness(tiny).generate_until(requests) == hflm.generate_until(requests, disable_tqdm=True)


def test_rolling_log_likelihood_is_our_perplexity_on_the_same_windows() -> None:
    """lm-eval's sum over a text is exactly ours: each window starts with the last token of the one before it."""
    length, text = 16, "theassignmentstatementbindsanamexy" + "operatorsbindmore"[:14]
    ids = [0, *LetterTokenizer().encode(text)]
    assert len(ids) == 3 * length + 1
    windows = np.stack([ids[start : start + length + 1] for start in range(0, 3 * length, length)])
    model = LetterModel()
    (value,) = letters(model, length).loglikelihood_rolling([Request((text,))])
    figures = perplexity_from_windows(model, windows, "letters", NoProgress())
    assert figures.tokens == len(text)
    assert -value == pytest.approx(figures.nll_sum, rel=FLOAT64_TOLERANCE, abs=0.0)


def test_every_token_of_a_text_is_predicted_once() -> None:
    """A rest shorter than a window is neither lost nor counted with what was predicted before."""
    model, text = LetterModel(), "abcdefghijklmnopqrst"
    (value,) = letters(model, 16).loglikelihood_rolling([Request((text,))])
    ids = np.array([0, *LetterTokenizer().encode(text)])
    inputs = {"first": ids[:16], "rest": ids[4:20]}
    assert sorted(model.calls) == sorted(part.tolist() for part in inputs.values())
    first, rest = (model.logits(part).astype(np.float64) for part in inputs.values())
    rows = np.concatenate([first, rest[-4:]])
    expected = sum(row[target] - np.log(np.exp(row).sum()) for row, target in zip(rows, ids[1:], strict=True))
    assert value == pytest.approx(expected, rel=FLOAT64_TOLERANCE, abs=0.0)


def test_choices_of_one_token_share_a_run() -> None:
    """Four letters after one question cost one run, and each has its own probability; together they are at most 1."""
    model = LetterModel()
    answers = letters(model, 16).loglikelihood([Request(("question", letter)) for letter in "abcd"])
    assert len(model.calls) == 1
    assert len({value for value, _ in answers}) == 4
    assert sum(np.exp(value) for value, _ in answers) < 1.0


def test_empty_text_has_probability_one() -> None:
    """Nothing to predict costs nothing and runs nothing."""
    model = LetterModel()
    assert letters(model, 16).loglikelihood_rolling([Request(("",))]) == [0.0]
    assert model.calls == []


def test_generation_stops_at_the_end_token_and_at_its_limit() -> None:
    """The end token is not part of the text, and no more tokens come than were asked for."""

    class EndsAfterTwo(LetterModel):
        def logits(self, ids: Any) -> Any:
            rows = np.zeros((len(ids), self.vocabulary), np.float32)
            rows[-1, 2 if len(ids) < 5 else 1] = 1.0
            return rows

    model = letters(EndsAfterTwo(), 16)
    requests = [Request(("xyz", {"until": [], "max_gen_toks": count})) for count in (8, 1)]
    assert model.generate_until(requests) == ["aa", "a"]


def test_answer_longer_than_an_input_is_refused() -> None:
    """A continuation that does not fit is an error and not a part of the answer."""
    with pytest.raises(UserError, match="17 tokens at once, and inputs have at most 16"):
        letters(LetterModel(), 16).loglikelihood([Request(("a", "b" * 17))])


def test_generation_without_room_for_its_context_is_refused() -> None:
    """As many new tokens as an input holds would leave nothing to continue."""
    with pytest.raises(UserError, match="asks for 16 tokens"):
        letters(LetterModel(), 16).generate_until([Request(("a", {"until": [], "max_gen_toks": 16}))])


@pytest.mark.parametrize(
    "settings", [{"do_sample": True, "temperature": 0.7}, {"temperature": 1.0}, {"num_beams": 4}, {"do_sample": True}]
)
def test_settings_that_are_not_greedy_are_refused(settings: dict[str, Any]) -> None:
    """Three systems are not compared by a draw."""
    with pytest.raises(UserError, match="samples or searches"):
        refuse_sampling(settings, "task")


@pytest.mark.parametrize("settings", [{}, {"do_sample": False}, {"temperature": 0.0}, {"until": ["."], "num_beams": 1}])
def test_greedy_settings_are_left_alone(settings: dict[str, Any]) -> None:
    """Settings that say greedy, or nothing, pass."""
    refuse_sampling(settings, "task")


def test_tokenizer_without_an_end_is_refused() -> None:
    """No token to start an empty context with is said, not guessed."""

    class Endless(LetterTokenizer):
        bos_token_id = None  # type: ignore[assignment]
        eos_token_id = None  # type: ignore[assignment]

    model = HarnessModel(LetterModel(), Endless(), 16, NoProgress())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no token that ends a text"):
        model.loglikelihood([Request(("", "a"))])
