"""Studies: a grid of training runs, compared on held-out rows.

In: a STUDY.toml (`grid`), which describes a list of cells (`cell`); a cell holds the settings of one training run. The
rows and bases of all cells are checked before the first cell runs (`plan`). Then the cells run, grouped by base
(`runner`, `cell_runner`). Out: a folder with the finished cells (`results`), a table (`page`), charts (`charts`), and
findings (`hypotheses`, `findings`) with confidence intervals over the seeds.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "run_study":
        from softprompt.study.study import run_study  # loads torch, which reading a STUDY.toml does without

        return run_study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
