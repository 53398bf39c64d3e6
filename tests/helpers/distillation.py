"""What the tests of distillation share: questions, a text, and a base with a chat template."""

import torch

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
