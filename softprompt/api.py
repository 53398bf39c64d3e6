"""For notebooks and scripts: train in one call, load and generate in two."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.config.infer_args import Voting, generation_faults
from softprompt.config.loader import TrainConfig, train_config
from softprompt.config.schema import AUTO
from softprompt.config.validation import bits_faults, bits_of, precision_faults
from softprompt.data.template import Template
from softprompt.distributed.process_group import World
from softprompt.engines.factory import engine_for_inference
from softprompt.generation.adapters import (
    NONE,
    EncodedQuestion,
    LoadedAdapter,
    Names,
    check_adapter,
    check_name,
    encode_questions,
    find_adapter,
    load,
    load_adapters,
    parse_adapter_specs,
)
from softprompt.generation.encode_questions import Question, merged_settings, warn_if_no_room
from softprompt.generation.factory import generator_beside
from softprompt.generation.hf_generate import search_beams
from softprompt.generation.likelihood import (
    ChoiceResult,
    answer_examples,
    check_choices,
    choice_result,
    log_likelihoods,
)
from softprompt.generation.outputs import stream_answers
from softprompt.generation.requests import GenerationSettings, Request, seed_of
from softprompt.generation.voting import Ensemble
from softprompt.models.capabilities import (
    check_positions,
    check_token_ids,
    check_vocabulary,
    max_positions,
    why_not_generate,
)
from softprompt.models.loading import base_path, check_not_quantised, load_base, load_tokenizer, word_embeddings
from softprompt.models.precision import resolve_device, resolve_dtype
from softprompt.models.quantization import QuantizedBlocks, load_quantized
from softprompt.report.after_training import ReportAndPush
from softprompt.training.callbacks import Run
from softprompt.training.run import run_training
from softprompt.utils.errors import ConfigError, ModelError
from softprompt.utils.std_streams import messages


def train(preset: str | None = None, **settings: Any) -> Run:
    """What `python train.py` does, with its flags as keyword arguments: train(dataset="rows.jsonl", eval_rows=100).

    Raises:
        SoftpromptError: anything in the settings, the data, the base or the output folder that stands in the way.
    """
    with messages():
        run = run_and_report(train_config(preset, **settings))
        if run.not_pushed:
            print(f"warning: {run.not_pushed}", file=sys.stderr)
    return run


def run_and_report(config: TrainConfig, world: World | None = None) -> Run:
    """Train as `config` says, write the run's report, and upload it with `push_to_hub`; see `training.run`."""
    return run_training(config, world, ReportAndPush())


class SoftPromptModel:
    """A frozen base and adapters by name: each a learned prompt with the template that it was learned with. Questions
    behind different adapters are answered in one batch."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: Any,
        prompt: Tensor | None,
        template: Template | None = None,
        generation: Mapping[str, Any] | None = None,
        compute_dtype: torch.dtype = torch.float32,
        engine: str = AUTO,
        quantised: QuantizedBlocks | None = None,
    ):
        """prompt: [P, H] fp32, or None for the bare base: the adapter "default"; `generation` overrides the article's
        settings. `engine` is as --engine of infer.py, `quantised` what `quantised.quantize_blocks` made of the base.

        Raises:
            ModelError: a base that transformers loaded quantised, a tokenizer with words that the base has not, or
                as of `model.check_forward`.
            ConfigError: as of `engines.engine_for_inference`.
        """
        check_not_quantised(base)
        self.base, self.tokenizer, self.compute_dtype = base, tokenizer, compute_dtype
        self.name = str(getattr(base, "name_or_path", ""))
        self.adapters = {"default": LoadedAdapter(prompt, template or Template(), dict(generation or {}))}
        self.active_adapter, self.quantised = "default", quantised is not None
        check_vocabulary(tokenizer, base, self.name)
        self.engine = engine_for_inference(engine, base, tokenizer, compute_dtype, quantised=quantised)
        self.generator = generator_beside(self.engine, base, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike[str] | None = None,
        adapter: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | Sequence[str] | None = None,
        *,
        device: str = AUTO,
        bf16: bool | None = None,
        fp16: bool | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        engine: str = AUTO,
    ) -> "SoftPromptModel":
        """Load a base and an adapter folder, ours or PEFT's, or several by name: {"name": folder} or ["name=FOLDER"];
        the first is the active one. Without a base the adapters' own is taken; without an adapter the newest under
        runs/; "none" is the bare base (of the newest adapter, where no base is named).

        Raises:
            AdapterError: no such adapter, one that is broken, one for another base or hidden size, or a folder under
                the name "none".
            ModelError: the base cannot be loaded.
            ConfigError: a device, precision or engine that is not there.
        """
        if faults := precision_faults(bf16, fp16, device) + bits_faults(load_in_8bit, load_in_4bit, engine):
            raise ConfigError("; ".join(faults))
        where = resolve_device(device)
        dtype = resolve_dtype(where, bf16, fp16)
        if isinstance(adapter, Mapping):
            folders = {name: os.fspath(folder) for name, folder in adapter.items()}
        else:
            folders = parse_adapter_specs([adapter] if isinstance(adapter, str | os.PathLike) else adapter or ())
        adapters, first, name = load_adapters(folders, None if base is None else os.path.expanduser(base))
        path = base_path(name)
        tokenizer = load_tokenizer(path)
        bits = bits_of(load_in_8bit, load_in_4bit)
        loaded, quantised = load_quantized(path, bits, where, dtype) if bits else (load_base(path, where, dtype), None)
        model = cls(loaded, tokenizer, None, compute_dtype=dtype, engine=engine, quantised=quantised)
        model.name, model.adapters, model.active_adapter = name, {}, first
        for each, tuned in adapters.items():
            model._add(each, tuned)
        return model

    def load_adapter(self, folder: str | Path, adapter_name: str | None = None) -> str:
        """Add an adapter folder (or "none") under a name, by default its path; returns the name.

        Raises:
            AdapterError: as of `from_pretrained`.
        """
        name = str(folder) if adapter_name is None else adapter_name
        check_name(name, folder)
        self._add(name, LoadedAdapter() if str(folder) == NONE else load(folder))
        return name

    def set_adapter(self, adapter_name: str) -> None:
        """The adapter of questions that name none."""
        find_adapter(self.adapters, adapter_name, "set_adapter")
        self.active_adapter = adapter_name

    def ensemble(self, adapters: Sequence[str] | None = None, voting: Voting | None = None) -> Ensemble:
        """These adapters (by default all) as one, whose `generate`, `stream` and `classify` are as those here. `voting`
        is majority_vote (by default of answers) or mean_likelihood (by default of choices): see `ensemble.majority`.

        Raises:
            ConfigError: fewer than two adapters, or another voting.
            AdapterError: an unknown adapter.
        """
        return Ensemble(self, list(self.adapters) if adapters is None else adapters, voting)

    @property
    def template(self) -> Template:
        return self.adapters[self.active_adapter].template

    @property
    def prompt(self) -> Tensor | None:
        """[P, H] fp32 of the active adapter."""
        return self.adapters[self.active_adapter].prompt

    @property
    def description(self) -> str:
        names = [name for name, tuned in self.adapters.items() if tuned.prompt is not None]
        return f"base {self.name}, " + ("adapter " + ", ".join(names) if names else "no prompt")

    @overload
    def generate(self, prompts: str | Mapping[str, Any], **settings: Any) -> Any: ...
    @overload
    def generate(self, prompts: Sequence[Question], **settings: Any) -> list[Any]: ...
    def generate(self, prompts: Question | Sequence[Question], **settings: Any) -> Any:
        """Answer one question (→ str) or several (→ list); with num_return_sequences above 1 each answer is a list of
        texts. See `stream`."""
        if isinstance(prompts, str | Mapping):
            return next(self.stream([prompts], **settings))
        return list(self.stream(prompts, **settings))

    def stream(
        self,
        prompts: Sequence[Question],
        *,
        adapter: Names = None,
        seed: int | None = None,
        batch_size: int = 8,
        skip: int = 0,
        where: Sequence[str] | None = None,
        on_text: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> Iterator[Any]:
        """Answers one by one in the questions' order, after all of them have been checked. A question is a text, or a
        row with the columns of its adapter's template; `adapter` names one for all or one for each.

        `settings` are GenerationSettings' fields, over those saved beside the adapter; None is as good as not given.
        With a `seed` each sample has a seed of its own (see `requests.seed_of`), so it depends on no other;
        `batch_size` answers are written at a time. The first `skip` questions are checked and not answered. `where`
        names the questions in messages. `on_text` is handed the pieces of a single question's single answer as they
        come.

        Raises:
            ConfigError: an unknown or impossible setting, or a question that leaves no room for an answer.
            ModelError: a base that cannot answer behind a prompt.
            DataError: a row without the template's columns.
            AdapterError: an unknown adapter.
        """
        if faults := generation_faults({"seed": seed, "batch_size": batch_size}):
            raise ConfigError("; ".join(faults))
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed  # follows torch.manual_seed
        if self.generator is None:
            raise ModelError(
                f"{self.name}: {why_not_generate(self.base)}; --choices and --eval_dataset work without it"
            )
        asked, positions = [], max_positions(self.base)
        for number, one in enumerate(self._posed(prompts, adapter, where)):
            chosen = merged_settings(one.tuned.generation, settings)
            if chosen.num_beams > 1 and self.quantised:
                raise ConfigError("--num_beams searches with the base's own weights; leave it or --load_in_… out")
            samples = range(1 if chosen.num_beams > 1 else chosen.num_return_sequences)
            seeds = [seed_of(seed, number, sample) for sample in samples]
            requests = [Request(one.ids, chosen, one.tuned.prompt, each) for each in seeds]
            warn_if_no_room(one.where, requests[0].new_tokens, positions)
            asked.append(requests)
        search = partial(search_beams, self.base, self.tokenizer, compute_dtype=self.compute_dtype)
        return stream_answers(self.generator, search, self.tokenizer, asked[skip:], batch_size, on_text)

    def classify(
        self,
        prompts: Sequence[Question],
        choices: Sequence[str],
        *,
        adapter: Names = None,
        where: Sequence[str] | None = None,
    ) -> list[ChoiceResult]:
        """The likeliest of some answers to each question, with the probability of each among them.

        Raises:
            ConfigError: fewer than two choices, or one that is there twice.
            DataError, AdapterError: as of `stream`.
        """
        check_choices(choices)
        return [
            choice_result(scores, choices) for scores in self._scores(self._posed(prompts, adapter, where), choices)
        ]

    def log_likelihoods(
        self,
        prompts: Sequence[Question],
        answers: Sequence[str],
        *,
        adapter: Names = None,
        where: Sequence[str] | None = None,
    ) -> list[list[float]]:
        """log p(answer and its end | question) of each of the answers, a list for each question.

        Raises:
            ConfigError, DataError, AdapterError: as of `stream`.
        """
        return self._scores(self._posed(prompts, adapter, where), answers)

    def settings(self, adapter: str | None = None, /, **given: Any) -> GenerationSettings:
        """What is given (not None), over what is saved beside the adapter, over the article's.

        Raises:
            ConfigError: an unknown or impossible setting.
        """
        return merged_settings(self._tuned(adapter or self.active_adapter).generation, given)

    def _add(self, name: str, tuned: LoadedAdapter) -> None:
        check_adapter(name, tuned, word_embeddings(self.base).embedding_dim, self.name)
        self.adapters[name] = tuned

    def _tuned(self, name: str) -> LoadedAdapter:
        """The adapter of a checked name; the bare base is always there."""
        return self.adapters.get(name) or LoadedAdapter()

    def _posed(self, prompts: Sequence[Question], names: Names, where: Sequence[str] | None) -> list[EncodedQuestion]:
        asked = encode_questions(prompts, self.adapters, self.active_adapter, names, where, self.tokenizer)
        for one in asked:
            check_token_ids(one.ids, self.base, one.where)
        return asked

    def _scores(self, asked: Sequence[EncodedQuestion], answers: Sequence[str]) -> list[list[float]]:
        texts, rows = [one.ids for one in asked], [one.row for one in asked]
        templates = [one.tuned.template for one in asked]
        examples = answer_examples(texts, rows, answers, templates, self.tokenizer)
        positions = max_positions(self.base)
        for one, behind in zip(asked, examples, strict=True):
            P = 0 if one.tuned.prompt is None else len(one.tuned.prompt)
            for example in behind:
                check_positions(positions, P, len(example.input_ids), one.where, "shorten it or the choices")
        return log_likelihoods(self.engine, [one.tuned.prompt for one in asked], examples)
