"""The forward pass of one step of continuous batching for BLOOM, with this project's blocks (`engines.bloom`)."""

import torch
from torch import Tensor

from softprompt.engines.bloom import layer_norm, run_blocks, run_prompt
from softprompt.engines.prefix_attention import alibi_slopes, attend, causal_alibi
from softprompt.engines.prefix_schedule import PrefixKV
from softprompt.generation.decode_linear import decode_linear
from softprompt.generation.kv_cache import KVCache
from softprompt.generation.packed_step import PackedStep, PrefillGroup
from softprompt.models.bloom_weights import BloomWeights


class BloomStepModel:
    """The `StepModel` of BLOOM. Any kind of `BloomWeights` works, for example quantized ones."""

    max_positions = None

    def __init__(self, weights: BloomWeights):
        self.weights, self.device = weights, weights.head.device
        like = weights.embedding_layernorm.weight
        # At least fp32, because bf16 cannot represent all distances, for example 257.
        wide = torch.promote_types(like.dtype, torch.float32)
        self.slopes = torch.tensor(alibi_slopes(weights.shape.N), dtype=wide, device=self.device)  # [N]

    def run_prompt(self, prompt: Tensor | None) -> PrefixKV:
        """See `StepModel.run_prompt`."""
        if prompt is None:
            prompt = self.weights.embed(torch.zeros(0, dtype=torch.int64, device=self.device))
        return run_prompt(self.weights, prompt.to(self.device))

    def new_cache(self, slots: int, width: int, prefix: PrefixKV) -> KVCache:
        """See `StepModel.new_cache`."""
        shape, like = self.weights.shape, prefix.layers[0]
        return KVCache(slots, width, [((shape.N, shape.D),) * 2] * shape.L, like)

    def forward(self, cache: KVCache, step: PackedStep) -> Tensor:
        """See `StepModel.forward`."""
        weights, epsilon = self.weights, self.weights.shape.epsilon
        x = layer_norm(weights.embed(step.input_ids), weights.embedding_layernorm, epsilon)  # [S, H]
        last_index = step.last_index if step.prefills else None  # without a prefill, all tokens are last tokens
        attention = BloomStepAttention(cache, step, self.slopes)
        x = run_blocks(weights, x, attention, last_index, linear=decode_linear)  # [n, H]
        return decode_linear(layer_norm(x, weights.final_layernorm, epsilon).to(weights.head.dtype), weights.head)


class BloomStepAttention:
    """Attention of one packed step. `bloom.run_blocks` calls it once per layer. It also writes the new keys and values
    into the cache.

    One batched matrix product over the cache computes all decoding slots, up to the end of the longest of their rows.
    The bias masks the positions after the end of shorter rows. `prefix_attention.attend` computes the prefilled texts,
    group by group.
    """

    def __init__(self, cache: KVCache, step: PackedStep, slopes: Tensor):
        N = len(slopes)
        self.cache, self.step, self.slopes, self.n = cache, step, slopes, len(step.positions)
        heads = step.decoding[:, None] * N + torch.arange(N, device=step.device)  # [d, N]
        self.write_rows = (heads * cache.width + step.decode_positions[:, None]).flatten()  # into [B · N · W, D]
        dtype = cache.layers[0][0].dtype
        self.decode_bias = self._decode_bias().to(dtype)  # [n · N, 1, width]
        if step.prefills:
            self.longest_prefix = max(group.P for group in step.prefills)
            bias = causal_alibi(N, max(group.lengths[0] for group in step.prefills), self.longest_prefix, slopes)
            self.prefill_bias = bias.to(dtype)  # [1, N, longest text, longest prefix + longest text]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Attend in one layer.

        Args:
            layer: The layer's index.
            q: Queries [S, N, D] in the dtype of the cache.
            kv: Keys and values [S, N, 2, D] in the same dtype.

        Returns:
            [S, N · D] in the dtype of `q`.
        """
        decoding, outputs = len(self.step.decoding), list[Tensor]()
        if decoding:
            new = kv[:decoding].unbind(2)  # keys and values, each [decoding, N, D]
            for cache, values in zip(self.cache.layers[layer], new, strict=True):
                cache.view(-1, cache.shape[-1]).index_copy_(0, self.write_rows, values.flatten(0, 1))
            outputs.append(self._decode(layer, q))
        for group in self.step.prefills:
            prefix = group.prefix.layers[layer]  # [P, N, 2, D]
            bias = self.prefill_bias[..., self.longest_prefix - len(prefix) :]
            outputs.append(attend(q[group.span], kv[group.span], prefix, bias, group.attention_groups))
            self._store(layer, group, prefix, kv[group.span])
        return torch.cat(outputs) if self.step.prefills else outputs[0]

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        """Compute softmax(q · keysᵀ / √D + bias) · values for the newest token of each decoding slot: queries [S, N, D]
        → [decoding, N · D].

        All n slots are computed, so that the cache is read as a view, without a copy. The results of slots in prefill
        are dropped.
        """
        caches = (cache[: self.n, :, : self.step.width] for cache in self.cache.layers[layer])
        keys, values = (cache.flatten(0, 1) for cache in caches)  # each [n · N, width, D]
        if self.step.prefills:
            q = q.index_select(0, self.step.last_index)
        q = q.reshape(len(keys), 1, -1)  # [n · N, 1, D]
        scale = q.shape[-1] ** -0.5
        scores = torch.baddbmm(self.decode_bias, q, keys.transpose(1, 2), alpha=scale)  # [n · N, 1, width]
        out = torch.bmm(scores.softmax(-1), values).view(self.n, -1)  # [n, N · D]
        return out.index_select(0, self.step.decoding) if self.step.prefills else out

    def _store(self, layer: int, group: PrefillGroup, prefix: Tensor, kv: Tensor) -> None:
        """Copy the keys and values of the prompt [P, N, 2, D] and of the texts [tokens, N, 2, D] into the cache."""
        P = len(prefix)
        for b, text in zip(group.slots, kv.split(group.lengths), strict=True):  # text: [T, N, 2, D]
            for cache, virtual, new in zip(self.cache.layers[layer], prefix.unbind(2), text.unbind(2), strict=True):
                cache[b, :, :P] = virtual.transpose(0, 1)
                cache[b, :, P : P + len(new)] = new.transpose(0, 1)

    def _decode_bias(self) -> Tensor:
        """Return the bias [n · N, 1, width] that is added to the scores of each slot's newest token: ALiBi (-slope ·
        distance) for positions up to the token itself, -inf for those after it."""
        distance = torch.arange(self.step.width, device=self.step.device) - self.step.positions[:, None]  # [n, width]
        masked = distance.to(self.slopes.dtype).masked_fill_(distance > 0, -torch.inf)
        return (self.slopes[:, None] * masked[:, None]).flatten(0, 1)[:, None]
