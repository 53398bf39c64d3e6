"""Write what a vLLM server of the unchanged base needs for a prompt per request: `--engine vllm`.

prompt_embeds.txt    the prompt for vLLM's `prompt_embeds`: [P, H], written by torch.save, in base64
chat_template.jinja  writes the prompt's embeddings, then the messages in the training template
client.py            asks a question
README.md            how to start the server
"""

import base64
import io
from typing import Any

import torch
from torch import Tensor

from softprompt.export.chat_template import embeddings_template
from softprompt.export.source import Source
from softprompt.generation.adapters import warning_of_other_base
from softprompt.generation.requests import GenerationSettings, merge_settings
from softprompt.models.loading import base_path, load_config, load_tokenizer
from softprompt.prompt.initial import check_fits
from softprompt.prompt.public_names import public_name
from softprompt.utils.atomic_io import write_folder
from softprompt.utils.errors import OutputError
from softprompt.utils.model_config import text_config
from softprompt.utils.progress import say

EMBEDS_FILE, TEMPLATE_FILE, CLIENT_FILE, README_FILE = (
    "prompt_embeds.txt",
    "chat_template.jinja",
    "client.py",
    "README.md",
)
# Settings that are not sent: a penalty ends vLLM's engine (vllm-project/vllm#57719), and it does not have the others.
NOT_SENT = ("repetition_penalty", "no_repeat_ngram_size", "num_beams")
CLIENT = '''\
"""Ask the base that vLLM serves, with the prompt of this folder: python client.py "your question"."""

import sys
from pathlib import Path

from openai import OpenAI

SETTINGS = {settings!r}

prompt = (Path(__file__).parent / {file!r}).read_text()
messages = [
    {{"role": "system", "content": [{{"type": "prompt_embeds", "data": prompt}}]}},
    {{"role": "user", "content": sys.argv[1]}},
]
client = OpenAI(base_url="http://localhost:8000/v1", api_key="EMPTY")
model = client.models.list().data[0].id
for part in client.chat.completions.create(model=model, messages=messages, stream=True, **SETTINGS):
    print(part.choices[0].delta.content or "", end="", flush=True)
print()
'''
README = """\
# A soft prompt for vLLM

{P} virtual tokens for {base}, written by softprompt for vLLM 0.21 or newer. In this folder:

```bash
pip install vllm openai
vllm serve {base} --enable-prompt-embeds --chat-template {template} \\
  --generation-config vllm --no-enable-prefix-caching
python {client} "your question"
```

The server's model is the unchanged base. Each request brings its prompt: `{embeds}` as the system message, in a part
`{{"type": "prompt_embeds", "data": …}}`. Other prompts of the same template can be sent to the same server.

- **Enable prompt embeddings for trusted users only**: vLLM's documentation says that those of a wrong shape can crash
  its engine.
- `--no-enable-prefix-caching`: the keys of vLLM's prefix cache leave out which rows of a request are embeddings, so a
  request may be answered from the cache of another (vllm-project/vllm#56655).
- Send no penalties: they end the engine (vllm-project/vllm#57719).
- `--generation-config vllm`: the settings of the request count, not those of the base's files.
"""


def write_for_vllm(source: Source) -> str:
    """Write the folder `source.output` and return one line that says what was written. The base's weights are not read.

    Raises:
        AdapterError: The prompt does not fit the base.
        ConfigError: vLLM's messages cannot fill the adapter's template.
        ModelError: The base's configuration or tokenizer cannot be used.
        OutputError: The folder cannot be written.
    """
    tokenizer, config = load_tokenizer(base_path(source.base)), load_config(base_path(source.base))
    prompt, settings = source.adapter.prompt, merge_settings(source.tuned.generation, {})
    check_fits(source.folder, prompt, text_config(config).hidden_size, source.base)
    end = tokenizer.eos_token_id
    template = embeddings_template(tokenizer, source.tuned.template)
    dtype = (config.dtype or torch.float32) if source.dtype == "auto" else getattr(torch, source.dtype)
    names = {"embeds": EMBEDS_FILE, "template": TEMPLATE_FILE, "client": CLIENT_FILE}
    texts = {
        EMBEDS_FILE: encode_prompt(prompt.to(dtype)),
        TEMPLATE_FILE: template,
        CLIENT_FILE: CLIENT.format(settings=request_settings(settings, end), file=EMBEDS_FILE),
        README_FILE: README.format(P=len(prompt), base=public_name(source.base), **names),
    }
    try:
        write_folder(source.output, {name: text.encode() for name, text in texts.items()})
    except OSError as error:
        raise OutputError(f"--output {source.output}: cannot be written: {error}; nothing was left behind") from None
    if warning := warning_of_other_base(source.folder, source.tuned.base, source.base):
        say(warning)
    left_out = [name for name in NOT_SENT if getattr(settings, name) != getattr(GenerationSettings, name)]
    note = f"; {', '.join(left_out)} cannot be sent to vLLM and was left out" if left_out else ""
    made = f"{len(prompt)} virtual tokens for {source.base}; README.md says how to serve it with vLLM"
    return f"{source.output}: {made}{note}"


def encode_prompt(prompt: Tensor) -> str:
    """Return a prompt [P, H] of any floating-point dtype in base64, as the `data` of a content part `prompt_embeds`."""
    buffer = io.BytesIO()
    torch.save(prompt.detach().cpu().clone(), buffer)  # clone: saving a view would save its whole storage
    return base64.b64encode(buffer.getvalue()).decode()


def request_settings(settings: GenerationSettings, eos_token_id: int) -> dict[str, Any]:
    """Return generation settings as arguments of OpenAI's client. `max_length`, which counts the question, too, becomes
    a limit of the answer."""
    more: dict[str, Any] = {"stop_token_ids": list(settings.eos_token_id) or [eos_token_id]}
    values: dict[str, Any] = {"max_tokens": settings.max_new_tokens or settings.max_length, "temperature": 0.0}
    if settings.do_sample:
        values |= {"temperature": settings.temperature, "top_p": settings.top_p}
        more |= {"top_k": settings.top_k} | ({"min_p": settings.min_p} if settings.min_p else {})
    if settings.stop_strings:
        values["stop"] = list(settings.stop_strings)
        more["include_stop_str_in_output"] = True
    if settings.suppress_tokens:
        values["logit_bias"] = {str(token): -100 for token in settings.suppress_tokens}
    return {**values, "extra_body": more}
