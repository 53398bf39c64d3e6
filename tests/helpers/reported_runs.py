"""Runs over rows whose texts try to break out of a report's HTML, a model card or a log; made-up records of runs; and
what a page of a report holds."""

import json
from html.parser import HTMLParser
from pathlib import Path

from softprompt.runs.run_reader import RunRecord

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b{{ 7*7 }}"

ROWS = [{"instruction": f"第{i}题 {EVIL}", "output": "<b>好</b>" if i % 2 else "坏"} for i in range(24)]


def settings_in(folder: Path, base) -> dict:
    """Write the rows into `folder`. Return settings of a run of 6 steps on them, written to `folder`/run."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return {
        **{"model_name_or_path": str(base), "dataset": str(folder / "rows.jsonl"), "eval_rows": 4, "max_steps": 6},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2, "save_steps": 2},
        **{"eval_steps": 2, "max_length": 128, "learning_rate": 0.1, "output_dir": str(folder / "run")},
    }


def described_run(folder: str | Path = "run", history: list[dict] | None = None, **end: object) -> RunRecord:
    """Return the record of a finished run of 20 steps over reviews with the labels 正面 and 负面, which was evaluated
    twice. `end` is added to what report.json says at its end."""
    rows = {"rows": 40, "used": 40, "tokens": 400, "targets": 80, "shortest": 5, "longest": 16}
    facts = {
        "arguments": {"dataset": "reviews.jsonl", "max_length": 64, "learning_rate": 0.1, "eval_rows": 8},
        "base": {"type": "bloom", "parameters": 1000, "vocabulary": 300},
        "prompt": [2, 8],
        "rows": {"training": {**rows, "histogram": [(8, 30), (16, 10)]}, "held out": {**rows, "histogram": [(16, 40)]}},
        "total_steps": 20,
        "base_alone": {"eval_loss_base": 3.25},
        "end": end,
    }
    speeds = ((10, 1.5, 900.0), (20, 0.5, 1000.0))
    logged = [{"step": n, "loss": loss, "learning_rate": 0.1, "tokens_per_second": speed} for n, loss, speed in speeds]
    evaluated = [{"step": 10, "eval_loss": 1.25}, {"step": 20, "eval_loss": 0.75}]
    history = [*logged, *evaluated] if history is None else history
    return RunRecord(Path(folder), facts, history, {"eval_loss": 0.75, "train_runtime": 3.0})


class Seen(HTMLParser):
    """All elements of a page with their attributes, its text, and the text of each script."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts = "", list[str]()
        self._raw = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._raw = tag if tag in ("script", "style") else ""
        self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag):
        self._raw = ""

    def handle_data(self, data):
        if self._raw == "script":
            self.scripts[-1] += data
        elif not self._raw:
            self.text += data

    def of(self, name: str) -> list[dict[str, str | None]]:
        """Return the attributes of the elements with a tag or class of this name."""
        return [a for tag, a in self.elements if tag == name or name in (a.get("class") or "").split()]
