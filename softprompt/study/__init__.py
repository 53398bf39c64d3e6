"""Studies: a grid of training runs, and what their results show.

In: a STUDY.toml. Out: a folder of finished cells, a table, charts and conclusions.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "run_study":
        from softprompt.study.study import run_study  # loads torch, which reading a STUDY.toml does without

        return run_study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
