"""A tiny random model as evaluation sees it, and task files of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.evaluate.models import SessionModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Tiny:
    """A random LLaMA: torch module, tokenizer, and the model that evaluation runs."""

    torch_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model: SessionModel


@dataclass(frozen=True)
class Request:
    """As much of lm-eval's Instance as models read."""

    args: tuple[Any, ...]


@pytest.fixture(scope="session")
def tiny(make_model_dir: Callable[[PretrainedConfig], Path]) -> Tiny:
    """Weights drawn widely, so that context sways the logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from calib.session import TorchCausalSession
    from tests.support.models import model_once, tiny_llama

    directory = model_once(make_model_dir, tiny_llama())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    session = TorchCausalSession(model, "tiny")
    return Tiny(model, AutoTokenizer.from_pretrained(directory), SessionModel(session, model.config.vocab_size))


@pytest.fixture(autouse=True, scope="session")
def _own_data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` converts out of the user's cache; it reads the variable when it is imported."""
    import datasets

    cache = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


class LetterTokenizer:
    """One token a letter, `a` is 2; 0 starts a text and 1 ends it."""

    bos_token_id = 0
    eos_token_id = 1
    name_or_path = "letters"

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Adds no special token, as GPT-2's tokenizer does not."""
        return [ord(letter) - ord("a") + 2 for letter in text]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The letters; special tokens as angle brackets."""
        letters = ("<" if id_ == 0 else ">" if id_ == 1 else chr(id_ - 2 + ord("a")) for id_ in ids)
        return "".join(letter for letter in letters if not (skip_special_tokens and letter in "<>"))


class LetterModel:
    """Logits that depend on the last three tokens, each row computed alone: a prefix gives the same bits."""

    name = "letters"
    vocabulary = 28

    def __init__(self) -> None:
        self._table = np.random.default_rng(0).normal(size=(3, self.vocabulary, self.vocabulary)).astype(np.float32)
        self.calls: list[list[int]] = []

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[S] -> [S, 28]."""
        self.calls.append(ids.tolist())
        rows = np.zeros((len(ids), self.vocabulary), np.float32)
        for position in range(len(ids)):
            for back in range(min(3, position + 1)):
                rows[position] += self._table[back, ids[position - back]]
        return rows
