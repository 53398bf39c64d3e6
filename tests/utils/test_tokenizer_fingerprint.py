"""A tokenizer's fingerprints cover what affects ids and text, but neither its path nor earlier calls."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.bases import make_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, CTRLTokenizer

from softprompt.utils.tokenizer_fingerprint import fingerprint_of_tokenizer, tokenizer_fingerprints

TEXT = "Human: 我爱这部电影\n\nAssistant: "


@pytest.fixture
def folder(tmp_path) -> Path:
    make_tokenizer().save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def loaded(folder):
    return AutoTokenizer.from_pretrained(folder)


def reconfigured(**settings):
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


def own_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")


def named_template(folder: Path) -> None:
    own_template(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")


def begins_with_bos(folder: Path) -> None:
    tokenizer = loaded(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)


def another_word(folder: Path) -> None:
    tokenizer = loaded(folder)
    tokenizer.add_tokens(["电影"])
    tokenizer.save_pretrained(folder)


CHANGES = {
    "end": (reconfigured(eos_token="<s>"), {"eos_token"}),
    "begin": (reconfigured(bos_token="</s>"), {"bos_token"}),
    "pad": (reconfigured(pad_token="<unk>"), {"pad_token"}),
    "no pad": (reconfigured(pad_token=None), {"pad_token"}),
    "template": (own_template, {"chat_template"}),
    "templates": (named_template, {"chat_template"}),
    "template in the configuration": (reconfigured(chat_template="{{ messages }}"), {"chat_template"}),
    "one more special token": (reconfigured(extra_special_tokens=["我爱"]), {"special_tokens", ""}),
    "a special token by name": (reconfigured(extra_special_tokens={"image_token": "<s>"}), {"special_tokens"}),
    "special tokens split": (reconfigured(split_special_tokens=True), {"settings"}),
    "spaces cleaned": (reconfigured(clean_up_tokenization_spaces=True), {"settings"}),
    "bos before every text": (begins_with_bos, {""}),
    "one more word": (another_word, {""}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_affects_only_the_fingerprint_of_its_part(case, folder, tmp_path):
    change, parts = CHANGES[case]
    shutil.copytree(folder, tmp_path / "b")
    change(tmp_path / "b")
    before, after = (tokenizer_fingerprints(loaded(path)) for path in (folder, tmp_path / "b"))
    assert {name for name in after if after[name] != before[name]} == {
        f"tokenizer.{part}" if part else "tokenizer" for part in parts
    }
    assert fingerprint_of_tokenizer(loaded(folder)) != fingerprint_of_tokenizer(loaded(tmp_path / "b"))


def test_path_and_earlier_calls_do_not_matter(folder, tmp_path):
    before = tokenizer_fingerprints(loaded(folder))
    shutil.copytree(folder, tmp_path / "b")
    reconfigured(model_max_length=7, padding_side="right")(tmp_path / "b")
    tokenizer = loaded(tmp_path / "b")
    assert tokenizer_fingerprints(tokenizer) == before
    tokenizer([TEXT, "a"], truncation=True, max_length=3, padding=True)
    assert tokenizer_fingerprints(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "c")  # tokenizer.json now contains truncation and padding
    assert '"max_length": 3' in (tmp_path / "c" / "tokenizer.json").read_text()
    again = loaded(tmp_path / "c")
    assert tokenizer_fingerprints(again) == before
    again(TEXT)
    assert tokenizer_fingerprints(again) == before


@pytest.fixture
def python_tokenizer(tmp_path) -> Path:
    """The folder of a tokenizer implemented in Python: no tokenizer.json, but a file of merges."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b</w>": 1, "ab</w>": 2, "<unk>": 3, "a@@": 4, "b": 5}))
    (tmp_path / "merges.txt").write_text("#version\na b</w>\n")
    CTRLTokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt", eos_token="b").save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda folder: (folder / "merges.txt").write_text("#version\na b\n"), "settings"),
        (reconfigured(eos_token="a"), "eos_token"),
        (own_template, "chat_template"),
    ],
)
def test_a_python_tokenizer(change, part, python_tokenizer, tmp_path):
    before = tokenizer_fingerprints(loaded(python_tokenizer))
    shutil.copytree(python_tokenizer, tmp_path / "b")
    reconfigured(model_max_length=7, padding_side="left")(tmp_path / "b")
    assert tokenizer_fingerprints(loaded(tmp_path / "b")) == before
    change(tmp_path / "b")
    after = tokenizer_fingerprints(loaded(tmp_path / "b"))
    assert {name for name in after if after[name] != before[name]} >= {f"tokenizer.{part}"}


def test_a_tokenizer_without_files(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert tokenizer_fingerprints(loaded(tmp_path)) == tokenizer_fingerprints(loaded(tmp_path))
    assert fingerprint_of_tokenizer(loaded(tmp_path)) != fingerprint_of_tokenizer(ByT5Tokenizer(extra_ids=3))
