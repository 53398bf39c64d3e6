"""The exact fast engine over frozen BLOOM: packed rows behind a prompt that is run once.

Causality makes the virtual tokens' states independent of the text after them, so one pass over the prompt serves every
row of a window: its keys and values stand before each row's own, and the gradients that rows leave on them flow back
through the prompt in one pass. Rows lie one after the other without padding; final layer norm, the last block's queries
and MLP, and the vocabulary see only positions whose next token is a target.

Matrix products run in the compute dtype; residual stream, layer norms and loss in the wide dtype (fp32, or fp64 under
fp64), and on the CPU attention too.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from softprompt.attention import Group, attend, causal_alibi, group_rows
from softprompt.batching import Packed, collate_packed, cut_by_tokens
from softprompt.data import IGNORE, Example
from softprompt.errors import TrainingError
from softprompt.loss import BLOCK_ELEMENTS, projected_cross_entropy, projected_losses
from softprompt.memory import bytes_per_token, is_out_of_memory
from softprompt.products import project
from softprompt.prompt import PromptEmbedding
from softprompt.weights import Affine, Layer, Shape, Weights

T = TypeVar("T")
Attention = Callable[[int, Tensor, Tensor], Tensor]  # layer, q [S, N, D], its keys and values [S, N, 2, D] → [S, N·D]


class Prefix(NamedTuple):
    """What rows see of the prompt: each layer's keys and values [P, N, 2, D], and the last virtual token's output
    [1, H] (wide), which predicts a row's first token; [0, H] without a prompt."""

    layers: list[Tensor]
    last: Tensor


def norm(x: Tensor, affine: Affine, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], affine.weight, affine.bias, epsilon)


def linear(x: Tensor, affine: Affine) -> Tensor:
    """[S, in] → [S, out] in the weight's dtype."""
    return project(x.to(affine.weight.dtype), affine.weight, affine.bias.to(affine.weight.dtype))


def heads(x: Tensor, parts: int, shape: Shape) -> Tensor:
    """[S, N·parts·D] → [S, N, parts, D], in fp32 on the CPU, whose attention is slow in less."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    return x.to(dtype).reshape(-1, shape.N, parts, shape.D)


def queries_and_pairs(y: Tensor, affine: Affine, shape: Shape) -> list[Tensor]:
    """[S, H] → queries [S, N, 1, D], keys and values [S, N, 2, D]."""
    return list(heads(linear(y, affine), 3, shape).split([1, 2], dim=2))


def finish_block(x: Tensor, y: Tensor, attended: Tensor, layer: Layer, shape: Shape) -> Tensor:
    """What follows attention: residual x [S, H] (or its layer norm y), attended [S, N·D] → [S, H]."""
    x = (y if shape.residual_after_layernorm else x) + linear(attended, layer.dense)
    y = norm(x, layer.post_attention_layernorm, shape.epsilon)
    wide = F.gelu(linear(y, layer.dense_h_to_4h), approximate="tanh")  # [S, 4H]
    return (y if shape.residual_after_layernorm else x) + linear(wide, layer.dense_4h_to_h)


def run_blocks(
    weights: Weights, x: Tensor, attention: Attention, predictors: Tensor | None = None, recompute: bool = False
) -> Tensor:
    """The residual stream [S, H] through all blocks; where `predictors` [n] int64 are given, the last block goes on
    with those positions alone: [n, H]. `recompute` keeps only the blocks' inputs for the backward pass (Chen et al.
    2016, arXiv:1604.06174)."""
    shape = weights.shape

    def block(i: int, x: Tensor) -> Tensor:
        layer = weights.layer(i)
        y = norm(x, layer.input_layernorm, shape.epsilon)
        if i == shape.L - 1 and predictors is not None:
            return last_block(x, y, layer, predictors)
        q, kv = queries_and_pairs(y, layer.query_key_value, shape)  # [S, N, 1, D], [S, N, 2, D]
        return finish_block(x, y, attention(i, q[:, :, 0], kv), layer, shape)

    def last_block(x: Tensor, y: Tensor, layer: Layer, at: Tensor) -> Tensor:
        of_q, of_kv = split_projection(layer.query_key_value, shape)
        kv = heads(linear(y, of_kv), 2, shape)  # [S, N, 2, D]
        x, y = x.index_select(0, at), y.index_select(0, at)  # [n, H]
        q = heads(linear(y, of_q), 1, shape)[:, :, 0]  # [n, N, D]
        q = torch.zeros_like(kv[:, :, 0]).index_copy(0, at, q)  # [S, N, D]
        attended = attention(shape.L - 1, q, kv).index_select(0, at)  # [n, N·D]
        return finish_block(x, y, attended, layer, shape)

    for i in range(shape.L):
        x = checkpoint(block, i, x, use_reentrant=False) if recompute else block(i, x)
    return x


def run_prompt(weights: Weights, prompt: Tensor) -> Prefix:
    """The virtual tokens [P, H] through all layers, by themselves; P = 0 is no prompt."""
    shape, P = weights.shape, len(prompt)
    x = norm(prompt, weights.embedding_layernorm, shape.epsilon)  # [P, H]
    bias, groups, layers = causal_alibi(shape.N, P, 0, x), [Group(1, P, P, None, None)], list[Tensor]()

    def attention(i: int, q: Tensor, kv: Tensor) -> Tensor:
        layers.append(kv)
        return attend(q, kv, kv[:0], bias.to(q.dtype), groups) if P else q.flatten(1)

    return Prefix(layers, run_blocks(weights, x, attention)[-1:])


def run_rows(weights: Weights, prefix: Prefix, batch: Packed, recompute: bool = False) -> Tensor:
    """Summed loss of a micro-batch behind the prompt, a scalar."""
    return projected_cross_entropy(*predictions(weights, prefix, batch, recompute))


def predictions(
    weights: Weights, prefix: Prefix, batch: Packed, recompute: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What predicts the targets of a micro-batch behind the prompt: final states [f + n, H], the head [V, H], both in
    the compute dtype, and the targets [f + n]: the rows' first tokens, where they are targets and there is a prompt to
    predict them, then those behind `batch.predictors`."""
    shape, P = weights.shape, len(prefix.layers[0])
    x = norm(weights.embed(batch.input_ids), weights.embedding_layernorm, shape.epsilon)  # [S, H]
    if batch.lengths:
        bias = causal_alibi(shape.N, max(batch.lengths), P, x).to(prefix.layers[0].dtype)
        groups = group_rows(batch.lengths, x.device)

        def attention(i: int, q: Tensor, kv: Tensor) -> Tensor:
            return attend(q, kv, prefix.layers[i], bias, groups)

        x = run_blocks(weights, x, attention, batch.predictors, recompute)  # [n, H]
    first = batch.first_targets if P else batch.first_targets[:0]  # [f]: without a prompt nothing predicts them
    x = torch.cat([prefix.last.expand(len(first), -1) if P else x[:0], x])  # [f + n, H]
    hidden = norm(x, weights.final_layernorm, shape.epsilon).to(weights.head.dtype)
    return hidden, weights.head, torch.cat([first, batch.targets])


def split_projection(affine: Affine, shape: Shape) -> tuple[Affine, Affine]:
    """The projection to [N, 3, D] as one to queries [N, 1, D] and one to keys and values [N, 2, D]."""
    weight, bias = (t.unflatten(0, (shape.N, 3, shape.D)) for t in affine)
    of_q, of_kv = (Affine(weight[:, s].flatten(0, 2), bias[:, s].flatten()) for s in (slice(0, 1), slice(1, 3)))
    return of_q, of_kv


class PackedEngine:
    """The engine for BLOOM: a window is cut into micro-batches of `tokens_per_microbatch` real tokens."""

    def __init__(self, weights: Weights, tokens_per_microbatch: int, gradient_checkpointing: bool = False):
        self.weights, self.tokens_per_microbatch = weights, tokens_per_microbatch
        self.gradient_checkpointing = gradient_checkpointing
        self.compute_dtype, self.device = weights.head.dtype, weights.head.device

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        return self._in_finer_cuts(lambda: self._accumulate(prompt, window, grad_scale), window)

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        return self._in_finer_cuts(lambda: self._evaluate(prompt, rows), rows)

    def losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        return self._in_finer_cuts(lambda: self._losses(prompt, rows), rows)

    def state(self) -> dict[str, Any]:
        return {"tokens_per_microbatch": self.tokens_per_microbatch}

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        shape, dtype = self.weights.shape, self.compute_dtype
        longest, tokens = max(len(e.input_ids) for e in window), sum(len(e.input_ids) for e in window)
        taken = max(longest, min(tokens, self.tokens_per_microbatch))
        rows = taken * bytes_per_token(shape, dtype, self.gradient_checkpointing)
        bias = 4 * shape.N * longest * (P + longest)
        blocks = 3 * 4 * min(BLOCK_ELEMENTS[self.device.type], taken * shape.V)
        return self.weights.own_bytes + rows + bias + P * bytes_per_token(shape, dtype) + blocks

    def __str__(self) -> str:
        return f"packed engine, {self.tokens_per_microbatch:,} tokens at a time"

    def _accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        prefix = run_prompt(self.weights, prompt())
        made = [*prefix.layers, prefix.last]
        seen = [t.detach().requires_grad_() for t in made]  # where rows leave their gradients
        total, targets = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for batch in self._micro_batches(window):
            if count := len(batch.targets) + len(batch.first_targets):
                loss = run_rows(self.weights, Prefix(seen[:-1], seen[-1]), batch, self.gradient_checkpointing)
                (loss * grad_scale).backward()
                total += loss.detach()
                targets += count
        torch.autograd.backward(made, [torch.zeros_like(t) if t.grad is None else t.grad for t in seen])
        return total, targets

    @torch.no_grad()
    def _losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        prefix, sums = self._prefix(prompt), [0.0] * len(rows)
        longest_first = sorted(range(len(rows)), key=lambda r: len(rows[r].input_ids), reverse=True)
        numbers = iter(longest_first)  # the order in which cut_by_tokens hands rows out
        for some in cut_by_tokens(rows, self.tokens_per_microbatch):
            batch = collate_packed(some).to(self.device)
            losses = projected_losses(*predictions(self.weights, prefix, batch)).tolist()
            here = [next(numbers) for _ in some]
            first = [r for r in here if rows[r].labels[0] != IGNORE and prompt is not None]
            later = [r for r in here for label in rows[r].labels[1:] if label != IGNORE]
            for r, loss in zip([*first, *later], losses, strict=True):
                sums[r] += loss
        return sums

    def _prefix(self, prompt: Tensor | None) -> Prefix:
        none = self.weights.embed(torch.zeros(0, dtype=torch.int64, device=self.device))  # [0, H]
        return run_prompt(self.weights, none if prompt is None else prompt.to(self.device))

    @torch.no_grad()
    def _evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        prefix = self._prefix(prompt)
        total, targets = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for batch in self._micro_batches(rows):
            total += run_rows(self.weights, prefix, batch)
            targets += len(batch.targets) + (0 if prompt is None else len(batch.first_targets))
        return total, targets

    def _micro_batches(self, window: Sequence[Example]) -> Iterator[Packed]:
        for rows in cut_by_tokens(window, self.tokens_per_microbatch):
            yield collate_packed(rows).to(self.device)

    def _in_finer_cuts(self, run: Callable[[], T], rows: Sequence[Example]) -> T:
        """The rows once more in smaller micro-batches, for as long as the device's memory does not hold them; the
        prompt's gradient is only touched at a window's end, so nothing of the failed try stays."""
        while True:
            try:
                return run()
            except RuntimeError as error:  # on the CPU, running out of memory has no type of its own
                longest = max(len(row.input_ids) for row in rows)
                if not is_out_of_memory(error):
                    raise
                if self.tokens_per_microbatch <= longest:
                    raise TrainingError(
                        f"out of memory with one row of {longest:,} tokens at a time; give a smaller --max_length"
                        + ("" if self.gradient_checkpointing else ", or --gradient_checkpointing")
                    ) from None
                self.tokens_per_microbatch = max(longest, self.tokens_per_microbatch // 2)
            torch.cuda.empty_cache()
            tqdm.write(
                f"out of memory: the step is repeated in micro-batches of {self.tokens_per_microbatch:,} tokens, "
                "with the same gradient"
            )
