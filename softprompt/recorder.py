"""What a run shows, keeps and leaves: the loop's callbacks, and the finished run."""

import shlex
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from softprompt.card import model_card
from softprompt.checkpoint import Adapter, adapter_files, json_bytes, peft_config, remove_old_checkpoints
from softprompt.config import TrainConfig
from softprompt.errors import Stopped
from softprompt.evaluate import Evaluation, Evaluator
from softprompt.files import write_files, write_folder
from softprompt.infer_config import GENERATION_DEFAULTS
from softprompt.plot import loss_picture
from softprompt.prepare import Prepared
from softprompt.progress import Progress
from softprompt.resume import OF_THIS_CALL, OPTIMIZER_FILE, STATE_FILE, state_files, with_checksums
from softprompt.rows import Row
from softprompt.stopping import StopRequest
from softprompt.trainer import Metrics, Step, TrainingState


@dataclass(frozen=True, repr=False)
class Run:
    """What a finished run leaves: its folder, the content of all_results.json, the bytes of the saved prompt, held-out
    rows, and how the bare base and the tuned one answer them (None without held-out rows)."""

    config: TrainConfig
    output_dir: Path
    metrics: Metrics
    adapter_bytes: int
    sample: Row
    evaluator: Evaluator | None
    before: Evaluation | None
    after: Evaluation | None

    def __repr__(self) -> str:
        return f"Run(output_dir={str(self.output_dir)!r}, metrics={self.metrics})"


class Recorder:
    """The loop's callbacks: shows and keeps its metrics, evaluates the prompt, writes checkpoints and the result."""

    def __init__(self, run: Prepared, request: StopRequest):
        self.request = request
        self.run, self.config, self.output_dir, self.prompt = run, run.config, run.output_dir, run.prompt
        self.evaluator = run.evaluator
        self.progress = Progress(run.total_steps, run.output_dir / "metrics.jsonl")
        self.before: Evaluation | None = None
        self.began = time.perf_counter()
        done = run.checkpoint
        self.state = {name: (done / name).read_bytes() for name in (OPTIMIZER_FILE, STATE_FILE)} if done else {}

    def begin(self) -> None:
        """Evaluate the bare base, for comparison."""
        self.progress.start(self.run.totals)
        if self.evaluator:
            self.progress.say("evaluating the base without a prompt …")
            self.before = self.evaluator(None)
            self.progress.say(f"base without a prompt: {_listed(self.before.metrics())}")
        self.began = time.perf_counter()

    def wants_to_stop(self) -> bool:
        return self.request.exit_code is not None

    def stop_if_asked(self) -> None:
        """Raises Stopped where the loop ended before its last step."""
        done, code = self.progress.totals.steps, self.request.exit_code
        if code is not None and done < self.run.total_steps:
            raise Stopped(
                f"stopped after step {done:,} of {self.run.total_steps:,}, which is saved; go on with: python train.py "
                f"--resume_from_checkpoint {shlex.quote(str(self.output_dir))}",
                code,
            )

    def on_step(self, step: Step) -> None:
        self.progress.on_step(step)

    def on_log(self, metrics: Metrics) -> None:
        self.progress.on_log(metrics)

    def on_evaluate(self, step: Step) -> None:
        self._evaluate()

    def on_save(self, step: Step, state: TrainingState) -> None:
        self.state = state_files(
            state,
            {
                "engine": self.run.engine.state(),
                "totals": asdict(replace(self.progress.totals, runtime=self._runtime())),
                "arguments": self.config.as_dict(),
                "fingerprints": self.run.fingerprints,
            },
        )
        files = with_checksums({**self._adapter_files({}), **self.state})
        write_folder(self.output_dir / f"checkpoint-{step.number}", files)
        remove_old_checkpoints(self.output_dir, self.config.training.save_total_limit)

    def finish(self, sample: Row) -> Run:
        """Evaluate the tuned prompt and write the run's own files."""
        seconds = self._runtime()
        after = self._evaluate()
        metrics = self._results(after, seconds)
        files = self._adapter_files(metrics)
        results = {"all_results.json": json_bytes(metrics)}
        picture = loss_picture(self.progress.history, self.before.loss if self.before else None)
        if picture:
            results["loss.png"] = picture
        write_files(self.output_dir, {**results, **self.state, **files})
        size = len(files["adapter_model.safetensors"])
        return Run(self.config, self.output_dir, metrics, size, sample, self.evaluator, self.before, after)

    def _evaluate(self) -> Evaluation | None:
        if not self.evaluator:
            return None
        evaluation = self.evaluator(self.prompt.weight.detach())
        totals = self.progress.totals
        self.progress.on_log({"step": totals.steps, "epoch": round(totals.epoch, 4), **evaluation.metrics()})
        return evaluation

    def _runtime(self) -> float:
        """Seconds of the loop so far, those before a resume among them."""
        return self.run.totals.runtime + time.perf_counter() - self.began

    def _results(self, after: Evaluation | None, seconds: float) -> Metrics:
        evaluations = {**(after.metrics() if after else {}), **(self.before.metrics("_base") if self.before else {})}
        totals = self.progress.totals
        return {
            "epoch": round(totals.epoch, 4),
            "train_loss": totals.mean_loss,
            "train_runtime": round(seconds, 2),
            "train_tokens_per_second": round(totals.tokens_per_second, 1),
            **evaluations,
        }

    def _arguments(self) -> dict[str, Any]:
        """The settings as they were used, without those that are of one call."""
        used = {"learning_rate": self.config.learning_rate, "num_virtual_tokens": len(self.prompt.weight)}
        every = {**self.config.as_dict(), **used}
        return {name: value for name, value in every.items() if name not in OF_THIS_CALL}

    def _adapter_files(self, metrics: Metrics) -> dict[str, bytes]:
        settings = self.config.prompt
        prompt = self.prompt.weight.detach()
        name = str(self.config.model.model_name_or_path)
        peft = peft_config(
            name, self.run.base.config, prompt, settings.prompt_tuning_init, settings.prompt_tuning_init_text
        )
        ours = {
            "template": self.config.data.template or "default",
            "generation": GENERATION_DEFAULTS.get(name, {}),
        }
        adapter = Adapter(prompt, peft, ours)
        return {**adapter_files(adapter), "README.md": model_card(adapter, self._arguments(), metrics)}


def _listed(metrics: Metrics) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
