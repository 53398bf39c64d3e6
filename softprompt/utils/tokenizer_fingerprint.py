"""Fingerprints (SHA-256) of a tokenizer, by content; its name and path do not matter.

They cover everything that affects encoding, chat templates and decoding. A hash of tokenizer.json is not enough: the
base model and the instruct model of a family often share that file, and differ in end token and chat template.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

MAIN_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
SETTINGS = (
    *("split_special_tokens", "clean_up_tokenization_spaces"),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)
# Entries of `init_kwargs` that are not hashed: the tokenizer's path, what changes neither ids nor text, and what has a
# fingerprint of its own.
IGNORED_ARGUMENTS = (
    *("name_or_path", "files_loaded", "is_local", "local_files_only", "backend", "model_max_length", "padding_side"),
    *("truncation_side", "processor_class", "chat_template", *MAIN_SPECIAL_TOKENS),
)


def tokenizer_fingerprints(tokenizer: Any) -> dict[str, str]:
    """Return a hash of each part of a tokenizer, by name.

    "tokenizer" is the content of tokenizer.json (for a tokenizer implemented in Python, its vocabulary). The others,
    such as "tokenizer.eos_token", are what tokenizer_config.json and chat_template.jinja add.
    """
    special = dict(getattr(tokenizer, "special_tokens_map", {}))
    named = {name: special.pop(name, None) for name in MAIN_SPECIAL_TOKENS}
    extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", None) or ()]
    settings = {name: getattr(tokenizer, name, False) for name in SETTINGS}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        **named,
        "special_tokens": [special, extra],
        "chat_template": getattr(tokenizer, "chat_template", None),
        "settings": settings if backend is not None else {**settings, **_python_parts(tokenizer)},
    }
    content = _serialized(backend) if backend is not None else _json(tokenizer.get_vocab())
    return {
        "tokenizer": _sha256(content),
        **{f"tokenizer.{name}": _sha256(_json(part)) for name, part in parts.items()},
    }


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    """Return one hash of all parts of a tokenizer."""
    return _sha256(_json(tokenizer_fingerprints(tokenizer)))


def _serialized(backend: Any) -> str:
    """Return the content of tokenizer.json without truncation and padding, which every call of the tokenizer sets."""
    if backend.truncation is not None or backend.padding is not None:
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    return backend.to_str()


def _python_parts(tokenizer: Any) -> dict[str, Any]:
    """Return what defines a tokenizer without tokenizer.json, except its vocabulary: its class, its arguments, added
    tokens, and the hashes of the files that it saves (merges, or a SentencePiece model)."""
    arguments: Mapping[str, Any] = getattr(tokenizer, "init_kwargs", {})
    with TemporaryDirectory() as folder:
        with suppress(NotImplementedError):  # it has no such files
            tokenizer.save_vocabulary(folder)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}
    return {
        "class": type(tokenizer).__name__,
        "arguments": {name: value for name, value in arguments.items() if not _is_ignored(name)},
        "added_tokens": {str(id): repr(token) for id, token in tokenizer.added_tokens_decoder.items()},
        "files": files,
    }


def _is_ignored(argument: str) -> bool:
    return argument in IGNORED_ARGUMENTS or argument.endswith("_file")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
