"""Run a study and write its results: `python -m softprompt study STUDY.toml` (see `grid` for the file)."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from softprompt.study.charts import CHART_FILES, INSTALL, charts
from softprompt.study.findings import Finding, sentences
from softprompt.study.grid import Study
from softprompt.study.hypotheses import evaluate_by_task, evaluate_hypotheses
from softprompt.study.page import csv_bytes, failure_lines, page, result_table
from softprompt.study.plan import PlannedCell, plan_study
from softprompt.study.results import CellRecord, cell_result, read_finished, without_copies
from softprompt.study.runner import run_cells
from softprompt.utils.atomic_io import check_writable, remove_leftovers, write_files
from softprompt.utils.errors import OutputError, PartialFailureError
from softprompt.utils.file_lock import FolderLock
from softprompt.utils.progress import progress_bar, say, shows_bars
from softprompt.utils.std_streams import tolerant_streams
from softprompt.utils.text_table import table

PAGE_FILE, CSV_FILE = "study.md", "study.csv"


def run_study(study: Study) -> list[Finding]:
    """Run the cells that are not finished yet, then write and print the table, the findings and the charts.

    Raises:
        SoftpromptError: The study cannot be planned (see `plan_study`), it was stopped, or the output folder cannot be
            written to.
        PartialFailureError: Some cells failed. Everything that does not need them is done and written.
    """
    check_writable(study.output_dir, "--output_dir")
    _refuse_foreign_files(study.output_dir)
    plan = plan_study(study)
    with tolerant_streams(), _lock(study.output_dir):
        remove_leftovers(study.output_dir / "cells", ".+")
        records = {planned.folder: record for planned in plan if (record := read_finished(planned.folder))}
        remaining = [planned for planned in plan if planned.folder not in records]
        print(f"{study.path}: {len(plan):,} cells, {len(records):,} of them already finished → {study.output_dir}/")
        began = time.perf_counter()
        _run(remaining, records)
        if remaining:
            print(f"{len(remaining):,} cells in {time.perf_counter() - began:.0f} s")
        findings = _write_results(study, [records[planned.folder] for planned in plan])
    if failed := [(planned, why) for planned in plan if (why := records[planned.folder].get("failed"))]:
        planned, why = failed[0]
        raise PartialFailureError(
            f"{len(failed):,} of {len(plan):,} cells failed ({planned.cell}: {why}); {study.output_dir / PAGE_FILE} "
            "shows the others; run the same command to try the failed cells again"
        )
    return findings


def _run(remaining: Sequence[PlannedCell], records: dict[Path, CellRecord]) -> None:
    """Run the remaining cells and add their records. On a terminal or in a notebook, show one progress bar over all
    optimizer steps; otherwise print a line for each cell."""
    has_bar = shows_bars()
    steps = sum(planned.steps for planned in remaining)
    with progress_bar(steps, "study", "step", delay=0, leave=True) as bar:

        def on_cell(planned: PlannedCell, record: CellRecord) -> None:
            records[planned.folder] = record
            why = record.get("failed")
            if why or not has_bar:
                metrics = record["metrics"]
                loss = metrics.get("eval_loss")
                line = f"held-out loss {loss:.4f}" if loss is not None else metrics.get("error", "not finite")
                say(f"{planned.cell}: {f'failed: {why}' if why else line}")

        run_cells(remaining, lambda: bar.update(), on_cell)


def _write_results(study: Study, records: Sequence[CellRecord]) -> list[Finding]:
    results = without_copies(map(cell_result, records))
    lines, findings, images = result_table(results), evaluate_hypotheses(results), charts(results)
    failures = failure_lines(results)
    print("\n" + table(lines) + "\n")
    for text in failures:
        print(f"failed: {text}")
    for sentence in sentences(findings):
        print(f"- {sentence}")
    if images is None:
        print(f"no charts: matplotlib is not installed; {INSTALL}")
    head = (f"# {study.title}", study.about, _origin(study, records))
    content = page(head, lines, findings, images or (), failures, evaluate_by_task(results))
    write_files(study.output_dir, {CSV_FILE: csv_bytes(results), PAGE_FILE: content, **(images or {})})
    if images is not None:
        for name in CHART_FILES - set(images):
            (study.output_dir / name).unlink(missing_ok=True)  # of a setting that the study no longer varies
    print(f"\n→ {study.output_dir / PAGE_FILE}")
    return findings


def _origin(study: Study, records: Sequence[CellRecord]) -> str:
    """Return the sentence that states the command, the number of cells, the time, the devices and the date."""
    minutes = sum(record["seconds"] for record in records) / 60
    done = [record for record in records if "failed" not in record]
    devices = sorted({f"{r['device']} with {r['threads']} thread{'s' * (r['threads'] != 1)}" for r in done})
    date = max((record["date"] for record in done), default=time.strftime("%Y-%m-%d"))
    command = shlex.join(["python", "-m", "softprompt", "study", *study.arguments])
    failed = f", of which {len(records) - len(done):,} failed," if len(done) < len(records) else ""
    return (
        f"`{command}`: {len(records):,} cells{failed} in {minutes:.1f} minutes of "
        f"training and evaluation on {', '.join(devices) or 'no device'}; {date}."
    )


def _refuse_foreign_files(output_dir: Path) -> None:
    """Raise OutputError if the folder holds a page or a table that no study wrote."""
    for name in (PAGE_FILE, CSV_FILE):
        if (output_dir / name).exists() and not (output_dir / "cells").is_dir():
            raise OutputError(f"--output_dir {output_dir}: holds a {name} that no study wrote; name another folder")


def _lock(output_dir: Path) -> FolderLock:
    """Create the folder and lock it."""
    try:
        (output_dir / "cells").mkdir(parents=True, exist_ok=True)
        return FolderLock(output_dir).take()
    except OSError as error:
        raise OutputError(
            f"--output_dir {output_dir}: cannot be created ({error.strerror}); name another folder"
        ) from None
