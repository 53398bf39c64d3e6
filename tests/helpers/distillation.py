"""What the tests of distillation share: questions, a text, and a base with a chat template."""

import pytest
import torch

from softprompt.generation.continuous_batching import ContinuousBatchingGenerator
from softprompt.models.loading import load_tokenizer, read_base

QUESTIONS = [f"问题{i}：好吗" for i in range(9)]
TEXT = "请用一句话回答客人的问题，并且总是说谢谢您。"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def chat_base(folder: str, template: str) -> str:
    """Write a copy of the base in `folder` with this chat template, and return its folder."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained("chat")
    read_base(str(folder), torch.device("cpu"), torch.float32, None).save_pretrained("chat")
    return "chat"


def counted_requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each call of the generator appends its number of requests."""
    generate, asked = ContinuousBatchingGenerator.generate, list[int]()

    def counting(self, requests, *more):
        asked.append(len(requests))
        return generate(self, requests, *more)

    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", counting)
    return asked
