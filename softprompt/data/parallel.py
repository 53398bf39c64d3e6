"""Map a function over items in several processes; results keep the order of the items."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from softprompt.utils.errors import DataError

Item, Result, Common = TypeVar("Item"), TypeVar("Result"), TypeVar("Common")
QUEUED_ITEMS = 4  # the most items per worker that are queued or in progress; limits memory


def map_in_processes(
    function: Callable[[Common, Item], Result], common: Common, items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yield `function(common, item)` for every item, in the items' order; `common` is sent to each worker only once.

    On Linux, workers are forked, so that scripts without `if __name__ == "__main__"` work, too. An error of `function`
    is raised when the result of its item is due.

    Raises:
        DataError: A worker was killed.
    """
    method = "fork" if sys.platform == "linux" else None  # forking is not safe on macOS, and absent on Windows
    left = iter(items)
    with _no_threads_of_tokenizers():
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, (function, common))
        try:
            waiting = deque(pool.submit(_work, item) for item in islice(left, QUEUED_ITEMS * workers))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(_work, item) for item in islice(left, 1))
                yield result
        except BrokenProcessPool:
            raise DataError(
                f"--preprocessing_num_workers {workers}: a worker process was killed, perhaps for lack of memory; "
                "give fewer workers, or leave the flag out"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _no_threads_of_tokenizers() -> Iterator[None]:
    """Disable the threads of the library tokenizers, which cannot use them in a forked process and would warn."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_worker: list[Any] = []  # in a worker process: `function` and `common` of `map_in_processes`


def _start_worker(function: Callable[..., Any], common: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker[:] = [function, common]


def _end_with_parent() -> None:
    """End this worker when its parent has ended; otherwise it would wait for its next item forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _work(item: Any) -> Any:
    function, common = _worker
    return function(common, item)
