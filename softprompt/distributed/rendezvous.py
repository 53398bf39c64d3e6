"""How the ranks of one launch find each other in torchrun's store.

After a restart the store still contains the keys of the earlier attempt, and torchrun's restart count cannot tell
attempts apart, because each node counts its own restarts.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.2  # how often a rank checks for rank 0's reply
NAME_KEY = "softprompt start"


def rendezvous(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Agree on a name for this attempt that is the same on every rank and differs from that of every other attempt.

    Rank 0 draws the name. Each other rank writes a random token under that name, and rank 0 copies the token to show
    that it is alive. A rank that has read the name of an earlier attempt finds no copy of its token, and reads again.

    Args:
        store: The store of torchrun.
        rank: This process's rank.
        size: The number of ranks.
        timeout: How long to wait for the other ranks.

    Raises:
        RuntimeError: A rank did not join in time (on rank 0, torch's store raises this).
    """
    return _invite(store, size, timeout) if rank == 0 else _join(store, rank, timeout)


def _invite(store: dist.Store, size: int, timeout: timedelta) -> str:
    name = uuid.uuid4().hex
    store.set(NAME_KEY, name)
    for rank in range(1, size):
        store.wait([f"{name} {rank}"], timeout)
        store.set(f"{name} {rank} heard", store.get(f"{name} {rank}"))
    return name


def _join(store: dist.Store, rank: int, timeout: timedelta) -> str:
    token, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name = store.get(NAME_KEY).decode()
        store.set(f"{name} {rank}", token)
        reply = f"{name} {rank} heard"
        if store.check([reply]) and store.get(reply).decode() == token:
            return name
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"rank 0 did not join within {timeout}")
