"""The answers of the base with a whole text before the questions, which distillation trains on: generated once, and
cached as they come, so that an interrupted command continues where it was.

Each answer is known by a key, a hash of its request. The seed of a sample depends on its question alone, so questions
that are added, left out or reordered, and more answers to each question, leave the other keys unchanged. A run also
keeps its answers in its folder, in teacher_answers.jsonl, so that it can be resumed without the cache, on another
machine and in another dtype.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from torch import Tensor

from softprompt.distributed.process_group import StopSource
from softprompt.generation.generator import Generator
from softprompt.generation.requests import GenerationSettings, Request, sample_seed
from softprompt.runs.file_names import ANSWERS_FILE
from softprompt.utils.atomic_io import cache_dir
from softprompt.utils.errors import Stopped
from softprompt.utils.progress import progress_bar, shows_bars
from softprompt.utils.translation import translate

TOGETHER = 32  # answers that are generated at a time
MOST_POSITIONS = 1 << 15  # of these answers with the text and the questions, whose keys and values are in memory
TOP_K = 50  # the default of transformers' generate: the tail of a small base's distribution is noise
VERSION = 2  # of the cache
# The settings in an answer's key. A new setting of answers does not belong here: all keys would change, so that no run
# would find its answers again.
SETTINGS_OF_KEY = (
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "suppress_tokens", "stop_strings", "eos_token_id", "num_return_sequences", "num_beams"),
)


class AnswerSource(NamedTuple):
    """Where the answers of a run come from.

    Attributes:
        generator: Generates those that are not known yet.
        kept: The answers from the run's folder, by key. They are used even if `Teacher.identity` has changed; answers
            that are generated or read from the cache are added.
        stop: May ask to stop between two answers; None if nothing does.
    """

    generator: Generator
    kept: dict[str, list[int]]
    stop: StopSource | None


class Teacher(NamedTuple):
    """The base behind a text.

    Attributes:
        source: Where its answers come from.
        prompt: The embeddings of the tokens with which all rows begin [P, H]; None if they share none.
        prefix: The ids of these tokens.
        ends: The ids of the tokens that end an answer.
        positions: The number of positions of the base; None if it has no limit.
        identity: What the answers depend on besides the requests, such as the fingerprint of the base, in JSON types.
    """

    source: AnswerSource
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
    teacher: Teacher, rows: Sequence[Sequence[int] | None], samples: int, max_new_tokens: int, seed: int, title: str
) -> list[list[Answer]]:
    """Answer each question, and return its answers.

    Args:
        rows: For each question, the token ids behind `Teacher.prefix`; None for one that gets no answer.
        samples: The number of answers to each question, sampled at temperature 1 from the TOP_K most likely tokens; 0
            is one greedy answer.
        seed: Seed of the samples.
        max_new_tokens: The most tokens of an answer.
        title: Title of the progress bar.

    Raises:
        ConfigError: A question leaves no room for an answer.
        Stopped: `AnswerSource.stop` asked to stop. The answers so far are in the cache.
        TrainingError: A single question does not fit in memory.
    """
    how = GenerationSettings(
        max_new_tokens=max_new_tokens,
        do_sample=samples > 0,
        top_k=TOP_K,
        eos_token_id=tuple(teacher.ends),
    )
    asked, kept = _requests(teacher, rows, how, samples, seed), teacher.source.kept
    budgets = [request.new_token_budget(teacher.positions) for _, request in asked]
    longest = len(teacher.prefix) + max(len(request.input_ids) for _, request in asked) + max(budgets)
    together = max(1, min(TOGETHER, MOST_POSITIONS // longest))
    known = _Cache.of([VERSION, teacher.identity])
    there = known.answers.keys() | kept.keys()
    if missing := {key: request for key, request in asked if key not in there}:
        _generate(teacher.source, missing, together, known, title)
    known.read()
    kept.update({key: known.answers[key] for key, _ in asked if key not in kept})
    found = [kept[key] for key, _ in asked]
    each = (Answer(ids, len(ids) < budget) for ids, budget in zip(found, budgets, strict=True))
    return [list(islice(each, 0 if row is None else max(1, samples))) for row in rows]


def _requests(
    teacher: Teacher, rows: Sequence[Sequence[int] | None], how: GenerationSettings, samples: int, seed: int
) -> list[tuple[str, Request]]:
    """Return the requests of all answers, each with its key. A question that is asked again has other samples."""
    asked, before = list[tuple[str, Request]](), Counter[str]()
    settings = {name: getattr(how, name) for name in SETTINGS_OF_KEY}
    for index, row in enumerate(rows):
        if row is None:
            continue
        ids = [*teacher.prefix, *row]
        question = _digest(ids)
        number = int(_digest([question, before[question]]), 16)
        before[question] += 1
        for sample in range(max(1, samples)):
            seeds = [sample_seed(seed, one, sample) for one in (number, index)]  # earlier versions took the index
            keys = [_digest([ids, settings, own if samples else None]) for own in seeds]
            which = int(keys[1] in teacher.source.kept)
            asked.append((keys[which], Request(row, how, teacher.prompt, seeds[which])))
    return asked


def _generate(source: AnswerSource, missing: Mapping[str, Request], together: int, known: "_Cache", title: str) -> None:
    """Generate the missing answers, `together` at a time, and add them to the cache. Raises Stopped."""
    names, stop = list(missing), source.stop
    if not shows_bars():
        print(translate(f"{title}: {len(names):,} to generate …"))
    with progress_bar(len(names), title, " answers") as bar, known:
        answers = source.generator.generate(list(missing.values()), together)
        for done, (at, ids) in enumerate(answers, start=1):
            known.write(names[at], ids)
            bar.update()
            if stop and done < len(names) and (code := stop.exit_code) is not None:
                left = len(names) - done
                raise Stopped(f"stopped before {left:,} answers were generated; the same command continues", code)


def _digest(content: Any) -> str:
    """Return the BLAKE2b hash of JSON types, in hexadecimal digits. The key of a request is that of its token ids, its
    settings, and the seed of a sample or None."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def kept_answers(*folders: Path) -> dict[str, list[int]]:
    """Return the answers in the first of these folders that has some, by key; none if no folder has."""
    found = (_Cache(folder / ANSWERS_FILE).answers for folder in folders)
    return next(filter(None, found), {})


def answers_file(kept: Mapping[str, list[int]]) -> bytes:
    """Return the content of a run's teacher_answers.jsonl."""
    return "".join(map(_line, kept.items())).encode("ascii")


def _line(answer: tuple[str, list[int]]) -> str:
    return json.dumps([*answer, _digest(answer)]) + "\n"


def _read_line(line: bytes) -> tuple[str, list[int]] | None:
    """Return the key and the token ids in a line; None if it is damaged. Earlier versions wrote no hash."""
    try:
        key, ids, *digest = json.loads(line)
        whole = type(key) is str and all(type(each) is int and 0 <= each < 1 << 31 for each in ids)
        return (key, list(ids)) if whole and digest in ([], [_digest([key, ids])]) else None
    except (ValueError, TypeError, RecursionError):
        return None


class _Cache:
    """A file with one JSON line [key, token ids, hash of both] for each answer. Damaged lines are ignored, so their
    answers are generated again; if the file cannot be written, the answers are only kept in memory.

    Two runs may write the same file at once, and their answers may differ by rounding. Both then take the first line of
    each key, which never changes.
    """

    def __init__(self, path: Path):
        self.path, self.answers = path, dict[str, list[int]]()
        self._file: TextIO | None = None
        self.read()

    def read(self) -> None:
        """Read the file. Its answers replace those in memory."""
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return
        found: dict[str, list[int]] = {}
        for key, ids in filter(None, map(_read_line, lines)):
            found.setdefault(key, ids)
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
            self._file.write("\n" * bool(self._file.tell()))  # the last line may not be whole
        except OSError:
            self._file = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()

    def write(self, key: str, ids: list[int]) -> None:
        """Keep an answer, and append it to the file."""
        self.answers[key] = ids
        try:
            if self._file:
                self._file.write(_line((key, ids)))
                self._file.flush()
        except OSError:
            self._file = None
