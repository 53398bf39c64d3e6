"""What a run shows, keeps and leaves: the loop's callbacks, and the finished run."""

import errno
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from softprompt.config.loader import TrainConfig
from softprompt.data.build_data import make_template
from softprompt.data.tokenization import end_tokens
from softprompt.distributed.process_group import StopSource
from softprompt.evaluation.evaluator import Evaluation, Evaluator
from softprompt.models.capabilities import why_not_generate
from softprompt.prompt.adapter_folder import adapter_folder
from softprompt.prompt.adapter_io import json_bytes, load_adapter
from softprompt.runs.checkpoints import checkpoints, fault_of, metrics_file, state_files, step_of, with_checksums
from softprompt.runs.file_names import METRICS_FILE, RESULTS_FILE, STATE_FILE, STATE_FILES
from softprompt.runs.run_files import own_checkpoint, remove_old_checkpoints, remove_run, run_files, tidy
from softprompt.runs.state import Metrics, Step, TrainingState
from softprompt.runs.train_state import OF_THIS_CALL, resume_command
from softprompt.training.early_stopping import metric_name, out_of_patience, update_best
from softprompt.training.first_question import FirstQuestion, first_question
from softprompt.training.metrics_log import MetricsLog, SilentMetricsLog
from softprompt.training.setup import Prepared
from softprompt.training.tensorboard import TensorBoardLog
from softprompt.utils.atomic_io import write_folder
from softprompt.utils.errors import Stopped, TrainingError

QUESTION_FILE = "question.jsonl"  # the one to try, where flags cannot ask it


@dataclass(frozen=True, repr=False)
class Run:
    """What a finished run leaves: its folder, the content of all_results.json, the bytes of the saved prompt, a
    question to try it with, held-out rows, and how the bare base and the tuned one answer them (None without held-out
    rows)."""

    config: TrainConfig
    output_dir: Path
    metrics: Metrics
    adapter_bytes: int
    question: FirstQuestion | None
    evaluator: Evaluator | None
    before: Evaluation | None
    after: Evaluation | None
    not_pushed: str | None = None  # why it is not on the hub, where --push_to_hub failed
    no_answers: str | None = None  # why the base cannot answer behind the prompt, where that is so

    def __repr__(self) -> str:
        return f"Run(output_dir={str(self.output_dir)!r}, metrics={self.metrics})"


class RunCallbacks:
    """The loop's callbacks: shows and keeps its metrics, evaluates the prompt, writes checkpoints and the result."""

    def __init__(self, run: Prepared, request: StopSource):
        self.request, self.world = request, run.world
        self.run, self.config, self.output_dir, self.prompt = run, run.config, run.output_dir, run.prompt
        self.args = run.config.training
        self.evaluator, self.template = run.evaluator, make_template(run.config).of_rows(run.rows)
        board = (
            TensorBoardLog(run.output_dir, self.arguments()) if run.config.sharing.report_to == "tensorboard" else None
        )
        self.progress = (
            MetricsLog(run.feed.total_steps, run.output_dir / METRICS_FILE, board=board)
            if self.world.is_main
            else SilentMetricsLog(run.feed.total_steps)
        )
        self.before: Evaluation | None = None
        self.latest: Evaluation | None = None  # of the prompt as it is after the last step
        self.best = run.best
        self.began = time.perf_counter()
        self.state = _state_of(run.checkpoint) if run.checkpoint else {}
        self.position, self.skipped = run.start.position, run.start.step - run.start.taken
        self.told_foreign: list[str] = []  # files in checkpoints that are kept because of these

    def tell_start(self) -> None:
        """Where a resumed run goes on, and what of its folder it will replace."""
        step, total = self.run.start.step, self.run.feed.total_steps
        if not step:
            return
        done = "; all of them are done" if self._is_over(step) else ""
        done = "; it ended there, --early_stopping_patience was over" if self._patience_is_over() else done
        print(f"resuming after step {step:,} of {total:,}{done}")
        if not done and (later := [p.name for p in checkpoints(self.output_dir) if step < step_of(p)]):
            print(f"{', '.join(later)} in {self.output_dir}: replaced from the next checkpoint on")

    def begin(self) -> None:
        """Start the log, and evaluate the bare base, for comparison."""
        self._adapter_files({})  # what a save needs of the base is looked at now, not after the last step
        self.progress.start(self.run.totals, self.run.history)
        if self.evaluator:
            self.progress.say("evaluating the base without a prompt …")
            self.before = self.evaluator(None)
            self.progress.say(f"base without a prompt: {_listed(self.before.metrics())}")
        self.began = time.perf_counter()

    def wants_to_stop(self) -> bool:
        return self.request.exit_code is not None or self._patience_is_over()

    def stop_if_asked(self) -> None:
        """Raises Stopped where the loop was to end before its last step."""
        done, total = self.progress.totals.steps, self.run.feed.total_steps
        code = self.request.exit_code
        if code is not None and not self._is_over(done) and not self._patience_is_over():
            raise Stopped(
                f"stopped after step {done:,} of {total:,}, which is saved; go on with: "
                f"{resume_command(self.output_dir)}",
                code,
            )

    def on_step(self, step: Step) -> None:
        self.latest = None
        self.progress.on_step(step)

    def on_log(self, metrics: Metrics) -> None:
        self.progress.on_log(metrics)

    def on_evaluate(self, step: Step) -> bool:
        self._evaluate()
        if self._patience_is_over():
            best = f"; the best was at step {self.best.step}" if self.best.step else ""
            self.progress.say(f"{self.args.early_stopping_patience} evaluations without a gain end the run{best}")
        return self.args.load_best_model_at_end and self.best.step == step.number

    def on_save(self, step: Step, state: TrainingState) -> None:
        self.position, self.skipped = state.position, state.step - state.taken
        self.state = state_files(
            state,
            {
                "engine": self.run.engine.state_dict(),
                "totals": asdict(replace(self.progress.totals, runtime=self._runtime())),
                "best": asdict(self.best),
                "arguments": self.config.as_dict(),
                "fingerprints": self.run.fingerprints,
                "rows_per_step": self.run.feed.rows_per_step,
                "starts": self.run.starts,
            },
        )
        if self.world.is_main:
            self._save(step)

    def _save(self, step: Step) -> None:
        history = {METRICS_FILE: metrics_file(self.progress.history)}
        files = with_checksums({**self._adapter_files({}), **self.state, **history})
        with self._writing(f"checkpoint-{step.number}"):
            write_folder(own_checkpoint(self.output_dir, step.number), files)
        try:
            limit, best = self.args.save_total_limit, self._kept_best()
            foreign = remove_old_checkpoints(self.output_dir, step.number, limit, best)
        except OSError as error:
            self.progress.say(f"warning: an old checkpoint cannot be removed ({error.strerror})")
        else:
            self._tell_foreign(foreign)

    def _tell_foreign(self, names: list[str]) -> None:
        if new := [name for name in names if name not in self.told_foreign]:
            self.told_foreign += new
            self.progress.say(f"warning: {', '.join(new)}: not of this run; the checkpoint with it is kept")

    def finish(self) -> Run:
        """Evaluate the tuned prompt, or the best of all, and write the run's own files."""
        seconds = self._runtime()
        self._tell_rows()
        self._tell_skipped()
        after = self._evaluate() if self.evaluator and not self.latest else self.latest
        if self._kept_best() not in (None, self.progress.totals.steps):
            after = self._take_best() or after
        metrics = self._results(after, seconds)
        self.progress.on_end(metrics)
        files = self._adapter_files(metrics)
        results = {RESULTS_FILE: json_bytes(metrics)}
        question = self._first_question()
        if question and question.flags is None:
            results[QUESTION_FILE] = json.dumps(question.row, ensure_ascii=False).encode() + b"\n"
        if self.world.is_main:
            with self._writing("the run's results"):
                run_files(self.output_dir).write({**results, **self.state, **files})
        size = len(files["adapter_model.safetensors"])
        no_answers = why_not_generate(self.run.base)
        evaluations = (self.evaluator, self.before, after)
        return Run(self.config, self.output_dir, metrics, size, question, *evaluations, no_answers=no_answers)

    def _first_question(self) -> FirstQuestion | None:
        rows = list(self.run.rows)
        if self.config.data.dataset == "mini:sentiment":
            rows = [{**rows[0], "instruction": "我爱这部电影"}]
        return first_question(rows, self.template, self.run.tokenizer)

    def _tell_rows(self) -> None:
        if told := self.run.feed.told(self.position):
            done, total = self.progress.totals.steps, self.run.feed.total_steps
            ended = f"; they ended after step {done:,} of {total:,}" if self._is_over(done) and done < total else ""
            self.progress.say(told + ended)

    def _tell_skipped(self) -> None:
        if self.skipped:
            steps, why = self.progress.totals.steps, "their fp16 gradients were not finite"
            nothing = "; the prompt is as it began: train with --bf16, or in fp32" if self.skipped == steps else ""
            self.progress.say(f"warning: {self.skipped:,} of {steps:,} steps changed nothing, as {why}{nothing}")

    def _evaluate(self) -> Evaluation | None:
        """Of the prompt after the last step; it is logged and noted unless a run that is resumed after its end was
        evaluated there before."""
        if not self.evaluator:
            return None
        self.latest = self.evaluator(self.prompt.weight.detach())
        totals, metrics = self.progress.totals, self.latest.metrics()
        if not any(record["step"] == totals.steps and "eval_loss" in record for record in self.progress.history):
            self.best = update_best(self.best, totals.steps, metrics, self.args)
            self.progress.on_log({"step": totals.steps, "epoch": round(totals.epoch, 4), **metrics})
        return self.latest

    def _is_over(self, step: int) -> bool:
        return self.run.feed.is_over(step, self.position)

    def _patience_is_over(self) -> bool:
        return out_of_patience(self.best, self.args)

    def _kept_best(self) -> int | None:
        return self.best.step if self.args.load_best_model_at_end else None

    def _take_best(self) -> Evaluation | None:
        """Go back to the best prompt and evaluate it; None where its checkpoint is not whole, and nothing changes."""
        name, step = f"checkpoint-{self.best.step}", self.best.step
        places = [self.output_dir, *([self.run.checkpoint.parent] if self.run.checkpoint else [])]
        faults = {place / name: self._fault_of_best(place / name) for place in places}
        whole = next((str(folder) for folder, fault in faults.items() if not fault), None)
        folder = self.world.gather(whole)[0]
        if folder is None or not self.evaluator:
            told = "; ".join(f"{folder}: {fault}" for folder, fault in faults.items())
            self.progress.say(f"warning: the best prompt, of step {step}, is not there ({told}); the last one is kept")
            return None
        self.progress.say(f"the best prompt is that of step {step}: {metric_name(self.args)} {self.best.metric:.4g}")
        with torch.no_grad():
            self.prompt.weight.copy_(load_adapter(folder).prompt)
        self.state = _state_of(Path(folder))
        return self.evaluator(self.prompt.weight.detach())

    def _fault_of_best(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint that should hold the best prompt of this run; None where it does."""
        if fault := fault_of(checkpoint):
            return fault
        saved = json.loads((checkpoint / STATE_FILE).read_bytes()).get("best") or {}
        ours = (saved.get("step"), saved.get("metric")) == (self.best.step, self.best.metric)
        return None if ours else "it is of another run"

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """What cannot be written ends the run in one line that says what there is."""
        try:
            if not self.output_dir.is_dir():
                raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(self.output_dir))
            yield
        except OSError as error:
            reason = error.strerror or type(error).__name__
            where = error.filename or self.output_dir
            raise TrainingError(f"{what} cannot be written: {where}: {reason}") from None

    def _runtime(self) -> float:
        """Seconds of the loop so far, those before a resume among them."""
        return self.run.totals.runtime + time.perf_counter() - self.began

    def _results(self, after: Evaluation | None, seconds: float) -> Metrics:
        evaluations = {**(after.metrics() if after else {}), **(self.before.metrics("_base") if self.before else {})}
        totals = self.progress.totals
        return {
            "epoch": round(totals.epoch, 4),
            **({} if totals.mean_loss is None else {"train_loss": totals.mean_loss}),
            "train_runtime": round(seconds, 2),
            "train_tokens_per_second": round(totals.tokens_per_second, 1),
            **evaluations,
            **({"best_global_step": self.best.step, "best_metric": self.best.metric} if self._kept_best() else {}),
        }

    def arguments(self) -> dict[str, Any]:
        """The settings as they were used, without those that are of one call."""
        used = {"learning_rate": self.config.learning_rate, "num_virtual_tokens": len(self.prompt.weight)}
        every = {**self.config.as_dict(), **used}
        return {name: value for name, value in every.items() if name not in OF_THIS_CALL}

    def _adapter_files(self, metrics: Metrics) -> dict[str, bytes]:
        prompt = self.prompt.weight.detach()
        ends = end_tokens(self.run.data.examples, self.run.tokenizer, self.run.end)
        return adapter_folder(
            self.config, self.run.base.config, prompt, ends, self.template.optional, self.arguments(), metrics
        )


def clear_output_dir(output_dir: Path, goes_on: bool) -> None:
    """Take away what a broken-off write has left and, unless it is the run that `goes_on`, the run that is there, or
    what one has left that ended before its first checkpoint."""
    tidy(output_dir)
    if not goes_on:
        remove_run(output_dir)


def _state_of(checkpoint: Path) -> dict[str, bytes]:
    return {name: (checkpoint / name).read_bytes() for name in STATE_FILES}


def _listed(metrics: Metrics) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
