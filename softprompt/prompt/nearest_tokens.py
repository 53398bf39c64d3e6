"""What virtual tokens resemble: the nearest words by cosine, in the space where BLOOM compares them.

BLOOM puts `word_embeddings_layernorm` over words and virtual tokens alike before anything looks at them, so directions
are compared behind it. A base without one compares them as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_VALUES = 1 << 23  # of the vocabulary that are compared at a time: 32 MiB in fp32


@dataclass(frozen=True)
class EmbeddingSpace:
    """Words [V, H] of any float dtype on any device, and the layer norm over them: weight and bias [H] and epsilon, or
    None."""

    words: Tensor
    layernorm: tuple[Tensor, Tensor, float] | None

    def directions(self, vectors: Tensor) -> Tensor:
        """[n, H] of any float dtype, in the words' space → unit vectors [n, H] fp32 behind the layer norm."""
        vectors = vectors.detach().to(self.words.device, torch.float32)
        if self.layernorm is not None:
            weight, bias, epsilon = self.layernorm
            vectors = F.layer_norm(vectors, weight.shape, weight.float(), bias.float(), epsilon)
        return F.normalize(vectors, dim=-1)


def embedding_space(base: Any) -> EmbeddingSpace:
    """That of a transformers model, without copying any of it."""
    norm = getattr(getattr(base, "transformer", None), "word_embeddings_layernorm", None)
    layernorm = None if norm is None else (norm.weight.detach(), norm.bias.detach(), norm.eps)
    return EmbeddingSpace(base.get_input_embeddings().weight.detach(), layernorm)


def nearest_tokens(space: EmbeddingSpace, vectors: Tensor, k: int, among: int | None = None) -> tuple[Tensor, Tensor]:
    """The k words of the largest cosine to each of `vectors` [n, H]: ids [n, k] int64 and cosines [n, k] fp32, on the
    CPU, the nearest first; of the first `among` words alone, where given. The vocabulary passes in chunks, so memory
    does not grow with it."""
    V = len(space.words) if among is None else min(among, len(space.words))
    sought, chunk = space.directions(vectors), max(1, CHUNK_VALUES // vectors.shape[1])
    cosines = sought.new_empty(len(sought), 0)
    ids = torch.empty(len(sought), 0, dtype=torch.int64, device=sought.device)
    for start in range(0, V, chunk):
        found = sought @ space.directions(space.words[start : min(start + chunk, V)]).T
        numbers = torch.arange(start, start + found.shape[1], device=ids.device).expand(len(found), -1)
        cosines, ids = torch.cat([cosines, found], dim=1), torch.cat([ids, numbers], dim=1)
        cosines, best = cosines.topk(min(k, cosines.shape[1]), dim=1)
        ids = ids.gather(1, best)
    return ids.cpu(), cosines.cpu()


def random_vectors(space: EmbeddingSpace, n: int = 16) -> Tensor:
    """Random vectors [n, H] fp32, the same ones each time: what a virtual token is nearer to its nearest word than
    they to theirs says something."""
    return torch.randn(n, space.words.shape[1], generator=torch.Generator().manual_seed(0))


def cosine_matrix(space: EmbeddingSpace, vectors: Tensor) -> Tensor:
    """The cosines [n, n] fp32 of `vectors` [n, H] with each other, on the CPU."""
    directions = space.directions(vectors)
    return (directions @ directions.T).cpu()


def readable_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Words as one can read them: a space at the edge is ␣, and a piece of a character is told by its bytes."""
    return [_word(tokenizer, token) for token in ids]


def _word(tokenizer: Any, token: int) -> str:
    text, piece = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    if "\N{REPLACEMENT CHARACTER}" in text or not text:
        return str(piece)
    edges = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    if not text.strip(" "):
        return "␣" * len(text)
    return "␣" * edges[0] + text.strip(" ").replace("\n", "⏎").replace("\t", "⇥") + "␣" * edges[1]
