"""The answers of the base with a whole text before the questions, which distillation trains on: generated once, and
cached as they come, so that an interrupted command continues where it was."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from torch import Tensor

from softprompt.generation.generator import Generator
from softprompt.generation.requests import GenerationSettings, Request, sample_seed
from softprompt.utils.atomic_io import cache_dir
from softprompt.utils.progress import progress_bar

TOGETHER = 32  # answers that are generated at a time
MOST_POSITIONS = 1 << 15  # of these answers with the text and the questions, whose keys and values are in memory
TOP_K = 50  # the default of transformers' generate: the tail of a small base's distribution is noise
VERSION = 1  # of the cache


class Teacher(NamedTuple):
    """The base behind a text.

    Attributes:
        generator: Generates the answers.
        prompt: The embeddings of the tokens with which all rows begin [P, H]; None if they share none.
        prefix: The ids of these tokens.
        ends: The ids of the tokens that end an answer.
        positions: The number of positions of the base; None if it has no limit.
        identity: What else the answers depend on, such as the fingerprint of the base, in JSON types.
    """

    generator: Generator
    prompt: Tensor | None
    prefix: Sequence[int]
    ends: Sequence[int]
    positions: int | None
    identity: Any


class Answer(NamedTuple):
    """Token ids without an end token, and whether the base ended the answer itself."""

    ids: list[int]
    ended: bool


def answer_questions(
    teacher: Teacher, rows: Sequence[Sequence[int]], samples: int, max_new_tokens: int, seed: int, title: str
) -> list[list[Answer]]:
    """Answer each question, and return its answers.

    Args:
        rows: For each question, the token ids behind `Teacher.prefix`.
        samples: The number of answers to each question, sampled at temperature 1 from the TOP_K most likely tokens; 0
            is one greedy answer.
        seed: Seed of the samples.
        max_new_tokens: The most tokens of an answer.
        title: Title of the progress bar.

    Raises:
        ConfigError: A question leaves no room for an answer.
        TrainingError: A single question does not fit in memory.
    """
    how = GenerationSettings(
        max_new_tokens=max_new_tokens,
        do_sample=samples > 0,
        top_k=TOP_K,
        eos_token_id=tuple(teacher.ends),
    )
    requests = [
        Request(row, how, teacher.prompt, sample_seed(seed, question, sample))
        for question, row in enumerate(rows)
        for sample in range(max(1, samples))
    ]
    budgets = [request.new_token_budget(teacher.positions) for request in requests]
    longest = len(teacher.prefix) + max(map(len, rows)) + max(budgets)
    together = max(1, min(TOGETHER, MOST_POSITIONS // longest))
    known = _Cache.of(
        [VERSION, teacher.identity, list(teacher.prefix), list(map(list, rows)), samples, asdict(how), seed]
    )
    missing = [number for number in range(len(requests)) if number not in known.answers]
    with progress_bar(len(requests), title, " answers", initial=len(requests) - len(missing)) as bar, known:
        for at, ids in teacher.generator.generate([requests[number] for number in missing], together):
            known.write(missing[at], ids)
            bar.update()
    known.read()
    each = [Answer(known.answers[n], len(known.answers[n]) < budget) for n, budget in enumerate(budgets)]
    width = max(1, samples)
    return [each[start : start + width] for start in range(0, len(each), width)]


class _Cache:
    """A file with one JSON line [number of the request, token ids] for each answer. Lines that are not whole are
    ignored; if the file cannot be written, the answers are only kept in memory.

    Two runs may write the same file at once, and their answers may differ by rounding. Both then take the first line of
    each request, which never changes, and so does a run that is resumed.
    """

    def __init__(self, path: Path):
        self.path, self.answers = path, dict[int, list[int]]()
        self._file: TextIO | None = None
        self.read()

    def read(self) -> None:
        """Read the file. Its answers replace those in memory."""
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return
        found: dict[int, list[int]] = {}
        for line in lines:
            try:
                number, ids = json.loads(line)
                if type(number) is int and all(type(each) is int for each in ids):
                    found.setdefault(number, list(ids))
            except (ValueError, TypeError):
                continue
        self.answers |= found

    @classmethod
    def of(cls, depends_on: Any) -> "_Cache":
        """Return the cache of the answers that depend on this, which must be serializable as JSON."""
        digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
        return cls(cache_dir("answers") / f"{digest}.jsonl")

    def __enter__(self) -> "_Cache":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="ascii")
            self._file.write("\n" * bool(self.answers))  # the last line may not be whole
        except OSError:
            self._file = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()

    def write(self, number: int, ids: list[int]) -> None:
        """Keep an answer, and append it to the file."""
        self.answers[number] = ids
        try:
            if self._file:
                self._file.write(json.dumps([number, ids]) + "\n")
                self._file.flush()
        except OSError:
            self._file = None
