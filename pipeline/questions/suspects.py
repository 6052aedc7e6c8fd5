"""Finds the entries whose labels a person should look at, by leave-one-out over all labelled entries.

An entry is a suspect of one kind:

- mislabelled: the others decide for another label, and its vote does not help them enough to outweigh that
  (decisions/reliability.py);
- ambiguous: the others are divided between its label and another one;
- duplicated: another entry has the same bytes, or nearly the same vector.

Shapes: Q queries, K neighbours, N labelled entries.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pipeline.decisions.decision import Neighbor
from pipeline.decisions.question import check_k
from pipeline.decisions.reliability import LIST_FACTOR, VOTERS, Agreements
from pipeline.decisions.voting import VotingRule, count_votes, neighbor_weights
from pipeline.errors import UsageError
from pipeline.index.search.leave_one_out import COPY_SIMILARITY, search_others
from pipeline.index.search.live_entries import LiveEntries
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.questions.answering import neighbor_table
from pipeline.questions.evaluation import ASKING, check_labelled
from pipeline.questions.others import QUERIES_AT_ONCE, Others, labelled_in_part, others_of
from pipeline.store.lookup.digests import Digests
from pipeline.tabular import Tabular

Kind = Literal["mislabelled", "ambiguous", "duplicated"]
KINDS: tuple[Kind, ...] = get_args(Kind)

AMBIGUOUS_BELOW = 0.1  # of the votes: how far apart two labels are at most
# How much it counts what the others say of an entry, beside what it does to them. Some entries are in no list, and only
# the others tell of them. Of the 1,000 first suspects .983 were mislabelled, .985 with 0 and .981 with 1.
LEAD_FACTOR = 0.3
MAX_LISTED = 10_000  # neighbours in a list, as many as a question may ask for
RULE = VotingRule("rank")


@dataclass(frozen=True)
class Suspect:
    """An entry whose label a person should look at.

    `share` is the fraction of the votes of its nearest others for its own label, and `suggested_share` that for
    `suggested`, the best other label (None if no other has a vote). `right` and `wrong` count the entries for which it
    is among the nearest `k`, with the same label and with another one. `shapley` is its KNN-Shapley value: below 0 it
    misleads more than it helps. `duplicate_of` is another entry with the same bytes or nearly the same vector; it may
    be None. `neighbors` are its nearest others without such of the same bytes.
    """

    id: int
    uri: str
    label: str
    dataset: str
    kind: Kind
    suggested: str | None
    share: float
    suggested_share: float
    shapley: float
    right: int
    wrong: int
    duplicate_of: int | None
    neighbors: tuple[Neighbor, ...] = field(default=(), repr=False)

    @property
    def proposed(self) -> str:
        """The label for a correction: the suggested one if the entry is taken for mislabelled, else its own."""
        return self.suggested if self.kind == "mislabelled" and self.suggested is not None else self.label

    def to_json(self) -> dict:
        """The suspect as a JSON object."""
        return {
            "id": self.id,
            "id_text": str(self.id),
            "uri": self.uri,
            "label": self.label,
            "dataset": self.dataset,
            "kind": self.kind,
            "suggested": self.suggested,
            "share": self.share,
            "suggested_share": self.suggested_share,
            "shapley": self.shapley,
            "right": self.right,
            "wrong": self.wrong,
            "duplicate_of": self.duplicate_of,
            "neighbors": [neighbor.to_json() for neighbor in self.neighbors],
        }


@dataclass(frozen=True)
class SuspectsReport(Tabular):
    """The first of all suspects, and how many there are of each kind among the `labelled` entries."""

    suspects: tuple[Suspect, ...]
    counts: dict[Kind, int]
    labelled: int
    k: int
    version: int
    label_set: str | None = None
    where: str | None = None

    def _rows(self) -> list[dict[str, Any]]:
        """One row for each suspect."""
        return [{n: v for n, v in s.to_json().items() if n not in ("neighbors", "id_text")} for s in self.suspects]

    def to_json(self) -> dict:
        """The report as a JSON object."""
        return {
            "labelled": self.labelled,
            **self.counts,
            "k": self.k,
            "version": self.version,
            "label_set": self.label_set,
            "where": self.where,
            "suspects": [suspect.to_json() for suspect in self.suspects],
        }


def find_suspects(
    live: LiveEntries,
    digests: Digests,
    starts: Sequence[int],
    version: int,
    limit: int,
    k: int = VOTERS,
    kind: Kind | None = None,
    on_progress: OnProgress = ignore_progress,
) -> SuspectsReport:
    """Ask about every labelled entry, and list the first `limit` suspects, of one `kind` if it is given.

    The parts of the entries begin at the ids `starts`. Costs one search for each entry, for LIST_FACTOR * k neighbours,
    its digest, and 70 bytes of memory.

    Mislabelled entries come first, in the order of their KNN-Shapley values and of the votes against their labels. Then
    come ambiguous ones, those with the most divided votes first, and duplicated ones, those whose label differs from
    their duplicate's first. Raises SourceError if no entry has a label, UsageError for impossible numbers, DamagedFile.
    """
    check_k(k)
    if limit < 1:
        raise UsageError(f"`limit` {limit} is no number of entries: give 1 or more")
    if kind is not None and kind not in KINDS:
        raise UsageError(f"`kind` {kind} is unknown: give {', '.join(KINDS)}")
    labelled = check_labelled(live)
    parts = [labelled_in_part(live, starts, part) for part in range(len(starts))]
    ids_N, codes_N = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    look = _Look(ids_N, codes_N, live.label_counts(), k)
    del parts
    on_progress(Progress(ASKING, 0, labelled))
    for others in others_of(live, digests, min(LIST_FACTOR * k, MAX_LISTED), look.ids_N, look.codes_N):
        look.note(others, digests.of(others.ids_Q))
        on_progress(Progress(ASKING, look.num_noted, labelled))
    kinds_N, orders = look.judged()
    counts = {each: int((kinds_N == number).sum()) for number, each in enumerate(KINDS)}
    wanted = [order for each, order in zip(KINDS, orders, strict=True) if kind in (None, each)]
    chosen = np.concatenate(wanted)[:limit]
    suspects = _described(live, digests, look, kinds_N, chosen)
    return SuspectsReport(suspects, counts, labelled, k, version, live.label_set, live.where)


class _Look:
    """What leave-one-out says of N labelled entries: ids int64 ascending, label codes int32.

    `shares_N` are the fractions of votes for their own labels, `other_shares_N` those for the best others (`others_N`,
    codes, -1 for none). `duplicates_N` are the positions of entries with the same bytes or nearly the same vector.
    """

    def __init__(self, ids_N: np.ndarray, codes_N: np.ndarray, counts_C: np.ndarray, k: int) -> None:
        self.ids_N, self.codes_N, self.k = ids_N, codes_N, k
        self._counts_C = counts_C
        self.agreements = Agreements(len(ids_N), k)
        self.shares_N, self.other_shares_N = (np.zeros(len(ids_N), np.float32) for _ in range(2))
        self.others_N = np.full(len(ids_N), -1, np.int32)
        self.duplicates_N = np.full(len(ids_N), -1, np.int64)
        self._digests_N = np.zeros(len(ids_N), np.uint64)
        self.num_noted = 0

    def note(self, others: Others, digests_Q: np.ndarray) -> None:
        """Take in the neighbours of the next entries, in the order of `ids_N`."""
        rows = slice(self.num_noted, self.num_noted + len(others.ids_Q))
        found, own_Q1 = others.found, others.codes_Q[:, None]
        places_QK = np.searchsorted(self.ids_N, found.ids_QK)
        places_QK[found.ids_QK < 0] = -1
        agrees_QK = (found.codes_QK == own_Q1) & (found.ids_QK >= 0)
        self.agreements.count(places_QK, agrees_QK)
        similarities_QK, codes_QK = found.similarities_QK[:, : self.k], found.codes_QK[:, : self.k]
        agrees_QK = agrees_QK[:, : self.k]
        weights_QK = neighbor_weights(similarities_QK, codes_QK >= 0, RULE)
        totals_Q = weights_QK.sum(axis=1)
        own_Q = (weights_QK * agrees_QK).sum(axis=1)
        shares_Q = np.divide(own_Q, totals_Q, out=np.zeros_like(own_Q), where=totals_Q > 0)
        votes = count_votes(similarities_QK, np.where(agrees_QK, -1, codes_QK), RULE, self._counts_C)
        self.shares_N[rows] = shares_Q
        self.others_N[rows] = votes.winners_Q
        self.other_shares_N[rows] = votes.confidences_Q * (1 - shares_Q)
        if found.ids_QK.shape[1]:
            near_Q = (found.similarities_QK[:, 0] >= COPY_SIMILARITY) & (found.ids_QK[:, 0] >= 0)
            self.duplicates_N[rows] = np.where(near_Q, places_QK[:, 0], -1)
        self._digests_N[rows] = digests_Q
        self.num_noted = rows.stop

    def judged(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The kind of each entry (its number in KINDS, -1: no suspect; int8 [N]), and the entries of each, in order."""
        self._find_copies()
        values_N = self.agreements.values_N
        lead_N = self.other_shares_N - self.shares_N
        kinds_N = np.full(len(self.ids_N), -1, np.int8)
        kinds_N[self.duplicates_N >= 0] = KINDS.index("duplicated")
        divided_N = (np.abs(lead_N) <= AMBIGUOUS_BELOW) & (self.others_N >= 0)
        kinds_N[divided_N] = KINDS.index("ambiguous")
        trust_N = _scaled(values_N) - LEAD_FACTOR * _scaled(lead_N)
        kinds_N[(lead_N > 0) & (trust_N < 0)] = KINDS.index("mislabelled")
        differs_N = self.codes_N != self.codes_N[self.duplicates_N]
        orders = []
        for number, rank_N in enumerate((trust_N, np.abs(lead_N), np.where(differs_N, 0, 1))):
            of_kind = np.flatnonzero(kinds_N == number)
            orders.append(of_kind[np.lexsort((of_kind, trust_N[of_kind], rank_N[of_kind]))])
        return kinds_N, orders

    def _find_copies(self) -> None:
        """Note another entry with the same bytes for each entry that has one."""
        order = np.argsort(self._digests_N, kind="stable")
        same = self._digests_N[order[1:]] == self._digests_N[order[:-1]]
        self.duplicates_N[order[:-1][same]] = order[1:][same]
        self.duplicates_N[order[1:][same]] = order[:-1][same]


def _scaled(values_N: np.ndarray) -> np.ndarray:
    """The values divided by their standard deviation, if they differ."""
    deviation = float(values_N.std()) if len(values_N) else 0.0
    return values_N / deviation if deviation else values_N


def _described(
    live: LiveEntries, digests: Digests, look: _Look, kinds_N: np.ndarray, chosen: np.ndarray
) -> tuple[Suspect, ...]:
    """The suspects at some positions, with their nearest others."""
    found: list[Suspect] = []
    values_N = look.agreements.values_N
    for start in range(0, len(chosen), QUERIES_AT_ONCE):
        rows = chosen[start : start + QUERIES_AT_ONCE]
        ids = look.ids_N[rows]
        near = search_others(live, digests, live.vectors_of(ids), look.k, ids)
        table = neighbor_table(live, near)
        described = live.described(ids)
        for query, (row, (uri, dataset)) in enumerate(zip(rows.tolist(), described, strict=True)):
            other, duplicate = int(look.others_N[row]), int(look.duplicates_N[row])
            found.append(
                Suspect(
                    id=int(look.ids_N[row]),
                    uri=uri,
                    label=live.labels[look.codes_N[row]],
                    dataset=dataset,
                    kind=KINDS[kinds_N[row]],
                    suggested=live.labels[other] if other >= 0 else None,
                    share=float(look.shares_N[row]),
                    suggested_share=float(look.other_shares_N[row]),
                    shapley=float(values_N[row]),
                    right=int(look.agreements.right_N[row]),
                    wrong=int(look.agreements.wrong_N[row]),
                    duplicate_of=int(look.ids_N[duplicate]) if duplicate >= 0 else None,
                    neighbors=table.neighbors(query, live.labels),
                )
            )
    return tuple(found)


def corrections(suspects: Sequence[Suspect]) -> str:
    """A CSV file of suspects that `relabel --file` and `forget --file` take, once a person has looked at it.

    `label` is the suggested label of an entry taken for mislabelled, and else its own.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("id", "label", "stored_label", "kind", "uri"))
    rows.writerows((s.id, s.proposed, s.label, s.kind, s.uri) for s in suspects)
    return text.getvalue()


def write_corrections(suspects: Sequence[Suspect], path: Path) -> None:
    """Write `corrections` to a new file. Raises UsageError if there is a file, which somebody may have edited."""
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            file.write(corrections(suspects))
    except FileExistsError as error:
        raise UsageError(f"{path} is there already: name another file for the corrections") from error
    except FileNotFoundError as error:
        raise UsageError(f"the folder of {path} does not exist: make it first") from error
