"""Build the mini base from the grammar alone: train its tokenizer, generate its corpus, pre-train it.

python -m softprompt.mini.make [--size small|medium|large] [--output_dir DIR] [--steps N] [--seed N]

The package contains the small base. The larger ones are for experiments with the size of a base: they have the same
tokenizer and are trained on the same rows in the same order, and each has about twice as many parameters as the one
before.
"""

import argparse
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from softprompt.mini import BASE_DIR, words
from softprompt.mini.corpus import Row, corpus
from softprompt.utils.atomic_io import check_writable, write_folder
from softprompt.utils.errors import OutputError, SoftpromptError

BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # BLOOM's pre-tokenizer
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
EOS, PAD = 2, 3
VOCABULARY = 1800
STEPS, BATCH, PEAK_LR, WARMUP_STEPS = 4000, 64, 4e-3, 100
COMMON = 15  # a character that occurs at least this often in 20,000 rows becomes a token
REFERENCE_HIDDEN_SIZE = 128  # PEAK_LR is for this H; it scales as 1 / H (Yang et al. 2022, arXiv:2203.03466)
SORTED = 50  # number of batches whose rows are sorted by length together, to reduce padding
PROMPT_WEIGHT = 0.03  # the weight of a prompt token in the loss; an answer token has 1


class Size(NamedTuple):
    """Hidden size H, layers L and heads N of a base."""

    hidden_size: int
    n_layer: int
    n_head: int


SIZES = {"small": Size(128, 5, 4), "medium": Size(192, 5, 6), "large": Size(256, 6, 8)}


class Batch(NamedTuple):
    """A batch of rows, padded on the right."""

    ids: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] int64, 0 on padding
    weights: Tensor  # [B, T] float32, the weight of each token as a target


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with BLOOM's pre-tokenizer and special tokens. It has a token for every byte, so
    it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BLOOM_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_words_of_tokenizer(seed), trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def _words_of_tokenizer(seed: int) -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on: first every common character of the corpus, then words.

    There are no sentences, so no token spans two words, and unseen sentences are tokenized in the same way as known
    ones.
    """
    rows = islice(corpus(seed), 20_000)
    counts = Counter(character for row in rows for character in row.prompt + row.answer)
    for character in sorted(character for character, count in counts.items() if count >= COMMON):
        yield from [character] * 1000
    yield from ["\n\n", "Human:", "Assistant:", "good", "bad", *(d.english for d in words.DOMAINS.values())] * 1000
    lists = [astuple(domain) for domain in words.DOMAINS.values()] + [astuple(group) for group in words.SHARED_GROUPS]
    others = [words.GOOD, words.BAD, words.LIKE, words.DISLIKE, words.PLEASED, words.DISPLEASED, words.ALSO, words.BUT]
    forms = [words.DEGREES, words.NEGATIONS, words.OPENINGS, words.ALTHOUGH]
    for word in _strings(lists) + _strings(others) + _strings(forms):
        yield from [word] * 5 if 1 < len(word) <= 4 else ()


def _strings(value: Any) -> list[str]:
    """Return all strings in nested lists, tuples and dicts; 太_了 counts as two strings."""
    if isinstance(value, str):
        return value.split("_")
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _strings(item)]


def make_model(seed: int, vocabulary: int, size: Size) -> BloomForCausalLM:
    """Return a BLOOM with random fp32 weights and `vocabulary` (V) tokens; the weights depend only on the seed."""
    torch.manual_seed(seed)
    config = BloomConfig(vocab_size=vocabulary, **size._asdict())
    config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, 1, EOS
    return BloomForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Yield an endless sequence of batches, in random order. The rows of a batch have similar lengths."""
    rng = random.Random(f"batches {seed}")
    stream = corpus(seed)
    while True:
        encoded = [_encode(tokenizer, rng, row) for row in islice(stream, BATCH * SORTED)]
        encoded.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(encoded), BATCH))
        rng.shuffle(starts)
        for start in starts:
            yield _collate(encoded[start : start + BATCH])


def _encode(tokenizer: PreTrainedTokenizerFast, rng: random.Random, row: Row) -> tuple[list[int], list[float]]:
    """Return token ids and their weights as targets. Some prompts are tokenized in random pieces, so that the base also
    learns tokens that are parts of words."""
    cuts = sorted(rng.randint(0, len(row.prompt)) for _ in range(rng.choice((0, 0, 0, 0, 2, 4))))
    ends = [0, *cuts, len(row.prompt)]
    pieces = [row.prompt[start:end] for start, end in pairwise(ends)]
    *prompt, answer = tokenizer([*pieces, row.answer])["input_ids"]
    before = [token for piece in prompt for token in piece]
    return [*before, *answer, EOS], [PROMPT_WEIGHT] * len(before) + [1.0] * (len(answer) + 1)


def _collate(rows: Sequence[tuple[list[int], list[float]]]) -> Batch:
    ids = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True, padding_value=PAD)
    weights = pad_sequence([torch.tensor(weights) for _, weights in rows], batch_first=True)
    return Batch(ids, (weights > 0).long(), weights)


def weighted_loss(model: BloomForCausalLM, batch: Batch) -> Tensor:
    """Return the weighted mean of the tokens' cross entropies in nats, an fp32 scalar with a gradient."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]  # [B, T-1, V]
    each = F.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")  # [B, T-1]
    weights = batch.weights[:, 1:]
    return (each * weights).sum() / weights.sum()


def lr_at(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to zero."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def pretrain(model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Pre-train with AdamW. Every batch is new, so the model cannot overfit."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    peak = PEAK_LR * REFERENCE_HIDDEN_SIZE / model.config.hidden_size
    model.train()
    progress = tqdm(islice(batches(tokenizer, seed), steps), total=steps, desc="pre-training", mininterval=1)
    for step, batch in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, peak)
        loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def save(model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the base in the format of the hub, with fp16 weights. An existing folder is replaced atomically."""
    with tempfile.TemporaryDirectory() as temporary:
        logging.disable_progress_bar()
        model.half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_folder(folder, {path.name: path.read_bytes() for path in Path(temporary).iterdir()})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m softprompt.mini.make", description="Build the mini base.")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the base (default: %(default)s)")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder to write it to (default: the package, or runs/mini-SIZE for a larger base)",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of pre-training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of corpus and weights (default: %(default)s)")
    args = parser.parse_args(arguments)
    output_dir = args.output_dir or (BASE_DIR if args.size == "small" else Path("runs") / f"mini-{args.size}")
    try:
        check_writable(output_dir, "--output_dir")
        if output_dir.resolve() != BASE_DIR.resolve() and output_dir.exists() and any(output_dir.iterdir()):
            raise OutputError(f"--output_dir {output_dir} is not empty; name another folder, or remove it")
        tokenizer = make_tokenizer(args.seed)
        model = make_model(args.seed, len(tokenizer), SIZES[args.size])
        print(f"{len(tokenizer):,} words, {model.num_parameters():,} parameters")
        pretrain(model, tokenizer, args.steps, args.seed)
        save(model, tokenizer, output_dir)
    except SoftpromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
