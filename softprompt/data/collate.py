"""Cut rows into micro-batches, and convert them to padded or packed tensors."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.data.tokenization import IGNORE, Example
from softprompt.utils.transfer import to_device


class Batch(NamedTuple):
    """A padded micro-batch: three tensors [B, T] int64. Padding is on the right and has mask 0 and label -100."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(to_device(t, device) for t in self))


def collate_padded(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad B examples on the right to the length T of the longest one, as Trainer's DataCollatorForSeq2Seq does with a
    tokenizer that pads on the right.

    The tokenizer's padding side is ignored. The prompt is prepended to each row, so left padding would lie between the
    prompt and the text. Mechanisms that use a token's index instead of its position (sliding windows, MPT's ALiBi)
    would then compute too large a distance between prompt and text.

    Returns:
        A batch of tensors [B, T] int64.
    """
    width = max(len(e.input_ids) for e in examples)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (width - len(values))]

    return Batch(
        torch.tensor([padded(e.input_ids, pad_token_id) for e in examples], dtype=torch.int64),
        torch.tensor([padded([1] * len(e.input_ids), 0) for e in examples], dtype=torch.int64),
        torch.tensor([padded(e.labels, IGNORE) for e in examples], dtype=torch.int64),
    )


class Packed(NamedTuple):
    """A micro-batch without padding: S tokens of B rows, concatenated.

    Each row is truncated after the token that predicts its last target, because later tokens affect neither the loss
    nor the gradient. `predictors` are indices into the S tokens: those of tokens whose next token is a target.
    `targets` are the ids of these next tokens. `first_targets` are the ids of those targets that are the first token of
    their row; the last virtual token predicts them, so they have no predictor among the S tokens.
    """

    input_ids: Tensor  # [S] int64
    lengths: list[int]  # number of tokens of each row, above 0; their sum is S
    predictors: Tensor  # [n] int64
    targets: Tensor  # [n] int64
    first_targets: Tensor  # [f] int64

    def to(self, device: torch.device) -> "Packed":
        return Packed(*(to_device(t, device) if isinstance(t, Tensor) else t for t in self))


def cut_by_tokens(
    examples: Sequence[Example], tokens_per_microbatch: int, pad_behind: int | None = None
) -> Iterator[list[Example]]:
    """Cut a window into micro-batches of at most `tokens_per_microbatch` tokens, or of one longer row.

    Rows are sorted by length, longest first. So the rows of a micro-batch have similar lengths, and a lack of memory
    tends to show in the first micro-batch.

    Args:
        pad_behind: None if the rows are packed. If they are padded, the number of virtual tokens before each row;
            padding and virtual tokens then count as tokens, too.
    """
    part: list[Example] = []
    tokens = 0
    for example in sorted(examples, key=lambda e: len(e.input_ids), reverse=True):
        longest = len((part or [example])[0].input_ids)
        more = len(example.input_ids) if pad_behind is None else pad_behind + longest
        if part and tokens + more > tokens_per_microbatch:
            yield part
            part, tokens = [], 0
            more = len(example.input_ids) + (pad_behind or 0)
        part.append(example)
        tokens += more
    if part:
        yield part


def has_targets(batch: Packed) -> bool:
    """Whether a micro-batch has a target. One without targets contributes neither loss nor gradient."""
    return len(batch.targets) + len(batch.first_targets) > 0


def collate_packed(examples: Sequence[Example]) -> Packed:
    """Concatenate rows and collect their targets. Each row is truncated as `Packed` describes; a row without a
    predictor adds no tokens."""
    ids: list[int] = []
    lengths, predictors, targets, first_targets = [], [], [], []
    for row in examples:
        at = [i for i, label in enumerate(row.labels) if label != IGNORE]
        if at and at[0] == 0:
            first_targets.append(row.labels[at.pop(0)])
        if at:
            predictors += [len(ids) + i - 1 for i in at]
            targets += [row.labels[i] for i in at]
            ids += row.input_ids[: at[-1]]
            lengths.append(at[-1])
    return Packed(_int64(ids), lengths, _int64(predictors), _int64(targets), _int64(first_targets))


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
