"""The mini base, a tiny BLOOM pre-trained on Chinese reviews, and tasks to tune prompts for; offline, on any CPU.

In: the name of a task and a split. Out: rows (instruction, input, output), and the folder of the base. The modules
`words`, `clauses` and `grammar` generate reviews, `tasks` asks about them. `corpus` and `make` are what the base is
pre-trained on and how; `python -m softprompt.mini.make` rebuilds it.
"""

from pathlib import Path

from softprompt.mini.tasks import TASKS, rows

BASE_DIR = Path(__file__).parent / "base"

__all__ = ["BASE_DIR", "TASKS", "rows"]
