"""`softprompt report --watch RUN`: the page of a run is rewritten while the run goes on."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.programs import refused, run_program
from helpers.reported_runs import settings_in

import softprompt
from softprompt import cli
from softprompt.report.watch import watch
from softprompt.utils import file_lock
from softprompt.utils.errors import ReportError
from softprompt.utils.file_lock import LOCK_FILE, FolderLock

REPORT = SimpleNamespace(main=cli.report, __name__="report")


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory) -> Path:
    """The folder of a finished run, which tests do not change."""
    return Path(softprompt.train(**settings_in(tmp_path_factory.mktemp("watched"), tiny_base)).output_dir)


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the run as it was after step 4."""
    monkeypatch.setattr(file_lock, "WAIT_SECONDS", 0.05)
    folder = shutil.copytree(finished, tmp_path / "run")
    for name in ("report.html", "all_results.json"):
        (folder / name).unlink()
    facts = json.loads((folder / "report.json").read_text())
    del facts["end"]
    (folder / "report.json").write_text(json.dumps(facts))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["step"] < 5) + "\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE}


class Watched:
    """What is done between two looks at a run, one function after the other, and what was said."""

    def __init__(self, *steps):
        self.steps, self.said = list(steps), []

    def pause(self, seconds: float) -> None:
        self.steps.pop(0)()

    def watch(self, *runs: Path, output_file: str | None = None) -> Path:
        return watch([str(run) for run in runs], output_file, self.said.append, self.pause)


def test_the_page_follows_a_run_to_its_end(run, finished):
    before, html, page = contents(run), run / "report.html", []

    def log_a_step():
        page.append(html.read_text())
        shutil.copy(finished / "metrics.jsonl", run)

    def nothing_new():
        page.append(html.read_text())
        page.append(html.stat().st_mtime_ns)

    def end():
        assert html.stat().st_mtime_ns == page[-1]  # it is not rewritten where nothing has changed
        for name in ("report.json", "all_results.json"):
            shutil.copy(finished / name, run)
        lock.release()

    with FolderLock(run).take() as lock:
        watched = Watched(log_a_step, nothing_new, end)
        assert watched.watch(run) == html
    first, second, _ = page
    assert "running now: its metrics end at step 4 of 6" in first and 'http-equiv="refresh"' in first
    assert "end at step 6 of 6" in second and 'http-equiv="refresh"' in second
    last = html.read_text()
    assert "finished after step 6 of 6" in last and 'http-equiv="refresh"' not in last
    assert len(watched.said) == 1 and str(html) in watched.said[0]
    after = {path: content for path, content in contents(run).items() if path != str(html)}
    changed = {Path(path).name for path, content in after.items() if before.get(path) != content}
    assert changed == {"metrics.jsonl", "report.json", "all_results.json"}  # by this test


def test_ctrl_c_ends_the_watching_and_not_the_run(run):
    def press():
        raise KeyboardInterrupt

    before = contents(run)
    with FolderLock(run).take() as lock:
        page = Watched(press).watch(run)
        assert lock.path.exists()
    html = page.read_text()
    assert "running now" in html and 'http-equiv="refresh"' not in html
    assert contents(run) == {**before, str(page): html.encode()}


def test_a_run_that_has_logged_nothing_is_waited_for(run, finished):
    shutil.rmtree(run)
    run.mkdir()

    def begin():
        (run / "metrics.jsonl").write_text("")

    def describe():
        assert not (run / "report.html").exists()
        facts = json.loads((finished / "report.json").read_text())
        del facts["end"]
        (run / "report.json").write_text(json.dumps(facts))

    def end():
        assert "no step is logged yet" in (run / "report.html").read_text()
        shutil.copy(finished / "metrics.jsonl", run)
        lock.release()

    with FolderLock(run).take() as lock:
        watched = Watched(begin, describe, end)
        watched.watch(run)
    assert len(watched.said) == 2 and "waiting" in watched.said[0] and "report.html" in watched.said[1]


def test_ctrl_c_before_there_is_anything_to_show_writes_nothing(run):
    def press():
        raise KeyboardInterrupt

    shutil.rmtree(run)
    run.mkdir()
    with FolderLock(run).take(), pytest.raises(KeyboardInterrupt):
        Watched(press).watch(run)
    assert contents(run) == {}


def test_a_run_that_ended_with_nothing_to_show_is_refused_in_the_end(run):
    shutil.rmtree(run)
    run.mkdir()

    def end():
        (run / "metrics.jsonl").write_text("")
        lock.release()

    with FolderLock(run).take() as lock, pytest.raises(ReportError, match="stopped before it logged a step"):
        Watched(end).watch(run)


def test_a_run_that_does_not_go_on_is_reported_once(run, capsys, monkeypatch):
    out, err = run_program(REPORT, ["--watch", run], capsys, monkeypatch)
    assert out == f"{run / 'report.html'}\n" and err == ""
    assert "not finished" in (run / "report.html").read_text()


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_that_is_no_run_is_refused(name, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    line = refused(REPORT, ["--watch", tmp_path / name], capsys, monkeypatch, tmp_path)
    assert str(tmp_path / name) in line and "name the OUTPUT_DIR of a run" in line


def test_several_runs_are_watched_on_one_page(run, finished, tmp_path):
    def end():
        assert 'http-equiv="refresh"' in (tmp_path / "both.html").read_text()
        lock.release()

    with FolderLock(run).take() as lock:
        page = Watched(end).watch(run, finished, output_file=str(tmp_path / "both.html"))
    assert "2 runs compared" in page.read_text() and 'http-equiv="refresh"' not in page.read_text()
