"""Continuous batching (Yu et al. 2022, "Orca", OSDI): one forward pass per decoding step over all active requests,
which may have different prompts and lengths.

Each active request occupies a slot: a row of a preallocated KV cache, which holds the keys and values of its soft
prompt (P positions, computed once per prompt), its text (T positions) and its answer so far. Slots 0 … n-1 are in use,
with n ≤ `batch_size`. A step has four phases:

    evict    finished requests leave their slots
    refill   requests from the queue take the free slots; if the queue is empty, the last slot moves into the gap, so
             that the slots in use stay contiguous
    forward  one packed stream [S]: the whole text of each slot that was just refilled (prefill), and the newest token
             of each other slot (decode step); result: logits [n, V] of the token that follows in each slot
    sample   each slot's next token is chosen and appended to its answer

So no request waits for a longer one to finish, and texts are not padded.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from softprompt.engines.memory_estimate import MAX_TOKENS
from softprompt.engines.prefix_schedule import PrefixKV
from softprompt.generation.cuda_graphs import Forward, with_graphs
from softprompt.generation.kv_cache import KVCache, PrefixCache
from softprompt.generation.packed_step import PackedStep, Slot
from softprompt.generation.requests import OnToken, Request
from softprompt.generation.sampling import RequestState, RequestStates, next_tokens
from softprompt.utils.out_of_memory import smaller_batch


class StepModel(Protocol):
    """The interface between continuous batching and a base. `BloomStepModel` and `DecoderStepModel` implement it.

    Attributes:
        device: The device that computes.
        max_positions: Maximum number of positions of a row, virtual tokens included; None if there is no limit.
    """

    device: torch.device
    max_positions: int | None

    def run_prompt(self, prompt: Tensor | None) -> PrefixKV:
        """Compute the keys and values of a prompt [P, H] fp32; None means no prompt (P = 0)."""
        ...

    def new_cache(self, slots: int, width: int, prefix: PrefixKV) -> KVCache:
        """Allocate a cache of `slots` rows with `width` positions each, in the dtype and on the device of `prefix`."""
        ...

    def forward(self, cache: KVCache, step: PackedStep) -> Tensor:
        """Run one step (prefill and decode together), and write the new keys and values into the cache. Return the
        logits [n, V] of each slot's next token."""
        ...


class ContinuousBatchingGenerator:
    """The `Generator` that runs a `StepModel`; see the module's docstring for the phases of a step.

    The KV cache has `batch_size` slots (fewer if there are fewer requests), and each slot has room for the longest row
    that may occur. A position takes K · (D + D') values in each layer (2 · L · H in all for BLOOM), at least fp32 on
    the CPU. When memory runs out, the number of slots is halved, and unfinished answers continue from their tokens so
    far.

    Args:
        prefill_tokens_per_step: Maximum number of tokens that one step prefills, by default the device's `MAX_TOKENS`.
            A text with more tokens than this is the only one that its step prefills.
    """

    def __init__(self, model: StepModel, tokenizer: Any, prefill_tokens_per_step: int | None = None):
        self.model, self.states = model, RequestStates(tokenizer, model.max_positions)
        self.prefix_cache = PrefixCache(model.run_prompt)
        self.device = model.device
        self.prefill_tokens_per_step = prefill_tokens_per_step or MAX_TOKENS[self.device.type]

    def __str__(self) -> str:
        return "packed engine"

    def generate(
        self, requests: Sequence[Request], batch_size: int = 8, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """See `Generator.generate`."""
        states = [self.states.create(index, request) for index, request in enumerate(requests)]
        return self._generate(states, batch_size, on_token)

    def _generate(
        self, states: Sequence[RequestState], batch_size: int, on_token: OnToken | None
    ) -> Iterator[tuple[int, list[int]]]:
        prompts = {id(state.prompt): state.prompt for state in states}
        prefixes = {key: self.prefix_cache(prompt) for key, prompt in prompts.items()}
        queue = deque(Slot(state, prefixes[id(state.prompt)]) for state in states)
        num_slots = min(batch_size, len(queue))
        while queue:
            slots: list[Slot] = []
            try:
                yield from self._run(slots, queue, num_slots, on_token)
                return
            except RuntimeError as error:  # on the CPU, running out of memory raises a plain RuntimeError
                num_slots = smaller_batch(error, num_slots)
            queue.extendleft(slot.restarted() for slot in reversed(slots) if not slot.state.finished)
            torch.cuda.empty_cache()

    def _run(
        self, slots: list[Slot], queue: deque[Slot], num_slots: int, on_token: OnToken | None
    ) -> Iterator[tuple[int, list[int]]]:
        """Run steps until slots and queue are empty. If memory runs out, `slots` still has the unfinished requests."""
        width = max(slot.P + slot.state.max_tokens for slot in queue)
        cache = self._allocate(num_slots, width, queue[0].prefix)
        forward = with_graphs(self.model.forward, self.device)
        while self._evict_and_refill(cache, slots, queue, num_slots):
            tokens = next_tokens(self._forward(forward, cache, slots), [slot.state for slot in slots])
            for slot, token in zip(slots, tokens, strict=True):
                if slot.state.append(token) and on_token:
                    on_token(slot.state.index, token)
            yield from [(slot.state.index, slot.state.answer_ids) for slot in slots if slot.state.finished]

    @torch.inference_mode()
    def _allocate(self, num_slots: int, width: int, prefix: PrefixKV) -> KVCache:
        return self.model.new_cache(num_slots, width, prefix)

    @torch.inference_mode()
    def _evict_and_refill(self, cache: KVCache, slots: list[Slot], queue: deque[Slot], num_slots: int) -> bool:
        """Evict finished requests and refill their slots from the queue. If no further request is admitted, move the
        last slot into the gap. Return whether any slot is in use."""
        admitted = self._admit(queue)
        for b in reversed([b for b, slot in enumerate(slots) if slot.state.finished]):
            if new := next(admitted, None):
                slots[b] = new
            elif b == len(slots) - 1:
                slots.pop()
            else:
                slots[b] = slots.pop()
                cache.move(len(slots), b, slots[b].cached)
        while len(slots) < num_slots and (new := next(admitted, None)):
            slots.append(new)
        return bool(slots)

    def _admit(self, queue: deque[Slot]) -> Iterator[Slot]:
        """Remove from the queue the requests that this step may prefill, and yield them: as many as
        `prefill_tokens_per_step` allows, at least one."""
        tokens = 0
        while queue and (not tokens or tokens + len(queue[0].state.token_ids) <= self.prefill_tokens_per_step):
            tokens += len(queue[0].state.token_ids)
            yield queue.popleft()

    @torch.inference_mode()
    def _forward(self, forward: Forward, cache: KVCache, slots: Sequence[Slot]) -> Tensor:
        """Run one step; return the logits [n, V] of each slot's next token, which are valid until the next step."""
        logits = forward(cache, PackedStep.of(slots, self.device))
        for slot in slots:
            slot.cached = slot.length
        return logits
