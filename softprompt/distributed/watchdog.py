"""A heartbeat between the ranks, which names a rank that is lost, hangs or has ended with an error.

It also detects a lost rank whose connections stay open, and it works while the main thread waits in a collective
operation that never returns. Rank 0 watches all other ranks; these watch only rank 0, and its last message ends them.
So the store receives few requests even with a thousand ranks.
"""

import json
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from softprompt.utils.errors import SoftpromptError, Stopped
from softprompt.utils.redact import redacted

BEAT_SECONDS = 3.0  # the interval of a rank's beats and of its checks of other ranks' beats
# A rank counts as lost after this time without a beat. It is long, since one call may hold the GIL for many seconds.
SILENCE_SECONDS = 45.0
ENDED_WELL = None  # the last beat of a rank that ended without an error
LastMessage = tuple[str, int]  # the error message with which a rank ended, and its exit code


class Watchdog:
    """Two background threads that send this rank's beats and watch those of other ranks.

    They are active inside a `with` block. When a rank is silent for SILENCE_SECONDS or has ended with an error, or when
    the store does not answer, they end this process with a one-line message, whatever its main thread is doing.

    Silence is measured by the number of this process's own checks rather than by the clock, so that a process that was
    suspended does not report others as lost when it continues.

    A beat is a value that a rank writes into the store under its number: an increasing number while the rank runs, then
    ENDED_WELL or its LastMessage.
    """

    def __init__(self, store: dist.Store, rank: int, names: Sequence[str]):
        """Write the first beat. Every rank must have done this before any rank enters its `with` block.

        Args:
            store: The store of the process group; the watchdog uses a connection of its own.
            rank: This process's rank.
            names: The name of each rank in messages.
        """
        self.store = dist.PrefixStore("heartbeat", store.clone())  # the main thread may block the other connection
        self.rank, self.names = rank, names
        self.last_messages: dict[int, LastMessage] = {}  # of the ranks known to have ended with an error
        self._answers, self._silent = 0, Counter[int]()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch_ranks, self._watch_store)]
        self._write_beat(0)

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop the threads, and write this rank's last beat: its error, or ENDED_WELL."""
        with suppress(RuntimeError), self._lock:  # the store ends with the process that serves it
            self._over.set()
            self._write_beat(_last_message(error, self.rank))
        for thread in self._threads:
            thread.join(BEAT_SECONDS)

    def read_beats(self, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """Return the latest beat of each of `ranks` (default: all other ranks). Store the last messages among them in
        `last_messages`.

        Raises:
            RuntimeError: The store cannot be reached.
        """
        asked = [rank for rank in range(len(self.names)) if rank != self.rank] if ranks is None else ranks
        found = self.store.multi_get([str(rank) for rank in asked])
        beats = {rank: json.loads(beat) for rank, beat in zip(asked, found, strict=True)}
        self.last_messages |= {rank: (beat[0], beat[1]) for rank, beat in beats.items() if isinstance(beat, list)}
        return beats

    def _watch_ranks(self) -> None:
        watched = None if self.rank == 0 else [0]
        numbers, before = count(1), dict[int, Any]()
        while not self._over.wait(BEAT_SECONDS):
            with suppress(RuntimeError), self._lock:  # _watch_store handles a store that does not answer
                if self._over.is_set():
                    return
                self._write_beat(next(numbers))
                beats = self.read_beats(watched)
                self._answers += 1
                for rank, beat in beats.items():
                    silent = beat is not ENDED_WELL and beat == before.get(rank, 0)
                    self._silent[rank] = self._silent[rank] + 1 if silent else 0
                before = beats
                self._end_if_lost()

    def _end_if_lost(self) -> None:
        """End this process if a watched rank has been silent for too long.

        A rank that ended with an error is silent, too. If it is rank 0, this process ends soon. If it is another rank,
        rank 0 waits for the full SILENCE_SECONDS, because its main thread may have the same error and may be saving the
        run's state; other ranks have nothing to save.
        """
        ((rank, looks),) = self._silent.most_common(1)
        message = self.last_messages.get(rank)
        if looks * BEAT_SECONDS < (2 * BEAT_SECONDS if message and rank == 0 else SILENCE_SECONDS):
            return
        line, code = message or (f"rank {self.rank}: {self.names[rank]} has given no sign of life {_silence()}", 1)
        with suppress(RuntimeError):
            self._write_beat((line, code))
        _end_process(line if self.rank == 0 or not message else "", code)

    def _watch_store(self) -> None:
        """End this process if the store does not answer. This needs a thread of its own, because the other thread may
        wait for the answer forever."""
        before = waited = 0
        while not self._over.wait(BEAT_SECONDS):
            waited = waited + 1 if self._answers == before else 0
            before = self._answers
            if waited * BEAT_SECONDS >= SILENCE_SECONDS:
                place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                host = "" if self.rank == 0 else f", on the machine of {self.names[0]},"
                _end_process(f"rank {self.rank}: the ranks' store at {place}{host} has not answered {_silence()}", 1)

    def _write_beat(self, beat: Any) -> None:
        self.store.set(str(self.rank), json.dumps(beat))


def _last_message(error: BaseException | None, rank: int) -> LastMessage | None:
    if error is None or isinstance(error, Stopped):  # all ranks stop after the same step
        return ENDED_WELL
    text = str(error) if isinstance(error, SoftpromptError) else f"{type(error).__name__}: {error}"
    line = " ".join(text.split())
    names_rank = re.match(r"rank \d+: ", line)
    return line if names_rank else f"rank {rank}: {line}", getattr(error, "exit_code", 1)


def _silence() -> str:
    return f"for {SILENCE_SECONDS:.0f} s: it hangs, or its machine or network is lost"


def _end_process(line: str, code: int) -> NoReturn:
    """Print `line` and exit at once, using nothing that the main thread may be blocking."""
    if line:
        with suppress(OSError, AttributeError, ValueError):  # not print: the main thread may hold its lock
            start = "\n" if sys.stderr.isatty() else ""  # there may be a progress bar
            os.write(sys.stderr.fileno(), f"{start}error: {redacted(line)}\n".encode())
    with suppress(Exception):
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1)
    os._exit(code)
