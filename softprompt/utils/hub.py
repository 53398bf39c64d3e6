"""Find out by one quick request whether the Hugging Face hub can be reached, instead of a minute of retries per file.

huggingface_hub has an offline mode, but does not turn it on by itself.
"""

import logging
import os
from functools import cache

from softprompt.utils.errors import first_line
from softprompt.utils.redact import RedactingFilter, redacted

HELP = (
    "without a reachable hub, name a local folder or file, or run the default preset, which needs no network; "
    "set a mirror with HF_ENDPOINT=https://…, or a proxy with HTTPS_PROXY"
)
TIMEOUT = 10  # seconds
LOGGERS = ("huggingface_hub", "transformers", "datasets", "httpx", "httpx2")
CERTIFICATES = ", and SSL_CERT_FILE names the certificates to trust"
_failure: str | None = None  # why the hub could not be reached, if that was tested


@cache
def check_reachable() -> None:
    """Test once whether the hub (or the mirror in HF_ENDPOINT) can be reached.

    If not, transformers and datasets use their caches only, as with HF_HUB_OFFLINE=1. From now on, secrets are redacted
    from what these libraries log.
    """
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
    except Exception as error:  # from httpx, a proxy or name resolution: whatever it is, the hub cannot be reached
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        _failure = redacted(f"no answer from {constants.ENDPOINT}: {type(error).__name__}: {first_line(error)}")


def advice() -> str:
    """Return what the user can do about a failed download, preceded by why the hub did not answer, if known."""
    if _failure is None:
        return HELP
    return f"{_failure}; {HELP}" + (CERTIFICATES if "SSL" in _failure or "CERT" in _failure else "")


def go_online() -> None:
    """Leave the offline mode of `check_reachable`, unless the user has set HF_HUB_OFFLINE. Hours later, the hub may be
    reachable again."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
