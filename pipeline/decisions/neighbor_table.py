"""The neighbours of some queries, and the decisions made from them.

A search in one process and a search over several processes both use this module, so that they give the same answers.
Shapes: Q queries, K neighbours in rank order, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.decisions.decision import Decision, Neighbor, decision_of
from pipeline.decisions.question import AnswerContext
from pipeline.decisions.rivals import Rivals, shared_borders
from pipeline.decisions.voting import count_votes

KeptValues = Mapping[str, bool | int | float | str | None]  # values of kept columns, by column name


@dataclass(frozen=True)
class NeighborTable:
    """Neighbours in order: similarities float32, ids int64 and label codes int32, all [Q, K].

    If a query has fewer than K neighbours, the rest of its row has similarity -inf, id -1 and code -1. `uris`,
    `datasets` and `kept` have one item per neighbour of a query. `kept` has the values of kept columns; None if they
    were not asked for. If the table has the contenders of one of several places, `rivals` say which of them count.
    """

    similarities_QK: np.ndarray
    ids_QK: np.ndarray
    codes_QK: np.ndarray
    uris: list[list[str]]
    datasets: list[list[str]]
    kept: list[list[KeptValues]] | None = None
    rivals: Rivals | None = None

    def rows(self, queries: slice) -> "NeighborTable":
        """The rows of some of the queries."""
        columns = self.similarities_QK[queries], self.ids_QK[queries], self.codes_QK[queries]
        kept = self.kept[queries] if self.kept is not None else None
        rivals = self.rivals.rows(queries) if self.rivals is not None else None
        return NeighborTable(*columns, self.uris[queries], self.datasets[queries], kept, rivals)

    def neighbors(
        self,
        query: int,
        labels: Sequence[str],
        weigh: Mapping[int, float] | None = None,
        weights: Sequence[float] | None = None,
    ) -> tuple[Neighbor, ...]:
        """The neighbours of one query. Codes are indices into `labels`; `weights` are fractions of all votes."""
        weigh = weigh or {}
        ids, codes = self.ids_QK[query].tolist(), self.codes_QK[query].tolist()
        similarities = self.similarities_QK[query].tolist()
        return tuple(
            Neighbor(
                rank=rank,
                id=ids[rank],
                uri=uri,
                label=labels[codes[rank]] if codes[rank] >= 0 else None,
                similarity=similarities[rank],
                dataset=dataset,
                reliability=float(weigh.get(ids[rank], 1.0)),
                weight=weights[rank] if weights is not None else None,
                kept=self.kept[query][rank] if self.kept is not None else {},
            )
            for rank, (uri, dataset) in enumerate(zip(self.uris[query], self.datasets[query], strict=True))
        )


@dataclass(frozen=True)
class LabelStatistics:
    """Counts of live entries, used for balance and for the reasons of abstentions.

    `counts_C` (int64) has the number of live entries of each of `labels`. `live` counts all searchable entries, with or
    without a label. `whole` also counts the entries that do not satisfy `where`. `vocabulary` is a digest of `labels`;
    empty if none was made.
    """

    labels: tuple[str, ...]
    counts_C: np.ndarray
    live: int
    whole: int
    vocabulary: str = ""

    def why_empty(self, label_set: str | None, where: str | None, *, excluding: bool) -> str:
        """The reason why a decision has no neighbour."""
        if not self.whole:
            return "the memory holds no entries"
        if not self.live:
            return f"no entry satisfies where: {where}"
        if not self.counts_C.any():
            which = "of the memory" if where is None else f"that satisfies where ({where})"
            in_set = f" in the label set '{label_set}'" if label_set is not None else ""
            return f"no entry {which} has a label{in_set}"
        return "every entry with a label is excluded" if excluding else AnswerContext.nothing_found


def values_by_id(ids_QK: np.ndarray, by_id: Mapping[int, float], others_QK: np.ndarray) -> np.ndarray:
    """The value in `by_id` of each id, or else the value in `others_QK`; with the shape and dtype of `others_QK`.

    All ids are looked up at once. The cost is proportional to the number of ids times the logarithm of the size of
    `by_id`.
    """
    wanted = np.array(sorted(by_id), np.int64)
    values = np.array([by_id[entry_id] for entry_id in wanted.tolist()])
    at_QK = np.minimum(np.searchsorted(wanted, ids_QK), len(wanted) - 1)
    result_QK: np.ndarray = np.where(wanted[at_QK] == ids_QK, values[at_QK], others_QK).astype(others_QK.dtype)
    return result_QK


def decide(
    found: NeighborTable, standing: LabelStatistics, answering: AnswerContext, uris: Sequence[str | None]
) -> list[Decision]:
    """One decision per query, in order; `uris` are the uris of the queried images."""
    rule, weigh = answering.question.rule, answering.question.weigh
    reliabilities_QK = np.ones(found.ids_QK.shape)
    if weigh:
        reliabilities_QK = values_by_id(found.ids_QK, weigh, reliabilities_QK)
    votes = count_votes(found.similarities_QK, found.codes_QK, rule, standing.counts_C, reliabilities_QK)
    decisions = []
    for query, uri in enumerate(uris):
        neighbors = found.neighbors(query, standing.labels, weigh, votes.weights_QK[query].tolist())
        winner = int(votes.winners_Q[query])
        label = standing.labels[winner] if winner >= 0 else None
        decisions.append(decision_of(answering, uri, neighbors, votes, query, label))
    return decisions


def merge_neighbors(parts: Sequence[NeighborTable], k: int) -> NeighborTable:
    """The k nearest neighbours over the tables of several places for the same queries; ties are ordered by id.

    The codes of all tables must be indices into the same list of labels. Each entry is in one place only.
    """
    if len(parts) == 1 and parts[0].rivals is None:
        return parts[0]
    similarities_QK, ids_QK, codes_QK, order_QK = _nearest_first(parts, k)
    starts = np.cumsum([0, *(part.ids_QK.shape[1] for part in parts)])
    sources_QK = np.searchsorted(starts, order_QK, side="right") - 1
    places_QK = order_QK - starts[sources_QK]
    ids_QK = np.take_along_axis(ids_QK, order_QK, axis=1)
    uris, datasets, kept = [], [], []
    for query in range(len(order_QK)):
        pairs = [
            (parts[source], place)
            for source, place, entry_id in zip(
                sources_QK[query].tolist(), places_QK[query].tolist(), ids_QK[query].tolist(), strict=True
            )
            if entry_id >= 0
        ]
        uris.append([part.uris[query][place] for part, place in pairs])
        datasets.append([part.datasets[query][place] for part, place in pairs])
        kept.append([part.kept[query][place] if part.kept is not None else {} for part, place in pairs])
    return NeighborTable(
        np.take_along_axis(similarities_QK, order_QK, axis=1),
        ids_QK,
        np.take_along_axis(codes_QK, order_QK, axis=1),
        uris,
        datasets,
        kept if any(part.kept is not None for part in parts) else None,
    )


def _nearest_first(parts: Sequence[NeighborTable], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Similarities, ids and label codes of all tables side by side, and the positions of the k nearest in order.

    Contenders that do not count are none.
    """
    similarities_QK, ids_QK, codes_QK = (
        np.concatenate([getattr(part, name) for part in parts], axis=1)
        for name in ("similarities_QK", "ids_QK", "codes_QK")
    )
    rivals = [part.rivals for part in parts if part.rivals is not None]
    if rivals:
        border_Q1 = shared_borders(rivals)[:, None]
        counts = [
            np.ones(part.ids_QK.shape, bool) if part.rivals is None else part.rivals.own_QK >= border_Q1
            for part in parts
        ]
        counts_QK = np.concatenate(counts, axis=1)
        similarities_QK = np.where(counts_QK, similarities_QK, np.float32(-np.inf))
        ids_QK, codes_QK = np.where(counts_QK, ids_QK, -1), np.where(counts_QK, codes_QK, -1)
    return similarities_QK, ids_QK, codes_QK, np.lexsort((ids_QK, -similarities_QK), axis=-1)[:, :k]


def nearest_ids(parts: Sequence[NeighborTable], k: int) -> set[int]:
    """The ids that are among the k nearest of any query over the tables of several places, as in `merge_neighbors`."""
    if not parts:
        return set()
    _, ids_QK, _, order_QK = _nearest_first(parts, k)
    nearest_QK = np.take_along_axis(ids_QK, order_QK, axis=1)
    return {*nearest_QK[nearest_QK >= 0].tolist()}


def with_kept(table: NeighborTable, values: Mapping[int, KeptValues]) -> NeighborTable:
    """The neighbours with the values of kept columns by their ids; none for an id that is not there."""
    rows = (table.ids_QK[query, : len(uris)].tolist() for query, uris in enumerate(table.uris))
    return replace(table, kept=[[values.get(entry_id, {}) for entry_id in row] for row in rows])


def merge_labels(parts: Sequence[LabelStatistics]) -> tuple[LabelStatistics, list[np.ndarray]]:
    """The merged statistics of several places, and for each place the translation of its codes to merged codes.

    A translation is int32 [C + 1]. Its last item is -1, so that the code -1 (no label) is translated to itself.
    """
    codes: dict[str, int] = {}
    translations = [
        np.array([*(codes.setdefault(label, len(codes)) for label in part.labels), -1], np.int32) for part in parts
    ]
    counts_C = np.zeros(len(codes), np.int64)
    for part, translation in zip(parts, translations, strict=True):
        np.add.at(counts_C, translation[:-1], part.counts_C)
    whole = LabelStatistics(tuple(codes), counts_C, sum(part.live for part in parts), sum(part.whole for part in parts))
    return whole, translations
