"""A client of a server: the questions of the library, asked over HTTP.

    with Client("http://127.0.0.1:8000") as client:
        [decision] = client.classify(["new.jpg"])

What may pass (a lost connection, a server that is busy) is tried again, for as long as the server says. Adding is not:
whether it was done cannot be known, so it is the caller's to look.
"""

import base64
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import httpx
import numpy as np

from pipeline.decisions.decision import Decision, Neighbor
from pipeline.decisions.question import Question, QuestionOptions, question_of
from pipeline.decisions.voting import Voting
from pipeline.errors import Overloaded, SourceError, Unavailable, UnknownName, UsageError, VisualMemoryError
from pipeline.serving.limits import MAX_NEIGHBORS

ATTEMPTS = 6
FIRST_WAIT = 0.1  # seconds at most, doubled with each attempt
LONGEST_WAIT = 5.0
BATCH = 32  # queries in a request, fewer where many neighbours are asked for
TRANSIENT = {429, 502, 503, 504}


class Client:
    """A server at `url`; `token` is needed for what changes the memory. To be closed, or used with `with`."""

    def __init__(
        self, url: str, token: str | None = None, *, timeout_seconds: float = 60.0, attempts: int = ATTEMPTS
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout_seconds)
        self._attempts = attempts

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the connections."""
        self._http.close()

    def classify(
        self,
        images: Sequence[str | Path | bytes] = (),
        k: int = 50,
        voting: Voting = "rank",
        *,
        embeddings: np.ndarray | None = None,
        require_all: bool = False,
        question: Question | None = None,
        **options: Unpack[QuestionOptions],
    ) -> list[Decision]:
        """One decision an image (path or bytes of an image file) or vector (float [Q, D]), in order.

        The options are those of `VisualMemory.classify`; `require_all` wants no partial answer. Raises UsageError,
        SourceError or UnknownName for what can never be answered, Unavailable or Overloaded for what is not just now.
        """
        asked = question_of(question, k, voting, options).to_json()
        answers = self._asked("/v1/classify", images, embeddings, asked | {"require_all": require_all})
        return [Decision.from_json(answer) for answer in answers]

    def search(
        self,
        images: Sequence[str | Path | bytes] = (),
        k: int = 10,
        *,
        embeddings: np.ndarray | None = None,
        label_set: str | None = None,
        where: str | None = None,
        require_all: bool = False,
    ) -> list[tuple[Neighbor, ...]]:
        """The k nearest entries of each image or vector. Raises as `classify`."""
        options = {"k": k, "label_set": label_set, "where": where, "require_all": require_all}
        answers = self._asked("/v1/search", images, embeddings, options)
        return [tuple(map(Neighbor.from_json, answer["neighbors"])) for answer in answers]

    def add(
        self, image: str | Path | bytes, label: str | None = None, *, uri: str | None = None, dataset: str = "http"
    ) -> int:
        """Remember one image at once; return its id."""
        body = {"image_base64": _encoded(image), "label": label, "uri": uri, "dataset": dataset}
        return int(self._post("/v1/entries", body, again=False)["id"])

    def forget(
        self,
        *,
        ids: Sequence[int] = (),
        uris: Sequence[str] = (),
        labels: Sequence[str] = (),
        datasets: Sequence[str] = (),
        erase: bool = False,
    ) -> dict[str, Any]:
        """Forget everything that any of these names; what was done, as a JSON object."""
        body = {"ids": [*ids], "uris": [*uris], "labels": [*labels], "datasets": [*datasets], "erase": erase}
        return dict(self._post("/v1/forget", body, again=False))

    def relabel(self, ids: Sequence[int], label: str, *, label_set: str | None = None) -> dict[str, Any]:
        """Give entries another label; what was done, as a JSON object."""
        return dict(self._post("/v1/relabel", {"ids": [*ids], "label": label, "label_set": label_set}, again=False))

    def entry(self, entry_id: int) -> dict[str, Any]:
        """One entry, as a JSON object. Raises UnknownName."""
        return dict(self._request("GET", f"/v1/entries/{entry_id}").json())

    def image(self, entry_id: int) -> bytes:
        """The small picture of an entry, a JPEG. Raises UnknownName."""
        return self._request("GET", f"/v1/entries/{entry_id}/image").content

    def reload(self) -> int:
        """Have the server look for a newer version now; return the one it answers by."""
        return int(self._post("/v1/reload", None)["version"])

    def status(self) -> dict[str, Any]:
        """What is served, as a JSON object."""
        return dict(self._request("GET", "/v1/status").json())

    def _asked(
        self,
        path: str,
        images: Sequence[str | Path | bytes],
        embeddings: np.ndarray | None,
        options: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        k = options["k"] if isinstance(options["k"], int) else 1  # the server says what is wrong with another
        size = max(min(BATCH, MAX_NEIGHBORS // max(k, 1)), 1)
        if isinstance(images, str | bytes | Path):
            raise UsageError("images is a single image: give a list")
        if embeddings is None:
            if not len(images):
                raise UsageError("there is nothing to ask about: give at least one image")
            queries = [{"image_base64": [_encoded(image) for image in batch]} for batch in _batches(images, size)]
        elif len(images):
            raise UsageError("both images and embeddings were given: give one of them")
        else:
            rows = np.atleast_2d(np.asarray(embeddings, np.float64))
            queries = [{"embedding": batch.tolist()} for batch in _batches(rows, size) if len(batch)]
        return [answer for query in queries for answer in self._post(path, {**options, **query})]

    def _post(self, path: str, body: Mapping[str, Any] | None, *, again: bool = True) -> Any:
        return self._request("POST", path, body, again=again).json()

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, again: bool = True
    ) -> httpx.Response:
        attempts = self._attempts if again else 1
        for attempt in range(1, attempts + 1):
            wait = min(random.uniform(0, FIRST_WAIT) * 2**attempt, LONGEST_WAIT)  # noqa: S311, it need only part clients
            try:
                response = self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                if attempt == attempts:
                    raise Unavailable(f"{self._http.base_url} does not answer ({error}): is the server up?") from error
            else:
                if response.is_success:
                    return response
                if response.status_code not in TRANSIENT or attempt == attempts:
                    raise _error_of(response)
                told = response.headers.get("Retry-After", "")
                wait += min(float(told), LONGEST_WAIT) if told.isdigit() else 0.0
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def _batches(items: Sequence[Any] | np.ndarray, size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _encoded(image: str | Path | bytes) -> str:
    if isinstance(image, bytes):
        return base64.b64encode(image).decode()
    try:
        return base64.b64encode(Path(image).read_bytes()).decode()
    except OSError as error:
        raise SourceError(f"the image {image} cannot be read ({error.strerror}): check the path") from error


def _error_of(response: httpx.Response) -> VisualMemoryError:
    """The refusal of a server as the error that the library has for it."""
    try:
        told = response.json()
        detail, field = str(told["detail"]), told.get("field")
    except (ValueError, KeyError, TypeError):
        detail, field = f"the server answered {response.status_code}: {response.text[:200]}", None
    kinds: dict[int, type[VisualMemoryError]] = {
        404: UnknownName,
        429: Overloaded,
        502: Unavailable,
        503: Unavailable,
        504: Unavailable,
    }
    error = kinds.get(response.status_code, UsageError)(detail)
    error.field = field
    return error
