"""Fingerprints of a tokenizer, by content: everything that decides which ids a text becomes, how a chat is rendered,
and how ids become text again. Its name and the folder that it was loaded from do not matter.

Base and instruct models of one family often share tokenizer.json and differ in end token and chat template, so a hash
of that file alone is not enough.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
SETTINGS = (
    *("split_special_tokens", "clean_up_tokenization_spaces"),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)
# Of `init_kwargs`: where a tokenizer lies, what changes neither ids nor text, and what has a part of its own.
APART = (
    *("name_or_path", "files_loaded", "is_local", "local_files_only", "backend", "model_max_length", "padding_side"),
    *("truncation_side", "processor_class", "chat_template", *NAMED),
)


def tokenizer_fingerprints(tokenizer: Any) -> dict[str, str]:
    """A hash of each part: "tokenizer" is tokenizer.json's content (of a tokenizer in Python its vocabulary), and the
    others, such as "tokenizer.eos_token", are what tokenizer_config.json and chat_template.jinja add to it."""
    special = dict(getattr(tokenizer, "special_tokens_map", {}))
    named = {name: special.pop(name, None) for name in NAMED}
    extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", None) or ()]
    settings = {name: getattr(tokenizer, name, False) for name in SETTINGS}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        **named,
        "special_tokens": [special, extra],
        "chat_template": getattr(tokenizer, "chat_template", None),
        "settings": settings if backend is not None else {**settings, **_in_python(tokenizer)},
    }
    content = _serialized(backend) if backend is not None else _json(tokenizer.get_vocab())
    return {
        "tokenizer": _sha256(content),
        **{f"tokenizer.{name}": _sha256(_json(part)) for name, part in parts.items()},
    }


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    """One hash of all parts."""
    return _sha256(_json(tokenizer_fingerprints(tokenizer)))


def _serialized(backend: Any) -> str:
    """As in tokenizer.json, without truncation and padding: each call sets them anew, and what a file says of them is
    only there until the first call."""
    if backend.truncation is not None or backend.padding is not None:
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    return backend.to_str()


def _in_python(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer without tokenizer.json works with beside its vocabulary: its class, the arguments that it was
    made with, tokens that were added, and the files that it saves (merges, or a sentencepiece model)."""
    made_with: Mapping[str, Any] = getattr(tokenizer, "init_kwargs", {})
    with TemporaryDirectory() as folder:
        with suppress(NotImplementedError):  # nothing to save
            tokenizer.save_vocabulary(folder)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}
    return {
        "class": type(tokenizer).__name__,
        "arguments": {name: value for name, value in made_with.items() if not _is_apart(name)},
        "added_tokens": {str(id): repr(token) for id, token in tokenizer.added_tokens_decoder.items()},
        "files": files,
    }


def _is_apart(argument: str) -> bool:
    return argument in APART or argument.endswith("_file")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
