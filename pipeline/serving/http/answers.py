"""The answers as pydantic models, published as OpenAPI; and how they are sent.

Each answer gives an id twice: as a number, and as text for programs that round numbers beyond 2 ** 53.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import orjson
from fastapi.responses import Response
from pydantic import BaseModel, Field

from pipeline.decisions.decision import Neighbor
from pipeline.serving.access import request_id
from pipeline.serving.http.refused import Refused
from pipeline.serving.service.service import Service

MAX_ANSWER_BYTES = 64 << 20
ROWS_AT_ONCE = 128  # neighbours serialized at a time

Id = Annotated[int, Field(json_schema_extra={"format": "int64"})]


class NeighborAnswer(BaseModel):
    """A neighbour; reliability and weight are there where it voted."""

    rank: int
    id: Id
    id_text: str
    uri: str
    label: str | None
    dataset: str
    similarity: float
    reliability: float | None = None
    weight: float | None = None
    kept: dict[str, Any] | None = None


class SearchAnswer(BaseModel):
    """The nearest entries of one query."""

    neighbors: list[NeighborAnswer]
    version: int
    shards_answered: int
    shards_total: int
    partial: bool


class DecisionAnswer(BaseModel):
    """One decision with its evidence."""

    uri: str | None
    label: str | None
    confidence: float
    margin: float
    abstained: bool
    reason: str | None
    voting: str
    balance: float
    k: int
    label_set: str | None
    where: str | None
    votes: dict[str, float]
    neighbors: list[NeighborAnswer]
    version: int
    shards_answered: int
    shards_total: int
    partial: bool


class KnnAnswer(BaseModel):
    """A neighbour as clip-retrieval's clients know it."""

    id: Id
    id_text: str
    similarity: float
    url: str
    image_path: str
    caption: str | None


class EntryAnswer(BaseModel):
    """One entry as it is in a version."""

    id: Id
    id_text: str
    uri: str
    label: str | None
    dataset: str
    width: int
    height: int
    sha256: str
    kept: dict[str, Any]
    version: int


class AddAnswer(BaseModel):
    """What was remembered: the ids in the order of the images, and `id`, the first of them."""

    id: Id
    id_text: str
    ids: list[Id]
    ids_text: list[str]
    version: int
    answered_by: int


class DuplicateAnswer(BaseModel):
    """An entry that has the uri, hash or vector of an erased one, and stays."""

    id: Id
    id_text: str
    uri: str
    same: str


class ForgetAnswer(BaseModel):
    """How many live entries were forgotten, and the version that no longer has them.

    `erased` counts entries whose bytes are gone; null where none was to go. Of the `num_live_duplicates` entries like
    them the first 1,000 are in `live_duplicates`.
    """

    forgotten: int
    version: int
    erased: int | None
    receipt: dict[str, Any] | None
    live_duplicates: list[DuplicateAnswer]
    num_live_duplicates: int
    index_dropped: bool
    answered_by: int


class RelabelAnswer(BaseModel):
    """How many entries have another label than before, and how many had the wanted one already."""

    relabelled: int
    unchanged: int
    version: int
    committed: bool
    label_set: str | None
    labels: int
    answered_by: int


class ReloadAnswer(BaseModel):
    """The version that is answered by from now on."""

    version: int


class GroupAnswer(BaseModel):
    """A group of shards, and whether it answers."""

    group: int
    answers: bool


class StatusAnswer(BaseModel):
    """What is served. `fresh` entries lie in no shard and are searched exactly.

    `newest_version` is the newest that is known; it is `version`, but while it is being opened.
    """

    version: int
    newest_version: int
    entries: int
    fresh: int
    dimension: int
    encoder: str | None
    takes_images: bool
    takes_edits: bool
    label_sets: list[str]
    shards_total: int
    groups: list[GroupAnswer]


class HealthAnswer(BaseModel):
    """Questions are answered."""

    healthy: bool
    version: int


class Refusal(BaseModel):
    """Why there is no answer, in a sentence, and the field of the request that it is about."""

    detail: str
    field: str | None = None
    request_id: str | None = None


class ConflictRefusal(Refusal):
    """Another writer came first: `reason` says how, as in `CommitConflict`."""

    reason: str | None = None


REFUSALS = {
    400: "The body cannot be read.",
    401: "The token is missing or wrong.",
    403: "The server only reads, or a page of another site asks.",
    404: "There is no such entry.",
    408: "The request came too slowly.",
    409: "Another writer came first.",
    413: "The body is too long, or holds too many values.",
    415: "The content type is not taken.",
    421: "The request is for a host of another name.",
    422: "A field is wrong.",
    429: "Too much is asked at once: Retry-After says when to ask again.",
    431: "The headers are too long.",
    500: "The server failed, and its log says why under the id of the request.",
    503: "A part of the memory does not answer: Retry-After says when to ask again.",
}


def json_answer(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with a document as JSON."""
    return Response(orjson.dumps(document), status, headers, "application/json")


class Texts:
    """Serializes the neighbours of an answer to JSON, some at a time, within the size limit of an answer."""

    def __init__(self, max_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._left = max_bytes

    def of(self, rows: Sequence[Neighbor], shape: Callable[[Neighbor], dict] = Neighbor.to_json) -> orjson.Fragment:
        """A JSON list of neighbours. Raises Refused."""
        pieces = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            text = orjson.dumps([shape(row) for row in rows[start : start + ROWS_AT_ONCE]])[1:-1]
            self._left -= len(text)
            if self._left < 0:
                raise Refused(
                    422,
                    f"an answer has at most {MAX_ANSWER_BYTES >> 20} MiB: ask with a smaller k, or fewer queries",
                    "k",
                )
            pieces.append(text)
        return orjson.Fragment(b"[" + b",".join(pieces) + b"]")


def refusal(
    service: Service,
    status: int,
    detail: str,
    field: str | None = None,
    retry_seconds: float = 1.0,
    headers: Mapping[str, str] | None = None,
    reason: str | None = None,
) -> Response:
    """A refusal as a response, with the headers of its status."""
    service.meter.refused(status)
    said = dict(headers or {})
    if status in {429, 503}:
        said["Retry-After"] = str(max(round(retry_seconds), 1))
    if status == 401:
        said["WWW-Authenticate"] = "Bearer"
    document = {"detail": detail, "field": field, "request_id": request_id()}
    return json_answer(document | ({"reason": reason} if reason else {}), status, said)
