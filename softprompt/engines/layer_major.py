"""The layer-major schedule: all micro-batches of a window pass through a block before the next block is requested.

It is for a BLOOM whose blocks are expensive to obtain (read from files, gathered from other ranks, or dequantized):
each block is requested twice per window, once in the forward and once in the backward pass, however many micro-batches
there are.

Notation: p_i [P, H] is block i's input at the virtual tokens, k_i [P, N, 2, D] their keys and values in that block, and
x_i [S, H] its input at the tokens of a micro-batch. dp_i, dk_i, dx_i are the gradients of the scaled loss summed over
all micro-batches. Phases (compare `bloom`):

    forward,  i = 0 … L-1:   p_{i+1}, k_i = block_i(p_i);  for each micro-batch  x_{i+1} = block_i(x_i; k_i)
    losses:                  for each micro-batch  dx_L, and dp_L at the last virtual token += …
    backward, i = L-1 … 0:   for each micro-batch  dx_i = dx_{i+1} · ∂block_i/∂x_i,  dk_i += dx_{i+1} · ∂block_i/∂k_i;
                             then  dp_i = (dp_{i+1}, dk_i) · ∂block_i(p_i)

Only the inputs of blocks are kept, in an `ActivationStore`. The backward pass recomputes everything inside a block, and
stores dx_i in the place of x_i. The operations on a micro-batch and the order of sums are those of `MicrobatchMajor`
with gradient checkpointing, so the results are bit-identical.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from softprompt.data.collate import Packed, has_targets
from softprompt.engines.activation_offload import ActivationStore
from softprompt.engines.bloom import embed_prompt, embed_rows, loss_inputs, run_block, run_prompt_block
from softprompt.engines.bloom_schedule import BloomSchedule
from softprompt.engines.head import Head
from softprompt.engines.memory_estimate import bytes_per_token
from softprompt.engines.microbatch_engine import LossInputs
from softprompt.engines.prefix_attention import attend, causal_alibi, group_rows
from softprompt.models.bloom_weights import BlockWeights, BloomWeights


class LayerMajor(BloomSchedule):
    """The layer-major `Schedule`; see the module's docstring.

    Args:
        max_bytes: Memory for the inputs of blocks; those that exceed it are stored in a file in `folder`.
    """

    def __init__(self, weights: BloomWeights, max_bytes: int, folder: Path):
        super().__init__(weights, gradient_checkpointing=True)
        self.max_bytes, self.folder = max_bytes, folder

    def accumulate(self, prompt: Tensor, batches: Iterable[Packed], grad_scale: Tensor | float) -> Tensor:
        """See `Schedule.accumulate`."""
        with ActivationStore(self.max_bytes, self.folder) as store:
            window = _Window(self.weights, self.head, len(prompt), filter(has_targets, batches), store)
            return window.accumulate(prompt, grad_scale)

    def iter_loss_inputs(self, prompt: Tensor | None, batches: Iterable[Packed]) -> Iterator[LossInputs]:
        """See `Schedule.iter_loss_inputs`."""
        prompt = self._prompt_or_empty(prompt)
        with ActivationStore(self.max_bytes, self.folder) as store:
            yield from _Window(self.weights, self.head, len(prompt), batches, store).iter_loss_inputs(prompt)

    def __str__(self) -> str:
        return ", layer by layer"

    def _kept_bytes(self, P: int, tokens: int, tokens_per_microbatch: int) -> int:
        shape, dtype = self.weights.shape, self.compute_dtype
        block_inputs = min(self.max_bytes, (shape.L + 1) * 4 * shape.H * tokens)
        one_block = tokens_per_microbatch * bytes_per_token(shape._replace(L=1), dtype)
        return block_inputs + one_block + P * bytes_per_token(shape, dtype, gradient_checkpointing=True)


class _Window:
    """The micro-batches of one window on their way through the blocks. The store holds x_i of micro-batch b under
    (i, b), and dx_i in its place after the backward pass of block i."""

    def __init__(self, weights: BloomWeights, head: Head, P: int, batches: Iterable[Packed], store: ActivationStore):
        self.head = head
        self.weights, self.shape, self.store = weights, weights.shape, store
        self.batches = list(batches)
        like = weights.embedding_layernorm.weight
        self.groups = [group_rows(batch.lengths, like.device) for batch in self.batches]
        # The only targets of a micro-batch without tokens are first tokens of rows, which are predicted by the prompt.
        self.with_tokens = [b for b, batch in enumerate(self.batches) if batch.lengths]
        widest = max((length for batch in self.batches for length in batch.lengths), default=0)
        self.bias = causal_alibi(self.shape.N, widest, P, like)  # [1, N, W, P + W]
        self.prompt_bias = causal_alibi(self.shape.N, P, 0, like)  # [1, N, P, P]

    def accumulate(self, prompt: Tensor, grad_scale: Tensor | float) -> Tensor:
        """Run all phases, and backpropagate to the prompt. Return the summed loss."""
        L = self.shape.L
        blocks = self.weights.iter_layers([*range(L), *reversed(range(L))])
        p_0 = embed_prompt(self.weights, prompt)  # [P, H]
        p = self._forward(blocks, p_0.detach(), keep=True)  # p_0 … p_L
        total, dp = self._losses(p.pop(), grad_scale)
        for i, block in zip(reversed(range(L)), blocks, strict=False):
            dp = self._backward(i, block, p.pop(), dp)
        p_0.backward(dp)
        return total

    @torch.no_grad()
    def iter_loss_inputs(self, prompt: Tensor) -> Iterator[LossInputs]:
        """Run the forward phase and yield the loss inputs of each micro-batch."""
        blocks = self.weights.iter_layers(range(self.shape.L))
        last_hidden = self._forward(blocks, embed_prompt(self.weights, prompt), keep=False)[-1][-1:]
        for b, batch in enumerate(self.batches):
            yield loss_inputs(self.weights, last_hidden, batch, self.store.pop((self.shape.L, b)))

    def _forward(self, blocks: Iterator[BlockWeights], p: Tensor, keep: bool) -> list[Tensor]:
        """Run the forward phase. If `keep`, return p_0 … p_L and keep all x_i in the store; else return only p_L and
        keep only x_L."""
        outputs, read = [p], self.store.get if keep else self.store.pop
        for b, batch in enumerate(self.batches):
            self.store.put((0 if batch.lengths else self.shape.L, b), embed_rows(self.weights, batch))
        for i, block in zip(range(self.shape.L), blocks, strict=False):
            p, k = run_prompt_block(block, p, self.prompt_bias, self.shape)
            outputs = [*outputs, p] if keep else [p]
            for b in self.with_tokens:
                self.store.put((i + 1, b), self._run_block(i, block, read((i, b)), k, b))
        return outputs

    def _run_block(self, i: int, block: BlockWeights, x: Tensor, k: Tensor, b: int) -> Tensor:
        """Run micro-batch b through block i: x_i [S, H] → x_{i+1} [S, H], or [n, H] after the last block."""
        attention = partial(attend, prefix_kv=k, bias=self.bias.to(k.dtype), groups=self.groups[b])
        predictors = self.batches[b].predictors if i == self.shape.L - 1 else None
        return run_block(block, x, attention, self.shape, predictors)

    def _losses(self, p: Tensor, grad_scale: Tensor | float) -> tuple[Tensor, Tensor]:
        """Run the losses phase. Return the summed loss and dp_L; each x_L in the store is replaced by dx_L."""
        L, last_hidden = self.shape.L, p[-1:].requires_grad_()
        total = torch.zeros((), device=p.device, dtype=torch.float64)
        for b, batch in enumerate(self.batches):
            x = self.store.pop((L, b)).requires_grad_()
            loss = self.head.loss(*loss_inputs(self.weights, last_hidden, batch, x))
            (loss * grad_scale).backward()
            total += loss.detach()
            if x.grad is not None:
                self.store.put((L, b), x.grad)
        dp = torch.zeros_like(p)
        if last_hidden.grad is not None:
            dp[-1:] = last_hidden.grad
        return total, dp

    def _backward(self, i: int, block: BlockWeights, p: Tensor, dp: Tensor) -> Tensor:
        """Run the backward phase of block i. Return dp_i, given p_i and dp_{i+1}; each x_i in the store is replaced by
        dx_i, except x_0: word embeddings are frozen."""
        p.requires_grad_()
        p_next, k = run_prompt_block(block, p, self.prompt_bias, self.shape)
        leaf = k.detach().requires_grad_()  # dk_i accumulates here
        for b in self.with_tokens:
            x = self.store.pop((i, b)).requires_grad_(i > 0)
            self._run_block(i, block, x, leaf, b).backward(self.store.pop((i + 1, b)))
            if x.grad is not None:
                self.store.put((i, b), x.grad)
        torch.autograd.backward([p_next, k], [dp, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad])
        assert p.grad is not None
        return p.grad
