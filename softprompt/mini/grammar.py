"""Generate short Chinese reviews at random, each with its labels.

In a sentence of two clauses, the last clause determines the labels: 虽然贵，但是好吃 is positive, and its opinion is
好吃. The subject is the last one that is named.
"""

import hashlib
import random
import unicodedata
from dataclasses import dataclass, replace

from softprompt.mini import words
from softprompt.mini.clauses import ANYTHING, OTHER, Clause, any_clause, filled, noun_phrase, opinion_of, remark
from softprompt.mini.words import DOMAINS

HELD_OUT_SHARE = 16  # one sentence in 16 is held out


@dataclass(frozen=True)
class Sentence:
    """A review and its labels."""

    text: str
    good: bool
    domain: str
    subject: str  # "" if none is named
    opinion: str  # the judging word with its negation, but without its degree
    strength: str  # 强, 中 or 弱


def normalized(text: str) -> str:
    """Keep only letters and digits, so that punctuation does not matter."""
    return "".join(c for c in text.casefold() if unicodedata.category(c)[0] in "LN")


def held_out(text: str) -> bool:
    """Return whether a sentence is reserved for evaluation, by a hash of its normalized text.

    The result does not depend on when or by what the sentence is generated, nor on its punctuation. So neither the base
    nor a prompt is ever trained on a held-out sentence.
    """
    bare = normalized(text)
    return bare in words.RESERVED or hashlib.sha256(bare.encode()).digest()[0] % HELD_OUT_SHARE == 0


def sentence(rng: random.Random) -> Sentence:
    """Generate one review; positive and negative ones are equally likely."""
    domain = OTHER if rng.random() < 0.08 else rng.choice(tuple(DOMAINS))
    good = rng.random() < 0.5
    said, clause = rng.choices(_SHAPES, _SHAPE_WEIGHTS)[0](rng, domain, good)
    if rng.random() < 0.12:
        said += rng.choice(words.PARTICLES)
    text = said + rng.choice(words.FULL_STOPS)
    return Sentence(text, good, clause.domain, clause.subject, clause.opinion, clause.strength)


def sentences(rng: random.Random, count: int, held: bool = False) -> list[Sentence]:
    """Generate `count` different sentences. If `held`, all are held-out sentences, else none is."""
    found: dict[str, Sentence] = {}
    while len(found) < count:
        new = sentence(rng)
        if held_out(new.text) == held:
            found.setdefault(normalized(new.text), new)
    return list(found.values())


# Shapes of a whole sentence. Each returns its text and the clause that determines the labels.


def _one(rng: random.Random, domain: str, good: bool) -> tuple[str, Clause]:
    clause = any_clause(rng, domain, good)
    return clause.text, clause


def _opened(rng: random.Random, domain: str, good: bool) -> tuple[str, Clause]:
    clause = any_clause(rng, domain, good)
    return rng.choice(words.OPENINGS) + rng.choice(("", "", "，", ",")) + clause.text, clause


def _in_context(rng: random.Random, domain: str, good: bool) -> tuple[str, Clause]:
    clause = any_clause(rng, domain, good)
    context = rng.choice(words.CONTEXTS + (DOMAINS[domain].context * 4 if domain in DOMAINS else ()))
    return filled(rng, context) + rng.choice(words.COMMAS) + clause.text, clause


def _remark_only(rng: random.Random, domain: str, good: bool) -> tuple[str, Clause]:
    clause = remark(rng, domain, good)
    return clause.text, clause


def _with_remark(rng: random.Random, domain: str, good: bool) -> tuple[str, Clause]:
    first, last = any_clause(rng, domain, good), remark(rng, domain, good)
    return first.text + rng.choice(words.COMMAS) + last.text, _about(last, first)


def _also(rng: random.Random, domain: str, good: bool) -> tuple[str, Clause]:
    first, last = _pair(rng, domain, good, good)
    also = rng.choice(words.ALSO) if rng.random() < 0.5 else ""
    return first.text + rng.choice(words.COMMAS) + also + last.text, last


def _but(rng: random.Random, domain: str, good: bool) -> tuple[str, Clause]:
    first, last = _pair(rng, domain, not good, good)
    although = rng.choice(words.ALTHOUGH) if rng.random() < 0.5 else ""
    return although + first.text + rng.choice(words.COMMAS) + rng.choice(words.BUT) + last.text, last


def _both(rng: random.Random, domain: str, good: bool) -> tuple[str, Clause]:
    """Two judging words about one subject: 这个西瓜又大又甜."""
    noun = noun_phrase(rng, domain)
    one, two = (rng.choice(noun.group.good if good else noun.group.bad) for _ in range(2))
    said = rng.choice(("又{}又{}", "又{}又{}", "既{}又{}", "很{}也很{}", "{}、{}", "{}，而且{}")).format(one, two)
    return noun.text + said, Clause(said, two, "中", noun.noun, noun.domain)


_SHAPES = (_one, _opened, _in_context, _remark_only, _with_remark, _also, _but, _both)
_SHAPE_WEIGHTS = (34, 9, 9, 6, 10, 13, 15, 4)


def _pair(rng: random.Random, domain: str, first_good: bool, last_good: bool) -> tuple[Clause, Clause]:
    """Return two clauses; the second may leave out the subject."""
    first, last = any_clause(rng, domain, first_good), any_clause(rng, domain, last_good)
    if rng.random() < 0.3:
        opinion = opinion_of(rng, ANYTHING, last_good)
        last = Clause(opinion.text, opinion.label, opinion.strength)
    return first, _about(last, first)


def _about(last: Clause, first: Clause) -> Clause:
    """Return the last clause; if it has no subject or no domain, with that of the first."""
    domain = first.domain if last.domain == OTHER else last.domain
    return replace(last, subject=last.subject or first.subject, domain=domain)
