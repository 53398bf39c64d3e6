"""The bodies of requests: their fields, types and ranges, as in OpenAI's API.

OpenAI refuses fields that its API does not have, and so does this server. A field of OpenAI's API that has no effect on
an answer (`user`, `metadata`, …) is ignored. A field that asks for something that this server cannot do (`tools`,
`logit_bias`, …) is refused, unless its value has no effect.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from softprompt.serving.errors import ApiError, invalid

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]
Texts = Annotated[
    list[str], Field(fail_fast=True)
]  # a body of a megabyte may have very many items: stop at the first wrong one
MAX_ROWS = 2048  # the largest number of messages of a conversation, and of questions of /v1/classify
MAX_CHOICES = 128  # the largest n, as at OpenAI, and the largest number of choices of /v1/classify


def _union(accepted: str) -> WrapValidator:
    """Report a value that no type of a union accepts with what they accept together. Pydantic reports each type's
    faults alone, which the sender of another type of the union cannot use."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("union", "it must be {accepted}", {"accepted": accepted}) from None

    return WrapValidator(validate)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """The options of a stream. `include_obfuscation` is accepted and ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(_Body):
    """The fields that requests for answers have in common. None means that a field is not given.

    `top_k`, `min_p` and `repetition_penalty` are not OpenAI's; they mean what they mean in infer.py.
    """

    no_effect: ClassVar[dict[str, tuple[Any, ...]]] = {  # values that have no effect, by field
        "presence_penalty": (0, None),
        "frequency_penalty": (0, None),
        "logit_bias": ({}, None),
    }

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=4)] | None,
        _union("a text of 1 to 1,000 characters, or a list of up to four of them"),
    ] = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1000)] | None = None

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that reports the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Check what the types of the fields do not express.

        Raises:
            ApiError: Fields contradict each other, or ask for something that the server cannot do.
        """
        for name, allowed in self.no_effect.items():
            if getattr(self, name) not in allowed:
                message = f"Unsupported parameter: '{name}' is not supported by this server."
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        if self.stream_options and not self.stream:
            raise invalid("stream_options", "it is only allowed when 'stream' is true")


class Part(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[Part], Field(fail_fast=True)],
        _union('a text, or a list of parts of the form {"type": "text", "text": "…"}'),
    ]
    name: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """The message's text; the parts of its content are concatenated."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_ROWS, fail_fast=True)]


class ChatBody(GenerationBody):
    """The body of POST /v1/chat/completions."""

    no_effect: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationBody.no_effect,
        **dict.fromkeys(("tools", "functions"), (None, [])),
        "tool_choice": (None, "none", "auto"),
        "function_call": (None, "none", "auto"),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        **dict.fromkeys(("audio", "prediction", "web_search_options", "reasoning_effort", "verbosity"), (None,)),
    }

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Any = None
    functions: Any = None
    tool_choice: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """The limit that the request sets for an answer, in tokens; None if it sets none."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """See `Request.top_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """See `GenerationBody.check`."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "it is only allowed when 'logprobs' is true")
        if self.max_tokens and self.max_completion_tokens:
            raise invalid("max_tokens", "give either 'max_tokens' or 'max_completion_tokens', not both")


class CompletionBody(GenerationBody):
    """The body of POST /v1/completions."""

    no_effect: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationBody.no_effect,
        "suffix": (None, ""),
        "echo": (None, False),
    }

    prompt: Annotated[
        str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)],
        _union("a text, a list of texts, a list of token ids, or a list of lists of token ids"),
    ]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def max_new_tokens(self) -> int:
        """The limit of an answer in tokens."""
        return self.max_tokens or 16  # OpenAI's default

    @property
    def top(self) -> int | None:
        """See `Request.top_logprobs`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    def check(self) -> None:
        """See `GenerationBody.check`."""
        super().check()
        if not self.prompts:
            raise invalid("prompt", "it is an empty list")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid("best_of", "only the value of 'n' is supported")


class ClassifyBody(_Body):
    """The body of POST /v1/classify: a question as `messages`, or questions as `input`, and the choices."""

    model: str
    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=MAX_CHOICES)]
    messages: Messages | None = None
    input: Annotated[
        str | Annotated[Texts, Field(min_length=1, max_length=MAX_ROWS)] | None,
        _union(f"a text, or a list of 1 to {MAX_ROWS:,} texts"),
    ] = None
    user: str | None = None

    @property
    def conversations(self) -> list[list[Message]]:
        """The questions as conversations."""
        if self.messages is not None:
            return [self.messages]
        texts = [self.input] if isinstance(self.input, str) else self.input or []
        return [[Message(role="user", content=text)] for text in texts]

    def check(self) -> None:
        """Raise ApiError if not exactly one of `messages` and `input` is given, or a choice is blank or not unique."""
        if (self.messages is None) == (self.input is None):
            raise invalid("messages", "give either 'messages' or 'input'")
        if len(set(self.choices)) < len(self.choices) or not all(map(str.strip, self.choices)):
            raise invalid("choices", "they must be different texts, none of them blank")


class AdapterBody(_Body):
    """The body of POST /v1/adapters."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^/\\\x00-\x1f]+$")]
    folder: Annotated[str, Field(min_length=1, max_length=1000)]

    def check(self) -> None:
        """Do nothing: the types of the fields check everything."""


BodyType = TypeVar("BodyType", ChatBody, CompletionBody, ClassifyBody, AdapterBody)


def parse_body(kind: type[BodyType], values: Any) -> BodyType:
    """Check a parsed JSON body.

    Raises:
        ApiError: A field is missing, unknown, of a wrong type or out of range, or `kind.check` refuses the values.
    """
    try:
        body = kind.model_validate(values)
    except ValidationError as error:
        raise _described(error) from None
    body.check()
    return body


def _described(error: ValidationError) -> ApiError:
    """Return the first validation error as an ApiError, whose message does not quote the value."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    shown = [str(part)[:100].encode(errors="replace").decode() for part in fault["loc"]]
    of_list = [isinstance(part, int) for part in fault["loc"]]
    param = ".".join(f"[{part}]" if index else part for part, index in zip(shown, of_list, strict=True)) or "body"
    if fault["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    return invalid(param, fault["msg"])
