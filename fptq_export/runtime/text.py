"""Between text and tokens: the tokenizer of a run directory, and text that comes token by token."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from fptq_export.errors import UserError

__all__ = ["ChatMessage", "TextStream", "TextTokenizer", "tokenizer_from_directory"]

ChatMessage = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, and what else the chat template reads."""

_TOKENIZER, _CONFIG, _GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_TEMPLATE = "chat_template.jinja"


class TextTokenizer:
    """A tokenizer with what its model needs to know of it.

    Args:
        tokenizer: Of the `tokenizers` library.
        eos_ids: Tokens that end a text.
        template: Jinja template of a chat; None where the model has none.
        special_tokens: `bos_token` and so on, for the template.
        where: For errors.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: Iterable[int],
        template: str | None,
        special_tokens: Mapping[str, str],
        where: str,
    ) -> None:
        self.eos_ids = frozenset(eos_ids)
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = special_tokens
        self._where = where

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    @cached_property
    def vocabulary(self) -> int:
        """The largest token and one, added tokens included: some tokenizers leave out numbers."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text, with those that the model wants around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def chat(self, messages: Sequence[ChatMessage]) -> str:
        """The text of a chat, up to where the assistant's answer begins. Encode it without special tokens.

        Raises:
            UserError: There is no chat template, or it refuses the messages.
        """
        if self._template is None:
            hint = "use a text prompt, or a model that was trained for chats (an Instruct one)"
            raise UserError(self._where, "this model has no chat template", hint)
        try:
            from jinja2 import TemplateError
        except ImportError:
            hint = "pip install 'fptq-export[serve]'"
            raise UserError("chat", "jinja2, which fills in chat templates, is not installed", hint) from None
        try:
            template = _environment().from_string(self._template)
            return str(template.render(messages=list(messages), add_generation_prompt=True, **self._special_tokens))
        except (TemplateError, TypeError) as error:
            hint = "give a list of messages, each with a role and a content, in the order the model was trained on"
            raise UserError(self._where, f"its chat template refuses these messages ({error})", hint) from error

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Tokens of a chat.

        Raises:
            UserError: As `chat`.
        """
        return self.encode(self.chat(messages), add_special_tokens=False)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """Text of tokens that come one by one."""
        return TextStream(self._tokenizer, stop)


class TextStream:
    """Text of tokens that come one by one, up to a stop string.

    Text is given out as soon as it is certain: not while it ends inside a character, nor while it could be the
    beginning of a stop string.

    Args:
        tokenizer: Of the `tokenizers` library.
        stop: The text ends before the first of these.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._decoded = ""
        self._given = 0
        self.stopped = False
        """A stop string came. Nothing more is given out."""

    def push(self, token_id: int) -> str:
        """Text that is certain now."""
        self._ids.append(token_id)
        self._decoded += self._decoder.step(self._tokenizer, token_id) or ""
        return self._certain(last=False)

    def finish(self) -> str:
        """The rest: what was held back, and bytes that make no whole character."""
        whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if whole.startswith(self._decoded):
            self._decoded = whole
        return self._certain(last=True)

    def _certain(self, *, last: bool) -> str:
        if self.stopped:
            return ""
        found = [place for stop in self._stop if (place := self._decoded.find(stop, self._search_from(stop))) >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self._decoded) - (0 if last else self._held())
        text = self._decoded[self._given : end]
        self._given = max(self._given, end)
        return text

    def _search_from(self, stop: str) -> int:
        return max(0, self._given - len(stop) + 1)

    def _held(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        ends = (size for size in range(min(longest, len(self._decoded)), 0, -1))
        return next((size for size in ends if any(stop.startswith(self._decoded[-size:]) for stop in self._stop)), 0)


def tokenizer_from_directory(directory: Path) -> TextTokenizer | None:
    """The tokenizer of a run directory, or None where it has no `tokenizer.json`.

    Raises:
        UserError: A file of it cannot be read.
    """
    path = directory / _TOKENIZER
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # what the library raises has no class of its own
        raise UserError(str(path), f"is no tokenizer ({error})", "copy the model's tokenizer files again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = _json(directory / _CONFIG)
    special = {name: text for name, value in config.items() if name.endswith("_token") and (text := _token_text(value))}
    return TextTokenizer(
        tokenizer, _eos_ids(directory, tokenizer, special), _template(directory, config), special, str(directory)
    )


def _eos_ids(directory: Path, tokenizer: Tokenizer, special: Mapping[str, str]) -> set[int]:
    """Tokens that end a text, by the generation config and by the tokenizer's: chat models often have two."""
    named = _json(directory / _GENERATION).get("eos_token_id")
    ids = {named} if isinstance(named, int) else set(named or ())
    own = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return ids if own is None else ids | {own}


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / _TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _token_text(value: object) -> str | None:
    """A special token is text, or an object that holds it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(path), f"is not JSON ({error})", "copy the model's tokenizer files again") from error
    if not isinstance(document, dict):
        raise UserError(str(path), "is not a JSON object", "copy the model's tokenizer files again")
    return document


def _environment() -> Any:
    """What chat templates are written for: Jinja without access to Python, blocks that leave no lines, three names."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now(tz=datetime.timezone.utc).astimezone().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
