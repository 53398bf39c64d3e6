"""The cells of a study, run with the parts of a training run: every base is loaded once, after the one before it has
left the memory, and a finished cell is a folder that appears as a whole and is never run again. A cell that fails, for
whatever reason, leaves no folder: the others go on without it, and the next call tries it again.

adapter_config.json, adapter_model.safetensors, softprompt.json, README.md   the learned prompt, as any run leaves it
cell.json                                                                    settings, fingerprints, metrics, answers
checksums.json                                                               sha256 of each of these files

An ensemble's folder has the last two alone: its prompts are in its members' folders. Beside the folders,
FOLDER.error.txt holds the traceback of a cell that failed with an error that this project does not know.
"""

import contextlib
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import PreTrainedModel

from softprompt.config.train_args import DataArguments, ModelArguments
from softprompt.data.build_data import make_template
from softprompt.data.dataloader import ListLoader
from softprompt.data.tokenization import Example, count_targets, end_tokens
from softprompt.engines.factory import make_engine
from softprompt.evaluation.ensemble_eval import Member, joint_evaluation
from softprompt.evaluation.evaluator import Evaluation, Evaluator
from softprompt.generation.factory import generator_beside
from softprompt.models.loading import base_path, freeze, move_to_device, read_base, word_embeddings
from softprompt.models.precision import resolve_device, resolve_dtype
from softprompt.prompt.adapter_folder import adapter_folder
from softprompt.prompt.adapter_io import json_bytes, load_adapter
from softprompt.prompt.initial import initial_prompt
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.runs.checkpoints import with_checksums
from softprompt.runs.crash_report import Failure, failure
from softprompt.runs.file_names import CHECKSUMS_FILE
from softprompt.runs.state import Metrics
from softprompt.study.plan import Planned, virtual_tokens
from softprompt.study.results import grouped
from softprompt.training.determinism import deterministic
from softprompt.training.loop import QuietCallbacks, train
from softprompt.training.stop_signals import StopRequest
from softprompt.utils.atomic_io import write_files, write_folder
from softprompt.utils.errors import NotFinite, Stopped, TrainingError

T = TypeVar("T")
CELL_FILE = "cell.json"
# The content of a cell.json. Of a cell that failed, which has none, "failed" says why, and its metrics are empty.
Result = dict[str, Any]


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
    """Run the cells of `plan`, base by base, each to its folder; `on_step` is called after every optimizer step, and
    `on_cell` with the result of each cell, those that failed among them.

    Raises:
        Stopped: asked to; the cell that was at work is dropped.
        OSError: a cell cannot be written.
    """
    for one in plan:
        if one.failed:
            _note(one, one.failed)
            on_cell(one, failed(one, one.failed.line))
    with StopRequest() as request:
        can_run = [one for one in plan if not one.failed]
        for of_base in grouped(can_run, lambda one: one.cell.config.model).values():
            _run_over_base(of_base, request, on_step, on_cell)
            _release_memory()  # nothing refers to the base any more, and the next one may need its room


def _run_over_base(
    of_base: Sequence[Planned],
    request: StopRequest,
    on_step: Callable[[], None],
    on_cell: Callable[[Planned, Result], None],
) -> None:
    """The cells of one base, which is loaded here and held by nothing else."""
    bench = _tried(lambda: _Bench.of(of_base[0].cell.config.model))
    for of_rows in grouped(of_base, lambda one: one.cell.config.data).values():
        for one in of_rows:
            watch = QuietCallbacks(request, on_step)
            found = bench if isinstance(bench, Failure) else _tried(partial(bench.run, one, watch))
            if watch.code is None:
                on_cell(one, _kept(one, found))
            if (code := request.exit_code) is not None:
                raise Stopped("stopped; the same command goes on with the cells that are left", code)


def _tried(do: Callable[[], T]) -> T | Failure:
    """What `do` returns, or why it failed."""
    try:
        return do()
    except Stopped:
        raise
    except Exception as error:
        found = failure(error)
    _release_memory()  # of the error's frames
    return found


def _kept(one: Planned, found: "_Found | Failure") -> Result:
    """The result of a cell, after it was written."""
    if isinstance(found, Failure):
        _note(one, found)
        return failed(one, found.line)
    write_folder(one.folder, found.files())
    _error_file(one).unlink(missing_ok=True)
    return found.result


def _note(one: Planned, why: Failure) -> None:
    if why.report:
        with contextlib.suppress(OSError):
            write_files(one.folder.parent, {_error_file(one).name: why.report.encode(errors="backslashreplace")})


def _error_file(one: Planned) -> Path:
    return one.folder.parent / f"{one.folder.name}.error.txt"


def _release_memory() -> None:
    gc.collect()  # a base may be part of a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failed(one: Planned, why: str) -> Result:
    """The result of a cell that has none."""
    return {
        "settings": one.cell.settings(),
        "rows": one.cell.rows or len(one.material.examples),
        "steps": one.steps,
        "parameters": 0,  # a base that cannot be loaded has none that are known
        "held_out_targets": sum(map(count_targets, one.material.held_out)),
        "virtual_tokens": virtual_tokens(one.cell, one.material),
        "metrics": {},
        "seconds": 0.0,
        "failed": why,
    }


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
    adapter: Mapping[str, bytes] = MappingProxyType({})


class _Found(NamedTuple):
    """The result of a cell, and the files of its prompt."""

    result: Result
    adapter: Mapping[str, bytes]

    def files(self) -> dict[str, bytes]:
        return with_checksums({**self.adapter, CELL_FILE: json_bytes(self.result)})


@dataclass(frozen=True)
class _Bench:
    """A base on its device, ready for any number of cells, and what it came to without a prompt on the rows so far."""

    base: PreTrainedModel
    dtype: torch.dtype
    bare: dict[DataArguments, Evaluation] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelArguments) -> "_Bench":
        device = resolve_device(model.device)
        dtype = resolve_dtype(device, model.bf16, model.fp16)
        return cls(move_to_device(freeze(read_base(base_path(str(model.model_name_or_path))), dtype), device), dtype)

    def evaluator(self, one: Planned, P: int = 0) -> Evaluator:
        engine = make_engine(one.cell.config, self.base, one.material.tokenizer, self.dtype, P)
        generator = generator_beside(engine, self.base, one.material.tokenizer)
        batch_size = one.cell.config.training.per_device_eval_batch_size
        material = one.material
        return Evaluator(
            engine, generator, material.tokenizer, material.held_out, batch_size, material.held_out_missing
        )

    def run(self, one: Planned, watch: QuietCallbacks) -> _Found:
        """Make one cell. A run that ends without finite numbers is a result, too."""
        rows = one.cell.config.data
        if rows not in self.bare:
            self.bare[rows] = _bare(self.evaluator(one), str(rows.dataset))
        began = time.perf_counter()
        made = self._together(one) if one.members else self._alone(one, watch)
        result = {
            **self._described(one),
            "virtual_tokens": made.virtual_tokens,
            "metrics": {**made.metrics, **self.bare[rows].metrics("_base")},
            "answers": made.answers,
            "seconds": round(time.perf_counter() - began, 2),
        }
        return _Found(result, made.adapter)

    def _alone(self, one: Planned, watch: QuietCallbacks) -> _Made:
        """A prompt that is trained, or the vectors of a text."""
        config = one.cell.config
        values = initial_prompt(config, one.material.tokenizer, self.base)
        prompt = PromptEmbedding(values).to(word_embeddings(self.base).weight.device)
        evaluator, answers = self.evaluator(one, len(values)), None
        metrics: Metrics = {}
        try:
            if one.cell.trained:
                examples = subset(one.material.examples, one.cell.rows, config.training.seed)
                with deterministic(config.training.deterministic):
                    feed = ListLoader(examples, config.training)
                    train(evaluator.engine, prompt, feed, config.training, config.learning_rate, watch)
            if watch.code is None:
                found = evaluator(prompt.weight.detach())
                metrics, answers = found.metrics(), found.answers
        except NotFinite as error:
            metrics = {"error": str(error)}
        ends = end_tokens(one.material.examples, one.material.tokenizer)
        files = adapter_folder(config, self.base.config, prompt.weight.detach(), ends, (), one.cell.settings(), metrics)
        return _Made(len(values), metrics, answers, files)

    def _together(self, one: Planned) -> _Made:
        """The ensemble of prompts that were learned before."""
        results = [result for folder in one.members if (result := finished(folder))]
        if left := len(one.members) - len(results):
            raise TrainingError(f"{left:,} of the ensemble's {len(one.members):,} prompts failed")
        P = results[0]["virtual_tokens"]
        if any("error" in result["metrics"] for result in results):
            return _Made(P, {"error": "a prompt of the ensemble did not end in finite numbers"})
        device, template = word_embeddings(self.base).weight.device, make_template(one.cell.config)
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


def subset(examples: Sequence[Example], rows: int | None, seed: int) -> list[Example]:
    """`rows` of the examples, drawn by the seed; a smaller number's are among those of a larger one. None: all."""
    if rows is None:
        return list(examples)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[i] for i in order[:rows].tolist()]
