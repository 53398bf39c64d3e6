"""The ranks of a start meet under a name of their own, whatever earlier starts have left in the store."""

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
    """All ranks at once, but that `late` one only when the others have looked."""
    begun = Event()

    def rank(number):
        if number == late:
            begun.wait(0.5)
        return rendezvous(store, number, SIZE, timedelta(seconds=20))

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(rank, range(SIZE)))


@pytest.mark.parametrize("late", [None, 0, 1])
def test_every_start_has_a_name_of_its_own(late):
    store, names = dist.HashStore(), []
    for _ in range(3):
        found = start(store, late)
        assert len(set(found)) == 1
        names += found[:1]
    assert len(set(names)) == 3


def test_a_start_in_which_a_rank_died_is_not_met_again(monkeypatch):
    """Rank 2 answers an invitation that rank 0 does not live to repeat; the next start has other processes."""
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
    with pytest.raises(RuntimeError, match="rank 0 did not come within"):
        rendezvous(store, 1, 2, timedelta(seconds=0.5))


@pytest.mark.parametrize("cards", [[True] * 3, [True, False, True], [False] * 3])
def test_ranks_agree_on_how_they_exchange_their_sums_though_their_nodes_differ(cards):
    """Rank 1's node has no card of its own for it: no rank may wait for it in NCCL."""
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=20))

    def rank(number):
        mine = dist.TCPStore("localhost", store.port, timeout=timedelta(seconds=20))
        return true_on_all_ranks(dist.PrefixStore("start", mine), number, 3, cards[number])

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(rank, range(3))) == [all(cards)] * 3
