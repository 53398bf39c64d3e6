"""Distillation in a training run, once the base has answered the questions (`answered_questions`).

Record what the base predicts with the text at each token of these answers, and return the engine and the evaluator that
compare the student with these predictions. For them, the label of a target is the index of its prediction.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from softprompt.config.loader import TrainConfig
from softprompt.data.examples import Examples, IndexedExamples
from softprompt.data.tokenization import Tokenized
from softprompt.engines.checked_engine import CheckedEngine
from softprompt.engines.distillation import TeacherTable, distilling, record_teacher
from softprompt.engines.factory import engine_for_inference
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.evaluation.distillation import DistillationEvaluator, TextPrompt
from softprompt.evaluation.rows import answer_ids
from softprompt.training.answered_questions import Answered, question_with_answer
from softprompt.training.question_setup import TEACHER_ENGINE
from softprompt.training.setup import Base
from softprompt.utils.errors import Stopped
from softprompt.utils.progress import rows_bar


class Distilled(NamedTuple):
    """The engine that learns from the predictions with the text, and the evaluator of held-out questions; None without
    held-out questions."""

    engine: MicrobatchEngine[Any]
    evaluator: DistillationEvaluator | None


def distilled(config: TrainConfig, answers: Answered, base: Base, engine: MicrobatchEngine[Any]) -> Distilled:
    """Record what the base predicts with the text at each token of the answers, and return what learns from it.

    Args:
        engine: The engine that was chosen for the rows without the text.

    Raises:
        Stopped: `AnswerSource.stop` asked to stop.
        TrainingError: A single row does not fit in memory.
    """
    stop = answers.teacher.source.stop
    recorder = engine_for_inference(TEACHER_ENGINE, base.model, answers.data.tokenizer, engine.compute_dtype)

    def recorded(rows: Examples, title: str) -> TeacherTable:
        """Return the predictions of the base with the text at all targets of `rows`."""
        text, chosen = answers.teacher.prompt, recorder
        if isinstance(chosen, CheckedEngine):  # the text may be longer than any prompt that was checked
            chosen = chosen.choose(text, rows)
        with rows_bar(len(rows), title) as bar:

            def on_rows(done: int) -> None:
                bar(done)
                if stop and done < len(rows) and (code := stop.exit_code) is not None:
                    raise Stopped(
                        "stopped before all predictions with the text were computed; the same command continues with "
                        "the answers that it has",
                        code,
                    )

            return record_teacher(cast(MicrobatchEngine[Any], chosen), engine, text, IndexedExamples(rows), on_rows)

    learning = distilling(engine, recorded(answers.train.with_text, "predictions with the text"))
    if answers.held_out is None:
        return Distilled(learning, None)
    examples = answers.held_out.plain.examples
    evaluator = DistillationEvaluator(
        engine,
        recorded(answers.held_out.with_text, "held-out predictions with the text"),
        answers.teacher.source.generator,
        answers.data.tokenizer,
        IndexedExamples(examples),
        examples,
        IndexedExamples(_with_cut_text(answers.with_cut_text, answers.held_out.plain)),
        TextPrompt(answers.questions.prefix, answers.held_out.with_text),
        config.distillation.distill_max_new_tokens,
        tuple(answers.teacher.ends),
    )
    return Distilled(learning, evaluator)


def _with_cut_text(asked: Sequence[list[int]], held_out: Tokenized) -> Examples:
    """Append the held-out answers to the held-out questions with the cut text before them, `asked`, as token ids."""
    # Each question has one answer, so `kept` holds the numbers of questions.
    rows = zip(held_out.kept, held_out.examples, strict=True)
    return Examples.from_rows(question_with_answer(asked[number], answer_ids(example)) for number, example in rows)
