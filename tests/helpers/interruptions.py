"""Shared by several test modules."""

import json
from pathlib import Path

import pytest
from helpers.interrupting import Killed, interrupted, restated  # noqa: F401 (Killed is test_safety's)

ROWS = [{"instruction": f"第{i}题" * (1 + i % 3), "output": "好" if i % 2 else "坏"} for i in range(23)]


@pytest.fixture
def settings(tiny_base, tmp_path, monkeypatch):
    """A run of 13 steps over 19 rows in windows of 4, so that epochs end with a short window, in the folder `run`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return {
        **{"model_name_or_path": str(tiny_base), "dataset": "rows.jsonl", "eval_rows": 4, "output_dir": "run"},
        **{"max_steps": 13, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3},
        **{"save_steps": 2, "eval_steps": 5, "tokens_per_microbatch": 30},
    }


def outcome(folder="run") -> tuple[bytes, list, dict]:
    """The prompt's bytes, the metrics but for speeds, and the results but for times."""
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    results = json.loads(Path(folder, "all_results.json").read_text())
    plain = [{name: value for name, value in r.items() if name != "tokens_per_second"} for r in records]
    return (
        Path(folder, "adapter_model.safetensors").read_bytes(),
        plain,
        {name: value for name, value in results.items() if name not in ("train_runtime", "train_tokens_per_second")},
    )
