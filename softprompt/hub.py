"""The hub, where there may be none: one quick question instead of a minute of retries for every file."""

import logging
import os
from functools import cache

from softprompt.redact import Redacting

HELP = (
    "where no hub is reachable, name a local folder or file, or run the default preset, which needs no network; "
    "a mirror is set with HF_ENDPOINT=https://…, a proxy with HTTPS_PROXY"
)
TIMEOUT = 10  # seconds
LOGGERS = ("huggingface_hub", "transformers", "datasets", "httpx")


@cache
def prepare() -> None:
    """Ask the hub (or the mirror that HF_ENDPOINT names) for a sign of life; without one, transformers and datasets
    work from their caches only, as under HF_HUB_OFFLINE=1. What they log has no secrets from now on."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    for handler in [h for name in LOGGERS for h in logging.getLogger(name).handlers]:
        handler.addFilter(Redacting())
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # of httpx, of a proxy, of name resolution: in each case there is no way through
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def wake() -> None:
    """Hours later the hub may be there: ask it again, unless the user wants none of it."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
