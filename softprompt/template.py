"""How a row becomes prompt text. The same object renders training rows and, saved beside the adapter, new prompts."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.errors import ConfigError, DataError

DEFAULT = "default"
CHAT = "chat"


@dataclass(frozen=True)
class Template:
    """`spec` is "default" (the article's Human/Assistant form), "chat" (the tokenizer's chat template), or a format
    string over the columns. In a format string typed in a shell, a literal \\n means a line break.

    Raises:
        ConfigError: a format string without a column, with anything but plain column names in its braces, or with the
            answer among them.
    """

    spec: str = DEFAULT

    def __post_init__(self) -> None:
        if self.spec in (DEFAULT, CHAT):
            return
        if not isinstance(self.spec, str):
            raise ConfigError(f"template {self.spec!r} is not a text")
        try:
            parts = list(string.Formatter().parse(self.spec))
        except ValueError as error:
            raise ConfigError(f"--template {self.spec!r} is not a format string: {error}") from None
        names = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
        # Only plain names: {row.__class__} and the like would let a downloaded template reach into Python objects.
        if not names or any(not name.isidentifier() or spec or conversion for name, spec, conversion in names):
            raise ConfigError(
                f"--template {self.spec!r} must be `chat` or hold columns as plain names, "
                "like 'Q: {instruction}\\nA: '"
            )
        if "output" in self.fields:
            raise ConfigError(
                f"--template {self.spec!r}: the answer follows the prompt by itself; leave {{output}} out"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """Columns of the prompt, in order of first use; none for chat, whose rows may take several forms."""
        if self.spec == DEFAULT:
            return ("instruction", "input")
        if self.spec == CHAT:
            return ()
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.spec) if name is not None))

    @property
    def optional_fields(self) -> frozenset[str]:
        return frozenset({"input"}) if self.spec in (DEFAULT, CHAT) else frozenset()

    def row(self, prompt: str, input: str = "") -> dict[str, str]:
        """A new question as a row: `prompt` is the template's first column, `input` that of this name or the second.

        Raises:
            ConfigError: the template has more columns than that, or none for `input`.
        """
        names = self.fields or ("instruction", "input")
        second = "input" if "input" in names[1:] else "".join(names[1:2])
        unfilled = [n for n in names[1:] if n != second or not (input or n in self.optional_fields)]
        if unfilled:
            raise ConfigError(
                f"the adapter's template has the columns {', '.join(names)}; {', '.join(unfilled)} would be empty: "
                "give --input where that is all, else a --prompts_file (.jsonl) with these columns"
            )
        if input and not second:
            raise ConfigError(f"--input: the adapter's template has no column for it, only {names[0]}")
        return {names[0]: prompt, **({second: input} if second else {})}

    def render(self, row: Mapping[str, Any], tokenizer: Any) -> str:
        """Prompt text of a row; `tokenizer` is asked only by the chat template, and for the end of earlier answers. A
        conversation (`messages`) is one row with its answer after the other, as in an exported model."""
        if self.spec != CHAT and "messages" in row and "messages" not in self.fields:
            return "".join(
                message["content"] + tokenizer.eos_token
                if message["role"] == "assistant"
                else self.render(self.row(message["content"]), tokenizer)
                for message in row["messages"]
            )
        if self.spec == DEFAULT:
            return "\n".join(["Human: " + row["instruction"], row.get("input") or ""]).strip() + "\n\nAssistant: "
        if self.spec == CHAT:
            return _apply_chat(tokenizer, prompt_messages(row), add_generation_prompt=True)
        text = self.spec.replace("\\n", "\n").replace("\\t", "\t")
        return text.format_map({name: row[name] for name in self.fields})

    def answer(self, row: Mapping[str, Any], tokenizer: Any, text: str | None = None) -> str:
        """Text that the model is to produce, its end mark included: the row's own answer, or `text` in its place.

        Raises:
            DataError: a chat template that refuses the messages, or does not continue its own generation prompt.
        """
        if self.spec != CHAT:
            return (row["output"] if text is None else text) + tokenizer.eos_token
        if text is None:
            return self._continued(row, answer_message(row), tokenizer)
        said = self._continued(row, {"role": "assistant", "content": text}, tokenizer)
        added = said.partition(text)[0].strip() if text else ""
        if added and text.startswith(added):  # generated text has what the template puts before an answer (<think> …)
            return self.answer(row, tokenizer, text.removeprefix(added).strip())
        return said

    def own_answer(self, row: Mapping[str, Any]) -> str:
        """The text of a row's answer as the row has it."""
        return answer_message(row)["content"] if self.spec == CHAT else row["output"]

    def _continued(self, row: Mapping[str, Any], answer: Mapping[str, str], tokenizer: Any) -> str:
        """What a chat template puts behind its generation prompt for this answer."""
        prompt = self.render(row, tokenizer)
        whole = _apply_chat(tokenizer, [*prompt_messages(row), answer])
        if not whole.startswith(prompt):
            raise DataError(
                "the tokenizer's chat template does not continue its own generation prompt; give --template"
            )
        # Many templates end a turn with a line break after the end mark; the model stops at the mark.
        return whole[len(prompt) :].rstrip("\n")


def prompt_messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Messages before the answer, from `messages`, from `prompt`, or from `instruction` and `input`."""
    if "messages" in row:
        messages = list(row["messages"])
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if "prompt" in row:
        prompt, answer = row["prompt"], row.get("completion")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return asked + answer[:-1] if isinstance(answer, list) else asked
    return [{"role": "user", "content": "\n".join([row["instruction"], row.get("input") or ""]).strip()}]


def answer_message(row: Mapping[str, Any]) -> dict[str, str]:
    """The message to be learned, from `messages`, `completion` or `output`."""
    if "messages" in row:
        return row["messages"][-1]
    answer = row["completion"] if "completion" in row else row["output"]
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer[-1]


def _apply_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], **kwargs: Any) -> str:
    if not tokenizer.chat_template:
        raise ConfigError("--template chat: this base's tokenizer has no chat template; give a format string instead")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs)
    except Exception as error:  # templates raise whatever they like, TemplateError for a forbidden role for one
        raise DataError(f"the tokenizer's chat template refuses a row: {error}") from None
