"""Damaged and hostile files: data files for the readers, adapter folders for the loader."""

import contextlib
import csv
import io
import json
import os
import pickle
import random
import re
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import fault_tools
from hypothesis import strategies as st

from softprompt.config.schema import is_text
from softprompt.generation import model as inference
from softprompt.models import loading as model
from softprompt.prompt.adapter_folder import adapter_files, peft_config
from softprompt.prompt.adapter_io import Adapter
from softprompt.utils.errors import DataError, SoftpromptError

TEXT = st.text(max_size=8) | st.sampled_from(["", "好", "a\nb", '"', "\u2028", "\ud83d", "\0", "a,b"])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
GOOD = st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}, optional={"input": TEXT | st.none(), "id": ANY})
BAD = st.dictionaries(st.sampled_from(["instruction", "input", "output", "x"]), ANY, max_size=4) | ANY


@dataclass(frozen=True)
class DataFile:
    name: str
    content: bytes

    def check(self, path: Path, load_rows: Any, template: Any) -> str:
        """Read it. Return "accepted", "refused" or "refused with its row"; fail if it is neither accepted nor refused
        in one line that names the file."""
        try:
            rows = load_rows(str(path), template, {})
        except DataError as error:
            told = str(error)
            assert told.startswith(str(path)) and "\n" not in told, told
            where = re.match(r", (?:line|row) (\d+): ", told[len(str(path)) :])
            if where:
                parts = self.content.count(b"\n") + self.content.count(b"{")
                assert 1 <= int(where[1]) <= (5 if path.suffix == ".parquet" else 2 + parts)  # of a parquet file's rows
            return "refused with its row" if where else "refused"
        assert rows and all(is_text(row[name]) for row in rows for name in ("instruction", "input", "output"))
        return "accepted"


@st.composite
def data_files(draw: Any) -> DataFile:
    kind = draw(st.sampled_from(["jsonl", "json", "csv", "parquet"]))
    rows = draw(st.lists(GOOD, min_size=1, max_size=4))
    if draw(st.booleans()):
        rows.insert(draw(st.integers(0, len(rows))), draw(BAD))
    content = _written(kind, rows)
    if draw(st.integers(0, 3)) == 0 and content:  # damage the bytes
        at = draw(st.integers(0, len(content) - 1))
        content = draw(
            st.sampled_from(
                [
                    content[:at],
                    content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :],
                    content[at:] + content,
                ]
            )
            | st.binary(max_size=40)
        )
    return DataFile(f"rows.{kind}", content)


def _written(kind: str, rows: list[Any]) -> bytes:
    if kind == "jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    if kind == "json":
        return json.dumps(rows, indent=1).encode()
    rows = [row if isinstance(row, dict) else {"x": row} for row in rows]
    texts = [{name: str(value) for name, value in row.items()} for row in rows]
    if kind == "csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, ["instruction", "input", "output"], restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(texts)
        return stream.getvalue().encode(errors="replace")
    import pyarrow
    from pyarrow.parquet import write_table

    sink, clean = io.BytesIO(), [{n: v.encode(errors="replace").decode() for n, v in row.items()} for row in texts]
    names = sorted({name for row in clean for name in row})
    write_table(pyarrow.table({name: [row.get(name) for row in clean] for name in names}), sink)
    return sink.getvalue()


class Evil:
    """Unpickling this runs a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch harmed",)


VALUES = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    1e308,
    "",
    "x",
    "../../etc/passwd",
    "/dev/zero",
    "\0",
    "\ud800",
    "a" * 5000,
    [],
    {},
]
VALUES += [[[[[1]]]], {"a": None}, "http://127.0.0.1:9/x", "evil", "evil.py", "{instruction.__class__}", "chat", 1.5]
KEYS = ["peft_type", "num_virtual_tokens", "token_dim", "base_model_name_or_path", "auto_mapping", "trust_remote_code"]
KEYS += [
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "modules_to_save",
    "revision",
    "template",
    "generation",
    "auto_map",
]
SETTINGS = ["do_sample", "max_new_tokens", "max_length", "trust_remote_code", "top_p", "assistant_model", "seed"]
NAMES = ["adapter_config.json", "adapter_model.safetensors", "softprompt.json"]


def _mutate(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(NAMES)
    kind = draw.randrange(10)
    if kind <= 3:
        _edit(folder / draw.choice(["adapter_config.json", "softprompt.json"]), draw)
    elif path.is_symlink() or not path.is_file():
        return
    elif kind == 4:
        content = path.read_bytes()
        path.write_bytes(content[: draw.randrange(len(content) + 1)])
    elif kind in (5, 6):
        content = bytearray(path.read_bytes() or b"\0")
        for _ in range(draw.randrange(1, 4)):  # mostly in the headers
            content[draw.randrange(min(len(content), 120))] = draw.randrange(256)
        path.write_bytes(bytes(content))
    elif kind == 7:
        _header(folder / "adapter_model.safetensors", draw)
    else:
        path.unlink()
        outside = folder.parent / "outside"
        draw.choice(
            [
                lambda: None,
                lambda: path.mkdir(),
                lambda: os.mkfifo(path),
                lambda: path.symlink_to("/dev/zero"),
                lambda: path.symlink_to("/etc/passwd"),
                lambda: path.symlink_to(path.name),
                lambda: path.symlink_to(outside / path.name),
                lambda: path.write_bytes(b" " * (2 << 20)),
                lambda: path.write_bytes(b"[" * 100_000),
            ]
        )()


def _edit(path: Path, draw: random.Random) -> None:
    if path.is_symlink() or not path.is_file():  # an earlier mutation made it /dev/zero or a pipe
        return
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return
    if isinstance(values, dict):
        key, value = draw.choice(KEYS), draw.choice(VALUES)
        if key == "generation" and draw.random() < 0.7:
            value = {draw.choice(SETTINGS): value}
        path.write_text(json.dumps({**values, key: value}))


def _header(path: Path, draw: random.Random) -> None:
    """Change the shape, dtype or offsets in the header of a safetensors file."""
    if path.is_symlink() or not path.is_file():
        return
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    pairs = [(b'"F32"', b'"F64"'), (b'"F32"', b'"I32"'), (b'"F32"', b'"F8_E4M3"'), (b"[3,32]", b"[32,3]")]
    pairs += [(b"[3,32]", b"[3,-1]"), (b"[3,32]", b"[99999999999,99999999999]"), (b"[0,384]", b"[0,999999999999]")]
    pairs += [(b"prompt_embeddings", b"other"), (b"pt", b"\xff\xff"), (b"[0,384]", b"[384,0]")]
    old, new = draw.choice(pairs)
    header = content[8 : 8 + size].replace(old, new)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def _good(folder: Path, config: Any) -> None:
    values = torch.ones(3, 32)
    adapter = Adapter(values, peft_config("some/base", config, values, "RANDOM"), {"template": "default"})
    folder.mkdir()
    for name, content in adapter_files(adapter).items():
        (folder / name).write_bytes(content)
    for name in ("evil.py", "modeling_evil.py", "__init__.py"):
        (folder / name).write_text("raise SystemExit('imported')")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_evil.Evil"}}))


SEEN = ("import", "socket.connect", "socket.getaddrinfo", "pickle.find_class", "exec", "compile", "os.system")
SEEN += ("subprocess.Popen", "os.exec", "os.posix_spawn")


def _load_all(n: int, base: str, folder: Path, guilty: bool, answer: Any) -> None:
    """Load `n` mutated adapter folders, and send what happened to `answer`. Runs in a process of its own, because an
    audit hook cannot be removed."""
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (each load warns that the base has another name)
    loaded, tokenizer = model.load_base(base, torch.device("cpu"), torch.float32), model.load_tokenizer(base)
    inference.load_base, inference.load_tokenizer = lambda *_: loaded, lambda *_: tokenizer
    draw, events, faults, counts = random.Random(0), [], [], {"accepted": 0, "refused": 0}
    _good(folder / "outside", loaded.config)
    inference.SoftPromptModel.from_pretrained(base, folder / "outside")  # now all that is imported lazily is imported
    armed = False

    def audit(event: str, args: tuple) -> None:
        if armed and event in SEEN:
            events.append(f"{event} {args!r:.200}")

    sys.addaudithook(audit)
    for number in range(n):
        place = folder / "adapter"
        _good(place, loaded.config)
        for _ in range(draw.randrange(1, 4)):
            _mutate(place, draw)
        armed = True
        try:
            if guilty:
                _do_harm(place)
            tuned = inference.SoftPromptModel.from_pretrained(base, place)
            tuned.settings()
            counts["accepted"] += 1
        except SoftpromptError as error:
            counts["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 6000:
                faults.append(f"{number}: {error!r:.300}")
        except BaseException as error:
            faults.append(f"{number}: {error!r:.300}")
        armed = False
        shutil.rmtree(place)
    if (folder / "harmed").exists() and not guilty:
        faults.append("a command was run")
    answer.send({**counts, "events": events, "faults": faults})


def _do_harm(place: Path) -> None:
    pickle.loads(pickle.dumps(Evil()))
    sys.path.insert(0, str(place))
    with contextlib.suppress(SystemExit):
        import evil  # noqa: F401
    socket.socket().connect_ex(("127.0.0.1", 9))


def adapters_survived(n: int, base: Path, folder: Path, guilty: bool = False) -> dict[str, Any]:
    """Load `n` mutated adapter folders in another process. Return how many were accepted and refused, which exceptions
    were not ours, and which audit events occurred that loading must not cause. If `guilty`, cause them on purpose."""
    ours, theirs = fault_tools.SERVER.Pipe(duplex=False)
    process = fault_tools.SERVER.Process(target=_load_all, args=(n, str(base), folder, guilty, theirs))
    process.start()
    theirs.close()
    assert ours.poll(300), "it hangs"
    result = ours.recv()
    process.join()
    return result
