"""How likely given answers are: the sum of their tokens' log-probabilities, and the likelier of several."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt.data.template import Template
from softprompt.data.tokenization import IGNORE, Example
from softprompt.engines.base import Engine
from softprompt.utils.errors import ConfigError


class ChoiceResult(NamedTuple):
    """The likeliest of the choices, and each one's probability among them; they add up to 1."""

    label: str
    probabilities: dict[str, float]

    @property
    def probability(self) -> float:
        return self.probabilities[self.label]


def check_choices(choices: Sequence[str]) -> None:
    """Raises ConfigError for fewer than two answers, an empty one, or one that is there twice."""
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(map(str.strip, choices)):
        raise ConfigError(f"--choices {','.join(choices)}: expected two or more different answers, joined by commas")


def answer_examples(
    texts: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    templates: Sequence[Template],
    tokenizer: Any,
) -> list[list[Example]]:
    """Each text with each of the answers behind it, as training joins them: the answer's tokens and its end are
    targets. `texts` are the token ids that the `templates`, one for each text, make of the `rows`; an answer stands in
    the place of the row's own.

    Raises:
        DataError: a chat template refuses an answer.
    """
    if not answers or not texts:
        return [[] for _ in texts]
    of_rows = zip(rows, templates, strict=True)
    behind = [[template.answer(row, tokenizer, answer) for answer in answers] for row, template in of_rows]
    different = list(dict.fromkeys(end for ends in behind for end in ends))
    ids = dict(zip(different, tokenizer(different, add_special_tokens=False, verbose=False)["input_ids"], strict=True))
    return [
        [Example([*text, *ids[end]], [IGNORE] * len(text) + list(ids[end])) for end in ends]
        for text, ends in zip(texts, behind, strict=True)
    ]


def log_likelihoods(
    engine: Engine, prompts: Sequence[Tensor | None], examples: Sequence[Sequence[Example]]
) -> list[list[float]]:
    """log p(targets | what stands before them) of each question's examples behind the question's prompt [P, H] (None:
    the bare base); what stands behind the same prompt is run together."""
    found: list[list[float]] = [[]] * len(examples)
    together: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        together.setdefault(id(prompt), []).append(number)
    for numbers in together.values():
        some = [example for n in numbers for example in examples[n]]
        each = iter(engine.row_losses(prompts[numbers[0]], some) if some else [])
        for number in numbers:
            found[number] = [-next(each) for _ in examples[number]]
    return found


def shares(scores: Sequence[float], answers: Sequence[str]) -> dict[str, float]:
    """Each answer's probability among the answers, from their log-likelihoods; they add up to 1."""
    return dict(zip(answers, torch.tensor(scores, dtype=torch.float64).softmax(0).tolist(), strict=True))


def choice_result(scores: Sequence[float], choices: Sequence[str]) -> ChoiceResult:
    """From the log-likelihoods of the choices."""
    probabilities = shares(scores, choices)
    return ChoiceResult(max(probabilities, key=lambda choice: probabilities[choice]), probabilities)
