"""Token ids kept by content: used for the same content only, whole or not at all, and never in the way."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.bases import make_tokenizer
from safetensors.numpy import load_file, save

from softprompt.data import token_cache
from softprompt.data.row_store import RowStore
from softprompt.data.template import Template
from softprompt.data.tokenization import tokenize

ROWS = [{"instruction": f"第{i}题", "input": "", "output": "好" * (i % 3)} for i in range(9)]
ROWS += [{"instruction": "长" * 99, "input": "", "output": "丢"}]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(token_cache, "LEAST_ROWS", 5)
    return tmp_path / "softprompt" / "tokens"


def made(rows=ROWS, tokenizer=None, max_length=40, **options):
    tokenizer, rows = tokenizer or make_tokenizer(), RowStore(rows)
    return token_cache.cached(
        lambda: tokenize(rows, tokenizer, Template(), max_length), rows, tokenizer, "default", max_length, **options
    )


def columns_of(found):
    """All that is kept of every example."""
    examples = found.examples
    return [list(map(int, column)) for column in (
        examples.input_ids, examples.offsets, examples.first_targets, found.kept, found.missing
    )]  # fmt: skip


def test_the_second_time_the_cache_gives_the_same(folder):
    first, second = made(), made()
    (file,) = folder.iterdir()
    assert first.cache is None and second.cache == str(file)
    fresh = tokenize(ROWS, make_tokenizer(), Template(), 40)
    assert columns_of(first) == columns_of(second) == columns_of(fresh) and list(second.examples) == list(
        fresh.examples
    )
    assert all(type(number) is int for e in second.examples for number in (*e.input_ids, *e.labels))
    assert type(second.kept[0]) is type(second.missing[0]) is int
    assert (second.rows, second.cut, second.without_target, second.empty_answers) == (10, 1, 1, 3)
    assert str(second) == f"{first}; token ids from the cache {file}"
    assert made(read=False).cache is None


def test_a_cached_array_is_a_view_of_the_file(folder, tmp_path):
    """The arrays are not copied into memory: /proc/self/maps shows the file, and no array owns its data."""
    for found in (made(), made()):
        (file,) = folder.iterdir()
        columns = (found.examples.input_ids, found.examples.offsets, found.examples.first_targets)
        assert not any(column.flags.owndata for column in columns)
        if Path("/proc/self/maps").exists():
            assert str(file) in Path("/proc/self/maps").read_text()


def test_the_file_is_what_safetensors_reads(folder):
    found = made()
    (file,) = folder.iterdir()
    arrays = load_file(file)
    assert {name: array.dtype for name, array in arrays.items()} == token_cache.ARRAYS
    assert arrays["input_ids"].tolist() == found.examples.input_ids.tolist()


def other_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["题"])
    return tokenizer


def other_end():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<pad>"
    return tokenizer


def splitting_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.split_special_tokens = True
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [*ROWS[:-1], {**ROWS[-1], "output": "失"}]},
        {"rows": ROWS[::-1]},
        {"max_length": 41},
        {"tokenizer": other_tokenizer()},
        {"tokenizer": other_end()},
        {"tokenizer": splitting_tokenizer()},
    ],
)
def test_anything_else_is_made_anew(change, folder):
    made()
    assert made(**change).cache is None
    assert len(list(folder.iterdir())) == 2


def with_one_bit_flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


SPOILED = {
    "empty": lambda content: b"",
    "foreign": lambda content: b"not a cache",
    "cut": lambda content: content[:200],
    "a bit of the ids": lambda content: with_one_bit_flipped(content, len(content) - 300),
    "the last bit": lambda content: with_one_bit_flipped(content, len(content) - 4),
    "another count": lambda content: content.replace(b'"cut":"1"', b'"cut":"2"'),
    "no rows": lambda content: save({n: np.zeros(0, np.int32) for n in token_cache.ARRAYS}, metadata={"rows": "0"}),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_broken_cache_is_none(fault, folder):
    first = made()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.unlink()  # it is memory-mapped: whoever cut it in place would take the ids away
    file.write_bytes(SPOILED[fault](whole))
    assert file.read_bytes() != whole
    again = made()
    assert again.cache is None and again.examples == first.examples
    assert made().cache == str(file)


def test_a_dry_run_keeps_nothing(folder):
    made(write=False)
    assert not folder.exists()


def test_without_a_home_there_is_no_cache(folder, monkeypatch):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.chdir(folder.parent.parent)
    assert made().examples


def test_few_rows_are_not_kept(folder):
    made(ROWS[:4])
    assert not folder.exists()


def test_a_home_that_takes_no_files_stops_nothing(folder, tmp_path):
    (tmp_path / "softprompt").write_text("a file where the folder should be")
    assert made().examples


def test_old_files_go(folder, monkeypatch):
    monkeypatch.setattr(token_cache, "KEPT", 2)
    for n in range(4):
        made(max_length=30 + n)
        for age, path in enumerate(sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns, reverse=True)):
            os.utime(path, (1000 - age, 1000 - age))
    assert len(list(folder.iterdir())) == 2
    assert made(max_length=33).cache
