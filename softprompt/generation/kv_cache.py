"""Two caches of keys and values: one for active requests, one for soft prompts."""

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.engines.prefix_schedule import PrefixKV

MAX_PREFIX_BYTES = 256 * 2**20  # limit on the memory of a PrefixCache


class KVCache:
    """Preallocated keys and values of B slots with W positions each.

    The tensors start as zeros: positions after the end of a row get attention weight 0, and 0 times an uninitialized
    value could be NaN.

    Args:
        slots: B, the maximum number of active requests.
        width: W, the maximum number of positions of a row (virtual tokens, text and answer).
        sizes: For each layer the number and the size of heads: those of the keys, (K, D), and of the values, (K, D').
        like: A tensor with the dtype and device of the cache.

    Attributes:
        slots, width: B and W.
        layers: For each layer a pair (keys, values), [B, K, W, D] and [B, K, W, D'], in the dtype of `like`.
    """

    def __init__(self, slots: int, width: int, sizes: Sequence[tuple[tuple[int, int], tuple[int, int]]], like: Tensor):
        self.slots, self.width = slots, width
        self.layers = [
            (like.new_zeros(slots, k[0], width, k[1]), like.new_zeros(slots, v[0], width, v[1])) for k, v in sizes
        ]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        for layer in self.layers:
            for cache in layer:
                cache[target, :, :length] = cache[source, :, :length]

    def copy(self, other: "KVCache") -> None:
        """Copy all slots of a cache that has no more slots and positions than this one."""
        for layer, old_layer in zip(self.layers, other.layers, strict=True):
            for cache, old in zip(layer, old_layer, strict=True):
                cache[: other.slots, :, : other.width] = old


class _CachedPrefix(NamedTuple):
    """A prompt's keys and values, and a weak reference to the prompt tensor that last requested them. When that tensor
    is freed, the reference's callback removes the entry from the cache."""

    prefix: PrefixKV
    prompt: weakref.ref[Tensor] | None


class PrefixCache:
    """A least-recently-used cache of the keys and values of soft prompts, limited to `MAX_PREFIX_BYTES`.

    An entry's key is a hash of the prompt's values, so a prompt that was trained further or replaced never gets
    outdated keys and values. An entry is removed when its prompt tensor is freed, because each evaluation during
    training has a new prompt.

    Args:
        run_prompt: Computes the keys and values of a prompt [P, H] fp32; None means no prompt (P = 0).
    """

    def __init__(self, run_prompt: Callable[[Tensor | None], PrefixKV]):
        self._run_prompt, self._entries = run_prompt, OrderedDict[bytes, _CachedPrefix]()

    @torch.inference_mode()
    def __call__(self, prompt: Tensor | None) -> PrefixKV:
        """Return the keys and values of a prompt. If they are not cached, run the prompt through the base.

        Each call hashes the prompt, so call this once for all requests with the same prompt.

        Args:
            prompt: [P, H] fp32; None means no prompt (P = 0).
        """
        content = b"" if prompt is None else prompt.detach().cpu().contiguous().numpy().tobytes()
        digest = hashlib.blake2b(content).digest()
        entry = self._entries.pop(digest, None)
        prefix = entry.prefix if entry else self._run_prompt(prompt)
        owner = None if prompt is None else weakref.ref(prompt, lambda _: self._entries.pop(digest, None))
        self._entries[digest] = _CachedPrefix(prefix, owner)
        while self.num_bytes > MAX_PREFIX_BYTES:
            self._entries.popitem(last=False)
        return prefix

    @property
    def num_bytes(self) -> int:
        """Size of the cached keys and values in bytes."""
        return sum(layer.nbytes for entry in self._entries.values() for layer in entry.prefix.layers)
