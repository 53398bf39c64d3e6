"""The callbacks of a run: log its metrics, evaluate the prompt, write checkpoints and the result."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from softprompt.data.tokenization import end_tokens
from softprompt.distributed.process_group import StopSource, World
from softprompt.evaluation.evaluator import Evaluation, Rival
from softprompt.prompt.adapter_folder import adapter_folder
from softprompt.prompt.adapter_io import json_bytes, load_adapter
from softprompt.prompt.model_card import CardFacts
from softprompt.runs.checkpoints import (
    checkpoints,
    fault_of,
    metrics_file,
    read_state_files,
    state_files,
    step_of,
    with_checksums,
)
from softprompt.runs.file_names import ANSWERS_FILE, METRICS_FILE, QUESTION_FILE, RESULTS_FILE, STATE_FILE
from softprompt.runs.state import Metrics, Step, TrainingState
from softprompt.runs.train_state import OF_THIS_CALL, resume_command
from softprompt.training.base_evaluation import base_evaluation_state, evaluate_base
from softprompt.training.early_stopping import metric_name, out_of_patience, update_best
from softprompt.training.final_metrics import final_metrics, verdict_facts, verdict_of_run
from softprompt.training.first_question import FirstQuestion, first_question
from softprompt.training.loop import Callbacks
from softprompt.training.metrics_log import MetricsLog, SilentMetricsLog
from softprompt.training.result import Run, Setup
from softprompt.training.run_writer import RunWriter
from softprompt.training.tensorboard import TensorBoardLog
from softprompt.utils.errors import Stopped
from softprompt.utils.translation import translate


class RunCallbacks(Callbacks):
    """The callbacks of a whole run. Every rank has them; only rank 0 prints and writes."""

    def __init__(self, setup: Setup, world: World, stop: StopSource, starts: Sequence[Sequence[str]] = ()):
        """`starts` identify the launch and the processes of all ranks; checkpoints store them (see `auto_resume`)."""
        self.setup, self.world, self.stop, self.starts = setup, world, stop, starts
        self.start, self.data, self.prompt = setup.start, setup.data, setup.prompt
        self.config, self.args = setup.config, setup.config.training
        self.output_dir, self.loader, self.evaluator = setup.output_dir, setup.data.loader, setup.evaluator
        self.log = self._metrics_log()
        self.before: Evaluation | None = None
        self.rivals: list[Rival] = []  # what else the prompt is compared with
        self.base_state: dict[str, Any] | None = None  # `before`, as checkpoints store it
        self.latest: Evaluation | None = None  # of the prompt after the last step, if it was evaluated there
        self.best = self.start.best
        self.began = time.perf_counter()
        self.state = read_state_files(self.start.checkpoint) if self.start.checkpoint else {}
        self.position, self.skipped = self.start.state.position, self.start.state.step - self.start.state.taken
        self.writer = RunWriter(self.output_dir, self.log.say)

    def _metrics_log(self) -> MetricsLog:
        total = self.loader.total_steps
        if not self.world.is_main:
            return SilentMetricsLog(total)
        wanted = self.config.sharing.report_to == "tensorboard"
        board = TensorBoardLog(self.output_dir, self.arguments()) if wanted else None
        return MetricsLog(total, self.output_dir / METRICS_FILE, board=board)

    def print_start(self) -> None:
        """Print where a resumed run continues, and which checkpoints of later steps it will remove."""
        step, total = self.start.state.step, self.loader.total_steps
        if not step:
            return
        done = "; all of them are done" if self._is_over(step) else ""
        done = "; early stopping had ended the run there" if self._patience_is_over() else done
        print(translate(f"resuming after step {step:,} of {total:,}{done}"))
        if not done and (later := [p.name for p in checkpoints(self.output_dir) if step < step_of(p)]):
            print(f"{', '.join(later)} in {self.output_dir} will be removed when the next checkpoint is written")

    def begin(self) -> Run:
        """Start the log, write the answers of a distillation, and evaluate the bare base for comparison, unless a
        checkpoint holds its evaluation. Return the run as it is before its first step."""
        self._adapter_files({})  # if the adapter's files cannot be made, fail now rather than after the last step
        if self.setup.answers:
            self.writer.write_beside_checkpoints({ANSWERS_FILE: self.setup.answers.file}, "the answers of the base")
        self.log.start(self.start.totals, self.start.history)
        if self.evaluator:
            self.before = evaluate_base(self.setup, self.evaluator, self.world, self.log.say)
            self.base_state = base_evaluation_state(self.setup, self.before)
            self.rivals = self.evaluator.rivals(len(self.prompt.weight))
        self.began = time.perf_counter()
        return self._run()

    def wants_to_stop(self) -> bool:
        return self.stop.exit_code is not None or self._patience_is_over()

    def stop_if_asked(self) -> None:
        """Raise Stopped, with the run as it was saved, if a signal or the time limit ended the loop before its last
        step."""
        done, total = self.log.totals.steps, self.loader.total_steps
        code = self.stop.exit_code
        if code is not None and not self._is_over(done) and not self._patience_is_over():
            saved = f"stopped after step {done:,} of {total:,}, which is saved; continue with: "
            saved += resume_command(self.output_dir)
            raise Stopped(saved, code, replace(self._run(), stopped=saved))

    def on_step(self, step: Step) -> None:
        self.latest = None
        self.log.on_step(step)

    def on_log(self, metrics: Metrics) -> None:
        self.log.on_log(metrics)

    def on_evaluate(self, step: Step) -> bool:
        self._evaluate()
        if self._patience_is_over():
            best = f"; the best was at step {self.best.step}" if self.best.step else ""
            self.log.say(f"{self.args.early_stopping_patience} evaluations without improvement; training stops{best}")
        return self.args.load_best_model_at_end and self.best.step == step.number

    def on_save(self, step: Step, state: TrainingState) -> None:
        self.position, self.skipped = state.position, state.step - state.taken
        self.state = state_files(
            state,
            {
                "engine": self.setup.engine.state_dict(),
                "totals": asdict(replace(self.log.totals, runtime=self._runtime())),
                "best": asdict(self.best),
                "base_evaluation": self.base_state,
                "arguments": self.config.as_dict(),
                "fingerprints": dict(self.start.fingerprints),
                "rows_per_step": self.loader.rows_per_step,
                "starts": self.starts,
            },
        )
        if not self.world.is_main:
            return
        history = {METRICS_FILE: metrics_file(self.log.history)}
        files = with_checksums({**self._adapter_files({}), **self.state, **history})
        self.writer.write_checkpoint(step.number, files, self.args.save_total_limit, self._kept_best())

    def finish(self) -> Run:
        """Evaluate the final prompt, or the best one, and write the results. Return the finished run."""
        seconds = self._runtime()
        self._print_row_notes()
        self._warn_of_skipped_steps()
        after = self._evaluate() if self.evaluator and not self.latest else self.latest
        if self._kept_best() not in (None, self.log.totals.steps):
            after = self._take_best() or after
        best = self.best if self._kept_best() else None
        metrics = final_metrics(self.log.totals, seconds, after, self.before, best, self.rivals)
        metrics |= self.setup.answers.metrics if self.setup.answers else {}
        answered = []
        if after and self.evaluator:
            metrics |= self.evaluator.costs(self.prompt.weight.detach())
            answered = self.evaluator.answered_rows(self.prompt.weight.detach(), after)
        judged = verdict_of_run(self.config, after, self.before, self.rivals, self.data.seen)
        self.log.on_end(metrics)
        files = self._adapter_files(metrics, judged.sentence if judged else None)
        metrics |= verdict_facts(judged)
        results = {RESULTS_FILE: json_bytes(metrics)}
        question = self._first_question()
        if question and question.flags is None:
            results[QUESTION_FILE] = json.dumps(question.row, ensure_ascii=False).encode() + b"\n"
        if self.world.is_main:
            self.writer.write_beside_checkpoints({**results, **self.state, **files}, "the run's results")
        size = len(files["adapter_model.safetensors"])
        done = {"metrics": metrics, "adapter_bytes": size, "question": question, "after": after, "verdict": judged}
        return replace(self._run(), **done, answered_rows=answered)

    def _run(self) -> Run:
        """Return the run as it is now, without results."""
        return Run(
            self.setup,
            before=self.before,
            rivals=self.rivals,
            no_answers=self.setup.no_answers,
            history=list(self.log.history),
        )

    def _first_question(self) -> FirstQuestion | None:
        rows = list(self.data.first_rows)
        if self.config.data.dataset == "mini:sentiment":
            rows = [{**rows[0], "instruction": "我爱这部电影"}]
        return first_question(rows, self.data.template, self.data.tokenizer)

    def _print_row_notes(self) -> None:
        if told := self.loader.describe_rows_read(self.position):
            done, total = self.log.totals.steps, self.loader.total_steps
            ended = f"; they ended after step {done:,} of {total:,}" if self._is_over(done) and done < total else ""
            self.log.say(told + ended)

    def _warn_of_skipped_steps(self) -> None:
        if self.skipped:
            steps, why = self.log.totals.steps, "their fp16 gradients were not finite"
            nothing = "; the prompt has not changed at all: train with --bf16, or in fp32"
            more = nothing if self.skipped == steps else ""
            self.log.say(f"warning: {self.skipped:,} of {steps:,} steps changed nothing, because {why}{more}")

    def _evaluate(self) -> Evaluation | None:
        """Evaluate the current prompt. Log the result, unless the log already has an evaluation at this step: that of
        a run which is resumed after its end."""
        if not self.evaluator:
            return None
        self.latest = self.evaluator(self.prompt.weight.detach())
        totals, metrics = self.log.totals, self.latest.metrics()
        if not any(record["step"] == totals.steps and "eval_loss" in record for record in self.log.history):
            self.best = update_best(self.best, totals.steps, metrics, self.args)
            self.log.on_log({"step": totals.steps, "epoch": round(totals.epoch, 4), **metrics})
        return self.latest

    @property
    def ended_early(self) -> str | None:
        """Why the run ended before its last step, as report.json says it: "early_stopping" or "no_more_rows"; None if
        it took all its steps."""
        if self.log.totals.steps >= self.loader.total_steps:
            return None
        return "early_stopping" if self._patience_is_over() else "no_more_rows"

    def _is_over(self, step: int) -> bool:
        return self.loader.is_over(step, self.position)

    def _patience_is_over(self) -> bool:
        return out_of_patience(self.best, self.args)

    def _kept_best(self) -> int | None:
        return self.best.step if self.args.load_best_model_at_end else None

    def _take_best(self) -> Evaluation | None:
        """Restore the best prompt and return its evaluation. If no whole checkpoint holds it, keep the last prompt and
        return None."""
        name, step = f"checkpoint-{self.best.step}", self.best.step
        places = [self.output_dir, *([self.start.checkpoint.parent] if self.start.checkpoint else [])]
        faults = {place / name: self._fault_of_best(place / name) for place in places}
        whole = next((str(folder) for folder, fault in faults.items() if not fault), None)
        folder = self.world.all_gather(whole)[0]
        if folder is None or not self.evaluator:
            told = "; ".join(f"{folder}: {fault}" for folder, fault in faults.items())
            self.log.say(f"warning: the best prompt, of step {step}, cannot be restored ({told}); the last one is kept")
            return None
        self.log.say(f"the best prompt is that of step {step}: {metric_name(self.args)} {self.best.metric:.4g}")
        with torch.no_grad():  # its encoder, if any, is only needed to continue training, and is in the state's files
            self.prompt.weight.copy_(load_adapter(folder).prompt)
        self.state = read_state_files(Path(folder))
        return self.evaluator(self.prompt.weight.detach())

    def _fault_of_best(self, checkpoint: Path) -> str | None:
        """Return what is wrong with a checkpoint that should hold the best prompt of this run; None if it holds it."""
        if fault := fault_of(checkpoint):
            return fault
        saved = json.loads((checkpoint / STATE_FILE).read_bytes()).get("best") or {}
        ours = (saved.get("step"), saved.get("metric")) == (self.best.step, self.best.metric)
        return None if ours else "it belongs to another run"

    def _runtime(self) -> float:
        """Return the seconds that the loop has taken so far, including those before a resume."""
        return self.start.totals.runtime + time.perf_counter() - self.began

    def arguments(self) -> dict[str, Any]:
        """Return the settings that the run uses, without those that concern only this call (OF_THIS_CALL)."""
        every = {**self.config.as_dict(), "num_virtual_tokens": len(self.prompt.weight)}
        return {name: value for name, value in every.items() if name not in OF_THIS_CALL}

    def _adapter_files(self, metrics: Metrics, sentence: str | None = None) -> dict[str, bytes]:
        prompt = self.prompt.weight.detach()
        ends = end_tokens(self.data.train.examples, self.data.tokenizer, self.data.end)
        optional = self.data.template.optional
        facts = CardFacts(self.arguments(), metrics, self.log.history, verdict=sentence)
        return adapter_folder(self.config, self.setup.base.config, prompt, ends, optional, facts)
