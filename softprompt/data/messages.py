"""Convert conversations to the form that chat templates take: a list of messages with role and content.

The known forms are OpenAI's messages (with tool_calls, and contents that are null or lists of text parts) and
ShareGPT's conversations (from, value). Either may be a dict of lists instead of a list of dicts, as datasets stores
them.
"""

import json
from collections.abc import Mapping
from typing import Any

from softprompt.config.schema import is_text
from softprompt.utils.errors import DataError

Message = dict[str, Any]  # role and content are texts; other keys are for the chat template and have JSON types
CONVERSATIONS = ("messages", "conversations", "conversation")  # columns
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a checked row: its columns, and the contents of its messages."""
    contents = [
        each.get("content") for v in row.values() if isinstance(v, list) for each in v if isinstance(each, dict)
    ]
    return [text for text in (*row.values(), *contents) if isinstance(text, str)]


def messages(where: str, name: str, value: Any, least: int, ends_with_answer: bool) -> list[Message]:
    """Convert the conversation in column `name`, which must have at least `least` messages.

    Raises:
        DataError: The value is not such a conversation, a message lacks a key, or `ends_with_answer` is True and the
            last message is not the assistant's.
    """
    listed = _listed(value)
    number, end = f"{least} or more ", " that ends with the assistant's" if ends_with_answer else ""
    if not isinstance(listed, list) or len(listed) < least or not all(isinstance(each, dict) for each in listed):
        raise DataError(f"{where}: {name!r} must be a list of {number}{{role, content}} messages{end}")
    found = [
        _message(f"{where}: {name!r}, message {at}", each, ends_with_answer and at == len(listed))
        for at, each in enumerate(listed, start=1)
    ]
    if ends_with_answer and found[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: {name!r} must be a list of {number}{{role, content}} messages{end}, because the last message is "
            f"the answer to learn; its role is {found[-1]['role']!r:.40}"
        )
    return found


def tools(where: str, value: Any) -> list[dict[str, Any]]:
    """Return the tool descriptions of a row, given as a list or as JSON text of a list; empty if there are none.

    Raises:
        DataError: The value is neither.
    """
    found = _parsed(value) if isinstance(value, str) else value
    if not found:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise DataError(f"{where}: 'tools' must be a list of objects, or the JSON of one")
    return [_json_able(each) for each in found]


def _listed(value: Any) -> Any:
    """Convert a dict of lists, one list per key of the messages, to a list of dicts; return any other value as it
    is."""
    if not isinstance(value, dict) or not value or not all(isinstance(each, list) for each in value.values()):
        return value
    if len({len(each) for each in value.values()}) != 1:
        return value
    return [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]


def _message(where: str, given: Mapping[str, Any], is_answer: bool) -> Message:
    rest = {key: _json_able(value) for key, value in given.items() if value is not None}
    if "role" not in rest and is_text(rest.get("from")):
        sender = rest.pop("from")
        if sender not in SHAREGPT_ROLES:
            raise DataError(f"{where} is from {sender!r:.40}; expected one of {', '.join(SHAREGPT_ROLES)}")
        rest |= {"role": SHAREGPT_ROLES[sender], "content": rest.pop("value", None)}
    role, content = rest.pop("role", None), rest.pop("content", None)
    if not (is_text(role) and role):
        raise DataError(f"{where} must have a text for its 'role' (or 'from'); its keys are {', '.join(given)}")
    calls = rest.pop("tool_calls", None)
    if content is None and calls is not None and (calls or not is_answer):
        content = ""  # OpenAI's messages with tool calls have no content, which a chat template would render as "None"
    text = _text(where, content)
    return {"role": role, "content": text, **({"tool_calls": _calls(where, calls)} if calls else {}), **rest}


def _text(where: str, content: Any) -> str:
    """Return the text of a message's content, which is a text or a list of text parts; the parts are concatenated."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if _is_text_part(part) else part for part in parts]
    if wrong := [part for part, text in zip(parts, texts, strict=True) if not is_text(text)]:
        found = wrong[0].get("type", "object") if isinstance(wrong[0], dict) else describe_type(wrong[0])
        what = f"a part of type {found!r:.40}" if isinstance(wrong[0], dict) else found
        raise DataError(f"{where}: its content must be a text, or a list of text parts, found {what}")
    return "".join(texts)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text"


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Return tool calls with parsed arguments, as chat templates expect them; OpenAI's form has arguments as JSON
    text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}: its tool_calls must be a list of objects")
    return [_call({key: value for key, value in call.items() if value is not None}) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    arguments = _parsed(call["arguments"]) if isinstance(call.get("arguments"), str) else None
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _parsed(text: str) -> Any:
    """Parse JSON; return the text itself if it is not JSON."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text


def _json_able(value: Any) -> Any:
    """Return the value if JSON can represent it, else its text, for example of a date in a parquet file."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


def describe_type(value: Any) -> str:
    """Describe the type of a value for error messages."""
    names = {
        type(None): "null",
        bool: "true/false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    if isinstance(value, str):
        return "a text" if is_text(value) else "half a character (one surrogate of a pair)"
    return names.get(type(value), type(value).__name__)
