"""A grid of training runs, and what it says: `python -m softprompt study STUDY.toml` (see grid.py for the file)."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from softprompt.report.svg import INSTALL
from softprompt.study.charts import PICTURE_FILES, pictures
from softprompt.study.grid import Study
from softprompt.study.hypotheses import Finding, test_all
from softprompt.study.page import csv_of, failures, page, table_of
from softprompt.study.plan import Planned, planned
from softprompt.study.results import point
from softprompt.study.runner import Result, finished, run_cells
from softprompt.utils.atomic_io import check_writable, remove_leftovers, write_files
from softprompt.utils.errors import OutputError, PartialFailureError
from softprompt.utils.file_lock import FolderLock
from softprompt.utils.std_streams import tolerant_streams
from softprompt.utils.text_table import table

PAGE_FILE, CSV_FILE = "study.md", "study.csv"


def run_study(study: Study) -> list[Finding]:
    """Run the cells that are not finished yet, then write and print the table, the findings and the pictures.

    Raises:
        SoftpromptError: as of `planned` and `run_cells`, or an output_dir that cannot be written to.
        PartialFailureError: cells failed; everything that could be done without them is done and written.
    """
    check_writable(study.output_dir, "--output_dir")
    _refuse_other(study.output_dir)
    plan = planned(study)
    with tolerant_streams(), _claimed(study.output_dir):
        remove_leftovers(study.output_dir / "cells", ".+")
        results = {one.folder: result for one in plan if (result := finished(one.folder))}
        left = [one for one in plan if one.folder not in results]
        print(f"{study.path}: {len(plan):,} cells, {len(results):,} of them finished before → {study.output_dir}/")
        began = time.perf_counter()
        _run(left, results)
        if left:
            print(f"{len(left):,} cells in {time.perf_counter() - began:.0f} s")
        found = _report(study, [results[one.folder] for one in plan])
    if broken := [(one, why) for one in plan if (why := results[one.folder].get("failed"))]:
        one, why = broken[0]
        raise PartialFailureError(
            f"{len(broken):,} of {len(plan):,} cells failed ({one.cell}: {why}); {study.output_dir / PAGE_FILE} has "
            "the others, and the same command tries again those that failed"
        )
    return found


def _run(left: Sequence[Planned], results: dict[Path, Result]) -> None:
    """Run what is left, under one bar over all optimizer steps; without a terminal, a line for every cell."""
    live = sys.stderr.isatty()
    with tqdm(total=sum(one.steps for one in left), unit="step", desc="study", disable=not live) as bar:

        def done(one: Planned, result: Result) -> None:
            results[one.folder] = result
            why = result.get("failed")
            if why or not live:
                loss = result["metrics"].get("eval_loss")
                said = f"held-out loss {loss:.4f}" if loss is not None else result["metrics"].get("error", "not finite")
                bar.write(f"{one.cell}: {f'failed: {why}' if why else said}", file=sys.stderr)

        run_cells(left, lambda: bar.update(), done)


def _report(study: Study, results: Sequence[Result]) -> list[Finding]:
    points = [point(result) for result in results]
    lines, found, drawn = table_of(points), test_all(points), pictures(points)
    broken = failures(points)
    print("\n" + table(lines) + "\n")
    for text in broken:
        print(f"failed: {text}")
    for finding in found:
        print(f"- {finding.sentence}")
    if drawn is None:
        print(f"no pictures: matplotlib is not installed; {INSTALL}")
    head = (f"# {study.title}", study.about, _origin(study, results))
    written = page(head, lines, found, drawn or (), broken)
    write_files(study.output_dir, {CSV_FILE: csv_of(points), PAGE_FILE: written, **(drawn or {})})
    if drawn is not None:
        for name in PICTURE_FILES - set(drawn):
            (study.output_dir / name).unlink(missing_ok=True)  # of something that the study varies no more
    print(f"\n→ {study.output_dir / PAGE_FILE}")
    return found


def _origin(study: Study, results: Sequence[Result]) -> str:
    """Where the figures come from."""
    minutes = sum(result["seconds"] for result in results) / 60
    done = [result for result in results if "failed" not in result]
    places = sorted({f"{result['device']} with {result['threads']} threads" for result in done})
    date = max((result["date"] for result in done), default=time.strftime("%Y-%m-%d"))
    command = shlex.join(["python", "-m", "softprompt", "study", *study.arguments])
    failed = f", of which {len(results) - len(done):,} failed," if len(done) < len(results) else ""
    return (
        f"`{command}`: {len(results):,} cells{failed} in {minutes:.1f} minutes of "
        f"training and evaluation on {', '.join(places) or 'no device'}; {date}."
    )


def _refuse_other(output_dir: Path) -> None:
    """Raises OutputError where a file of the name of ours is there that no study has written."""
    for name in (PAGE_FILE, CSV_FILE):
        if (output_dir / name).exists() and not (output_dir / "cells").is_dir():
            raise OutputError(f"--output_dir {output_dir}: holds a {name} that no study wrote; name another folder")


def _claimed(output_dir: Path) -> FolderLock:
    try:
        (output_dir / "cells").mkdir(parents=True, exist_ok=True)
        return FolderLock(output_dir).take()
    except OSError as error:
        raise OutputError(
            f"--output_dir {output_dir}: cannot be made ({error.strerror}); name another folder"
        ) from None
