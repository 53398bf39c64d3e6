"""Several processes, one run: torchrun's ranks deal out the rows of each step and add up their gradients.

There is no launcher here and no other way to start: what torchrun puts into the environment is all that is read.
"""

import heapq
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from softprompt.distributed.rendezvous import rendezvous
from softprompt.distributed.watchdog import SILENCE, Watchdog
from softprompt.utils.errors import OtherRankError, SoftpromptError, TrainingError
from softprompt.utils.out_of_memory import is_out_of_memory
from softprompt.utils.std_streams import null_stream

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # for a rank that has yet to come
WORK = timedelta(hours=6)  # for one that is late, and may read hundreds of GB; who is lost, the heartbeat tells sooner
GRACE = 5.0  # seconds in which the system tells that a process is dead


class StopSource(Protocol):
    """To stop, with an exit code."""

    @property
    def exit_code(self) -> int | None: ...


class AgreedStop:
    """What all ranks have agreed on, which is what one of them wished before the last step's reduction."""

    def __init__(self, world: "World"):
        self.world = world

    @property
    def exit_code(self) -> int | None:
        return self.world.agreed_exit_code


class World:
    """This process among the `size` of a run; alone, rank 0 of 1, where there is no torchrun."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.wish: Callable[[], int | None] = lambda: None  # this rank's, to stop with an exit code
        self.agreed: int | None = None
        self.roll: list[Any] = []  # host and process of every rank
        self.store: dist.Store | None = None
        self.heartbeat: Watchdog | None = None
        self.reduces_on = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, request: StopSource) -> StopSource:
        """This rank's wish becomes one of all; alone it is the agreement."""
        self.wish = lambda: request.exit_code
        return request if self.size == 1 else AgreedStop(self)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, by rank."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self.together(lambda: dist.all_gather(sizes, torch.tensor([len(content)])))
        longest = int(max(sizes))
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        mine = torch.cat([content, content.new_zeros(longest - len(content))])
        self.together(lambda: dist.all_gather(found, mine))
        return [json.loads(bytes(f[: int(n)].tolist())) for f, n in zip(found, sizes, strict=True)]

    def add_up(self, numbers: Tensor) -> Tensor:
        """The sum over ranks of a vector, on its device and the same bits on every rank."""
        if self.size == 1:
            return numbers
        total = numbers.to(self.reduces_on)
        self.together(lambda: dist.all_reduce(total))
        return total.to(numbers.device)

    def from_main(self, value: Tensor) -> Tensor:
        """Rank 0's tensor, which has the same shape and dtype on every rank."""
        if self.size == 1:
            return value
        told = value.to(self.reduces_on, copy=True)
        self.together(lambda: dist.broadcast(told, src=0))
        return told.to(value.device)

    def agree(self, do: Callable[[], T]) -> T:
        """What `do` returns here, if it succeeds on every rank. Else rank 0 raises the first error, and the others end
        with it."""
        fault: SoftpromptError | None = None
        try:
            result = do()
        except SoftpromptError as error:
            fault = error
        told = self.gather([str(fault), fault.exit_code] if fault else None)
        first = next((rank for rank, error in enumerate(told) if error), None)
        if first is None:
            return result
        if self.is_main and fault:
            raise fault
        message, code = told[first]
        raise OtherRankError(f"rank {first}: {message}", code)

    def together(self, communicate: Callable[[], T]) -> T:
        """What the ranks' communication returns.

        Raises:
            TrainingError: it broke off; the message names the rank that died.
            Elsewhere: it broke off because a rank ended with a fault.
        """
        try:
            return communicate()
        except RuntimeError as error:  # DistBackendError is one
            if is_out_of_memory(error):
                raise TrainingError(
                    f"rank {self.rank}: out of memory for what the ranks exchange; give a smaller "
                    "--tokens_per_microbatch, or share the work out among more of them"
                ) from None
            raise self._missing(shorten(str(error).splitlines()[0], 160, placeholder=" …")) from None

    def _missing(self, why: str) -> SoftpromptError:
        """Who does not answer. What a rank said at its end is known at once, of ranks on this machine the system knows
        it within moments, and of the others the heartbeat, which then ends this process."""
        here = [(rank, pid) for rank, (host, pid) in enumerate(self.roll) if host == platform.node()]
        others = sorted({host for host, _ in self.roll} - {platform.node()})
        if self.heartbeat:
            with suppress(RuntimeError):
                self.heartbeat.look()
        ends = time.monotonic() + (2 * SILENCE if self.heartbeat and others else GRACE)
        while time.monotonic() < ends:
            if self.heartbeat and self.heartbeat.words:
                return OtherRankError(*next(iter(self.heartbeat.words.values())))
            if gone := [f"rank {rank} (process {pid})" for rank, pid in here if not _runs(pid)]:
                return TrainingError(f"rank {self.rank}: {', '.join(gone)} died ({why})")
            time.sleep(0.1)
        where = ", ".join(others) or "this machine"
        return TrainingError(f"rank {self.rank}: a rank on {where} does not answer ({why})")


def init_world() -> World:
    """The world that torchrun's environment describes; every rank must call this."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        return World(*((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ()))
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    cards = torch.cuda.device_count()
    if cards:
        torch.cuda.set_device(local % cards)
    own_card = cards >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # NCCL takes no two ranks of one card
    world = World(rank, size)
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(rendezvous(store, rank, size, PATIENCE), store)
    own_cards = true_on_all_ranks(store, rank, size, own_card)
    backend = "cpu:gloo,cuda:nccl" if own_cards else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WORK)
    if own_cards:
        world.reduce_device = torch.device("cuda", local)
    world.members, world.store = world.all_gather([platform.node(), os.getpid()]), store
    return world


def true_on_all_ranks(store: dist.Store, rank: int, size: int, mine: bool) -> bool:
    """Whether it is so of every rank: nodes may differ, and ranks that exchanged their sums in different ways would
    wait for each other for ever. Waits for all of them."""
    store.set(f"own card {rank}", str(int(mine)))
    return all(found == b"1" for found in store.multi_get([f"own card {other}" for other in range(size)]))


@contextmanager
def process_group() -> Iterator[World]:
    """The world, in which only rank 0 prints, and a rank that is lost ends the others. Who ends well parts from the
    others in good order."""
    world = init_world()
    with ExitStack() as stack:
        if world.store:
            names = [f"rank {rank} (host {host}, process {pid})" for rank, (host, pid) in enumerate(world.members)]
            heartbeat = Watchdog(world.store, world.rank, names)
            world.all_gather("all have theirs")
            world.watchdog = stack.enter_context(heartbeat)
        if not world.is_main:
            stack.enter_context(redirect_stdout(stack.enter_context(null_stream())))
        yield world
    if world.store:
        dist.destroy_process_group()


def assign_rows(costs: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the rows of each of `size` ranks, so that their costs are about equal: the most costly first, each to
    the rank that has least (Graham 1969, doi:10.1137/0117039). The same on every rank."""
    hands: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]  # a heap: the least first, of equal ones the lowest rank
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        load, rank = loads[0]
        hands[rank].append(row)
        heapq.heapreplace(loads, (load + costs[row], rank))
    return hands


def select(rows: Sequence[T], numbers: Iterable[int]) -> list[T]:
    return [rows[number] for number in numbers]


def _runs(pid: int) -> bool:
    with suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return not Path("/proc/self").exists()  # where there is no /proc, it does run
