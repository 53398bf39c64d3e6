"""The summary that a run prints at its end: metrics before and after training, whether the prompt is useful, examples,
and a command to try."""

import os
from collections.abc import Iterator, Sequence
from html import escape
from itertools import takewhile
from typing import NamedTuple

from softprompt.config.adapter_specs import NONE
from softprompt.config.infer_args import GENERATION_DEFAULTS
from softprompt.config.train_args import RUNS
from softprompt.config.validation import quantization_bits
from softprompt.config.value_parsers import parse_labels
from softprompt.data.template import without_default_template
from softprompt.data.tokenization import describe_losses
from softprompt.evaluation.answer_comparison import AnswerComparison
from softprompt.runs.file_names import QUESTION_FILE
from softprompt.training.first_question import MOST_CHARACTERS, FirstQuestion
from softprompt.training.result import Run
from softprompt.utils.shell_commands import command, flag
from softprompt.utils.text_table import Rows, display_width, html_table, shortened, table, terminal_width
from softprompt.utils.translation import translate

EXAMPLES = 3  # held-out rows that are shown; more if there are more labels
WIDTH, LABEL_WIDTH = 44, 16  # columns of the terminal for a text, and for a label in the head of a table


def summary(run: Run) -> str:
    """Return a table of metrics, whether the prompt is useful, the confusion matrix of labels, held-out rows with
    answers before and after training, and the infer.py command to try or the reason why there is none."""
    width = terminal_width()
    parts = [part if isinstance(part, str) else _fitting_table(part, width) for part in _parts(run)]
    if run.no_answers:
        ask = command("infer")
        note = f"No answers: {run.no_answers}; --choices and --eval_dataset of {ask} work without it"
        parts.append(translate(note))
    elif run.question:
        parts.append(translate(f"Try: {infer_command(run, run.question)}"))
    return "\n" + "\n\n".join(parts)


def html_summary(run: Run) -> str:
    """Return the tables and the verdict of `summary` as HTML, below the run's folder and, if the run was stopped, below
    how to continue."""
    lines = [f"<p>{translate('Run in')} <code>{escape(str(run.output_dir))}</code></p>"]
    lines += [f"<p>{escape(translate(run.stopped))}</p>"] if run.stopped else []
    lines += [f"<p>{escape(part)}</p>" if isinstance(part, str) else html_table(part) for part in _parts(run)]
    return "\n".join(lines)


def _parts(run: Run) -> list[Rows | str]:
    """Return the parts that are not empty: tables, each a list of rows with a header, and sentences between them."""
    return [part for part in (_figures(run), _verdict(run), _confusion(run), _examples(run)) if len(part) > 1]


def _fitting_table(rows: Rows, width: int) -> str:
    """Format a table for a terminal of `width` columns. A confusion matrix has no texts to shorten, so a table that
    cannot fit is replaced by a line that says where it is."""
    text = table(rows, width)
    if max(map(display_width, text.splitlines())) > width:
        return translate(f"The table of {len(rows) - 1} labels is wider than the terminal; see the report.")
    return text


def infer_command(run: Run, question: FirstQuestion) -> str:
    """Return the command that asks `question` with the trained prompt; the base is quantized as in training. The run's
    folder is omitted if infer.py finds it by itself. If the answers are labels and infer.py samples answers by default,
    the command chooses among the labels."""
    bits = quantization_bits(run.config.model.load_in_8bit, run.config.model.load_in_4bit)
    folder = str(run.output_dir) if str(run.output_dir) != NONE else os.path.join(".", NONE)
    words = ["" if run.output_dir.parent == RUNS else flag("adapter", folder)]
    words += [f" --load_in_{bits}bit"] if bits else []
    asked = dict(question.flags or {"prompts_file": str(run.output_dir / QUESTION_FILE)})
    if question.flags and run.config.model.model_name_or_path not in GENERATION_DEFAULTS:
        asked |= _choices(run)
    return f"{command('infer')}{''.join(words)}{''.join(flag(*each) for each in asked.items())}"


def _choices(run: Run) -> dict[str, str]:
    """Return the flag that names the labels of a run; empty if its answers are not labels, or if they cannot be written
    as a value of --choices."""
    labels = run.after.classification.labels if run.after and run.after.classification else ()
    text = ",".join(labels)
    fits = labels and len(text) <= MOST_CHARACTERS and text.isprintable() and parse_labels(text) == list(labels)
    return {"choices": text} if fits else {}


class Figure(NamedTuple):
    """A line of the table of metrics, as text; an empty text if there is no value.

    Attributes:
        name: The metric.
        always: Its value for always giving the most common answer.
        base: For the base alone.
        rival: For what else the prompt is compared with.
        prompt: With the prompt.
        interval: The 95 % interval of that.
    """

    name: str
    always: str = ""
    base: str = ""
    rival: str = ""
    prompt: str = ""
    interval: str = ""


def _figures(run: Run) -> Rows:
    """Return the table of metrics. Columns without a value are left out."""
    metrics, rival = run.metrics, run.rivals[0].title if run.rivals else ""
    head = Figure("", _always(run), "base alone", rival, "with prompt", "95 % interval")
    figures = list(_of_distillation(run) if run.rivals else _held_out_rows(run))
    if run.after is None and "train_loss" in metrics:
        figures.append(Figure("training loss (mean)", prompt=f"{metrics['train_loss']:.4f}"))
    if metrics:
        figures.append(Figure("seconds of training", prompt=f"{metrics['train_runtime']:.1f}"))
        figures.append(Figure("tokens per second", prompt=f"{metrics['train_tokens_per_second']:,.0f}"))
        figures.append(Figure("adapter, bytes", prompt=f"{run.adapter_bytes:,}"))
    rows = [tuple(map(translate, head)), *((translate(figure.name), *figure[1:]) for figure in figures)]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return list(zip(*columns, strict=True))


def _held_out_rows(run: Run) -> Iterator[Figure]:
    """Yield the lines of the table on the held-out rows."""
    before, after = run.before, run.after
    if before is None or after is None:
        return
    if before.classification and after.classification and after.accuracy_interval:
        base, tuned = (one.classification.confusion_matrix for one in (before, after))
        always, interval = f"{after.classification.majority[1]:.1%}", after.accuracy_interval.as_shares()
        shares = f"{base.accuracy:.1%}", "", f"{tuned.accuracy:.1%}"
        yield Figure("accuracy (most likely label)", always, *shares, interval)
        yield Figure("macro F1", base=f"{base.macro_f1:.3f}", prompt=f"{tuned.macro_f1:.3f}")
    if before.exact_match is not None and after.exact_match is not None:
        some = run.metrics.get("eval_exact_match_rows")
        name = f"exact match of {some:,} rows" if some else "exact match"
        yield Figure(name, base=f"{before.exact_match:.1%}", prompt=f"{after.exact_match:.1%}")
    interval = after.loss_interval.as_losses() if after.loss_interval else ""
    yield Figure("held-out loss", base=f"{before.loss:.4f}", prompt=f"{after.loss:.4f}", interval=interval)


def _of_distillation(run: Run) -> Iterator[Figure]:
    """Yield the lines of the table on the held-out questions of a distillation."""
    before, after, cut = run.before, run.after, run.rivals[0].evaluation
    if before is None or after is None:
        return
    interval = after.loss_interval.as_losses() if after.loss_interval else ""
    losses, agreements = ([(e.loss, e.agreement or 0.0)[i] for e in (before, cut, after)] for i in (0, 1))
    yield Figure("KL per token", "", *(f"{loss:.4f}" for loss in losses), interval)
    yield Figure("same most likely token", "", *(f"{share:.1%}" for share in agreements))
    yield Figure("tokens saved per request", prompt=f"{run.metrics['tokens_saved']:,}")
    seconds = (run.metrics[f"time_to_first_token{suffix}"] for suffix in ("_text", ""))
    yield Figure("first token, seconds", prompt=" → ".join(f"{each:.3f}" for each in seconds))


def _always(run: Run) -> str:
    """Return the title of the column for always giving the most common answer; empty if there is none."""
    classification = run.after.classification if run.after else None
    return f"always {shortened(_plain(classification.majority[0]), LABEL_WIDTH)}" if classification else ""


def _verdict(run: Run) -> str:
    """Return whether the prompt is useful, and on how many rows this is based if some were left out."""
    held_out = run.setup.data.held_out
    lines = [translate(run.verdict.sentence)] if run.verdict else []
    if held_out and run.after and len(held_out.examples) < held_out.rows:
        losses = "; ".join(describe_losses(0, held_out.without_target, 0))
        lines.append(translate(f"Evaluated on {held_out.used_rows}: {losses}"))
    return "\n".join(lines)


def _confusion(run: Run) -> Rows:
    """Return the confusion matrix of the prompt; empty if the answers are not labels."""
    classification = run.after.classification if run.after else None
    if classification is None:
        return []
    (corner, *labels), *rows = classification.confusion_matrix.text_rows
    return [[translate(corner), *labels], *rows]


def _examples(run: Run) -> Rows:
    """Return a table of held-out rows with the expected and the given answers; empty if answers are not compared. With
    distillation, the expected answer is that with the text."""
    compared = None if run.rivals else AnswerComparison.of(run.evaluator, run.before, run.after)
    answered = compared.selected(EXAMPLES) if compared else run.answered_rows[:EXAMPLES]
    if not answered:
        return []
    expected = "with the text" if run.rivals else "expected"
    rows = [tuple(map(translate, ("held-out row", expected, "base alone", "with prompt")))]
    questions = _without_shared_beginning([_plain(one.question) for one in answered])
    for one, asked in zip(answered, questions, strict=True):
        before, after = _marked(one.before, one.correct_before), _marked(one.after, one.correct_after)
        rows.append((asked, _plain(one.expected), before, after))
    return [[shortened(cell, WIDTH) for cell in row] for row in rows]


def _without_shared_beginning(questions: Sequence[str]) -> list[str]:
    """Return the questions without the words with which all of them begin, such as a chat template's system message, if
    a narrow column would show little else."""
    words = zip(*(each.split(" ") for each in questions), strict=False)
    shared = "".join(f"{each[0]} " for each in takewhile(lambda each: len({*each}) == 1, words))
    if len(questions) < 2 or display_width(shared) <= LABEL_WIDTH:
        return list(questions)
    return [f"…{each[len(shared) :]}" for each in questions]


def _marked(answer: str, correct: bool | None) -> str:
    """Return an answer on one line, with a mark that says whether it is right."""
    return f"{'  ' if correct is None else '✓ ' if correct else '✗ '}{_plain(answer)}"


def _plain(text: str) -> str:
    """Return the text on one line, without the default template's "Human:" and "Assistant:"."""
    return " ".join(without_default_template(text).split())
