"""A memory opened at one version. Every question is answered from such a snapshot."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.decisions.decision import Decision, Neighbor
from pipeline.index.search.live_entries import LiveEntries
from pipeline.questions.page import explanation_page
from pipeline.questions.suspects import SuspectsReport
from pipeline.questions.suspects_page import pictured, suspects_page
from pipeline.store.log.state import State
from pipeline.store.lookup.kept_values import read_kept
from pipeline.store.lookup.originals import read_originals
from pipeline.store.lookup.thumbnails import read_thumbnails
from pipeline.store.storage.interface import Storage


@dataclass(frozen=True)
class Snapshot:
    """The state of a version and its searchable entries, which are opened at their first use.

    Reading raises DamagedFile if a file is damaged, and also if an erasure has removed it meanwhile. `steady`
    distinguishes the two cases.
    """

    storage: Storage
    state: State
    open: Callable[[], LiveEntries]

    @cached_property
    def live(self) -> LiveEntries:
        """The searchable entries. Raises DamagedFile."""
        return self.open()

    def with_kept(self, neighbors: Sequence[Sequence[Neighbor]]) -> list[tuple[Neighbor, ...]]:
        """The neighbours of some queries, with their values of kept columns."""
        if not self.state.kept:
            return [tuple(each) for each in neighbors]
        ids = sorted({neighbor.id for each in neighbors for neighbor in each})
        values = read_kept(self.storage, self.state, ids)
        return [tuple(replace(n, kept=values.get(n.id, {})) for n in each) for each in neighbors]

    def decision_with_kept(self, decision: Decision) -> Decision:
        """The decision with the values of kept columns in its neighbours."""
        [neighbors] = self.with_kept([decision.neighbors])
        return replace(decision, neighbors=neighbors)

    def page(self, decision: Decision) -> str:
        """A decision as a self-contained HTML page, with stored thumbnails, or thumbnails made from the files."""
        ids = [neighbor.id for neighbor in decision.neighbors]
        thumbnails = read_thumbnails(self.storage, self.state, ids)
        originals = read_originals(self.storage, self.state, _without(ids, thumbnails))
        return explanation_page(decision, self.storage.uri, thumbnails, originals)

    def suspects_page(self, report: SuspectsReport) -> str:
        """Suspects as a self-contained HTML page, with stored thumbnails, or thumbnails made from the files."""
        ids = pictured(report)
        thumbnails = read_thumbnails(self.storage, self.state, ids)
        originals = read_originals(self.storage, self.state, _without(ids, thumbnails))
        return suspects_page(report, self.storage.uri, thumbnails, originals)


def entries_of(
    storage: Storage,
    state: State,
    label_set: str | None = None,
    where: str | None = None,
    assume: Mapping[int, str] | None = None,
) -> LiveEntries:
    """The entries of a version, opened: under a label set (None: labels as stored), and only those in `where`.

    Raises UnknownName, UsageError or DamagedFile.
    """
    live = LiveEntries.open(storage, state)
    if label_set is not None:
        live = live.in_label_set(storage, state, label_set)
    return live if where is None else live.satisfying(storage, state, where, assume or {})


def _without(ids: Sequence[int], known: Iterable[int]) -> list[int]:
    known = set(known)
    return [entry_id for entry_id in ids if entry_id not in known]
