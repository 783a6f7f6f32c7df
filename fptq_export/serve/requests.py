"""Bodies of requests: OpenAI's fields. One that would change the answer and is not obeyed here is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from fptq_export.runtime import Sampling
from fptq_export.serve.api_errors import FieldError

__all__ = ["ChatRequest", "CompletionRequest", "Message", "StreamOptions", "TextPart", "TextRequest"]

_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` in `/v1/completions`. Chats go on to the end of the cache."""


def _neutral(*values: object) -> AfterValidator:
    """A field that may hold what changes nothing."""

    def check(value: object) -> object:
        if value is not None and value not in values:
            raise FieldError("is not supported by this server; leave it out", code="unsupported_parameter")
        return value

    return AfterValidator(check)


def _explained(sentence: str) -> WrapValidator:
    """One sentence instead of an error for each form that a field may have."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise FieldError(sentence) from None

    return WrapValidator(check)


def _unicode(text: str) -> str:
    """JSON can write half of a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FieldError("is not valid Unicode") from None
    return text


_Unicode = Annotated[str, AfterValidator(_unicode)]
_Text = Annotated[_Unicode, Field(min_length=1)]
_Stop = Annotated[
    _Text | Annotated[list[_Text], Field(max_length=16)] | None,
    _explained("give a text or a list of up to 16 texts, none of them empty and all valid Unicode"),
]
_Prompt = Annotated[
    _Unicode | list[_Unicode] | list[int] | list[list[int]],
    _explained("give a text of valid Unicode, a list of texts, a list of token ids, or a list of such lists"),
]
_Unused = Any
"""Taken and not read: it changes nothing in the answer."""


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool | None = None
    """End with a chunk that counts the tokens."""
    include_obfuscation: Annotated[Any, _neutral(False)] = None


class TextRequest(_Body):
    """What both kinds of request have."""

    model: _Unicode
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    """1 unless given, as OpenAI has it; 0 is greedy."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    max_tokens: PositiveInt | None = None
    stop: _Stop = None
    seed: NonNegativeInt | None = None
    n: Literal[1] | None = None
    top_k: NonNegativeInt | None = None
    """Not OpenAI's: draw from so many of the most likely tokens."""
    ignore_eos: bool | None = None
    """Not OpenAI's: go on behind the token that ends a text."""

    frequency_penalty: Annotated[Any, _neutral(0)] = None
    presence_penalty: Annotated[Any, _neutral(0)] = None
    logit_bias: Annotated[Any, _neutral({})] = None
    user: _Unused = None
    metadata: _Unused = None
    service_tier: _Unused = None

    @model_validator(mode="after")
    def _options_belong_to_a_stream(self) -> TextRequest:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options is for requests with stream: true", param="stream_options")
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, max_tokens: int) -> Sampling:
        """How the text goes on.

        Args:
            max_tokens: New tokens at most.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stop,
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionRequest(TextRequest):
    """Body of `POST /v1/completions`."""

    prompt: _Prompt
    echo: bool | None = None
    """Begin the answer with the prompt."""

    logprobs: Annotated[Any, _neutral()] = None
    best_of: Annotated[Any, _neutral(1)] = None
    suffix: Annotated[Any, _neutral("")] = None

    @property
    def new_tokens(self) -> int:
        """At most so many."""
        return self.max_tokens or _COMPLETION_TOKENS

    def prompts(self) -> list[str | list[int]]:
        """Each text that is asked for, or its tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        return [tokens] if tokens else [item for item in self.prompt if not isinstance(item, int)]


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: _Unicode


class Message(_Body):
    """A message of a chat. What OpenAI's client sends back of an answer is taken, as long as it says nothing."""

    role: Literal["developer", "system", "user", "assistant"]
    content: Annotated[
        _Unicode | list[TextPart],
        _explained("give a text of valid Unicode, or parts of type text, all that this model reads"),
    ]
    name: _Unicode | None = None

    refusal: Annotated[Any, _neutral()] = None
    audio: Annotated[Any, _neutral()] = None
    annotations: Annotated[Any, _neutral([])] = None
    function_call: Annotated[Any, _neutral()] = None
    tool_calls: Annotated[Any, _neutral([])] = None

    def for_template(self) -> dict[str, str]:
        """As chat templates read it: one text; `developer`, which only OpenAI's models know, is `system`."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatRequest(TextRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: PositiveInt | None = None
    """The newer name of `max_tokens`."""

    logprobs: Annotated[Any, _neutral(False)] = None
    top_logprobs: Annotated[Any, _neutral(0)] = None
    tools: Annotated[Any, _neutral([])] = None
    tool_choice: Annotated[Any, _neutral("none")] = None
    functions: Annotated[Any, _neutral([])] = None
    function_call: Annotated[Any, _neutral("none")] = None
    response_format: Annotated[Any, _neutral({"type": "text"})] = None
    modalities: Annotated[Any, _neutral(["text"])] = None
    audio: Annotated[Any, _neutral()] = None
    prediction: Annotated[Any, _neutral()] = None
    reasoning_effort: Annotated[Any, _neutral()] = None
    verbosity: Annotated[Any, _neutral()] = None
    web_search_options: Annotated[Any, _neutral()] = None
    parallel_tool_calls: _Unused = None
    prompt_cache_key: _Unused = None
    prompt_cache_retention: _Unused = None
    safety_identifier: _Unused = None
    store: _Unused = None

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise FieldError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
        return self

    @property
    def new_tokens(self) -> int | None:
        """At most so many; None for as many as the cache has places for."""
        return self.max_completion_tokens or self.max_tokens
