"""A `LogitsModel` as a language model of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.evaluate.models import LogitsModel
from fptq_export.progress import Progress
from fptq_export.verify.perplexity import CHUNK_TOKENS, log_softmax, nll_from_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["HarnessModel", "refuse_sampling"]

Tokens = list[int]
Request = tuple[Any, Tokens, Tokens]
"""What is asked (not used), context, continuation."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval ships no types
    """Answers lm-eval's requests through `logits(ids)`, at batch 1.

    Tokens, prefixes and windows are those of lm-eval's own HFLM: special tokens as the tokenizer adds them, an empty
    context is the token that starts a text (else the one that ends it), and what is too long loses its beginning.
    Log probabilities are summed in float64. Requests with the same input run once: choices of one token share a run.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        max_length: Longest input in tokens.
        progress: Where requests are counted.
    """

    def __init__(
        self, model: LogitsModel, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = 1
        self._model = model
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            UserError: The tokenizer has none.
        """
        token = self.tokenizer.eos_token_id
        if not isinstance(token, int):
            raise UserError("tokenizer", "has no token that ends a text", "set eos_token in tokenizer_config.json")
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        token = self.tokenizer.bos_token_id
        return token if isinstance(token, int) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's own records."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
        """Text -> ids; None adds special tokens as the tokenizer does, unless the text has its first one written."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        ids: Tokens = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Requests with `args` (context, continuation) -> log probability in nats, whether greedy decoding gives it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Requests with `args` (text,) -> log probability of the whole text in nats.

        The text, after one prefix token, is cut into inputs of `max_length` tokens without overlap; the last one
        starts earlier, so that its tokens have as much before them, but predicts only what was left.
        """
        windows: list[list[Request]] = []
        for request in requests:
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows.append([(None, *make_disjoint_window(pair)) for pair in pairs])
        answers = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(answers)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Requests with `args` (context, settings) -> greedy continuations; each new token is one run over all before.

        Raises:
            UserError: The settings ask for sampling, or leave no room for the context.
        """
        texts = []
        with self._task("generation", len(requests), "texts") as task:
            for request in requests:
                context, settings = request.args
                texts.append(self._greedy(context, settings))
                task.advance()
        return texts

    def _greedy(self, context: str, settings: Mapping[str, Any]) -> str:
        refuse_sampling(settings, "a task")
        wanted = normalize_gen_kwargs(dict(settings))
        room = self.max_length - wanted["max_gen_toks"]
        if room < 1:
            cause = f"asks for {wanted['max_gen_toks']} tokens, and inputs have at most {self.max_length}"
            raise UserError("--max-length", f"a task {cause}", "give a larger --max-length, if the model allows it")
        stops = handle_stop_sequences(wanted["until"], eos=self.tokenizer.decode([self.eot_token_id]))
        ids, new = self.tok_encode(context)[-room:], Tokens()
        while len(new) < wanted["max_gen_toks"]:
            token = int(self._model.logits(np.asarray(ids + new, np.int64))[-1].argmax())
            if token == self.eot_token_id:
                break
            new.append(token)
            text = self._decoded(new)
            if any(stop and stop in text for stop in stops):
                break
        finished: str = postprocess_generated_text(self._decoded(new), stops, None)
        return finished

    def _decoded(self, ids: Tokens) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        by_input: dict[tuple[int, ...], list[int]] = {}
        for index, (_unused, context, continuation) in enumerate(requests):
            self._check_length(continuation)
            by_input.setdefault(tuple((context + continuation)[-(self.max_length + 1) :][:-1]), []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        with self._task("log likelihood", sum(map(len, by_input)), "tokens") as task:
            for ids, indexes in by_input.items():
                # An empty text has nothing to predict, and no input.
                logits = self._model.logits(np.asarray(ids, np.int64)) if ids else np.zeros((0, 1), np.float32)
                for index in indexes:
                    answers[index] = _answer(logits, requests[index][2])
                task.advance(len(ids))
        return [answers[index] for index in range(len(requests))]

    def _check_length(self, continuation: Tokens) -> None:
        if len(continuation) > self.max_length:
            cause = f"a task asks for {len(continuation)} tokens at once, and inputs have at most {self.max_length}"
            raise UserError("--max-length", cause, "give a larger --max-length, if the model allows it")

    def _task(self, what: str, total: int, unit: str) -> Any:
        return self._progress.task(f"{self._model.name}: {what}", total=total, unit=unit)


def _answer(logits: NDArray[np.float32], continuation: Tokens) -> tuple[float, bool]:
    """Log probability of the tokens that the last rows predict, and whether each is the most likely: [S, V], [n]."""
    if not continuation:
        return 0.0, True
    targets = np.asarray(continuation, np.int64)
    rows = logits[-len(targets) :]
    nll = sum(
        nll_from_log_probs(log_softmax(rows[chunk]), targets[chunk]) for chunk in _chunks(len(targets), CHUNK_TOKENS)
    )
    return -nll, bool((rows.argmax(axis=-1) == targets).all())


def _chunks(length: int, size: int) -> Iterable[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def refuse_sampling(settings: Mapping[str, Any], where: str) -> None:
    """Refuse generation settings that are not greedy.

    Raises:
        UserError: They draw tokens at random, or search several continuations.
    """
    beams = settings.get("num_beams", 1)
    if normalize_gen_kwargs(dict(settings))["do_sample"] or beams != 1:
        cause = "samples or searches; three systems compare by what each finds most likely"
        raise UserError(where, cause, "set do_sample: false and temperature: 0 in its generation_kwargs")
