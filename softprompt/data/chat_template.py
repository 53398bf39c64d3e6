"""The tokenizer's chat template: the messages of a row, what the template writes for them, and what ends an answer."""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from softprompt.utils.errors import ConfigError, DataError


def never_written(tokenizer: Any) -> set[str]:
    """Return the special tokens that are never targets when a base is trained, so that no prompt can make the base
    generate them."""
    return {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.eos_token, None}


def prompt_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages before the answer, made from `messages`, `prompt`, or `instruction` and `input`."""
    if "messages" in row:
        messages = list(row["messages"])
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if "prompt" in row:
        prompt, answer = row["prompt"], row.get("completion")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return asked + answer[:-1] if isinstance(answer, list) else asked
    return [{"role": "user", "content": "\n".join([row["instruction"], row.get("input") or ""]).strip()}]


def answer_message(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message that is learned, made from `messages`, `completion` or `output`."""
    if "messages" in row:
        return row["messages"][-1]
    answer = row["completion"] if "completion" in row else row["output"]
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer[-1]


@lru_cache(maxsize=16)
def _split_at_end(text: str, tokenizer: Any) -> tuple[str, str | None]:
    """Remove the special tokens and white space at the end of `text`. Return the rest, and the first of these tokens or
    None."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = "|".join(map(re.escape, sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)))
    found = re.search(rf"({special})(?:\s|{special})*\Z", text)
    return (text[: found.start()], found[1]) if found else (text.rstrip("\n"), None)


def _apply_chat(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    today: str | None = None,
    **kwargs: Any,
) -> str:
    """Return what the tokenizer's chat template writes. `today` is the date (YYYY-MM-DD) that it sees; None is the
    current one."""
    if not tokenizer.chat_template:
        raise ConfigError("--template chat: this base's tokenizer has no chat template; give a format string instead")
    try:
        if today:
            kwargs["chat_template"] = _with_date(tokenizer.get_chat_template(tools=tools), today)
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)
    except Exception as error:  # a template may raise any error, such as TemplateError for a role
        raise DataError(f"the tokenizer's chat template refuses a row: {error}") from None
    if tools:
        _check_written("tools", text, lambda: tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    if any("tool_calls" in message for message in messages):
        bare = [{key: value for key, value in each.items() if key != "tool_calls"} for each in messages]
        _check_written(
            "tool_calls", text, lambda: tokenizer.apply_chat_template(bare, tools=tools, tokenize=False, **kwargs)
        )
    return text


# A call of transformers' function with which chat templates write the current date.
STRFTIME_NOW = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


def _with_date(template: str, today: str) -> str:
    """Return a chat template in which each call strftime_now("FORMAT") is replaced by the formatted date `today`.

    The function itself cannot be replaced: transformers passes only plain data to templates. A call whose format is not
    a literal is left as it is.
    """
    day = datetime.fromisoformat(today)
    return STRFTIME_NOW.sub(lambda call: call["quote"] + day.strftime(call["format"]) + call["quote"], template)


def _check_written(what: str, text: str, without: Callable[[], str]) -> None:
    """Raise DataError if the rendered text is the same without the tools or tool calls of the row, because the model
    would not learn them."""
    try:
        written = without() != text
    except Exception:  # a template may fail without them
        written = True
    if not written:
        raise DataError(
            f"the tokenizer's chat template writes no {what}; take them out of the row, or use a base whose chat "
            "template writes them"
        )


def ignored_keys(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> dict[str, int]:
    """Return the message keys that the chat template does not read, each with the number of rows that have it."""
    own = tokenizer.chat_template or ""
    known = set(re.findall(r"\w+", own if isinstance(own, str) else " ".join(own.values()))) | {"role", "content"}
    found: dict[str, int] = {}
    for row in rows:
        said = [each for value in row.values() if isinstance(value, list) for each in value if isinstance(each, dict)]
        for key in {key for each in said if "role" in each for key in each} - known:
            found[key] = found.get(key, 0) + 1
    return found
