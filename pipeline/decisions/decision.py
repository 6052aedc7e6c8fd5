"""A decision in its public form: the winner, the votes, and every neighbour with its weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pipeline.decisions.question import AnswerContext
from pipeline.decisions.voting import Votes

SHOWN_IN_NOTEBOOKS = 10  # neighbours per decision


@dataclass(frozen=True)
class Neighbor:
    """A retrieved entry.

    `rank` counts from 0. `weight` is the entry's fraction of all votes, None outside a decision. `kept` are the values
    of kept columns by name, empty if they were not asked for.
    """

    rank: int
    id: int
    uri: str
    label: str | None
    similarity: float
    dataset: str
    reliability: float = 1.0
    weight: float | None = None
    kept: Mapping[str, bool | int | float | str | None] = field(default_factory=dict, compare=False)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Neighbor":
        """The neighbour in a JSON object that `to_json` made."""
        known = ("rank", "id", "uri", "label", "dataset", "similarity", "reliability", "weight", "kept")
        return cls(**{name: fields[name] for name in known if name in fields})

    def _repr_html_(self) -> str:
        """The neighbour as HTML for a notebook."""
        return _html_table([self])

    def to_json(self) -> dict:
        fields = {
            "rank": self.rank,
            "id": self.id,
            "id_text": str(self.id),  # JavaScript, and any reader of floats, rounds numbers above 2 ** 53
            "uri": self.uri,
            "label": self.label,
            "dataset": self.dataset,
            "similarity": self.similarity,
        }
        if self.weight is not None:
            fields |= {"reliability": self.reliability, "weight": self.weight}
        return fields | ({"kept": dict(self.kept)} if self.kept else {})


@dataclass(frozen=True, repr=False)
class Decision:
    """The answer to one query. An abstention has no label; it has its votes and a reason."""

    uri: str | None
    label: str | None
    confidence: float
    margin: float
    abstained: bool
    voting: str
    k: int
    votes: dict[str, float]
    neighbors: tuple[Neighbor, ...]
    version: int
    shards_answered: int
    shards_total: int
    balance: float = 0.0
    reason: str | None = None
    label_set: str | None = None
    where: str | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Decision":
        """The decision in a JSON object that `to_json` made. Unknown fields are ignored."""
        known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        return cls(**known | {"neighbors": tuple(map(Neighbor.from_json, fields["neighbors"]))})

    def __repr__(self) -> str:
        decided = f"label={self.label!r}" if not self.abstained else f"abstained: {self.reason}"
        return (
            f"Decision({decided}, confidence={self.confidence:.3f}, margin={self.margin:.3f}, voting={self.voting!r}, "
            f"k={self.k}, {len(self.neighbors)} neighbors, version={self.version})"
        )

    def _repr_html_(self) -> str:
        """The decision as HTML for a notebook: the label and the first neighbours."""
        decided = "no decision" if self.abstained else escape(str(self.label))
        about = f"confidence {self.confidence:.1%}, margin {self.margin:.1%}, {escape(self.voting)}, k = {self.k}"
        reason = f"<p>{escape(self.reason)}</p>" if self.reason else ""
        more = len(self.neighbors) - SHOWN_IN_NOTEBOOKS
        left = f"<p>and {more} more neighbours</p>" if more > 0 else ""
        return f"<p><b>{decided}</b> ({about})</p>{reason}{_html_table(self.neighbors[:SHOWN_IN_NOTEBOOKS])}{left}"

    def to_json(self) -> dict:
        """The decision as a JSON object."""
        return {
            "uri": self.uri,
            "label": self.label,
            "confidence": self.confidence,
            "margin": self.margin,
            "abstained": self.abstained,
            "reason": self.reason,
            "voting": self.voting,
            "balance": self.balance,
            "k": self.k,
            "label_set": self.label_set,
            "where": self.where,
            "votes": self.votes,
            "neighbors": [neighbor.to_json() for neighbor in self.neighbors],
            "version": self.version,
            "shards_answered": self.shards_answered,
            "shards_total": self.shards_total,
        }


def _html_table(neighbors: Sequence[Neighbor]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("rank", "label", "similarity", "weight", "id", "uri"))
    rows = "".join(
        f"<tr><td>{n.rank}</td><td>{'' if n.label is None else escape(n.label)}</td><td>{n.similarity:.4f}</td>"
        f"<td>{'' if n.weight is None else f'{n.weight:.4f}'}</td><td>{n.id}</td><td>{escape(n.uri)}</td></tr>"
        for n in neighbors
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def decision_of(
    answering: AnswerContext,
    uri: str | None,
    neighbors: tuple[Neighbor, ...],
    votes: Votes,
    query: int,
    label: str | None,
) -> Decision:
    """Assemble the decision of one query from its row of the counted votes.

    `neighbors` have their weights already. `label` is the winner's label, None if there is no winner.
    """
    question = answering.question
    shares: dict[str, float] = {}
    for neighbor in neighbors:
        if neighbor.label is not None and neighbor.weight:
            shares[neighbor.label] = shares.get(neighbor.label, 0.0) + neighbor.weight
    confidence = float(votes.confidences_Q[query])
    if label is not None:
        shares[label] = confidence  # exactly the same number: a sum in another order may differ
    reason = None
    if label is None:
        reason = answering.nothing_found if not neighbors else "all neighbours have weight zero"
    elif confidence < question.abstain_below:
        reason = f"confidence {confidence:.3f} is below {question.abstain_below:g}"
    return Decision(
        uri=uri,
        label=None if reason else label,
        confidence=confidence,
        margin=float(votes.margins_Q[query]),
        abstained=reason is not None,
        voting=question.voting,
        k=question.k,
        votes=dict(sorted(shares.items(), key=lambda pair: (-pair[1], pair[0] != label))),
        neighbors=neighbors,
        version=answering.version,
        shards_answered=answering.shards_answered,
        shards_total=answering.shards_total,
        balance=question.rule.balance,
        reason=reason,
        label_set=question.label_set,
        where=question.where,
    )
