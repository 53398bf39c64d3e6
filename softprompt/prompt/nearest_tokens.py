"""The vocabulary tokens whose embeddings are nearest to virtual tokens, by cosine similarity.

BLOOM applies `word_embeddings_layernorm` to words and virtual tokens alike before its first block, so similarities are
computed after this layer norm. For a base without it, embeddings are compared directly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REPLACED = "\N{REPLACEMENT CHARACTER}"  # in the text of a token that is only part of a character
CHUNK_VALUES = 1 << 23  # embedding values per chunk of the vocabulary: 32 MiB in fp32


@dataclass(frozen=True)
class EmbeddingSpace:
    """The space in which embeddings are compared.

    Attributes:
        words: Word embeddings [V, H] of any float dtype, on any device.
        layernorm: Weight [H], bias [H] and epsilon of the layer norm over embeddings; None if the base has none.
    """

    words: Tensor
    layernorm: tuple[Tensor, Tensor, float] | None

    def directions(self, vectors: Tensor) -> Tensor:
        """Apply the layer norm, if any, and normalize: [n, H] of any float dtype → unit vectors [n, H] fp32."""
        vectors = vectors.detach().to(self.words.device, torch.float32)
        if self.layernorm is not None:
            weight, bias, epsilon = self.layernorm
            vectors = F.layer_norm(vectors, weight.shape, weight.float(), bias.float(), epsilon)
        return F.normalize(vectors, dim=-1)


def embedding_space(base: Any) -> EmbeddingSpace:
    """Return the embedding space of a transformers model; nothing is copied."""
    embedding, norm = embedding_modules(base)
    layernorm = None if norm is None else (norm.weight.detach(), norm.bias.detach(), norm.eps)
    return EmbeddingSpace(embedding.weight.detach(), layernorm)


def embedding_modules(base: Any) -> tuple[nn.Embedding, nn.LayerNorm | None]:
    """Return the input embedding of a transformers model, and the layer norm over it; None if the base has none."""
    return base.get_input_embeddings(), getattr(getattr(base, "transformer", None), "word_embeddings_layernorm", None)


def nearest_tokens(
    space: EmbeddingSpace, vectors: Tensor, k: int, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k words with the largest cosine similarity to each vector.

    The vocabulary is compared in chunks, so memory does not grow with it.

    Args:
        space: The embedding space.
        vectors: [n, H] of any float dtype.
        k: The number of words for each vector.
        vocab_size: Search only the first `vocab_size` words (default: all).

    Returns:
        Token ids [n, k] int64 and cosine similarities [n, k] fp32, on the CPU, the nearest word first.
    """
    V = len(space.words) if vocab_size is None else min(vocab_size, len(space.words))
    queries, chunk = space.directions(vectors), max(1, CHUNK_VALUES // vectors.shape[1])
    cosines = queries.new_empty(len(queries), 0)
    ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, V, chunk):
        found = queries @ space.directions(space.words[start : min(start + chunk, V)]).T
        numbers = torch.arange(start, start + found.shape[1], device=ids.device).expand(len(found), -1)
        cosines, ids = torch.cat([cosines, found], dim=1), torch.cat([ids, numbers], dim=1)
        cosines, best = cosines.topk(min(k, cosines.shape[1]), dim=1)
        ids = ids.gather(1, best)
    return ids.cpu(), cosines.cpu()


def random_vectors(space: EmbeddingSpace, n: int = 16) -> Tensor:
    """Return random vectors [n, H] fp32, the same ones at every call.

    They are a baseline: a virtual token resembles its nearest word only if their similarity is larger than that of
    random vectors and their nearest words.
    """
    return torch.randn(n, space.words.shape[1], generator=torch.Generator().manual_seed(0))


def cosine_matrix(space: EmbeddingSpace, vectors: Tensor) -> Tensor:
    """Return the cosine similarities [n, n] fp32 of vectors [n, H] with each other, on the CPU."""
    directions = space.directions(vectors)
    return (directions @ directions.T).cpu()


def readable_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return tokens as readable text. Leading and trailing spaces become ␣; bytes that are only part of a character
    become <0xE5>, as Llama's tokenizer writes them."""
    return [_readable(tokenizer, token) for token in ids]


def _readable(tokenizer: Any, token: int) -> str:
    text, piece = tokenizer.decode([token]), str(tokenizer.convert_ids_to_tokens(token))
    if REPLACED in text or not text:
        text = _with_bytes(piece) or piece
    edges = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    if not text.strip(" "):
        return "␣" * len(text)
    return "␣" * edges[0] + text.strip(" ").replace("\n", "⏎").replace("\t", "⇥") + "␣" * edges[1]


def _with_bytes(piece: str) -> str:
    """Return the text of a token of a byte-level tokenizer, with <0xE5> for each byte that is only part of a character.
    Return "" if `piece` is of another kind of tokenizer."""
    symbols = _byte_symbols()
    if not set(piece) <= symbols.keys():
        return ""
    text = bytes(symbols[symbol] for symbol in piece).decode(errors="surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)


@cache
def _byte_symbols() -> dict[str, int]:
    """Return the bytes by the symbols that byte-level tokenizers write for them: a printable byte is its own character
    in Latin-1, and the symbols of the others follow each other in the order of the bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet(), key=ord)
    own = {symbol: ord(symbol) for symbol in alphabet if ord(symbol) < 256}
    others = [byte for byte in range(256) if byte not in own.values()]
    return own | dict(zip(alphabet[len(own) :], others, strict=True))
