"""Parsers of settings that are written as structured text: columns, class labels, durations, dates."""

import contextlib
import json
import re
from datetime import date

from softprompt.config.schema import is_text
from softprompt.utils.errors import ConfigError


def parse_columns(text: str | None) -> dict[str, str]:
    """Parse `instruction=question,output=answer`, or such a JSON object, to {"instruction": "question", …}.

    Raises:
        ConfigError: `text` is neither, or names a column twice.
    """
    pairs = _json_pairs(text) if str(text).lstrip().startswith("{") else _plain_pairs(text)
    if pairs is None or not all(ours and is_text(theirs) for ours, theirs in pairs):
        raise ConfigError(
            f"--columns {text!r} is not a list of OURS=THEIRS pairs such as instruction=question,output=answer, nor a "
            """JSON object such as {"instruction": "question"}"""
        )
    if len({ours for ours, _ in pairs}) < len(pairs):
        raise ConfigError(f"--columns {text!r} names one of our columns twice; give each once")
    return dict(pairs)


def _plain_pairs(text: str | None) -> list[tuple[str, str]] | None:
    """Return the pairs of an OURS=THEIRS list, or None if it is malformed."""
    pairs = [pair.split("=", 1) for pair in (text or "").split(",") if pair.strip()]
    if any(len(pair) != 2 or not pair[1].strip() for pair in pairs):
        return None
    return [(ours.strip(), theirs.strip()) for ours, theirs in pairs]


def _json_pairs(text: str | None) -> list[tuple[str, str]] | None:
    """Return the pairs of a JSON object, or None if it is malformed."""
    try:
        return json.loads(str(text), object_pairs_hook=list)
    except ValueError:
        return None


def parse_labels(text: str) -> list[str]:
    """Split `正面,负面` into ["正面", "负面"]; the Chinese comma also separates labels."""
    return [label.strip() for label in re.split("[,，]", text)]


def parse_date(text: str | None) -> date | None:
    """Return the date in the text, written as 2026-01-31; None if there is no text.

    Raises:
        ConfigError: The text is not a date.
    """
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if (found := date.fromisoformat(text)).isoformat() == text:
            return found
    raise ConfigError(f"--chat_template_date {text!r} is not a date such as 2026-01-31")


def parse_duration(text: str) -> float:
    """Convert a time such as `3h30m`, `45m`, `90s`, or a number of minutes, to seconds.

    Raises:
        ConfigError: `text` is not such a time, or it is zero.
    """
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text) if not text.isdecimal() else None
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 60 * int(text) if text.isdecimal() else 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise ConfigError(f"--max_time {text!r} is not a time such as 3h30m, 45m, 90s or a number of minutes")
    return float(total)
