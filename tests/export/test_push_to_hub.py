"""Uploads with huggingface_hub, to a server on this machine that stands in for the hub."""

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import peft
import pytest
import torch
from helpers.adapters import write_adapter
from helpers.programs import refused
from helpers.reported_runs import settings_in
from helpers.short_runs import interrupted
from transformers import AutoModelForCausalLM

import softprompt
import train
from softprompt.cli import main, run_command
from softprompt.config.loader import train_config
from softprompt.export.public_files import UPLOADED_FILES
from softprompt.prompt.adapter_io import load_adapter
from softprompt.utils import hub

pytestmark = pytest.mark.pictures
TOKEN = "not_to_be_told_anywhere"


class Hub(BaseHTTPRequestHandler):
    """The few questions that creating a repository and uploading files ask. Like the hub it wants safetensors in its
    large-file storage (git LFS's batch interface), and the others in the commit."""

    def do_HEAD(self):
        self.answer(200, {})

    def do_GET(self):
        if self.path.startswith("/api/whoami-v2"):
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self.answer(
                *((200, {"name": "me", "type": "user", "orgs": []}) if known else (401, {"error": "no"}))
            )
        owner, _, name = self.path.removeprefix("/api/models/").partition("/")
        repo = self.server.repos.get(f"{owner}/{name.split('/')[0]}")
        files = [{"rfilename": file} for file in (repo or {"files": ()})["files"]]
        return self.answer(200 if repo else 404, {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": files})

    def do_POST(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.down:
            return self.answer(self.server.down, {"error": "the hub is asleep"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "who is it?"})
        if self.path == "/api/repos/create":
            told = json.loads(asked)
            name = f"{told.get('organization') or 'me'}/{told['name']}"
            new = name not in self.server.repos
            private = (
                told.get("visibility") == "private" or told.get("private") is True
            )  # as newer and older versions ask
            self.server.repos.setdefault(name, {"private": private, "files": {}})
            return self.answer(200 if new else 409, {"url": f"{self.server.url}/{name}", "name": name, "id": name})
        name = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
        if "/preupload/" in self.path:
            files = [f["path"] for f in json.loads(asked)["files"]]
            modes = [{"path": path, "uploadMode": mode_of(path), "shouldIgnore": False} for path in files]
            return self.answer(200, {"files": modes})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self.answer(
                200, {"transfer": "basic", "objects": [self.place_of(o) for o in json.loads(asked)["objects"]]}
            )
        if self.path == "/api/validate-yaml":  # of the card's front matter
            base = re.search(r"^base_model: (.*)$", json.loads(asked)["content"], re.M)
            good = not base or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base[1])
            faults = [] if good else [{"message": '"base_model" is not valid. Use a model id'}]
            return self.answer(400 if faults else 200, {"errors": faults, "warnings": []})
        for line in map(json.loads, asked.decode().splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.server.repos[name]["files"][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                value = line["value"]
                self.server.repos[name]["files"][value["path"]] = self.server.stored[value["oid"]]
            self.server.commits += line["key"] == "header"
        return self.answer(
            200, {"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1" * 40, "success": 1}
        )

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, {})

    def place_of(self, wanted):
        upload = {"href": f"{self.server.url}/storage/{wanted['oid']}", "header": {}}
        return {**wanted, "actions": {} if wanted["oid"] in self.server.stored else {"upload": upload}}

    def answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def mode_of(path):
    return "lfs" if path.endswith(".safetensors") else "regular"


@pytest.fixture
def server(monkeypatch):
    served = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    served.url = f"http://127.0.0.1:{served.server_port}"
    served.repos, served.stored, served.commits, served.down = {}, {}, 0, None
    threading.Thread(target=served.serve_forever, daemon=True).start()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)  # what HF_ENDPOINT is read into
    for offline in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(offline, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, not git LFS's
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # of processes that a test starts
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    hub.check_reachable.cache_clear()
    yield served
    served.shutdown()
    hub.check_reachable.cache_clear()


@pytest.fixture
def settings(tiny_base, tmp_path) -> dict:
    given = {"push_to_hub": True, "hub_token": TOKEN, "max_steps": 2, "hub_model_id": "org/soft"}
    return settings_in(tmp_path, tiny_base) | given


def told_nowhere(folder: Path, *texts: str) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert not any(TOKEN in text for text in texts)


def ended(settings, capsys, monkeypatch) -> tuple[int, str, str]:
    argv = [f"--{name}={value}" for name, value in settings.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as end:
        run_command(train.main)
    return end.value.code, *capsys.readouterr()


def test_a_run_is_uploaded_with_its_card_and_report(server, settings, tmp_path, capsys, monkeypatch):
    code, out, err = ended({**settings, "hub_private_repo": True}, capsys, monkeypatch)
    assert code == 0 and f"on the hub: {server.url}/org/soft" in err, err
    repo = server.repos["org/soft"]
    assert set(repo["files"]) == set(UPLOADED_FILES) and repo["private"] is True and server.commits == 1
    for name in ("adapter_model.safetensors", "softprompt.json"):
        assert repo["files"][name] == (tmp_path / "run" / name).read_bytes()
    card = repo["files"]["README.md"]
    assert b"library_name: peft" in card and b"model-index" in card and b"org/soft" in card
    told_nowhere(tmp_path, out, err)
    code, _, err = ended({**settings, "overwrite_output_dir": True, "seed": 1}, capsys, monkeypatch)  # again
    assert code == 0 and server.commits == 2
    assert repo["files"]["adapter_model.safetensors"] == (tmp_path / "run/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("model_id", ["org/soft", None])
def test_a_repository_of_another_origin_is_refused_before_training(model_id, server, settings, capsys, monkeypatch):
    name = model_id or "me/run"
    server.repos[name] = {"private": False, "files": {"README.md": b"mine", ".gitattributes": b""}}
    given = {name: value for name, value in settings.items() if model_id or name != "hub_model_id"}
    code, _, err = ended(given, capsys, monkeypatch)
    assert code == 2 and name in err and "README.md" in err and "--hub_model_id" in err
    assert server.commits == 0 and not Path(settings["output_dir"]).exists()


def test_default_repository_name_and_token_from_the_environment(server, settings, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    softprompt.train(**{**settings, "hub_model_id": None, "hub_token": None})
    assert set(server.repos) == {"me/run"} and not server.repos["me/run"]["private"]


@pytest.mark.parametrize("down", [500, 403])
def test_a_failed_upload_loses_nothing(down, server, settings, tmp_path, capsys, monkeypatch):
    server.down = down
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    code, out, err = ended(settings, capsys, monkeypatch)
    last = err.strip().splitlines()[-1]
    assert code == 1 and last.startswith(f"error: the run is complete in {tmp_path / 'run'}, ")
    assert "Try: python infer.py" in out and (tmp_path / "run/report.html").exists()
    told_nowhere(tmp_path, out, err)
    server.down = None
    python, _, module, *asked = shlex.split(last.partition("upload it later with: ")[2])  # to the letter
    assert (python, module, asked[0]) == ("python", "softprompt", "push")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "argv", ["softprompt", *asked])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().out) == (0, f"{server.url}/org/soft\n")
    assert set(server.repos["org/soft"]["files"]) == set(UPLOADED_FILES)


def test_from_python_a_failed_upload_is_a_warning(server, settings, tmp_path, capsys, monkeypatch):
    server.down = 403
    run = softprompt.train(**settings)
    assert run.metrics["train_loss"] > 0 and "403" in run.not_pushed
    assert "warning: the run is complete" in capsys.readouterr().err


def test_nothing_that_is_uploaded_holds_a_path_of_this_machine(server, settings, tmp_path, monkeypatch):
    """Every place is given as a path with a folder of its own, absolute or relative."""
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / f"private_{name}" for name in ("base", "rows", "held", "out", "start")}
    shutil.copytree(settings["model_name_or_path"], places["base"] / "bloom")
    for name in ("rows", "held"):
        places[name].mkdir()
        shutil.copy(settings["dataset"], places[name] / f"{name}.jsonl")
    write_adapter(places["start"] / "first", str(places["base"] / "bloom"), 3)
    given = {
        "model_name_or_path": "private_base/bloom",
        "dataset": str(places["rows"] / "rows.jsonl"),
        "eval_dataset": "private_held/held.jsonl",
        "init_adapter": str(places["start"] / "first"),
        "output_dir": "private_out/run",
    }
    monkeypatch.setattr(sys, "argv", [str(Path(train.__file__).resolve())])  # commands to copy then name its folder
    softprompt.train(**{name: value for name, value in settings.items() if name != "eval_rows"} | given)
    assert os.fsencode(Path(train.__file__).parent) in (places["out"] / "run/report.html").read_bytes()
    files = server.repos["org/soft"]["files"]
    assert set(files) == set(UPLOADED_FILES)
    for name, content in files.items():
        for secret in (tmp_path, Path.cwd(), Path(train.__file__).parent, f"{Path.home()}/", "private_"):
            assert os.fsencode(secret) not in content, (name, secret)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    for name in (b"bloom", b"rows.jsonl"):
        assert name in files["README.md"] and name in files["report.html"]
    for name, content in files.items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    base = AutoModelForCausalLM.from_pretrained(places["base"] / "bloom")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "copy")
    saved = load_adapter(places["out"] / "run").prompt
    assert torch.equal(theirs.prompt_encoder["default"].embedding.weight, saved)
    ours = softprompt.SoftPromptModel.from_pretrained(places["base"] / "bloom", tmp_path / "copy")
    assert torch.equal(ours.adapters[str(tmp_path / "copy")].prompt, saved)


def test_only_a_finished_run_can_be_pushed(server, settings, tmp_path, capsys, monkeypatch):
    given = {name: value for name, value in settings.items() if not name.startswith(("push", "hub"))}
    interrupted({**given, "max_steps": 6}, 3)
    capsys.readouterr()
    for folder, told in ((tmp_path / "run", "has not ended"), (tmp_path / "none", "no such folder")):
        monkeypatch.setattr(sys, "argv", ["softprompt", "push", str(folder), "--hub_token", TOKEN])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "") and told in err and TOKEN not in err
    assert not server.repos


def test_a_resumed_run_is_uploaded_too(server, settings, tmp_path, capsys, monkeypatch):
    server.down = 403
    softprompt.train(**settings)
    server.down = None
    again = {"resume_from_checkpoint": tmp_path / "run", "hub_token": TOKEN}
    code, out, err = ended(again, capsys, monkeypatch)
    assert code == 0 and set(server.repos["org/soft"]["files"]) == set(UPLOADED_FILES), err
    told_nowhere(tmp_path, out, err)


def test_impossible_uploads_are_refused_before_training(server, settings, tmp_path, capsys, monkeypatch):
    cases = {
        "the hub refuses the token": {"hub_token": "wrong_token"},
        "needs a token": {"hub_token": None},
        "name a repository with --hub_model_id": {"hub_model_id": "a/b/c"},
        "only used with --push_to_hub": {"push_to_hub": False},
        "--hub_token is empty": {"hub_token": " "},
    }
    for told, given in cases.items():
        argv = [f"--{name}={value}" for name, value in {**settings, **given}.items() if value is not None]
        line = refused(train, argv, capsys, monkeypatch, tmp_path)
        assert told in line and "wrong_token" not in line


def test_a_hub_that_does_not_answer_at_the_start_is_tried_again(server, settings, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    original = softprompt.training.loop.train

    def back_again(*args):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        return original(*args)

    monkeypatch.setattr("softprompt.training.run.train", back_again)
    code, out, err = ended(settings, capsys, monkeypatch)
    assert code == 0 and "warning: --push_to_hub: the hub does not answer" in out
    assert set(server.repos["org/soft"]["files"]) == set(UPLOADED_FILES), err


def test_the_token_is_never_printed():
    config = train_config(push_to_hub=True, hub_token=TOKEN)
    assert TOKEN not in repr(config) and TOKEN not in json.dumps(config.as_dict())
    with pytest.raises(softprompt.utils.errors.ConfigError) as refusal:
        train_config(push_to_hub=True, hub_token=TOKEN, dataset=TOKEN + "\0")
    assert TOKEN not in str(refusal.value)
