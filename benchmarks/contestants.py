"""The contestants of `train.py`: Trainer + PEFT, and this project's loop with its engines, on the same rows."""

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from measure import clock
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from softprompt.config.loader import train_config
from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import ListLoader
from softprompt.data.sampler import windows
from softprompt.data.tokenization import Example
from softprompt.engines.base import Engine
from softprompt.engines.choice import attn_implementations
from softprompt.engines.factory import make_engine, packed_engine
from softprompt.models.bloom_weights import is_bloom
from softprompt.models.loading import word_embeddings
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.runs.state import Step, TrainingState
from softprompt.training.loop import train

SEED = 42
LEARNING_RATE = 3e-2
ROWS_PER_STEP = 32


@dataclass(frozen=True)
class Contestant:
    """A contestant. `kind` is "trainer", "padded", "packed", or "joint", the packed engine of a sharded base, which
    runs the prompt again with each micro-batch (`decoder_schedule.JointDecoderSchedule`). `grouped` says whether its
    rows come in batches of similar length (see `cases.Rows`). `attn_implementation` has the values of the flag of that
    name; "auto" here means the first one that a training run with "auto" would check, without the check.
    `tokens_per_microbatch` is the flag of that name; None means its default."""

    name: str
    kind: str
    dtype: torch.dtype
    rows_per_microbatch: int = 4
    grouped: bool = False
    attn_implementation: str = "auto"
    tokens_per_microbatch: int | None = None

    @property
    def is_peer(self) -> bool:
        return self.kind == "trainer"

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the base's linear layers. Trainer keeps fp32 weights, which autocast casts at every use."""
        return torch.float32 if self.is_peer else self.dtype


def contestants(rows_of_best: int = ROWS_PER_STEP, tokens: int | None = None) -> dict[str, Contestant]:
    """Return all contestants by name. `rows_of_best` is the micro-batch size of `peft-best` in rows, and `tokens` that
    of this project's engines in tokens."""
    every = []
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "-bf16")):
        every += [
            Contestant("peft" + suffix, "trainer", dtype),
            Contestant("peft-best" + suffix, "trainer", dtype, rows_of_best, grouped=True),
            Contestant("padded" + suffix, "padded", dtype, tokens_per_microbatch=tokens),
            Contestant("packed" + suffix, "packed", dtype, tokens_per_microbatch=tokens),
            Contestant("packed-sdpa" + suffix, "packed", dtype, 4, False, "sdpa", tokens),
            Contestant("packed-joint" + suffix, "joint", dtype, tokens_per_microbatch=tokens),
        ]
    return {c.name: c for c in every}


@dataclass(frozen=True)
class StepTimes:
    """The seconds and the real tokens (no padding, no virtual tokens) of each optimizer step, and the mean loss of the
    steps."""

    seconds: list[float]
    tokens: list[int]
    loss: float

    def tokens_per_second(self, grouped: bool) -> float:
        """Return the tokens per second over all steps. Each grouped batch represents an equal share of a dataset's
        tokens (see `cases.Rows`), so the costs per token of grouped batches are averaged with equal weights."""
        if grouped:
            return len(self.seconds) / sum(s / t for s, t in zip(self.seconds, self.tokens, strict=True))
        return sum(self.tokens) / sum(self.seconds)


def run(
    contestant: Contestant, base: PreTrainedModel, tokenizer: Any, start: Tensor, rows: Sequence[Example]
) -> StepTimes:
    """Train a prompt from `start` [P, H] for one pass over `rows`, with ROWS_PER_STEP rows per step. The linear layers
    of `base` are in `weights_dtype`; the base is not changed."""
    steps = len(rows) // ROWS_PER_STEP
    if contestant.is_peer:
        accumulation = ROWS_PER_STEP // contestant.rows_per_microbatch
        times, loss = run_trainer(contestant, base, tokenizer, start, rows, steps, accumulation)
    else:
        times, loss = _run_loop(contestant, base, tokenizer, start, rows, steps)
    stamps = times.stamps
    tokens = [sum(len(row.input_ids) for row in step) for step in steps_of(rows, contestant.grouped)]
    return StepTimes([after - before for before, after in pairwise(stamps)], tokens, loss)


def steps_of(rows: Sequence[Example], grouped: bool) -> list[list[Example]]:
    """Return the rows of each optimizer step: in the given order if they are grouped, else in the order that Trainer
    and this project's loop draw."""
    starts = range(0, len(rows), ROWS_PER_STEP)
    if grouped:
        return [list(rows[at : at + ROWS_PER_STEP]) for at in starts]
    drawn = windows(len(rows), ROWS_PER_STEP, SEED)
    return [[rows[i] for i in next(drawn)] for _ in starts]


def loopback_bytes() -> int:
    """Return the number of bytes that the loopback device has carried so far; 0 if the system does not report it."""
    lines = [line.split() for line in Path("/proc/net/dev").read_text().splitlines()] if os.path.exists("/proc") else []
    return sum(int(fields[1]) for fields in lines if fields[0] == "lo:")


class StepTimer:
    """Callbacks that only record times, losses and loopback traffic; the first time is the beginning of the first
    step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stamps, self.losses = device, list[float](), list[float]()
        self.wire: list[int] = []

    def on_step(self, step: Step) -> None:
        now = clock(self.device)
        self.stamps += [now] if self.stamps else [now - step.seconds, now]
        self.losses.append(step.loss)
        self.wire.append(loopback_bytes())

    def wants_to_stop(self) -> bool:
        return False

    def on_log(self, metrics: Any) -> None: ...
    def on_evaluate(self, step: Step) -> None: ...
    def on_save(self, step: Step, state: TrainingState) -> None: ...


def _run_loop(
    c: Contestant, base: PreTrainedModel, tokenizer: Any, start: Tensor, rows: Sequence[Example], steps: int
) -> tuple[StepTimer, float]:
    base.eval()
    engine = engine_of(c, base, tokenizer, len(start))
    prompt = PromptEmbedding(start).to(engine.device)
    args = TrainingArguments(
        per_device_train_batch_size=c.rows_per_microbatch,
        gradient_accumulation_steps=ROWS_PER_STEP // c.rows_per_microbatch,
        max_steps=steps,
        seed=SEED,
    )
    times = StepTimer(engine.device)
    train(engine, prompt, ListLoader(rows, args), args, LEARNING_RATE, times)
    return times, sum(times.losses) / steps


def engine_of(c: Contestant, base: PreTrainedModel, tokenizer: Any, P: int) -> Engine:
    how = {"attn_implementation": c.attn_implementation, "tokens_per_microbatch": c.tokens_per_microbatch}
    config = train_config(model_name_or_path="x", dataset="x", **how)
    kernel = attn_implementations(config, base, c.dtype)[0]
    if c.kind == "joint":
        return packed_engine(base, c.dtype, c.tokens_per_microbatch, sharded=True, attn_implementation=kernel)
    return make_engine(config, base, tokenizer, c.dtype, P, kind=c.kind, attn_implementation=kernel)


class TrainerStepTimer(TrainerCallback):
    """The same for Trainer. Trainer has already collated the first step's rows when the step begins; this time is not
    counted."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stamps, self.wire = device, list[float](), list[int]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.stamps:
            self.stamps.append(clock(self.device))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.stamps.append(clock(self.device))
        self.wire.append(loopback_bytes())


class _TrainerInRowOrder(Trainer):
    """A Trainer that takes the rows in the given order, because `cases.Rows` has already grouped them."""

    def _get_train_sampler(self, *_: Any) -> Sampler:
        return SequentialSampler(self.train_dataset)


def run_trainer(
    c: Contestant,
    base: PreTrainedModel,
    tokenizer: Any,
    start: Tensor,
    rows: Sequence[Example],
    steps: int,
    accumulation: int,
) -> tuple[TrainerStepTimer, float]:
    """Train with Trainer + PEFT, and return the timer and the mean loss. Under torchrun, this process is one of several
    ranks; each rank has `accumulation` micro-batches per step."""
    times = TrainerStepTimer(word_embeddings(base).weight.device)
    dataset = [{"input_ids": r.input_ids, "attention_mask": [1] * len(r.input_ids), "labels": r.labels} for r in rows]
    if not is_bloom(base.config):  # other bases would count padding between prompt and text as positions
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "right"
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = (_TrainerInRowOrder if c.grouped else Trainer)(
            model=_peft_model(base, start),
            args=_trainer_arguments(c, folder, steps, accumulation, times.device),
            train_dataset=dataset,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)
        has, wanted = trainer.accelerator.mixed_precision, "bf16" if c.dtype is torch.bfloat16 else "no"
        if has != wanted:  # accelerate keeps the precision in a state that all Trainers of a process share
            raise RuntimeError(f"{c.name} would run in mixed precision {has!r}, not {wanted!r}")
        loss = trainer.train().training_loss
    return times, loss


def _trainer_arguments(
    c: Contestant, folder: str, steps: int, accumulation: int, device: torch.device
) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=c.rows_per_microbatch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        seed=SEED,
        bf16=c.dtype is torch.bfloat16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _peft_model(base: PreTrainedModel, start: Tensor) -> peft.PeftModel:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(start), prompt_tuning_init="RANDOM")
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(start)
    return model


@contextlib.contextmanager
def quiet() -> Any:
    """Suppress the libraries' warnings inside the context."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
