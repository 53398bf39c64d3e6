"""One process to an output_dir."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import softprompt
from softprompt.utils.errors import OutputError
from softprompt.utils.file_lock import LOCK_FILE, FolderLock, refuse_locked

ROOT = Path(softprompt.__file__).parent.parent
HOLD = (
    "import sys, time; from pathlib import Path; from softprompt.utils.file_lock import FolderLock\n"
    "lock = FolderLock(Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_refused_until_the_first_is_gone(holder, tmp_path):
    for attempt in (refuse_locked, lambda folder: FolderLock(folder).take()):
        with pytest.raises(OutputError, match=rf"process {holder.pid} is writing a run there"):
            attempt(tmp_path)
    holder.kill()  # -9: nothing is cleaned up
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    refuse_locked(tmp_path)
    with FolderLock(tmp_path).take():
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_was_removed_holds_nobody(tmp_path):
    first = FolderLock(tmp_path).take()
    (tmp_path / LOCK_FILE).unlink()
    second = FolderLock(tmp_path).take()
    first.release()
    assert (tmp_path / LOCK_FILE).exists()  # the second's
    second.release()
    assert not (tmp_path / LOCK_FILE).exists()


def test_ranks_look_at_the_same_time(tmp_path):
    """None of them takes another for a process that writes there."""
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / LOCK_FILE).touch()
    with open(tmp_path / LOCK_FILE) as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        refuse_locked(tmp_path)


def test_train_refuses_in_one_line(holder, tmp_path):
    began = time.monotonic()
    argv = [sys.executable, str(ROOT / "train.py"), "--output_dir", str(tmp_path)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and time.monotonic() - began < 60
    line = f"error: --output_dir {tmp_path}: process {holder.pid} is writing a run there; wait for its end, or name"
    assert ended.stderr.startswith(line) and len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("looks", [1, 2])
def test_a_run_waits_until_those_who_look_have_looked(looks, tmp_path):
    """A report asks whether a run is going on, and holds the lock, shared, for that moment."""
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / LOCK_FILE).touch()
    with ExitStack() as stack:
        for seconds in (0.2, 0.4)[:looks]:
            looker = stack.enter_context(open(tmp_path / LOCK_FILE))
            fcntl.flock(looker, fcntl.LOCK_SH)
            threading.Timer(seconds, fcntl.flock, (looker, fcntl.LOCK_UN)).start()
        with FolderLock(tmp_path).take():
            pass


def test_of_two_that_begin_at_once_one_runs(tmp_path):
    def take() -> FolderLock | None:
        try:
            return FolderLock(tmp_path).take()
        except OutputError:
            return None

    for _ in range(20):
        with ThreadPoolExecutor(4) as pool:
            locks = [lock for lock in pool.map(lambda _: take(), range(4)) if lock]
        assert len(locks) == 1
        locks[0].release()


def test_a_lock_is_no_link_to_another_file(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to("mine")
    with pytest.raises(OSError):
        FolderLock(tmp_path).take()
    assert (tmp_path / "mine").read_text() == "precious"
