"""The hub, where there may be none: one quick question instead of a minute of retries for every file."""

import logging
import os
from functools import cache

from softprompt.utils.redact import RedactingFilter, redacted

HELP = (
    "where no hub is reachable, name a local folder or file, or run the default preset, which needs no network; "
    "a mirror is set with HF_ENDPOINT=https://…, a proxy with HTTPS_PROXY"
)
TIMEOUT = 10  # seconds
LOGGERS = ("huggingface_hub", "transformers", "datasets", "httpx", "httpx2")
CERTIFICATES = ", and SSL_CERT_FILE names the certificates to trust"
_failure: str | None = None  # what came of asking the hub for a sign of life


@cache
def prepare() -> None:
    """Ask the hub (or the mirror that HF_ENDPOINT names) for a sign of life; without one, transformers and datasets
    work from their caches only, as under HF_HUB_OFFLINE=1. What they log has no secrets from now on."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    global _failure
    _failure = None
    for logger in map(logging.getLogger, LOGGERS):
        for place in (logger, *logger.handlers):
            place.addFilter(RedactingFilter())
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of httpx, of a proxy, of name resolution: in each case there is no way through
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        _failure = redacted(f"{constants.ENDPOINT} was asked: {type(error).__name__}: {reason}")


def way_out() -> str:
    """What to do where something could not be loaded from the hub; before it, why the hub did not answer, if it was
    asked."""
    if _failure is None:
        return HELP
    return f"{_failure}; {HELP}" + (CERTIFICATES if "SSL" in _failure or "CERT" in _failure else "")


def wake() -> None:
    """Hours later the hub may be there: ask it again, unless the user wants none of it."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
