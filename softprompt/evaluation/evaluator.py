"""Held-out rows: loss and perplexity over all their targets, and exact match over whole answers where all are short."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softprompt.data.tokenization import IGNORE, Example, count_targets, end_tokens
from softprompt.engines.base import Engine
from softprompt.generation.hf_generate import Generator, in_order
from softprompt.generation.requests import GenerationSettings, Request

SHORT_ANSWER = 32  # tokens, the end token among them


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean over all targets of the rows. `answers` are greedy ones to all rows, and `exact_match` is the
    share that is right among the `compared` rows, those whose expected answer is whole; both are None where answers are
    not compared."""

    loss: float
    answers: list[str] | None
    exact_match: float | None
    compared: int = 0

    @property
    def perplexity(self) -> float | None:
        """e to the loss; None where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else None

    def metrics(self, suffix: str = "") -> dict[str, float | None]:
        """Under Trainer's names: eval_loss, eval_perplexity, eval_exact_match, and eval_exact_match_rows where not all
        rows were compared."""
        some = self.compared if self.answers and self.compared < len(self.answers) else None
        named = {"loss": self.loss, "perplexity": self.perplexity, "exact_match": self.exact_match}
        named["exact_match_rows"] = some
        # a comparison that does not apply has no entry, nor has what JSON cannot hold
        return {f"eval_{name}{suffix}": v for name, v in named.items() if v is not None and math.isfinite(v)}


@dataclass(frozen=True)
class Evaluator:
    """Held-out rows and the means to evaluate any prompt on them; `batch_size` rows are answered together, and none
    without a generator. `missing` counts the tokens that each row's answer has lost, as in `data.Tokenized`; when it is
    empty, all answers are whole."""

    engine: Engine
    generator: Generator | None
    tokenizer: Any
    examples: Sequence[Example]
    batch_size: int
    missing: Sequence[int] = ()

    @property
    def compares_answers(self) -> bool:
        """Whether answers can be written, all expected ones are short, and some of these are whole."""
        return self.generator is not None and are_short(self.examples, self.missing) and self._whole > 0

    @property
    def _whole(self) -> int:
        """Rows whose answer is whole."""
        return len(self.examples) - sum(n > 0 for n in self.missing)

    @property
    def told(self) -> str | None:
        """A sentence on the exact match where it is not that of all rows; None where it is, or where no answer can be
        written."""
        n, whole = len(self.examples), self._whole
        if self.generator is None or (self.compares_answers and whole == n):
            return None
        if self.compares_answers:
            return f"exact match over the {whole:,} of {n:,} rows whose answer is whole; max_length cuts the others"
        if not whole:
            short = are_short(self.examples, self.missing)  # else answers are not compared as wholes either
            hint = " (a larger --max_length keeps them)" if short else ""
            return f"no exact match: max_length cuts the answers of all {n:,} rows{hint}"
        long = sum(length > SHORT_ANSWER for length in answer_lengths(self.examples, self.missing))
        return f"no exact match: {long:,} of {n:,} answers have more than {SHORT_ANSWER} tokens"

    def __call__(self, prompt: Tensor | None) -> Evaluation:
        """Evaluate a prompt [P, H], or the bare base (None)."""
        loss_sum, targets = self.engine.evaluate(prompt, self.examples)
        loss = loss_sum.item() / targets
        if self.generator is None or not self.compares_answers:
            return Evaluation(loss, None, None)
        return compared(loss, self._answers(self.generator, prompt), self.examples, self.missing, self.tokenizer)

    def _answers(self, generator: Generator, prompt: Tensor | None) -> list[str]:
        ends = tuple(end_tokens(self.examples, self.tokenizer))
        settings = GenerationSettings(max_new_tokens=SHORT_ANSWER, do_sample=False, eos_token_id=ends)
        requests = [Request(question_ids(e), settings, prompt) for e in self.examples]
        return [text_of(self.tokenizer, ids) for ids in in_order(generator.generate(requests, self.batch_size))]


def compared(
    loss: float, answers: list[str], examples: Sequence[Example], missing: Sequence[int], tokenizer: Any
) -> Evaluation:
    """The evaluation of answers to rows, of which those are compared whose expected answer is whole."""
    each = zip(answers, examples, missing or [0] * len(examples), strict=True)
    whole = [(answer, example) for answer, example, cut_off in each if not cut_off]
    if not whole:
        return Evaluation(loss, None, None)
    right = sum(answer == expected_answer(tokenizer, example) for answer, example in whole)
    return Evaluation(loss, answers, right / len(whole), len(whole))


def question_ids(example: Example) -> list[int]:
    """Ids of a row before its first target."""
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    return example.input_ids[:first]


def expected_answer(tokenizer: Any, example: Example) -> str:
    return text_of(tokenizer, answer_ids(example))


def answer_ids(example: Example) -> list[int]:
    """Ids of a row's targets."""
    return [label for label in example.labels if label != IGNORE]


def answer_lengths(examples: Sequence[Example], missing: Sequence[int] = ()) -> list[int]:
    """Tokens of each row's whole answer, those that were cut off among them."""
    each = zip(examples, missing or [0] * len(examples), strict=True)
    return [count_targets(example) + cut_off for example, cut_off in each]


def are_short(examples: Sequence[Example], missing: Sequence[int] = ()) -> bool:
    """Whether all answers of the rows are, as wholes."""
    return max(answer_lengths(examples, missing)) <= SHORT_ANSWER


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
