"""For notebooks and scripts: train in one call, load and generate in two."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.adapters import NONE, Tuned, check, find, load, named, shelf
from softprompt.build import base_path
from softprompt.config import precision_faults, train_config
from softprompt.engines import engine_for_inference, generator_beside
from softprompt.errors import ConfigError
from softprompt.fields import AUTO
from softprompt.generate import in_order, search_beams
from softprompt.infer_config import generation_faults
from softprompt.model import load_base, load_tokenizer, resolve_device, resolve_dtype, word_embeddings
from softprompt.questions import Question, merged_settings, token_ids, told_of
from softprompt.recorder import Run
from softprompt.requests import GenerationSettings, Request, seed_of
from softprompt.run import run_training
from softprompt.scores import Verdict, answer_examples, verdicts
from softprompt.streaming import Pieces
from softprompt.template import Template

Adapters = str | Sequence[str] | None  # one for all questions, one for each, or the one that is active


def train(preset: str | None = None, **settings: Any) -> Run:
    """What `python train.py` does, with its flags as keyword arguments: train(dataset="rows.jsonl", eval_rows=100).

    Raises:
        SoftpromptError: anything in the settings, the data, the base or the output folder that stands in the way.
    """
    run = run_training(train_config(preset, **settings))
    if run.not_pushed:
        print(f"warning: {run.not_pushed}", file=sys.stderr)
    return run


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
    ):
        """prompt: [P, H] fp32, or None for the bare base: the adapter "default"; `generation` overrides the article's
        settings. `engine` is as --engine of infer.py."""
        self.base, self.tokenizer, self.compute_dtype = base, tokenizer, compute_dtype
        self.name = str(getattr(base, "name_or_path", ""))
        self.adapters = {"default": Tuned(prompt, template or Template(), dict(generation or {}))}
        self.active_adapter = "default"
        self.engine = engine_for_inference(engine, base, tokenizer, compute_dtype)
        self.generator = generator_beside(self.engine, base, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        base: str | None = None,
        adapter: str | Path | Mapping[str, str | Path] | Sequence[str] | None = None,
        *,
        device: str = AUTO,
        bf16: bool | None = None,
        fp16: bool | None = None,
        engine: str = AUTO,
    ) -> "SoftPromptModel":
        """Load a base and an adapter folder, ours or PEFT's, or several by name: {"name": folder} or ["name=FOLDER"];
        the first is the active one. Without a base the adapters' own is taken; without an adapter the newest under
        runs/; "none" is the bare base (of the newest adapter, where no base is named).

        Raises:
            AdapterError: no such adapter, one that is broken, or one for another base or hidden size.
            ModelError: the base cannot be loaded.
            ConfigError: a device, precision or engine that is not there.
        """
        if faults := precision_faults(bf16, fp16, device):
            raise ConfigError("; ".join(faults))
        where = resolve_device(device)
        dtype = resolve_dtype(where, bf16, fp16)
        if isinstance(adapter, Mapping):
            folders = {name: str(folder) for name, folder in adapter.items()}
        else:
            folders = named([adapter] if isinstance(adapter, str | Path) else adapter or ())
        adapters, first, name = shelf(folders, base)
        path = base_path(name)
        tokenizer = load_tokenizer(path)
        model = cls(load_base(path, where, dtype), tokenizer, None, compute_dtype=dtype, engine=engine)
        model.name, model.adapters, model.active_adapter = name, {}, first
        for each, tuned in adapters.items():
            model._add(each, tuned)
        return model

    def load_adapter(self, folder: str | Path, adapter_name: str | None = None) -> str:
        """Add an adapter folder (or "none") under a name, by default its path; returns the name.

        Raises:
            AdapterError: as of `from_pretrained`.
        """
        name = adapter_name or str(folder)
        self._add(name, Tuned() if str(folder) == NONE else load(folder))
        return name

    def set_adapter(self, adapter_name: str) -> None:
        """The adapter of questions that name none."""
        find(self.adapters, adapter_name, "set_adapter")
        self.active_adapter = adapter_name

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
        adapter: Adapters = None,
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
            DataError: a row without the template's columns.
            AdapterError: an unknown adapter.
        """
        if faults := generation_faults({"seed": seed, "batch_size": batch_size}):
            raise ConfigError("; ".join(faults))
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed  # follows torch.manual_seed
        places = where or [f"question {number}" for number in range(1, len(prompts) + 1)]
        names = self._names(places, adapter)
        chosen = [self.settings(name, **settings) for name in names]
        asked = []
        for number, ids in enumerate(self._texts(prompts, names, places)):
            one, prompt = chosen[number], self._tuned(names[number]).prompt
            told_of(places[number], one.new_tokens, len(ids))
            samples = range(1 if one.num_beams > 1 else one.num_return_sequences)
            asked.append([Request(ids, one, prompt, seed_of(seed, number, sample)) for sample in samples])
        return self._answered(asked[skip:], batch_size, on_text)

    def _answered(
        self, asked: Sequence[Sequence[Request]], batch_size: int, on_text: Callable[[str], None] | None
    ) -> Iterator[Any]:
        """The answers to each question's requests: one a sample, or one for a whole search."""
        pieces = Pieces(self.tokenizer, on_text) if on_text else None
        on_token = (lambda _, token: pieces.add(token)) if pieces else None
        drawn = [request for requests in asked for request in requests if request.settings.num_beams == 1]
        answers = in_order(self.generator.generate(drawn, batch_size, on_token))
        for requests in asked:
            settings = requests[0].settings
            if settings.num_beams > 1:
                found = search_beams(self.base, self.tokenizer, requests[0], self.compute_dtype)
            else:
                found = [next(answers) for _ in requests]
            if pieces:
                for token in found[0] if settings.num_beams > 1 else ():  # a search has no pieces before its end
                    pieces.add(token)
                pieces.finish()
            yield self._shown(found, settings)

    def _shown(self, found: Sequence[Sequence[int]], settings: GenerationSettings) -> Any:
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
        return texts if settings.num_return_sequences > 1 else texts[0]

    def classify(
        self,
        prompts: Sequence[Question],
        choices: Sequence[str],
        *,
        adapter: Adapters = None,
        where: Sequence[str] | None = None,
    ) -> list[Verdict]:
        """The likeliest of some answers to each question, with the probability of each among them.

        Raises:
            ConfigError: fewer than two choices, or one that is there twice.
            DataError, AdapterError: as of `stream`.
        """
        places = where or [f"question {number}" for number in range(1, len(prompts) + 1)]
        names = self._names(places, adapter)
        texts = self._texts(prompts, names, places)
        by_name: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            by_name.setdefault(name, []).append(number)
        found: dict[int, Verdict] = {}
        for name, numbers in by_name.items():
            tuned = self._tuned(name)
            of_choices = answer_examples([texts[n] for n in numbers], choices, tuned.template, self.tokenizer)
            judged = verdicts(self.engine, tuned.prompt, of_choices, choices)
            found |= dict(zip(numbers, judged, strict=True))
        return [found[number] for number in range(len(names))]

    def settings(self, adapter: str | None = None, /, **given: Any) -> GenerationSettings:
        """What is given (not None), over what is saved beside the adapter, over the article's.

        Raises:
            ConfigError: an unknown or impossible setting.
        """
        return merged_settings(self._tuned(adapter or self.active_adapter).generation, given)

    def _add(self, name: str, tuned: Tuned) -> None:
        check(name, tuned, word_embeddings(self.base).embedding_dim, self.name)
        self.adapters[name] = tuned

    def _tuned(self, name: str) -> Tuned:
        """The adapter of a checked name; the bare base is always there."""
        return self.adapters.get(name) or Tuned()

    def _names(self, places: Sequence[str], adapter: Adapters) -> list[str]:
        """Each question's adapter, known or the bare base."""
        if isinstance(adapter, str) or adapter is None:
            names = [adapter or self.active_adapter] * len(places)
        else:
            names = [name or self.active_adapter for name in adapter]
        if len(names) != len(places):
            raise ConfigError(f"adapter names {len(names)} for {len(places)} questions; give one, or one for each")
        for place, name in zip(places, names, strict=True):
            if name != NONE:
                find(self.adapters, name, place)
        return names

    def _texts(self, prompts: Sequence[Question], names: Sequence[str], places: Sequence[str]) -> list[list[int]]:
        """Token ids of each question in its adapter's template."""
        each = zip(places, prompts, names, strict=True)
        return [token_ids(place, one, self._tuned(name).template, self.tokenizer) for place, one, name in each]
