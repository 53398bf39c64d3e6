"""A server of the mini base with eight adapters, whose prompts are random; and a tiny Llama with two."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.adapters import write_adapter_for
from helpers.bases import make_tokenizer
from helpers.serving import Running, running_server
from helpers.small_bases import small_base

from softprompt.generation.model import SoftPromptModel

NAMES = [f"a{number}" for number in range(8)]
TEMPLATES = ["default", "问：{q}\\n答："]
LLAMA = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"


@pytest.fixture(scope="session")
def mini() -> SoftPromptModel:
    return SoftPromptModel.from_pretrained("mini", "none")


@pytest.fixture(scope="session")
def mini_adapters(mini: SoftPromptModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters of several lengths and templates; their answers are greedy and do not end early."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(NAMES):
        generation = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": [mini.tokenizer.eos_token_id]}
        write_adapter_for(
            folder / name,
            mini.base,
            "mini",
            P=1 + 2 * number,
            seed=number,
            template=TEMPLATES[number % 2],
            generation=generation,
        )
        mini.load_adapter(folder / name, name)  # for comparison
    return folder


@pytest.fixture(scope="session")
def server(mini: SoftPromptModel, mini_adapters: Path) -> Iterator[Running]:
    with running_server(mini, mini_adapters, batch_size=8) as running:
        yield running


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template, an adapter that was trained with it, and one that was not."""
    folder, tokenizer = tmp_path_factory.mktemp("llama"), make_tokenizer()
    tokenizer.chat_template = LLAMA
    base = small_base("llama", seed=3)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    generation = {"do_sample": False, "max_new_tokens": 9}
    for number, template in enumerate(("chat", "default")):
        write_adapter_for(
            folder / "runs" / template, base, str(folder / "base"), 3, number, template=template, generation=generation
        )
    return folder
