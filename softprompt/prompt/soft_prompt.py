"""The soft prompt: P learnable vectors in the space of the word embeddings, and the ways to start them.

An initialiser is a function `word_embeddings [V, H] -> [P, H] fp32`. Word embeddings are what the base's embedding
module returns, as in PEFT: Gemma's multiplies its table's rows by √H. For BLOOM the vectors stand before
`word_embeddings_layernorm`, which the base applies to whatever embeddings it is given.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.utils.errors import ConfigError


class EmbeddingTable(Protocol):
    """Word embeddings [V, H] that are indexed by token ids [n] int64; a tensor is one."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def device(self) -> torch.device: ...
    def __len__(self) -> int: ...
    def __getitem__(self, ids: Tensor) -> Tensor: ...


Initialiser = Callable[[EmbeddingTable], Tensor]


class PromptEmbedding(nn.Module):
    """P virtual tokens of size H: the only parameters that are trained (Lester et al. 2021, arXiv:2104.08691).

    `forward()` returns [P, H] fp32. It has no batch dimension: prepending it to rows is the engine's business.
    """

    def __init__(self, values: Tensor):
        """values: [P, H], the start, from an initialiser or a saved adapter."""
        super().__init__()
        self.weight = nn.Parameter(values.detach().to(torch.float32).clone())

    def forward(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


def random_init(num_virtual_tokens: int) -> Initialiser:
    """Unit-variance normal noise: with the same torch seed, the numbers that PEFT's RANDOM draws."""

    def init(word_embeddings: EmbeddingTable) -> Tensor:
        return torch.empty(num_virtual_tokens, word_embeddings.shape[1]).normal_()

    return init


def token_init(token_ids: Sequence[int], num_virtual_tokens: int | None = None) -> Initialiser:
    """Embeddings of `token_ids`, cut or repeated to `num_virtual_tokens` (default: as many as the ids), as PEFT's TEXT.

    Raises:
        ConfigError: no token ids.
    """
    if not token_ids:
        raise ConfigError("--prompt_tuning_init_text has no tokens; give a longer text")
    length = num_virtual_tokens or len(token_ids)
    ids = [token_ids[i % len(token_ids)] for i in range(length)]
    return lambda word_embeddings: word_embeddings[torch.tensor(ids, device=word_embeddings.device)]


def sample_vocab_init(num_virtual_tokens: int) -> Initialiser:
    """Embeddings of words drawn evenly from the whole vocabulary, each as often as it comes: with the same torch seed,
    the words that PEFT draws."""

    def init(word_embeddings: EmbeddingTable) -> Tensor:
        random_init(num_virtual_tokens)(word_embeddings)  # PEFT draws a RANDOM prompt first and replaces it
        return word_embeddings[torch.randint(0, len(word_embeddings), (num_virtual_tokens,)).to(word_embeddings.device)]

    return init


def sample_tokens_init(population: Sequence[int], num_virtual_tokens: int) -> Initialiser:
    """Embeddings of words drawn evenly from the token ids `population`, none twice unless more are wanted than there
    are (google-research/prompt-tuning, `from_sample_of_embeddings`).

    Raises:
        ConfigError: no token ids.
    """
    if not population:
        raise ConfigError("--vocab_population: this tokenizer has no words but special tokens and bytes; leave it out")

    def init(word_embeddings: EmbeddingTable) -> Tensor:
        n = len(population)
        again = num_virtual_tokens > n
        drawn = torch.randint(n, (num_virtual_tokens,)) if again else torch.randperm(n)[:num_virtual_tokens]
        return word_embeddings[torch.tensor(population)[drawn].to(word_embeddings.device)]

    return init


def class_label_init(labels: Sequence[Sequence[int]], rest: Initialiser) -> Initialiser:
    """A prompt from `rest` whose first tokens are replaced, one for each label, by the mean of the embeddings of the
    label's token ids (Lester et al. 2021, section 3.2; google-research/prompt-tuning, `from_embedded_list`)."""

    def init(word_embeddings: EmbeddingTable) -> Tensor:
        values = rest(word_embeddings).to(torch.float32).clone()
        for place, ids in enumerate(labels):
            values[place] = word_embeddings[torch.tensor(ids, device=word_embeddings.device)].float().mean(0)
        return values

    return init


class InputEmbeddings:
    """What the base makes of its words before its first block, [V, H] in the dtype of its embeddings: indexing by token
    ids [n] int64 calls the embedding module, which may do more than look up rows of its table (Gemma's scales them)."""

    def __init__(self, base: PreTrainedModel):
        self._embed = cast(nn.Embedding, base.get_input_embeddings())
        self.shape, self.device = self._embed.weight.shape, self._embed.weight.device

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self._embed(ids))
