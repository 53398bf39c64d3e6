"""Answers from a frozen base: what a generator is, and the one for any causal language model, transformers' own
`generate` with the prompt before the text."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol, cast

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

from softprompt.generation.requests import Request
from softprompt.generation.sampling import OnToken, Writer, Writers, choose
from softprompt.models.capabilities import max_positions
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import autocast
from softprompt.utils.out_of_memory import smaller_batch


class Generator(Protocol):
    """What answers requests. An answer is the one that it would be alone: its neighbours, their prompts and their
    number change nothing but the order of sums."""

    def generate(
        self, requests: Sequence[Request], batch_size: int = 8, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Each request's number and its answer's token ids, without the end token, as they are finished; requests are
        checked at once, answers made as they are asked for. `on_token` is told of every token when it is chosen.

        Raises:
            ConfigError: a text that leaves no room for an answer.
        """
        ...


def in_order(answers: Iterator[tuple[int, list[int]]]) -> Iterator[list[int]]:
    """The answers in the order of their requests, each as soon as those before it are finished."""
    finished: dict[int, list[int]] = {}
    following = 0
    for number, answer in answers:
        finished[number] = answer
        while following in finished:
            yield finished.pop(following)
            following += 1


class TransformersGenerator:
    """Batches of texts, padded on the left, through the base's own forward and cache. Of what the base's files say of
    generation nothing counts, as with every generator. A batch ends where its longest row has used up the base's
    positions; the others go on in the next one."""

    def __init__(self, base: PreTrainedModel, tokenizer: Any, compute_dtype: torch.dtype):
        self.base, self.compute_dtype, self.max_positions = base, compute_dtype, max_positions(base)
        self.writers = Writers(tokenizer, self.max_positions)
        self.pad_token_id = tokenizer.pad_token_id

    def __str__(self) -> str:
        return "transformers"

    def generate(
        self, requests: Sequence[Request], batch_size: int = 8, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        writers = [self.writers(number, request) for number, request in enumerate(requests)]
        return self._generate(writers, batch_size, on_token)

    def _generate(
        self, writers: Sequence[Writer], batch_size: int, on_token: OnToken | None
    ) -> Iterator[tuple[int, list[int]]]:
        for ends, alike in groupby(writers, lambda w: self.writers.ends(w.settings)):
            rows = deque(alike)
            while rows:
                some = [rows.popleft() for _ in range(min(batch_size, len(rows)))]
                try:
                    self._write(some, ends, on_token)
                except RuntimeError as error:  # on the CPU, running out of memory has no type of its own
                    batch_size = smaller_batch(error, len(some))
                    torch.cuda.empty_cache()
                for writer in reversed([w for w in some if not w.done]):
                    writer.rewind()
                    rows.appendleft(writer)
                yield from ((w.number, w.answer) for w in some if w.done)

    @torch.no_grad()
    def _write(self, writers: Sequence[Writer], ends: Sequence[int], on_token: OnToken | None) -> None:
        embeddings, mask = padded([behind(self.base, w.ids, w.prompt) for w in writers])
        pen = _Pen(writers, self.pad_token_id, on_token)
        most = max(w.most - len(w.ids) for w in writers)
        if self.max_positions is not None:
            most = min(most, self.max_positions - mask.shape[1])
        settings = GenerationConfig(
            max_new_tokens=most,
            eos_token_id=list(ends),
            pad_token_id=self.pad_token_id,
            do_sample=False,  # the pen has drawn already
        )
        with autocast(embeddings.device, self.compute_dtype):
            _generate(
                self.base,
                settings,
                inputs_embeds=embeddings,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([pen]),
                stopping_criteria=StoppingCriteriaList([_AllWritten(writers)]),
            )


@torch.no_grad()
def search_beams(
    base: PreTrainedModel, tokenizer: Any, request: Request, compute_dtype: torch.dtype
) -> list[list[int]]:
    """transformers' beam search, with sampling where that is set: the `num_return_sequences` best answers' token ids,
    without the end token, best first.

    Raises:
        ConfigError: a text that leaves no room for an answer.
    """
    settings, device = request.settings, word_embeddings(base).weight.device
    writers = Writers(tokenizer, max_positions(base))
    writer, text = writers(0, request), torch.tensor([list(request.ids)], device=device)
    embeddings, mask = padded([behind(base, request.ids, request.prompt)])
    shape = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    wanted = GenerationConfig(
        max_new_tokens=writer.most - writer.text,
        eos_token_id=list(writers.ends(settings)),
        pad_token_id=tokenizer.pad_token_id,
        num_beams=settings.num_beams,
        num_return_sequences=settings.num_return_sequences,
        do_sample=settings.do_sample,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        suppress_tokens=list(settings.suppress_tokens) or None,
        stop_strings=list(settings.stop_strings) or None,
        **({**shape, "min_p": settings.min_p} if settings.do_sample else {}),
    )
    with torch.random.fork_rng(), autocast(device, compute_dtype):
        torch.manual_seed(request.seed)
        found = _generate(
            base, wanted, input_ids=text, inputs_embeds=embeddings, attention_mask=mask, tokenizer=tokenizer
        )
    answers = []
    for ids in found[:, text.shape[1] :].tolist():
        again = writers(0, request)
        for token in ids:  # what stands behind an answer's end is padding
            if not again.done:
                again.take(token)
        answers.append(again.answer)
    return answers


def _generate(base: PreTrainedModel, settings: GenerationConfig, **inputs: Any) -> Tensor:
    """The base's `generate` with these settings alone: transformers fills in what they leave out from the
    generation_config of the base's files, so that is set aside."""
    of_files, base.generation_config = base.generation_config, GenerationConfig()
    try:
        return cast(Any, base).generate(generation_config=settings, **inputs)
    finally:
        base.generation_config = of_files


def behind(base: PreTrainedModel, ids: Sequence[int], prompt: Tensor | None) -> Tensor:
    """The embeddings [P + T, H] of a text behind its prompt [P, H], in the dtype of the base's words."""
    embed = word_embeddings(base)
    words = embed(torch.tensor(list(ids), device=embed.weight.device))  # [T, H]
    return words if prompt is None else torch.cat([prompt.to(words), words])


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [t, H] of any lengths → [B, W, H] and a mask [B, W] int64. Answers continue a row at its right end, so
    padding stands on the left whatever the tokenizer's habit."""
    width = max(map(len, rows))
    embeddings = rows[0].new_zeros(len(rows), width, rows[0].shape[1])
    mask = torch.zeros(len(rows), width, dtype=torch.int64, device=embeddings.device)
    for b, row in enumerate(rows):
        embeddings[b, width - len(row) :], mask[b, width - len(row) :] = row, 1
    return embeddings, mask


class _Pen(LogitsProcessor):
    """Chooses each row's next token as every generator does, and leaves transformers no other."""

    def __init__(self, writers: Sequence[Writer], pad_token_id: int, on_token: OnToken | None):
        self.writers, self.pad_token_id, self.on_token = writers, pad_token_id, on_token

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        tokens = [self.pad_token_id] * len(self.writers)
        writing = [b for b, writer in enumerate(self.writers) if not writer.done]
        chosen = choose(scores[torch.tensor(writing, device=scores.device)], [self.writers[b] for b in writing])
        for b, token in zip(writing, chosen, strict=True):
            tokens[b] = token
            if self.writers[b].take(token) and self.on_token:
                self.on_token(self.writers[b].number, token)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


class _AllWritten(StoppingCriteria):
    def __init__(self, writers: Sequence[Writer]):
        self.writers = writers

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([writer.done for writer in self.writers], device=input_ids.device)
