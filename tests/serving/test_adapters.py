"""Adapters that appear, change and go while the server runs, and folders that are not offered."""

import itertools
import shutil
import threading
from types import SimpleNamespace

import httpx
import pytest
import torch
from helpers.adapters import write_adapter_for
from helpers.serving import Running, running_server, slow_steps, until

from softprompt.generation.adapters import LoadedAdapter
from softprompt.serving import registry
from softprompt.serving.args import parse_roots
from softprompt.serving.registry import Registry, base_of
from softprompt.utils.errors import AdapterError

GREEDY = {"do_sample": False, "max_new_tokens": 6}


DEFAULTS = {"INTERVAL": registry.INTERVAL, "GRACE": registry.GRACE}


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch):
    monkeypatch.setattr(registry, "INTERVAL", 0.0)
    monkeypatch.setattr(registry, "GRACE", 0.0)


@pytest.fixture
def write(mini, tmp_path):
    """Write an adapter for the mini base, with an answer of its own for each seed, into a folder below `runs`."""

    def written(name: str, seed: int = 1, base: str = "mini", **settings):
        generation = {**GREEDY, "suppress_tokens": [mini.tokenizer.eos_token_id]}
        folder = tmp_path / "runs" / name
        return write_adapter_for(folder, mini.base, base, 12, seed, generation=generation, **settings)

    (tmp_path / "runs").mkdir()
    return written


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def names(server: Running) -> list[str]:
    return [model["id"] for model in server.get("/v1/models").json()["data"]]


def status(server: Running, model: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "你好"}]}
    return server.post("/v1/chat/completions", body).status_code


def expected(mini, folder) -> str:
    mini.load_adapter(folder, "compared")
    return mini.generate("你好", adapter="compared")


def test_adapters_appear_change_and_go_without_a_restart(mini, runs, write):
    with running_server(mini, runs) as server:
        assert names(server) == ["mini"] and status(server, "one") == 404
        one = write("one", seed=1)
        assert names(server) == ["mini", "one"]
        before = server.ask("one", "你好")
        assert before == expected(mini, one)
        write("one", seed=2)
        after = server.ask("one", "你好")
        assert after == expected(mini, one) != before
        shutil.rmtree(one)
        assert names(server) == ["mini"] and status(server, "one") == 404


def test_the_newest_checkpoint_of_a_training_run_is_served(mini, runs, write):
    with running_server(mini, runs) as server:
        for step in (2, 9, 10):
            newest = write(f"run/checkpoint-{step}", seed=step)
            assert names(server) == ["mini", "run"]
            assert server.ask("run", "你好") == expected(mini, newest)
        (newest / "adapter_model.safetensors").write_bytes(b"damaged")
        assert server.ask("run", "你好") == expected(mini, runs / "run" / "checkpoint-9")
        write("run/checkpoint-11", seed=11)
        done = write("run-is-done", seed=3)
        shutil.copytree(done, runs / "run", dirs_exist_ok=True, copy_function=shutil.copy)
        assert server.ask("run", "你好") == expected(mini, done)
    with running_server(mini, runs / "run") as server:
        assert names(server) == ["mini", "run"]
    with running_server(mini, f"mine={runs / 'run' / 'checkpoint-9'}") as server:
        assert names(server) == ["mini", "mine"]


def test_an_adapter_that_is_removed_while_it_answers_finishes_its_answer(mini, runs, write):
    folder = write("one", seed=1)
    mini.load_adapter(folder, "compared")
    whole = mini.generate("你好", adapter="compared", max_new_tokens=40)
    with running_server(mini, runs) as server, slow_steps(mini, 0.005):
        messages = [{"role": "user", "content": "你好"}]
        stream = server.client().chat.completions.create(model="one", messages=messages, max_tokens=40, stream=True)
        text = next(stream).choices[0].delta.content
        shutil.rmtree(folder)
        assert status(server, "one") == 404
        assert text + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_only_adapters_of_the_base_inside_the_named_folders_are_served(mini, runs, write, tmp_path, capsys):
    write("good")
    write("for-another-base", base="elsewhere/other")
    write(".hidden")
    outside = write("../outside")
    (runs / "link").symlink_to(outside)
    (runs / "inner-link").symlink_to(runs / "good")
    (runs / "empty").mkdir()
    (runs / "file").write_text("x")
    (runs / "broken").mkdir()
    (runs / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    write("mini")  # the name of the base
    with running_server(mini, runs) as server:
        assert names(server) == ["mini", "good", "inner-link"]
        for name in ("../outside", "link", "%2e%2e/outside", "good/../../outside", ".hidden"):
            assert status(server, name) == 404 and server.get(f"/v1/models/{name}").status_code == 404
    told = capsys.readouterr().err
    assert "for-another-base" in told and told.count("broken") >= 1
    with running_server(mini, f"x={outside}") as server:  # a link or folder that is named is served
        assert names(server) == ["mini", "x"]


def test_folders_are_loaded_by_name_only_where_that_is_allowed(mini, runs, write):
    write("run/checkpoint-3", seed=3)
    write("run/checkpoint-4", seed=4)
    write("../outside")
    (runs / "link").symlink_to(runs.parent / "outside")

    def load(server: Running, name: str, folder: str) -> httpx.Response:
        return server.post("/v1/adapters", {"name": name, "folder": folder})

    with running_server(mini, runs) as server:
        assert load(server, "old", "run/checkpoint-3").status_code == 403
    with running_server(mini, runs, allow_adapter_loading=True) as server:
        assert load(server, "old", "run/checkpoint-3").json()["id"] == "old"
        assert server.ask("old", "你好") == expected(mini, runs / "run" / "checkpoint-3")
        assert server.ask("run", "你好") == expected(mini, runs / "run" / "checkpoint-4")
        for folder in ("../outside", str(runs.parent / "outside"), "link", "none", "run/../../outside", "\0"):
            assert load(server, "new", folder).status_code == 400
        for name in ("mini", "run", "old", "a/b", ""):
            assert load(server, name, "run/checkpoint-3").status_code == 400
        assert names(server) == ["mini", "run", "old"]
        shutil.rmtree(runs / "run" / "checkpoint-3")
        assert status(server, "old") == 404


def test_the_base_is_that_of_the_newest_adapter(runs, write):
    with pytest.raises(AdapterError, match="--model_name_or_path"):
        base_of(parse_roots([str(runs)]))
    write("a", base="some/base")
    until(lambda: write("b", base="other/base"))
    assert base_of(parse_roots([str(runs)])) == "other/base"
    with pytest.raises(AdapterError, match="no such folder"):
        parse_roots([str(runs / "none")])


def test_folders_are_looked_at_only_once_in_a_while(mini, runs, write, monkeypatch):
    monkeypatch.setattr(registry, "INTERVAL", 1000.0)
    adapters = Registry(parse_roots([str(runs)]), "mini", mini.base.config.hidden_size, None, "mini", print)
    assert adapters.all() == []
    write("late")
    assert adapters.all() == [] and adapters.get("late") is None


def test_an_adapter_that_is_being_replaced_is_served_meanwhile(mini, runs, write, monkeypatch):
    """A writer moves the old folder away before it moves the new one to its place, or copies one file at a time."""
    monkeypatch.setattr(registry, "GRACE", 1.5)
    one = write("one")
    weights = one / "adapter_model.safetensors"
    with running_server(mini, runs) as server:
        before = server.ask("one", "你好")
        one.rename(runs.parent / "aside")
        assert names(server) == ["mini", "one"] and server.ask("one", "你好") == before
        (runs.parent / "aside").rename(one)
        content = weights.read_bytes()
        weights.write_bytes(content[:100])
        assert server.ask("one", "你好") == before
        weights.write_bytes(content)
        assert server.ask("one", "你好") == before
        shutil.rmtree(one)
        until(lambda: names(server) == ["mini"])
        assert status(server, "one") == 404


def test_a_look_at_the_moment_of_a_replacement_loses_no_adapter(mini, runs, write, monkeypatch):
    """With the intervals of the server: requests come all the time, and one of them finds the folder moved away."""
    now = [1000.0]
    monkeypatch.setattr(registry, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for name, seconds in DEFAULTS.items():
        monkeypatch.setattr(registry, name, seconds)
    one = write("one")
    adapters = Registry(parse_roots([str(runs)]), "mini", mini.base.config.hidden_size, None, "mini", print)
    assert adapters.get("one")

    def served_after(seconds: float) -> bool:
        now[0] += seconds
        return adapters.get("one") is not None

    for _ in range(3):
        one.rename(runs.parent / "aside")
        assert served_after(1.1)
        (runs.parent / "aside").rename(one)
        assert served_after(0.4) and served_after(1.1)
    shutil.rmtree(one)
    assert served_after(1.1) and not served_after(1.1)


@pytest.mark.parametrize("times", [1, registry.READINGS])
def test_files_that_are_replaced_while_they_are_read_are_read_again(times, mini, runs, write, monkeypatch):
    """Otherwise a prompt could be served with the settings of another one. An adapter that is replaced in each reading
    is not served before it is left alone."""
    one, load, said, seeds = write("one"), LoadedAdapter.from_folder, list[str](), iter(range(2, 2 + times))

    def replaced(folder):
        adapter = load(folder)
        for seed in itertools.islice(seeds, 1):
            write("one", seed)
        return adapter

    adapters = Registry(parse_roots([str(runs)]), "mini", mini.base.config.hidden_size, None, "mini", said.append)
    monkeypatch.setattr(LoadedAdapter, "from_folder", replaced)
    assert times == 1 or adapters.get("one") is None
    assert torch.equal(adapters.get("one").adapter.prompt, load(one).prompt) and said == []


def test_adapters_change_while_many_ask(mini, runs, write, monkeypatch):
    """Each answer is that of one of the versions, never a mixture and never an error."""
    monkeypatch.setattr(registry, "GRACE", 60.0)
    versions = {}
    for seed in (1, 2):
        versions[seed] = expected(mini, write("one", seed=seed))
    got: list[str] = []
    with running_server(mini, runs) as server:
        server.ask("one", "你好")  # so that it is known when a request comes while its folder is moved away
        threads = [
            threading.Thread(target=lambda: got.extend(server.ask("one", "你好") for _ in range(4))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for number in range(6):
            write("one", seed=1 + number % 2)
        for thread in threads:
            thread.join()
    assert len(got) == 16 and set(got) <= set(versions.values())
