"""Load and check the parts of a run (rows, base, prompt), and describe them on stdout. Nothing is written to the output
folder."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.config.validation import quantization_bits
from softprompt.data.build_data import make_loader, make_template, read_rows, tokenize_rows
from softprompt.data.chat_template import ignored_keys
from softprompt.data.dataloader import WindowLoader
from softprompt.data.dataset import Row
from softprompt.data.template import CHAT, Template
from softprompt.data.tokenization import Tokenized
from softprompt.distributed.process_group import World
from softprompt.mini.scope import is_mini
from softprompt.models.base_files import weight_files
from softprompt.models.bloom_weights import is_bloom
from softprompt.models.fsdp import ShardedLayers, shard_layers
from softprompt.models.loading import (
    base_path,
    freeze_on_device,
    load_config,
    load_tokenizer,
    read_base,
)
from softprompt.models.meta_loading import load_meta_model
from softprompt.models.precision import resolve_device, resolve_dtype
from softprompt.models.quantization import COMPRESSED, check_bitsandbytes, check_not_stored_quantized, stored_method
from softprompt.models.weight_offload import load_streamed
from softprompt.runs.output_dir import choose_output_dir
from softprompt.training.console import print_answer_end, print_data, print_rows
from softprompt.training.resume import StartingPoint
from softprompt.training.tensorboard import check_installed
from softprompt.utils.atomic_io import check_writable
from softprompt.utils.errors import ConfigError
from softprompt.utils.fingerprints import fingerprint_of_base, fingerprint_of_stored_base
from softprompt.utils.progress import shows_bars
from softprompt.utils.safetensors_io import StoredTensor
from softprompt.utils.shell_commands import command
from softprompt.utils.tokenizer_fingerprint import tokenizer_fingerprints
from softprompt.utils.torchrun_env import launched_by_torchrun
from softprompt.utils.translation import translate

FIRST_ROWS = 100  # number of training rows that are kept as text; one of them becomes the question of the `Try:` line


class RunData(NamedTuple):
    """Tokenized rows, with the tokenizer and the template that produced them.

    Attributes:
        template: The run's template, in which the columns that are empty in some training rows are optional.
        train: The training rows; with `--streaming`, only the first ones.
        held_out: The held-out rows; None if there are none.
        held_out_texts: The held-out rows as text, including those without a target, which `held_out` leaves out.
        seen: For each example of `held_out`, whether its row is among the rows of `train`; empty if there are none.
        loader: Yields the training rows of each optimizer step, those of all ranks together.
        first_rows: The first training rows as text.
        end: The special token that the template writes after an answer; None if it writes none.
        streamed: Whether training rows are read during training (`--streaming`).
        fingerprints: Hashes of the contents of the rows and the tokenizer, by name.
    """

    tokenizer: Any
    template: Template
    train: Tokenized
    held_out: Tokenized | None
    held_out_texts: Sequence[Row]
    seen: Sequence[bool]
    loader: WindowLoader
    first_rows: Sequence[Row]
    end: str | None
    streamed: bool
    fingerprints: Mapping[str, str]


class Base(NamedTuple):
    """The base model.

    Attributes:
        model: A transformers model. The parameters of its layers may be on the meta device.
        blocks: If `model` does not hold all of its layers itself: where their tensors are stored, or the sharded
            layers; else None.
        fingerprint: {"base": hash of the weights}; empty on a rank that does not compute the hash.
    """

    model: PreTrainedModel
    blocks: Mapping[str, StoredTensor] | ShardedLayers | None
    fingerprint: Mapping[str, str]


def check_places(start: StartingPoint, world: World, check: Callable[[TrainConfig, Path], None] | None = None) -> Path:
    """Choose and return the output folder. Check devices, folders, libraries and the base's configuration now, so that
    the run does not fail later. On rank 0, also call `check` with the settings and the output folder.

    Raises:
        ConfigError: A device, a folder or a library is missing, or `--shard_base` is given without torchrun.
        ModelError: The base's configuration shows that no prompt can be trained for it.
        OutputError: The output folder cannot be used.
    """
    config = start.config
    resolve_device(config.model.device)
    output_dir = choose_output_dir(config, start.checkpoint)
    if config.sharing.report_to == "tensorboard":
        check_installed()
    if config.model.offload_folder:
        offload = Path(config.model.offload_folder)
        if offload.exists() and not offload.is_dir():
            raise ConfigError(
                f"--offload_folder {offload}: is not a folder; name a folder, or a path where one can be created"
            )
        check_writable(offload, "--offload_folder")
    if config.model.shard_base and not launched_by_torchrun():
        raise ConfigError(
            "--shard_base shards a base among several processes, and there is only one; start several with "
            f"{command('train', 'torchrun --nproc_per_node=N')} …, or give --shard_base false"
        )
    if config.model.shard_base and world.size == 1:
        print("--shard_base: there is one process, which holds the whole base")
    if check and world.is_main:
        check(config, output_dir)
    _check_quantization(config)
    return output_dir


def _check_quantization(config: TrainConfig) -> None:
    """Check the base's configuration, whether it is stored quantized, and the flags that this excludes.

    Raises:
        ConfigError: bitsandbytes or accelerate is missing; or see `_check_offload`.
        ModelError: No prompt can be trained for the base, or not with these flags.
    """
    path = path_of_base(config)
    base_config = load_config(path)
    for flag in ("load_in_8bit", "load_in_4bit", "stream_base", "shard_base"):
        if getattr(config.model, flag):
            check_not_stored_quantized(base_config, path, f"--{flag}")
    if config.model.load_in_8bit or config.model.load_in_4bit:
        check_bitsandbytes()
    _check_offload(config, base_config)


def _check_offload(config: TrainConfig, base_config: Any) -> None:
    """Check that the activations between blocks can be offloaded if a setting that is given now asks for it.

    Raises:
        ConfigError: They cannot, because the blocks are not run one by one (see `factory.make_engine`).
    """
    model = config.model
    named = [f"--{name}" for name in ("offload_folder", "max_activation_gib") if config.given.get(name) is not None]
    by_blocks = model.stream_base or model.shard_base or model.load_in_8bit or model.load_in_4bit
    if not is_bloom(base_config):
        why = f"only BLOOM is run block by block, and {model.model_name_or_path} is of type {base_config.model_type}"
    elif model.engine == "padded":
        why = "--engine padded does not run a base block by block"
    elif not (by_blocks or stored_method(base_config) not in (None, COMPRESSED)):
        why = "only used with --stream_base, --shard_base, --load_in_8bit or --load_in_4bit"
    else:
        return
    if named:
        raise ConfigError(f"{' and '.join(named)}: {why}; leave {'them' if named[1:] else 'it'} out")


def load_data(config: TrainConfig, rows_per_step: int) -> RunData:
    """Read and tokenize the rows.

    Args:
        rows_per_step: Number of rows of an optimizer step, over all ranks.

    Raises:
        DataError: Rows cannot be read, or none of them can be used for training.
        ModelError: The base has no usable tokenizer.
    """
    template = make_template(config)
    rows = read_rows(config, template)
    print_rows(config, rows.train[0], rows.source.rows if rows.source else len(rows.train), rows.notices)
    tokenizer = load_tokenizer(path_of_base(config))
    train, held_out = tokenize_rows(config, template, tokenizer, rows)
    is_chat = template.spec == CHAT
    ignored = ignored_keys(chain(rows.train, rows.held_out), tokenizer) if is_chat else {}
    print_data(train, held_out, config.data.buffer_size if rows.source else None, ignored)
    end, seen = template.end(rows.train[0], tokenizer), rows.seen
    print_answer_end(end, tokenizer)
    return RunData(
        tokenizer,
        template.of_rows(rows.train),
        train,
        held_out,
        rows.held_out,
        [seen[number] for number in held_out.kept] if held_out else [],
        make_loader(config, rows, train, tokenizer, rows_per_step),
        rows.train[:FIRST_ROWS],
        end,
        rows.source is not None,
        {**rows.fingerprints, **tokenizer_fingerprints(tokenizer)},
    )


def load_run_base(config: TrainConfig, world: World) -> Base:
    """Load the base onto the CPU, without its layers if they will be sharded or streamed. A quantized base is loaded
    onto the run's device.

    Raises:
        ModelError: The base cannot be loaded, or no prompt can be trained for it.
    """
    path, sharded = path_of_base(config), is_sharded(config, world)
    if not (shows_bars() or is_mini(config.model.model_name_or_path)):
        print(translate(f"loading the base {config.model.model_name_or_path} …"))
    bits = quantization_bits(config.model.load_in_8bit, config.model.load_in_4bit)
    if sharded:
        model, stored = load_meta_model(path, "--shard_base")
    elif config.model.stream_base:
        model, stored = load_streamed(path)
    else:
        model, stored = read_base(path, *_device_and_dtype(config), bits), None
    fingerprint = {}
    if world.is_main or not sharded:  # with sharding, hashing on each rank would read the whole base
        keep, files, on_disk = not config.training.dry_run, weight_files(path), load_config(path)
        if bits or stored_method(on_disk):  # what is in memory may depend on the device
            fingerprint["base"] = fingerprint_of_stored_base(on_disk, files, keep)
        else:
            fingerprint["base"] = fingerprint_of_base(model, files, keep, blocks=stored)
    return Base(model, stored, fingerprint)


def freeze_base(config: TrainConfig, base: Base) -> Base:
    """Freeze the base and move it to its device.

    Raises:
        ModelError: The base is quantized, and no gradient passes through it.
    """
    return base._replace(model=freeze_on_device(base.model, *_device_and_dtype(config)))


def shard_base(config: TrainConfig, base: Base, world: World) -> Base:
    """Shard the layers of a frozen base among the ranks, if the settings ask for it. No rank waits for another one.

    Raises:
        TrainingError: A file of the base can no longer be read.
    """
    if not (isinstance(base.blocks, Mapping) and is_sharded(config, world)):
        return base
    return base._replace(blocks=shard_layers(base.model, base.blocks, world))


def _device_and_dtype(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    device = resolve_device(config.model.device)
    return device, resolve_dtype(device, config.model.bf16, config.model.fp16)


def path_of_base(config: TrainConfig) -> str:
    """Return the path or hub id of the base."""
    return base_path(str(config.model.model_name_or_path))


def is_sharded(config: TrainConfig, world: World) -> bool:
    """Whether the base is sharded among several ranks."""
    return config.model.shard_base and world.size > 1
