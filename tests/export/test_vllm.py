"""`export --engine vllm`: what vLLM's code makes of the files is what softprompt computes.

vLLM needs a GPU and is not installed here. `as_vllm` follows vllm/renderers (embed_utils, hf, chat_utils) of vLLM 0.33.
"""

import base64
import binascii
import io
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from helpers.adapters import write_adapter_for
from helpers.bases import make_bloom, make_tokenizer
from helpers.small_bases import small_base
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedModel

from softprompt import SoftPromptModel
from softprompt.data.encoding import prompt_ids
from softprompt.export.plain_model import export
from softprompt.export.vllm import CLIENT_FILE, EMBEDS_FILE, README_FILE, TEMPLATE_FILE, encode_prompt
from softprompt.utils.errors import AdapterError, ConfigError, OutputError

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"  # takes lists of parts
QUESTION = "我爱这部电影"


def decoded(data: str, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """The tensor that vLLM's safe_load_prompt_embeds makes of a part `prompt_embeds`."""
    with torch.sparse.check_sparse_tensor_invariants():
        content = io.BytesIO(base64.b64decode(data.encode(), validate=True))
        tensor = torch.load(content, weights_only=True, map_location="cpu")
        tensor = tensor.to_dense()
    assert tensor.dim() == 2 and tensor.shape[1] == hidden_size and tensor.is_floating_point()
    return tensor.to(dtype)


def as_vllm(folder: Path, tokenizer: Any, base: PreTrainedModel, messages: list[dict[str, Any]], parts: bool = False):
    """The input embeddings [1, P+T, H] that vLLM makes of messages.

    Args:
        parts: Whether the content of a message is a list of parts for the chat template, as vLLM decides by its text.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": ["<prompt_embeds>"]})
    placeholder, H = tokenizer.convert_tokens_to_ids("<prompt_embeds>"), base.get_input_embeddings().embedding_dim
    tensors, said = [], []
    for message in messages:
        content = message["content"]
        texts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "prompt_embeds":
                tensors.append(decoded(part["data"], H, base.dtype))
            texts.append("<prompt_embeds>" if part["type"] == "prompt_embeds" else part["text"])
        whole = [{"type": "text", "text": text} for text in texts] if parts else "\n".join(texts)
        said.append({"role": message["role"], "content": whole})
    settings = {"chat_template": (folder / TEMPLATE_FILE).read_text(), "add_generation_prompt": True}
    marked = json.loads(json.dumps(said).replace("<prompt_embeds>", "<prompt_embeds>__vllm_prompt_embed_0__"))
    assert tokenizer.apply_chat_template(marked, tokenize=False, **settings).count("__vllm_prompt_embed_0__") == 1
    ids = tokenizer.apply_chat_template(said, return_dict=False, **settings)
    assert ids.count(placeholder) == len(tensors) == 1
    at = ids.index(placeholder)
    words = base.get_input_embeddings()(torch.tensor(ids[:at] + ids[at + 1 :]))
    return torch.cat([words[:at], tensors[0], words[at:]])[None]


def request(folder: Path, question: str = QUESTION) -> list[dict[str, Any]]:
    """The messages of client.py."""
    data = (folder / EMBEDS_FILE).read_text()
    part = {"type": "prompt_embeds", "data": data}
    return [{"role": "system", "content": [part]}, {"role": "user", "content": question}]


def exported(tmp_path: Path, base: PreTrainedModel, chat: str | None = None, P: int = 4, **settings: Any) -> Path:
    """Write base, adapter and export; return the folder of the last."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_adapter_for(tmp_path / "adapter", base, str(tmp_path / "base"), P, **settings)
    export(tmp_path / "adapter", tmp_path / "out", engine="vllm")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "kind, template, chat, parts",
    [
        ("bloom", "default", None, False),
        ("bloom", "Q: {instruction}\\nA: ", None, False),
        ("bloom", "chat", CHAT, False),
        ("bloom", "chat", PARTS, True),
        ("gemma3_text", "default", None, False),  # scales its words' embeddings, but not those it is given
    ],
)
def test_vllm_computes_the_logits_of_base_and_prompt(kind, template, chat, parts, tmp_path):
    base = make_bloom() if kind == "bloom" else small_base(kind)
    folder = exported(tmp_path, base, chat, template=template)
    ours = SoftPromptModel.from_pretrained(str(tmp_path / "base"), tmp_path / "adapter", device="cpu")
    question = [{"type": "text", "text": QUESTION}] if parts else QUESTION
    row = {"messages": [{"role": "user", "content": question}]} if chat else {"instruction": QUESTION}
    ids = prompt_ids(ours.tokenizer, [ours.template.render(row, ours.tokenizer)], ours.template)
    with torch.no_grad():
        words = ours.base.get_input_embeddings()(torch.tensor(ids))
        expected = ours.base(inputs_embeds=torch.cat([ours.prompt[None], words], 1)).logits
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        rows = as_vllm(folder, tokenizer, ours.base, request(folder), parts)
        assert torch.equal(ours.base(inputs_embeds=rows).logits, expected)


def test_the_first_message_holds_the_prompt_and_nothing_else(tmp_path):
    folder = exported(tmp_path, make_bloom())
    tokenizer, base = make_tokenizer(), make_bloom()
    system, user = request(folder)
    said = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    more = as_vllm(folder, tokenizer, base, [system, user, *said])
    assert more.shape[1] > as_vllm(folder, tokenizer, base, [system, user]).shape[1]
    beside = {"role": "system", "content": [*system["content"], {"type": "text", "text": "be kind"}]}
    plain = {"role": "system", "content": "be kind"}
    for wrong in ([beside, user], [plain, user], [user], [{**user, "content": system["content"]}, user]):
        with pytest.raises(TemplateError, match="holds the prompt embeddings"):
            as_vllm(folder, tokenizer, base, wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_prompt_is_written_in_the_asked_dtype_and_is_all_that_is_written(dtype):
    whole = torch.randn(50, 8, dtype=getattr(torch, dtype))
    data = encode_prompt(whole[3:5])
    assert torch.equal(decoded(data, 8, whole.dtype), whole[3:5])
    assert len(data) < len(encode_prompt(whole))
    with pytest.raises(binascii.Error):
        decoded("!" + data, 8, whole.dtype)


def test_the_client_sends_the_settings_of_the_adapter(tmp_path, monkeypatch, capsys):
    generation = {"do_sample": True, "temperature": 0.5, "top_k": 7, "max_new_tokens": 9, "stop_strings": ["。"]}
    folder = exported(
        tmp_path, make_bloom(), generation={**generation, "eos_token_id": [2, 5], "suppress_tokens": [11]}
    )
    sent: dict[str, Any] = {}

    def create(**body: Any) -> list[Any]:
        sent.update(body)
        deltas = [SimpleNamespace(content=text) for text in ("很", None, "好")]
        return [SimpleNamespace(choices=[SimpleNamespace(delta=delta)]) for delta in deltas]

    models = SimpleNamespace(list=lambda: SimpleNamespace(data=[SimpleNamespace(id="base")]))
    chat = SimpleNamespace(completions=SimpleNamespace(create=create))
    monkeypatch.setattr(openai, "OpenAI", lambda **given: SimpleNamespace(models=models, chat=chat))
    monkeypatch.setattr(sys, "argv", [CLIENT_FILE, QUESTION])
    runpy.run_path(str(folder / CLIENT_FILE))
    assert capsys.readouterr().out == "很好\n" and len((folder / CLIENT_FILE).read_text().splitlines()) <= 22
    assert sent.pop("messages") == request(folder)
    more = {"stop_token_ids": [2, 5], "top_k": 7, "include_stop_str_in_output": True}
    assert sent.pop("extra_body") == more
    assert sent == {"model": "base", "stream": True} | {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 1.0,
        "stop": ["。"],
        "logit_bias": {"11": -100},
    }
    assert "trusted" in (folder / README_FILE).read_text() and str(tmp_path) not in (folder / README_FILE).read_text()


def test_what_cannot_be_served_is_refused_and_what_is_not_sent_is_named(tmp_path):
    base = make_bloom()
    with pytest.raises(ConfigError, match="question"):
        exported(tmp_path / "columns", base, template="{context}\nQ: {question} A: ")
    folder = exported(tmp_path, base, generation={"repetition_penalty": 1.2, "do_sample": False})
    assert "repetition" not in (folder / CLIENT_FILE).read_text()
    assert "repetition_penalty" in export(tmp_path / "adapter", tmp_path / "again", engine="vllm")
    with pytest.raises(OutputError, match="exists already"):
        export(tmp_path / "adapter", folder, engine="vllm")
    with pytest.raises(AdapterError, match="hidden size"):
        export(tmp_path / "adapter", tmp_path / "other", engine="vllm", model_name_or_path="mini")
    with pytest.raises(ConfigError, match="engine"):
        export(tmp_path / "adapter", tmp_path / "other", engine="tgi")
