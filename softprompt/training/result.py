"""The parts of a run before training (`Setup`), and its result (`Run`)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.engines.base import Engine
from softprompt.evaluation.evaluator import Evaluation, Evaluator
from softprompt.evaluation.verdict import Verdict
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.runs.state import Metrics
from softprompt.training.first_question import FirstQuestion
from softprompt.training.resume import StartingPoint
from softprompt.training.setup import RunData


class Setup(NamedTuple):
    """What a run trains with, loaded and checked; `training.setup` describes the parts."""

    start: StartingPoint
    output_dir: Path
    data: RunData
    base: PreTrainedModel
    prompt: PromptEmbedding
    engine: Engine
    evaluator: Evaluator | None
    no_answers: str | None  # why the base cannot generate behind a prompt; None if it can

    @property
    def config(self) -> TrainConfig:
        return self.start.config


@dataclass(frozen=True, repr=False)
class Run:
    """A training run: what it trains with, and its results.

    Attributes:
        metrics: The content of all_results.json; empty until the run has ended.
        adapter_bytes: The size of the saved prompt's file.
        question: A training row to try the prompt with.
        before, after: Evaluations of the bare base and of the final prompt; None without held-out rows.
        verdict: Whether the prompt is of use; None without held-out rows.
        not_pushed: Why `--push_to_hub` failed; None if it did not.
        no_answers: Why the base cannot generate behind a prompt; None if it can.
    """

    setup: Setup
    metrics: Metrics = field(default_factory=dict)
    adapter_bytes: int = 0
    question: FirstQuestion | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    verdict: Verdict | None = None
    not_pushed: str | None = None
    no_answers: str | None = None

    @property
    def config(self) -> TrainConfig:
        return self.setup.config

    @property
    def output_dir(self) -> Path:
        return self.setup.output_dir

    @property
    def evaluator(self) -> Evaluator | None:
        return self.setup.evaluator

    def __repr__(self) -> str:
        return f"Run(output_dir={str(self.output_dir)!r}, metrics={self.metrics})"
