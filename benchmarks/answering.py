"""The sides of `generate.py`: PEFT's `generate`, transformers' own behind the same prompts, and this project's
generator. All answer the same questions greedily, to lengths that are given, as no end token is ever taken."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import peft
import torch
from contestants import quiet
from measure import clock
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.generation.continuous_batching import PackedGenerator
from softprompt.generation.hf_generate import behind, padded
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.models.bloom_weights import ResidentWeights


class Question(NamedTuple):
    """A text's token ids, the number of its adapter, and how many tokens its answer has."""

    ids: list[int]
    adapter: int
    new_tokens: int


class Lap(NamedTuple):
    """Seconds of answering, and how many tokens the answers had that were asked for."""

    seconds: float
    tokens: int


class Side:
    """What answers `questions`, `batch` at a time; `prompts` are the adapters' [P, H]."""

    def __init__(self, base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Tensor]):
        self.base, self.tokenizer, self.prompts = base, tokenizer, prompts
        self.device = base.get_input_embeddings().weight.device

    def lap(self, questions: Sequence[Question], batch: int) -> Lap:
        with quiet():
            began = clock(self.device)
            self.answer(questions, batch)
            return Lap(clock(self.device) - began, sum(q.new_tokens for q in questions))

    def answer(self, questions: Sequence[Question], batch: int) -> None:
        """A library that has one adapter at a time takes batches of one adapter each, and lets each batch run until its
        longest answer is done; questions of an adapter are sorted by that, which serves it best."""
        for adapter in dict.fromkeys(q.adapter for q in questions):
            some = sorted((q for q in questions if q.adapter == adapter), key=lambda q: q.new_tokens)
            for start in range(0, len(some), batch):
                self.answer_batch(adapter, some[start : start + batch])

    def answer_batch(self, adapter: int, questions: Sequence[Question]) -> None:
        raise NotImplementedError


class Transformers(Side):
    """transformers' own `generate`, its cache on, the prompt before the words, rows padded on the left."""

    @torch.no_grad()
    def answer_batch(self, adapter: int, questions: Sequence[Question]) -> None:
        words, mask = padded([behind(self.base, q.ids, self.prompts[adapter]) for q in questions])
        most = max(q.new_tokens for q in questions)
        self.base.generate(  # type: ignore[operator]
            inputs_embeds=words, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0
        )


class Peft(Side):
    """PEFT's `generate`, all adapters loaded, switched with `set_adapter`."""

    def __init__(self, base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Tensor]):
        super().__init__(base, tokenizer, prompts)
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=len(prompts[0]), prompt_tuning_init="RANDOM"
        )
        with quiet():
            self.model = peft.get_peft_model(base, config, adapter_name="0").eval()
            for number in range(1, len(prompts)):
                self.model.add_adapter(str(number), config)
            with torch.no_grad():
                for number, prompt in enumerate(prompts):
                    self.model.prompt_encoder[str(number)].embedding.weight.copy_(prompt)

    def answer_batch(self, adapter: int, questions: Sequence[Question]) -> None:
        width = max(len(q.ids) for q in questions)
        ids = torch.tensor([[0] * (width - len(q.ids)) + q.ids for q in questions], device=self.device)
        mask = torch.tensor([[0] * (width - len(q.ids)) + [1] * len(q.ids) for q in questions], device=self.device)
        self.model.set_adapter(str(adapter))
        # peft 0.21.2's cached generation does not run on transformers 5.24, so every step is the whole row once more
        self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(q.new_tokens for q in questions),
            do_sample=False,
            use_cache=False,
            pad_token_id=0,
        )


class Packed(Side):
    """This project's generator: any mixture in one batch."""

    def __init__(self, base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Tensor]):
        super().__init__(base, tokenizer, prompts)
        dtype = base.transformer.h[0].mlp.dense_h_to_4h.weight.dtype
        self.generator = PackedGenerator(ResidentWeights(base, dtype), tokenizer)
        self.never = (base.config.vocab_size,)

    def answer(self, questions: Sequence[Question], batch: int) -> None:
        given = {"do_sample": False, "eos_token_id": self.never}
        settings = {n: GenerationSettings(max_new_tokens=n, **given) for n in {q.new_tokens for q in questions}}
        requests = [Request(q.ids, settings[q.new_tokens], self.prompts[q.adapter]) for q in questions]
        for number, answer in self.generator.generate(requests, batch):
            assert len(answer) == questions[number].new_tokens


SIDES: dict[str, Callable[..., Side]] = {"peft": Peft, "transformers": Transformers, "packed": Packed}
