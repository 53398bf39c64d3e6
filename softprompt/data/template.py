"""Render rows as prompt texts. The template is saved beside the adapter, so new questions are rendered the same way."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softprompt.data.chat_template import _apply_chat, _split_at_end, answer_message, never_written, prompt_messages
from softprompt.utils.errors import ConfigError, DataError

DEFAULT = "default"
HUMAN, ASSISTANT = "Human: ", "\n\nAssistant: "  # what the default template puts around a question
CHAT = "chat"
PROBE = "softprompt's probe"  # a text that no template contains, put in the place of an answer


@dataclass(frozen=True)
class Template:
    """A template for prompt texts.

    Args:
        spec: "default" (the article's Human/Assistant form), "chat" (the tokenizer's chat template), or a format string
            over the columns. In a format string the two characters \\n, as typed in a shell, mean a line break, and \\t
            a tab.
        optional: Columns of a format string that a question may omit, because they were empty in some training rows.
        date: The date (YYYY-MM-DD) for chat templates that write the current one; None is today's.

    Raises:
        ConfigError: A format string has no column, has something other than plain column names in braces, or includes
            the answer.
    """

    spec: str = DEFAULT
    optional: frozenset[str] = frozenset()
    date: str | None = None

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
        # Only plain names are allowed: fields such as {row.__class__} would let a downloaded template read attributes
        # of Python objects.
        if not names or any(not name.isidentifier() or spec or conversion for name, spec, conversion in names):
            raise ConfigError(
                f"--template {self.spec!r} must be `chat` or hold columns as plain names, "
                "like 'Q: {instruction}\\nA: '"
            )
        if "output" in self.fields:
            raise ConfigError(
                f"--template {self.spec!r}: the answer is appended to the prompt automatically; leave {{output}} out"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """The prompt's columns in order of first use; empty for chat, whose rows may have several forms."""
        if self.spec == DEFAULT:
            return ("instruction", "input")
        if self.spec == CHAT:
            return ()
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.spec) if name is not None))

    @property
    def optional_fields(self) -> frozenset[str]:
        """The columns that a question may leave out."""
        return frozenset({"input"}) if self.spec in (DEFAULT, CHAT) else self.optional

    @property
    def second(self) -> str | None:
        """The column that a question's `input` fills: the one called input, else the second column."""
        others = (self.fields or ("instruction", "input"))[1:]
        return "input" if "input" in others else next(iter(others), None)

    def of_rows(self, rows: Sequence[Mapping[str, Any]]) -> "Template":
        """Return the same template, in which the columns that are empty in some training rows are optional."""
        if self.spec in (DEFAULT, CHAT):
            return self
        return replace(self, optional=frozenset(n for n in self.fields if any(not row.get(n) for row in rows)))

    def row(self, prompt: str, input: str | None = None) -> dict[str, str]:
        """Make a row from a new question: `prompt` fills the template's first column, `input` its column `second`.

        Raises:
            ConfigError: A column that is not optional would be empty, or the template has no column for `input`.
        """
        names, second = self.fields or ("instruction", "input"), self.second
        given = {names[0]: prompt, **({second: input} if second and input is not None else {})}
        unfilled = [n for n in names if n not in given and n not in self.optional_fields]
        if unfilled:
            raise ConfigError(
                f"the template has the columns {', '.join(names)}; {', '.join(unfilled)} would be empty: give rows "
                f"with these columns (.jsonl); in infer.py, --input (in a chat, /input; '' leaves it empty) fills "
                f"{second}"
            )
        if input and not second:
            raise ConfigError(f"--input: the adapter's template has no column for it, only {names[0]}; leave it out")
        return {**dict.fromkeys(self.optional_fields, ""), **given}

    def render(self, row: Mapping[str, Any], tokenizer: Any) -> str:
        """Render the prompt text of a row.

        The tokenizer is used only for its chat template, and for its eos_token after earlier answers. If the template
        is not "chat", a conversation (`messages`) is rendered as a sequence of rows, each with its answer; the chat
        template of an exported model does the same. A message of the user may have an `input`, the text for the column
        `second`.
        """
        if self.spec != CHAT and "messages" in row and "messages" not in self.fields:
            return "".join(
                message["content"] + tokenizer.eos_token
                if message["role"] == "assistant"
                else self.render(self.row(message["content"], message.get("input")), tokenizer)
                for message in row["messages"]
            )
        if self.spec == DEFAULT:
            return "\n".join([HUMAN + row["instruction"], row.get("input") or ""]).strip() + ASSISTANT
        if self.spec == CHAT:
            return self._chat(row, prompt_messages(row), tokenizer, add_generation_prompt=True)
        text = self.spec.replace("\\n", "\n").replace("\\t", "\t")
        return text.format_map({name: row[name] for name in self.fields})

    def answer(self, row: Mapping[str, Any], tokenizer: Any, text: str | None = None) -> str:
        """Return the text that the model learns to produce: the row's answer, or `text` in its place, and an end token.

        If the template is not "chat", the end token is eos_token. A chat template's end token is the first special
        token that it writes after an answer; what follows that token, often a line break, is left out. If it writes no
        special token, or one that bases are not trained to write, the end token is eos_token.

        Raises:
            DataError: The chat template refuses the messages, or does not continue its own generation prompt.
        """
        if self.spec != CHAT:
            return (row["output"] if text is None else text) + tokenizer.eos_token
        if text is None:
            return self._continued(row, answer_message(row), tokenizer)
        said = self._continued(row, {"role": "assistant", "content": text}, tokenizer)
        added = said.partition(text)[0].strip() if text else ""
        if added and text.startswith(added):
            # The template puts this (<think> …) before an answer, and so did the model.
            return self.answer(row, tokenizer, text.removeprefix(added).strip())
        return said

    def own_answer(self, row: Mapping[str, Any]) -> str:
        """Return the text of a row's answer, without anything that the template adds."""
        return answer_message(row)["content"] if self.spec == CHAT else row["output"]

    def _continued(self, row: Mapping[str, Any], answer: Mapping[str, Any], tokenizer: Any) -> str:
        """Return what the chat template writes for this answer after its generation prompt, up to the end token."""
        prompt = self.render(row, tokenizer)
        whole = self._chat(row, [*prompt_messages(row), answer], tokenizer)
        if not whole.startswith(prompt):
            raise DataError(
                "the tokenizer's chat template does not continue its own generation prompt; give --template a format "
                "string"
            )
        written, behind = whole[len(prompt) :], self._behind_answer(row, answer, tokenizer)
        if not written.endswith(behind):  # the template depends on the answer's text
            behind = written
        before, end = _split_at_end(behind, tokenizer)
        learned = end if end and end not in never_written(tokenizer) else tokenizer.eos_token
        return written.removesuffix(behind) + before + learned

    def end(self, row: Mapping[str, Any], tokenizer: Any) -> str | None:
        """Return the special token that the template writes after the answer; None if a chat template writes none."""
        if self.spec != CHAT:
            return tokenizer.eos_token
        return _split_at_end(self._behind_answer(row, answer_message(row), tokenizer), tokenizer)[1]

    def _behind_answer(self, row: Mapping[str, Any], answer: Mapping[str, Any], tokenizer: Any) -> str:
        """Return what the chat template writes after an answer's text.

        PROBE replaces the text, because the answer itself may be empty or may end with the text of a special token.
        """
        probe = {**answer, "content": PROBE}
        return self._chat(row, [*prompt_messages(row), probe], tokenizer).rpartition(PROBE)[2]

    def _chat(
        self,
        row: Mapping[str, Any],
        messages: list[dict[str, Any]],
        tokenizer: Any,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return what the chat template writes for `messages`, with the tools of the row."""
        return _apply_chat(
            tokenizer, messages, row.get("tools"), self.date, add_generation_prompt=add_generation_prompt
        )


def saved_template(settings: Mapping[str, Any]) -> Template:
    """Return the template from the settings that were saved beside an adapter.

    Raises:
        ConfigError: The template is malformed (see `Template`), or lacks one of the optional columns.
    """
    template, optional = Template(settings.get("template", DEFAULT)), settings.get("optional_columns", [])
    if not (isinstance(optional, list) and all(isinstance(n, str) and n in template.fields for n in optional)):
        raise ConfigError(f"optional_columns {optional!r:.200} is not a list of the template's columns")
    return replace(template, optional=frozenset(optional))


def without_default_template(text: str) -> str:
    """Return a rendered question without what the default template puts around it, and without white space at its
    ends."""
    return text.removeprefix(HUMAN).rstrip().removesuffix(ASSISTANT.strip()).strip()
