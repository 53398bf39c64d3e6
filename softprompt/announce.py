"""What a run says before it starts: its rows, its model, its steps, and whether its learning rate can do anything."""

from pathlib import Path

from softprompt.config import TrainConfig
from softprompt.data import Tokenized
from softprompt.model import Engine, SoftPromptedModel
from softprompt.rows import Row
from softprompt.trainer import farthest_move, learning_rates, rows_of_a_step, total_steps

# A RANDOM prompt's values have size 1: carried less far than this, they are what they were.
LEAST_MOVE = 0.1


def tell_rows(config: TrainConfig, rows: list[Row]) -> None:
    """Count, columns and first row, as the article shows them."""
    print(f"Dataset {config.data.dataset}: {len(rows):,} rows, columns {', '.join(rows[0])}")
    for name, value in rows[0].items():
        print(f"  {name}: {_shortened(str(value))}")


def tell_data(data: Tokenized, held_out: Tokenized | None) -> None:
    print(f"Training: {data}")
    if held_out:
        print(f"Held out: {held_out}")


def tell_model(config: TrainConfig, model: SoftPromptedModel, engine: Engine) -> None:
    if config.model.print_model:
        print(model)
    print(model.trainable_parameters_line())
    name = str(engine.compute_dtype).removeprefix("torch.")
    print(f"Base {config.model.model_name_or_path} on {engine.device}, {name}, {engine}; {_start(config)}")


def tell_steps(config: TrainConfig, n_examples: int, rows: int, devices: int, output_dir: Path) -> None:
    """Steps and learning rate, and a warning where a RANDOM prompt cannot get anywhere with it."""
    args, peak = config.training, config.learning_rate
    total = total_steps(n_examples, args, rows)
    made = f"{devices} × {args.per_device_train_batch_size} × {args.gradient_accumulation_steps}"
    made = f"{made}, devices × batch × accumulation" if rows == rows_of_a_step(args, devices) else "as the run began"
    print(
        f"{total:,} optimizer steps of {rows} rows{f' ({made})' if devices > 1 else ''}, learning rate {peak:g} "
        f"({args.lr_scheduler_type}) → {output_dir}/"
    )
    move = farthest_move(learning_rates(args, peak, total), total)
    if config.prompt.prompt_tuning_init == "RANDOM" and not config.prompt.init_adapter and move < LEAST_MOVE:
        needed = peak / move
        print(
            f"warning: --learning_rate {peak:g} over {total:,} steps moves no value of the prompt by more than about "
            f"{move:.2g}, while a RANDOM prompt's values have size 1: it will not learn. Values of size 1 need about "
            f"--learning_rate {needed:.1g}"
        )


def _start(config: TrainConfig) -> str:
    prompt = config.prompt
    return f"prompt from {prompt.init_adapter}" if prompt.init_adapter else f"prompt starts {prompt.prompt_tuning_init}"


def _shortened(text: str, width: int = 160) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= width else text[: width - 1] + "…"
