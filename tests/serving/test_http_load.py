"""The clients of benchmarks/serve.py, with the server."""

import sys
from pathlib import Path

import pytest
from helpers.serving import Running, running_server, slow_steps

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from http_load import Question, send


def test_clients_ask_at_the_same_time_and_note_what_they_get(server: Running):
    questions = [[Question(f"a{client}", text, 5) for text in ("你好", "再见")] for client in range(4)]
    load = send(server.url, questions)
    asked = [question for of_client in questions for question in of_client]
    assert [each.text.strip() for each in load.answers] == [server.ask(q.model, q.text, max_tokens=5) for q in asked]
    assert [each.tokens for each in load.answers] == [5] * 8 and load.speed == pytest.approx(40 / load.seconds)
    assert all(0 < each.first <= each.whole <= load.seconds for each in load.answers)


def test_a_failure_is_no_fast_answer(mini, mini_adapters):
    with running_server(mini, mini_adapters, request_timeout=0.2) as server, slow_steps(mini, 0.02):
        with pytest.raises(ValueError, match="404"):
            send(server.url, [[Question("nobody", "a", 1)]])
        with pytest.raises(ValueError, match="in the stream"):
            send(server.url, [[Question("a0", "a", 500)]])
