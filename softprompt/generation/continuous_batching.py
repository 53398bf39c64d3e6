"""The generator over frozen BLOOM: one forward a step for all answers that are being written, whatever stands before
them.

Every answer has a place in preallocated memory of keys and values: its prompt's, computed once per prompt and kept,
then its own. A step runs the last token of each answer, and the whole text of those that have just been given a place,
as one stream through the blocks. An answer that ends leaves its place to one that waits.
"""

import hashlib
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt.engines.bloom import PrefixKV, layer_norm, run_blocks, run_prompt
from softprompt.engines.memory_estimate import MAX_TOKENS
from softprompt.generation.decode_linear import decode_linear
from softprompt.generation.kv_cache import KVCache, Slot, Step, StepAttention
from softprompt.generation.requests import Request
from softprompt.generation.sampling import OnToken, Writer, Writers, choose
from softprompt.models.bloom_weights import BloomWeights
from softprompt.utils.out_of_memory import fewer_at_once

KEPT_BYTES = 256 * 2**20  # of the prompts' keys and values that stay in memory


class _Kept(NamedTuple):
    """A prompt's keys and values, and a reference to the prompt that asked for them last; it takes them out of the
    cache when that prompt is deleted."""

    prefix: PrefixKV
    prompt: weakref.ref[Tensor] | None


class Prefixes:
    """Least-recently-used cache of the prompts' keys and values, of at most `KEPT_BYTES`. They are found by the
    prompt's content, so one that was trained further, or replaced, is never served from before. They stay no longer
    than the prompt itself: what an evaluation during training asks for once is not kept."""

    def __init__(self, weights: BloomWeights):
        self._weights, self._kept = weights, OrderedDict[bytes, _Kept]()

    @torch.inference_mode()
    def __call__(self, prompt: Tensor | None) -> PrefixKV:
        """prompt: [P, H], or None for none. Its content is hashed at every call, so call it once for many requests."""
        device = self._weights.head.device
        values = self._weights.embed(torch.zeros(0, dtype=torch.int64, device=device)) if prompt is None else prompt
        digest = hashlib.blake2b(values.detach().cpu().contiguous().numpy().tobytes()).digest()
        kept = self._kept.pop(digest, None)
        prefix = kept.prefix if kept else run_prompt(self._weights, values.to(device))
        owner = None if prompt is None else weakref.ref(prompt, lambda _: self._kept.pop(digest, None))
        self._kept[digest] = _Kept(prefix, owner)
        while self.kept_bytes > KEPT_BYTES:
            self._kept.popitem(last=False)
        return prefix

    @property
    def kept_bytes(self) -> int:
        """Memory that the cache holds."""
        return sum(layer.nbytes for kept in self._kept.values() for layer in kept.prefix.layers)


class PackedGenerator:
    """Answers requests over any provider of BLOOM's weights.

    Memory for keys and values is that of `batch_size` places, or of as many as there are requests, each as wide as the
    longest of them may become with its virtual tokens: 2 · L · H numbers a position (fp32 on the CPU). At most
    `tokens_per_step` tokens of texts come in with a step, or one text that has more. Where memory runs out, there are
    half as many places, and answers that were begun go on from what is written of them.
    """

    def __init__(self, weights: BloomWeights, tokenizer: Any, tokens_per_step: int | None = None):
        self.weights, self.writers, self.prefixes = weights, Writers(tokenizer), Prefixes(weights)
        self.device = weights.head.device
        self.tokens_per_step = tokens_per_step or MAX_TOKENS[self.device.type]

    def generate(
        self, requests: Sequence[Request], batch_size: int = 8, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """See `generate.Generator`. At most `batch_size` answers are written at a time."""
        writers = [self.writers(number, request) for number, request in enumerate(requests)]
        return self._generate(writers, batch_size, on_token)

    def __str__(self) -> str:
        return "packed engine"

    def _generate(
        self, writers: Sequence[Writer], batch_size: int, on_token: OnToken | None
    ) -> Iterator[tuple[int, list[int]]]:
        prompts = {id(w.prompt): w.prompt for w in writers}
        prefixes = {key: self.prefixes(prompt) for key, prompt in prompts.items()}
        waiting = deque(Slot(w, prefixes[id(w.prompt)]) for w in writers)
        most = min(batch_size, len(waiting))
        while waiting:
            places: list[Slot] = []
            try:
                yield from self._write(places, waiting, most, on_token)
                return
            except RuntimeError as error:  # on the CPU, running out of memory has no type of its own
                most = fewer_at_once(error, most)
            waiting.extendleft(place.again() for place in reversed(places) if not place.writer.done)
            torch.cuda.empty_cache()

    def _write(
        self, places: list[Slot], waiting: deque[Slot], most: int, on_token: OnToken | None
    ) -> Iterator[tuple[int, list[int]]]:
        """Until no one waits, or memory runs out: then `places` holds whose answers are not finished."""
        width = max(place.P + place.writer.most for place in waiting)
        memory = self._memory(most, width, waiting[0].prefix.layers[0])  # in the dtype that attention takes
        while self._let_in_and_out(memory, places, waiting, most):
            tokens = choose(self._run(memory, places), [place.writer for place in places])
            for place, token in zip(places, tokens, strict=True):
                if place.writer.take(token) and on_token:
                    on_token(place.writer.number, token)
            yield from [(p.writer.number, p.writer.answer) for p in places if p.writer.done]

    @torch.inference_mode()
    def _memory(self, places: int, width: int, like: Tensor) -> KVCache:
        return KVCache(self.weights.shape, places, width, like)

    @torch.inference_mode()
    def _run(self, memory: KVCache, places: Sequence[Slot]) -> Tensor:
        """One step of all places: logits [n, V] of the token that follows each."""
        weights, step = self.weights, Step(places, self.device)
        x = layer_norm(weights.embed(step.ids), weights.embedding_layernorm, weights.shape.epsilon)  # [S, H]
        predictors = step.last if step.parts else None
        x = run_blocks(weights, x, StepAttention(memory, step), predictors, linear=decode_linear)  # [n, H]
        for place, position in zip(places, step.positions, strict=True):
            place.held = position + 1
        return decode_linear(
            layer_norm(x, weights.final_layernorm, weights.shape.epsilon).to(weights.head.dtype), weights.head
        )

    @torch.inference_mode()
    def _let_in_and_out(self, memory: KVCache, places: list[Slot], waiting: deque[Slot], most: int) -> bool:
        """Who is done goes; one who waits, else the last in the row, takes the place, so that there is no gap. Returns
        whether anyone is there."""
        tokens = 0

        def coming() -> Iterator[Slot]:
            nonlocal tokens
            while waiting and (not tokens or tokens + len(waiting[0].writer.ids) <= self.tokens_per_step):
                tokens += len(waiting[0].writer.ids)
                yield waiting.popleft()

        come = coming()
        for b in reversed([b for b, place in enumerate(places) if place.writer.done]):
            if new := next(come, None):
                places[b] = new
            elif b == len(places) - 1:
                places.pop()
            else:
                places[b] = places.pop()
                memory.move(len(places), b, places[b].held)
        while len(places) < most and (new := next(come, None)):
            places.append(new)
        return bool(places)
