"""How the ranks of one start find each other in torchrun's store, which may still hold what those of an earlier start
left. torchrun's count of restarts would not tell starts apart: each node has its own."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

LOOK = 0.2  # seconds between a rank's looks for rank 0's answer
START = "softprompt start"


def rendezvous(store: dist.Store, rank: int, size: int, patience: timedelta) -> str:
    """A name for this start, the same on every rank and never that of another.

    Rank 0 draws it, and repeats to each rank a word that it has drawn. Who reads the name of an earlier start finds its
    own word repeated there by nobody, and reads again.

    Raises:
        RuntimeError: a rank did not come (torch's, of the store).
    """
    return _invite(store, size, patience) if rank == 0 else _join(store, rank, patience)


def _invite(store: dist.Store, size: int, patience: timedelta) -> str:
    name = uuid.uuid4().hex
    store.set(START, name)
    for rank in range(1, size):
        store.wait([f"{name} {rank}"], patience)
        store.set(f"{name} {rank} heard", store.get(f"{name} {rank}"))
    return name


def _join(store: dist.Store, rank: int, patience: timedelta) -> str:
    word, ends = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    while time.monotonic() < ends:
        name = store.get(START).decode()
        store.set(f"{name} {rank}", word)
        heard = f"{name} {rank} heard"
        if store.check([heard]) and store.get(heard).decode() == word:
            return name
        time.sleep(LOOK)
    raise RuntimeError(f"rank 0 did not come within {patience}")
