"""An exported folder under `transformers serve`, on this machine's loopback. Slow, and it needs the server's packages:

pip install "transformers[serving]" && pytest -m slow tests/export/test_serve.py
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.adapters import write_adapter_for
from transformers import AutoModelForCausalLM

from softprompt import SoftPromptModel
from softprompt.export.plain_model import export
from softprompt.models.loading import base_path

NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")
QUESTIONS = ["我爱这部电影", "这家酒店太差了", "hello"]
STARTING = 180  # seconds that the server may take


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """The address of a server, the exported folder that it serves, and the adapter."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f'needs {", ".join(missing)}: pip install "transformers[serving]"')
    root = tmp_path_factory.mktemp("serve")
    base = AutoModelForCausalLM.from_pretrained(base_path("mini"))
    saved = {"do_sample": False, "max_new_tokens": 12}
    adapter = write_adapter_for(root / "adapter", base, "mini", 6, generation=saved)
    export(adapter, root / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(root / "model")]
    with open(root / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=log,
            stderr=log,
            cwd=root,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}", root / "log")
        yield f"http://127.0.0.1:{port}", root / "model", adapter
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + STARTING
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).read()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server does not answer: {log.read_text(errors='replace')[-2000:]}")


def post(address: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        pytest.fail(f"{error.code}: {error.read().decode(errors='replace')[-2000:]}")


@pytest.mark.slow
def test_chat_completions_equal_the_answers_of_base_and_prompt(server):
    address, folder, adapter = server
    expected = SoftPromptModel.from_pretrained("mini", adapter, device="cpu").generate(QUESTIONS)
    for question, answer in zip(QUESTIONS, expected, strict=True):
        body = {"model": str(folder), "messages": [{"role": "user", "content": question}], "max_tokens": 12}
        reply = post(address, "/v1/chat/completions", body)
        assert reply["choices"][0]["message"]["content"].strip() == answer


@pytest.mark.slow
def test_completions_accept_a_text_with_the_virtual_tokens(server):
    address, folder, adapter = server
    ours = SoftPromptModel.from_pretrained("mini", adapter, device="cpu")
    words = "".join(f"<|softprompt_{i}|>" for i in range(6))
    for question, answer in zip(QUESTIONS, ours.generate(QUESTIONS), strict=True):
        prompt = words + ours.template.render({"instruction": question, "input": ""}, None)
        reply = post(address, "/v1/completions", {"model": str(folder), "prompt": prompt, "max_tokens": 12})
        assert reply["choices"][0]["text"].strip() == answer
