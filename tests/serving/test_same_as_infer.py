"""The server beside infer.py itself: the same adapter, prompt and settings give the same answer."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from helpers.programs import run_infer
from helpers.serving import Running, running_server

from softprompt.generation.model import SoftPromptModel

SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
CASES = {
    "mini": [("a3", "我爱这部电影", {}), ("a6", "你好", SAMPLED)],
    "llama": [("chat", "hello", {}), ("default", "How are you?", SAMPLED)],
}


def flags(settings: dict[str, Any]) -> list[str]:
    return ["--do_sample", "true", *(str(part) for name in settings for part in (f"--{name}", settings[name]))]


def ask_beside_32_others(server: Running, cases: list, others: list[str]) -> list[str]:
    """Ask for all answers at the same time, while the adapters `others` answer further questions."""

    async def ask(client, name: str, text: str, settings: dict[str, Any]) -> str:
        messages = [{"role": "user", "content": text}]
        answer = await client.chat.completions.create(model=name, messages=messages, **settings)
        return answer.choices[0].message.content

    async def ask_all() -> list[str]:
        async with server.async_client() as client:
            more = [(others[n % len(others)], "好" * (1 + n % 5), {"max_tokens": 2 + n % 7}) for n in range(32)]
            asked = [*more[:16], *cases, *more[16:]]
            return (await asyncio.gather(*(ask(client, *each) for each in asked)))[16 : 16 + len(cases)]

    return asyncio.run(ask_all())


@pytest.mark.parametrize("base", ["mini", "llama"])
def test_an_answer_is_that_of_infer_alone_and_among_32_others(
    base: str, mini: SoftPromptModel, mini_adapters: Path, llama: Path, capsys, monkeypatch
):
    folder = mini_adapters if base == "mini" else llama / "runs"
    model = mini if base == "mini" else SoftPromptModel.from_pretrained(llama / "base", "none")
    cases, expected = CASES[base], []
    for name, text, settings in cases:
        argv = ["--adapter", folder / name, "--prompt", text, *(flags(settings) if settings else [])]
        expected.append(run_infer(argv, capsys, monkeypatch).removesuffix("\n"))
    names = sorted(path.name for path in folder.iterdir())
    with running_server(model, folder, batch_size=8) as server:
        alone = [server.ask(name, text, **settings) for name, text, settings in cases]
        assert alone == expected and all(expected)
        assert ask_beside_32_others(server, cases, names) == expected
        otherwise = [server.ask(name, text, **{**settings, "seed": 8}) for name, text, settings in cases[1:]]
    assert otherwise != expected[1:], "the sample would be the same for any seed"
