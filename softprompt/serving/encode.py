"""Turn checked bodies into what the model computes: requests for answers, and examples to score."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from softprompt.data.encoding import text_ids
from softprompt.data.template import CHAT, Template
from softprompt.data.tokenization import Example, end_tokens
from softprompt.generation.adapters import LoadedAdapter
from softprompt.generation.encode_questions import EncodedQuestion, encode_question
from softprompt.generation.likelihood import answer_examples
from softprompt.generation.requests import GenerationSettings, Request, merge_settings, sample_seed
from softprompt.models.capabilities import check_positions, check_token_ids, max_positions
from softprompt.serving.args import ServeArguments
from softprompt.serving.bodies import ChatBody, ClassifyBody, CompletionBody, GenerationBody, Message
from softprompt.serving.errors import ApiError, invalid
from softprompt.utils.errors import ConfigError, DataError


class Encoder:
    """Encodes bodies for one base. It is used by one thread, because tokenizers are not thread-safe.

    Args:
        limits: The limits of prompts and answers.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: Any, limits: ServeArguments):
        self.base, self.tokenizer, self.limits = base, tokenizer, limits
        self.max_positions = max_positions(base)
        text_ids(tokenizer, ["a"])  # turns off padding that its files may turn on; later calls change nothing

    def chat(self, body: ChatBody, adapter: LoadedAdapter, seed: int) -> list[Request]:
        """Return the requests for a conversation: one for each of its `n` choices.

        Raises:
            ApiError: The adapter's template has no place for the messages, or they are too long.
        """
        asked = self._question(body.messages, adapter)
        return self._requests(body, asked.input_ids, adapter, seed, 0)

    def completion(self, body: CompletionBody, adapter: LoadedAdapter, seed: int) -> list[list[Request]]:
        """Return the requests for texts that are continued without a template: for each prompt, one for each of its `n`
        choices.

        Raises:
            ApiError: A prompt is empty, too long, or has a token that the base lacks.
        """
        prompts, encoded = body.prompts, list[list[int]]()
        for prompt in prompts:
            ids = text_ids(self.tokenizer, [prompt])[0] if isinstance(prompt, str) else list(prompt)
            if not ids:
                raise invalid("prompt", "it is empty; write something")
            self._check_tokens(ids, "prompt")
            encoded.append(ids)
        return [self._requests(body, ids, adapter, seed, number) for number, ids in enumerate(encoded)]

    def classification(self, body: ClassifyBody, adapter: LoadedAdapter) -> tuple[list[list[Example]], int]:
        """Return for each question its examples, one for each choice, and the total number of tokens of all questions.

        Raises:
            ApiError: See `chat`.
        """
        asked = [self._question(messages, adapter) for messages in body.conversations]
        ids, rows = [one.input_ids for one in asked], [one.row for one in asked]
        try:
            examples = answer_examples(ids, rows, body.choices, [adapter.template] * len(asked), self.tokenizer)
        except DataError as error:
            raise invalid("choices", str(error)) from None
        longest = max(len(example.input_ids) for some in examples for example in some)
        self._check_length(longest, "choices")
        try:
            check_positions(self.max_positions, _P(adapter), longest, "question and choice", "shorten them")
        except ConfigError as error:
            raise invalid("choices", str(error)) from None
        return examples, sum(map(len, ids))

    def _question(self, messages: Sequence[Message], adapter: LoadedAdapter) -> EncodedQuestion:
        """Render messages in the adapter's template and tokenize them."""
        template = adapter.template
        said = [
            {"role": "system" if each.role == "developer" else each.role, "content": each.text} for each in messages
        ]
        self._check_place(said, template)
        try:
            row, ids = encode_question("messages", {"messages": said}, template, self.tokenizer)
        except (ConfigError, DataError) as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        self._check_tokens(ids, "messages")
        return EncodedQuestion("messages", adapter, row, ids)

    def _check_place(self, messages: Sequence[Mapping[str, str]], template: Template) -> None:
        """Raise ApiError if the template has no place for a system message, or has columns that messages do not fill.

        Some chat templates leave system messages out without an error; then the text is the same without them.
        """
        others = [name for name in template.fields[1:] if name not in template.optional_fields]
        if others and "messages" not in template.fields:
            raise invalid(
                "messages",
                f"the adapter's template has the columns {', '.join(template.fields)}, and a message fills only the "
                "first one; write the whole text and send it to /v1/completions",
            )
        rest = [message for message in messages if message["role"] != "system"]
        if len(rest) == len(messages):
            return
        if not rest:
            raise invalid("messages", "there is a system message, but no message of the user")
        if template.spec == CHAT:
            try:
                whole, without = (template.render({"messages": some}, self.tokenizer) for some in (messages, rest))
                if whole != without:
                    return
            except (ConfigError, DataError):
                pass
        raise invalid(
            "messages",
            "the template of this adapter has no place for a system message; put its text into the message of the user",
        )

    def _requests(
        self, body: GenerationBody, input_ids: list[int], adapter: LoadedAdapter, seed: int, number: int
    ) -> list[Request]:
        """Return the requests for the choices of one prompt."""
        assert isinstance(body, ChatBody | CompletionBody)
        settings = self._settings(body, adapter)
        asked = body.max_new_tokens
        if asked is not None and asked > self.limits.max_tokens:
            raise invalid("max_tokens", f"it is above {self.limits.max_tokens}, the limit of this server")
        left = settings.max_new_tokens or settings.max_length - len(input_ids)
        if left < 1:
            raise invalid(
                "max_tokens",
                f"without it, prompt and answer together have at most {settings.max_length} tokens with this adapter, "
                f"and the prompt has {len(input_ids)}; give max_tokens",
            )
        settings = replace(settings, max_new_tokens=min(left, self.limits.max_tokens))
        requests = [
            Request(input_ids, settings, adapter.prompt, sample_seed(seed, number, sample), body.top)
            for sample in range(body.n or 1)
        ]
        try:
            requests[0].new_token_budget(self.max_positions)
        except ConfigError as error:
            raise _too_long("messages" if isinstance(body, ChatBody) else "prompt", str(error)) from None
        return requests

    def _settings(self, body: ChatBody | CompletionBody, adapter: LoadedAdapter) -> GenerationSettings:
        """Merge the fields of a body with the settings that are saved with the adapter."""
        given: dict[str, Any] = {name: getattr(body, name) for name in ("top_k", "min_p", "repetition_penalty")}
        given |= {"max_new_tokens": body.max_new_tokens, "num_beams": 1, "num_return_sequences": 1}
        if body.temperature is not None:
            greedy = body.temperature < 1e-3  # the smallest temperature of GenerationSettings
            given |= {"do_sample": not greedy, "temperature": 1.0 if greedy else body.temperature}
        if body.top_p is not None:
            given |= {"do_sample": False} if body.top_p < 1e-6 else {"top_p": body.top_p}
        try:
            return merge_settings(adapter.generation, given)
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_value") from None

    def _check_tokens(self, ids: Sequence[int], param: str) -> None:
        self._check_length(len(ids), param)
        try:
            check_token_ids(ids, self.base, param)
        except ConfigError as error:
            raise invalid(param, str(error)) from None

    def _check_length(self, tokens: int, param: str) -> None:
        if tokens > self.limits.max_prompt_tokens:
            raise _too_long(
                param,
                f"This server's maximum length of a prompt is {self.limits.max_prompt_tokens} tokens, and {param} has "
                f"{tokens}; shorten it.",
            )


def base_adapter(tokenizer: Any) -> LoadedAdapter:
    """Return the adapter that stands for the base alone: no prompt, and the tokenizer's chat template. If that is
    missing or cannot be used, it is the default template."""
    template, said = Template(CHAT), [{"role": role, "content": "a"} for role in ("user", "assistant")]
    if not tokenizer.chat_template:
        return LoadedAdapter()
    try:
        template.render({"messages": said[:1]}, tokenizer)
        ends = end_tokens([], tokenizer, template.end({"messages": said}, tokenizer))
    except DataError:
        return LoadedAdapter()
    return LoadedAdapter(None, template, {"eos_token_id": ends} if len(ends) > 1 else {})


def _too_long(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def _P(adapter: LoadedAdapter) -> int:
    return 0 if adapter.prompt is None else len(adapter.prompt)
