"""A base of the reference's full size with random weights. Slow; run it with `pytest -m slow -s -n 0`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference_base(tmp_path_factory, tokenizer) -> Path:
    """A random BLOOM with the sizes of Langboat/bloom-1b4-zh (1.3 B parameters), stored in bf16."""
    folder = tmp_path_factory.mktemp("bases") / "bloom-1b4"
    config = BloomConfig(vocab_size=46145, hidden_size=2048, n_layer=24, n_head=16, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        BloomForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(folder)
    return folder


def call(program: str, log: Path, *flags: str) -> float:
    """Run a program, which must succeed, with its output going to `log`. Return its peak resident memory in GiB."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, str(ROOT / program), *flags], stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, log.read_text(encoding="utf-8")
    return usage.ru_maxrss / 2**20


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_train_two_steps_and_answer(precision, reference_base, tmp_path):
    rows = [{"instruction": "给出建议" * (1 + i % 9), "output": "多运动" * (1 + i % 5)} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    where = ["--model_name_or_path", str(reference_base), "--dataset", str(tmp_path / "rows.jsonl")]
    log = tmp_path / "log"
    training = call("train.py", log, *where, "--output_dir", str(tmp_path / "run"), "--max_steps", "2", *precision)
    text = log.read_text(encoding="utf-8")
    assert "trainable params: 20,480 || all params: 1,303,132,160 || trainable%: 0.0016" in text
    speed = re.search(r"tokens per second +(\S+)", text)
    asked = ["--adapter", str(tmp_path / "run"), "--prompt", "你好", "--max_new_tokens", "3", *precision]
    answering = call("infer.py", log, *asked)
    print(f"\ntraining: peak {training:.1f} GiB, {speed and speed[1]} tokens/s; answering: peak {answering:.1f} GiB")
