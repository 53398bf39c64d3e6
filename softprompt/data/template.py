"""Render rows as prompt texts. The template is saved beside the adapter, so new questions are rendered the same way."""

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from softprompt.utils.errors import ConfigError, DataError

DEFAULT = "default"
CHAT = "chat"
PROBE = "softprompt's probe"  # a text that no template contains


@dataclass(frozen=True)
class Template:
    """A template for prompt texts.

    Args:
        spec: "default" (the article's Human/Assistant form), "chat" (the tokenizer's chat template), or a format string
            over the columns. In a format string a literal \\n, as typed in a shell, means a line break.
        optional: columns of a format string that a question may leave out, because some training rows had them empty.

    Raises:
        ConfigError: a format string has no column, has anything but plain column names in braces, or includes the
            answer.
    """

    spec: str = DEFAULT
    optional: frozenset[str] = frozenset()

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
        """The prompt's columns in order of first use; empty for chat, whose rows may have several forms."""
        if self.spec == DEFAULT:
            return ("instruction", "input")
        if self.spec == CHAT:
            return ()
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.spec) if name is not None))

    @property
    def optional_fields(self) -> frozenset[str]:
        return frozenset({"input"}) if self.spec in (DEFAULT, CHAT) else self.optional

    @property
    def second(self) -> str | None:
        """The column that a question's `input` fills: the one called input, else the second column."""
        others = (self.fields or ("instruction", "input"))[1:]
        return "input" if "input" in others else next(iter(others), None)

    def of_rows(self, rows: Sequence[Mapping[str, Any]]) -> "Template":
        """The same template; columns that are empty in some of the training rows become optional."""
        if self.spec in (DEFAULT, CHAT):
            return self
        return replace(self, optional=frozenset(n for n in self.fields if any(not row.get(n) for row in rows)))

    def row(self, prompt: str, input: str | None = None) -> dict[str, str]:
        """Make a row of a new question: `prompt` fills the template's first column, `input` its `second`.

        Raises:
            ConfigError: a column that is not optional would be empty, or the template has no column for `input`.
        """
        names, second = self.fields or ("instruction", "input"), self.second
        given = {names[0]: prompt, **({second: input} if second and input is not None else {})}
        unfilled = [n for n in names if n not in given and n not in self.optional_fields]
        if unfilled:
            raise ConfigError(
                f"the adapter's template has the columns {', '.join(names)}; {', '.join(unfilled)} would be empty: "
                "give --input where that is all ('' if it is meant to be empty), else a --prompts_file (.jsonl) with "
                "these columns"
            )
        if input and not second:
            raise ConfigError(f"--input: the adapter's template has no column for it, only {names[0]}")
        return {**dict.fromkeys(self.optional_fields, ""), **given}

    def render(self, row: Mapping[str, Any], tokenizer: Any) -> str:
        """Render the prompt text of a row.

        The tokenizer is only used for its chat template, and for eos_token after earlier answers. With another template
        than chat, a conversation (`messages`) is rendered as rows with their answers, as an exported model does.
        """
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
            return _apply_chat(tokenizer, prompt_messages(row), row.get("tools"), add_generation_prompt=True)
        text = self.spec.replace("\\n", "\n").replace("\\t", "\t")
        return text.format_map({name: row[name] for name in self.fields})

    def answer(self, row: Mapping[str, Any], tokenizer: Any, text: str | None = None) -> str:
        """The text that the model learns to produce: the row's answer (or `text` instead of it) and its end token.

        The end token is the first special token that the chat template writes after an answer; what follows it, often a
        line break, is never generated. If there is none, or one that bases are not trained to write, it is eos_token.

        Raises:
            DataError: the chat template refuses the messages, or does not continue its own generation prompt.
        """
        if self.spec != CHAT:
            return (row["output"] if text is None else text) + tokenizer.eos_token
        if text is None:
            return self._continued(row, answer_message(row), tokenizer)
        said = self._continued(row, {"role": "assistant", "content": text}, tokenizer)
        added = said.partition(text)[0].strip() if text else ""
        if added and text.startswith(
            added
        ):  # the template puts this (<think> …) before an answer, and so did the model
            return self.answer(row, tokenizer, text.removeprefix(added).strip())
        return said

    def own_answer(self, row: Mapping[str, Any]) -> str:
        """The text of a row's answer, without what the template adds."""
        return answer_message(row)["content"] if self.spec == CHAT else row["output"]

    def _continued(self, row: Mapping[str, Any], answer: Mapping[str, Any], tokenizer: Any) -> str:
        """What the chat template writes after its generation prompt for this answer, up to the end token."""
        prompt = self.render(row, tokenizer)
        whole = _apply_chat(tokenizer, [*prompt_messages(row), answer], row.get("tools"))
        if not whole.startswith(prompt):
            raise DataError(
                "the tokenizer's chat template does not continue its own generation prompt; give --template"
            )
        written, behind = whole[len(prompt) :], self._behind_answer(row, answer, tokenizer)
        if not written.endswith(behind):  # the template depends on the answer's text
            behind = written
        before, end = _split_at_end(behind, tokenizer)
        learned = end if end and end not in never_written(tokenizer) else tokenizer.eos_token
        return written.removesuffix(behind) + before + learned

    def end(self, row: Mapping[str, Any], tokenizer: Any) -> str | None:
        """The special token that the template writes after the answer; None if the chat template writes none."""
        if self.spec != CHAT:
            return tokenizer.eos_token
        return _split_at_end(self._behind_answer(row, answer_message(row), tokenizer), tokenizer)[1]

    def _behind_answer(self, row: Mapping[str, Any], answer: Mapping[str, Any], tokenizer: Any) -> str:
        """What the chat template writes after an answer's text.

        A probe replaces the text, because the answer itself may be empty or end with what looks like a special token.
        """
        probe = {**answer, "content": PROBE}
        return _apply_chat(tokenizer, [*prompt_messages(row), probe], row.get("tools")).rpartition(PROBE)[2]


def never_written(tokenizer: Any) -> set[str]:
    """Special tokens that are never targets when a base is trained, so no prompt can make it write them."""
    return {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.eos_token, None}


def saved_template(settings: Mapping[str, Any]) -> Template:
    """The template saved beside an adapter.

    Raises:
        ConfigError: see `Template`; or optional columns that the template does not have.
    """
    template, optional = Template(settings.get("template", DEFAULT)), settings.get("optional_columns", [])
    if not (isinstance(optional, list) and all(isinstance(n, str) and n in template.fields for n in optional)):
        raise ConfigError(f"optional_columns {optional!r:.200} is not a list of the template's columns")
    return replace(template, optional=frozenset(optional))


def prompt_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages before the answer, made from `messages`, `prompt`, or `instruction` and `input`."""
    if "messages" in row:
        messages = list(row["messages"])
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if "prompt" in row:
        prompt, answer = row["prompt"], row.get("completion")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return asked + answer[:-1] if isinstance(answer, list) else asked
    return [{"role": "user", "content": "\n".join([row["instruction"], row.get("input") or ""]).strip()}]


def answer_message(row: Mapping[str, Any]) -> dict[str, Any]:
    """The message that is learned, made from `messages`, `completion` or `output`."""
    if "messages" in row:
        return row["messages"][-1]
    answer = row["completion"] if "completion" in row else row["output"]
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer[-1]


@lru_cache(maxsize=16)
def _split_at_end(text: str, tokenizer: Any) -> tuple[str, str | None]:
    """Split off the special tokens (and white space) that end `text`; return the rest and the first of these tokens."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = "|".join(map(re.escape, sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)))
    found = re.search(rf"({special})(?:\s|{special})*\Z", text)
    return (text[: found.start()], found[1]) if found else (text.rstrip("\n"), None)


def _apply_chat(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **kwargs: Any
) -> str:
    if not tokenizer.chat_template:
        raise ConfigError("--template chat: this base's tokenizer has no chat template; give a format string instead")
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)
    except Exception as error:  # templates raise whatever they like, TemplateError for a forbidden role for one
        raise DataError(f"the tokenizer's chat template refuses a row: {error}") from None
    if tools:
        _check_written("tools", text, lambda: tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    if any("tool_calls" in message for message in messages):
        bare = [{key: value for key, value in each.items() if key != "tool_calls"} for each in messages]
        _check_written(
            "tool_calls", text, lambda: tokenizer.apply_chat_template(bare, tools=tools, tokenize=False, **kwargs)
        )
    return text


def _check_written(what: str, text: str, without: Callable[[], str]) -> None:
    """Raise DataError if tools or calls do not change the text: the model would not learn what the row says."""
    try:
        written = without() != text
    except Exception:  # a template may fail without them
        written = True
    if not written:
        raise DataError(
            f"the tokenizer's chat template writes no {what}; take them out of the row, or a base whose template does"
        )


def ignored_keys(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> dict[str, int]:
    """Count the rows by message keys that the chat template does not read."""
    own = tokenizer.chat_template or ""
    known = set(re.findall(r"\w+", own if isinstance(own, str) else " ".join(own.values()))) | {"role", "content"}
    found: dict[str, int] = {}
    for row in rows:
        said = [each for value in row.values() if isinstance(value, list) for each in value if isinstance(each, dict)]
        for key in {key for each in said if "role" in each for key in each} - known:
            found[key] = found.get(key, 0) + 1
    return found
