"""Score given answers by their log-likelihood, and classify by the most likely of several choices."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt.data.template import Template
from softprompt.data.tokenization import IGNORE, Example
from softprompt.engines.base import LossEngine
from softprompt.utils.errors import ConfigError
from softprompt.utils.progress import rows_bar


class ChoiceResult(NamedTuple):
    """The most likely choice, and the probability of each choice; the probabilities sum to 1."""

    label: str
    probabilities: dict[str, float]

    @property
    def probability(self) -> float:
        """Probability of the most likely choice."""
        return self.probabilities[self.label]


def check_choices(choices: Sequence[str]) -> None:
    """Raise ConfigError if there are fewer than two choices, or if one is empty or given twice."""
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(map(str.strip, choices)):
        raise ConfigError(f"--choices {','.join(choices)}: expected two or more different answers, joined by commas")


def answer_examples(
    input_ids: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    templates: Sequence[Template],
    tokenizer: Any,
) -> list[list[Example]]:
    """Join each question with each answer as in training, where the tokens of the answer and its end token are the
    targets.

    Args:
        input_ids: Token ids of each question in its template.
        rows: The questions as rows; `answers` replace the answer that a row may have.
        answers: The answers as texts.
        templates: The template of each question.

    Returns:
        For each question one example per answer.

    Raises:
        DataError: The chat template refuses an answer.
    """
    ids = answer_token_ids(rows, answers, templates, tokenizer)
    return [[join(question, answer) for answer in some] for question, some in zip(input_ids, ids, strict=True)]


def answer_token_ids(
    rows: Sequence[Mapping[str, Any]], answers: Sequence[str], templates: Sequence[Template], tokenizer: Any
) -> list[list[list[int]]]:
    """Tokenize each answer as the answer to each row, with its end token; see `answer_examples`. Rows whose answers
    have the same text share one list object.

    Returns:
        For each row the token ids of each answer.
    """
    if not answers or not rows:
        return [[] for _ in rows]
    pairs = zip(rows, templates, strict=True)
    rendered = [[template.answer(row, tokenizer, answer) for answer in answers] for row, template in pairs]
    distinct = list(dict.fromkeys(text for texts in rendered for text in texts))  # often the same for all questions
    ids = dict(zip(distinct, tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"], strict=True))
    return [[ids[text] for text in texts] for texts in rendered]


def join(question: Sequence[int], answer: Sequence[int]) -> Example:
    """Join the token ids of a question and of an answer, which are the targets."""
    return Example([*question, *answer], [IGNORE] * len(question) + list(answer))


def log_likelihoods(
    engine: LossEngine, prompts: Sequence[Tensor | None], examples: Sequence[Sequence[Example]]
) -> list[list[float]]:
    """Compute log p(targets | prompt, preceding tokens) of each example in nats.

    Args:
        prompts: The prompt [P, H] fp32 of each question; None for the base without a prompt. Questions with the same
            tensor object are computed together.
        examples: The examples of each question.

    Returns:
        For each question one log-likelihood per example, summed over its targets.
    """
    scores: list[list[float]] = [[]] * len(examples)
    questions_by_prompt: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        questions_by_prompt.setdefault(id(prompt), []).append(number)
    for numbers in questions_by_prompt.values():
        rows = [example for number in numbers for example in examples[number]]
        with rows_bar(len(rows), "likelihoods") as on_rows:
            losses = iter(engine.row_losses(prompts[numbers[0]], rows, on_rows) if rows else [])
        for number in numbers:
            scores[number] = [-next(losses) for _ in examples[number]]
    return scores


def choice_probabilities(scores: Sequence[float], choices: Sequence[str]) -> dict[str, float]:
    """Normalize the log-likelihoods of the choices to probabilities that sum to 1 (softmax)."""
    return dict(zip(choices, torch.tensor(scores, dtype=torch.float64).softmax(0).tolist(), strict=True))


def choice_result(scores: Sequence[float], choices: Sequence[str]) -> ChoiceResult:
    """Return the choice with the largest log-likelihood (in a tie the first one) and the probability of each choice."""
    probabilities = choice_probabilities(scores, choices)
    return ChoiceResult(max(probabilities, key=lambda choice: probabilities[choice]), probabilities)
