"""The values that the template shows for one run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from softprompt.config.loader import default_settings
from softprompt.data.template import DEFAULT, without_default_template
from softprompt.report.charts import cosines_chart, course_charts, lengths_chart, run_charts
from softprompt.report.results import results, status
from softprompt.runs.run_reader import RunRecord
from softprompt.utils.shell_commands import command, flag
from softprompt.utils.text_table import display_width

MAX_WRONG = 200  # wrong answers on a page
LABEL_WIDTH = 12  # columns of a terminal; a wider answer is a text rather than a label
SECTIONS = {
    "training": "Training",
    "examples": "Before and after",
    "confusion": "Confusion",
    "wrong": "Wrong answers",
    "words": "Nearest words",
    "rows": "Rows",
    "settings": "Settings",
}


def run_view(record: RunRecord, name: str) -> dict[str, Any]:
    """Return the values that the template needs for one run."""
    facts = record.facts
    end = facts.get("so_far") or facts.get("end", {})
    view = {
        "name": name,
        "headline": _headline(record),
        "ended": record.ended,
        "status": status(record),
        "progress": _progress(record),
        "verdict": end.get("verdict"),
        "better": end.get("verdict_better"),
        "resume": None if record.ended else _resume_command(record),
        "infer": _infer_command(record),
        "results": list(results(record).values()),
        "curves": run_charts(record),
        "course": course_charts(record),
        "sweep": facts.get("sweep"),
        "examples": _examples(end.get("examples"), record),
        "confusion": list(_confusion_tables(end.get("confusion"))),
        "wrong": _wrong_answers(end.get("wrong"), record),
        "likeness": end.get("likeness"),
        "left_out": end.get("left_out", []),
        "training": facts.get("training"),
        "versions": facts.get("versions", {}),
        **_rows(record),
        **_settings(record),
    }
    view["similarities"] = cosines_chart(view["likeness"]) if view["likeness"] else None
    return {**view, "sections": _sections(view)}


def _headline(record: RunRecord) -> str:
    arguments, facts = record.arguments, record.facts
    if "prompt" not in facts:
        return "This run was made by a version that wrote no report.json, so its rows and settings are unknown."
    P, H = facts["prompt"]
    base = facts["base"]
    model, text = (
        arguments.get("model_name_or_path"),
        arguments.get("distill_prompt") or arguments.get("distill_context"),
    )
    if text:
        return (
            f"{P:,} virtual tokens of size {H:,} that replace the text of {text}, for {model} ({base['type']}, "
            f"{base['parameters']:,} parameters, all frozen)."
        )
    return (
        f"{P:,} virtual tokens of size {H:,} for {model} ({base['type']}, {base['parameters']:,} parameters, all "
        f"frozen), learned from {arguments.get('dataset')}."
    )


def _progress(record: RunRecord) -> tuple[int, int] | None:
    """Return the steps done and their total, of a run that has not ended; None if the total is unknown."""
    total = record.facts.get("total_steps")
    return None if record.ended or not total else (record.steps, total)


def _resume_command(record: RunRecord) -> str | None:
    if record.runs_now or not record.checkpoint:
        return None
    launcher = "torchrun --nproc_per_node=N" if record.arguments.get("shard_base") else "python"
    return f"{command('train', launcher)}{flag('resume_from_checkpoint', str(record.folder))}"


def _infer_command(record: RunRecord) -> str:
    bits = "".join(f" --{name}" for name in ("load_in_8bit", "load_in_4bit") if record.arguments.get(name))
    return f"{command('infer')}{flag('adapter', str(record.folder))}{bits} --prompt …"


def _question(row: Mapping[str, Any], record: RunRecord) -> str:
    """Return the question of a row, without the words that the default template puts around every question."""
    text = str(row["question"])
    if record.arguments.get("template") not in (None, DEFAULT):
        return text
    return without_default_template(text)


def _examples(examples: Mapping[str, Any] | None, record: RunRecord) -> Mapping[str, Any] | None:
    """Add to each row whether the answers without and with the prompt are right; None where that is unknown."""
    if examples is None:
        return None

    def right(row: Mapping[str, Any], answer: str) -> bool | None:
        known = row.get(f"correct_{answer}")
        return row[answer] == row["expected"] if known is None and examples["compared"] else known

    rows = examples["rows"]
    marked = [
        {**row, "question": _question(row, record), "right": {each: right(row, each) for each in ("before", "after")}}
        for row in rows
    ]
    return {**examples, "rows": marked, "labels": _are_labels(rows)}


def _confusion_tables(confusion: Mapping[str, Any] | None) -> Iterator[tuple[str, Sequence[str], Sequence[Any]]]:
    """Yield (whose predictions, labels, rows) of each table. A row is a label, its counts with their shares of the row,
    and their sum."""
    for name, whose in (("prompt", "with the prompt"), ("base", "base alone")):
        if confusion and confusion.get(name):
            labels = confusion["labels"]
            rows = [
                (label, [(count, count / (sum(counts) or 1)) for count in counts], sum(counts))
                for label, counts in zip(labels, confusion[name], strict=True)
            ]
            yield whose, labels, rows


def _wrong_answers(wrong: Sequence[Mapping[str, Any]] | None, record: RunRecord) -> dict[str, Any] | None:
    """Return the number of wrong answers, and the rows to show, the largest loss first."""
    if not wrong:
        return None
    ranked = sorted(wrong, key=lambda row: row["loss"] or 0, reverse=True)[:MAX_WRONG]
    rows = [{**row, "question": _question(row, record)} for row in ranked]
    return {"count": _wrong_count(record) or len(wrong), "rows": rows, "labels": _are_labels(rows)}


def _wrong_count(record: RunRecord) -> int | None:
    """Return the number of wrong answers, of which report.json lists the first ones; None if it is unknown."""
    compared = record.final("eval_exact_match_rows") or record.final("eval_samples")
    right = record.final("eval_exact_match")
    return None if compared is None or right is None else round(compared * (1 - right))


def _are_labels(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the expected answers of rows are short, so that a narrow column is enough."""
    return all(display_width(str(row["expected"])) <= LABEL_WIDTH for row in rows)


def _rows(record: RunRecord) -> dict[str, Any]:
    rows = [(kind, of) for kind, of in record.facts.get("rows", {}).items() if of]
    if not rows:
        return {"rows": [], "row_facts": [], "lengths": None}
    kind, of = rows[0]
    lengths = lengths_chart(kind, of["histogram"], record.arguments.get("max_length", 0))
    return {"rows": rows, "row_facts": [fact for fact in of if fact != "histogram"], "lengths": lengths}


def _settings(record: RunRecord) -> dict[str, list[tuple[str, Any]]]:
    """Return the settings that differ from the defaults of their preset, and those that do not."""
    defaults = default_settings(record.arguments)
    given = [(name, value) for name, value in record.arguments.items() if value is not None]
    chosen = [(name, value) for name, value in given if name in defaults and value != defaults[name]]
    return {"chosen": chosen, "unchanged": [each for each in given if each not in chosen]}


def _sections(view: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (id, title) of the sections that the run has."""
    has = {
        "training": view["curves"] or view["course"] or view["sweep"],
        "words": view["likeness"],
        "settings": view["chosen"] or view["unchanged"],
    }
    return [(name, title) for name, title in SECTIONS.items() if has.get(name, view.get(name))]
