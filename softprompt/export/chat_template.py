"""Add the virtual tokens to a tokenizer, and a Jinja chat template that writes them and then the messages in the
training template.

So the tokenizer's files suffice to format the input of an exported model as in training.
"""

import json
import re
import string
from typing import Any

from tokenizers import AddedToken

from softprompt.data.encoding import begin_ids, prompt_ids
from softprompt.data.template import CHAT, DEFAULT, Template
from softprompt.utils.errors import ConfigError, ModelError

SAMPLES = ("我爱这部电影", "What is 2 + 2?\nShow  your work.")
# The messages of a conversation. %s is replaced by the code for a user message, which depends on the training template.
MESSAGE = """\
{%%- for message in messages -%%}
{%%- if message['content'] is not string -%%}
{{- raise_exception('the content of a message must be a text') -}}
{%%- elif message['role'] != ('user' if loop.index0 %% 2 == 0 else 'assistant') -%%}
{{- raise_exception('this model was trained on a user message and its answer: roles must alternate, user first; put \
system instructions into the user message') -}}
{%%- elif message['role'] == 'assistant' -%%}
{{- message['content'] + eos_token -}}
{%%- else -%%}
%s
{%%- endif -%%}
{%%- endfor -%%}
"""
# The placeholder that vLLM puts in the place of prompt embeddings, either as a text or as a content part. EMBEDDINGS
# writes it. While vLLM finds out which embeddings are rendered, the text has a suffix; a line break in it means a
# second part.
PLACEHOLDER = "<prompt_embeds>"
EMBEDDINGS = """\
{%- set first = messages[0]['content'] -%}
{%- set first = first if first is string or first | length != 1 else first[0]['text'] -%}
{%- if messages[0]['role'] != 'system' or first is not string or not first.startswith('<prompt_embeds>') or \
'\\n' in first -%}
{{- raise_exception('the first message must be a system message that holds the prompt embeddings and nothing else') -}}
{%- endif -%}
{{- first -}}
{%- set messages = messages[1:] -%}
"""
COLUMN = """\
{%%- if message[%(name)s] is not string -%%}
{{- raise_exception('this model needs the text ' + %(name)s + ' besides the content of a user message') -}}
{%%- endif -%%}
"""


def new_token_names(tokenizer: Any, P: int) -> list[str]:
    """Return P names that are not in the vocabulary: <|softprompt_0|>, …, or <|softprompt2_0|>, … if they are taken."""
    taken = tokenizer.get_vocab()
    for number in range(1, 1000):
        stem = "softprompt" if number == 1 else f"softprompt{number}"
        names = [f"<|{stem}_{i}|>" for i in range(P)]
        if not taken.keys() & set(names):
            return names
    raise AssertionError("a thousand prompts in one vocabulary")


def prompt_token_ids(tokenizer: Any) -> list[int]:
    """Return the ids of all tokens that exports have added to a tokenizer."""
    return [id for name, id in tokenizer.get_vocab().items() if re.fullmatch(r"<\|softprompt\d*_\d+\|>", name)]


def add_prompt_tokens(tokenizer: Any, template: Template, P: int) -> list[int]:
    """Add P special tokens to `tokenizer` in place, with a chat template that begins with them; return their ids.

    The chat template renders a user message as the training template renders a row: its content is the first column,
    and further columns are further keys of the message. An answer is followed by the end token, as in training. In
    training rows there are no system messages, and roles alternate; the chat template raises an error for any other
    conversation. If the training template is `chat`, the chat template is the tokenizer's own, after the virtual
    tokens.

    Raises:
        ModelError: The tokenizer encodes a rendered message differently than in training.
        ConfigError: The template is `chat` and the tokenizer has none, or a column has the name of a key of a message.
    """
    if clash := {"role", "content"} & set(template.fields[1:]):
        raise ConfigError(
            f"the adapter's template has a column {clash.pop()!r}, which is a key of every chat message; rename it in "
            "the template and the rows, and train again"
        )
    names = new_token_names(tokenizer, P)
    columns = dict.fromkeys(template.fields[1:], SAMPLES[0])
    expected = [_training_ids(tokenizer, template, text, columns) for text in SAMPLES]
    # special: skip_special_tokens omits them when decoding; not normalized: a text is searched for them as written
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    tokenizer.chat_template = _chat_template("{{- " + _quoted("".join(names)) + " -}}", tokenizer, template)
    tokenizer.padding_side = "left"  # generation continues a row at its right end
    ids = tokenizer.convert_tokens_to_ids(names)
    _check_encoding(tokenizer, [], columns, [ids + training for training in expected])
    return ids


def embeddings_template(tokenizer: Any, template: Template) -> str:
    """Return a chat template for vLLM, whose first message is a system message that holds prompt embeddings. The other
    messages are rendered as by `add_prompt_tokens`. As in vLLM, PLACEHOLDER becomes a token of `tokenizer`.

    Raises:
        ModelError, ConfigError: See `add_prompt_tokens`; or the template has a further column that must be filled.
    """
    if others := [name for name in template.fields[1:] if name not in template.optional_fields]:
        raise ConfigError(
            f"the adapter's template has the columns {', '.join(template.fields)}, and vLLM passes on only the content "
            f"of a message, not {', '.join(others)}; send whole prompts to /v1/completions, as docs/export.md shows"
        )
    expected = [_training_ids(tokenizer, template, text, {}) for text in SAMPLES]
    tokenizer.add_tokens([AddedToken(PLACEHOLDER, special=True, normalized=False)], special_tokens=True)
    made = _chat_template(EMBEDDINGS, tokenizer, template)
    tokenizer.chat_template = made["default"] if isinstance(made, dict) else made
    first, id = {"role": "system", "content": PLACEHOLDER}, tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    _check_encoding(tokenizer, [first], {}, [[id, *training] for training in expected])
    return tokenizer.chat_template


def _check_encoding(
    tokenizer: Any, before: list[dict[str, Any]], columns: dict[str, str], expected: list[list[int]]
) -> None:
    """Raise ModelError if the chat template does not encode the messages `before` and each of SAMPLES as `expected`."""
    for text, wanted in zip(SAMPLES, expected, strict=True):
        messages = [*before, {"role": "user", "content": text, **columns}]
        made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if made != wanted:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer ({type(tokenizer).__name__}) encodes a text differently "
                "after new tokens, so an exported model would get other input than in training; use infer.py or "
                "softprompt.SoftPromptModel"
            )


def _training_ids(tokenizer: Any, template: Template, text: str, columns: dict[str, str]) -> list[int]:
    """Return the token ids of a training row whose first column is `text`; columns that are not given are empty."""
    first, *others = template.fields or ("instruction",)
    rendered = template.render({first: text, **dict.fromkeys(others, ""), **columns}, tokenizer)
    return prompt_ids(tokenizer, [rendered], template)[0]


def _chat_template(front: str, tokenizer: Any, template: Template) -> Any:
    """Return the chat template that begins with the statements `front`; if the tokenizer has several, return all of
    them by name."""
    if template.spec == CHAT:
        # Jinja drops the line break after the statement, so the original template still starts at the beginning of a
        # line, on which lstrip_blocks depends.
        head = front + "{% set softprompt = true %}\n"
        own = tokenizer.chat_template
        return {name: head + text for name, text in own.items()} if isinstance(own, dict) else head + own
    before = "".join(tokenizer.convert_ids_to_tokens(begin_ids(tokenizer)))
    return front + "{{- " + _quoted(before) + " -}}\n" + MESSAGE % _user_message(template)


def _user_message(template: Template) -> str:
    """Return Jinja that renders `message` as Template.render renders a row."""
    if template.spec == DEFAULT:
        return (
            "{{- ('Human: ' + message['content'] + '\\n' + (message['input'] or '')) | trim + '\\n\\nAssistant: ' -}}"
        )
    first, *others = template.fields
    checks = "".join(COLUMN % {"name": _quoted(name)} for name in others if name not in template.optional)
    text = template.spec.replace("\\n", "\n").replace("\\t", "\t")
    parts = []
    for literal, name, _, _ in string.Formatter().parse(text):
        parts += [_quoted(literal)] if literal else []
        column = f"message[{_quoted('content' if name == first else name)}]"
        parts += [f"({column} or '')" if name in others and name in template.optional else column] if name else []
    return checks + "{{- " + " + ".join(parts) + " -}}"


def _quoted(text: str) -> str:
    """Return a Jinja string literal. Jinja accepts all escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)
