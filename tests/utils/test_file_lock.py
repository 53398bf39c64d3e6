"""At most one process writes an output folder; looking at a folder never disturbs a run."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

import softprompt
from softprompt.utils.errors import OutputError
from softprompt.utils.file_lock import LOCK_FILE, FolderLock

ROOT = Path(softprompt.__file__).parent.parent
HOLD = (
    "import sys; from pathlib import Path; from softprompt.utils.file_lock import FolderLock\n"
    "lock = FolderLock(Path(sys.argv[1])).take(); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def start_holder(tmp_path):
    """Start another process that holds the folder's lock until it is killed or its stdin is closed."""
    started = []

    def start() -> subprocess.Popen:
        argv = [sys.executable, "-c", HOLD, str(tmp_path)]
        process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_lock_file_keeps_its_name():
    assert LOCK_FILE == ".softprompt.lock"  # runs of earlier versions look at this file


@pytest.mark.parametrize("attempt", [FolderLock.refuse_if_held, FolderLock.take])
def test_a_second_process_is_refused_by_the_holders_id(attempt, start_holder, tmp_path):
    holder = start_holder()
    for _ in range(2):  # a refused attempt does not erase the holder's id
        with pytest.raises(OutputError, match=rf"--output_dir {tmp_path}: process {holder.pid} "):
            attempt(FolderLock(tmp_path))
    assert FolderLock(tmp_path).is_held()


def test_a_killed_holder_blocks_nobody(start_holder, tmp_path):
    holder = start_holder()
    holder.kill()  # SIGKILL: nothing is cleaned up
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists() and not FolderLock(tmp_path).is_held()
    with FolderLock(tmp_path).take():
        assert FolderLock(tmp_path).is_held()
    assert not list(tmp_path.iterdir())


def test_release_leaves_the_lock_file_of_another_process(start_holder, tmp_path):
    first = FolderLock(tmp_path).take()
    (tmp_path / LOCK_FILE).unlink()
    start_holder()
    first.release()
    assert FolderLock(tmp_path).is_held()


def test_looking_writes_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert not FolderLock(folder).is_held()
        FolderLock(folder).refuse_if_held()
    assert not list(tmp_path.iterdir())


def test_train_refuses_in_one_line(start_holder, tmp_path):
    holder = start_holder()
    argv = [sys.executable, str(ROOT / "train.py"), "--output_dir", str(tmp_path)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: --output_dir {tmp_path}: process {holder.pid} ")
    assert len(ended.stderr.splitlines()) == 1


def test_lookers_disturb_neither_a_run_nor_each_other(tmp_path):
    """Reports look at a folder without pause, while runs start in it and end."""
    (tmp_path / LOCK_FILE).touch()  # of a run that was killed
    stop = Event()

    def look() -> int:
        looks = 0
        while not stop.is_set():
            FolderLock(tmp_path).is_held()
            looks += 1
        return looks

    with ThreadPoolExecutor(2) as pool:
        lookers = [pool.submit(look) for _ in range(2)]
        try:
            for _ in range(20):
                with FolderLock(tmp_path).take():
                    pass
        finally:
            stop.set()
        assert all(looker.result() for looker in lookers)
    assert not FolderLock(tmp_path).is_held()


def test_of_several_that_start_at_once_one_gets_the_lock(tmp_path):
    def take(_: int) -> FolderLock | None:
        try:
            return FolderLock(tmp_path).take()
        except OutputError:
            return None

    with ThreadPoolExecutor(4) as pool:
        (lock,) = [lock for lock in pool.map(take, range(4)) if lock]
    lock.release()
    assert not FolderLock(tmp_path).is_held()


def test_a_lock_file_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to("mine")
    with pytest.raises(OSError):
        FolderLock(tmp_path).take()
    assert (tmp_path / "mine").read_text() == "precious"
