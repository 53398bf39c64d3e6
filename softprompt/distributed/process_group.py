"""The ranks of a run: joining the process group, and the collective operations of a run.

torchrun starts the processes; its environment variables are the only configuration. Training divides the rows of each
optimizer step among the ranks and sums their gradients.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from softprompt.distributed.rendezvous import rendezvous
from softprompt.distributed.watchdog import SILENCE_SECONDS, Watchdog
from softprompt.utils.errors import OtherRankError, SoftpromptError, TrainingError
from softprompt.utils.out_of_memory import is_out_of_memory
from softprompt.utils.std_streams import null_stream

T = TypeVar("T")
RENDEZVOUS_TIMEOUT = timedelta(minutes=30)  # how long to wait for ranks that have not started yet
# A rank may legitimately be late by hours (it may read hundreds of GB); the watchdog detects lost ranks much sooner.
COLLECTIVE_TIMEOUT = timedelta(hours=6)
GRACE_SECONDS = 5.0  # how long to wait, after a failed collective, for the system to report a local process as dead


class StopSource(Protocol):
    """Something that may ask the run to stop, such as a signal or a time limit."""

    @property
    def exit_code(self) -> int | None:
        """The exit code to stop with; None to continue."""
        ...


class World:
    """This process as one rank of a run, with the collective operations. Without torchrun it is rank 0 of 1.

    Every rank must call each collective operation, in the same order.

    Attributes:
        rank, size: This process's rank, and the number of ranks.
        agreed_exit_code: The exit code that all ranks agreed to stop with after the current step; None to continue.
        members: Host name and process id of every rank, by rank; empty for a single process.
        store: The store through which the ranks met; None for a single process.
        watchdog: Detects lost ranks while `process_group` is open; None for a single process.
        reduce_device: Where `all_reduce` and `broadcast` run: the rank's GPU with NCCL, else the CPU with Gloo.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.agreed_exit_code: int | None = None
        self.members: list[Any] = []
        self.store: dist.Store | None = None
        self.watchdog: Watchdog | None = None
        self.reduce_device = torch.device("cpu")
        self._stop_source: StopSource | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def exit_code(self) -> int | None:
        """As a `StopSource`: what all ranks agreed on in the reduction of the last step."""
        return self.agreed_exit_code

    def share_stop_request(self, source: StopSource) -> StopSource:
        """Register this rank's stop source, and return a stop source on which all ranks agree. For a single process it
        is `source` itself."""
        self._stop_source = source
        return source if self.size == 1 else self

    def requested_exit_code(self) -> int | None:
        """Return the exit code with which this rank asks to stop; None to continue."""
        return self._stop_source.exit_code if self._stop_source else None

    def all_gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, by rank. Values must be serializable as JSON.

        `torch.distributed.all_gather_object` would do the same with pickle.
        """
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self.collective(lambda: dist.all_gather(sizes, torch.tensor([len(content)])))
        longest = int(max(sizes))
        gathered = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.cat([content, content.new_zeros(longest - len(content))])
        self.collective(lambda: dist.all_gather(gathered, padded))
        return [json.loads(bytes(one[: int(n)].tolist())) for one, n in zip(gathered, sizes, strict=True)]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on the tensor's device and bit-identical on every rank."""
        if self.size == 1:
            return values
        total = values.to(self.reduce_device)
        self.collective(lambda: dist.all_reduce(total))
        return total.to(values.device)

    def broadcast(self, value: Tensor) -> Tensor:
        """Return rank 0's tensor; `value` has the same shape and dtype on every rank."""
        if self.size == 1:
            return value
        received = value.to(self.reduce_device, copy=True)
        self.collective(lambda: dist.broadcast(received, src=0))
        return received.to(value.device)

    def run_on_all(self, do: Callable[[], T]) -> T:
        """Call `do` on every rank, and return this rank's result once all ranks have succeeded.

        Raises:
            SoftpromptError: On rank 0, if `do` failed there: its error.
            OtherRankError: In all other cases in which `do` failed on some rank; the message is that of the lowest
                rank on which it failed.
        """
        fault: SoftpromptError | None = None
        try:
            result = do()
        except SoftpromptError as error:
            fault = error
        faults = self.all_gather([str(fault), fault.exit_code] if fault else None)
        first = next((rank for rank, error in enumerate(faults) if error), None)
        if first is None:
            return result
        if self.is_main and fault:
            raise fault
        message, code = faults[first]
        raise OtherRankError(f"rank {first}: {message}", code)

    def collective(self, communicate: Callable[[], T]) -> T:
        """Call `communicate`, a collective operation of torch, and return its result.

        Raises:
            TrainingError: It failed; the message names the rank that died, or says that memory ran out.
            OtherRankError: It failed because another rank ended with an error.
        """
        try:
            return communicate()
        except RuntimeError as error:  # includes DistBackendError
            if is_out_of_memory(error):
                raise TrainingError(
                    f"rank {self.rank}: out of memory in a collective operation; give a smaller "
                    "--tokens_per_microbatch, or start more ranks"
                ) from None
            raise self._lost_rank(shorten(str(error).splitlines()[0], 160, placeholder=" …")) from None

    def _lost_rank(self, reason: str) -> SoftpromptError:
        """Find out which rank broke a collective operation, and return the error that names it.

        There are three sources: the last message that a rank left in the store, which is available at once; the process
        table, which shows within seconds that a rank of this machine is dead; and, for ranks of other machines, the
        watchdog, which then ends this process itself.
        """
        local = [(rank, pid) for rank, (host, pid) in enumerate(self.members) if host == platform.node()]
        other_hosts = sorted({host for host, _ in self.members} - {platform.node()})
        if self.watchdog:
            with suppress(RuntimeError):
                self.watchdog.read_beats()
        deadline = time.monotonic() + (2 * SILENCE_SECONDS if self.watchdog and other_hosts else GRACE_SECONDS)
        while time.monotonic() < deadline:
            if self.watchdog and self.watchdog.last_messages:
                return OtherRankError(*next(iter(self.watchdog.last_messages.values())))
            if dead := [f"rank {rank} (process {pid})" for rank, pid in local if not _is_running(pid)]:
                return TrainingError(f"rank {self.rank}: {', '.join(dead)} died ({reason})")
            time.sleep(0.1)
        where = ", ".join(other_hosts) or "this machine"
        return TrainingError(f"rank {self.rank}: a rank on {where} does not answer ({reason})")


@contextmanager
def process_group() -> Iterator[World]:
    """Join the process group at the beginning of the block, and leave it at the end.

    Inside the block only rank 0 prints to stdout, and the watchdog ends the other ranks when a rank is lost.
    """
    world = init_world()
    with ExitStack() as stack:
        if world.store:
            names = [f"rank {rank} (host {host}, process {pid})" for rank, (host, pid) in enumerate(world.members)]
            watchdog = Watchdog(world.store, world.rank, names)
            world.all_gather("watchdog created")
            world.watchdog = stack.enter_context(watchdog)
        if not world.is_main:
            stack.enter_context(redirect_stdout(stack.enter_context(null_stream())))
        yield world
    if world.store:
        dist.destroy_process_group()


def init_world() -> World:
    """Initialize torch's process group from torchrun's environment variables; every rank must call this.

    Returns:
        The world; rank 0 of 1 without torchrun. If a process group exists already, its rank and size.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        return World(*((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ()))
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local_rank % gpus)
    own_gpu = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # NCCL refuses two ranks on one GPU
    world = World(rank, size)
    store, _, _ = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    store = dist.PrefixStore(rendezvous(store, rank, size, RENDEZVOUS_TIMEOUT), store)
    use_nccl = true_on_all_ranks(store, rank, size, own_gpu)
    backend = "cpu:gloo,cuda:nccl" if use_nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    if use_nccl:
        world.reduce_device = torch.device("cuda", local_rank)
    world.members, world.store = world.all_gather([platform.node(), os.getpid()]), store
    return world


def true_on_all_ranks(store: dist.Store, rank: int, size: int, value: bool) -> bool:
    """Return whether `value` is true on every rank; wait for all of them.

    Used to choose the backend before there is a process group: nodes may differ, and ranks with different backends
    would wait for each other forever.
    """
    store.set(f"own gpu {rank}", str(int(value)))
    return all(found == b"1" for found in store.multi_get([f"own gpu {other}" for other in range(size)]))


def _is_running(pid: int) -> bool:
    """Return whether a process of this machine is alive; a zombie is not."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return not Path("/proc/self").exists()  # with /proc, the process ended between the two checks
