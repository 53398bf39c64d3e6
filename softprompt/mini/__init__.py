"""A tiny BLOOM that speaks a little Chinese about reviews, and tasks to tune prompts for: all offline, on any CPU.

`python -m softprompt.mini.make` rebuilds the base.
"""

from pathlib import Path

from softprompt.mini.tasks import TASKS, rows

BASE_DIR = Path(__file__).parent / "base"

__all__ = ["BASE_DIR", "TASKS", "rows"]
