"""How a row becomes prompt text. The same object renders training rows and, saved beside the adapter, new prompts."""

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from softprompt.utils.errors import ConfigError, DataError

DEFAULT = "default"
CHAT = "chat"
PROBE = "softprompt's probe"  # a text that no template writes by itself


@dataclass(frozen=True)
class Template:
    """`spec` is "default" (the article's Human/Assistant form), "chat" (the tokenizer's chat template), or a format
    string over the columns. In a format string typed in a shell, a literal \\n means a line break. `optional` are
    columns of a format string that may be left out of a question, as they were empty in some training rows.

    Raises:
        ConfigError: a format string without a column, with anything but plain column names in its braces, or with the
            answer among them.
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
        """Columns of the prompt, in order of first use; none for chat, whose rows may take several forms."""
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
        """The column that a question's `input` fills: that of this name, else the second."""
        others = (self.fields or ("instruction", "input"))[1:]
        return "input" if "input" in others else next(iter(others), None)

    def of_rows(self, rows: Sequence[Mapping[str, Any]]) -> "Template":
        """The same, with the columns optional that are empty in some of the training rows."""
        if self.spec in (DEFAULT, CHAT):
            return self
        return replace(self, optional=frozenset(n for n in self.fields if any(not row.get(n) for row in rows)))

    def row(self, prompt: str, input: str | None = None) -> dict[str, str]:
        """A new question as a row: `prompt` is the template's first column, `input` its `second`.

        Raises:
            ConfigError: the template has more columns than are given and may be left out, or none for `input`.
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
            return _apply_chat(tokenizer, prompt_messages(row), row.get("tools"), add_generation_prompt=True)
        text = self.spec.replace("\\n", "\n").replace("\\t", "\t")
        return text.format_map({name: row[name] for name in self.fields})

    def answer(self, row: Mapping[str, Any], tokenizer: Any, text: str | None = None) -> str:
        """Text that the model is to produce, with the special token that ends it: the row's own answer, or `text` in
        its place. That token is the first of those that the chat template writes behind an answer (what follows it,
        often a line break, is never generated). Where that is none, or one that no base is trained to write, it is
        eos_token.

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

    def _continued(self, row: Mapping[str, Any], answer: Mapping[str, Any], tokenizer: Any) -> str:
        """What a chat template puts behind its generation prompt for this answer."""
        prompt = self.render(row, tokenizer)
        whole = _apply_chat(tokenizer, [*prompt_messages(row), answer], row.get("tools"))
        if not whole.startswith(prompt):
            raise DataError(
                "the tokenizer's chat template does not continue its own generation prompt; give --template"
            )
        written, behind = whole[len(prompt) :], self._behind_answer(row, answer, tokenizer)
        if not written.endswith(behind):  # a template that looks at the answer's text
            behind = written
        before, end = _split_at_end(behind, tokenizer)
        learned = end if end and end not in never_written(tokenizer) else tokenizer.eos_token
        return written.removesuffix(behind) + before + learned

    def end(self, row: Mapping[str, Any], tokenizer: Any) -> str | None:
        """The special token that stands behind the answer to a row; None where the chat template writes none there."""
        if self.spec != CHAT:
            return tokenizer.eos_token
        return _split_at_end(self._behind_answer(row, answer_message(row), tokenizer), tokenizer)[1]

    def _behind_answer(self, row: Mapping[str, Any], answer: Mapping[str, Any], tokenizer: Any) -> str:
        """What the chat template writes behind the text of an answer. Another text stands in its place: its own may be
        empty, or end with what looks like a special token."""
        probe = {**answer, "content": PROBE}
        return _apply_chat(tokenizer, [*prompt_messages(row), probe], row.get("tools")).rpartition(PROBE)[2]


def never_written(tokenizer: Any) -> set[str]:
    """Special tokens that are no targets in the training of a base, so that no prompt can make it write them."""
    return {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.eos_token, None}


def saved_template(settings: Mapping[str, Any]) -> Template:
    """The template that stands beside an adapter.

    Raises:
        ConfigError: as of `Template`, or optional columns that it does not have.
    """
    template, optional = Template(settings.get("template", DEFAULT)), settings.get("optional_columns", [])
    if not (isinstance(optional, list) and all(isinstance(n, str) and n in template.fields for n in optional)):
        raise ConfigError(f"optional_columns {optional!r:.200} is not a list of the template's columns")
    return replace(template, optional=frozenset(optional))


def prompt_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages before the answer, from `messages`, from `prompt`, or from `instruction` and `input`."""
    if "messages" in row:
        messages = list(row["messages"])
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if "prompt" in row:
        prompt, answer = row["prompt"], row.get("completion")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return asked + answer[:-1] if isinstance(answer, list) else asked
    return [{"role": "user", "content": "\n".join([row["instruction"], row.get("input") or ""]).strip()}]


def answer_message(row: Mapping[str, Any]) -> dict[str, Any]:
    """The message to be learned, from `messages`, `completion` or `output`."""
    if "messages" in row:
        return row["messages"][-1]
    answer = row["completion"] if "completion" in row else row["output"]
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer[-1]


@lru_cache(maxsize=16)
def _split_at_end(text: str, tokenizer: Any) -> tuple[str, str | None]:
    """`text` up to the special tokens that end it, white space between them aside, and the first of these."""
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
    """Raises DataError where a row's tools or calls leave no trace in its text, which would teach something else."""
    try:
        written = without() != text
    except Exception:  # a template may not do without
        written = True
    if not written:
        raise DataError(
            f"the tokenizer's chat template writes no {what}; take them out of the row, or a base whose template does"
        )


def ignored_keys(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> dict[str, int]:
    """Keys of messages that the chat template does not read, each with the number of rows that have it."""
    own = tokenizer.chat_template or ""
    known = set(re.findall(r"\w+", own if isinstance(own, str) else " ".join(own.values()))) | {"role", "content"}
    found: dict[str, int] = {}
    for row in rows:
        said = [each for value in row.values() if isinstance(value, list) for each in value if isinstance(each, dict)]
        for key in {key for each in said if "role" in each for key in each} - known:
            found[key] = found.get(key, 0) + 1
    return found
