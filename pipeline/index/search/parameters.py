"""FAISS search parameters per call, in the notation of FAISS and autofaiss ("nprobe=16,efSearch=32,ht=2048").

This module adds `rerank`: how many candidates of an index of codes are scored again from the stored vectors for k = 10,
of all shards together. Releases up to 0.1 counted them for each shard, as is still done for a graph.
Parameters are never set on an index, because several threads may search it at the same time.
"""

import math
from collections.abc import Sequence

import faiss

from pipeline.store.log.records import Index

FURTHER_AT_MOST = 32.0  # times as many lists, or as much of the graph, are searched if rows are masked


def parse(parameters: str) -> dict[str, int]:
    """The values of a parameter string by name."""
    return {name: int(value) for name, value in (pair.split("=") for pair in parameters.split(",") if pair)}


def values_of(index: Index, *, has_lists: bool) -> dict[str, int]:
    """The search parameters of a generation, with `rerank` over all its shards if it `has_lists`."""
    values = parse(index.parameters)
    if has_lists and index.rerank_for == "shard" and "rerank" in values:
        values["rerank"] *= max(len(index.shards), 1)
    return values


def to_text(values: dict[str, int]) -> str:
    """The inverse of `parse`."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def search_parameters(
    index: faiss.Index, values: dict[str, int], selector: faiss.IDSelector | None
) -> faiss.SearchParameters:
    """Parameters for one call on this index. The caller must keep `selector` alive during the call.

    `ht`, which autofaiss adds for product quantizers, is left out. Its value 2048 is at least their code size in bits,
    and FAISS reads that as "no polysemous filtering" (ParameterSpace::set_index_parameter).
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(index.index, values, selector)
        return faiss.SearchParametersPreTransform(index_params=inner)
    options: dict = {"sel": selector} if selector is not None else {}
    if isinstance(index, faiss.IndexIVF):
        if "efSearch" in values:
            options["quantizer_params"] = faiss.SearchParametersHNSW(efSearch=values["efSearch"])
        kind = faiss.IVFPQSearchParameters if isinstance(index, faiss.IndexIVFPQ) else faiss.SearchParametersIVF
        return kind(nprobe=values.get("nprobe", 1), **options)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=values.get("efSearch", 16), **options)
    return faiss.SearchParameters(**options)


def searchable(index: faiss.Index) -> bool:
    """Whether this kind of index accepts a selector of rows with each call. Forgetting depends on the selector.

    For example, IndexIDMap over IndexRefine ignores it and returns forgotten rows.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return searchable(index.index)
    return isinstance(index, faiss.IndexIVF | faiss.IndexHNSW)


def code_vectors_themselves(index: faiss.Index) -> None:
    """Make an untrained inverted file of float16 codes store vectors, not their residuals to a centroid.

    Vectors are stored as float16, so such codes lose nothing and cost half of float32.
    """
    if _is_float16(index):
        index.by_residual = False


def keeps_vectors(index: faiss.Index) -> bool:
    """Whether this kind of index compares with the vectors themselves, so that its similarities are exact."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVFFlat | faiss.IndexHNSWFlat):
        return True
    return _is_float16(index) and not index.by_residual


def _is_float16(index: faiss.Index) -> bool:
    index = faiss.downcast_index(index)
    return isinstance(index, faiss.IndexIVFScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16


def widest(index: faiss.Index) -> dict[str, int]:
    """The parameter that trades speed for recall, at its largest useful value; empty if there is none."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return widest(index.index)
    if isinstance(index, faiss.IndexIVF):
        return {"nprobe": index.nlist}
    if isinstance(index, faiss.IndexHNSW):
        return {"efSearch": max(index.ntotal, 1)}
    return {}


def for_share(index: faiss.Index, values: dict[str, int], share: float) -> dict[str, int]:
    """Parameters to search only a fraction of the rows (`share`, above 0, at most 1). Such a search must go further.

    If rows are masked at random, the k nearest others lie in more lists, but not in 1 / share times as many. With
    1 / sqrt(share) times as many lists, recall@10 rose from .970 to .983 at one half, to .995 at a tenth and to .998 at
    3% of 300,000 rows. Without more lists it fell to .966, .930 and .879.
    Numbers are rounded up to three binary digits, so that shards with about as many masked rows search the same lists.
    """
    further = min(share**-0.5, FURTHER_AT_MOST)
    widest_values = widest(index)
    grown = {name: min(_rounded_up(values.get(name, 1) * further), limit) for name, limit in widest_values.items()}
    return values | grown


def _rounded_up(value: float) -> int:
    """The least number of three binary digits (and zeros) that is not below the value."""
    step = 1 << max(math.ceil(value).bit_length() - 3, 0)
    return math.ceil(value / step) * step


def widest_of(values: Sequence[dict[str, int]]) -> dict[str, int]:
    """The largest value of each parameter."""
    return {name: max(each.get(name, 0) for each in values) for name in values[0]}


def widen(index: faiss.Index, values: dict[str, int], factor: float = 2.0) -> dict[str, int] | None:
    """Values that search `factor` times as far, or None if these already search as far as possible."""
    limits = widest(index)
    grown = {name: min(math.ceil(max(values.get(name, 1), 1) * factor), limit) for name, limit in limits.items()}
    if "efSearch" in values and "nprobe" in grown:
        grown["efSearch"] = max(values["efSearch"], 2 * grown["nprobe"])
    if all(values.get(name, 1) >= limit for name, limit in limits.items()):
        return None
    return values | grown
