"""Prompt ensembles: several prompts of one task, with the same base, vote on the answer (Lester et al. 2021,
arXiv:2104.08691, section 6). All prompts answer a question in one mixed batch."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from softprompt.config.adapter_specs import NONE
from softprompt.config.infer_args import Voting
from softprompt.generation.adapters import find_adapter
from softprompt.generation.encode_questions import Question
from softprompt.generation.likelihood import ChoiceResult, choice_probabilities
from softprompt.utils.errors import ConfigError

if TYPE_CHECKING:
    from softprompt.generation.model import SoftPromptModel

ScoreAnswers = Callable[[Sequence[str]], Sequence[Sequence[float]]]  # A answers → [members][A] log-likelihoods


def vote_answer(answers: Sequence[str], voting: Voting, score: ScoreAnswers) -> str:
    """Choose the ensemble's answer among those that its members gave.

    With `majority_vote`, the candidates are the most frequent answers; with `mean_likelihood`, they are all answers.
    Each member's log-likelihoods of the candidates are normalized to probabilities. The candidate with the largest mean
    probability over the members wins, in a tie the one that was given first.

    Args:
        score: Computes the members' log-likelihoods of the candidates; called only if there is more than one.
    """
    votes = Counter(answers)  # in the order in which they were given
    most = max(votes.values())
    candidates = [answer for answer, n in votes.items() if n == most or voting == "mean_likelihood"]
    if len(candidates) == 1:
        return candidates[0]
    mean = mean_probabilities([choice_probabilities(scores, candidates) for scores in score(candidates)])
    return max(candidates, key=lambda answer: mean[answer])


def vote_choice(results: Sequence[ChoiceResult], voting: Voting) -> ChoiceResult:
    """Combine the members' results on one question.

    The probabilities are the means over the members. With `mean_likelihood`, the label is the most probable choice;
    with `majority_vote`, it is the choice with the most votes, in a tie the most probable one.
    """
    mean = mean_probabilities([result.probabilities for result in results])
    votes = Counter(result.label for result in results) if voting == "majority_vote" else Counter[str]()
    return ChoiceResult(max(mean, key=lambda choice: (votes[choice], mean[choice])), mean)


def mean_probabilities(of_members: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the members' probabilities of the same choices."""
    return {choice: sum(one[choice] for one in of_members) / len(of_members) for choice in of_members[0]}


class Ensemble:
    """Several adapters of a model that answer by voting.

    Args:
        adapters: Names of two or more adapters of the model.
        voting: `majority_vote` (the default for answers) or `mean_likelihood` (the default for choices); see
            `vote_answer` and `vote_choice`.

    Raises:
        ConfigError: There are fewer than two adapters, or `voting` has another value.
        AdapterError: An adapter is unknown.
    """

    def __init__(self, model: "SoftPromptModel", adapters: Sequence[str], voting: Voting | None = None):
        if len(adapters) < 2:
            given = ", ".join(adapters) or "no adapter"
            raise ConfigError(f"an ensemble of {given}: name two or more adapters of one task")
        if voting not in (None, *get_args(Voting)):
            raise ConfigError(f"voting {voting!r} is not one of {', '.join(get_args(Voting))}")
        for name in adapters:
            if name != NONE:
                find_adapter(model.adapters, name, "ensemble")
        self.model, self.adapters, self.voting = model, list(adapters), voting

    def generate(self, prompts: Question | Sequence[Question], **settings: Any) -> Any:
        """Answer one question (→ str) or several (→ list of str); see `stream`."""
        if isinstance(prompts, str | Mapping):
            return next(self.stream([prompts], **settings))
        return list(self.stream(prompts, **settings))

    def stream(
        self, prompts: Sequence[Question], *, skip: int = 0, where: Sequence[str] | None = None, **settings: Any
    ) -> Iterator[str]:
        """Yield the ensemble's answers in the order of the questions.

        The members answer all questions in one mixed batch, and every sample of every member has one vote. Arguments
        and errors are those of `SoftPromptModel.stream`.
        """
        where = self._names_of(prompts, where)
        answers = self.model.stream(
            self._for_each_member(prompts),
            adapter=self.adapters * len(prompts),
            skip=skip * len(self.adapters),
            where=self._for_each_member(where),
            **settings,
        )
        return self._vote(prompts[skip:], where[skip:], answers)

    def _vote(self, prompts: Sequence[Question], where: Sequence[str], answers: Iterator[Any]) -> Iterator[str]:
        for prompt, place in zip(prompts, where, strict=True):
            of_members = [next(answers) for _ in self.adapters]  # each a text, or a list of samples
            texts = [text for some in of_members for text in ([some] if isinstance(some, str) else some)]
            yield vote_answer(texts, self.voting or "majority_vote", self._scorer(prompt, place))

    def _scorer(self, prompt: Question, where: str) -> ScoreAnswers:
        members = len(self.adapters)

        def score(answers: Sequence[str]) -> Sequence[Sequence[float]]:
            return self.model.log_likelihoods(
                [prompt] * members, answers, adapter=self.adapters, where=[where] * members
            )

        return score

    def classify(
        self, prompts: Sequence[Question], choices: Sequence[str], *, where: Sequence[str] | None = None
    ) -> list[ChoiceResult]:
        """Classify each question as `SoftPromptModel.classify` does, with the members' results combined by
        `vote_choice`."""
        members, where = len(self.adapters), self._for_each_member(self._names_of(prompts, where))
        names = self.adapters * len(prompts)
        results = self.model.classify(self._for_each_member(prompts), choices, adapter=names, where=where)
        voting = self.voting or "mean_likelihood"
        return [vote_choice(results[start : start + members], voting) for start in range(0, len(results), members)]

    def _for_each_member(self, values: Sequence[Any]) -> list[Any]:
        """Repeat each value as many times as there are members."""
        return [value for value in values for _ in self.adapters]

    def _names_of(self, prompts: Sequence[Question], where: Sequence[str] | None) -> list[str]:
        """Return the names of the questions in error messages, by default their numbers."""
        return list(where or [f"question {number}" for number in range(1, len(prompts) + 1)])
