"""What is asked besides the image: one value, passed whole from the command line or HTTP to whoever answers."""

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
    """What is asked of a memory besides the image. The what-if options (exclude, weigh, assume) change nothing stored.

    Args:
        k: How many neighbours vote, 1 to MAX_K.
        voting: plurality, distance, softmax or rank.
        exclude: Ids of entries that take up no rank.
        weigh: Factors of entries' weights by their ids, 0 to MAX_WEIGHT.
        assume: Labels by the ids of entries, instead of their own.
        balance: The power of a class's number of entries by which its votes are divided; auto has it chosen.
        abstain_below: A confidence below this share abstains.
        label_set: The label set whose labels are meant everywhere here; None for labels as stored.
        where: Only entries that satisfy this expression vote.

    Raises:
        UsageError: For a value that can never work, whatever the memory holds; `field` names it.
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
        self.rule  # noqa: B018  # it raises UsageError for what is no voting or balance

    @property
    def rule(self) -> VotingRule:
        """How votes are counted; without balance as long as that is to be chosen."""
        return VotingRule(self.voting, balance=0.0 if self.balance == "auto" else self.balance)

    @property
    def named_ids(self) -> tuple[int, ...]:
        """The ids that a what-if option names."""
        return (*{*self.exclude, *self.weigh, *self.assume},)

    def balanced_by(self, balance: float) -> "Question":
        """The question with the balance that was chosen."""
        return replace(self, balance=balance)

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all options; ids are keys as text."""
        document = {each.name: getattr(self, each.name) for each in fields(self)}
        by_id = {name: {str(entry_id): value for entry_id, value in document[name].items()} for name in _BY_ID}
        return document | by_id | {"exclude": [*map(int, self.exclude)]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Question":
        """The question in a JSON object, which may leave options out. Raises UsageError."""
        known = {each.name: document[each.name] for each in fields(cls) if each.name in document}
        by_id = {name: {int(i): value for i, value in known[name].items()} for name in _BY_ID if known.get(name)}
        return cls(**known | by_id)


_BY_ID = ("weigh", "assume")


def question_of(question: Question | None, k: int, voting: Voting, options: QuestionOptions) -> Question:
    """The question that was given, or that keywords make. Raises UsageError."""
    if question is None:
        given = {name: value for name, value in options.items() if value is not None}
        return Question(k=k, voting=voting, **cast(QuestionOptions, given))
    if options:
        raise UsageError(f"a question was given, and {', '.join(options)} besides: give one of them")
    return question


@dataclass(frozen=True)
class AnswerContext:
    """What is the same for all decisions about one question: which version and how many shards answered it.

    `nothing_found` is why a decision has no neighbour. The question's balance is chosen.
    """

    question: Question
    version: int
    shards_answered: int
    shards_total: int
    nothing_found: str = "no entry with a label is left to vote"


def check_k(k: int) -> None:
    """Raises UsageError for a number of neighbours no search can return."""
    if not isinstance(k, int | np.integer) or not 1 <= k <= MAX_K:
        error = UsageError(f"k = {k} is not a number of neighbours to ask for: give 1 to {MAX_K:,}")
        error.field = "k"
        raise error
