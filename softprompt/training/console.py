"""What a run prints before it starts: rows, model, steps, and whether the learning rate can move the prompt."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from softprompt.config.loader import TrainConfig
from softprompt.config.validation import quantization_bits
from softprompt.data.chat_template import never_written
from softprompt.data.dataloader import WindowLoader, rows_of_a_step
from softprompt.data.dataset import Row
from softprompt.data.tokenization import Tokenized
from softprompt.engines.base import Engine
from softprompt.engines.padded import PromptTunedModel
from softprompt.models.loading import base_path, load_config
from softprompt.models.quantization import is_quantized, stored_method
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.training.lr_schedules import farthest_move, learning_rates
from softprompt.utils.translation import translate

# The values of a RANDOM prompt have size 1. If training moves them by less than this, they hardly change.
LEAST_MOVE = 0.1
# Warn if a product in bf16 takes more than this many times as long as in fp32. On a CPU without bf16 instructions, it
# takes about a hundred times as long.
LEAST_SLOWER = 2


def print_rows(config: TrainConfig, first: Row, count: int | None, notes: Sequence[str]) -> None:
    """Print the number of rows, their columns, the first row, and `notes` on the rows."""
    rows = "rows" if count is None else f"{count:,} rows"
    print(translate(f"Dataset {config.data.dataset or config.distillation.text}: {rows}, columns {', '.join(first)}"))
    for name, value in first.items():
        print(f"  {name}: {_shortened(str(value))}")
    for note in notes:
        print(translate(note))


def print_data(
    data: Tokenized, held_out: Tokenized | None, buffer_size: int | None, ignored: Mapping[str, int]
) -> None:
    """Print how many rows and tokens there are. For a stream, `data` are its first rows and `buffer_size` is its
    shuffle buffer. `ignored` are keys of messages that the chat template does not read, with the number of rows."""
    if buffer_size:
        print(translate(f"Training rows are streamed (shuffle buffer {buffer_size:,}). First rows: {data}"))
    else:
        print(translate(f"Training: {data}"))
    if held_out:
        print(translate(f"Held out: {held_out}"))
    if ignored:
        told = ", ".join(f"{key} (in {rows:,} rows)" for key, rows in ignored.items())
        print(f"keys of messages that the chat template does not read: {told}")


def print_answer_end(end: str | None, tokenizer: Any) -> None:
    """Print which token ends answers if the chat template does not end them with the tokenizer's eos_token. `end` is
    the special token that the template writes after an answer; None if it writes none."""
    eos = tokenizer.eos_token
    if end is None:
        print(
            f"warning: the chat template ends an answer with no special token; the prompt learns to end it with {eos}"
        )
    elif end in never_written(tokenizer):
        print(
            f"warning: the chat template ends an answer with {end}, which bases are not trained to write; the prompt "
            f"learns to end it with eos_token {eos}, and both end an answer"
        )
    elif end != eos:
        print(f"The chat template ends an answer with {end}, which now ends answers just as eos_token {eos} does")


def print_model(config: TrainConfig, model: PromptTunedModel, engine: Engine, how: str | None = None) -> None:
    """Print the sizes of prompt and base, and the engine. `how` says how the engine was chosen."""
    if config.model.print_model:
        print(model)
    print(translate(model.trainable_parameters_line()))
    name = str(engine.compute_dtype).removeprefix("torch.")
    bits = quantization_bits(config.model.load_in_8bit, config.model.load_in_4bit)
    held = f" in {bits} bit" if bits else ""
    on_disk = load_config(
        base_path(str(config.model.model_name_or_path))
    )  # that in memory lacks the settings if it was dequantized
    if not bits and (method := stored_method(on_disk)):
        held = f", stored quantized ({method}){'' if is_quantized(model.base) else ' and dequantized'},"
    prompt = config.prompt
    start = f"the one in {prompt.init_adapter}" if prompt.init_adapter else prompt.prompt_tuning_init
    start += f", {described}" if (described := describe_encoder(config, model.prompt)) else ""
    base = f"{config.model.model_name_or_path}{held}"
    print(translate(f"Base {base} on {engine.device}, {name}, {engine}; initial prompt: {start}"))
    if how:
        print(translate(how))
    if engine.device.type == "cpu" and engine.compute_dtype is torch.bfloat16:
        warn_if_bf16_is_slow()


def describe_encoder(config: TrainConfig, prompt: PromptEmbedding) -> str:
    """Return the prompt's reparameterization and the size of what is saved; "" without a reparameterization."""
    settings, (P, H) = config.prompt, prompt.weight.shape
    if settings.prompt_reparameterization == "none":
        return ""
    width = f"--encoder_hidden_size {settings.encoder_hidden_size}"
    return f"reparameterized ({settings.prompt_reparameterization}, {width}), saved as {P} × {H} values"


def product_seconds(dtype: torch.dtype, edge: int = 256) -> float:
    """Return the seconds that a small matrix product takes: the faster of two trials."""
    a, seconds = torch.ones(edge, edge, dtype=dtype), []
    for _ in range(2):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def warn_if_bf16_is_slow(seconds_of: Callable[[torch.dtype], float] = product_seconds) -> None:
    """Print a warning if a matrix product takes much longer in bf16 than in fp32 on the CPU."""
    slower = seconds_of(torch.bfloat16) / seconds_of(torch.float32)
    if slower > LEAST_SLOWER:
        print(
            f"warning: on this CPU a bf16 matrix product takes {slower:.0f} times as long as one in fp32; leave out "
            "--bf16"
        )


def print_steps(
    config: TrainConfig, loader: WindowLoader, devices: int, output_dir: Path, searches: bool = False
) -> None:
    """Print steps and learning rate, and warn if the rate is too low to move a RANDOM prompt. `searches` says whether
    the rate is still to be found."""
    args, peak = config.training, config.training.learning_rate
    total, rows = loader.total_steps, loader.rows_per_step
    made = f"{devices} × {args.per_device_train_batch_size} × {args.gradient_accumulation_steps}"
    made = f"{made}, devices × batch × accumulation"
    made = made if rows == rows_of_a_step(args, devices) else "as in the checkpoint"
    steps = f"{total:,} optimizer steps of {rows} rows{f' ({made})' if devices > 1 else ''}"
    rate = "learning rate to be found" if searches else f"learning rate {peak:g}"
    print(translate(f"{steps}, {rate} ({args.lr_scheduler_type}) → {output_dir}/"))
    if searches:
        return
    move, start = farthest_move(learning_rates(args, peak, total), total), config.prompt
    is_random = start.prompt_tuning_init == "RANDOM" and not start.init_adapter
    if is_random and start.prompt_reparameterization == "none" and move < LEAST_MOVE:
        needed = peak / move
        print(
            translate(
                f"warning: --learning_rate {peak:g} over {total:,} steps moves no value of the prompt by more than "
                f"about {move:.2g}, while a RANDOM prompt's values have size 1: it will not learn. Values of size 1 "
                f"need about --learning_rate {needed:.1g}"
            )
        )


def _shortened(text: str, width: int = 160) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= width else text[: width - 1] + "…"
