"""A rank that is lost, hangs or fails ends the others with a message that names it; living ranks are not accused."""

import json
import multiprocessing
import os
import platform
import signal
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from helpers import watched

ROOT = Path(__file__).parents[2]
SILENCE = 2.0  # seconds


@pytest.fixture(scope="module")
def forks():
    """A fork server that has imported everything, so that processes start quickly."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.watched", "softprompt.training.run"])
    with pytest.MonkeyPatch.context() as patch:  # older Pythons do not pass sys.path on
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(forks, tmp_path):
    """Start a store and ranks that run a function; return their processes once all ranks are ready."""
    started = []

    def begin(size, main, *given, silence=SILENCE, until_ready=True):
        here, there = forks.Pipe()
        store = forks.Process(target=watched.store, args=(there,))
        store.start()
        started.append(store)
        port = here.recv()
        ranks = [
            forks.Process(target=watched.rank, args=(n, size, port, tmp_path, silence, main, *given))
            for n in range(size)
        ]
        started.extend(ranks)
        for process in ranks:
            process.start()
        while until_ready and not all((tmp_path / f"ready-{n}").exists() for n in range(size)):
            assert all(process.is_alive() for process in ranks), told(tmp_path, *range(size))
            time.sleep(0.05)
        return store, *ranks

    yield begin
    for process in started:
        process.kill()
        process.join()


def told(folder, *ranks):
    return [(folder / f"err-{n}").read_text() for n in ranks]


def ended(*processes):
    """Wait for processes; return their exit codes, and the seconds that it took."""
    began = time.monotonic()
    for process in processes:
        process.join(200)
    return [process.exitcode for process in processes], time.monotonic() - began


def lost(rank, process):
    name = f"rank {rank} (host {platform.node()}, process {process.pid})"
    return f"{name} has given no sign of life for 2 s: it hangs, or its machine or network is lost\n"


def test_a_stopped_rank_ends_the_others(start, tmp_path):
    """Rank 0 names it, though its main thread is in a collective that never returns, and ends the others."""
    _, *ranks = start(3, watched.waits, 0)
    os.kill(ranks[2].pid, signal.SIGSTOP)
    codes, seconds = ended(*ranks[:2])
    assert codes == [1, 1] and seconds > SILENCE / 2
    assert told(tmp_path, 0, 1) == [f"error: rank 0: {lost(2, ranks[2])}", ""]
    assert (tmp_path / "out-0").read_text() == "told before\n"


def test_a_stopped_rank_0_ends_the_others(start, tmp_path):
    """When it wakes up, it prints the same message."""
    _, *ranks = start(2, watched.waits, 1)
    os.kill(ranks[0].pid, signal.SIGSTOP)
    codes, seconds = ended(ranks[1])
    line = f"error: rank 1: {lost(0, ranks[0])}"
    assert codes == [1] and seconds > SILENCE / 2 and told(tmp_path, 1) == [line]
    os.kill(ranks[0].pid, signal.SIGCONT)
    assert ended(ranks[0])[0] == [1] and told(tmp_path, 0) == [line]


def test_a_store_that_is_lost_ends_all(start, tmp_path):
    store, *ranks = start(2, watched.waits, 1)
    os.kill(store.pid, signal.SIGSTOP)
    assert ended(*ranks)[0] == [1, 1]
    for line in told(tmp_path, 1):
        place = f"on the machine of rank 0 (host {platform.node()}, process {ranks[0].pid}), has not answered for 2 s"
        assert line.startswith("error: rank 1: the ranks' store at 127.0.0.1:") and place in line


def test_ranks_that_are_late_or_suspended_or_have_ended_are_not_lost(start, tmp_path):
    """Each for longer than the limit: both are suspended, one is late, and one ends while the other continues."""
    _, *ranks = start(2, watched.late, 1.5 * SILENCE)
    for process in ranks:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5 * SILENCE)
    for process in ranks:
        os.kill(process.pid, signal.SIGCONT)
    assert ended(*ranks)[0] == [0, 0] and told(tmp_path, 0, 1) == ["", ""]


@pytest.mark.parametrize(
    "fault, code, first, second",
    [
        ("data", 2, "error: rank 1: rows.jsonl, line 7: wrong\n", ""),
        (
            "system",
            1,
            "error: rank 1: OSError: [Errno 5] Input/output error: 'rows.jsonl'\n",
            "error: rows.jsonl: Input/output error\n",
        ),
    ],
)
def test_an_error_on_one_rank_ends_all(fault, code, first, second, start, tmp_path):
    _, *ranks = start(2, watched.fails, watched.FAULTS[fault])
    assert ended(*ranks)[0] == [code, code] and told(tmp_path, 0, 1) == [first, second]


def test_a_row_that_only_one_rank_cannot_read(start, tmp_path):
    """In the middle of a run that streams its rows: the error is printed once, and both ranks end."""
    rows = [json.dumps({"instruction": f"{n}", "output": "b"}) for n in range(2000)]
    for rank, last in enumerate(("", "{")):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}" / "rows.jsonl").write_text("\n".join([*rows[:1600], last + rows[1600], *rows[1601:]]))
    flags = ["--dataset", "rows.jsonl", "--model_name_or_path", "mini", "--streaming", "--buffer_size", "1"]
    flags += ["--max_steps", "250", "--save_steps", "20", "--output_dir", str(tmp_path / "run")]
    _, *ranks = start(2, watched.trains, *flags, silence=45.0, until_ready=False)
    codes, _ = ended(*ranks)
    err = "".join(told(tmp_path, 0, 1))
    assert codes == [2, 2] and err.count("error: ") == 1
    assert "error: rank 1: rows.jsonl, line 1601: not JSON" in err and "continue with: torchrun" in err
