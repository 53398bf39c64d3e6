"""Continuous batching (Yu et al. 2022, "Orca", OSDI): one forward pass per decoding step over all active requests,
which may have different prompts and lengths.

Each active request occupies a slot: a row of a preallocated KV cache, which holds the keys and values of its soft
prompt (P positions, computed once per prompt), its text (T positions) and its answer so far. Slots 0 … n-1 are in use,
with n ≤ `batch_size`. A step has four phases:

    evict    finished and canceled requests leave their slots
    refill   requests from the queue take the free slots; if the queue is empty, the last slot moves into the gap, so
             that the slots in use stay contiguous
    forward  one packed stream [S]: the whole text of each slot that was just refilled (prefill), and the newest token
             of each other slot (decode step); result: logits [n, V] of the token that follows in each slot
    sample   each slot's next token is chosen and appended to its answer

So no request waits for a longer one to finish, and texts are not padded. Requests may be added and canceled between
steps; see `running_batch`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from softprompt.engines.memory_estimate import MAX_TOKENS
from softprompt.engines.prefix_schedule import PrefixKV
from softprompt.generation.cuda_graphs import Forward, with_graphs
from softprompt.generation.kv_cache import KVCache, PrefixCache
from softprompt.generation.logprobs import token_logprobs
from softprompt.generation.packed_step import PackedStep, Slot
from softprompt.generation.requests import Request
from softprompt.generation.running_batch import BatchGenerator, OnStateToken
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


class ContinuousBatchingGenerator(BatchGenerator):
    """The `Generator` that runs a `StepModel`; see the module's docstring for the phases of a step.

    Args:
        prefill_tokens_per_step: Maximum number of tokens that one step prefills, by default the device's `MAX_TOKENS`.
            A text with more tokens than this is the only one that its step prefills.
    """

    def __init__(self, model: StepModel, tokenizer: Any, prefill_tokens_per_step: int | None = None):
        self.model, self.states = model, RequestStates(tokenizer, model.max_positions)
        self.prefix_cache = PrefixCache(model.run_prompt)
        self.prefill_tokens_per_step = prefill_tokens_per_step or MAX_TOKENS[model.device.type]

    def __str__(self) -> str:
        return "packed engine"

    def new_batch(self, batch_size: int) -> "ContinuousBatch":
        """See `BatchGenerator.new_batch`."""
        return ContinuousBatch(self, batch_size)


class ContinuousBatch:
    """The `RunningBatch` of continuous batching.

    The KV cache has at most `num_slots` slots (fewer if there are fewer requests), and each slot has room for the
    longest row that may occur. The cache grows when more or longer requests are added. A position takes K · (D + D')
    values in each layer (2 · L · H in all for BLOOM), at least fp32 on the CPU. When memory runs out, the number of
    slots is halved, and unfinished answers continue from their tokens so far.
    """

    def __init__(self, generator: ContinuousBatchingGenerator, num_slots: int):
        self.generator, self.model, self.num_slots = generator, generator.model, num_slots
        self.new: list[RequestState] = []  # requests whose soft prompts have not been prefilled yet
        self.queue, self.slots = deque[Slot](), list[Slot]()
        self.cache: KVCache | None = None
        self.forward: Forward = self.model.forward
        self.width = 0  # positions of the longest row that may occur

    def __bool__(self) -> bool:
        return bool(self.new or self.queue or self.slots)

    def add(self, requests: Sequence[Request]) -> list[RequestState]:
        """See `RunningBatch.add`."""
        states = [self.generator.states.create(index, request) for index, request in enumerate(requests)]
        self.new += states
        return states

    def step(self, on_token: OnStateToken) -> list[RequestState]:
        """See `RunningBatch.step`. A step that runs out of memory finishes no request."""
        try:
            self._enqueue_new()
            self._fit_cache()
            self._evict_and_refill()
            states = [slot.state for slot in self.slots]
            logits = self._forward() if states else torch.empty(0, 1)
            tokens = next_tokens(logits, states)
            logprobs = token_logprobs(logits, tokens, [state.top_logprobs for state in states])
        except RuntimeError as error:  # on the CPU, running out of memory raises a plain RuntimeError
            self._shrink(error)
            return []
        for state, token, logprob in zip(states, tokens, logprobs, strict=True):
            if state.append(token, logprob):
                on_token(state, token)
        return [state for state in states if state.finished]

    def _enqueue_new(self) -> None:
        """Prefill the soft prompts of new requests, each prompt once, and put the requests into the queue."""
        prompts = {id(state.prompt): state.prompt for state in self.new}
        prefixes = {key: self.generator.prefix_cache(prompt) for key, prompt in prompts.items()}
        slots = [Slot(state, prefixes[id(state.prompt)]) for state in self.new]
        self.width = max([self.width, *(slot.most for slot in slots)])
        self.queue += slots
        self.new = []

    def _shrink(self, error: RuntimeError) -> None:
        """Halve the number of slots, and put the unfinished requests back into the queue, if memory ran out."""
        self.num_slots = smaller_batch(error, self.num_slots)
        self.queue.extendleft(slot.restarted() for slot in reversed(self.slots) if not slot.state.finished)
        self.slots, self.cache, self.width = [], None, max((slot.most for slot in self.queue), default=0)
        self.forward = self.model.forward  # drops the CUDA graphs; their memory is free once the error is handled
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def _fit_cache(self) -> None:
        """Allocate the cache, or replace it by a larger one, if the unfinished requests need more slots or positions.

        It grows by half or more, so that a row is not copied for each request that is added.
        """
        unfinished = sum(not slot.state.finished for slot in self.slots) + len(self.queue)
        slots, old = min(self.num_slots, unfinished), self.cache
        if not unfinished or (old and slots <= old.slots and self.width <= old.width):
            return
        width = self.width
        if old:
            slots = old.slots if slots <= old.slots else min(self.num_slots, max(slots, 2 * old.slots))
            width = old.width if width <= old.width else max(width, old.width * 3 // 2)
        prefix = (self.slots or self.queue)[0].prefix
        self.cache = self.model.new_cache(slots, width, prefix)
        if old:
            self.cache.copy(old)
        self.forward = with_graphs(self.model.forward, self.model.device)

    @torch.inference_mode()
    def _evict_and_refill(self) -> None:
        """Evict finished requests and refill their slots from the queue. If no further request is admitted, move the
        last slot into the gap."""
        admitted, slots = self._admit(), self.slots
        for b in reversed([b for b, slot in enumerate(slots) if slot.state.finished]):
            if new := next(admitted, None):
                slots[b] = new
            elif b == len(slots) - 1:
                slots.pop()
            else:
                slots[b] = slots.pop()
                cast(KVCache, self.cache).move(len(slots), b, slots[b].cached)
        while len(slots) < self.num_slots and (new := next(admitted, None)):
            slots.append(new)

    def _admit(self) -> Iterator[Slot]:
        """Remove from the queue the requests that this step may prefill, and yield them: as many as
        `prefill_tokens_per_step` allows, at least one. Canceled requests are dropped."""
        tokens, queue, limit = 0, self.queue, self.generator.prefill_tokens_per_step
        while queue and (not tokens or tokens + len(queue[0].state.token_ids) <= limit):
            slot = queue.popleft()
            if not slot.state.finished:
                tokens += len(slot.state.token_ids)
                yield slot

    @torch.inference_mode()
    def _forward(self) -> Tensor:
        """Run one step; return the logits [n, V] of each slot's next token, which are valid until the next step."""
        logits = self.forward(cast(KVCache, self.cache), PackedStep.of(self.slots, self.model.device))
        for slot in self.slots:
            slot.cached = slot.length
        return logits
