"""Generation with transformers' `generate` for any causal language model: batches with soft prompts, and beam search.

The rows of a batch may have different prompts (P virtual tokens) and texts (T tokens). Each row becomes one sequence of
embeddings [P + T, H], `[virtual tokens; embedded text]`. The batch is padded on the left to [B, W, H], with an
attention mask [B, W], so that all rows end in the last column and their answers continue from there:

    row 0   · · · · v v t t t t   v virtual token, t token of the text, · padding
    row 1   v v v v v t t t t t

    prefill      transformers runs the embeddings [B, W, H] once and keeps their keys and values
    decode step  one token per row; `sampling.next_tokens` chooses it, and a logits processor makes transformers take it
    finished     a finished row gets pad tokens until all rows of the batch are finished; then the next batch starts
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from softprompt.generation.logprobs import token_logprobs
from softprompt.generation.requests import Request
from softprompt.generation.running_batch import BatchGenerator, OnStateToken
from softprompt.generation.sampling import RequestState, RequestStates, next_tokens
from softprompt.models.capabilities import max_positions
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import autocast
from softprompt.utils.out_of_memory import smaller_batch


class TransformersGenerator(BatchGenerator):
    """Answer requests in left-padded batches with the base's own forward and KV cache.

    The generation_config in the base's files is ignored, as by every generator of this package. If the base has a
    limited number of positions, a batch ends when its longest row has used all of them, and the unfinished rows
    continue in the next batch. When memory runs out, the batch size is halved.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: Any, compute_dtype: torch.dtype):
        self.base, self.compute_dtype, self.max_positions = base, compute_dtype, max_positions(base)
        self.states = RequestStates(tokenizer, self.max_positions)
        self.pad_token_id = tokenizer.pad_token_id

    def __str__(self) -> str:
        return "transformers"

    def new_batch(self, batch_size: int) -> "TransformersBatch":
        """See `BatchGenerator.new_batch`."""
        return TransformersBatch(self, batch_size)

    @torch.no_grad()
    def run_batch(self, states: Sequence[RequestState], end_token_ids: Sequence[int], on_token: OnStateToken) -> None:
        """Prefill one batch and decode until all its rows are finished, or its longest row has no position left."""
        embeddings, mask = pad_left([prepend_prompt(self.base, s.token_ids, s.prompt) for s in states])
        max_new_tokens = max(state.max_tokens - len(state.token_ids) for state in states)
        if self.max_positions is not None:
            max_new_tokens = min(max_new_tokens, self.max_positions - mask.shape[1])
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_token_ids),
            pad_token_id=self.pad_token_id,
            do_sample=False,  # _NextTokenProcessor has sampled already
        )
        with autocast(embeddings.device, self.compute_dtype):
            _generate(
                self.base,
                config,
                inputs_embeds=embeddings,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([_NextTokenProcessor(states, self.pad_token_id, on_token)]),
                stopping_criteria=StoppingCriteriaList([_FinishedCriteria(states)]),
            )


class TransformersBatch:
    """The `RunningBatch` of transformers' `generate`. A step runs a whole batch of up to `batch_size` requests, so
    requests that are added while it runs wait for its end."""

    def __init__(self, generator: TransformersGenerator, batch_size: int):
        self.generator, self.batch_size, self.queue = generator, batch_size, deque[RequestState]()

    def __bool__(self) -> bool:
        return bool(self.queue)

    def add(self, requests: Sequence[Request]) -> list[RequestState]:
        """See `RunningBatch.add`."""
        states = [self.generator.states.create(index, request) for index, request in enumerate(requests)]
        self.queue += states
        return states

    def step(self, on_token: OnStateToken) -> list[RequestState]:
        """See `RunningBatch.step`. A batch that runs out of memory is halved and continued by the next step."""
        batch = self._next_batch()
        if not batch:
            return []
        try:
            self.generator.run_batch(batch, self._end_token_ids(batch[0]), on_token)
        except RuntimeError as error:  # on the CPU, running out of memory raises a plain RuntimeError
            self.batch_size = smaller_batch(error, len(batch))
            torch.cuda.empty_cache()
        for state in reversed([state for state in batch if not state.finished]):
            state.restore_rng()
            self.queue.appendleft(state)
        return [state for state in batch if state.finished]

    def _next_batch(self) -> list[RequestState]:
        """Take requests from the front of the queue, without those that were canceled. They have the same end tokens,
        because transformers accepts one set of end tokens per batch."""
        batch: list[RequestState] = []
        while self.queue and len(batch) < self.batch_size:
            if batch and self._end_token_ids(self.queue[0]) != self._end_token_ids(batch[0]):
                break
            state = self.queue.popleft()
            batch += [] if state.finished else [state]
        return batch

    def _end_token_ids(self, state: RequestState) -> tuple[int, ...]:
        return self.generator.states.end_token_ids(state.settings)


@torch.no_grad()
def beam_search(base: PreTrainedModel, tokenizer: Any, request: Request, compute_dtype: torch.dtype) -> list[list[int]]:
    """Answer one request with transformers' beam search (with sampling, if `do_sample` is set).

    Returns:
        Token ids of the `num_return_sequences` best answers, without the end token, the best first.

    Raises:
        ConfigError: The text leaves no room for an answer.
    """
    settings, device = request.settings, word_embeddings(base).weight.device
    states = RequestStates(tokenizer, max_positions(base))
    state, input_ids = states.create(0, request), torch.tensor([list(request.input_ids)], device=device)
    embeddings, mask = pad_left([prepend_prompt(base, request.input_ids, request.prompt)])
    warpers = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    config = GenerationConfig(
        max_new_tokens=state.max_tokens - state.text_tokens,
        eos_token_id=list(states.end_token_ids(settings)),
        pad_token_id=tokenizer.pad_token_id,
        num_beams=settings.num_beams,
        num_return_sequences=settings.num_return_sequences,
        do_sample=settings.do_sample,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        suppress_tokens=list(settings.suppress_tokens) or None,
        stop_strings=list(settings.stop_strings) or None,
        **({**warpers, "min_p": settings.min_p} if settings.do_sample else {}),
    )
    with torch.random.fork_rng(), autocast(device, compute_dtype):
        torch.manual_seed(request.seed)
        sequences = _generate(
            base, config, input_ids=input_ids, inputs_embeds=embeddings, attention_mask=mask, tokenizer=tokenizer
        )
    answers = []
    for token_ids in sequences[:, input_ids.shape[1] :].tolist():
        replayed = states.create(0, request)
        for token in token_ids:  # tokens after the end of an answer are padding
            if not replayed.finished:
                replayed.append(token)
        answers.append(replayed.answer_ids)
    return answers


def _generate(base: PreTrainedModel, config: GenerationConfig, **inputs: Any) -> Tensor:
    """Call the base's `generate` with this configuration alone.

    transformers takes settings that `config` omits from `base.generation_config`, so an empty one replaces it during
    the call.
    """
    saved, base.generation_config = base.generation_config, GenerationConfig()
    try:
        return cast(Any, base).generate(generation_config=config, **inputs)
    finally:
        base.generation_config = saved


def prepend_prompt(base: PreTrainedModel, input_ids: Sequence[int], prompt: Tensor | None) -> Tensor:
    """Embed a text of T tokens and prepend its prompt [P, H], if it has one. Return [P + T, H] in the dtype of the
    base's word embeddings."""
    embed = word_embeddings(base)
    words = embed(torch.tensor(list(input_ids), device=embed.weight.device))  # [T, H]
    return words if prompt is None else torch.cat([prompt.to(words), words])


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad rows of embeddings [length, H] on the left. Return embeddings [B, W, H] and an attention mask [B, W] int64.

    The tokenizer's padding_side has no effect, because an answer continues its row on the right.
    """
    width = max(map(len, rows))
    embeddings = rows[0].new_zeros(len(rows), width, rows[0].shape[1])
    mask = torch.zeros(len(rows), width, dtype=torch.int64, device=embeddings.device)
    for b, row in enumerate(rows):
        embeddings[b, width - len(row) :], mask[b, width - len(row) :] = row, 1
    return embeddings, mask


class _NextTokenProcessor(LogitsProcessor):
    """Choose each row's next token with `sampling.next_tokens`. That token's score becomes 0 and all others -inf, so
    that transformers' greedy search takes it. Finished rows take the pad token."""

    def __init__(self, states: Sequence[RequestState], pad_token_id: int, on_token: OnStateToken):
        self.states, self.pad_token_id, self.on_token = states, pad_token_id, on_token

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        tokens = [self.pad_token_id] * len(self.states)
        unfinished = [b for b, state in enumerate(self.states) if not state.finished]
        states = [self.states[b] for b in unfinished]
        logits = scores[torch.tensor(unfinished, dtype=torch.int64, device=scores.device)]
        chosen = next_tokens(logits, states)
        logprobs = token_logprobs(logits, chosen, [state.top_logprobs for state in states])
        for b, state, token, logprob in zip(unfinished, states, chosen, logprobs, strict=True):
            tokens[b] = token
            if state.append(token, logprob):
                self.on_token(state, token)
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


class _FinishedCriteria(StoppingCriteria):
    """Stop the rows whose answers are finished, for whatever reason (end token, stop string, limit)."""

    def __init__(self, states: Sequence[RequestState]):
        self.states = states

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([state.finished for state in self.states], device=input_ids.device)
