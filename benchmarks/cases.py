"""The bases and rows that `train.py` trains on: bases of several sizes, and synthetic rows or those of a dataset."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contestants import ROWS_PER_STEP, SEED, quiet
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_pt_utils import get_length_grouped_indices

from softprompt import mini
from softprompt.data.dataset import load_rows
from softprompt.data.template import Template
from softprompt.data.tokenization import IGNORE, Example, tokenize
from softprompt.models.loading import freeze, load_base

SIZES = {
    "49m": {"vocab_size": 46145, "hidden_size": 512, "n_layer": 8, "n_head": 8},
    "560m": {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16},
    "1b4": {"vocab_size": 46145, "hidden_size": 2048, "n_layer": 24, "n_head": 16},
}
LLAMAS = {
    "llama-1b": {  # the sizes of Llama 3.2 1B
        **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "max_position_embeddings": 131072},
    },
    "llama-toy": {
        **{"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    },
}
NAMES = [*SIZES, *LLAMAS]  # of bases with random weights
# Number of rows that a case's rows are chosen from. From this number on, Trainer groups by length within 50 batches.
POOL = 6400
MAX_LENGTH = 256  # of real rows
SPREAD, SHORTEST, LONGEST = 0.7, 2, 512  # lengths of synthetic rows: σ of their logarithms, minimum and maximum
TARGETS = 0.73  # share of a synthetic row's tokens that are targets


@dataclass(frozen=True)
class Base:
    """A base, whose `name` is `mini`, one of NAMES (random weights), or a folder."""

    name: str

    @property
    def folder(self) -> str | None:
        return str(mini.BASE_DIR) if self.name == "mini" else None if self.name in NAMES else self.name

    def config(self) -> Any:
        if self.folder:
            return AutoConfig.from_pretrained(self.folder)
        kind, sizes = ("bloom", SIZES[self.name]) if self.name in SIZES else ("llama", LLAMAS[self.name])
        return CONFIG_MAPPING[kind](**sizes)

    def load(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """Load the base frozen, with linear layers in `dtype` and everything else in fp32, as
        softprompt.models.loading.load_base does. Random weights are drawn on the device."""
        with quiet():
            if self.folder:
                return load_base(self.folder, device, dtype)
            torch.manual_seed(SEED)
            with device:
                return freeze(AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32), dtype)


class Rows(NamedTuple):
    """The rows of a case, for a given number of optimizer steps (windows).

    Attributes:
        plain: The rows of all contestants that do not group by length: rows at equal distances in the pool sorted by
            length, so that a few rows have the same distribution of lengths as the pool. The run shuffles them.
        grouped: Batches that Trainer's group_by_length makes of the whole pool, because a few rows cannot be grouped as
            well as many. The batches are sorted by their number of tokens and divided into as many parts with equal
            numbers of tokens as there are steps; the batch in the middle of each part is taken. So the mean of their
            costs per token is the cost per token of a whole epoch.
    """

    plain: list[Example]
    grouped: list[Example]


class Pool(NamedTuple):
    """Rows to choose from: their name, their lengths in tokens, and a function that returns the row of a number."""

    name: str
    lengths: list[int]
    row: Callable[[int], Example]

    def choose(self, steps: int, rows_per_step: int = ROWS_PER_STEP) -> Rows:
        n = steps * rows_per_step
        by_length = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        if n > len(by_length):
            raise SystemExit(f"{self.name}: {len(by_length)} rows are too few for {steps} steps of {rows_per_step}")
        plain = [by_length[int((i + 0.5) / n * len(by_length))] for i in range(n)]
        grouped = [i for batch in self._batches(steps) for i in batch]
        return Rows([self.row(i) for i in plain], [self.row(i) for i in grouped])

    def _batches(self, steps: int) -> list[list[int]]:
        draw = torch.Generator().manual_seed(SEED)
        order = get_length_grouped_indices(self.lengths, ROWS_PER_STEP, generator=draw)
        full = range(0, len(order) - ROWS_PER_STEP + 1, ROWS_PER_STEP)
        batches = sorted((order[at : at + ROWS_PER_STEP] for at in full), key=self._tokens)
        up_to = torch.tensor([self._tokens(b) for b in batches]).cumsum(0)
        shares = (torch.arange(steps) + 0.5) / steps * up_to[-1]
        return [batches[i] for i in torch.searchsorted(up_to, shares).tolist()]

    def _tokens(self, batch: Sequence[int]) -> int:
        return sum(self.lengths[i] for i in batch)


def synthetic(mean: int, vocab_size: int) -> Pool:
    """Return a pool of rows of random tokens; the last 73 % of each row are targets. Lengths are log-normal with
    σ = 0.7, clipped to 2 … 512, and scaled so that their mean after clipping is `mean`."""
    noise = (SPREAD * torch.randn(POOL, generator=torch.Generator().manual_seed(SEED))).exp()
    low, high = 0.0, float(LONGEST)
    for _ in range(50):
        scale = (low + high) / 2
        lengths = (scale * noise).round().clamp(SHORTEST, LONGEST)
        low, high = (scale, high) if lengths.mean() < mean else (low, scale)
    chosen = lengths.int().tolist()

    def row(i: int) -> Example:
        ids = torch.randint(4, vocab_size, (chosen[i],), generator=torch.Generator().manual_seed(i)).tolist()
        asked = max(1, round((1 - TARGETS) * len(ids)))
        return Example(ids, [IGNORE] * asked + ids[asked:])

    return Pool(f"synthetic, mean {mean}", chosen, row)


def with_real_lengths(vocab_size: int) -> Pool:
    """Rows of random tokens, with the numbers of tokens and targets of 512 rows at even distances along the 26,857
    usable ones of Chinese Alpaca (a tokenizer of 46,145 words, the default template, cut at 256 tokens)."""
    sizes = json.loads(Path(__file__).with_name("alpaca_lengths.json").read_text())

    def row(i: int) -> Example:
        tokens, targets = sizes[i % len(sizes)]
        ids = torch.randint(4, vocab_size, (tokens,), generator=torch.Generator().manual_seed(i)).tolist()
        return Example(ids, [IGNORE] * (tokens - targets) + ids[tokens - targets :])

    return Pool("rows as long as Alpaca's", [sizes[i % len(sizes)][0] for i in range(POOL)], row)


def from_dataset(source: str, tokenizer: Any, vocab_size: int) -> Pool:
    """Return a pool of the rows of a dataset (any value of train.py's --dataset) in the default template, truncated to
    256 tokens. Of a large dataset, about POOL rows at equal distances are taken."""
    template = Template()
    task = source.removeprefix("mini:")
    rows = mini.rows(task, "train") if task != source else load_rows(source, template, {})
    rows = rows[:: max(1, len(rows) // POOL)]
    examples = tokenize(rows, tokenizer, template, MAX_LENGTH).examples
    largest = max(max(e.input_ids) for e in examples)
    if largest >= vocab_size:
        raise SystemExit(f"{source}: token {largest} is outside the base's {vocab_size} words; give its --tokenizer")
    return Pool(Path(source).name, [len(e.input_ids) for e in examples], examples.__getitem__)
