"""What the tests share: tiny bases that are made on the spot, and the optional folder of real data."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.bases import make_bloom, make_tokenizer, write_adapter
from transformers import PreTrainedTokenizerFast

if "PYTEST_XDIST_WORKER" in os.environ:  # beside another one
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def no_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token ids of test runs are kept apart from those of the user who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave none in tests that are not marked to be about them; each takes half a second."""
    if request.node.get_closest_marker("reports") is None:
        monkeypatch.setattr("softprompt.report.after_training.complete_report", lambda *_: None)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder as a hub would give it: a random BLOOM of hidden size 32 and its tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_bloom().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real base, for those who have them."""
    if "SOFTPROMPT_SHARED" not in os.environ:
        pytest.skip("needs the folder of real data that SOFTPROMPT_SHARED names")
    return Path(os.environ["SOFTPROMPT_SHARED"])


@pytest.fixture
def place(tiny_base, tmp_path, monkeypatch) -> Path:
    """A folder with two adapters of different lengths and templates, which the programs run in."""
    write_adapter(tmp_path / "a", tiny_base, 3, seed=1)
    write_adapter(tmp_path / "b", tiny_base, 7, "问：{q}\\n答：", seed=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path
