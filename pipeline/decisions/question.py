"""A question without its image: one value, which the command line and HTTP pass to the code that answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, cast

import numpy as np

from pipeline.decisions.voting import Voting, VotingRule
from pipeline.errors import UsageError

MAX_K = 10_000
MAX_WEIGHT = 1e6


class QuestionOptions(TypedDict, total=False):
    """The options of a question besides k and voting, as keywords."""

    exclude: Sequence[int]
    weigh: Mapping[int, float]
    assume: Mapping[int, str]
    balance: float | Literal["auto"]
    abstain_below: float
    label_set: str | None
    where: str | None


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question without its image. The what-if options (exclude, weigh, assume) change nothing that is stored.

    Args:
        k: How many neighbours vote, 1 to MAX_K.
        voting: plurality, distance, softmax or rank.
        exclude: Ids of entries that take up no rank.
        weigh: Factors of the weights of entries, 0 to MAX_WEIGHT, by entry id.
        assume: Labels that replace the own labels of entries, by entry id.
        balance: The votes of a class are divided by its number of entries to this power; auto chooses the power.
        abstain_below: A decision with a confidence below this fraction (0 to 1) abstains.
        label_set: The label set of all labels in the question and the answer; None for labels as stored.
        where: Only entries that satisfy this expression vote.

    Raises:
        UsageError: For a value that is invalid for every memory; `field` names the option.
    """

    k: int = 50
    voting: Voting = "rank"
    exclude: Sequence[int] = ()
    weigh: Mapping[int, float] = field(default_factory=dict)
    assume: Mapping[int, str] = field(default_factory=dict)
    balance: float | Literal["auto"] = 0.0
    abstain_below: float = 0.0
    label_set: str | None = None
    where: str | None = None

    def __post_init__(self) -> None:
        check_k(self.k)
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if not 0 <= self.abstain_below <= 1:
            raise UsageError(f"abstain_below {self.abstain_below} is not a share: give 0 to 1")
        for entry_id, weight in self.weigh.items():
            if not 0 <= weight <= MAX_WEIGHT:
                raise UsageError(f"weight {weight} of id {entry_id} cannot be: give 0 to {MAX_WEIGHT:,.0f}")
        self.rule  # noqa: B018  # raises UsageError for an invalid voting or balance

    @property
    def rule(self) -> VotingRule:
        """The rule by which votes are counted. Its balance is 0 while the question's balance is "auto"."""
        return VotingRule(self.voting, balance=0.0 if self.balance == "auto" else self.balance)

    @property
    def named_ids(self) -> tuple[int, ...]:
        """The ids that the what-if options name."""
        return (*{*self.exclude, *self.weigh, *self.assume},)

    def balanced_by(self, balance: float) -> "Question":
        """The question with this balance."""
        return replace(self, balance=balance)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all options. Ids that are keys are strings."""
        document = {each.name: getattr(self, each.name) for each in fields(self)}
        by_id = {name: {str(entry_id): value for entry_id, value in document[name].items()} for name in _BY_ID}
        return document | by_id | {"exclude": [*map(int, self.exclude)]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Question":
        """The question in a JSON object; missing options have their defaults. Raises UsageError."""
        known = {each.name: document[each.name] for each in fields(cls) if each.name in document}
        by_id = {name: {int(i): value for i, value in known[name].items()} for name in _BY_ID if known.get(name)}
        return cls(**known | by_id)


_BY_ID = ("weigh", "assume")


def question_of(question: Question | None, k: int, voting: Voting, options: QuestionOptions) -> Question:
    """The given question, or the question that the keywords make. Raises UsageError if both are given."""
    if question is None:
        given = {name: value for name, value in options.items() if value is not None}
        return Question(k=k, voting=voting, **cast(QuestionOptions, given))
    if options:
        raise UsageError(f"a question was given, and {', '.join(options)} besides: give one of them")
    return question


@dataclass(frozen=True)
class AnswerContext:
    """The values that all decisions about one question share: the version and the number of shards that answered it.

    `nothing_found` is the reason given if a decision has no neighbour. The question's balance must be a number here.
    """

    question: Question
    version: int
    shards_answered: int
    shards_total: int
    nothing_found: str = "no entry with a label is left to vote"


def check_k(k: int) -> None:
    """Raises UsageError unless k is a whole number from 1 to MAX_K."""
    if not isinstance(k, int | np.integer) or not 1 <= k <= MAX_K:
        error = UsageError(f"k = {k} is not a number of neighbours to ask for: give 1 to {MAX_K:,}")
        error.field = "k"
        raise error
