"""What the endpoints share: the model, its queue, its name, its metrics."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastapi.concurrency import run_in_threadpool

from fptq_export import __version__
from fptq_export.errors import UserError
from fptq_export.runtime import Sampling, Scheduler, Session, TextTokenizer
from fptq_export.runtime.metrics import Metrics
from fptq_export.serve.api_errors import ApiError, api_error_from_refusal, unknown_model, wrong_key
from fptq_export.serve.requests import ChatRequest, CompletionRequest
from fptq_export.serve.responses import Model
from fptq_export.serve.texts import Texts

__all__ = ["Service"]

_LONGEST = 1 << 20
"""Tokens of a chat's answer where neither the request nor the model sets an end."""


@dataclass(frozen=True)
class Service:
    """One model that is served."""

    session: Session
    tokenizer: TextTokenizer
    scheduler: Scheduler
    metrics: Metrics
    name: str
    max_queue: int
    """Texts of one request at most: more could never wait at once."""
    keys: tuple[str, ...] = ()
    """API keys; none asks for none."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        """Changes where the same seed may give another text."""
        return f"fptq-export-{__version__}-{self.session.backend}-{self.session.model.name}"

    @property
    def model(self) -> Model:
        """The model, for lists."""
        limit = self.session.limits.max_kv_len
        return Model(id=self.name, created=self.created, owned_by="fptq-export", max_model_len=limit)

    def check_key(self, key: str | None) -> None:
        """Let in who has a key.

        Raises:
            ApiError: The key is missing or wrong.
        """
        given = (key or "").encode()
        # Every key is compared, so that the time says nothing about them.
        if self.keys and not sum(hmac.compare_digest(given, known.encode()) for known in self.keys):
            raise wrong_key()

    def check_model(self, name: str) -> None:
        """Refuse another model than this one.

        Raises:
            ApiError: It is another one.
        """
        if name != self.name:
            raise unknown_model(name, self.name)

    async def complete(self, body: CompletionRequest) -> tuple[Texts, list[str]]:
        """Ask for the texts of a completion.

        Returns:
            The texts, and what each begins with.

        Raises:
            ApiError: A prompt is refused, or the server takes none.
        """
        prompts = body.prompts()
        if not prompts:
            raise ApiError(400, "prompt: is an empty list; give at least one text", param="prompt")
        if len(prompts) > self.max_queue:
            message = f"prompt: {len(prompts)} texts are more than may wait ({self.max_queue}); send fewer at a time"
            raise ApiError(400, message, param="prompt")

        def read() -> list[list[int]]:
            return [self.session.tokens(prompt) for prompt in prompts]

        tokens = await self._read(read, "prompt")
        sampling = body.sampling(body.new_tokens)
        texts = await self._ask(tokens, [sampling] * len(tokens), "prompt")
        if not body.echo:
            return texts, ["" for _ in prompts]
        return texts, [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in prompts]

    async def chat(self, body: ChatRequest) -> Texts:
        """Ask for the answer of a chat.

        Raises:
            ApiError: The chat template or the model refuses the messages, or the server takes none.
        """
        messages = [message.for_template() for message in body.messages]

        def read() -> list[list[int]]:
            return [self.tokenizer.encode_chat(messages)]

        tokens = await self._read(read, "messages")
        sampling = body.sampling(body.new_tokens or self.session.limits.max_kv_len or _LONGEST)
        return await self._ask(tokens, [sampling], "messages")

    async def _read(self, read: Callable[[], list[list[int]]], param: str) -> list[list[int]]:
        """Tokens, in a thread: a long text must not hold up the streams of others."""
        try:
            return await run_in_threadpool(read)
        except UserError as error:
            raise api_error_from_refusal(error, param) from error

    async def _ask(self, tokens: Sequence[list[int]], samplings: Sequence[Sampling], param: str) -> Texts:
        try:
            return await Texts.asked(self.scheduler, tokens, samplings)
        except UserError as error:
            raise api_error_from_refusal(error, param) from error
