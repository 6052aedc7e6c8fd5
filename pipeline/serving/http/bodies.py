"""The bodies of requests as pydantic models: they validate requests and are published as OpenAPI."""

import re
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, StringConstraints, WithJsonSchema

from pipeline.decisions.question import MAX_K, MAX_WEIGHT, Question
from pipeline.decisions.voting import MAX_BALANCE, Voting
from pipeline.errors import UsageError
from pipeline.serving.encoded import about, decode_image
from pipeline.serving.service.service import How

MAX_ID = (1 << 63) - 1
MAX_NAME = 1_000  # characters of a label, a uri or a name
MAX_LISTED = 1_000  # ids in one request
MAX_WHERE = 10_000
MAX_QUERIES = 256  # in one request
MAX_DIMENSION = 1 << 16  # of an embedding; the memory's dimension is checked later
MAX_IMAGES = 256  # in one add, which is one commit
# A PNG of one pixel, so that the examples can be sent unchanged.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="


def _number(value: Any) -> Any:
    """An id as a number. Ids may come as decimal text, which survives programs that round large numbers."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,19}\s*", value, re.ASCII) else value


EntryId = Annotated[
    int,
    Field(ge=0, le=MAX_ID),
    BeforeValidator(_number),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": MAX_ID},
                {"type": "string", "pattern": "^[0-9]{1,19}$"},
            ],
            "description": "An id, as a number or as decimal text.",
        }
    ),
]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME, pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]
# Validation of a list stops at the first fault: reporting every fault would cost a hundred times the list itself.
Vector = Annotated[list[FiniteFloat], Field(min_length=1, max_length=MAX_DIMENSION, fail_fast=True)]
Names = Annotated[list[Name], Field(max_length=MAX_LISTED, fail_fast=True)]
Base64 = Annotated[str, StringConstraints(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Asking(_Body):
    """A query image (base64 of an image file) or an embedding; a list of them makes a batch."""

    image_base64: (
        Base64 | Annotated[list[Base64], Field(min_length=1, max_length=MAX_QUERIES, fail_fast=True)] | None
    ) = None
    embedding: Vector | Annotated[list[Vector], Field(min_length=1, max_length=MAX_QUERIES, fail_fast=True)] | None = (
        Field(None, description="As long as the memory's dimension; scaled to unit length.")
    )
    label_set: Name | None = Field(None, description="Name labels by this label set.")
    where: Annotated[str, StringConstraints(max_length=MAX_WHERE)] | None = Field(
        None, description="Only entries of which this holds, such as: camera = 'Canon' and year >= 2020."
    )
    require_all: bool = Field(False, description="Answer 503 rather than without a part of the memory.")
    timeout_ms: Annotated[int, Field(ge=1, le=600_000)] | None = Field(
        None, description="The server's own limit holds besides."
    )

    @property
    def images(self) -> list[bytes]:
        """The bytes of the images. Raises SourceError."""
        given = [self.image_base64] if isinstance(self.image_base64, str) else self.image_base64 or []
        return [decode_image(text) for text in given]

    @property
    def vectors_QD(self) -> np.ndarray | None:
        """The embeddings (float64 [Q, D]). Raises UsageError if their lengths differ."""
        if self.embedding is None:
            return None
        rows = self.embedding if isinstance(self.embedding[0], list) else [self.embedding]
        if len({len(row) for row in rows if isinstance(row, list)}) > 1:
            raise about("embedding", UsageError("the embeddings are of several lengths: give vectors of one encoder"))
        return np.array(rows, np.float64)

    @property
    def num_queries(self) -> int:
        """The number of images or vectors."""
        given = self.image_base64 if self.image_base64 is not None else self.embedding
        return len(given) if isinstance(given, list) and self.is_batch else 1

    @property
    def num_listed(self) -> int:
        """The number of ids in lists and dictionaries."""
        return 0

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list."""
        return isinstance(self.image_base64, list) or (
            self.embedding is not None and isinstance(self.embedding[0], list)
        )

    @property
    def how(self) -> How:
        seconds = self.timeout_ms / 1_000 if self.timeout_ms is not None else None
        return How(self.require_all, seconds)


class SearchBody(Asking):
    """A search for the nearest entries."""

    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10

    example: ClassVar[dict] = {"embedding": [0.1, 0.2, 0.3], "k": 3}

    @property
    def question(self) -> Question:
        """The question. Raises UsageError."""
        return Question(k=self.k, label_set=self.label_set, where=self.where)


class ClassifyBody(Asking):
    """A question what something is. The what-if options change nothing stored."""

    k: Annotated[int, Field(ge=1, le=MAX_K)] = 50
    voting: Voting = "rank"
    exclude: Annotated[list[EntryId], Field(max_length=MAX_LISTED, fail_fast=True)] = []
    weigh: Annotated[dict[EntryId, Annotated[float, Field(ge=0, le=MAX_WEIGHT)]], Field(max_length=MAX_LISTED)] = {}
    assume: Annotated[dict[EntryId, Name], Field(max_length=MAX_LISTED)] = {}
    balance: Annotated[float, Field(ge=0, le=MAX_BALANCE)] | Literal["auto"] = 0.0
    abstain_below: Annotated[float, Field(ge=0, le=1)] = 0.0

    example: ClassVar[dict] = {"embedding": [0.1, 0.2, 0.3], "k": 50, "voting": "rank"}

    @property
    def num_listed(self) -> int:
        return len(self.exclude) + len(self.weigh) + len(self.assume)

    @property
    def question(self) -> Question:
        """The question. Raises UsageError."""
        return Question(**{each.name: getattr(self, each.name) for each in fields(Question)})


class AddBody(_Body):
    """Images to remember: one, or a list. A label is for all of them, or one for each; so is a uri."""

    image_base64: (
        Base64 | Annotated[list[Base64], Field(min_length=1, max_length=MAX_IMAGES, fail_fast=True)] | None
    ) = None
    label: Name | Annotated[list[Name | None], Field(max_length=MAX_IMAGES, fail_fast=True)] | None = None
    uri: Name | Annotated[list[Name | None], Field(max_length=MAX_IMAGES, fail_fast=True)] | None = Field(
        None, description="What the entry is called; made of the image's hash where none is given."
    )
    dataset: Name = "http"

    example: ClassVar[dict] = {"image_base64": PIXEL, "label": "cat"}

    @property
    def images(self) -> list[bytes]:
        """The bytes of the images. Raises SourceError."""
        given = [self.image_base64] if isinstance(self.image_base64, str) else self.image_base64 or []
        return [decode_image(text) for text in given]

    def labels_of(self, num_images: int) -> list[str | None]:
        """A label for each of `num_images` images. Raises UsageError."""
        if self.label is None or isinstance(self.label, str):
            return [self.label] * num_images
        return _one_each("label", self.label, num_images)

    def uris_of(self, num_images: int) -> list[str | None]:
        """A uri for each of `num_images` images (None: made from the image's hash). Raises UsageError."""
        if self.uri is None:
            return [None] * num_images
        return _one_each("uri", [self.uri] if isinstance(self.uri, str) else self.uri, num_images)


def _one_each(field: str, values: list[str | None], num_images: int) -> list[str | None]:
    if len(values) != num_images:
        raise about(field, UsageError(f"{num_images} images came with {len(values)} of {field}: give one for each"))
    return values


class ForgetBody(_Body):
    """Everything that any of these names is forgotten; `erase` removes the bytes from every file and version."""

    ids: Annotated[list[EntryId], Field(max_length=MAX_LISTED, fail_fast=True)] = []
    uris: Names = []
    labels: Names = []
    datasets: Names = []
    erase: bool = False

    example: ClassVar[dict] = {"ids": [549755813888]}


class RelabelBody(_Body):
    """Another label for some entries, as stored or in a label set."""

    ids: Annotated[list[EntryId], Field(min_length=1, max_length=MAX_LISTED, fail_fast=True)]
    label: Name
    label_set: Name | None = None

    example: ClassVar[dict] = {"ids": [549755813888], "label": "dog"}


class KnnBody(BaseModel):
    """What clip-retrieval's client sends; what it may say besides is left out and has no effect here."""

    model_config = ConfigDict(extra="ignore")

    text: str | None = None
    image: str | None = Field(None, description="Base64 of an image file.")
    image_url: str | None = None
    embedding_input: Vector | None = None
    modality: str = "image"
    num_images: Annotated[int, Field(ge=1, le=MAX_K)] = 100
    num_result_ids: Annotated[int, Field(ge=1, le=MAX_K)] | None = None
    indice_name: str | None = None

    example: ClassVar[dict] = {"embedding_input": [0.1, 0.2, 0.3], "num_images": 3, "modality": "image"}
