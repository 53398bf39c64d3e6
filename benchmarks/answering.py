"""The contestants of `generate.py`: PEFT's `generate`, transformers' own `generate` behind the same prompts, and this
project's generator.

All answer the same questions greedily. No end token is ever taken, so each answer has exactly the length asked for.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import peft
import torch
from contestants import quiet
from measure import clock
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from softprompt.engines.decoder_schedule import DecoderSchedule
from softprompt.generation.bloom_step import BloomStepModel
from softprompt.generation.continuous_batching import ContinuousBatchingGenerator
from softprompt.generation.decoder_step import DecoderStepModel
from softprompt.generation.hf_generate import pad_left, prepend_prompt
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.models.bloom_weights import ResidentWeights, is_bloom
from softprompt.models.precision import autocast


class Question(NamedTuple):
    """Token ids of a text, the index of its adapter, and the number of tokens of its answer."""

    ids: list[int]
    adapter: int
    new_tokens: int


class Timing(NamedTuple):
    """Seconds that all answers took, and the number of tokens asked for."""

    seconds: float
    tokens: int


class Contestant:
    """Answers questions with adapters over one base. `prompts` are the adapters' prompts, each [P, H]."""

    def __init__(self, base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Tensor]):
        self.base, self.tokenizer, self.prompts = base, tokenizer, prompts
        self.device = base.get_input_embeddings().weight.device

    def time(self, questions: Sequence[Question], batch_size: int) -> Timing:
        with quiet():
            start = clock(self.device)
            self.answer(questions, batch_size)
            return Timing(clock(self.device) - start, sum(q.new_tokens for q in questions))

    def answer(self, questions: Sequence[Question], batch_size: int) -> None:
        """Answer in batches of one adapter each, for libraries that have one active adapter at a time.

        A batch runs until its longest answer is finished. Questions are sorted by the length of their answers, which is
        the best case for such a library.
        """
        for adapter in dict.fromkeys(q.adapter for q in questions):
            some = sorted((q for q in questions if q.adapter == adapter), key=lambda q: q.new_tokens)
            for start in range(0, len(some), batch_size):
                self.answer_batch(adapter, some[start : start + batch_size])

    def answer_batch(self, adapter: int, questions: Sequence[Question]) -> None:
        raise NotImplementedError


def compute_dtype(base: PreTrainedModel) -> torch.dtype:
    """The dtype of the base's linear layers."""
    head = base.get_output_embeddings()
    return next(m.weight.dtype for m in base.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)


class Transformers(Contestant):
    """transformers' own `generate` with its KV cache: embeddings of prompt and text, rows padded on the left."""

    @torch.no_grad()
    def answer_batch(self, adapter: int, questions: Sequence[Question]) -> None:
        words, mask = pad_left([prepend_prompt(self.base, q.ids, self.prompts[adapter]) for q in questions])
        most = max(q.new_tokens for q in questions)
        with autocast(self.device, compute_dtype(self.base)):
            self.base.generate(  # type: ignore[operator]
                inputs_embeds=words, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0
            )


class Peft(Contestant):
    """PEFT's `generate`. All adapters are loaded; `set_adapter` switches between batches."""

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
        # without a cache, since peft 0.21.2 fails with one on transformers 5.24: every step runs the whole row again
        most = max(q.new_tokens for q in questions)
        options = {"max_new_tokens": most, "do_sample": False, "use_cache": False, "pad_token_id": 0}
        with autocast(self.device, compute_dtype(self.base)):
            self.model.generate(input_ids=ids, attention_mask=mask, **options)


class Packed(Contestant):
    """This project's generator: one batch with any mixture of adapters and lengths."""

    def __init__(self, base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Tensor]):
        super().__init__(base, tokenizer, prompts)
        dtype = compute_dtype(base)
        bloom = is_bloom(base.config)
        model = (
            BloomStepModel(ResidentWeights(base, dtype)) if bloom else DecoderStepModel(DecoderSchedule(base, dtype))
        )
        self.generator = ContinuousBatchingGenerator(model, tokenizer)
        self.end_token_ids = (base.config.get_text_config().vocab_size,)  # an id that is never chosen

    def answer(self, questions: Sequence[Question], batch_size: int) -> None:
        given = {"do_sample": False, "eos_token_id": self.end_token_ids}
        settings = {n: GenerationSettings(max_new_tokens=n, **given) for n in {q.new_tokens for q in questions}}
        requests = [Request(q.ids, settings[q.new_tokens], self.prompts[q.adapter]) for q in questions]
        for index, answer in self.generator.generate(requests, batch_size):
            assert len(answer) == questions[index].new_tokens


CONTESTANTS: dict[str, Callable[..., Contestant]] = {"peft": Peft, "transformers": Transformers, "packed": Packed}
