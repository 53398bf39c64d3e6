"""Several prompts of one task as one: each question is put to all of them in one mixed batch, and they vote (Lester et
al. 2021, arXiv:2104.08691, section 6: an ensemble of prompts over one frozen model)."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, get_args

from softprompt.config.infer_args import Voting
from softprompt.generation.adapters import NONE, find_adapter
from softprompt.generation.encode_questions import Question
from softprompt.generation.likelihood import ChoiceResult, shares
from softprompt.utils.errors import ConfigError

Scores = Callable[[Sequence[str]], Sequence[Sequence[float]]]  # answers [c] → each member's log-likelihoods [k][c]


def majority(given: Sequence[str], voting: Voting, scores: Scores) -> str:
    """The answer of an ensemble whose members gave these. `majority_vote`: the one that most of them gave, and among
    several of these the likeliest; `mean_likelihood`: the likeliest of all. How likely an answer is, is the mean over
    the members of its probability among those that are left; of equally likely ones the first given is taken."""
    votes = Counter(given)  # in the order in which they were given
    most = max(votes.values())
    left = [answer for answer, n in votes.items() if n == most or voting == "mean_likelihood"]
    if len(left) == 1:
        return left[0]
    likely = mean([shares(of_member, left) for of_member in scores(left)])
    return max(left, key=lambda answer: likely[answer])


def joint_verdict(of_members: Sequence[ChoiceResult], voting: Voting) -> ChoiceResult:
    """The choice of an ensemble, with the mean of its members' probabilities: the largest of these, or, by
    `majority_vote`, the one that most members take, and among several of these the one with the largest."""
    likely = mean([one.probabilities for one in of_members])
    votes = Counter(one.label for one in of_members)
    first = votes if voting == "majority_vote" else Counter[str]()
    return ChoiceResult(max(likely, key=lambda choice: (first[choice], likely[choice])), likely)


def mean(of_members: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {answer: sum(one[answer] for one in of_members) / len(of_members) for answer in of_members[0]}


class Answers(Protocol):
    """What an ensemble needs of `api.SoftPromptModel`."""

    adapters: Any

    def stream(self, prompts: Any, **settings: Any) -> Iterator[Any]: ...
    def classify(self, prompts: Any, choices: Any, **settings: Any) -> list[ChoiceResult]: ...
    def log_likelihoods(self, prompts: Any, answers: Any, **settings: Any) -> list[list[float]]: ...


class Ensemble:
    """Adapters of a model that answer together. `voting` is as of `majority`; None votes on answers and takes the mean
    likelihood of choices."""

    def __init__(self, model: Answers, adapters: Sequence[str], voting: Voting | None = None):
        """Raises ConfigError for fewer than two adapters or another voting, AdapterError for an unknown adapter."""
        if len(adapters) < 2:
            told = ", ".join(adapters) or "no adapter"
            raise ConfigError(f"an ensemble of {told}: name two or more adapters of one task")
        if voting not in (None, *get_args(Voting)):
            raise ConfigError(f"voting {voting!r} is not one of {', '.join(get_args(Voting))}")
        for name in adapters:
            if name != NONE:
                find_adapter(model.adapters, name, "ensemble")
        self.model, self.adapters, self.voting = model, list(adapters), voting

    def generate(self, prompts: Question | Sequence[Question], **settings: Any) -> Any:
        """Answer one question (→ str) or several (→ list); see `stream`."""
        if isinstance(prompts, str | Mapping):
            return next(self.stream([prompts], **settings))
        return list(self.stream(prompts, **settings))

    def stream(
        self, prompts: Sequence[Question], *, skip: int = 0, where: Sequence[str] | None = None, **settings: Any
    ) -> Iterator[str]:
        """The elected answers, one by one in the questions' order; all else is as of `SoftPromptModel.stream`. All
        members' answers to all questions are one mixed batch, and every sample of a member has a vote."""
        each = self._places(prompts, where)
        given = self.model.stream(
            self._of_each(prompts),
            adapter=self.adapters * len(prompts),
            skip=skip * len(self.adapters),
            where=self._of_each(each),
            **settings,
        )
        return self._elected(prompts[skip:], each[skip:], given)

    def _elected(self, prompts: Sequence[Question], where: Sequence[str], given: Iterator[Any]) -> Iterator[str]:
        for prompt, place in zip(prompts, where, strict=True):
            of_members = [next(given) for _ in self.adapters]
            texts = [text for some in of_members for text in ([some] if isinstance(some, str) else some)]
            yield majority(texts, self.voting or "majority_vote", self._scores(prompt, place))

    def _scores(self, prompt: Question, place: str) -> Scores:
        members = len(self.adapters)

        def scores(answers: Sequence[str]) -> Sequence[Sequence[float]]:
            return self.model.log_likelihoods(
                [prompt] * members, answers, adapter=self.adapters, where=[place] * members
            )

        return scores

    def classify(
        self, prompts: Sequence[Question], choices: Sequence[str], *, where: Sequence[str] | None = None
    ) -> list[ChoiceResult]:
        """As `SoftPromptModel.classify`, with the mean of the members' probabilities."""
        k, places = len(self.adapters), self._of_each(self._places(prompts, where))
        names = self.adapters * len(prompts)
        each = self.model.classify(self._of_each(prompts), choices, adapter=names, where=places)
        voting = self.voting or "mean_likelihood"
        return [joint_verdict(each[start : start + k], voting) for start in range(0, len(each), k)]

    def _of_each(self, values: Sequence[Any]) -> list[Any]:
        """Every value once for each member."""
        return [value for value in values for _ in self.adapters]

    def _places(self, prompts: Sequence[Question], where: Sequence[str] | None) -> list[str]:
        return list(where or [f"question {number}" for number in range(1, len(prompts) + 1)])
