"""The soft prompt, P learnable vectors in the space of the word embeddings, and its initializers.

An initializer is a function `word_embeddings [V, H] -> prompt [P, H]`. Word embeddings are the outputs of the base's
embedding module, as in PEFT (Gemma's module multiplies rows of its weight by √H). BLOOM applies
`word_embeddings_layernorm` to `inputs_embeds`, so its prompts live in the space before that layer norm.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.utils.errors import ConfigError

RMS_ROWS = 4096  # of the word embeddings, whose size is measured


class InputEmbeddings:
    """The outputs [V, H] of a base's embedding module, in the module's dtype.

    Indexing by token ids [n] int64 calls the module and returns [n, H]. The module may do more than look up rows of its
    weight: Gemma's scales them.
    """

    def __init__(self, base: PreTrainedModel):
        self._embed = cast(nn.Embedding, base.get_input_embeddings())
        self.shape, self.device = self._embed.weight.shape, self._embed.weight.device

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self._embed(ids))

    def rms(self) -> float:
        """Return the root mean square of the values of up to RMS_ROWS evenly spaced rows."""
        rows = self[torch.arange(0, len(self), -(-len(self) // RMS_ROWS), device=self.device)]
        return rows.float().square().mean().sqrt().item()


EmbeddingTable = Tensor | InputEmbeddings  # word embeddings [V, H], indexed by token ids [n] int64
Initializer = Callable[[EmbeddingTable], Tensor]


class PromptEmbedding(nn.Module):
    """P virtual tokens of size H (Lester et al. 2021, arXiv:2104.08691).

    `forward()` returns the prompt [P, H] fp32. It has no batch dimension; engines prepend it to rows, and add its
    gradient to `weight.grad`. Here the optimizer changes the prompt itself. In the subclass
    `reparameterization.ReparameterizedPrompt`, it changes parameters of which the prompt is a function.
    """

    def __init__(self, values: Tensor):
        """Copy the initial values.

        Args:
            values: [P, H] of any float dtype, from an initializer or a saved adapter.
        """
        super().__init__()
        self.weight = nn.Parameter(values.detach().to(torch.float32).clone())

    def forward(self) -> Tensor:
        """Return the prompt [P, H] fp32."""
        return self.weight

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the optimizer changes, by name. The prompt itself has an empty name."""
        return {"": self.weight}

    def backward(self) -> None:
        """Pass the gradient of the prompt on to the trained parameters. Call this once per optimizer step."""

    def fold(self) -> None:
        """Compute the prompt from the trained parameters. Call this whenever they have changed."""

    def encoder_state(self) -> dict[str, Tensor]:
        """Return what is needed, besides the prompt, to continue training; empty for a prompt that is trained
        itself."""
        return {}

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


def random_init(num_virtual_tokens: int) -> Initializer:
    """Return an initializer that draws from N(0, 1); with the same seed, it gives the values of PEFT's RANDOM."""

    def init(word_embeddings: EmbeddingTable) -> Tensor:
        return torch.empty(num_virtual_tokens, word_embeddings.shape[1]).normal_()

    return init


def token_init(token_ids: Sequence[int], num_virtual_tokens: int | None = None) -> Initializer:
    """Return an initializer that copies the embeddings of given tokens, as PEFT's TEXT does.

    Args:
        token_ids: The tokens, truncated or repeated to `num_virtual_tokens`.
        num_virtual_tokens: P; by default the number of token ids.

    Raises:
        ConfigError: `token_ids` is empty.
    """
    if not token_ids:
        raise ConfigError("--prompt_tuning_init_text has no tokens; give a longer text")
    length = num_virtual_tokens or len(token_ids)
    ids = [token_ids[i % len(token_ids)] for i in range(length)]
    return lambda word_embeddings: word_embeddings[torch.tensor(ids, device=word_embeddings.device)]


def sample_vocab_init(num_virtual_tokens: int) -> Initializer:
    """Return an initializer that copies the embeddings of tokens, drawn uniformly with replacement from the whole
    vocabulary. With the same seed, it draws the same tokens as PEFT's SAMPLE_VOCAB."""

    def init(word_embeddings: EmbeddingTable) -> Tensor:
        random_init(num_virtual_tokens)(word_embeddings)  # PEFT draws a RANDOM prompt first and replaces it
        return word_embeddings[torch.randint(0, len(word_embeddings), (num_virtual_tokens,)).to(word_embeddings.device)]

    return init


def sample_tokens_init(population: Sequence[int], num_virtual_tokens: int) -> Initializer:
    """Return an initializer that copies the embeddings of tokens, drawn uniformly from the token ids `population`.

    The tokens are drawn without replacement, unless P is larger than the population (google-research/prompt-tuning,
    `from_sample_of_embeddings`).

    Raises:
        ConfigError: `population` is empty.
    """
    if not population:
        raise ConfigError(
            "--prompt_tuning_init: this tokenizer has only special tokens and bytes, and no words to draw from; give "
            "RANDOM or TEXT, or SAMPLE_VOCAB without --vocab_population"
        )

    def init(word_embeddings: EmbeddingTable) -> Tensor:
        n = len(population)
        replacement = num_virtual_tokens > n
        drawn = torch.randint(n, (num_virtual_tokens,)) if replacement else torch.randperm(n)[:num_virtual_tokens]
        return word_embeddings[torch.tensor(population)[drawn].to(word_embeddings.device)]

    return init


def class_label_init(labels: Sequence[Sequence[int]], rest: Initializer) -> Initializer:
    """Return an initializer whose first virtual tokens are class labels (Lester et al. 2021, section 3.2;
    google-research/prompt-tuning, `from_embedded_list`).

    Args:
        labels: The token ids of each label; its virtual token is the mean of their embeddings.
        rest: The initializer of all P virtual tokens, whose first ones are then replaced by the labels.
    """

    def init(word_embeddings: EmbeddingTable) -> Tensor:
        values = rest(word_embeddings).to(torch.float32).clone()
        for position, ids in enumerate(labels):
            values[position] = word_embeddings[torch.tensor(ids, device=word_embeddings.device)].float().mean(0)
        return values

    return init
