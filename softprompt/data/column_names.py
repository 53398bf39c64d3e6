"""Name the columns of rows in error messages, and guess which of them a template's missing columns are."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

MAX_LISTED = 20  # columns listed in a message
# Names that datasets use for our columns, the commonest first. They are only suggested, never taken.
USUAL_NAMES = {
    "instruction": (
        *("question", "query", "prompt", "input", "text", "sentence", "review", "content", "context", "source"),
        *("问题", "文本", "评论", "内容"),
    ),
    "output": (
        *("answer", "response", "completion", "label", "target", "sentiment", "category", "summary", "reply"),
        *("回答", "答案", "标签"),
    ),
}


def describe_columns(row: Mapping[str, Any]) -> str:
    """Describe the columns of a row for an error message. Names are quoted, since they may contain any character."""
    names = ", ".join(map(repr, list(row)[:MAX_LISTED]))
    if len(row) > MAX_LISTED:
        return f"the columns are {names} and {len(row) - MAX_LISTED:,} more"
    return f"the columns are {names}" if row else "there are no columns"


def columns_hint(missing: Iterable[str], row: Mapping[str, Any], used: Collection[str]) -> str:
    """Return a clause with the --columns that would name the `missing` columns: a guess where the row has a column of a
    usual name, else THEIRS.

    Args:
        used: The columns that the row has under our names.
    """
    free = {name.lower(): name for name in row if name not in used}
    pairs = []
    for ours in missing:
        usual = next((name for name in USUAL_NAMES.get(ours, ()) if name in free), None)
        theirs = free.pop(usual) if usual else "THEIRS"
        pairs.append(f"{ours}={theirs}")
    return f" (--columns {','.join(pairs)} names {'another column' if len(pairs) == 1 else 'other columns'})"
