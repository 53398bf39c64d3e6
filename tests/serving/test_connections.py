"""Clients that go away, read slowly or are many; the shutdown; and memory."""

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import httpx
import pytest
from helpers.serving import SECONDS, Running, running_server, slow_steps, until

from softprompt.serving import gate
from softprompt.serving import service as service_module

USER = [{"role": "user", "content": "你好"}]
LONG = {"model": "a0", "messages": USER, "max_tokens": 900}


def http_request(body: dict, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


def raw_request(server: Running, body: dict, **more: str) -> socket.socket:
    """Send a request on a connection of its own, which takes little at a time, without reading the answer."""
    connection = socket.socket()
    connection.settimeout(SECONDS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
    connection.connect(server.address)
    connection.sendall(http_request(body, **more))
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(stream, mini, mini_adapters):
    """And the place of the only slot is free, although its answer has not ended."""
    with running_server(mini, mini_adapters, batch_size=1) as server, slow_steps(mini, 0.05):
        connection = raw_request(server, {**LONG, "stream": stream})
        if stream:
            assert b"200 OK" in connection.recv(1000)
        until(lambda: server.service.replies and next(iter(server.service.replies)).tokens > 1)
        waiting = raw_request(server, LONG)
        until(lambda: server.service.unfinished == 2)
        waiting.close()  # one that has not begun yet
        until(lambda: server.service.unfinished == 1)
        connection.close()
        until(lambda: not server.service.unfinished)
        assert server.ask("a1", "你好", max_tokens=1) is not None
        assert until(lambda: [line["error"] for line in server.log if "error" in line][1:]) is not None
        assert {line.get("error") for line in server.log[:2]} == {"client_disconnected"}


def test_choices_that_nobody_waits_for_are_not_scored(mini, mini_adapters, monkeypatch):
    scored, score = [], service_module.log_likelihoods

    def slowly(*arguments):
        scored.append(1)
        time.sleep(0.05)
        return score(*arguments)

    monkeypatch.setattr(service_module, "log_likelihoods", slowly)
    with running_server(mini, mini_adapters) as server:
        body = {"model": "a0", "input": ["好"] * 100, "choices": ["正面", "负面"]}
        connection = raw_request(server, body, path="/v1/classify")
        until(lambda: len(scored) > 1)
        assert server.service.unfinished == 200
        connection.close()
        until(lambda: not server.service.unfinished)
        assert until(lambda: [line.get("error") for line in server.log]) == ["client_disconnected"]
    assert len(scored) < 100


def test_running_answers_go_on_while_a_large_question_is_scored(mini, mini_adapters, monkeypatch):
    """The question has 128 choices of 500 tokens. Between two parts of it, a step of the running answer fits in."""
    steps_before_parts = []
    choices = [f"{number}" + "好" * 500 for number in range(128)]
    with running_server(mini, mini_adapters, max_queue=300) as server:

        def noted(engine, prompts, examples):
            steps_before_parts.append(server.service._thread.steps)
            assert sum(len(example.input_ids) for example in examples[0]) < 3000
            return [[float(len(steps_before_parts) + n) for n in range(len(examples[0]))]]

        monkeypatch.setattr(service_module, "log_likelihoods", noted)
        stream = server.client().chat.completions.create(**LONG, stream=True)
        next(stream)
        got = server.post("/v1/classify", {"model": "a0", "input": "好", "choices": choices}).json()["data"][0]
        stream.close()
    assert len(steps_before_parts) > 10 and len(set(steps_before_parts)) == len(steps_before_parts)
    assert [each["choice"] for each in got["choices"]] == choices and got["label"] == choices[-1]


def test_a_slow_reader_holds_nobody_up(mini, mini_adapters):
    """A client asks for more than its connection can hold, and reads nothing. Its answer is generated nevertheless."""
    with running_server(mini, mini_adapters, batch_size=2) as server:
        much = {"stream": True, "logprobs": True, "top_logprobs": 20, "n": 2, "max_tokens": 60}
        slow = raw_request(server, {**LONG, **much})
        reply = until(lambda: next(iter(server.service.replies), None))
        assert server.ask("a1", "你好", max_tokens=3) is not None
        until(lambda: reply.done)
        assert reply in server.service.replies, "its connection has taken everything; ask for more"
        assert reply.tokens == 120
        slow.close()
        until(lambda: not server.service.replies)


def test_200_connections_share_8_slots(server: Running):
    """`server` has 8 slots. All requests are answered, each as alone."""
    asked = [(f"a{n % 8}", ["你好", "我爱这部电影"][n % 2]) for n in range(200)]
    alone = {pair: server.ask(*pair, max_tokens=2) for pair in set(asked)}

    async def ask(name: str, text: str) -> str:
        reader, writer = await asyncio.open_connection(*server.address)
        body = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": 2}
        writer.write(http_request(body, "Connection: close"))
        answer = await reader.read()
        writer.close()
        return json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"]

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(ask(*pair) for pair in asked))

    assert asyncio.run(ask_all()) == [alone[pair] for pair in asked]


def test_finished_requests_are_released(server: Running, monkeypatch):
    known = []
    make = service_module.Answer

    def noted(*arguments):
        answer = make(*arguments)
        known.append(weakref.ref(answer))
        known.append(weakref.ref(answer.request))
        return answer

    monkeypatch.setattr(service_module, "Answer", noted)
    server.ask("a0", "你好")
    list(server.client().chat.completions.create(model="a1", messages=USER, stream=True, n=2))
    raw_request(server, {**LONG, "stream": True}).close()
    until(lambda: len(known) == 8 and not server.service.unfinished)

    def released() -> bool:
        gc.collect()
        return not any(ref() for ref in known)

    until(released, 10)


def test_a_failure_of_the_model_is_told_and_the_server_goes_on(mini, mini_adapters, capsys):
    def broken(*arguments):
        raise ValueError("/a/path/of/the/machine")

    with running_server(mini, mini_adapters) as server:
        mini.generator.model.forward = broken
        try:
            failed = server.post("/v1/chat/completions", LONG)
        finally:
            del mini.generator.model.forward
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"
        assert "/a/path" not in failed.text and "/a/path" in capsys.readouterr().err
        assert server.ask("a0", "你好", max_tokens=2) is not None


def test_a_server_that_shuts_down_finishes_its_answers_and_refuses_new_ones(mini, mini_adapters):
    with running_server(mini, mini_adapters, batch_size=2) as server, slow_steps(mini, 0.01):
        client, streamed = server.client(), []

        def read() -> None:
            for chunk in client.chat.completions.create(model="a0", messages=USER, max_tokens=40, stream=True):
                streamed.append(chunk)

        threads = [threading.Thread(target=read) for _ in range(4)]  # two of them wait for a place
        for thread in threads:
            thread.start()
        until(lambda: server.service.unfinished == 4 and streamed)
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.get("/health").status_code == 503)
        refused = server.post("/v1/chat/completions", LONG)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "service_unavailable"
        for thread in threads:
            thread.join(SECONDS)
        assert sum(chunk.choices[0].finish_reason == "length" for chunk in streamed) == 4
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()


def test_a_client_that_reads_nothing_does_not_prevent_a_shutdown(mini, mini_adapters, monkeypatch):
    monkeypatch.setattr(gate, "SENDING_SECONDS", 0.3)
    with running_server(mini, mini_adapters) as server:
        server.server.config.timeout_graceful_shutdown = 1
        much = {"stream": True, "logprobs": True, "top_logprobs": 20, "n": 2, "max_tokens": 60}
        stalled = raw_request(server, {**LONG, **much})
        reply = until(lambda: next(iter(server.service.replies), None))
        until(lambda: reply.tokens)
        start = time.monotonic()
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(SECONDS)
        assert not server.thread.is_alive() and reply.tokens == 120 and time.monotonic() - start < SECONDS / 2
        stalled.close()
        assert [line["error"] for line in server.log] == ["timeout"]


@pytest.mark.slow
def test_sigterm_under_load(mini_adapters: Path, tmp_path: Path):
    """The command itself, in a process of its own: it says where it listens, logs, and ends with 0."""
    flags = ["--adapters", str(mini_adapters), "--port", "0", "--batch_size", "2"]
    command = [sys.executable, "-m", "softprompt", "serve", *flags]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    with (
        open(tmp_path / "out", "w") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            line = next(line for line in process.stderr if "serving mini and 8 adapters at" in line)
            url = line.split(" at ")[1].split("/v1")[0]
            body = {**LONG, "max_tokens": 200, "stream": True}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=SECONDS) as response:
                lines = response.iter_lines()
                assert next(lines).startswith("data: ")
                process.send_signal(signal.SIGTERM)
                until(lambda: httpx.get(f"{url}/health").status_code == 503)
                rest = list(lines)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
    assert [line for line in rest if line][-1] == "data: [DONE]"
    logged = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert any(one["completion_tokens"] == 200 for one in logged if one["status"] == 200)
