"""The vocabulary words nearest to each virtual token, and how far training moved the token."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from softprompt.models.base_files import weight_files
from softprompt.models.capabilities import build_on_meta_device
from softprompt.models.loading import base_path, load_config, load_tokenizer
from softprompt.models.stored_weights import locate_tensors
from softprompt.prompt.adapter_io import PROMPT_KEY, Adapter, load_adapter
from softprompt.prompt.initial import check_fits
from softprompt.prompt.nearest_tokens import (
    EmbeddingSpace,
    cosine_matrix,
    embedding_modules,
    nearest_tokens,
    random_vectors,
    readable_tokens,
)
from softprompt.runs.file_names import START_FILE
from softprompt.runs.run_reader import Facts, RunRecord
from softprompt.utils.errors import SoftpromptError
from softprompt.utils.safetensors_io import StoredTensor, list_stored_tensors

NEAREST = 5  # words for each virtual token
MAX_TOKENS = 200  # at most this many virtual tokens are described


def describe_prompt(space: EmbeddingSpace, tokenizer: Any, prompt: Tensor, start: Tensor | None) -> Facts:
    """Return the nearest words of each virtual token and the cosines between all tokens, as JSON types.

    Args:
        space: The word embeddings to compare with.
        tokenizer: The base's tokenizer.
        prompt: [P, H], any float dtype.
        start: The prompt before training, [P, H], any float dtype; None if unknown. If it has the shape of `prompt`,
            the distance that each token moved is returned too.
    """
    P, known = len(prompt), start is not None and start.shape == prompt.shape
    prompt = prompt.detach().cpu().float()[:MAX_TOKENS]
    began = start[:MAX_TOKENS].float() if start is not None and known else prompt[:0]
    # Search the vocabulary only once, for the prompt, its initial value, and random vectors for comparison.
    ids, cosines = nearest_tokens(space, torch.cat([prompt, began, random_vectors(space)]), NEAREST, len(tokenizer))
    words = [
        list(zip(readable_tokens(tokenizer, row), _rounded(near), strict=True)) for row, near in _lists(ids, cosines)
    ]
    sizes = [len(prompt), len(began)]
    tokens: list[Facts] = [{"nearest": near} for near in words[: sizes[0]]]
    moves = zip(tokens, _moves(space, prompt, began), words[sizes[0] : sum(sizes)], strict=True) if known else ()
    for token, moved, near in moves:
        token |= {**moved, "start": near[0]}
    return {
        "P": P,
        "layernorm": space.layernorm is not None,
        "chance": round(cosines[sum(sizes) :, 0].mean().item(), 4),
        "tokens": tokens,
        "similarities": [_rounded(row) for row in cosine_matrix(space, prompt).tolist()],
    }


def add_nearest_words(record: RunRecord) -> RunRecord:
    """Add a description of the prompt to a record whose report.json has none, or the reason why there is none.

    The description is missing if the run has not ended or was made by an older version. It can be added only if the
    base's files are on this machine; only its word embeddings are read.
    """
    end = record.facts.get("end") or {}
    folder = record.folder if record.ended else record.checkpoint and record.folder / record.checkpoint
    if not folder or not isinstance(end, dict) or "likeness" in end:
        return record
    try:
        found = {"likeness": _describe_saved(load_adapter(folder), record.folder)}
    except (SoftpromptError, OSError, ValueError) as error:
        found = {"left_out": [f"No nearest words: {error}"]}
    return replace(record, facts={**record.facts, "so_far": {**end, **found}})


def _describe_saved(adapter: Adapter, folder: Path) -> Facts:
    if adapter.base_model_name_or_path is None:
        raise ValueError("the adapter names no base")
    name = base_path(adapter.base_model_name_or_path)
    space = _stored_embeddings(name)
    check_fits(folder, adapter.prompt, space.words.shape[1], name)
    return describe_prompt(space, load_tokenizer(name), adapter.prompt, _initial_prompt(folder / START_FILE))


def _initial_prompt(file: Path) -> Tensor | None:
    """Return the prompt before training, [P, H]; None if the file is missing or damaged."""
    try:
        return load_file(file)[PROMPT_KEY]
    except (OSError, SafetensorError, KeyError):
        return None


def _stored_embeddings(name_or_path: str) -> EmbeddingSpace:
    """Read the word embeddings of a base from its files, and no other weights.

    Raises:
        ValueError: The files are not on this machine, or have no word embeddings.
        ModelError: The base is unsuitable, or its files cannot be read.
    """
    files = weight_files(name_or_path)
    if not files:
        raise ValueError(f"the files of the base {name_or_path} are not on this machine")
    base = build_on_meta_device(load_config(name_or_path), name_or_path)
    embedding, norm = embedding_modules(base)
    wanted = [embedding.weight, *([norm.weight, norm.bias] if norm else [])]
    named = {id(parameter): name for name, parameter in base.named_parameters()}
    names = [named[id(parameter)] for parameter in wanted]
    found = locate_tensors(base, list_stored_tensors(files[0].parent, "the report"), "the report", names)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"the files of the base {name_or_path} lack {missing[0]}")
    words, *layernorm = (_read(found[name]) for name in names)
    return EmbeddingSpace(words, (layernorm[0], layernorm[1], norm.eps) if norm else None)


def _read(stored: StoredTensor) -> Tensor:
    stored.read_into(values := torch.empty(stored.shape, dtype=stored.dtype))
    return values


def _moves(space: EmbeddingSpace, prompt: Tensor, start: Tensor) -> Iterator[Facts]:
    """Yield for each token the Euclidean distance from its initial value, the norm of that value, and the cosine of the
    two."""
    distances, norms = (prompt - start).norm(dim=1), start.norm(dim=1)
    cosines = (space.directions(prompt) * space.directions(start)).sum(dim=1)
    for distance, norm, cosine in _lists(distances, norms, cosines):
        yield {"moved": round(distance, 4), "of": round(norm, 4), "cosine": round(cosine, 4)}


def _lists(*values: Tensor) -> Iterator[tuple[list[Any], ...]]:
    return zip(*(value.tolist() for value in values), strict=True)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
