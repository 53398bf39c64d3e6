"""Fixtures of many test modules: tiny bases, settings of a short run, and the optional folder of real data."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.bases import make_bloom, make_tokenizer
from helpers.short_runs import ROWS, WITHOUT_PICTURES
from helpers.small_bases import small_base
from transformers import PreTrainedTokenizerFast

from softprompt.utils import translation

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def no_users_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the caches and the chats' history of test runs apart from those of the user who runs the tests, and show
    messages in English whatever the user's locale is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv(translation.VARIABLE, "en")
        yield


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show messages in English, whatever language an earlier test has chosen by --lang."""
    monkeypatch.setattr(translation, "_chosen", None)


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests that are not marked `pictures`, matplotlib is as if it was not installed. Runs end as they always do and
    write a report, but one without pictures: drawing them takes most of the time of a run on a tiny base."""
    if request.node.get_closest_marker("pictures") is None:
        for name, module in WITHOUT_PICTURES.items():
            monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 words with BLOOM's special tokens."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder as downloaded from the hub: a random BLOOM of hidden size 32 and its tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_bloom().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base_folder(
    request: pytest.FixtureRequest,
    tiny_base: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """`tiny_base`, or, with an indirect parameter (see `small_bases.ON_DECODERS`), a base of that kind and of the same
    hidden size with the same tokenizer. It writes no control characters, which a chat would show escaped."""
    kind = getattr(request, "param", "bloom")
    if kind == "bloom":
        return tiny_base
    folder = tmp_path_factory.mktemp("bases") / kind
    base = small_base(kind)
    with torch.no_grad():
        base.lm_head.weight[[id for id in range(len(tokenizer)) if not tokenizer.decode([id]).isprintable()]] = 0
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and a real base that SOFTPROMPT_SHARED names; without it the test is skipped."""
    if "SOFTPROMPT_SHARED" not in os.environ:
        pytest.skip("needs the folder of real data that SOFTPROMPT_SHARED names")
    return Path(os.environ["SOFTPROMPT_SHARED"])


@pytest.fixture
def run_settings(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run of 13 steps over 19 rows in windows of 4, so that each epoch ends with a short window. It is
    written to `run` in the current folder, which is a new one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return {
        **{"model_name_or_path": str(tiny_base), "dataset": "rows.jsonl", "eval_rows": 4, "output_dir": "run"},
        **{"max_steps": 13, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3},
        **{"save_steps": 2, "eval_steps": 5, "tokens_per_microbatch": 30},
    }


@pytest.fixture
def place(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, a new one, with two adapters of different lengths and templates: a and b."""
    write_adapter(tmp_path / "a", base_folder, 3, seed=1)
    write_adapter(tmp_path / "b", base_folder, 7, "问：{q}\\n答：", seed=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path
