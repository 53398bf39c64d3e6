"""Distillation: the loss of a row is the divergence of its predictions from those of a teacher.

The teacher is the same frozen base behind another prompt. A pass of the teacher over its rows fills a `TeacherTable`,
with one entry for each target of each row. In the rows of the student, the label of a target is the index of its entry
in the table instead of a token id. So an engine runs these rows as it runs any others, and only its head differs:

record      `RecordingHead` stores the teacher's predictions in the table
train       `DistillationHead` computes KL(teacher ‖ student)
evaluate    `EvaluationHead` does the same, and notes the targets at which the most likely tokens differ
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt.data.tokenization import IGNORE, Example, count_targets
from softprompt.engines.base import Engine, OnRows, nothing
from softprompt.engines.head import Head, TeacherPredictions
from softprompt.engines.microbatch_engine import MicrobatchEngine

TeacherTable = TeacherPredictions  # with one entry for each target of all rows


def table_bytes(engine: Engine) -> int:
    """Return the bytes of the predictions that an engine learns from; 0 if it learns from labels."""
    head = engine.schedule.head if isinstance(engine, MicrobatchEngine) else None
    return sum(column.nbytes for column in head.table) if isinstance(head, DistillationHead) else 0


def with_head(engine: MicrobatchEngine[Any], head: Head) -> MicrobatchEngine[Any]:
    """Return an engine like `engine` that computes losses with another head."""
    schedule = copy.copy(engine.schedule)
    schedule.head = head
    return MicrobatchEngine(schedule, engine.tokens_per_microbatch)


def record_teacher(
    engine: MicrobatchEngine[Any],
    student: MicrobatchEngine[Any],
    prompt: Tensor | None,
    rows: Sequence[Example],
    on_rows: OnRows = nothing,
) -> TeacherTable:
    """Run the teacher over its rows, and return its predictions at all of their targets, in the order of the rows.

    Args:
        engine: Runs the teacher.
        student: The engine of the same base that will run the student. Predictions are in the form that its head needs.
        prompt: The embeddings of the teacher's text [P, H], or None if the rows begin with it.
        rows: Rows whose labels are indices into the table; see `examples.IndexedExamples`.

    Raises:
        TrainingError: A single row does not fit in memory.
    """
    head = RecordingHead(student.schedule.head, sum(map(count_targets, rows)))
    with_head(engine, head).row_losses(prompt, rows, on_rows)
    return head.table


def distilling(engine: MicrobatchEngine[Any], table: TeacherTable) -> MicrobatchEngine[Any]:
    """Return an engine whose loss is the divergence from the teacher, in nats."""
    return with_head(engine, DistillationHead(engine.schedule.head, table))


def evaluate_student(
    engine: MicrobatchEngine[Any],
    table: TeacherTable,
    prompt: Tensor | None,
    rows: Sequence[Example],
    on_rows: OnRows = nothing,
) -> tuple[list[float], list[int]]:
    """Return for each row the summed divergence from the teacher in nats, and the number of targets at which the most
    likely token differs from the teacher's.

    Args:
        engine: Runs the student with its base's own head.
        prompt: [P, H], or None for the bare base.
        rows: Rows whose labels are indices into `table`.

    Raises:
        TrainingError: A single row does not fit in memory.
    """
    head = EvaluationHead(engine.schedule.head, table)
    losses = with_head(engine, head).row_losses(prompt, rows, on_rows)
    differs = head.differs.tolist()
    return losses, [sum(differs[label] for label in row.labels if label != IGNORE) for row in rows]


class _WrappedHead:
    """A head that uses the base's own head. Its targets are indices into a `TeacherTable`."""

    def __init__(self, head: Head):
        self.head, self.nbytes = head, head.nbytes

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `Head.loss`."""
        return self.losses(hidden, targets).sum()

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `Head.losses`."""
        raise NotImplementedError

    def teacher(self, hidden: Tensor) -> TeacherPredictions:
        """See `Head.teacher`."""
        return self.head.teacher(hidden)

    def divergence(self, hidden: Tensor, teacher: TeacherPredictions) -> Tensor:
        """See `Head.divergence`."""
        return self.head.divergence(hidden, teacher)

    def divergences(self, hidden: Tensor, teacher: TeacherPredictions) -> tuple[Tensor, Tensor]:
        """See `Head.divergences`."""
        return self.head.divergences(hidden, teacher)

    def working_bytes(self, n: int) -> int:
        """See `Head.working_bytes`."""
        return self.head.working_bytes(n)


class RecordingHead(_WrappedHead):
    """Stores the predictions at n targets in a table of `entries` entries; its losses are 0."""

    def __init__(self, head: Head, entries: int):
        super().__init__(head)
        self.entries, self._table = entries, None

    @property
    def table(self) -> TeacherTable:
        """The table. Entries that no target has named yet are 0."""
        assert self._table is not None, "no row has been recorded"
        return self._table

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `Head.losses`."""
        found = self.head.teacher(hidden)
        if self._table is None:
            self._table = TeacherTable(*(t.new_zeros(self.entries, *t.shape[1:]) for t in found))
        for column, values in zip(self._table, found, strict=True):
            column[targets] = values
        return torch.zeros(len(hidden), device=hidden.device)


class DistillationHead(_WrappedHead):
    """Computes KL(teacher ‖ student) in nats."""

    def __init__(self, head: Head, table: TeacherTable):
        super().__init__(head)
        self.table = table

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `Head.loss`."""
        return self.head.divergence(hidden, _entries(self.table, targets))

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `Head.losses`."""
        return self.head.divergences(hidden, _entries(self.table, targets))[0]


class EvaluationHead(DistillationHead):
    """Computes KL(teacher ‖ student) in nats. `differs` says of each entry of the table whether the most likely token
    of the student was another one, bool [entries]."""

    def __init__(self, head: Head, table: TeacherTable):
        super().__init__(head, table)
        self.differs = torch.zeros_like(table.top, dtype=torch.bool)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `Head.losses`."""
        terms, top = self.head.divergences(hidden, _entries(self.table, targets))
        self.differs[targets] = top != self.table.top[targets]
        return terms


def _entries(table: TeacherTable, indices: Tensor) -> TeacherPredictions:
    """Return the entries of a table with the indices [n] int64."""
    return TeacherPredictions(*(column[indices] for column in table))
