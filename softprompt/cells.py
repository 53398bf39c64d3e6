"""The cells of a study, run with the parts of a training run: every base is loaded once, and a finished cell is a
folder that appears as a whole and is never run again.

adapter_config.json, adapter_model.safetensors, softprompt.json, README.md   the learned prompt, as any run leaves it
cell.json                                                                    settings, fingerprints, metrics, answers
checksums.json                                                               sha256 of each of these files

An ensemble's folder has the last two alone: its prompts are in its members' folders.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from softprompt.adapter_folder import adapter_folder
from softprompt.arguments import ModelArguments
from softprompt.build import base_path, initial_prompt
from softprompt.checkpoint import json_bytes, load_adapter
from softprompt.data import Example, count_targets
from softprompt.determinism import deterministic
from softprompt.engines import generator_beside, make_engine
from softprompt.errors import NotFinite, Stopped
from softprompt.evaluate import Evaluation, Evaluator
from softprompt.feed import Listed
from softprompt.files import write_folder
from softprompt.intake import template_of
from softprompt.joint import Member, joint_evaluation
from softprompt.model import freeze, place, read_base, resolve_device, resolve_dtype, word_embeddings
from softprompt.points import grouped
from softprompt.prompt import PromptEmbedding
from softprompt.resume import CHECKSUMS_FILE, with_checksums
from softprompt.stopping import StopRequest
from softprompt.study_plan import Planned
from softprompt.trainer import Metrics, train
from softprompt.unwatched import Unwatched

CELL_FILE = "cell.json"

Result = dict[str, Any]  # the content of a cell.json


def finished(folder: Path) -> Result | None:
    """What a cell's folder holds; None where there is none, or where it is not as it was written."""
    try:
        sums = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        content = {name: (folder / Path(name).name).read_bytes() for name in sums}
        whole = with_checksums(content)[CHECKSUMS_FILE] == json_bytes(sums)
        return json.loads(content[CELL_FILE]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def run_cells(plan: Sequence[Planned], on_step: Callable[[], None], on_cell: Callable[[Planned, Result], None]) -> None:
    """Run the cells of `plan`, base by base, each to its folder; `on_step` is called after every optimizer step.

    Raises:
        Stopped: asked to; the cell that was at work is dropped.
        SoftpromptError: a base that cannot be loaded.
    """
    with StopRequest() as request:
        for of_base in grouped(plan, lambda one: one.cell.config.model).values():
            bench = _Bench.of(of_base[0].cell.config.model)
            for of_rows in grouped(of_base, lambda one: one.cell.config.data).values():
                before: Evaluation | None = None
                for one in of_rows:
                    watch = Unwatched(request, on_step)
                    before = before or _bare(bench.evaluator(one), str(one.cell.config.data.dataset))
                    result = bench.run(one, before, watch)
                    if watch.code is None:
                        on_cell(one, result)
                    if (code := request.exit_code) is not None:
                        raise Stopped("stopped; the same command goes on with the cells that are left", code)


def _bare(evaluator: Evaluator, dataset: str) -> Evaluation:
    """Of the base alone; what is to be known of the exact match is said."""
    if evaluator.told:
        print(f"{dataset}: {evaluator.told}")
    return evaluator(None)


class _Made(NamedTuple):
    """What a cell comes to: what was found of it, and the files of its prompt."""

    virtual_tokens: int
    metrics: Metrics
    answers: list[str] | None = None
    files: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class _Bench:
    """A base on its device, ready for any number of cells."""

    base: PreTrainedModel
    dtype: torch.dtype

    @classmethod
    def of(cls, model: ModelArguments) -> "_Bench":
        device = resolve_device(model.device)
        dtype = resolve_dtype(device, model.bf16, model.fp16)
        return cls(place(freeze(read_base(base_path(str(model.model_name_or_path))), dtype), device), dtype)

    def evaluator(self, one: Planned, P: int = 0) -> Evaluator:
        engine = make_engine(one.cell.config, self.base, one.material.tokenizer, self.dtype, P)
        generator = generator_beside(engine, self.base, one.material.tokenizer)
        batch_size = one.cell.config.training.per_device_eval_batch_size
        material = one.material
        return Evaluator(
            engine, generator, material.tokenizer, material.held_out, batch_size, material.held_out_missing
        )

    def run(self, one: Planned, before: Evaluation, watch: Unwatched) -> Result:
        """Make one cell and write its folder, unless it was stopped. A run that ends without finite numbers is a
        result, too."""
        began = time.perf_counter()
        made = self._together(one) if one.members else self._alone(one, watch)
        result = {
            **self._described(one),
            "virtual_tokens": made.virtual_tokens,
            "metrics": {**made.metrics, **before.metrics("_base")},
            "answers": made.answers,
            "seconds": round(time.perf_counter() - began, 2),
        }
        if watch.code is None:
            write_folder(one.folder, with_checksums({**made.files, CELL_FILE: json_bytes(result)}))
        return result

    def _alone(self, one: Planned, watch: Unwatched) -> _Made:
        """A prompt that is trained, or the vectors of a text."""
        config = one.cell.config
        values = initial_prompt(config, one.material.tokenizer, self.base)
        prompt = PromptEmbedding(values).to(word_embeddings(self.base).weight.device)
        evaluator, answers = self.evaluator(one, len(values)), None
        metrics: Metrics = {}
        try:
            if one.cell.trained:
                examples = few(one.material.examples, one.cell.rows, config.training.seed)
                with deterministic(config.training.deterministic):
                    feed = Listed(examples, config.training)
                    train(evaluator.engine, prompt, feed, config.training, config.learning_rate, watch)
            if watch.code is None:
                found = evaluator(prompt.weight.detach())
                metrics, answers = found.metrics(), found.answers
        except NotFinite as error:
            metrics = {"error": str(error)}
        files = adapter_folder(config, self.base.config, prompt.weight.detach(), one.cell.settings(), metrics)
        return _Made(len(values), metrics, answers, files)

    def _together(self, one: Planned) -> _Made:
        """The ensemble of prompts that were learned before."""
        results = [result for folder in one.members if (result := finished(folder))]
        assert len(results) == len(one.members), "an ensemble stands behind its members"
        P = results[0]["virtual_tokens"]
        if any("error" in result["metrics"] for result in results):
            return _Made(P, {"error": "a prompt of the ensemble did not end in finite numbers"})
        device, template = word_embeddings(self.base).weight.device, template_of(one.cell.config)
        material = one.material
        members = [
            Member(
                load_adapter(folder).prompt.to(device),
                template,
                material.held_out_rows,
                material.held_out,
                result["answers"],
                material.held_out_missing,
            )
            for folder, result in zip(one.members, results, strict=True)
        ]
        voting = one.cell.voting or "majority_vote"
        found = joint_evaluation(self.evaluator(one, P).engine, one.material.tokenizer, members, voting)
        return _Made(P, found.metrics(), found.answers)

    def _described(self, one: Planned) -> Result:
        return {
            "settings": one.cell.settings(),
            "rows": one.cell.rows or len(one.material.examples),
            "steps": one.steps,
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "held_out_targets": sum(map(count_targets, one.material.held_out)),
            "fingerprints": one.material.fingerprints,
            "device": str(word_embeddings(self.base).weight.device),
            "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"),
        }


def few(examples: Sequence[Example], rows: int | None, seed: int) -> list[Example]:
    """`rows` of the examples, drawn by the seed; a smaller number's are among those of a larger one. None: all."""
    if rows is None:
        return list(examples)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[i] for i in order[:rows].tolist()]
