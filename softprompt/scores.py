"""How likely given answers are: the likelier of several, by the sum of their tokens' log-probabilities."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt.data import IGNORE, Example
from softprompt.errors import ConfigError
from softprompt.model import Engine
from softprompt.template import Template


class Verdict(NamedTuple):
    """The likeliest of the choices, and each one's probability among them; they add up to 1."""

    label: str
    probabilities: dict[str, float]

    @property
    def probability(self) -> float:
        return self.probabilities[self.label]


def answer_examples(
    texts: Sequence[Sequence[int]], answers: Sequence[str], template: Template, tokenizer: Any
) -> list[list[Example]]:
    """Every text with every answer behind it, as training joins them: the answer's tokens and its end are targets.

    Raises:
        ConfigError: fewer than two answers, an empty one, or one that is there twice.
    """
    if len(answers) < 2 or len(set(answers)) < len(answers) or not all(map(str.strip, answers)):
        raise ConfigError(f"--choices {','.join(answers)}: expected two or more different answers, joined by commas")
    row = {"instruction": "", "input": ""}
    ends = [template.answer({**row, "output": answer}, tokenizer) for answer in answers]
    ids = tokenizer(ends, add_special_tokens=False, verbose=False)["input_ids"]
    return [[Example([*text, *end], [IGNORE] * len(text) + list(end)) for end in ids] for text in texts]


def log_likelihoods(engine: Engine, prompt: Tensor | None, examples: Sequence[Example]) -> list[float]:
    """log p(targets | what stands before them) of each example behind a prompt [P, H] (None: the bare base)."""
    return [-loss for loss in engine.losses(prompt, examples)] if examples else []


def verdicts(
    engine: Engine, prompt: Tensor | None, of_choices: Sequence[Sequence[Example]], choices: Sequence[str]
) -> list[Verdict]:
    """Of each question, whose examples stand in the order of the choices."""
    flat = log_likelihoods(engine, prompt, [example for examples in of_choices for example in examples])
    found = []
    for start in range(0, len(flat), len(choices)):
        shares = torch.tensor(flat[start : start + len(choices)], dtype=torch.float64).softmax(0).tolist()
        probabilities = dict(zip(choices, shares, strict=True))
        found.append(Verdict(max(probabilities, key=lambda choice: probabilities[choice]), probabilities))
    return found
