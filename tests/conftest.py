"""What the tests share: tiny bases that are made on the spot, and the optional folder of real data."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from softprompt.checkpoint import Adapter, adapter_files, peft_config
from softprompt.files import write_folder

if "PYTEST_XDIST_WORKER" in os.environ:  # beside another one
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TEXTS = [
    "Human: 我爱这部电影\n\nAssistant: 正面",
    "Human: 这家酒店太差了\n\nAssistant: 负面",
    "Human: hello\n\nAssistant: ok",
]
BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # BLOOM's pre-tokenizer


def make_tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    """Byte-level BPE with BLOOM's special tokens; it knows every byte and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BLOOM_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    names = dict(zip(["unk_token", "bos_token", "eos_token", "pad_token"], special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=padding_side, **names)


def make_bloom(
    hidden_size: int = 32, n_layer: int = 2, n_head: int = 4, vocab_size: int = 300, seed: int = 0, **config: Any
) -> BloomForCausalLM:
    """A random BLOOM whose every weight matters: layer norms and biases are not left at ones and zeros."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden_size, "n_layer": n_layer, "n_head": n_head, "vocab_size": vocab_size}
    model = BloomForCausalLM(BloomConfig(**sizes, **{"initializer_range": 0.3, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "word_embeddings" in name:
                parameter.mul_(2)
    return model


def write_adapter(folder: Path, base: Path, P: int, template: str = "default", seed: int = 0, size: int = 32) -> None:
    values = torch.randn(P, size, generator=torch.Generator().manual_seed(seed))
    config = peft_config(str(base), make_bloom(hidden_size=size).config, values, "RANDOM")
    write_folder(folder, adapter_files(Adapter(values, config, {"template": template})))


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
        monkeypatch.setattr("softprompt.run.leave_report", lambda *_: None)


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
