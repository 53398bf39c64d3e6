"""Signs of life of a run's ranks, in the store by which they met: they name who is lost, hangs or has ended, also where
no connection breaks, and where the main thread waits in a collective that never returns.

Rank 0 looks at all others, the others look at rank 0 alone, and its last word ends them: a thousand ranks ask little of
one store.
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

BEAT = 3.0  # seconds between a rank's signs, and between its looks at the others'
SILENCE = 45.0  # seconds without any, after which a rank is lost; a single call may hold Python's lock for many
ENDED_WELL = None
LastWord = tuple[str, int]  # the line with which a rank ended, and its exit code


class Watchdog:
    """Inside `with`, threads of this process give its signs and look for others'. They end it with one line, whatever
    its main thread is in, when a rank is silent for too long or ended with a fault, or when the store does not answer.

    Seconds of silence are counted in this process's own looks: one that was stopped or suspended, with all others or
    alone, accuses nobody when it wakes up."""

    def __init__(self, store: dist.Store, rank: int, names: Sequence[str]):
        """`names` are the ranks', by which messages call them."""
        self.store = dist.PrefixStore("heartbeat", store.clone())  # of its own: in the other a main thread may wait
        self.rank, self.names = rank, names
        self.words: dict[int, LastWord] = {}  # with which others ended, as far as they are known
        self._answers, self._silent = 0, Counter[int]()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._guard)]
        self._say(0)

    def __enter__(self) -> "Watchdog":
        """Every rank must have made its own before."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """What a rank leaves: its fault, or that it ended well."""
        with suppress(RuntimeError), self._lock:  # the store may have gone with who ended first
            self._over.set()
            self._say(_last_word(error, self.rank))
        for thread in self._threads:
            thread.join(BEAT)

    def look(self, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """The latest signs of some ranks, or of all others; last words among them are kept.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        asked = [rank for rank in range(len(self.names)) if rank != self.rank] if ranks is None else ranks
        found = self.store.multi_get([str(rank) for rank in asked])
        signs = {rank: json.loads(sign) for rank, sign in zip(asked, found, strict=True)}
        self.words |= {rank: (sign[0], sign[1]) for rank, sign in signs.items() if isinstance(sign, list)}
        return signs

    def _beat(self) -> None:
        watched = None if self.rank == 0 else [0]
        numbers, before = count(1), dict[int, Any]()
        while not self._over.wait(BEAT):
            with suppress(RuntimeError), self._lock:  # a store that does not answer is _guard's matter
                if self._over.is_set():
                    return
                self._say(next(numbers))
                signs = self.look(watched)
                self._answers += 1
                for rank, sign in signs.items():
                    silent = sign is not ENDED_WELL and sign == before.get(rank, 0)
                    self._silent[rank] = self._silent[rank] + 1 if silent else 0
                before = signs
                self._judge()

    def _judge(self) -> None:
        """Who ended with a fault is silent, too, and rank 0 gives itself as long to end by itself, as it may have met
        the same and be saving what it has; the others have nothing to save."""
        ((rank, looks),) = self._silent.most_common(1)
        word = self.words.get(rank)
        if looks * BEAT < (2 * BEAT if word and rank == 0 else SILENCE):
            return
        line, code = word or (f"rank {self.rank}: {self.names[rank]} has given no sign of life {_since()}", 1)
        with suppress(RuntimeError):
            self._say((line, code))
        _end(line if self.rank == 0 or not word else "", code)

    def _guard(self) -> None:
        """A thread of its own, as the other one may wait for an answer for ever."""
        before = waited = 0
        while not self._over.wait(BEAT):
            waited = waited + 1 if self._answers == before else 0
            before = self._answers
            if waited * BEAT >= SILENCE:
                place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                beside = "" if self.rank == 0 else f", on the machine of {self.names[0]},"
                _end(f"rank {self.rank}: the ranks' store at {place}{beside} has not answered {_since()}", 1)

    def _say(self, sign: Any) -> None:
        self.store.set(str(self.rank), json.dumps(sign))


def _last_word(error: BaseException | None, rank: int) -> LastWord | None:
    if error is None or isinstance(error, Stopped):  # which all do together
        return ENDED_WELL
    text = str(error) if isinstance(error, SoftpromptError) else f"{type(error).__name__}: {error}"
    line = " ".join(text.split())
    named = re.match(r"rank \d+: ", line)
    return line if named else f"rank {rank}: {line}", getattr(error, "exit_code", 1)


def _since() -> str:
    return f"for {SILENCE:.0f} s: it hangs, or its machine or network is lost"


def _end(line: str, code: int) -> NoReturn:
    """At once, by no way that the main thread could block."""
    if line:
        with suppress(OSError, AttributeError, ValueError):  # not print, for which the main thread may hold the lock
            start = "\n" if sys.stderr.isatty() else ""  # there may be a progress bar
            os.write(sys.stderr.fileno(), f"{start}error: {redacted(line)}\n".encode())
    with suppress(Exception):
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1)
    os._exit(code)
