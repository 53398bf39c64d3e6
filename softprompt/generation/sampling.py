"""Choose the next token of each answer from its logits, in the same way for every generator.

The logits processors and stopping criteria are transformers' own, in the order in which its `generate` applies them.
Every answer is processed with its own token history and draws from its own random number generator, so it does not
depend on the other answers in its batch.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

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

from softprompt.generation.logprobs import TokenLogprob
from softprompt.generation.requests import GenerationSettings, Request


class RequestState:
    """The state of a request during generation: its tokens, stopping criteria and random number generator.

    Attributes:
        index: Position of the request in the list that the generator was given.
        token_ids: Token ids of the text, then of the answer so far, without virtual tokens and padding. PEFT passes the
            same ids to logits processors and stopping criteria.
        text_tokens: Number of tokens of the text.
        max_tokens: Length of `token_ids` at which the answer ends.
        token_settings: The settings that choose tokens, without those that end the answer.
        rng: Random number generator of this answer alone.
        top_logprobs: See `Request.top_logprobs`.
        logprobs: The log-probabilities of the answer's tokens, if they are recorded.
        finish_reason: "stop" if an end token or a stop string ended the answer, "length" if it reached `max_tokens`;
            None before that.
        canceled: Whether the answer is no longer needed.

    Raises:
        ConfigError: The text leaves no room for an answer.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        end_token_ids: frozenset[int],
        stop_strings: StopStringCriteria | None,
        max_positions: int | None = None,
    ):
        self.index, self.settings, self.prompt = index, request.settings, request.prompt
        self.token_settings = request.settings.of_tokens()
        self.token_ids = list(request.input_ids)
        self.text_tokens = len(self.token_ids)
        self.max_tokens = self.text_tokens + request.new_token_budget(max_positions)
        self.seed, self.rng = request.seed, torch.Generator()
        self.top_logprobs, self.logprobs = request.top_logprobs, list[TokenLogprob]()
        self.finish_reason: Literal["stop", "length"] | None = None
        self.canceled = False
        self.restore_rng()
        self._end_token_ids, self._stop_strings = end_token_ids, stop_strings

    @property
    def finished(self) -> bool:
        """Whether the answer has ended or was canceled."""
        return self.canceled or self.finish_reason is not None

    def cancel(self) -> None:
        """Cancel the answer. Any thread may call this; the request leaves its batch at the next step."""
        self.canceled = True

    def append(self, token: int, logprob: TokenLogprob | None = None) -> bool:
        """Append a chosen token to the answer. An end token finishes the answer and is not appended.

        Returns:
            Whether the token was appended.
        """
        if token in self._end_token_ids:
            self.finish_reason = "stop"
            return False
        self.token_ids.append(token)
        if logprob:
            self.logprobs.append(logprob)
        if self._stop_strings is not None and bool(self._stop_strings(torch.tensor([self.token_ids]), None)):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.max_tokens:
            self.finish_reason = "length"
        return True

    def restore_rng(self) -> None:
        """Reseed, and replay one draw for each token of the answer.

        A step that ran out of memory may have drawn a number without appending a token. A retry after this call
        continues as if the step had not run.
        """
        self.rng.manual_seed(self.seed)
        for _ in self.answer_ids if self.settings.do_sample else ():
            _uniform(self.rng)

    @property
    def answer_ids(self) -> list[int]:
        """Token ids of the answer so far."""
        return self.token_ids[self.text_tokens :]


class RequestStates:
    """Creates the states of requests to one base.

    Building a `StopStringCriteria` is slow for a large vocabulary, so one is kept for each set of stop strings.

    Args:
        max_positions: Maximum number of positions of the base; None if it has no limit.
    """

    def __init__(self, tokenizer: Any, max_positions: int | None = None):
        self._tokenizer, self._max_positions = tokenizer, max_positions
        self._criteria = dict[tuple[str, ...], StopStringCriteria]()

    def create(self, index: int, request: Request) -> RequestState:
        """Create the state of the request at `index`.

        Raises:
            ConfigError: The text leaves no room for an answer.
        """
        settings = request.settings
        if settings.stop_strings and settings.stop_strings not in self._criteria:
            self._criteria[settings.stop_strings] = StopStringCriteria(self._tokenizer, list(settings.stop_strings))
        end_token_ids, stop_strings = frozenset(self.end_token_ids(settings)), self._criteria.get(settings.stop_strings)
        return RequestState(index, request, end_token_ids, stop_strings, self._max_positions)

    def end_token_ids(self, settings: GenerationSettings) -> tuple[int, ...]:
        """Return the tokens that end an answer: those of the settings, else the tokenizer's eos_token."""
        return settings.eos_token_id or (self._tokenizer.eos_token_id,)


def next_tokens(logits: Tensor, states: Sequence[RequestState]) -> list[int]:
    """Choose the next token of each answer.

    Rows with the same settings are processed together; the results are the same as for each row alone.

    Args:
        logits: [n, V] of any float dtype, one row for each of the n states.

    Returns:
        The n token ids.
    """
    if all(_is_argmax(state.settings) for state in states):
        return logits.argmax(-1).tolist()
    rows_by_settings: dict[GenerationSettings, list[int]] = {}
    for row, state in enumerate(states):
        rows_by_settings.setdefault(state.token_settings, []).append(row)
    tokens = [0] * len(states)
    for settings, rows in rows_by_settings.items():
        group = logits if len(rows) == len(states) else logits[torch.tensor(rows, device=logits.device)]
        chosen = _next_tokens_of_group(group, [states[row] for row in rows], settings)
        for row, token in zip(rows, chosen, strict=True):
            tokens[row] = token
    return tokens


def process_logits(logits: Tensor, token_ids: Sequence[Sequence[int]], settings: GenerationSettings) -> Tensor:
    """Apply the logits processors of `settings`.

    Args:
        logits: [n, V] of any float dtype.
        token_ids: The n token histories, each the text and the answer so far.

    Returns:
        Scores [n, V] fp32.
    """
    history_processors, score_processors = logits_processors(settings, logits.device)
    scores = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if history_processors:
        for row, ids in enumerate(token_ids):  # one by one, since histories differ in length
            history = torch.tensor([list(ids)], device=logits.device)  # [1, T]
            scores[row : row + 1] = history_processors(history, scores[row : row + 1])
    return score_processors(None, scores)  # type: ignore[arg-type]  # none of these reads the tokens


@lru_cache(maxsize=64)
def logits_processors(
    settings: GenerationSettings, device: torch.device
) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """Build transformers' logits processors in the order of `GenerationMixin._get_logits_processor`.

    Returns:
        The processors that read a row's token history, and those that read its scores alone. Temperature, top-k, top-p
        and min-p shape the distribution that is sampled from, so greedy decoding omits them.
    """
    history_processors, score_processors = LogitsProcessorList(), LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        history_processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        history_processors.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if settings.suppress_tokens:
        score_processors.append(SuppressTokensLogitsProcessor(list(settings.suppress_tokens), device=str(device)))
    if settings.do_sample:
        if settings.temperature != 1.0:
            score_processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            score_processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            score_processors.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            score_processors.append(MinPLogitsWarper(settings.min_p))
    return history_processors, score_processors


def sample(probabilities: Tensor, rngs: Sequence[torch.Generator]) -> list[int]:
    """Sample one token from each row by inverting its cumulative distribution.

    `torch.multinomial` takes one generator for all rows; here each row takes one uniform number from its own generator,
    so that its sample does not depend on the other rows.

    Args:
        probabilities: [n, V] of any float dtype.
        rngs: The random number generator of each row.

    Returns:
        The n token ids.
    """
    cumulative = probabilities.double().cumsum(-1)  # [n, V]
    uniform = torch.stack([_uniform(rng) for rng in rngs])  # [n]
    total = cumulative[:, -1:]  # [n, 1], 1 except for rounding
    threshold = uniform.to(cumulative.device)[:, None] * total  # [n, 1]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[1] - 1)  # [n, 1]
    return tokens[:, 0].tolist()


def _uniform(rng: torch.Generator) -> Tensor:
    """Draw an fp64 scalar from [0, 1)."""
    return torch.rand((), generator=rng, dtype=torch.float64)


def _is_argmax(settings: GenerationSettings) -> bool:
    """Return whether the next token is always the one with the largest logit."""
    changes_logits = settings.repetition_penalty != 1.0 or settings.no_repeat_ngram_size or settings.suppress_tokens
    return not (settings.do_sample or changes_logits)


def _next_tokens_of_group(logits: Tensor, states: Sequence[RequestState], settings: GenerationSettings) -> list[int]:
    scores = process_logits(logits, [state.token_ids for state in states], settings)
    if not settings.do_sample:
        return scores.argmax(-1).tolist()
    return sample(scores.softmax(-1), [state.rng for state in states])
