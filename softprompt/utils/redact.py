"""Secrets of the environment stay out of messages, logs, model cards and crash files."""

import logging
import os
import re
from urllib.parse import urlsplit

SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)$", re.IGNORECASE)
USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/'\"]*@", re.IGNORECASE)  # https://user:password@host
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
LEAST = 6  # characters; shorter values are words like `false`, and no secrets
HIDDEN = "***"
_told: set[str] = set()  # secrets that came by another way than the environment


def add_secret(secret: str) -> None:
    """From now on `secret` is one, too."""
    _told.add(secret.strip())


def redacted(text: str) -> str:
    """The text without hub tokens, without what stands before the @ of a URL, and without the values of environment
    variables that are secret by their name or as the password of a URL."""
    text = HUB_TOKEN.sub(HIDDEN, USERINFO.sub(rf"\1{HIDDEN}@", text))
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


class RedactingFilter(logging.Filter):
    """For the handlers of libraries that log the addresses they ask."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


def _secrets() -> set[str]:
    found = _told | {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    for value in os.environ.values():
        if "://" in value and "@" in value:
            found |= _userinfo(value)
    return {secret for secret in found if len(secret) >= LEAST}


def _userinfo(url: str) -> set[str]:
    try:
        parts = urlsplit(url)
    except ValueError:
        return set()
    return {parts.password or parts.username or ""}
