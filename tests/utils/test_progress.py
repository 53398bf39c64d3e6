"""Bars and lines above them: on a narrow terminal, in a notebook, and where neither is."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import termios
from types import SimpleNamespace

import pytest

import softprompt
from softprompt.runs.state import Step
from softprompt.training.metrics_log import MetricsLog
from softprompt.utils import progress

BARS = ("tokenizing", "loading the base", "held-out loss", "held-out answers", "looking for a learning rate")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_on_terminal(columns: int, tmp_path) -> str:
    """The training bar as it stands after some steps on a real terminal of this width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(slave, "w", encoding="utf-8") as stream:
        log = MetricsLog(2000, tmp_path / "metrics.jsonl", stream)
        log.start()
        log.bar.mininterval = 1e9  # it is drawn once, at the end: what is not read at once must fit into the terminal
        for number in range(1, 901):
            log.on_step(Step(number, 0.1, 0.1234, 1.0, 0.0987, 300, 0.025))
        log._show(log.bar.refresh)
        stream.flush()
        arrived = b""
        while not re.search(rb"900/2000.*\]$", arrived) and select.select([master], [], [], 30)[0]:
            arrived += os.read(master, 1 << 16)
        log.bar.disable = True
    os.close(master)
    return arrived.decode().split("\r")[-1]


@pytest.mark.parametrize("columns, fields", [(60, ""), (80, "loss"), (100, "loss tok/s"), (120, "loss tok/s lr")])
def test_the_bar_stays_useful_on_a_narrow_terminal(columns, fields, tmp_path):
    line = shown_on_terminal(columns, tmp_path)
    assert len(line) <= columns and "900/2000" in line
    cells = re.search(r"\|(.*?)\|", line)[1]
    assert len(cells) >= 9 or columns < 80, line
    assert re.findall(r"([\w/]+)=", line) == fields.split()


@pytest.fixture
def notebook(monkeypatch):
    """This process as if it was the kernel of a notebook."""
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_a_notebook_gets_nothing_on_red(notebook, run_settings, capsys):
    assert progress.in_notebook() and progress.shows_bars()
    softprompt.train(**run_settings)
    out, err = capsys.readouterr()
    assert err == "" and "eval_loss" in out and "training: 100%" in out
    progress.say("a line")
    assert capsys.readouterr() == ("a line\n", "")


def test_what_takes_long_has_a_bar(run_settings, monkeypatch):
    settings = progress.bar_settings
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "bar_settings", lambda: {**settings(), "mininterval": 0})
    monkeypatch.setattr(sys, "stderr", Terminal())
    softprompt.train(**run_settings, find_learning_rate=True)
    text = sys.stderr.getvalue()
    assert all(f"{name}:" in text for name in (*BARS, "training"))
    for name in ("held-out loss", "held-out answers"):
        assert re.search(rf"{name}: 100%\|[^|]*\| 4/4 ", text)


def test_what_is_soon_done_has_none(run_settings, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 1e9)
    monkeypatch.setattr(sys, "stderr", Terminal())
    softprompt.train(**run_settings)
    text = sys.stderr.getvalue()
    assert "training:" in text and not any(name in text for name in BARS)


def test_elsewhere_there_are_only_lines(run_settings, capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    softprompt.train(**run_settings)
    err = capsys.readouterr().err
    assert "\r" not in err and "step 3  epoch" in err and not any(f"{name}:" in err for name in (*BARS, "training"))


def test_a_retried_evaluation_begins_anew():
    bars = []
    real = progress.progress_bar
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            progress,
            "progress_bar",
            lambda *args: bars.append(real(*args, disable=False, file=io.StringIO())) or bars[-1],
        )
        with progress.rows_bar(9, "rows") as on_rows:
            for done in (4, 8, 3, 9):
                on_rows(done)
                assert bars[0].n == done
