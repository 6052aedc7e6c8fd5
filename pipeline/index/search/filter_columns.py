"""The columns that an expression may name: those of every entry, the label as requested, and kept columns.

Kept columns are stored beside the vectors of a shard. Some blocks do not have them: fresh entries, and shards of an
earlier release. Then they are read from the entries files at the first use, and stay with the block.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.deadline import look
from pipeline.index.search.blocks import Block
from pipeline.index.search.comparisons import Numbers, Values
from pipeline.index.search.filter_expression import Condition
from pipeline.store.log.state import State
from pipeline.store.lookup.kept_values import read_kept_columns
from pipeline.store.storage.interface import Storage
from pipeline.store.tables.kept_columns import as_type

NS_AT_ONCE = 20e6  # estimated time of a condition between two checks of the deadline
MIN_ROWS = 1_024
NS_LABEL = 10.0  # to look up the name of a row's label

OWN = {"id": pa.int64(), "uri": pa.string(), "label": pa.string(), "dataset": pa.string()}


def kinds_of_columns(state: State) -> dict[str, pa.DataType]:
    """The columns of a version and their kinds.

    A column that segments store in two types is text, as in the files that hold both. If the two types are int64 and
    float64, it is a column of numbers.
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
    labels: pa.Array,
    condition: Condition,
    assume: Mapping[int, str],
) -> Iterable[np.ndarray]:
    """For each block, which of its rows satisfy a condition, bool [N]. Null counts as false. Raises DamagedFile.

    `labels` are the names of label codes. The label is the one that the entry has in this question: from the requested
    label set, or assumed. The deadline is checked every NS_AT_ONCE. Raises TooLate when it is over, and UsageError if
    the condition cannot be evaluated.
    """
    kinds = kinds_of_columns(state)
    step = max(int(NS_AT_ONCE / condition.cost), MIN_ROWS)
    for block in blocks:
        look()
        kept = _kept_columns(storage, state, block, sorted(condition.columns - OWN.keys()))
        columns: dict[str, Values] = {name: _comparable(column, kinds[name]) for name, column in kept.items()}
        columns |= {"id": pa.chunked_array([block.ids_N], pa.int64()), "uri": block.uris, "dataset": block.datasets}
        if "label" in condition.columns:
            columns["label"] = _labels(block, labels, assume)
        mask_N = np.zeros(len(block.ids_N), bool)
        for start in range(0, len(mask_N), step):
            part = {name: column.slice(start, step) for name, column in columns.items()}
            mask_N[start : start + step] = pc.fill_null(condition.mask(part), False).to_numpy()
        yield mask_N


def nanoseconds(condition: Condition, num_rows: int) -> float:
    """Estimated time of a condition over so many rows, in nanoseconds."""
    return (condition.cost + NS_LABEL * ("label" in condition.columns)) * num_rows


def _kept_columns(storage: Storage, state: State, block: Block, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    missing = [name for name in names if name not in block.kept]
    if missing:
        block.kept |= read_kept_columns(storage, state, block.ids_N, missing)
    return {name: block.kept[name] for name in names}


def _comparable(column: pa.ChunkedArray, kind: pa.DataType) -> Values:
    """A kept column converted to a kind, with NaN as null. Numbers of two kinds stay exact."""
    is_number = pa.types.is_floating(kind) or pa.types.is_integer(kind)
    if is_number and pa.types.is_string(column.type):
        return Numbers.of_texts(column)
    if column.type != kind and not (is_number and pa.types.is_integer(column.type)):
        column = pa.chunked_array([as_type(chunk, kind) for chunk in column.chunks], kind)
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    return column


def _labels(block: Block, labels: pa.Array, assume: Mapping[int, str]) -> pa.ChunkedArray:
    new = sorted(set(assume.values()))
    names = pa.concat_arrays([labels, pa.array(new, pa.string())]) if new else labels
    codes_N = block.codes_N
    ids = sorted(assume)
    positions, rows = block.located(np.array(ids, np.int64))
    if len(rows):
        assumed = [assume[entry_id] for entry_id in ids]
        codes = {label: len(labels) + at for at, label in enumerate(new)}
        codes_N = codes_N.copy()
        codes_N[rows] = [codes[assumed[position]] for position in positions]
    return pa.chunked_array([names.take(pa.array(codes_N, mask=codes_N < 0))])
