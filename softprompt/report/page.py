"""A report's page: what it says of each run, and of several side by side. The words are in report.html.jinja, which
escapes whatever it is given."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError  # comes with torch, and markupsafe too
from markupsafe import Markup

from softprompt.config.loader import GROUPS, PRESETS
from softprompt.config.train_args import DEFAULT_LEARNING_RATES, DEFAULT_NUM_VIRTUAL_TOKENS
from softprompt.report.svg import INSTALL, Curve, Painter
from softprompt.runs.file_names import FACTS_FILE, MARK
from softprompt.runs.run_reader import RunRecord
from softprompt.utils.errors import ReportError
from softprompt.utils.redact import redacted
from softprompt.utils.shell_commands import command, flag

TEMPLATE = "report.html.jinja"
SHOWN = 600  # characters of a text
LOSSES = {"loss": "training", "eval_loss": "held out"}
CURVES = {
    "eval_exact_match": "Exact match of held-out answers",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Real tokens per second",
}
FIGURES = {  # of all_results.json
    "eval_loss": ("held-out loss", "{:.4f}"),
    "eval_perplexity": ("perplexity", "{:,.4g}"),
    "eval_exact_match": ("exact match", "{:.1%}"),
    "eval_exact_match_rows": ("rows of the exact match (whole answers)", "{:,}"),
    "train_loss": ("training loss, mean", "{:.4f}"),
    "train_runtime": ("seconds of training", "{:,.1f}"),
    "train_tokens_per_second": ("tokens per second", "{:,.0f}"),
}


@dataclass(frozen=True)
class Picture:
    """An SVG element, its title, and its legend: a colour of the page, whether it is dashed, and what it is."""

    title: str
    svg: Markup
    legend: Sequence[tuple[int, bool, str]] = ()
    note: str = ""


def page(records: Sequence[RunRecord], broken: Sequence[str] = ()) -> str:
    """One HTML document without scripts that asks for no other file. Without matplotlib it has no pictures, and says
    how to get them. `broken` says of further runs why they are not shown.

    Raises:
        ReportError: a run's report.json is not as this version writes it.
    """
    try:
        painter: Painter | None = Painter()
    except ImportError:
        painter = None
    names = _names(records)
    views = []
    for record, name in zip(records, names, strict=True):
        with _as_written(record):
            views.append(_view(record, name, painter))
    values = {
        "runs": views,
        "broken": broken,
        "compared": _compared(records, names, painter) if len(records) > 1 else None,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"shown": _shown, "number": _number}
    template = environment.get_template(TEMPLATE)
    with _as_written(*records):
        return redacted(template.render(**values, mark=Markup(MARK), install=None if painter else INSTALL))


@contextmanager
def _as_written(*records: RunRecord) -> Iterator[None]:
    """What a report.json of another version, or of someone's hand, does to a page."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, TemplateError) as error:
        files = ", ".join(str(record.folder / FACTS_FILE) for record in records)
        what = f"{type(error).__name__}: {error}"
        raise ReportError(f"{files}: not as this version writes it ({what})") from None


def _view(record: RunRecord, name: str, painter: Painter | None) -> dict[str, Any]:
    """What the template asks of a run."""
    facts = record.facts
    rows = [(kind, of) for kind, of in facts.get("rows", {}).items() if of]
    end = facts.get("so_far") or facts.get("end", {})
    bits = "".join(f" --{name}" for name in ("load_in_8bit", "load_in_4bit") if record.arguments.get(name))
    return {
        "name": name,
        "headline": _headline(record),
        "ended": record.ended,
        "status": _status(record),
        "go_on": None if record.ended else _go_on(record),
        "ask": f"{command('infer')}{flag('adapter', str(record.folder))}{bits} --prompt …",
        "figures": list(_figures(record)),
        "curves": list(_curves(record, painter)) if painter else [],
        "sweep": facts.get("sweep"),
        "rows": rows,
        "row_facts": [fact for fact in rows[0][1] if fact != "histogram"] if rows else [],
        "lengths": _lengths(record, rows, painter),
        "examples": end.get("examples"),
        "likeness": end.get("likeness"),
        "similarities": _similarities(end.get("likeness"), painter),
        "left_out": end.get("left_out", []),
        "settings": list(_settings(record)),
        "training": facts.get("training"),
        "versions": facts.get("versions", {}),
    }


def _headline(record: RunRecord) -> str:
    arguments, facts = record.arguments, record.facts
    if "prompt" not in facts:
        return "A run of a version that wrote no report.json: its rows and settings are not known."
    P, H = facts["prompt"]
    base = facts["base"]
    return (
        f"{P:,} virtual tokens of size {H:,} for {arguments.get('model_name_or_path')} ({base['type']}, "
        f"{base['parameters']:,} parameters, all frozen), learned from {arguments.get('dataset')}."
    )


def _status(record: RunRecord) -> str:
    total = record.facts.get("total_steps")
    steps = f"step {record.steps:,}" + (f" of {total:,}" if total else "")
    if not record.ended:
        return f"{'running now' if record.runs_now else 'not finished'}: {steps} is the last in its metrics"
    best = record.results.get("best_global_step")
    kept = f"; the prompt is the best one, of step {best:,}" if best is not None else ""
    if not total or record.steps >= total:
        return f"finished after {steps}{kept}"
    patient = record.arguments.get("early_stopping_patience") is not None
    why = "nothing was gained any more" if patient else "its rows were fewer than counted"  # of a stream
    return f"ended early at {steps}, as {why}{kept}"


def _go_on(record: RunRecord) -> str | None:
    if record.runs_now or not record.checkpoint:
        return None
    launcher = "torchrun --nproc_per_node=N" if record.arguments.get("shard_base") else "python"
    return f"{command('train', launcher)}{flag('resume_from_checkpoint', str(record.folder))}"


def _figures(record: RunRecord) -> Iterable[tuple[str, str | None, str]]:
    """(what, of the bare base, with the prompt) for each figure there is."""
    for name, (label, form) in FIGURES.items():
        value, base = record.final(name), record.of_base(name)
        if value is not None or base is not None:
            yield label, None if base is None else form.format(base), "–" if value is None else form.format(value)


def _curves(record: RunRecord, painter: Painter) -> Iterable[Picture]:
    base = record.of_base("eval_loss")
    drawn = [Curve(n, record.series(name), marks=n > 0) for n, name in enumerate(LOSSES)]
    legend = [(n, False, text) for n, (name, text) in enumerate(LOSSES.items()) if record.series(name)]
    if base is not None:
        drawn.append(Curve(2, level=base))
        legend.append((2, True, f"held out, base alone ({base:.4f})"))
    title = "Loss, nats per target token"
    yield from _pictures(painter, "loss", title, drawn, legend)
    for name, title in CURVES.items():
        drawn, legend = [Curve(0, record.series(name))], []
        if (level := record.of_base(name)) is not None:
            drawn, legend = [*drawn, Curve(2, level=level)], [(0, False, "with the prompt"), (2, True, "base alone")]
        yield from _pictures(painter, name, title, drawn, legend)


def _pictures(
    painter: Painter, name: str, title: str, curves: Sequence[Curve], legend: Sequence[Any]
) -> Iterable[Picture]:
    """The one of a metric, if there is anything of it."""
    if svg := painter.curves(curves, title, logarithmic=name in LOSSES, share=name == "eval_exact_match"):
        yield Picture(title, Markup(svg), legend)


def _lengths(record: RunRecord, rows: Sequence[tuple[str, Any]], painter: Painter | None) -> Picture | None:
    if not painter or not rows:
        return None
    kind = "the training" if rows[0][0] == "training" else rows[0][0]  # the stream's first, or held-out ones
    title, limit = f"Lengths of {kind} rows", record.arguments.get("max_length", 0)
    svg = painter.bars(rows[0][1]["histogram"], limit, title)
    return Picture(title, Markup(svg), [(0, False, "rows"), (-1, True, f"--max_length {limit}")])


def _similarities(likeness: Any, painter: Painter | None) -> Picture | None:
    if not painter or not likeness or len(likeness["tokens"]) < 2:
        return None
    values = likeness["similarities"]
    others = [value for i, row in enumerate(values) for j, value in enumerate(row) if i != j]
    title = "Cosine of each virtual token with each other"
    mean = sum(others) / len(others)
    note = f"Between different ones from {min(others):.2f} to {max(others):.2f}, {mean:.2f} on average."
    return Picture(title, Markup(painter.squares(values, title)), note=note)


def _settings(record: RunRecord) -> Iterable[tuple[str, Any, bool]]:
    """(flag, value, whether it is another than its default)."""
    defaults = {f.name: f.default for group in GROUPS for f in fields(group)}
    arguments = record.arguments
    rate = DEFAULT_LEARNING_RATES.get(arguments.get("prompt_tuning_init", ""))
    defaults |= {"learning_rate": rate, "num_virtual_tokens": DEFAULT_NUM_VIRTUAL_TOKENS}
    defaults |= PRESETS.get(arguments.get("preset") or "", {})
    for name, value in arguments.items():
        if value is not None:
            yield name, value, name in defaults and value != defaults[name]


def _compared(records: Sequence[RunRecord], names: Sequence[str], painter: Painter | None) -> dict[str, Any]:
    """Figures side by side, the settings that differ, and each metric's curves in one picture."""
    every = list(dict.fromkeys(name for record in records for name in record.arguments))
    differ = [name for name in every if len({repr(r.arguments.get(name)) for r in records}) > 1]
    known = {label for record in records for label, _, _ in _figures(record)}
    labels = [label for label, _ in FIGURES.values() if label in known]
    rows = []
    for number, (record, name) in enumerate(zip(records, names, strict=True)):
        figures = {label: (base, value) for label, base, value in _figures(record)}
        settings = [(key, record.arguments.get(key)) for key in differ if key != "output_dir"]
        rows.append(
            {"name": name, "colour": number, "status": _status(record), "settings": settings, "figures": figures}
        )
    return {"labels": labels, "rows": rows, "curves": list(_side_by_side(records, names, painter)) if painter else []}


def _side_by_side(records: Sequence[RunRecord], names: Sequence[str], painter: Painter) -> Iterable[Picture]:
    titles = {"loss": "Training loss", "eval_loss": "Held-out loss", **CURVES}
    for name, title in titles.items():
        curves = [Curve(n, record.series(name), marks=name.startswith("eval")) for n, record in enumerate(records)]
        legend = [
            (n, False, run) for n, (run, record) in enumerate(zip(names, records, strict=True)) if record.series(name)
        ]
        levels: Mapping[float, int] = {
            level: n for n, record in reversed(list(enumerate(records))) if (level := record.of_base(name)) is not None
        }
        curves += [Curve(n, level=level) for level, n in levels.items()]
        legend += [(n, True, f"{names[n]}, base alone") for n in sorted(levels.values())]
        yield from _pictures(painter, name, title, curves, legend)


def _names(records: Sequence[RunRecord]) -> list[str]:
    """Folders' names, or their whole paths where names are shared."""
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]


def _shown(text: Any) -> str:
    """A text of a row or an answer: not endless, and without control characters, which no page shows."""
    text = re.sub(r"\n\s*\n", "\n", str(text).strip("\n"))  # a template's empty lines say nothing here
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
