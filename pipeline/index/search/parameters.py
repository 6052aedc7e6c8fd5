"""FAISS search parameters per call, from the notation FAISS and autofaiss use ("nprobe=16,efSearch=32,ht=2048").

To it comes `rerank`: how many candidates of an index of codes are scored again from the stored vectors for k = 10.
Nothing is set on an index, which several threads may be searching.
"""

import math
from collections.abc import Sequence

import faiss

FURTHER_AT_MOST = 32.0  # times the lists, or the graph, that are looked at for masked rows


def parse(parameters: str) -> dict[str, int]:
    """The values of a parameter string by name."""
    return {name: int(value) for name, value in (pair.split("=") for pair in parameters.split(",") if pair)}


def to_text(values: dict[str, int]) -> str:
    """The inverse of `parsed`."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def search_parameters(
    index: faiss.Index, values: dict[str, int], selector: faiss.IDSelector | None
) -> faiss.SearchParameters:
    """Parameters for one call on this index; the caller keeps `selector` alive during it.

    `ht`, which autofaiss adds for product quantizers, is left out: its 2048 is no less than their code size in bits,
    and FAISS takes that as "no polysemous filtering" (ParameterSpace::set_index_parameter).
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
    """Whether this kind of index takes a selector of rows with each call, on which forgetting rests.

    IndexIDMap over IndexRefine, for one, ignores it and returns forgotten rows.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return searchable(index.index)
    return isinstance(index, faiss.IndexIVF | faiss.IndexHNSW)


def code_vectors_themselves(index: faiss.Index) -> None:
    """Let an untrained inverted file of float16 codes keep vectors, not what is left of them beside a centroid.

    Vectors are stored as float16, so that such codes lose nothing and cost half of what float32 does.
    """
    if _is_float16(index):
        index.by_residual = False


def keeps_vectors(index: faiss.Index) -> bool:
    """Whether this kind of index compares with the vectors themselves, so that what it says of them is exact."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVFFlat | faiss.IndexHNSWFlat):
        return True
    return _is_float16(index) and not index.by_residual


def _is_float16(index: faiss.Index) -> bool:
    index = faiss.downcast_index(index)
    return isinstance(index, faiss.IndexIVFScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16


def widest(index: faiss.Index) -> dict[str, int]:
    """The parameter that trades speed for recall, at its largest useful value; empty where there is none."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return widest(index.index)
    if isinstance(index, faiss.IndexIVF):
        return {"nprobe": index.nlist}
    if isinstance(index, faiss.IndexHNSW):
        return {"efSearch": max(index.ntotal, 1)}
    return {}


def for_share(index: faiss.Index, values: dict[str, int], share: float) -> dict[str, int]:
    """Values for a search among a share of the rows (above 0, at most 1), which has to go further for as many of them.

    Where rows are masked at random the k nearest others lie in more lists, though not in 1 / share times as many: with
    1 / sqrt(share) times as many recall@10 rose from .970 to .983 at one half, to .995 at a tenth and .998 at 3% of
    300,000 rows, and fell to .966, .930 and .879 with no more.
    """
    further = min(share**-0.5, FURTHER_AT_MOST)
    widest_values = widest(index)
    grown = {name: min(math.ceil(values.get(name, 1) * further), limit) for name, limit in widest_values.items()}
    return values | grown


def widest_of(values: Sequence[dict[str, int]]) -> dict[str, int]:
    """The largest of each parameter."""
    return {name: max(each.get(name, 0) for each in values) for name in values[0]}


def widen(index: faiss.Index, values: dict[str, int], factor: float = 2.0) -> dict[str, int] | None:
    """Values that search so many times as far, or None when these already go as far as they can."""
    limits = widest(index)
    grown = {name: min(math.ceil(max(values.get(name, 1), 1) * factor), limit) for name, limit in limits.items()}
    if "efSearch" in values and "nprobe" in grown:
        grown["efSearch"] = max(values["efSearch"], 2 * grown["nprobe"])
    if all(values.get(name, 1) >= limit for name, limit in limits.items()):
        return None
    return values | grown
