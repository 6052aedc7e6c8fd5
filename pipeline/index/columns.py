"""The columns of entries that an expression may name: what every entry has, its label as asked, and what is kept.

Kept columns lie beside the vectors of a shard. Where a block has them not (fresh entries, and shards of an earlier
release), they are read from the entries files when they are first asked for, and stay with the block.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.index.blocks import Block
from pipeline.index.where import Condition
from pipeline.store.kept import as_type
from pipeline.store.kept_values import read_kept_columns
from pipeline.store.state import State
from pipeline.store.storage import Storage

OWN = {"id": pa.int64(), "uri": pa.string(), "label": pa.string(), "dataset": pa.string()}


def kinds_of_columns(state: State) -> dict[str, pa.DataType]:
    """The columns there are in a version and their kinds.

    One that segments keep in two types is text, as in the files that hold both; numbers of two kinds are numbers.
    """
    types: dict[str, set[str]] = {}
    for column in (column for segment in state.segments if segment.num_entries for column in segment.kept):
        types.setdefault(column.name, set()).add(column.type)
    numbers = {"int64", "float64"}
    kept = {c.name: pa.float64() if types[c.name] == numbers else c.kind for c in state.kept}
    return OWN | kept


def masks(
    storage: Storage,
    state: State,
    blocks: Sequence[Block],
    labels: Sequence[str],
    condition: Condition,
    assume: Mapping[int, str],
) -> Iterable[np.ndarray]:
    """For each block which of its rows satisfy a condition, bool [N]; null is no. Raises DamagedFile.

    A label is the one that the entry has in this question: in the label set asked, or assumed.
    """
    kinds = kinds_of_columns(state)
    for block in blocks:
        kept = _kept(storage, state, block, sorted(condition.columns - OWN.keys()))
        columns = {name: _comparable(column, kinds[name]) for name, column in kept.items()}
        columns |= {"id": pa.chunked_array([block.ids_N], pa.int64()), "uri": block.uris, "dataset": block.datasets}
        if "label" in condition.columns:
            columns["label"] = _labels(block, labels, assume)
        yield pc.fill_null(condition.mask(columns), False).to_numpy()


def _kept(storage: Storage, state: State, block: Block, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    missing = [name for name in names if name not in block.kept]
    if missing:
        block.kept |= read_kept_columns(storage, state, block.ids_N, missing)
    return {name: block.kept[name] for name in names}


def _comparable(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A kept column as a kind, its NaN null."""
    if column.type != kind:
        column = pa.chunked_array([as_type(chunk, kind) for chunk in column.chunks], kind)
    if pa.types.is_floating(kind):
        return pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
    return column


def _labels(block: Block, labels: Sequence[str], assume: Mapping[int, str]) -> pa.ChunkedArray:
    names = [*labels, *sorted(set(assume.values()))]
    codes_N = block.codes_N
    positions, rows = block.located(np.array(list(assume), np.int64))
    if len(rows):
        assumed = list(assume.values())
        codes_N = codes_N.copy()
        codes_N[rows] = [names.index(assumed[position]) for position in positions]
    return pa.chunked_array([pa.array(names, pa.string()).take(pa.array(codes_N, mask=codes_N < 0))])
