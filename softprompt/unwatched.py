"""The callbacks of a short training that leaves nothing on the way: a cell of a study, a rung of a sweep."""

from collections.abc import Callable

from softprompt.distributed import Wish
from softprompt.trainer import Metrics, Step, TrainingState


class Unwatched:
    """`on_every_step` is called after each optimizer step. A wish to stop is read once a step, as `trainer.Callbacks`
    asks for, and kept: `code` is its exit code, None for as long as there was none."""

    def __init__(self, wish: Wish, on_every_step: Callable[[], object]):
        self.wish, self.on_every_step = wish, on_every_step
        self.code: int | None = None

    def on_step(self, step: Step) -> None:
        self.on_every_step()

    def on_log(self, metrics: Metrics) -> None: ...

    def on_evaluate(self, step: Step) -> bool:
        return False

    def on_save(self, step: Step, state: TrainingState) -> None: ...

    def wants_to_stop(self) -> bool:
        self.code = self.wish.exit_code
        return self.code is not None
