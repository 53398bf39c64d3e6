"""The fixture `distillation`: settings of a short run that distills a text."""

from pathlib import Path

import pytest
from helpers.distillation import QUESTIONS, TEXT


@pytest.fixture
def distillation(tiny_base, tmp_path, monkeypatch):
    """Settings of a distillation of 4 steps over 6 questions with 2 answers each; 3 questions are held out."""
    monkeypatch.chdir(tmp_path)
    Path("questions.txt").write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return {
        **{"model_name_or_path": str(tiny_base), "dataset": "questions.txt", "eval_rows": 3, "output_dir": "run"},
        **{"distill_prompt": "text.txt", "distill_samples": 2, "distill_max_new_tokens": 5, "num_virtual_tokens": 4},
        **{"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_steps": 2},
    }
