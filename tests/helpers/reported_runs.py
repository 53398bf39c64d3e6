"""Runs over rows whose texts try to break out of a report's HTML, a model card or a log."""

import json
from pathlib import Path

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
