"""The clauses of the mini reviews: a noun phrase and an opinion about it."""

import random
from collections import Counter
from dataclasses import dataclass

from softprompt.mini import words
from softprompt.mini.words import DOMAINS, SHARED_GROUPS, Group

OTHER = "其他"  # the domain of things that belong to no other domain


@dataclass(frozen=True)
class Opinion:
    """A judging word with the words around it: 一点也不 + 好吃, 太 + 好吃 + 了."""

    before: str
    word: str
    after: str
    label: str  # 不好吃, 好吃
    strength: str

    @property
    def text(self) -> str:
        return self.before + self.word + self.after


@dataclass(frozen=True)
class Clause:
    """A clause and its labels; `subject` is "" if the clause names none."""

    text: str
    opinion: str
    strength: str
    subject: str = ""
    domain: str = OTHER


@dataclass(frozen=True)
class Noun:
    """A noun phrase (这部电影的剧情) with its noun (剧情) and the words that judge it."""

    text: str
    noun: str
    group: Group
    domain: str

    def clause(self, text: str, opinion: Opinion) -> Clause:
        return Clause(text, opinion.label, opinion.strength, self.noun, self.domain)


# Opinions.

ANYTHING = Group("", (), words.GOOD, words.BAD)
_LIKING = Group("", (), words.LIKE, words.DISLIKE)
_FEELING = Group("", (), words.PLEASED, words.DISPLEASED)
_OTHER_THINGS = Group("个", words.OTHER_NOUNS, words.GOOD, words.BAD)


def opinion_of(rng: random.Random, group: Group, good: bool, afters: frozenset[str] | None = None) -> Opinion:
    """Return a good or bad word with its degree, or the negated opposite. `afters` restricts what may follow it."""
    negated = rng.random() < 0.25
    word = rng.choice(group.good if good != negated else group.bad)
    if negated and (word in words.NOT_NEGATED or not set(word).isdisjoint("不没无") or len(word) > 3):
        return opinion_of(rng, group, good, afters)
    degrees = words.NEGATIONS if negated else words.DEGREES if len(word) <= 3 else words.EMPHASES
    strength = rng.choice(tuple(degrees))
    before, after = rng.choice(degrees[strength]).split("_")
    if afters is not None and after not in afters:
        return opinion_of(rng, group, good, afters)
    return Opinion(before, word, after, ("不" if negated else "") + word, strength)


# Noun phrases.

_USES = Counter(noun for domain in DOMAINS.values() for group in domain.groups for noun in set(group.nouns))
_USES.update(noun for group in SHARED_GROUPS for noun in group.nouns)


def _groups(domain: str) -> tuple[Group, ...]:
    return DOMAINS[domain].groups if domain in DOMAINS else (_OTHER_THINGS,)


def _thing(rng: random.Random, domain: str) -> tuple[str, str, Group]:
    """Return a noun phrase (这部电影, 他们家的电影, 电影), its noun and its group."""
    group = rng.choice([group for group in _groups(domain) if group.measure])
    noun = rng.choice(group.nouns)
    if noun[0] in "这那":
        return noun, noun, group
    this = ("这", "这", "那", "这" + group.measure, "这" + group.measure, "那" + group.measure)
    return rng.choice(("", "", *this, rng.choice(words.MODIFIERS))) + noun, noun, group


def noun_phrase(rng: random.Random, domain: str, likeable: bool = False) -> Noun:
    """Return a thing, or an aspect of a thing.

    An aspect that several domains share is either named together with its thing, or its domain is OTHER. `likeable`
    excludes nuisances (噪音), for which only their own judging words make sense.
    """
    phrase = _any_noun_phrase(rng, domain)
    return noun_phrase(rng, domain, likeable) if likeable and phrase.group.nuisance else phrase


def _any_noun_phrase(rng: random.Random, domain: str) -> Noun:
    thing, noun, group = _thing(rng, domain)
    if rng.random() < 0.45:
        return Noun(thing, noun, group, domain)
    shared = domain == OTHER or rng.random() < 0.4
    group = rng.choice(SHARED_GROUPS if shared else [group for group in _groups(domain) if not group.measure])
    noun = rng.choice(group.nouns)
    if shared and rng.random() < 0.4:
        return Noun(noun, noun, group, OTHER)
    if _USES[noun] > 1 or shared or rng.random() < 0.3:
        return Noun(thing + rng.choice(("的", "的", "")) + noun, noun, group, domain)
    return Noun(noun, noun, group, domain)


# Kinds of clause.


def _judged(rng: random.Random, domain: str, good: bool) -> Clause:
    """剧情很精彩"""
    noun = noun_phrase(rng, domain)
    opinion = opinion_of(rng, ANYTHING if rng.random() < 0.3 and not noun.group.nuisance else noun.group, good)
    return noun.clause(noun.text + opinion.text, opinion)


def _unnamed(rng: random.Random, domain: str, good: bool) -> Clause:
    """太好吃了: the subject is left out."""
    opinion = opinion_of(rng, rng.choice([g for g in _groups(domain) if not g.nuisance]), good)
    return Clause(opinion.text, opinion.label, opinion.strength, domain=_OWNERS.get(opinion.word, OTHER))


def _liked(rng: random.Random, domain: str, good: bool) -> Clause:
    """我很喜欢这部电影, 我太喜欢这部电影了"""
    noun = noun_phrase(rng, domain, likeable=True)
    opinion = opinion_of(rng, _LIKING, good, frozenset(("", "了")))
    who = rng.choice(("我", "我", "我", "本人", "我们", "我们全家都", "我家孩子", ""))
    return noun.clause(who + opinion.before + opinion.word + noun.text + opinion.after, opinion)


def _felt(rng: random.Random, domain: str, good: bool) -> Clause:
    """我对这家酒店很失望, 这家酒店让我很失望"""
    noun = noun_phrase(rng, domain, likeable=True)
    opinion = opinion_of(rng, _FEELING, good)
    frame = rng.choice(("我对{}{}", "对{}{}", "{}让我{}", "{}让人{}", "{}令我{}", "{}让我感到{}"))
    return noun.clause(frame.format(noun.text, opinion.text), opinion)


def _kind_of(rng: random.Random, domain: str, good: bool) -> Clause:
    """这是一部很好看的电影"""
    _, noun, group = _thing(rng, domain)
    opinion = opinion_of(rng, group, good, frozenset(("",)))
    frame = rng.choice(("这是一{}{}的{}", "真是一{}{}的{}", "一{}{}的{}", "是{}{}的{}"))
    text = frame.format(group.measure, opinion.text.lstrip("也都"), noun)
    return Clause(text, opinion.label, opinion.strength, noun, domain)


def _phrase(rng: random.Random, domain: str, good: bool) -> Clause:
    """这部电影看得我想睡觉, sometimes without the subject."""
    if domain == OTHER:
        return remark(rng, domain, good)
    phrase = rng.choice(DOMAINS[domain].praise if good else DOMAINS[domain].blame)
    said = filled(rng, phrase)
    text, noun, _ = _thing(rng, domain)
    if rng.random() < 0.4:
        return Clause(said, said, "中", domain=_OWNERS.get(phrase, OTHER))
    return Clause(text + said, said, "中", noun, domain)


def remark(rng: random.Random, domain: str, good: bool) -> Clause:
    """Return a remark without a subject: 强烈推荐."""
    said = filled(rng, rng.choice(words.PRAISE if good else words.BLAME))
    return Clause(said, said, "中")


def filled(rng: random.Random, phrase: str) -> str:
    """Replace {time} in a phrase, such as 用了{time}就坏了, by a random time."""
    return phrase.replace("{time}", rng.choice(words.TIMES))


_KINDS = (_judged, _unnamed, _liked, _felt, _kind_of, _phrase)
_KIND_WEIGHTS = (46, 10, 15, 7, 6, 16)


def any_clause(rng: random.Random, domain: str, good: bool) -> Clause:
    """Return a random clause about a domain, positive if `good`, else negative."""
    return rng.choices(_KINDS, _KIND_WEIGHTS)[0](rng, domain, good)


def _owners() -> dict[str, str]:
    """Return the domain of each judging word or phrase that occurs in only one domain."""
    owners: dict[str, set[str]] = {}
    for name, domain in DOMAINS.items():
        judging = [word for group in domain.groups for word in group.good + group.bad]
        for word in (*judging, *domain.praise, *domain.blame):
            owners.setdefault(word, set()).add(name)
    for group in (*SHARED_GROUPS, ANYTHING, _LIKING, _FEELING):
        for word in group.good + group.bad:
            owners.setdefault(word, set()).add(OTHER)
    return {word: next(iter(names)) for word, names in owners.items() if len(names) == 1}


_OWNERS = _owners()
