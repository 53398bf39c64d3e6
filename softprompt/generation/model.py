"""A frozen base model with its adapters, loaded for inference."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.config.adapter_specs import AdapterSpecs, parse_adapter_specs
from softprompt.config.infer_args import Voting
from softprompt.config.infer_config import generation_faults
from softprompt.config.schema import AUTO
from softprompt.config.validation import precision_faults, quantization_bits, quantization_faults
from softprompt.data.template import Template
from softprompt.engines.factory import engine_for_inference
from softprompt.generation.adapters import AdapterNames, LoadedAdapter, load_adapters
from softprompt.generation.base_with_adapters import BaseWithAdapters
from softprompt.generation.encode_questions import EncodedQuestion, Question, encode_questions, naming_question
from softprompt.generation.generator import make_generator
from softprompt.generation.hf_generate import beam_search
from softprompt.generation.likelihood import (
    ChoiceResult,
    answer_examples,
    check_choices,
    choice_result,
    log_likelihoods,
)
from softprompt.generation.outputs import stream_answers
from softprompt.generation.requests import Request, merge_settings, sample_seed
from softprompt.generation.voting import Ensemble
from softprompt.models.capabilities import (
    check_positions,
    check_token_ids,
    check_vocabulary,
    max_positions,
    why_not_generate,
)
from softprompt.models.loading import base_path, load_base, load_tokenizer
from softprompt.models.precision import resolve_device, resolve_dtype
from softprompt.utils.errors import ConfigError, ModelError


class SoftPromptModel(BaseWithAdapters):
    """A frozen base model with named adapters. An adapter is a learned prompt with the template of its training.

    One batch may hold questions to different adapters.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: Any,
        prompt: Tensor | None,
        template: Template | None = None,
        generation: Mapping[str, Any] | None = None,
        compute_dtype: torch.dtype = torch.float32,
        engine: str = AUTO,
    ):
        """Make a model from a loaded base and one prompt, which becomes the adapter "default".

        Args:
            base: Causal language model, frozen and in eval mode (see `models.loading.freeze`). It may be quantized.
            tokenizer: The base's tokenizer.
            prompt: Learned prompt [P, H] fp32; None is the base without a prompt.
            template: Template of the questions; None is the template "default".
            generation: Settings that override the defaults of `GenerationSettings`.
            compute_dtype: Dtype of matrix products.
            engine: Value of infer.py's flag --engine.

        Raises:
            ModelError: The tokenizer has tokens that the base lacks, or no prompt can precede the base's text (see
                `engines.padded.check_forward`).
            ConfigError: See `generator.make_generator`.
        """
        super().__init__(base, LoadedAdapter(prompt, template or Template(), dict(generation or {})))
        self.tokenizer, self.compute_dtype = tokenizer, compute_dtype
        check_vocabulary(tokenizer, base, self.name)
        self.engine = engine_for_inference(engine, base, tokenizer, compute_dtype)
        self.generator = make_generator(self.engine, base, tokenizer, engine)

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike[str] | None = None,
        adapter: AdapterSpecs = None,
        *,
        device: str = AUTO,
        bf16: bool | None = None,
        fp16: bool | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        engine: str = AUTO,
    ) -> "SoftPromptModel":
        """Load a base and its adapters.

        Args:
            base: Folder or hub id of the base, by default the base that the adapters name.
            adapter: Adapter folder written by softprompt or by PEFT, by default the newest one under runs/; of a run
                that has not ended, the newest complete checkpoint. Several are given as {"name": folder} or
                ["name=FOLDER"]; the first becomes the active adapter. "none" is the base without a prompt; if `base`
                is not given either, it is the base of the newest adapter, or mini if there is none.
            device, bf16, fp16, load_in_8bit, load_in_4bit, engine: Values of the flags of infer.py.

        Raises:
            AdapterError: An adapter does not exist, is damaged, or is for another base or hidden size; or a folder is
                given the name "none".
            ModelError: The base cannot be loaded.
            ConfigError: The device, the precision, the quantization or the engine is not available.
        """
        if faults := precision_faults(bf16, fp16, device) + quantization_faults(load_in_8bit, load_in_4bit):
            raise ConfigError("; ".join(faults))
        where = resolve_device(device)
        dtype = resolve_dtype(where, bf16, fp16)
        folders = parse_adapter_specs(adapter)
        adapters, name = load_adapters(folders, None if base is None else os.path.expanduser(base))
        path = base_path(name)
        tokenizer = load_tokenizer(path)
        loaded = load_base(path, where, dtype, quantization_bits(load_in_8bit, load_in_4bit))
        return cls.with_adapters(loaded, tokenizer, name, adapters, dtype, engine)

    @classmethod
    def with_adapters(
        cls,
        base: PreTrainedModel,
        tokenizer: Any,
        name: str,
        adapters: Mapping[str, LoadedAdapter],
        compute_dtype: torch.dtype,
        engine: str = AUTO,
    ) -> "SoftPromptModel":
        """Make a model from a loaded base and adapters that have been read.

        Args:
            name: Name or path of the base.
            adapters: The adapters by name, at least one; the first is active.
            base, tokenizer, compute_dtype, engine: See `__init__`, which also raises the other errors.

        Raises:
            AdapterError: The hidden size of an adapter differs from the base's.
        """
        model = cls(base, tokenizer, None, compute_dtype=compute_dtype, engine=engine)
        model.name, model.adapters, model.active_adapter = name, {}, next(iter(adapters))
        for each, adapter in adapters.items():
            model.add_adapter(each, adapter)
        return model

    def ensemble(self, adapters: Sequence[str] | None = None, voting: Voting | None = None) -> Ensemble:
        """Combine adapters into an ensemble, whose `generate`, `stream` and `classify` work like those of the model.

        Args:
            adapters: Names of at least two loaded adapters, by default all.
            voting: "majority_vote", the default for answers, or "mean_likelihood", the default for choices; see
                `generation.voting`.

        Raises:
            ConfigError: There are fewer than two adapters, or `voting` has another value.
            AdapterError: An adapter is unknown.
        """
        return Ensemble(self, list(self.adapters) if adapters is None else adapters, voting)

    @overload
    def generate(self, prompts: str | Mapping[str, Any], **settings: Any) -> Any: ...
    @overload
    def generate(self, prompts: Sequence[Question], **settings: Any) -> list[Any]: ...
    def generate(self, prompts: Question | Sequence[Question], **settings: Any) -> Any:
        """Return the answer to one question, or the list of answers to several questions. With `num_return_sequences`
        above 1, each answer is a list of texts. The arguments are those of `stream`."""
        if isinstance(prompts, str | Mapping):
            return next(self.stream([prompts], **settings))
        return list(self.stream(prompts, **settings))

    def stream(
        self,
        prompts: Sequence[Question],
        *,
        adapter: AdapterNames = None,
        seed: int | None = None,
        batch_size: int = 8,
        skip: int = 0,
        where: Sequence[str] | None = None,
        on_text: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> Iterator[Any]:
        """Check all questions, then yield their answers one by one, in order.

        Args:
            prompts: Questions, each a text or a row with the columns of its adapter's template.
            adapter: Name of the adapter of all questions, or a name for each; by default the active adapter.
            seed: Seed of sampling. Each sample has its own seed, derived from this one, so that it does not depend on
                the other questions.
            batch_size: Number of answers that are generated at a time.
            skip: Number of questions at the beginning that are checked, but not answered.
            where: Name of each question in error messages.
            on_text: Called with each piece of the answer as it is generated, if there is one question with one answer.
            settings: Fields of GenerationSettings, which override those saved with the adapter; a field that is None is
                ignored.

        Raises:
            ConfigError: A setting is unknown or invalid, or a question leaves no room for an answer.
            ModelError: The base cannot generate with a prompt.
            DataError: A row lacks columns of the template.
            AdapterError: An adapter is unknown.
        """
        if faults := generation_faults({"seed": seed, "batch_size": batch_size}):
            raise ConfigError("; ".join(faults))
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed  # follows torch.manual_seed
        if self.generator is None:
            raise ModelError(
                f"{self.name}: {why_not_generate(self.base)}; --choices and --eval_dataset work without it"
            )
        encoded = enumerate(self._encoded(prompts, adapter, where))
        asked = [self._requests(one, settings, partial(sample_seed, seed, number)) for number, one in encoded]
        search = partial(beam_search, self.base, self.tokenizer, compute_dtype=self.compute_dtype)
        return stream_answers(self.generator, search, self.tokenizer, asked[skip:], batch_size, on_text)

    def max_answer_length(
        self, prompt: Question, *, adapter: str | None = None, where: str = "question 1", **settings: Any
    ) -> int:
        """Return how many tokens the answer to a question may have at most; 0 if there is no room for an answer.

        Raises:
            ConfigError, DataError, AdapterError: See `stream`.
        """
        (asked,) = self._encoded([prompt], adapter, [where])
        request = Request(asked.input_ids, self.settings(adapter, **settings), asked.adapter.prompt)
        try:
            return request.new_token_budget(max_positions(self.base))
        except ConfigError:
            return 0

    def classify(
        self,
        prompts: Sequence[Question],
        choices: Sequence[str],
        *,
        adapter: AdapterNames = None,
        where: Sequence[str] | None = None,
    ) -> list[ChoiceResult]:
        """Return for each question the most likely of `choices`, and the probability of each among them.

        Raises:
            ConfigError: There are fewer than two choices, or the same choice occurs twice.
            DataError, AdapterError: See `stream`.
        """
        check_choices(choices)
        scores = self.log_likelihoods(prompts, choices, adapter=adapter, where=where)
        return [choice_result(of_question, choices) for of_question in scores]

    def log_likelihoods(
        self,
        prompts: Sequence[Question],
        answers: Sequence[str],
        *,
        adapter: AdapterNames = None,
        where: Sequence[str] | None = None,
    ) -> list[list[float]]:
        """Return for each question the log-likelihood of each of `answers`: log p(answer and end token | question).

        Raises:
            ConfigError, DataError, AdapterError: See `stream`.
        """
        asked = self._encoded(prompts, adapter, where)
        texts, rows = [one.input_ids for one in asked], [one.row for one in asked]
        templates = [one.adapter.template for one in asked]
        examples = answer_examples(texts, rows, answers, templates, self.tokenizer)
        positions = max_positions(self.base)
        for one, behind in zip(asked, examples, strict=True):
            P = 0 if one.adapter.prompt is None else len(one.adapter.prompt)
            for example in behind:
                check_positions(positions, P, len(example.input_ids), one.where, "shorten it or the choices")
        return log_likelihoods(self.engine, [one.adapter.prompt for one in asked], examples)

    def _requests(
        self, asked: EncodedQuestion, settings: Mapping[str, Any], seed_of: Callable[[int], int]
    ) -> list[Request]:
        """Return one request per sample of an answer, or a single one for beam search."""
        chosen = merge_settings(asked.adapter.generation, settings)
        samples = range(1 if chosen.num_beams > 1 else chosen.num_return_sequences)
        requests = [Request(asked.input_ids, chosen, asked.adapter.prompt, seed_of(sample)) for sample in samples]
        with naming_question(asked.where):
            requests[0].new_token_budget(max_positions(self.base))
        return requests

    def _encoded(
        self, prompts: Sequence[Question], names: AdapterNames, where: Sequence[str] | None
    ) -> list[EncodedQuestion]:
        asked = encode_questions(prompts, self.adapters, self.active_adapter, names, where, self.tokenizer)
        for one in asked:
            check_token_ids(one.input_ids, self.base, one.where)
        self.note_foreign_rows([one.row for one in asked])
        return asked
