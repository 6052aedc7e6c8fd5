"""Merges the inverted lists of the shards of a process, so that each list is searched and padded once.

Only lists that lie in memory are merged: those of fast scan, in blocks of 32 codes. FAISS maps the lists of other kinds
from their files, where merged lists would have to be in memory. A shard of a million rows in 8,192 lists has 122 rows a
list, of which a tenth more is padding, and FAISS allocates each list by powers of two.

Merging reads each index twice and packs every code anew: 0.9 us of a core a row. So only processes that answer many
questions merge: those of a server. A command that asks one question searches one shard after the other.

A later version adds shards. They form a stack of their own, together with those stacks that are not much larger. So
there are few stacks, and a row is copied only a few times.
"""

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import faiss
import numpy as np

from pipeline.errors import DamagedFile
from pipeline.index.search.quantizer import Quantizer
from pipeline.index.search.remaining_rows import append_rows
from pipeline.index.search.stack import Seat, Stack, starts_of

ABSORBED_UP_TO = 2  # times the rows of the others in the new stack


@dataclass(eq=False)
class ShardLists:
    """The lists of a shard, to be merged with others of the same quantizer.

    `read` reads its index from the file again; it raises DamagedFile. `sizes` has the rows of each list. `seat` is
    where the shard is searched; None until `merge` gives it one.
    """

    read: Callable[[], faiss.Index]
    quantizer: Quantizer
    num_rows: int
    sizes: np.ndarray
    seat: Seat | None = field(default=None)


def can_be_merged(index: faiss.Index, quantizer: Quantizer) -> bool:
    """Whether the lists of an index are in memory and of the same codes as those of its generation."""
    inverted = faiss.downcast_index(faiss.try_extract_index_ivf(index))
    trained = quantizer.inverted
    if type(inverted) is not faiss.IndexIVFPQFastScan or type(trained) is not faiss.IndexIVFPQFastScan:
        return False
    names = ("d", "nlist", "code_size", "by_residual", "metric_type", "bbs", "M", "nbits", "M2", "implem", "skip")
    if any(getattr(inverted, name) != getattr(trained, name) for name in names):
        return False
    codebooks = [faiss.vector_to_array(each.pq.centroids) for each in (inverted, trained)]
    return bool(np.array_equal(*codebooks))


def sizes_of(index: faiss.Index) -> np.ndarray:
    """The rows of each list, int64 [C]."""
    lists = faiss.try_extract_index_ivf(index).invlists
    return np.array([lists.list_size(number) for number in range(lists.nlist)], np.int64)


def merge(shards: Sequence[ShardLists]) -> dict[ShardLists, DamagedFile]:
    """Give a seat to each shard that has none, in as few stacks as pays. Returns the shards that cannot be read.

    Reads the index of each such shard once more, one at a time: memory holds the new stack and one shard, besides the
    stacks of before, which searches may be using.
    """
    damaged: dict[ShardLists, DamagedFile] = {}
    by_quantizer: dict[int, list[ShardLists]] = {}
    for shard in shards:
        by_quantizer.setdefault(id(shard.quantizer), []).append(shard)
    for some in by_quantizer.values():
        _merge(some, damaged)
    return damaged


def _merge(shards: Sequence[ShardLists], damaged: dict[ShardLists, DamagedFile]) -> None:
    whole = _whole_stacks(shards)
    seated = {id(member) for _, members in whole for member in members}
    loose = [shard for shard in shards if id(shard) not in seated]
    if not loose:
        return
    rows, absorbed = sum(shard.num_rows for shard in loose), []
    for stack, members in sorted(whole, key=lambda pair: int(pair[0].starts[-1])):
        if sum(stack.num_rows) <= ABSORBED_UP_TO * rows:
            absorbed.append((stack, members))
            rows += sum(stack.num_rows)
    while True:
        members = [*loose, *(member for _, some in absorbed for member in some)]
        try:
            stack = _merged(loose, absorbed, starts_of([member.num_rows for member in members]))
            break
        except _Unreadable as error:
            damaged[error.shard] = error.reason
            loose = [shard for shard in loose if shard is not error.shard]
            if not loose:
                return
    for position, member in enumerate(members):
        if member.seat is None:
            member.seat = Seat(stack, position)
        else:
            member.seat.place = (stack, position)


class _Unreadable(Exception):
    def __init__(self, shard: ShardLists, reason: DamagedFile) -> None:
        super().__init__(str(reason))
        self.shard, self.reason = shard, reason


def _whole_stacks(shards: Iterable[ShardLists]) -> list[tuple[Stack, list[ShardLists]]]:
    """The stacks all of whose members are among some shards, with these in the order of the stack."""
    found: dict[int, tuple[Stack, dict[int, ShardLists]]] = {}
    for shard in shards:
        if shard.seat is not None:
            stack, member = shard.seat.place
            found.setdefault(id(stack), (stack, {}))[1][member] = shard
    return [
        (stack, [members[number] for number in range(len(members))])
        for stack, members in found.values()
        if len(members) == len(stack.num_rows)
    ]


def _merged(
    loose: Sequence[ShardLists], absorbed: Sequence[tuple[Stack, list[ShardLists]]], starts: np.ndarray
) -> Stack:
    """A stack of the rows of some shards and stacks, in this order."""
    first = loose[0]
    index = _read(first)
    members = [*loose, *(member for _, some in absorbed for member in some)]
    rows = [member.num_rows for member in members]
    inverted = faiss.downcast_index(faiss.try_extract_index_ivf(index))
    if len(members) > 1:
        lists = faiss.downcast_InvertedLists(inverted.invlists)
        filled = first.sizes.copy()
        for number, size in enumerate(np.sum([member.sizes for member in members], axis=0).tolist()):
            lists.resize(number, size)
        for shard, start in zip(loose[1:], starts[1:].tolist(), strict=False):
            other = _read(shard)
            append_rows(lists, filled, faiss.try_extract_index_ivf(other).invlists, start)
            filled += shard.sizes
            del other
        at = len(loose)
        for stack, some in absorbed:
            append_rows(lists, filled, stack.inverted.invlists, int(starts[at]))
            filled += np.sum([member.sizes for member in some], axis=0)
            at += len(some)
        inverted.ntotal = index.ntotal = sum(rows)
        _return_freed_memory()
    return Stack(index, first.quantizer, rows)


def _read(shard: ShardLists) -> faiss.Index:
    try:
        index = shard.read()
    except DamagedFile as error:
        raise _Unreadable(shard, error) from error
    return index


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _return_freed_memory() -> None:
    """Return the memory of freed lists to the system. glibc by itself returns only what lies at the end of the heap."""
    trim = _trim()
    if trim is not None:
        trim(0)
