"""The ranks of one launch agree on a new name, whatever earlier launches left in the store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Event

import pytest
import torch.distributed as dist

from softprompt.distributed import rendezvous as rendezvous_module
from softprompt.distributed.process_group import true_on_all_ranks
from softprompt.distributed.rendezvous import NAME_KEY, rendezvous

SIZE = 3


def start(store, late=None):
    """Start all ranks at once, but rank `late` only after the others have read the store."""
    begun = Event()

    def rank(number):
        if number == late:
            begun.wait(0.5)
        return rendezvous(store, number, SIZE, timedelta(seconds=20))

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(rank, range(SIZE)))


@pytest.mark.parametrize("late", [None, 0, 1])
def test_every_launch_has_its_own_name(late):
    store, names = dist.HashStore(), []
    for _ in range(3):
        found = start(store, late)
        assert len(set(found)) == 1
        names += found[:1]
    assert len(set(names)) == 3


def test_a_launch_in_which_a_rank_died_is_not_joined_again(monkeypatch):
    """The store contains the name and the replies of a launch whose rank 0 has died."""
    store = dist.HashStore()
    store.set(NAME_KEY, "dead")
    store.set("dead 1", "of a process that is gone")
    store.set("dead 1 heard", "of a process that is gone")
    monkeypatch.setattr(rendezvous_module, "POLL_SECONDS", 0.01)
    found = start(store, late=0)
    assert len(set(found)) == 1 and found[0] != "dead"


def test_a_rank_that_never_comes():
    store = dist.HashStore()
    with pytest.raises(RuntimeError):
        rendezvous(store, 0, 2, timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match="rank 0 did not join within"):
        rendezvous(store, 1, 2, timedelta(seconds=0.5))


@pytest.mark.parametrize("own_gpu", [[True] * 3, [True, False, True], [False] * 3])
def test_ranks_agree_on_a_backend_though_their_nodes_differ(own_gpu):
    """A rank without its own GPU cannot use NCCL, so no rank may wait for it there."""
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=200))

    def rank(number):
        mine = dist.TCPStore("localhost", store.port, timeout=timedelta(seconds=200))
        return true_on_all_ranks(dist.PrefixStore("start", mine), number, 3, own_gpu[number])

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(rank, range(3))) == [all(own_gpu)] * 3
