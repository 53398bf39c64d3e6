"""The HTML report of one or several runs.

In: run folders. Out: one self-contained page.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "report":
        from softprompt.report.writer import report  # loads torch, which parsing the flags does without

        return report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
