"""Run one cell of a study with a base that is already in memory, using the parts of a training run."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.config.data_args import DataArguments
from softprompt.config.train_args import ModelArguments, default_learning_rate
from softprompt.data.build_data import make_template
from softprompt.data.dataloader import ListLoader
from softprompt.data.tokenization import Example, end_tokens
from softprompt.engines.choice import choose_engine
from softprompt.evaluation.classifier import Classifier
from softprompt.evaluation.ensemble import EnsembleMember, evaluate_ensemble
from softprompt.evaluation.evaluator import Evaluation, Evaluator
from softprompt.generation.generator import make_generator
from softprompt.models.capabilities import max_positions
from softprompt.models.loading import base_path, load_base, word_embeddings
from softprompt.models.precision import resolve_device, resolve_dtype
from softprompt.prompt.adapter_folder import adapter_folder
from softprompt.prompt.adapter_io import load_adapter
from softprompt.prompt.model_card import CardFacts
from softprompt.prompt.soft_prompt import InputEmbeddings
from softprompt.runs.state import Metrics
from softprompt.study.plan import PlannedCell
from softprompt.study.results import CellRecord, read_finished
from softprompt.training.determinism import deterministic
from softprompt.training.loop import QuietCallbacks, train
from softprompt.training.prompt_setup import trainable_prompt
from softprompt.utils.errors import NonFiniteError, TrainingError


class FinishedCell(NamedTuple):
    """The record of a cell and the files of its adapter; an ensemble has no adapter."""

    record: CellRecord
    adapter: Mapping[str, bytes]


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base on its device, for any number of cells.

    Args:
        base: The base.
        dtype: The dtype that training computes in.
        without_prompt: Evaluations of the base without a prompt, by dataset; filled as cells run.
    """

    base: PreTrainedModel
    dtype: torch.dtype
    without_prompt: dict[DataArguments, Evaluation] = field(default_factory=dict)

    @cached_property
    def word_rms(self) -> float:
        """The root mean square of the word embeddings, on which default learning rates depend."""
        return InputEmbeddings(self.base).rms()

    @classmethod
    def load(cls, model: ModelArguments) -> "LoadedBase":
        """Load the base that `model` names.

        Raises:
            ConfigError: The device is not available.
            ModelError: The base cannot be loaded.
        """
        device = resolve_device(model.device)
        dtype = resolve_dtype(device, model.bf16, model.fp16)
        return cls(load_base(base_path(str(model.model_name_or_path)), device, dtype), dtype)

    def with_learning_rate(self, planned: PlannedCell) -> PlannedCell:
        """Return a cell with its learning rate in its settings: the one given, else the default for this base."""
        config = planned.cell.config
        training = replace(config.training, learning_rate=config.learning_rate(self.word_rms))
        return replace(planned, cell=replace(planned.cell, config=replace(config, training=training)))

    def run(self, planned: PlannedCell, callbacks: QuietCallbacks) -> FinishedCell:
        """Run one cell, whose learning rate is known. A loss, gradient or prompt that becomes infinite or NaN is
        recorded as the cell's result.

        Raises:
            TrainingError: The cell is an ensemble, and one of its members failed.
        """
        data = planned.cell.config.data
        if data not in self.without_prompt:
            evaluator = self._evaluator(planned)
            if evaluator.exact_match_note:
                print(f"{data.dataset}: {evaluator.exact_match_note}")
            self.without_prompt[data] = evaluator(None)
        began = time.perf_counter()
        outcome, adapter = self._run_ensemble(planned) if planned.members else self._run_prompt(planned, callbacks)
        prompt = planned.cell.config.prompt
        record = {
            **planned.description(),
            "default_learning_rate": default_learning_rate(
                prompt.prompt_tuning_init, prompt.prompt_reparameterization, self.word_rms
            ),
            "parameters": self.base.num_parameters(),
            "fingerprints": planned.inputs.fingerprints,
            "device": str(word_embeddings(self.base).weight.device),
            "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"),
            **outcome,
            "metrics": {**outcome["metrics"], **base_metrics(self.without_prompt[data])},
            "seconds": round(time.perf_counter() - began, 2),
        }
        return FinishedCell(record, adapter)

    def _evaluator(self, planned: PlannedCell, prompt: Tensor | None = None) -> Evaluator:
        inputs, config = planned.inputs, planned.cell.config
        prompt = word_embeddings(self.base).weight[:1] if prompt is None else prompt
        held_out, longest = inputs.held_out, inputs.extent.longest
        classifier = Classifier.of_held_out(
            inputs.held_out_rows, held_out, make_template(config), inputs.tokenizer, max_positions(self.base)
        )
        if classifier:
            longest = max(longest, classifier.longest_row(held_out.examples, len(prompt)))
        engine, _ = choose_engine(
            config, self.base, inputs.tokenizer, self.dtype, prompt, inputs.train.examples, longest
        )
        generator = make_generator(engine, self.base, inputs.tokenizer)
        batch_size = config.training.per_device_eval_batch_size
        return Evaluator(
            engine, generator, inputs.tokenizer, held_out.examples, batch_size, held_out.missing, classifier
        )

    def _run_prompt(self, planned: PlannedCell, callbacks: QuietCallbacks) -> FinishedCell:
        """Train and evaluate a prompt, or evaluate the embeddings of a hard prompt's text. Return the result without
        its description."""
        config, inputs = planned.cell.config, planned.inputs
        prompt = trainable_prompt(config, inputs.tokenizer, self.base).to(word_embeddings(self.base).weight.device)
        evaluator, answers = self._evaluator(planned, prompt.weight.detach()), None
        metrics: Metrics = {}
        try:
            if planned.cell.trained:
                examples = subset(inputs.train.examples, planned.cell.rows, config.training.seed)
                with deterministic(config.training.deterministic):
                    loader = ListLoader(examples, config.training)
                    train(evaluator.engine, prompt, loader, config.training, config.training.learning_rate, callbacks)
            if callbacks.code is None:
                evaluation = evaluator(prompt.weight.detach())
                metrics = {**evaluation.metrics(), **evaluation.sample_metrics()}
                answers = evaluation.answers
        except NonFiniteError as error:
            metrics = {"error": str(error)}
        ends = end_tokens(inputs.train.examples, inputs.tokenizer)
        learned, settings = prompt.weight.detach(), planned.cell.settings()
        files = adapter_folder(config, self.base.config, learned, ends, (), CardFacts(settings, metrics))
        return FinishedCell({"virtual_tokens": len(learned), "metrics": metrics, "answers": answers}, files)

    def _run_ensemble(self, planned: PlannedCell) -> FinishedCell:
        """Evaluate the prompts of an ensemble's members together. Return the result without its description.

        Raises:
            TrainingError: A member failed.
        """
        records = [record for folder in planned.members if (record := read_finished(folder))]
        if missing := len(planned.members) - len(records):
            raise TrainingError(f"{missing:,} of the ensemble's {len(planned.members):,} prompts failed")
        P = records[0]["virtual_tokens"]
        if any("error" in record["metrics"] for record in records):
            error = {"error": "the loss or the prompt of a member of the ensemble became infinite or NaN"}
            return FinishedCell({"virtual_tokens": P, "metrics": error, "answers": None}, {})
        device, template = word_embeddings(self.base).weight.device, make_template(planned.cell.config)
        inputs = planned.inputs
        members = [
            EnsembleMember(
                load_adapter(folder).prompt.to(device),
                template,
                inputs.held_out_rows,
                inputs.held_out.examples,
                record["answers"],
                inputs.held_out.missing,
            )
            for folder, record in zip(planned.members, records, strict=True)
        ]
        voting = planned.cell.voting or "majority_vote"
        engine = self._evaluator(planned, members[0].prompt).engine
        evaluation = evaluate_ensemble(engine, inputs.tokenizer, members, voting)
        found = {"virtual_tokens": P, "metrics": evaluation.metrics(), "answers": evaluation.answers}
        return FinishedCell(found, {})


def base_metrics(evaluation: Evaluation) -> Metrics:
    """Return the metrics of the base without a prompt. Their names end in "_base", except eval_samples and
    eval_majority, which depend on the rows alone; a cell that diverged has no others."""
    sample = evaluation.sample_metrics()
    of_rows = {name: value for name, value in sample.items() if name in ("eval_samples", "eval_majority")}
    ends = {f"{name}_base": value for name, value in sample.items() if name not in of_rows}
    return {**evaluation.metrics("_base"), **ends, **of_rows}


def subset(examples: Sequence[Example], rows: int | None, seed: int) -> Sequence[Example]:
    """Return a random subset of `rows` examples, drawn with the seed; all examples if `rows` is None.

    With the same seed, a smaller subset is part of a larger one.
    """
    if rows is None:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[i] for i in order[:rows].tolist()]
