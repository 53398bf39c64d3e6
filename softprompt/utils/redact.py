"""Redaction of secrets in messages, logs, model cards and crash reports."""

import logging
import os
import re
from urllib.parse import urlsplit

SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)$", re.IGNORECASE)
USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/'\"]*@", re.IGNORECASE)  # https://user:password@host
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
MIN_LENGTH = 6  # characters; shorter values, such as `false`, are not secrets
HIDDEN = "***"
_added: set[str] = set()  # secrets that are not in the environment


def add_secret(secret: str) -> None:
    """Redact `secret`, such as a token that was given by a flag, from now on."""
    _added.add(secret.strip())


def redacted(text: str) -> str:
    """Return the text with secrets replaced by ***.

    Secrets are hub tokens, the user and password in a URL, environment variables whose name marks a secret (such as
    *_TOKEN or *_PASSWORD), passwords in URLs in any environment variable, and what was given to `add_secret`.
    """
    text = HUB_TOKEN.sub(HIDDEN, USERINFO.sub(rf"\1{HIDDEN}@", text))
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


class RedactingFilter(logging.Filter):
    """A logging filter that redacts records, for libraries that log the URLs of their requests."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


def _secrets() -> set[str]:
    found = _added | {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    for value in os.environ.values():
        if "://" in value and "@" in value:
            found |= _userinfo(value)
    return {secret for secret in found if len(secret) >= MIN_LENGTH}


def _userinfo(url: str) -> set[str]:
    try:
        parts = urlsplit(url)
    except ValueError:
        return set()
    return {parts.password or parts.username or ""}
