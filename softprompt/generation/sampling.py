"""From logits to the next tokens, the same for every generator: transformers' own logits processors and stopping
criteria, each answer with its own history and its own random numbers."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StopStringCriteria
from transformers.generation import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softprompt.generation.requests import GenerationSettings, Request

OnToken = Callable[[int, int], None]  # number of the request, token id


class Writer:
    """One answer as it grows: `ids` are the text's and the answer's tokens so far, as PEFT shows them to processors and
    criteria: no virtual ones, no padding. `number` is the request's among its fellows."""

    def __init__(
        self,
        number: int,
        request: Request,
        ends: frozenset[int],
        stop: StopStringCriteria | None,
        max_positions: int | None = None,
    ):
        self.number, self.settings, self.prompt = number, request.settings, request.prompt
        self.ids = list(request.ids)
        self.text = len(self.ids)  # tokens of the text alone
        self.most = self.text + request.new_tokens(max_positions)
        self.seed, self.generator = request.seed, torch.Generator()
        self.done = False
        self.rewind()
        self._ends, self._stop = ends, stop

    def take(self, token: int) -> bool:
        """Add a token, or end the answer where it is an end token, which the answer then goes without; returns whether
        it was added."""
        if token in self._ends:
            self.done = True
            return False
        self.ids.append(token)
        self.done = len(self.ids) == self.most
        if self._stop is not None:
            self.done |= bool(self._stop(torch.tensor([self.ids]), None))
        return True

    def rewind(self) -> None:
        """Random numbers go on as they would behind the answer's tokens so far, whatever was drawn since."""
        self.generator.manual_seed(self.seed)
        for _ in self.answer if self.settings.do_sample else ():
            drawn_number(self.generator)

    @property
    def answer(self) -> list[int]:
        return self.ids[self.text :]


class Writers:
    """Makes writers: knows the tokenizer's end token and the base's `max_positions`, and keeps what is costly to make
    for its vocabulary."""

    def __init__(self, tokenizer: Any, max_positions: int | None = None):
        self._max_positions = max_positions
        self._tokenizer, self._stops = tokenizer, dict[tuple[str, ...], StopStringCriteria]()

    def __call__(self, number: int, request: Request) -> Writer:
        """Raises ConfigError where a text leaves no room for an answer."""
        settings = request.settings
        if settings.stop_strings and settings.stop_strings not in self._stops:
            self._stops[settings.stop_strings] = StopStringCriteria(self._tokenizer, list(settings.stop_strings))
        ends, stop = frozenset(self.ends(settings)), self._stops.get(settings.stop_strings)
        return Writer(number, request, ends, stop, self._max_positions)

    def ends(self, settings: GenerationSettings) -> tuple[int, ...]:
        return settings.eos_token_id or (self._tokenizer.eos_token_id,)


def choose(logits: Tensor, writers: Sequence[Writer]) -> list[int]:
    """The next token of each answer, from logits [n, V] of any float dtype. Answers with the same settings are
    processed together, row by row as if each were alone."""
    if all(_takes_likeliest(w.settings) for w in writers):
        return logits.argmax(-1).tolist()
    alike: dict[GenerationSettings, list[int]] = {}
    for at, writer in enumerate(writers):
        alike.setdefault(writer.settings, []).append(at)
    tokens = [0] * len(writers)
    for settings, rows in alike.items():
        some = logits if len(rows) == len(writers) else logits[torch.tensor(rows, device=logits.device)]
        for at, token in zip(rows, _choose(some, [writers[at] for at in rows], settings), strict=True):
            tokens[at] = token
    return tokens


def processed(logits: Tensor, histories: Sequence[Sequence[int]], settings: GenerationSettings) -> Tensor:
    """Scores [n, V] fp32 behind all processors of `settings`; `histories` are the rows' tokens so far."""
    of_history, of_scores = processors(settings, logits.device)
    scores = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if of_history:
        for row, ids in enumerate(histories):
            seen = torch.tensor([list(ids)], device=logits.device)  # [1, T]
            scores[row : row + 1] = of_history(seen, scores[row : row + 1])
    return of_scores(None, scores)  # type: ignore[arg-type]  # none of these reads the tokens


@lru_cache(maxsize=64)
def processors(settings: GenerationSettings, device: torch.device) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """transformers' processors in the order in which its `generate` applies them: those that read a row's tokens, then
    those that read its scores alone. The latter shape the distribution, so greedy decoding takes few of them."""
    of_history, of_scores = LogitsProcessorList(), LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        of_history.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        of_history.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if settings.suppress_tokens:
        of_scores.append(SuppressTokensLogitsProcessor(list(settings.suppress_tokens), device=str(device)))
    if settings.do_sample:
        if settings.temperature != 1.0:
            of_scores.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            of_scores.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            of_scores.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            of_scores.append(MinPLogitsWarper(settings.min_p))
    return of_history, of_scores


def drawn_number(generator: torch.Generator) -> Tensor:
    """fp64 scalar from 0 up to 1."""
    return torch.rand((), generator=generator, dtype=torch.float64)


def draw(probabilities: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """One word of each row [n, V] by one number of the row's own generator: the first whose cumulated probability
    exceeds it."""
    edges = probabilities.double().cumsum(-1)  # [n, V]
    numbers = torch.stack([drawn_number(g) for g in generators])
    thrown = numbers.to(edges.device)[:, None] * edges[:, -1:]  # [n, 1]
    return torch.searchsorted(edges, thrown, right=True).clamp_(max=edges.shape[1] - 1)[:, 0].tolist()


def _takes_likeliest(settings: GenerationSettings) -> bool:
    changed = settings.repetition_penalty != 1.0 or settings.no_repeat_ngram_size or settings.suppress_tokens
    return not (settings.do_sample or changed)


def _choose(logits: Tensor, writers: Sequence[Writer], settings: GenerationSettings) -> list[int]:
    scores = processed(logits, [w.ids for w in writers], settings)
    if not settings.do_sample:
        return scores.argmax(-1).tolist()
    return draw(scores.softmax(-1), [w.generator for w in writers])
