"""The layer-major schedule: all micro-batches of a window pass through a block before the next block is asked for.

Block i takes the virtual tokens p_i to p_{i+1}, with keys and values k_i, and the tokens x_i of a micro-batch, behind
them, to x_{i+1}; the sum of losses has the gradients dp_i, dk_i, dx_i:

    forward,  i = 0 … L-1:   p_{i+1}, k_i = block_i(p_i),  and for every micro-batch  x_{i+1} = block_i(x_i; k_i)
    backward, i = L-1 … 0:   for every micro-batch  dx_i, dk_i += dx_{i+1} · ∂block_i(x_i; k_i),
                             then  dp_i = (dp_{i+1}, dk_i) · ∂block_i(p_i)

The borders x_i are kept, everything inside a block is computed again, and dx_i takes the place of x_i. The operations
on a micro-batch and their order are those of the packed engine's other schedule, and so are the results, to the bit.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from softprompt.data.collate import Packed, has_targets
from softprompt.engines.activation_offload import ActivationStore
from softprompt.engines.bloom import Predictions, embed, final_hidden, norm, run_block, run_prompt_block
from softprompt.engines.linear_cross_entropy import projected_cross_entropy
from softprompt.engines.memory_estimate import bytes_per_token
from softprompt.engines.prefix_attention import attend, causal_alibi, group_rows
from softprompt.models.bloom_weights import BlockWeights, Weights


class LayerMajor:
    """For weights that come one layer after the other: each passes by twice in a window, there and back. Borders beyond
    `most_bytes` go to a file in `folder`. See `packed.Schedule`."""

    def __init__(self, weights: Weights, most_bytes: int, folder: Path):
        self.weights, self.most_bytes, self.folder = weights, most_bytes, folder

    def accumulate(self, prompt: Tensor, batches: Iterable[Packed], grad_scale: Tensor | float) -> Tensor:
        with ActivationStore(self.most_bytes, self.folder) as borders:
            window = _Window(self.weights, prompt, filter(has_targets, batches), borders)
            return window.accumulate(prompt, grad_scale)

    def predictions(self, prompt: Tensor, batches: Iterable[Packed]) -> Iterator[Predictions]:
        with ActivationStore(self.most_bytes, self.folder) as borders:
            yield from _Window(self.weights, prompt, batches, borders).predictions(prompt)

    def __str__(self) -> str:
        return ", layer by layer"

    def kept_bytes(self, P: int, tokens: int, tokens_at_once: int) -> int:
        shape, dtype = self.weights.shape, self.weights.head.dtype
        borders = min(self.most_bytes, (shape.L + 1) * 4 * shape.H * tokens)
        one_block = tokens_at_once * bytes_per_token(shape._replace(L=1), dtype)
        return borders + one_block + P * bytes_per_token(shape, dtype, gradient_checkpointing=True)


class _Window:
    """Micro-batches and the state of their passage: border (i, b) is x_i of micro-batch b, then dx_i."""

    def __init__(self, weights: Weights, prompt: Tensor, batches: Iterable[Packed], borders: ActivationStore):
        self.weights, self.shape, self.borders = weights, weights.shape, borders
        self.batches = list(batches)
        self.groups = [group_rows(batch.lengths, prompt.device) for batch in self.batches]
        self.passing = [b for b, batch in enumerate(self.batches) if batch.lengths]  # others have first tokens alone
        N, P = self.shape.N, len(prompt)
        widest = max((length for batch in self.batches for length in batch.lengths), default=0)
        like = weights.embedding_layernorm.weight
        self.bias, self.prompt_bias = causal_alibi(N, widest, P, like), causal_alibi(N, P, 0, like)

    def accumulate(self, prompt: Tensor, grad_scale: Tensor | float) -> Tensor:
        L = self.shape.L
        layers = self.weights.through([*range(L), *reversed(range(L))])
        entered = self._enter(prompt)
        p = self._forward(layers, entered.detach(), keep=True)  # p_0 … p_L
        total, dp = self._losses(p.pop(), grad_scale)
        for i, layer in zip(reversed(range(L)), layers, strict=False):
            dp = self._backward(i, layer, p.pop(), dp)
        entered.backward(dp)
        return total

    @torch.no_grad()
    def predictions(self, prompt: Tensor) -> Iterator[Predictions]:
        last = self._forward(self.weights.through(range(self.shape.L)), self._enter(prompt), keep=False)[-1][-1:]
        for b, batch in enumerate(self.batches):
            yield final_hidden(self.weights, last, batch, self.borders.take((self.shape.L, b)))

    def _enter(self, prompt: Tensor) -> Tensor:
        return norm(prompt, self.weights.embedding_layernorm, self.shape.epsilon)  # [P, H]

    def _forward(self, layers: Iterator[BlockWeights], p: Tensor, keep: bool) -> list[Tensor]:
        """p_0 … p_L, of which only the last is kept unless `keep`. Nothing here asks for a gradient, but in training
        none is forbidden either: that would let products of few rows be rounded in another way (see `products`)."""
        outputs, read = [p], self.borders.look if keep else self.borders.take
        for b, batch in enumerate(self.batches):
            self.borders.put((0 if batch.lengths else self.shape.L, b), embed(self.weights, batch))
        for i, layer in zip(range(self.shape.L), layers, strict=False):
            p, k = run_prompt_block(layer, p, self.prompt_bias, self.shape)
            outputs = [*outputs, p] if keep else [p]
            for b in self.passing:
                self.borders.put((i + 1, b), self._block(i, layer, read((i, b)), k, b))
        return outputs

    def _block(self, i: int, layer: BlockWeights, x: Tensor, k: Tensor, b: int) -> Tensor:
        attention = partial(attend, before=k, bias=self.bias.to(k.dtype), groups=self.groups[b])
        predictors = self.batches[b].predictors if i == self.shape.L - 1 else None
        return run_block(layer, x, attention, self.shape, predictors)

    def _losses(self, p: Tensor, grad_scale: Tensor | float) -> tuple[Tensor, Tensor]:
        """The sum of all losses, and dp_L; every dx_L takes its x_L's place."""
        L, last, total = self.shape.L, p[-1:].requires_grad_(), torch.zeros((), device=p.device, dtype=torch.float64)
        for b, batch in enumerate(self.batches):
            x = self.borders.take((L, b)).requires_grad_()
            loss = projected_cross_entropy(*final_hidden(self.weights, last, batch, x))
            (loss * grad_scale).backward()
            total += loss.detach()
            if x.grad is not None:
                self.borders.put((L, b), x.grad)
        dp = torch.zeros_like(p)
        if last.grad is not None:
            dp[-1:] = last.grad
        return total, dp

    def _backward(self, i: int, layer: BlockWeights, p: Tensor, dp: Tensor) -> Tensor:
        """dp_i from dp_{i+1}; every dx_i takes its x_i's place. The text's x_0 are frozen words and need none."""
        p.requires_grad_()
        p_next, made = run_prompt_block(layer, p, self.prompt_bias, self.shape)
        k = made.detach().requires_grad_()
        for b in self.passing:
            x = self.borders.take((i, b)).requires_grad_(i > 0)
            self._block(i, layer, x, k, b).backward(self.borders.take((i + 1, b)))
            if x.grad is not None:
                self.borders.put((i, b), x.grad)
        torch.autograd.backward([p_next, made], [dp, torch.zeros_like(k) if k.grad is None else k.grad])
        assert p.grad is not None
        return p.grad
