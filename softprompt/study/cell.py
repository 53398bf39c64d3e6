"""A cell of a study: the settings of one training run, of a hard prompt, or of an ensemble of trained prompts."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from softprompt.config.infer_args import Voting
from softprompt.config.loader import TrainConfig
from softprompt.config.train_args import DEFAULT_NUM_VIRTUAL_TOKENS

ALL = "all"
# Largest length of a folder's name before its hash. File systems limit names to 255 bytes; a Chinese character takes 3.
MAX_NAME_CHARACTERS, MAX_NAME_BYTES = 100, 150
BASE_SETTINGS = ("model_name_or_path", "device", "bf16", "fp16", "engine")
DATA_SETTINGS = (
    *("dataset", "dataset_config_name", "dataset_split", "columns", "template", "max_length", "truncation_side"),
    *("eval_dataset", "eval_split", "eval_rows", "chat_template_date"),
)
PROMPT_SETTINGS = (
    *("num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text", "class_labels", "vocab_population"),
    *("prompt_reparameterization", "encoder_hidden_size"),
)
TRAINING_SETTINGS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_microbatch", "gradient_checkpointing"),
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "deterministic", "per_device_eval_batch_size"),
)
SETTINGS = (*BASE_SETTINGS, *DATA_SETTINGS, *PROMPT_SETTINGS, *TRAINING_SETTINGS)
# Settings that are left out at these values, so that cells which earlier versions finished keep their names.
LEFT_OUT = {"prompt_reparameterization": "none", "encoder_hidden_size": None, "chat_template_date": None}


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Args:
        config: The settings of the run, its seed included.
        rows: Number of training rows, drawn with the seed. None: all.
        trained: Whether the prompt is trained. False for a hard prompt, which is the embeddings of a text, and for an
            ensemble.
        voting: How the members of an ensemble vote; None unless the cell is an ensemble.
        seeds: The seeds whose trained prompts are the members of the ensemble.
    """

    config: TrainConfig
    rows: int | None = None
    trained: bool = True
    voting: Voting | None = None
    seeds: tuple[int, ...] = ()

    def members(self) -> list["Cell"]:
        """Return the cells whose prompts vote in this ensemble, one for each seed."""
        each = (replace(self.config.training, seed=seed) for seed in self.seeds)
        return [Cell(replace(self.config, training=training), self.rows) for training in each]

    def settings(self) -> dict[str, Any]:
        """Return everything that the result depends on, except the content of files, as JSON types."""
        every = {**self.config.as_dict(), "learning_rate": self.config.learning_rate()}
        kept = {name: every[name] for name in (*SETTINGS, "seed") if every[name] != LEFT_OUT.get(name, ...)}
        ensemble = {"voting": self.voting, "seeds": list(self.seeds)} if self.voting else {}
        return {**kept, "rows": self.rows, "trained": self.trained, **ensemble}

    def __str__(self) -> str:
        c = self.config
        if not (self.trained or self.voting):
            return f"{c.model.model_name_or_path} {c.data.dataset} hard prompt {c.prompt.prompt_tuning_init_text!r}"
        tokens = c.prompt.num_virtual_tokens
        of_text = "auto (the length of the text)" if c.prompt.prompt_tuning_init == "TEXT" else None
        length = tokens or of_text or DEFAULT_NUM_VIRTUAL_TOKENS
        seeds = (
            f"{self.voting} of seeds {', '.join(map(str, self.seeds))}" if self.voting else f"seed {c.training.seed}"
        )
        kind, width, rate = c.prompt.prompt_reparameterization, c.prompt.encoder_hidden_size, c.learning_rate()
        encoder = "" if kind == "none" else f"{kind} {f'encoder_hidden_size {width} ' if width else ''}"
        return (
            f"{c.model.model_name_or_path} {c.data.dataset} {c.prompt.prompt_tuning_init} "
            f"{encoder}num_virtual_tokens {length} "
            f"learning_rate {'default' if rate is None else f'{rate:g}'} rows {self.rows or ALL} {seeds}"
        )


def folder_name(cell: Cell, fingerprints: Mapping[str, str]) -> str:
    """Return a readable name with a hash of the settings and of the content of base, tokenizer and rows."""
    content = json.dumps([cell.settings(), dict(fingerprints)], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    readable = re.sub(r"[^\w.-]+", "-", str(cell)).strip(".-")[:MAX_NAME_CHARACTERS]
    readable = readable.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    return f"{readable}-{digest}"
