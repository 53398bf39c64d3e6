"""`softprompt serve` itself, without serving: what it refuses, where it listens, and what it says."""

import socket
import sys
import threading
from types import SimpleNamespace

import pytest
from helpers.programs import assert_line, refusal, run_program

from softprompt import cli
from softprompt.generation.model import SoftPromptModel
from softprompt.serving.server import Server
from softprompt.utils import redact

SERVE = SimpleNamespace(__name__="softprompt", main=cli.serve)
MINI = ["--model_name_or_path", "mini", "--port", "0"]


@pytest.fixture
def listening(monkeypatch) -> list[tuple[str, int]]:
    """The addresses at which servers would have served."""
    addresses = []

    async def serve_on(self, listening):
        addresses.append(listening.getsockname()[:2])

    monkeypatch.setattr(Server, "serve_on", serve_on)
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    monkeypatch.setattr(redact, "_added", set())
    return addresses


@pytest.mark.parametrize("engine", ["auto", "padded"])
def test_the_command_says_what_it_serves_and_where(engine, mini_adapters, listening, capsys, monkeypatch):
    _, err = run_program(SERVE, ["--adapters", mini_adapters, "--port", 0, "--engine", engine], capsys, monkeypatch)
    ((host, port),) = listening
    assert host == "127.0.0.1" and f"serving mini and 8 adapters at http://127.0.0.1:{port}/v1" in err
    assert ("slower" in err) == (engine == "padded") and "warning" not in err


def test_the_base_is_loaded_by_a_thread_that_ends(mini_adapters, listening, capsys, monkeypatch):
    """The main thread keeps no OpenMP threads, and errors of loading are told as ever."""
    load, threads = SoftPromptModel.from_pretrained, []

    def loading(*args, **settings):
        threads.append(threading.current_thread())
        return load(*args, **settings)

    monkeypatch.setattr(SoftPromptModel, "from_pretrained", loading)
    run_program(SERVE, ["--adapters", mini_adapters, *MINI], capsys, monkeypatch)
    (thread,) = threads
    assert thread is not threading.main_thread() and not thread.is_alive()
    argv = ["--adapters", mini_adapters, "--model_name_or_path", "./nowhere"]
    assert_line(refusal(SERVE, argv, capsys, monkeypatch), "nowhere")


def test_a_server_that_others_reach_needs_a_key_or_warns(mini_adapters, listening, capsys, monkeypatch):
    argv = ["--adapters", mini_adapters, *MINI, "--host", "0.0.0.0"]
    assert "SOFTPROMPT_API_KEY" in run_program(SERVE, argv, capsys, monkeypatch)[1]
    monkeypatch.setenv("SOFTPROMPT_API_KEY", "a long secret key")
    out, err = run_program(SERVE, argv, capsys, monkeypatch)
    assert "warning" not in err and "secret" not in out + err
    assert [host for host, _ in listening] == ["0.0.0.0"] * 2


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--port", "65536"], "--port 65536"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--request_timeout", "nan"], "--request_timeout nan"),
        (["--api_key", " "], "--api_key"),
        (["--adapters", "nowhere"], "--adapters nowhere"),
        (["--host", "203.0.113.7"], "--host 203.0.113.7"),
        (["--bf16", "--fp16"], "--fp16"),
    ],
)
def test_a_wrong_flag_is_named(flags, named, mini_adapters, listening, capsys, monkeypatch):
    assert_line(refusal(SERVE, ["--adapters", mini_adapters, *MINI, *flags], capsys, monkeypatch), f"^error: .*{named}")
    assert not listening


def test_a_port_that_is_taken_is_told_before_the_base_is_loaded(mini_adapters, listening, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        argv = ["--adapters", mini_adapters, "--model_name_or_path", "nowhere/nothing", "--port", port]
        assert_line(refusal(SERVE, argv, capsys, monkeypatch), f"--port {port}")
