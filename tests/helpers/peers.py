"""The peer that results are compared with: PEFT's prompt tuning over the same base, and naive references."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.data.collate import Batch, collate_padded
from softprompt.data.tokenization import Example, count_targets
from softprompt.engines.base import Engine
from softprompt.engines.factory import engine_for_inference
from softprompt.generation.generator import Generator, in_request_order, make_generator
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.prompt.soft_prompt import PromptEmbedding


def peft_model(base: PreTrainedModel, prompt: Tensor) -> peft.PeftModel:
    """PEFT over a copy of `base`, its prompt set to `prompt` [P, H]."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt), prompt_tuning_init="RANDOM")
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        peft_prompt(model).copy_(prompt)
    return model


def peft_prompt(model: peft.PeftModel) -> torch.nn.Parameter:
    """The one parameter that PEFT trains, [P, H]."""
    return model.prompt_encoder["default"].embedding.weight


def collated(rows: Sequence[Example], pad_token_id: int = 3, padding_side: str = "left") -> Batch:
    """A padded batch as Trainer's collator makes it for PEFT, on the tokenizer's side; ours is always padded on the
    right."""
    batch = collate_padded(rows, pad_token_id)
    if padding_side == "right":
        return batch
    pads = [batch.input_ids.shape[1] - len(row.input_ids) for row in rows]
    return Batch(*(torch.stack([r.roll(n) for r, n in zip(t, pads, strict=True)]) for t in batch))


def random_examples(n: int, longest: int, vocab_size: int = 300, seed: int = 0) -> list[Example]:
    """`n` rows of odd lengths up to `longest`, each with an untrained part of at least one token and one target."""
    draw = torch.Generator().manual_seed(seed)

    def below(high: int, low: int = 0) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    rows = []
    for _ in range(n):
        length = below(longest + 1, 2)
        ids = torch.randint(4, vocab_size, (length,), generator=draw).tolist()
        asked = below(length, 1)
        rows.append(Example(ids, [-100] * asked + ids[asked:]))
    return rows


def naive_loss(base: PreTrainedModel, prompt: Tensor, rows: Sequence[Example]) -> Tensor:
    """Mean loss over the targets of all rows, each row run alone, unpadded, one log-probability after the other."""
    losses = []
    for row in rows:
        words = base.get_input_embeddings()(torch.tensor(row.input_ids))  # [T, H]
        logits = base(inputs_embeds=torch.cat([prompt, words])[None]).logits[0]  # [P+T, V]
        log_probabilities = logits.float().log_softmax(-1)
        for at, label in enumerate(row.labels):
            if label != -100:
                losses.append(-log_probabilities[len(prompt) + at - 1, label])
    return torch.stack(losses).mean()


def naive_gradient(base: PreTrainedModel, start: Tensor, rows: Sequence[Example]) -> tuple[float, Tensor]:
    """`naive_loss` behind the prompt `start` [P, H], and its gradient [P, H]."""
    values = start.clone().requires_grad_()
    mean = naive_loss(base, values, rows)
    mean.backward()
    assert values.grad is not None
    return mean.item(), values.grad


def gradient_of(engine: Engine, start: Tensor, rows: Sequence[Example]) -> tuple[float, Tensor]:
    """An engine's mean loss over the targets, and its gradient [P, H], on the CPU."""
    prompt, targets = PromptEmbedding(start).to(engine.device), sum(map(count_targets, rows))
    total, count = engine.accumulate(prompt, rows, 1 / targets)
    assert count == targets and prompt.weight.grad is not None
    return total.item() / targets, prompt.weight.grad.cpu()


def peft_gradient(
    base: PreTrainedModel, start: Tensor, rows: Sequence[Example], dtype: torch.dtype = torch.float32
) -> tuple[float, Tensor]:
    """PEFT's mean loss and gradient [P, H] in autocast, on the base's device. Rows are padded on the right: with pads
    between prompt and text, transformers' windows would lose the prompt."""
    model, device = peft_model(base, start), base.device
    batch = collated(rows, padding_side="right").to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    before = logits[:, -batch.labels.shape[1] - 1 : -1].flatten(0, 1).float()  # each token's predictor
    loss = torch.nn.functional.cross_entropy(before, batch.labels.flatten())
    loss.backward()
    gradient = peft_prompt(model).grad
    assert gradient is not None
    return loss.item(), gradient.cpu()


def generator_of(kind: str, base: PreTrainedModel, tokenizer: Any) -> Generator:
    return make_generator(engine_for_inference(kind, base, tokenizer, torch.float32), base, tokenizer)


def answers_of(
    kind: str,
    base: PreTrainedModel,
    tokenizer: Any,
    asked: Sequence[tuple[Sequence[int], Tensor | None]],
    settings: GenerationSettings,
    batch_size: int = 8,
) -> list[list[int]]:
    """Answers of the packed or the padded engine to texts behind their prompts [P, H], in order."""
    requests = [Request(ids, settings, prompt) for ids, prompt in asked]
    return list(in_request_order(generator_of(kind, base, tokenizer).generate(requests, batch_size)))


def greedy_alone(
    base: PreTrainedModel, ids: Sequence[int], prompt: Tensor | None, new_tokens: int, ends: Sequence[int] = (2,)
) -> list[int]:
    """A greedy answer by the definition: the whole row once more for every token. A token whose logit leads by less
    than 1e-4 is refused: there rounding may choose another."""
    answer, lead = greedy_and_lead(base, ids, prompt, new_tokens, ends)
    assert lead > 1e-4, "choose another seed"
    return answer


@torch.no_grad()
def greedy_and_lead(
    base: PreTrainedModel, ids: Sequence[int], prompt: Tensor | None, new_tokens: int, ends: Sequence[int] = (2,)
) -> tuple[list[int], float]:
    """A greedy answer by the definition, and by how much the logit of each of its tokens leads at least."""
    row, lead = list(ids), math.inf
    for _ in range(new_tokens):
        words = base.get_input_embeddings()(torch.tensor(row))  # [T, H]
        words = words if prompt is None else torch.cat([prompt, words])
        two = base(inputs_embeds=words[None]).logits[0, -1].topk(2)
        lead = min(lead, float(two.values[0] - two.values[1]))
        if two.indices[0] in ends:
            break
        row.append(int(two.indices[0]))
    return row[len(ids) :], lead
