"""The mini base, a tiny BLOOM pre-trained on Chinese reviews, and tasks to tune prompts for. It needs no network.

In: the name of a task and a split. Out: rows (instruction, input, output), and the folder of the base. The modules
`words`, `clauses` and `grammar` generate reviews, and `tasks` asks questions about them. `corpus` generates the
pre-training data of the base, and `python -m softprompt.mini.make` rebuilds the base.
"""

from pathlib import Path

from softprompt.mini.tasks import TASKS, rows

BASE_DIR = Path(__file__).parent / "base"

__all__ = ["BASE_DIR", "TASKS", "rows"]
