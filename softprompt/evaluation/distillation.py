"""Evaluate a prompt that is to replace a text: how far the base's predictions with the prompt are from those with the
text, on held-out questions.

KL          the mean divergence KL(with the text ‖ with the prompt) per token of the answers, in nats
agreement   the share of these tokens at which the most likely token is the same
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from softprompt.data.examples import Example, Examples, count_targets
from softprompt.engines.distillation import TeacherTable, evaluate_student
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.evaluation.answer_comparison import AnsweredRow
from softprompt.evaluation.evaluator import Evaluation, Rival
from softprompt.evaluation.rows import answer_ids, decode_text, question_ids
from softprompt.generation.generator import Generator, in_request_order
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.utils.progress import rows_bar

SAMPLES = 6  # held-out questions whose answers are shown
REPEATS = 5  # measurements of the time to the first token


class TextPrompt(NamedTuple):
    """The text that the prompt replaces.

    Attributes:
        prefix: The ids of the tokens with which all questions with the text begin.
        rows: The held-out questions with the text and their answers, behind `prefix`.
    """

    prefix: Sequence[int]
    rows: Examples


@dataclass(frozen=True)
class DistillationEvaluator:
    """Evaluates any prompt on the same held-out questions. It has the interface of `evaluator.Evaluator`.

    Attributes:
        engine: Runs rows with the base's own head.
        table: The predictions with the text.
        generator: Generates answers.
        examples: The questions without the text, with answers; their labels are indices into `table`.
        answers: The same rows, whose labels are token ids.
        with_cut_text: The same answers behind the questions with the beginning of the text, as long as the prompt.
        text: The whole text.
        max_new_tokens: The most tokens of an answer.
        ends: The tokens that end an answer.
    """

    engine: MicrobatchEngine[Any]
    table: TeacherTable
    generator: Generator
    tokenizer: Any
    examples: Sequence[Example]
    answers: Examples
    with_cut_text: Sequence[Example]
    text: TextPrompt
    max_new_tokens: int
    ends: tuple[int, ...]
    classifier = None
    compares_answers = False
    exact_match_note = None

    def __call__(self, prompt: Tensor | None) -> Evaluation:
        """Evaluate a prompt [P, H], or the bare base (None)."""
        return self._evaluation(prompt, self.examples, "held-out KL")

    def rivals(self, P: int) -> list[Rival]:
        """Evaluate what else could be put before the questions: the first P tokens of the text."""
        cut = self._evaluation(None, self.with_cut_text, "held-out KL of the cut text")
        return [Rival(f"the first {P} tokens of the text", "text cut", "_cut", cut)]

    def state_of(self, evaluation: Evaluation) -> dict[str, Any]:
        """See `Evaluator.state_of`."""
        return {"row_losses": list(evaluation.row_losses), "disagreements": list(evaluation.disagreements or ())}

    def restored(self, state: Mapping[str, Any]) -> Evaluation:
        """See `Evaluator.restored`."""
        targets = list(map(count_targets, self.examples))
        return Evaluation(state["row_losses"], targets, disagreements=state["disagreements"])

    def answered_rows(self, prompt: Tensor, evaluation: Evaluation) -> list[AnsweredRow]:
        """Answer the first SAMPLES questions greedily, without and with the prompt; the expected answer is the one with
        the text."""
        some = self.answers[:SAMPLES]
        how = GenerationSettings(max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=self.ends)
        asked = [Request(question_ids(row), how, each) for row in some for each in (None, prompt)]
        texts = [self._text(ids) for ids in in_request_order(self.generator.generate(asked, len(asked)))]
        return [
            AnsweredRow(self._text(question_ids(row)), self._text(answer_ids(row)), alone, tuned, None, None, loss)
            for row, alone, tuned, loss in zip(some, texts[::2], texts[1::2], evaluation.row_losses, strict=False)
        ]

    def costs(self, prompt: Tensor) -> dict[str, float]:
        """Return what the prompt saves per request (`tokens_saved`), and the median time to the first token of an
        answer with the prompt and with the text, in seconds."""
        how = GenerationSettings(max_new_tokens=1, do_sample=False, eos_token_id=self.ends)
        plain, whole = question_ids(self.answers[0]), [*self.text.prefix, *question_ids(self.text.rows[0])]
        seconds: dict[str, list[float]] = {"time_to_first_token": [], "time_to_first_token_text": []}
        for repeat in range(1 + REPEATS):
            other = prompt * (1 + 1e-6 * repeat)  # another prompt, whose keys and values are not cached
            for times, request in zip(seconds.values(), (Request(plain, how, other), Request(whole, how)), strict=True):
                began = time.perf_counter()
                list(self.generator.generate([request]))
                times.append(time.perf_counter() - began)
        saved = len(whole) - len(plain) - len(prompt)
        return {"tokens_saved": saved, **{name: statistics.median(times[1:]) for name, times in seconds.items()}}

    def _text(self, ids: Sequence[int]) -> str:
        return decode_text(self.tokenizer, ids)

    def _evaluation(self, prompt: Tensor | None, rows: Sequence[Example], title: str) -> Evaluation:
        with rows_bar(len(rows), title) as on_rows:
            losses, disagreements = evaluate_student(self.engine, self.table, prompt, rows, on_rows)
        return Evaluation(losses, list(map(count_targets, rows)), disagreements=disagreements)
