"""Requests that are refused: in OpenAI's shape, with the right status, and without a word about the machine."""

import json
import random
import time
from collections import Counter
from typing import Any

import httpx
import openai
import pytest
from helpers.serving import Running, running_server, slow_steps, until

from softprompt.serving.bodies import ChatBody, ClassifyBody, CompletionBody, parse_body
from softprompt.serving.errors import ApiError
from softprompt.utils import redact

USER = [{"role": "user", "content": "你好"}]
CHAT = {"model": "a0", "messages": USER, "max_tokens": 2}
COMPLETION = {"model": "a1", "prompt": "你好", "max_tokens": 2}
CLASSIFY = {"model": "a0", "input": "你好", "choices": ["正面", "负面"]}
MISSING = "missing_required_parameter"
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/v1/classify": CLASSIFY}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error


@pytest.mark.parametrize(
    "path, change, param, code",
    [
        ("/v1/chat/completions", {"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ("/v1/chat/completions", {"messages": None}, "messages", "invalid_value"),
        ("/v1/chat/completions", {"messages": []}, "messages", "invalid_value"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "wizard", "content": "a"}]},
            "messages.[0].role",
            "invalid_value",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.[0].content", MISSING),
        ("/v1/chat/completions", {"messages": [{**USER[0], "x": 1}]}, "messages.[0].x", "unknown_parameter"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, "messages", "invalid_value"),
        ("/v1/chat/completions", {"messages": [*USER, *USER]}, "messages", "invalid_value"),
        ("/v1/chat/completions", {"temperature": 2.1}, "temperature", "invalid_value"),
        ("/v1/chat/completions", {"temperature": "hot"}, "temperature", "invalid_value"),
        ("/v1/chat/completions", {"top_p": -0.1}, "top_p", "invalid_value"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens", "invalid_value"),
        ("/v1/chat/completions", {"max_tokens": 10**6}, "max_tokens", "invalid_value"),
        ("/v1/chat/completions", {"max_completion_tokens": 3}, "max_tokens", "invalid_value"),
        ("/v1/chat/completions", {"n": 0}, "n", "invalid_value"),
        ("/v1/chat/completions", {"stop": ["a"] * 5}, "stop", "invalid_value"),
        ("/v1/chat/completions", {"stop": ""}, "stop", "invalid_value"),
        ("/v1/chat/completions", {"seed": 2**63}, "seed", "invalid_value"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ("/v1/chat/completions", {"stream_options": {}}, "stream_options", "invalid_value"),
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ("/v1/chat/completions", {"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ("/v1/completions", {"prompt": ""}, "prompt", "invalid_value"),
        ("/v1/completions", {"prompt": []}, "prompt", "invalid_value"),
        ("/v1/completions", {"prompt": [[1], []]}, "prompt", "invalid_value"),
        ("/v1/completions", {"prompt": [10**8]}, "prompt", "invalid_value"),
        ("/v1/completions", {"echo": True}, "echo", "unsupported_parameter"),
        ("/v1/completions", {"logprobs": 6}, "logprobs", "invalid_value"),
        ("/v1/classify", {"choices": ["正面"]}, "choices", "invalid_value"),
        ("/v1/classify", {"choices": ["正面", "正面"]}, "choices", "invalid_value"),
        ("/v1/classify", {"messages": USER}, "messages", "invalid_value"),
    ],
)
def test_a_wrong_field_is_named(path, change, param, code, server: Running):
    error = error_of(server.post(path, {**BODIES[path], **change}), 400)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert param.split(".")[0] in error["message"]


@pytest.mark.parametrize(
    "path, field, values, accepted",
    [
        ("/v1/chat/completions", "stop", [3, "", [""], ["a"] * 5, ["a", 1], {}], ("text", "list", "four")),
        (
            "/v1/chat/completions",
            "messages.[0].content",
            [None, 3, [3], [{"type": "image"}]],
            ("text", "list of parts"),
        ),
        (
            "/v1/completions",
            "prompt",
            [3, [None], [-1], [1, "a"], [[1, "a"]], [1.5]],
            ("text", "of token ids", "lists"),
        ),
        ("/v1/classify", "input", [3, [], [3], {}], ("text", "list of 1 to")),
    ],
)
def test_a_field_of_several_types_says_what_it_accepts(path, field, values, accepted, server: Running):
    for value in values:
        change = {field: value} if "." not in field else {"messages": [{"role": "user", "content": value}]}
        error = error_of(server.post(path, {**BODIES[path], **change}), 400)
        assert error["param"] == field and all(word in error["message"] for word in accepted), error


def test_a_list_is_refused_at_its_first_wrong_item():
    """A body may hold hundreds of thousands of items; listing a fault of each would keep all other requests waiting."""
    for kind, path, field in (
        (ChatBody, "/v1/chat/completions", "messages"),
        (CompletionBody, "/v1/completions", "prompt"),
        (ClassifyBody, "/v1/classify", "input"),
    ):
        start = time.thread_time()
        with pytest.raises(ApiError):
            parse_body(kind, {**BODIES[path], field: [{}] * 500_000})
        assert time.thread_time() - start < 0.2, field


def test_fields_that_change_nothing_are_accepted(server: Running):
    nothing = {"user": "me", "metadata": {"a": "b"}, "tools": [], "tool_choice": "none", "store": False, "top_p": 1}
    nothing |= {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}}
    nothing |= {"stop": None, "n": None, "seed": None, "stream_options": None, "service_tier": "auto"}
    got = server.post("/v1/chat/completions", {**CHAT, **nothing}).json()
    assert got["choices"] == server.post("/v1/chat/completions", CHAT).json()["choices"]


def test_an_unknown_model_a_missing_field_and_the_client_of_openai(server: Running):
    with pytest.raises(openai.NotFoundError) as missing:
        server.ask("nobody", "你好")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        server.ask("a0", "你好", extra_body={"frobnicate": 1})
    assert refused.value.code == "unknown_parameter"
    error = error_of(server.post("/v1/chat/completions", {"model": "a0"}), 400)
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


def test_bodies_that_are_no_json_objects(server: Running):
    def post(content: bytes, kind: str = "application/json") -> httpx.Response:
        return server.post_content("/v1/chat/completions", content, kind)

    for content in (b"", b"{", b"[]", b"1", b"\xff\xfe", b'{"n": ' + b"9" * 5000 + b"}", b"[" * 100_000, b"null"):
        error_of(post(content), 400)
    error_of(post(b'{"model": "a0", "messages": [], "temperature": NaN}'), 400)
    for half in (b'{"\\ud800": 1}', b'{"\\uDC00": 1}', json.dumps({**CHAT, "model": "\ud83d"}).encode()):
        error_of(post(half), 400)
    whole = json.dumps({**CHAT, "user": "🙂"}).encode()
    assert b"\\ud83d" in whole and post(whole).status_code == 200
    error_of(post(json.dumps(CHAT).encode(), "text/plain"), 415)


def test_paths_and_methods_that_do_not_exist(server: Running):
    for path in (
        "/v1",
        "/index.html",
        "/static/page.js",
        "/v1/embeddings",
        "/v1/../../etc/passwd",
        "/docs",
        "/openapi.json",
    ):
        error_of(server.get(path), 404)
    error = error_of(server.get("/v1/chat/completions"), 405)
    assert "GET" in error["message"]


def test_limits(mini, mini_adapters):
    limits = {"max_body_bytes": 400, "max_prompt_tokens": 20, "max_tokens": 5, "batch_size": 1, "max_queue": 2}
    with running_server(mini, mini_adapters, **limits) as server:
        chat = "/v1/chat/completions"
        large = json.dumps({**CHAT, "user": "x" * 500}).encode()
        for content in (large, iter([large])):  # with its length, and in chunks
            error_of(server.post_content(chat, content), 413)
        long = error_of(server.post(chat, {**CHAT, "messages": [{"role": "user", "content": "我爱这部电影" * 9}]}), 400)
        assert (long["code"], long["param"]) == ("context_length_exceeded", "messages")
        long = error_of(server.post("/v1/completions", {"model": "a0", "prompt": "我爱这部电影" * 9}), 400)
        assert (long["code"], long["param"]) == ("context_length_exceeded", "prompt")
        error_of(server.post(chat, {**CHAT, "max_tokens": 6}), 400)
        text, several = "/v1/completions", {**CLASSIFY, "choices": ["正", "负"], "input": ["a", "b", "c"]}
        for path, body, param in (  # three places; the field with the largest factor is named
            (chat, {**CHAT, "n": 4}, "n"),
            (text, {**COMPLETION, "n": 4}, "n"),
            (text, {**COMPLETION, "prompt": ["a"] * 4}, "prompt"),
            (text, {**COMPLETION, "prompt": ["a", "b", "c"], "n": 2}, "prompt"),
            ("/v1/classify", several, "input"),
            ("/v1/classify", {**several, "input": "a", "choices": ["正", "负", "中", "无"]}, "choices"),
        ):
            error = error_of(server.post(path, body), 400)
            assert error["param"] == param and f"'{param}'" in error["message"], body
        assert server.post(text, {**COMPLETION, "prompt": ["a", "b", "c"]}).status_code == 200
        got = server.post(chat, {"model": "a0", "messages": USER}).json()
        asked = {**CHAT, "n": 3, "max_tokens": 5}
        assert got["usage"]["completion_tokens"] == 5  # the adapter's own 12 are limited, too
        with slow_steps(mini, 0.3), server.client().chat.completions.create(**asked, stream=True):
            for path, body in BODIES.items():
                full = server.post(path, body)
                assert error_of(full, 429)["code"] == "rate_limit_exceeded" and int(full.headers["Retry-After"]) > 0


def test_an_answer_that_takes_too_long_is_given_up(mini, mini_adapters):
    with running_server(mini, mini_adapters, request_timeout=1.0) as server, slow_steps(mini, 0.05):
        long = {"model": "a0", "messages": USER, "max_tokens": 500}
        assert error_of(server.post("/v1/chat/completions", long), 504)["code"] == "timeout"
        events = server.post("/v1/chat/completions", {**long, "stream": True}).text.split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        until(lambda: not server.service.unfinished)


def test_the_key(mini, mini_adapters, monkeypatch):
    monkeypatch.setattr(redact, "_added", set())
    monkeypatch.setenv("SOFTPROMPT_API_KEY", "a long secret key")
    with running_server(mini, mini_adapters) as server:
        for key in ("", "Bearer a long secret kex", "a long secret key", "Bearer é"):
            for path in ("/v1/models", "/metrics"):
                error_of(server.get(path, **({"Authorization": key.encode()} if key else {})), 401)
        assert server.get("/health").status_code == 200
        assert server.get("/v1/models", Authorization="Bearer a long secret key").status_code == 200
        assert "secret" not in json.dumps(server.log)
    with running_server(mini, mini_adapters, api_key="another") as server:
        assert server.get("/v1/models", Authorization="Bearer another").status_code == 200


def test_the_log_has_one_line_for_each_request_and_no_text(mini, mini_adapters):
    with running_server(mini, mini_adapters) as server:
        server.ask("a0", "我爱这部电影", max_tokens=3)
        server.post("/v1/chat/completions", {**CHAT, "stream": True})
        server.post("/v1/chat/completions", {**CHAT, "model": "nobody"})
        server.post("/v1/classify", CLASSIFY)
        server.get("/elsewhere")
        until(lambda: len(server.log) == 5)  # a line is written after the answer has been sent
        first, stream, missing, choice, elsewhere = server.log
    assert (first["status"], first["model"], first["completion_tokens"]) == (200, "a0", 3)
    assert first["prompt_tokens"] > 0 and first["finish_reason"] == "length" and 0 < first["first_token_seconds"] < 60
    assert stream["stream"] is True and stream["completion_tokens"] == 2 and stream["id"] != first["id"]
    assert (missing["status"], missing["error"], elsewhere["status"]) == (404, "model_not_found", 404)
    assert choice["path"] == "/v1/classify" and choice["prompt_tokens"] > 0
    assert "我爱" not in json.dumps([first, stream], ensure_ascii=False)


def test_metrics_count_what_was_done(mini, mini_adapters):
    with running_server(mini, mini_adapters, batch_size=5) as server:
        server.ask("a0", "你好", max_tokens=3)
        server.get("/elsewhere/1")
        server.get("/elsewhere/2")
        until(lambda: 'route="other",status="404"} 2' in server.get("/metrics").text)  # counted after the answers
        text = server.get("/metrics").text
    assert 'softprompt_requests_total{route="/v1/chat/completions",status="200"} 1' in text
    assert 'softprompt_requests_total{route="other",status="404"} 2' in text
    assert "softprompt_completion_tokens_total 3" in text and "softprompt_places 5" in text
    assert 'softprompt_first_token_seconds_bucket{le="+Inf"} 1' in text
    for line in text.splitlines():
        assert line.startswith("# ") or float(line.rsplit(" ", 1)[1]) >= 0


VALUES = [None, True, False, 0, 1, -1, 2, 3.5, 1e308, 10**30, "", "a", "正面", "\ud800", [], [1], ["a"], [[]], {}]
NAMES = ["temperature", "top_p", "max_tokens", "stop", "n", "seed", "logprobs", "top_logprobs", "stream", "user"]
NAMES += ["stream_options", "top_k", "min_p", "messages", "prompt", "choices", "input", "model", "role", "content"]
LIKELY: dict[str, list[Any]] = {  # values that a field takes
    "temperature": [0, 0.5, 2],
    "top_p": [0.1, 1],
    "max_tokens": [1, 4],
    "stop": ["不", ["q", "的", "。"]],
    "n": [1, 3],
    "seed": [3, -1],
    "top_k": [0, 5],
    "min_p": [0.2],
    "model": ["a1", "mini"],
    "user": ["me"],
    "prompt": [["你好", "我爱"], [5, 6], [[5], [6, 7]]],
    "messages": [[*USER, {"role": "assistant", "content": "好"}, *USER]],
}


def mutated(draw: random.Random, value: Any) -> Any:
    """A value with one part replaced, removed, doubled or added."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(list(value))
        kind = draw.randrange(5)
        if kind == 0:
            return {other: each for other, each in value.items() if other != name}
        if kind == 1:
            return {**value, draw.choice(NAMES): draw.choice(VALUES)}
        return {**value, name: mutated(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return draw.choice([value[:at], value + value[at:], [*value[:at], mutated(draw, value[at]), *value[at + 1 :]]])
    if isinstance(value, str) and draw.random() < 0.3:
        return value * draw.choice([2, 30]) + draw.choice(["", "\n", "🙂", "</s>", "\0"])
    return draw.choice(VALUES)


def check_mutated(server: Running, numbers: range) -> Counter[str]:
    """Send mutated bodies: each is answered as it asks, or refused with 4xx; none fails, and none hangs.

    Returns:
        How many were answered, by the type of the answer, and how many were refused.
    """
    counts = Counter[str]()
    for number in numbers:
        draw = random.Random(number)
        path = draw.choice(list(BODIES))
        body: Any = BODIES[path]
        for _ in range(draw.randint(0, 4) if path != "/v1/classify" else 0):
            name = draw.choice([name for name in LIKELY if name in BODIES[path] or name not in ("messages", "prompt")])
            body = {**body, "stream": draw.choice([None, True]), name: draw.choice(LIKELY[name])}
            body["logprobs"] = draw.choice([None, True if "messages" in body else 2])
        for _ in range(draw.choice([0, 0, 1, 1, 2])):
            body = mutated(draw, body)
        content = bytearray(json.dumps(body).encode())
        if draw.random() < 0.1:
            content[draw.randrange(len(content))] = draw.randrange(256)
        response = server.post_content(path, bytes(content))
        kind = response.headers["content-type"].partition(";")[0]
        counts[kind if response.status_code == 200 else "refused"] += 1
        if response.status_code != 200:
            assert 400 <= response.status_code < 500, (number, body, response.text)
            error_of(response, response.status_code)
        elif path != "/v1/classify":
            check_answer(json.loads(content), response)
    return counts


def check_answer(body: dict[str, Any], response: httpx.Response) -> None:
    """Assert that there are as many choices as a body asks for, that each is whole, and that none is longer than asked
    or holds a stop text."""
    if response.headers["content-type"].startswith("text/event-stream"):
        *events, done, rest = response.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", ""), body
        pieces = [one for event in events for one in json.loads(event.removeprefix("data: "))["choices"]]
    else:
        pieces = response.json()["choices"]
    prompts, wanted = body.get("prompt"), body.get("n") or 1
    wanted *= len(prompts) if isinstance(prompts, list) and not isinstance(prompts[0], int) else 1
    texts, tokens, reasons = [""] * wanted, [0] * wanted, [[] for _ in range(wanted)]
    for piece in pieces:
        message = piece.get("message") or piece.get("delta") or {"content": piece.get("text")}
        logprobs = piece["logprobs"] or {}
        texts[piece["index"]] += message.get("content") or ""
        tokens[piece["index"]] += len(logprobs.get("content") or logprobs.get("tokens") or [])
        reasons[piece["index"]] += [piece["finish_reason"]] if piece["finish_reason"] else []
    assert all(len(some) == 1 and some[0] in ("stop", "length") for some in reasons), body
    assert max(tokens) <= (body.get("max_tokens") or 16), body
    stops = body.get("stop") or []
    assert not any(stop in text for text in texts for stop in ([stops] if isinstance(stops, str) else stops)), body


def test_mutated_bodies_are_answered_or_refused(server: Running):
    counts = check_mutated(server, range(60))
    assert all(counts[kind] > 5 for kind in ("application/json", "text/event-stream", "refused")), counts
    assert server.ask("a0", "你好", max_tokens=1) is not None and not server.service.unfinished


@pytest.mark.slow
def test_2000_mutated_bodies_are_answered_or_refused(server: Running):
    check_mutated(server, range(60, 2060))
    assert not server.service.unfinished


def test_no_answer_names_a_path_of_the_machine(mini, mini_adapters):
    told = []
    with running_server(mini, mini_adapters, allow_adapter_loading=True) as server:
        for path in ("/v1/models", "/metrics", "/v1/models/a0", "/health", "/"):
            told.append(server.get(path).text)
        for folder in ("../a0", "/etc", "a0/nothing", "a0"):
            told.append(server.post("/v1/adapters", {"name": "x", "folder": folder}).text)
        for body in (CHAT, {**CHAT, "model": str(mini_adapters)[1:]}, {**CHAT, "messages": [*USER, *USER]}):
            told.append(server.post("/v1/chat/completions", body).text)
    for text in told[:-2] + told[-1:]:
        assert str(mini_adapters) not in text and str(mini_adapters.name) not in text
