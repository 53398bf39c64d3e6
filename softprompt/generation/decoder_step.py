"""The forward pass of one step of continuous batching for a transformers decoder: the base's own modules, with an
attention function that reads and writes the KV cache."""

from typing import cast

import torch
from torch import Tensor, nn

from softprompt.engines.decoder_attention import AttentionOptions, LayerKV, PackedRows, attention, visible
from softprompt.engines.decoder_schedule import DecoderSchedule
from softprompt.engines.head import LinearHead, ModelHead
from softprompt.engines.prefix_schedule import PrefixKV
from softprompt.generation.decode_linear import decode_linear
from softprompt.generation.kv_cache import KVCache
from softprompt.generation.packed_step import PackedStep, PrefillGroup
from softprompt.models.capabilities import max_positions
from softprompt.models.loading import word_embeddings
from softprompt.utils.transfer import to_device


class DecoderStepModel:
    """The `StepModel` of a decoder that `DecoderSchedule` supports; `decoding_check` checks its logits."""

    def __init__(self, schedule: DecoderSchedule):
        self.schedule, self.device = schedule, schedule.device
        self.max_positions = max_positions(schedule.base)
        self.layer_of = {module: layer for layer, (module, _) in enumerate(schedule.layout)}

    def run_prompt(self, prompt: Tensor | None) -> PrefixKV:
        """See `StepModel.run_prompt`."""
        return self.schedule.run_prompt(None if prompt is None else prompt.to(self.device))

    def new_cache(self, slots: int, width: int, prefix: PrefixKV) -> KVCache:
        """See `StepModel.new_cache`."""
        sizes = [tuple((t.shape[1], t.shape[2]) for t in kv) for _, kv in self.schedule.layout]
        return KVCache(slots, width, cast(list[tuple[tuple[int, int], tuple[int, int]]], sizes), prefix.layers[0])

    def forward(self, cache: KVCache, step: PackedStep) -> Tensor:
        """See `StepModel.forward`."""
        texts = [torch.arange(g.P, g.P + length) for g in step.prefills for length in g.lengths]
        positions = step.decode_positions  # [S]
        if texts:
            positions = torch.cat([positions, to_device(torch.cat(texts), self.device)])
        words = word_embeddings(self.schedule.base)(step.input_ids)  # [S, H]
        prompts = [self.schedule.by_module(group.prefix) for group in step.prefills]
        rows = CachedAttention(cache, step, self.layer_of, prompts)
        hidden = self.schedule.run_body(words, positions, rows).index_select(0, step.last_index)  # [n, H]
        head = self.schedule.head
        if isinstance(head, LinearHead):
            return decode_linear(hidden.to(head.weight.dtype), head.weight)
        return cast(ModelHead, head).logits(hidden)


class CachedAttention:
    """The `RowsAttention` of one packed step. It also writes the new keys and values into the cache.

    Args:
        layer_of: The index in `cache.layers` of each attention module.
        prompts: For each prefill group, the prompt's keys and values by attention module.
    """

    def __init__(
        self,
        cache: KVCache,
        step: PackedStep,
        layer_of: dict[nn.Module, int],
        prompts: list[dict[nn.Module, LayerKV]],
    ):
        self.cache, self.step, self.layer_of = cache, step, layer_of
        self.slots, self.positions, self.width = step.decoding, step.decode_positions, step.width
        pairs = zip(step.prefills, prompts, strict=True)
        self.texts = [PackedRows(group.lengths, step.device, group.P, prompt) for group, prompt in pairs]
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """See `RowsAttention.attend`."""
        pair, d, outputs = self.cache.layers[self.layer_of[module]], len(self.slots), []
        if d:
            for cache, new in zip(pair, (k, v), strict=True):
                cache[self.slots, :, self.positions] = new[:d].to(cache.dtype)
            outputs.append(self._decode(q[:d], pair, options))
        for group, rows in zip(self.step.prefills, self.texts, strict=True):
            own = LayerKV(k[group.span], v[group.span])
            outputs.append(rows.attend(module, q[group.span], *own, options))
            self._store(pair, group, rows.prompt.get(module), own)
        return torch.cat(outputs)

    def _decode(self, q: Tensor, pair: tuple[Tensor, Tensor], options: AttentionOptions) -> Tensor:
        """Compute the attention of the d newest tokens to their slots' rows in the cache.

        Args:
            q: [d, N, D].
            pair: The layer's keys [B, K, W, D] and values [B, K, W, D'] in the cache.
        Returns:
            [d, N, D'].
        """
        mask = self._masks.get(options.window)
        if mask is None:
            mask = self._masks[options.window] = visible(self.positions, self.width, options.window)[:, None]
        whole = not self.step.prefills  # all slots decode, so they are 0 … d - 1, and the cache is read as a view
        used = (t[:, :, : self.width] for t in pair)
        caches = (t[: len(q)] if whole else t.index_select(0, self.slots) for t in used)
        keys, values = (t.transpose(1, 2) for t in caches)  # [d, width, K, size]
        return attention(q[:, None].to(keys.dtype), keys, values, mask, options)[:, 0]

    def _store(self, pair: tuple[Tensor, Tensor], group: PrefillGroup, prompt: LayerKV | None, own: LayerKV) -> None:
        """Copy the keys and values of a group's prompt and texts into the cache."""
        for which, cache in enumerate(pair):
            for b, text in zip(group.slots, own[which].split(group.lengths), strict=True):  # [T, K, size]
                if prompt:
                    cache[b, :, : group.P] = prompt[which].transpose(0, 1)
                cache[b, :, group.P : group.P + len(text)] = text.transpose(0, 1)
