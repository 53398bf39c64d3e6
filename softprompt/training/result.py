"""The parts of a run before training (`Setup`), and its result (`Run`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.engines.base import Engine
from softprompt.evaluation.answer_comparison import AnsweredRow
from softprompt.evaluation.distillation import DistillationEvaluator
from softprompt.evaluation.evaluator import Evaluation, Evaluator, Rival
from softprompt.evaluation.verdict import Verdict
from softprompt.generation.adapters import LoadedAdapter
from softprompt.generation.model import SoftPromptModel
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.runs.adapter_search import resolve_adapter
from softprompt.runs.state import Metrics
from softprompt.training.first_question import FirstQuestion
from softprompt.training.loss_curves import draw_loss_curves
from softprompt.training.resume import StartingPoint
from softprompt.training.setup import RunData
from softprompt.utils.errors import ConfigError


class RunAnswers(NamedTuple):
    """The base's answers of a distillation.

    Attributes:
        file: The content of teacher_answers.jsonl.
        metrics: What all_results.json says about them; see `distillation.Answered`.
    """

    file: bytes
    metrics: Metrics


class Setup(NamedTuple):
    """What a run trains with, loaded and checked; `training.setup` describes the parts."""

    start: StartingPoint
    output_dir: Path
    data: RunData
    base: PreTrainedModel
    prompt: PromptEmbedding
    engine: Engine
    evaluator: Evaluator | DistillationEvaluator | None
    no_answers: str | None  # why the base cannot generate with a prompt; None if it can
    answers: RunAnswers | None = None  # with distillation

    @property
    def config(self) -> TrainConfig:
        return self.start.config


@dataclass(frozen=True, repr=False)
class Run:
    """A training run: what it trains with, and its results.

    Attributes:
        metrics: The content of all_results.json; empty until the run has ended.
        adapter_bytes: The size of the saved prompt's file in bytes.
        question: A training row to try the prompt with.
        before, after: Evaluations of the bare base and of the final prompt; None without held-out rows.
        rivals: What else the prompt is compared with, evaluated on the same rows.
        answered_rows: With distillation, some held-out questions with answers.
        verdict: Whether the prompt is useful; None without held-out rows.
        not_pushed: Why `--push_to_hub` failed; None if it did not.
        no_answers: Why the base cannot generate with a prompt; None if it can.
        history: The records of metrics.jsonl, one dict each; `pandas.DataFrame(run.history)` is a table of them.
        stopped: If the run was stopped before its last step, what was saved and how to continue; else None.
    """

    setup: Setup
    metrics: Metrics = field(default_factory=dict)
    adapter_bytes: int = 0
    question: FirstQuestion | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    rivals: Sequence[Rival] = ()
    answered_rows: Sequence[AnsweredRow] = ()
    verdict: Verdict | None = None
    not_pushed: str | None = None
    no_answers: str | None = None
    history: Sequence[Metrics] = ()
    stopped: str | None = None

    @property
    def config(self) -> TrainConfig:
        return self.setup.config

    @property
    def output_dir(self) -> Path:
        return self.setup.output_dir

    @property
    def evaluator(self) -> Evaluator | DistillationEvaluator | None:
        return self.setup.evaluator

    def model(self) -> SoftPromptModel:
        """Return a model that answers with the prompt of this run or, if the run was stopped, with the prompt of its
        newest whole checkpoint. It uses the base that the run has in memory, unless that is sharded or streamed.

        Raises:
            SoftpromptError: See `SoftPromptModel.from_pretrained`.
        """
        settings, name = self.config.model, str(self.output_dir)
        folder = resolve_adapter(self.output_dir, lambda told: None)  # `stopped` names the checkpoint already
        if settings.stream_base or settings.shard_base:
            how = {"device": settings.device, "bf16": settings.bf16, "fp16": settings.fp16}
            return SoftPromptModel.from_pretrained(settings.model_name_or_path, {name: folder}, **how)
        adapters = {name: LoadedAdapter.from_folder(folder)}
        base, dtype = str(settings.model_name_or_path), self.setup.engine.compute_dtype
        return SoftPromptModel.with_adapters(self.setup.base, self.setup.data.tokenizer, base, adapters, dtype)

    def plot(self, ax: Any = None) -> Any:
        """Draw the training loss and the held-out loss over the steps, and return matplotlib's Axes.

        Args:
            ax: Axes to draw into, by default those of a new figure.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError:
                raise ConfigError("plot needs matplotlib: pip install matplotlib") from None
            _, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
        draw_loss_curves(ax, self.history, self.before.loss if self.before else None)
        return ax

    def __repr__(self) -> str:
        stopped = f", stopped={self.stopped!r}" if self.stopped else ""
        return f"Run(output_dir={str(self.output_dir)!r}, metrics={self.metrics}{stopped})"

    def _repr_html_(self) -> str:
        """Return the summary as tables, which Jupyter shows."""
        from softprompt.training.summary import html_summary  # it imports this module

        return html_summary(self)
