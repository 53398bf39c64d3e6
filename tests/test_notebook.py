"""softprompt in a real Jupyter kernel: docs/quickstart.ipynb, and what a person meets at the keyboard."""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from helpers.notebooks import ROOT, executed
from jupyter_client.manager import start_new_kernel

QUICKSTART = ROOT / "docs/quickstart.ipynb"
TRAIN = "run = softprompt.train(dataset='rows.jsonl', eval_rows=2, output_dir='run', max_steps=100_000)"


def text_of(cell: Any) -> str:
    return str([output.get("data", output.get("text")) for output in cell.outputs])


def test_the_stored_outputs_are_whole():
    """Those that people see on the web."""
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not any(place in text_of(cell) for cell in code for place in ("/tmp/", "/home/", "/root/", str(ROOT)))


@pytest.mark.slow
def test_the_quickstart_gives_the_outputs_that_are_stored(tmp_path):
    stored = nbformat.read(QUICKSTART, as_version=4)
    found = executed(QUICKSTART, tmp_path)
    for old, new in zip(stored.cells, found.cells, strict=True):
        if old.cell_type == "code":
            kinds = [[(o.output_type, sorted(o.get("data", ()))) for o in cell.outputs] for cell in (old, new)]
            assert kinds[0] == kinds[1], old.source
    answers = {cell.source.splitlines()[-1]: text_of(cell) for cell in found.cells if cell.cell_type == "code"}
    for old in stored.cells:
        if "model.generate" in old.source and old.cell_type == "code":
            assert text_of(old) == answers[old.source.splitlines()[-1]]
    assert (tmp_path / "runs/quickstart/report.html").is_file()


class Kernel:
    """A kernel, and what it sends."""

    def __init__(self, manager: Any, client: Any):
        self.manager, self.client = manager, client

    def run(self, code: str, meanwhile: Callable[[str], None] = lambda text: None) -> tuple[list[dict], list[dict]]:
        """Execute a cell. Call `meanwhile` with each text that it prints. Return its outputs and its errors."""
        sent = self.client.execute(code)
        outputs, errors = [], []
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != sent:
                continue
            if kind == "status" and content["execution_state"] == "idle":
                return outputs, errors
            if kind == "error":
                errors.append(content)
            elif kind in ("stream", "display_data", "execute_result"):
                outputs.append(content)
                meanwhile(content.get("text", ""))

    def reply(self, sent: str) -> dict[str, Any]:
        """Return the content of the reply to a request other than execute."""
        while True:
            message = self.client.get_shell_msg(timeout=120)
            if message["parent_header"].get("msg_id") == sent:
                return message["content"]


@pytest.fixture
def kernel(tmp_path) -> Iterator[Kernel]:
    """A real kernel in a folder with rows.jsonl, in which softprompt has been imported."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "好", "output": "好"}\n' * 40, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    manager, client = start_new_kernel(cwd=str(tmp_path), env=environment)
    try:
        kernel = Kernel(manager, client)
        assert kernel.run("import softprompt") == ([], [])
        yield kernel
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def texts(outputs: list[dict], stream: str) -> str:
    return "".join(output["text"] for output in outputs if output.get("name") == stream)


@pytest.mark.slow
def test_what_is_offered_at_the_keyboard(kernel):
    found = kernel.reply(kernel.client.complete("softprompt.", len("softprompt.")))["matches"]
    assert {name.rpartition(".")[2] for name in found} == {"SoftPromptModel", "train"}
    typed = "softprompt.train(eval_r"
    assert "eval_rows=" in kernel.reply(kernel.client.complete(typed, len(typed)))["matches"]
    (name, mime) = "softprompt.train", "text/plain"  # Shift-Tab
    shown = re.sub(r"\x1b\[[\d;]*m", "", kernel.reply(kernel.client.inspect(name, len(name)))["data"][mime])
    assert "num_virtual_tokens=None" in shown and "Learn this many virtual tokens." in shown
    outputs, errors = kernel.run("softprompt.train(lr=1)")
    assert not outputs and len(errors) == 1 and errors[0]["ename"] == "ConfigError"
    assert errors[0]["traceback"] == ["ConfigError: unknown setting 'lr'; did you mean learning_rate?"]


@pytest.mark.slow
def test_an_interrupt_leaves_the_run_in_hand(kernel, tmp_path):
    began = []

    def interrupt(text: str) -> None:
        if "base without a prompt" in text and not began:
            began.append(time.monotonic())
            kernel.manager.interrupt_kernel()

    outputs, errors = kernel.run(TRAIN, interrupt)
    assert began and not errors
    assert "softprompt.train(resume_from_checkpoint='run')" in texts(outputs, "stdout")
    assert texts(outputs, "stderr") == ""  # Jupyter shows it on red
    (shown,), errors = kernel.run("run")
    assert not errors and "stopped after step" in shown["data"]["text/html"]
    (answer,), errors = kernel.run("run.model().generate('好', max_new_tokens=2)")
    assert not errors and answer["data"]["text/plain"]
    assert list(Path(tmp_path / "run").glob("checkpoint-*"))
