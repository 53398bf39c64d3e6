"""Virtual tokens as words of a tokenizer, and a Jinja chat template that puts them and the training template in place:
what an exported model needs of us is in its tokenizer's own files."""

import json
import re
import string
from typing import Any

from tokenizers import AddedToken

from softprompt.data.template import CHAT, DEFAULT, Template
from softprompt.data.tokenization import begin_ids, prompt_ids
from softprompt.utils.errors import ConfigError, ModelError

SAMPLES = ("我爱这部电影", "What is 2 + 2?\nShow  your work.")
# One message of a conversation; what stands for %s depends on the template.
MESSAGE = """\
{%%- for message in messages -%%}
{%%- if message['content'] is not string -%%}
{{- raise_exception('the content of a message must be a text') -}}
{%%- elif message['role'] != ('user' if loop.index0 %% 2 == 0 else 'assistant') -%%}
{{- raise_exception('this model was tuned on a user message and its answer: roles must alternate, user first; put \
system instructions into the user message') -}}
{%%- elif message['role'] == 'assistant' -%%}
{{- message['content'] + eos_token -}}
{%%- else -%%}
%s
{%%- endif -%%}
{%%- endfor -%%}
"""
COLUMN = """\
{%%- if message[%(name)s] is not string -%%}
{{- raise_exception('this model needs the text ' + %(name)s + ' beside the content of a user message') -}}
{%%- endif -%%}
"""


def new_words(tokenizer: Any, P: int) -> list[str]:
    """P names that are not in the vocabulary: <|softprompt_0|> and on; another stem where a base has these already."""
    taken = tokenizer.get_vocab()
    for number in range(1, 1000):
        stem = "softprompt" if number == 1 else f"softprompt{number}"
        words = [f"<|{stem}_{i}|>" for i in range(P)]
        if not taken.keys() & set(words):
            return words
    raise AssertionError("a thousand prompts in one vocabulary")


def prompt_words(tokenizer: Any) -> list[int]:
    """Ids of the words that exports have added to a tokenizer."""
    return [id for word, id in tokenizer.get_vocab().items() if re.fullmatch(r"<\|softprompt\d*_\d+\|>", word)]


def teach(tokenizer: Any, template: Template, P: int) -> list[int]:
    """Give `tokenizer`, in place, P new special tokens and a chat template that begins with them; returns their ids.

    The template renders a user message as the training template renders a row (its content is the first column, other
    columns are further keys of the message) and an answer as training did, followed by the end token. A system message,
    or roles that do not alternate, have no place in a training row: the template raises. For `chat` it is the
    tokenizer's own template behind the virtual tokens.

    Raises:
        ModelError: a tokenizer whose token ids for the rendered messages are not those of training.
        ConfigError: a `chat` template where the tokenizer has none, or columns that a message cannot have.
    """
    if clash := {"role", "content"} & set(template.fields[1:]):
        raise ConfigError(f"the adapter's template has a column {clash.pop()!r}, which means something else in a chat")
    expected = [_training_ids(tokenizer, template, text) for text in SAMPLES]
    words = new_words(tokenizer, P)
    # special: decoding with skip_special_tokens drops them; not normalized: found in a text as they are written
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words], special_tokens=True)
    tokenizer.chat_template = _behind("".join(words), tokenizer, template)
    tokenizer.padding_side = "left"  # an answer continues a row at its right end
    ids = tokenizer.convert_tokens_to_ids(words)
    for text, training in zip(SAMPLES, expected, strict=True):
        message = {"role": "user", "content": text, **dict.fromkeys(template.fields[1:], text)}
        made = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        if made != ids + training:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer ({type(tokenizer).__name__}) reads a text behind new words "
                "otherwise than alone, so an exported model would not see what the prompt was trained on"
            )
    return ids


def _training_ids(tokenizer: Any, template: Template, text: str) -> list[int]:
    names = template.fields or ("instruction",)
    rendered = template.render(dict.fromkeys(names, text), tokenizer)
    return prompt_ids(tokenizer, [rendered], template)[0]


def _behind(front: str, tokenizer: Any, template: Template) -> Any:
    """The chat template, or several by name where the tokenizer has several, with the text `front` before it."""
    if template.spec == CHAT:
        # The statement's line break is dropped: what follows begins a line, as it did before (lstrip_blocks asks).
        head = "{{- " + _quoted(front) + " -}}{% set softprompt = true %}\n"
        own = tokenizer.chat_template
        return {name: head + text for name, text in own.items()} if isinstance(own, dict) else head + own
    before = "".join(tokenizer.convert_ids_to_tokens(begin_ids(tokenizer)))
    return "{{- " + _quoted(front + before) + " -}}\n" + MESSAGE % _user_message(template)


def _user_message(template: Template) -> str:
    """Jinja that does what Template.render does, with `message` for the row."""
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
    """A Jinja string; JSON's escapes are among those that Jinja knows."""
    return json.dumps(text, ensure_ascii=False)
