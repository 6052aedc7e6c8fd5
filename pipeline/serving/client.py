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
from pipeline.errors import (
    CommitConflict,
    Overloaded,
    SourceError,
    Unavailable,
    UnknownName,
    UsageError,
    VisualMemoryError,
)
from pipeline.serving.limits import MAX_NEIGHBORS

ATTEMPTS = 6
FIRST_WAIT = 0.1  # seconds at most, doubled with each attempt
LONGEST_WAIT = 5.0
BATCH = 32  # queries in a request, fewer where many neighbours are asked for
TRANSIENT = {429, 502, 503, 504}


class Client:
    """A client of the server at `url`, with the calls of the library. Use it with `with`, or close it.

    Questions are retried after lost connections and when the server is busy (429, 502, 503, 504), with growing waits
    and as the server's Retry-After says. Changes (`add`, `forget`, `relabel`) are sent once: after a lost connection
    nobody knows whether they were done, so look before you repeat them. What the server refuses for good raises
    UsageError, with the server's sentence and the `field` it is about; that includes a wrong token. A change that does
    not fit what another writer did meanwhile raises CommitConflict, as in the library.

    Args:
        url: Address of the server, such as `http://127.0.0.1:8000`.
        token: The server's token, needed for changes and `reload`; None can only ask.
        timeout_seconds: Seconds to wait for a connection, and for each read and write of one attempt.
        attempts: Attempts at each question, the first included.
    """

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
        """Close the connections to the server."""
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
        """Decide what each image or vector shows, as `VisualMemory.classify` does.

        Large lists go in requests of up to 32 queries, fewer if k is large. Each request is answered from one version,
        but two requests of one call may be answered from two versions.

        Args:
            images: Paths on this machine, or bytes of image files. Give these or `embeddings`, not both.
            k: Neighbours that vote, 1 to 10,000.
            voting: How votes are weighted: "plurality", "distance", "softmax" or "rank".
            embeddings: Query vectors, float [Q, D] or [D]; None if `images` are given.
            require_all: Refuse an answer without some of the shards; by default the other shards answer.
            question: Everything in one value; then `k` and `voting` are ignored, and `options` must be empty.
            **options: As for `VisualMemory.classify`. With `balance="auto"` the server allows k up to 500.

        Returns:
            One decision for each query, in order, with `shards_answered` of `shards_total`.

        Raises:
            UsageError: A value can never work, an id or label set is unknown, or the server cannot read an image.
            SourceError: A file on this machine cannot be read.
            Unavailable: The server does not answer, or not with all shards if `require_all` is given.
            Overloaded: The server still has too much to do after all attempts.

        Example:
            with Client("http://127.0.0.1:8000") as client:
                [decision] = client.classify(["new.jpg"], k=20)
                print(decision.label, decision.confidence, decision.version)
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
        """Find the k nearest entries of each image or vector, as `VisualMemory.search` does.

        Large lists go in requests of up to 32 queries, fewer if k is large. Two requests of one call may be answered
        from two versions.

        Args:
            images: Paths on this machine, or bytes of image files. Give these or `embeddings`, not both.
            k: Neighbours of each query, 1 to 10,000.
            embeddings: Query vectors, float [Q, D] or [D]; None if `images` are given.
            label_set: Show the labels of this label set; None shows labels as stored.
            where: Find only entries that satisfy this expression; None finds all.
            require_all: Refuse an answer without some of the shards; by default the other shards answer.

        Returns:
            One tuple for each query, in order: its neighbours, nearest first.

        Raises:
            UsageError: A value can never work, the label set is unknown, or the server cannot read an image.
            SourceError: A file on this machine cannot be read.
            Unavailable: The server does not answer, or not with all shards if `require_all` is given.
            Overloaded: The server still has too much to do after all attempts.

        Example:
            with Client("http://127.0.0.1:8000") as client:
                [neighbors] = client.search(["new.jpg"], k=5)
                print([neighbor.uri for neighbor in neighbors])
        """
        options = {"k": k, "label_set": label_set, "where": where, "require_all": require_all}
        answers = self._asked("/v1/search", images, embeddings, options)
        return [tuple(map(Neighbor.from_json, answer["neighbors"])) for answer in answers]

    def add(
        self, image: str | Path | bytes, label: str | None = None, *, uri: str | None = None, dataset: str = "http"
    ) -> int:
        """Remember one image, in one commit. It counts in the next answer.

        The request is sent once. After Unavailable, look whether it was done before you repeat it.

        Args:
            image: A path on this machine, or the bytes of an image file.
            label: The label of the entry; None gives none.
            uri: What the entry is called; None makes a uri from the hash of the bytes, also for a path.
            dataset: Name that the entry carries.

        Returns:
            The id of the new entry.

        Raises:
            UsageError: The token is missing or wrong, the server only reads, or it refuses the image.
            CommitConflict: Another writer came first. Nothing is changed.
            SourceError: The file on this machine cannot be read.
            Unavailable: The server does not answer.
            Overloaded: The server has too much to do.

        Example:
            with Client("http://127.0.0.1:8000", token) as client:
                entry_id = client.add("wolf.jpg", "wolf")
                print(client.entry(entry_id)["label"])
        """
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
        """Forget every entry that any of the arguments names, in one commit.

        The request is sent once. After Unavailable, look whether it was done before you repeat it.

        Args:
            ids: Ids of entries, at most 1,000.
            uris: Uris of entries.
            labels: Labels; all entries that have one are forgotten.
            datasets: Datasets; all their entries are forgotten.
            erase: Remove the bytes too, from every file and every version.

        Returns:
            A JSON object: how many were `forgotten` and `erased`, the `version`, and entries like them that stay.

        Raises:
            UsageError: Nothing or an unknown name was given, or the token is wrong.
            CommitConflict: Another writer came first. Nothing is changed.
            Unavailable: The server does not answer.
            Overloaded: The server has too much to do.

        Example:
            with Client("http://127.0.0.1:8000", token) as client:
                done = client.forget(labels=["wolf"])
                print(done["forgotten"], done["version"])
        """
        body = {"ids": [*ids], "uris": [*uris], "labels": [*labels], "datasets": [*datasets], "erase": erase}
        return dict(self._post("/v1/forget", body, again=False))

    def relabel(self, ids: Sequence[int], label: str, *, label_set: str | None = None) -> dict[str, Any]:
        """Give entries another label, in one commit.

        The request is sent once. Nothing is committed if all entries have the label already.

        Args:
            ids: Ids of the entries.
            label: Their new label.
            label_set: Change the label in this label set; None changes the label as stored.

        Returns:
            A JSON object: how many were `relabelled`, how many were `unchanged`, and the `version`.

        Raises:
            UsageError: An id is unknown, or the token is wrong.
            CommitConflict: Another writer came first. Nothing is changed.
            Unavailable: The server does not answer.
            Overloaded: The server has too much to do.
        """
        return dict(self._post("/v1/relabel", {"ids": [*ids], "label": label, "label_set": label_set}, again=False))

    def entry(self, entry_id: int) -> dict[str, Any]:
        """Look one entry up.

        Args:
            entry_id: The id, as `search` shows it.

        Returns:
            A JSON object: uri, label, dataset, width and height in pixels, sha256, kept columns and version.

        Raises:
            UnknownName: There is no such entry.
            Unavailable: The server does not answer.
            Overloaded: The server still has too much to do after all attempts.
        """
        return dict(self._request("GET", f"/v1/entries/{entry_id}").json())

    def image(self, entry_id: int) -> bytes:
        """Fetch the small picture of an entry.

        Args:
            entry_id: The id, as `search` shows it.

        Returns:
            The bytes of a JPEG file.

        Raises:
            UnknownName: There is no such entry, or no picture of it can be shown.
            Unavailable: The server does not answer.
            Overloaded: The server still has too much to do after all attempts.
        """
        return self._request("GET", f"/v1/entries/{entry_id}/image").content

    def reload(self) -> int:
        """Make the server look for a newer version now. Needs the token.

        Returns:
            The version that the server answers from.

        Raises:
            UsageError: The token is missing or wrong, or the server only reads.
            Unavailable: The server does not answer.
            Overloaded: The server still has too much to do after all attempts.
        """
        return int(self._post("/v1/reload", None)["version"])

    def status(self) -> dict[str, Any]:
        """Describe what the server serves.

        Returns:
            A JSON object: versions, entries, dimension, encoder, label sets, shards and groups, and whether the server
            takes images and edits.

        Raises:
            Unavailable: The server does not answer.
            Overloaded: The server still has too much to do after all attempts.
        """
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
        detail, field, reason = str(told["detail"]), told.get("field"), told.get("reason")
    except (ValueError, KeyError, TypeError):
        detail, field, reason = f"the server answered {response.status_code}: {response.text[:200]}", None, None
    if response.status_code == 409:
        return CommitConflict(detail, reason or "version committed")
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
