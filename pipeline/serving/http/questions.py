"""The routes for questions: decisions, neighbours, and neighbours in clip-retrieval's format."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response

from pipeline.decisions.decision import Neighbor
from pipeline.decisions.question import Question
from pipeline.errors import Overloaded
from pipeline.serving.encoded import decode_image
from pipeline.serving.http.answers import DecisionAnswer, KnnAnswer, SearchAnswer, Texts, json_answer
from pipeline.serving.http.bodies import MAX_QUERIES, Asking, ClassifyBody, KnnBody, SearchBody
from pipeline.serving.http.documentation import takes
from pipeline.serving.http.json_bodies import SMALL_BYTES
from pipeline.serving.http.refused import Refused
from pipeline.serving.http.requests import Query, read_json, read_question
from pipeline.serving.http.waiting import while_waited_for
from pipeline.serving.limits import MAX_NEIGHBORS
from pipeline.serving.service.service import Decided, Searched, Service

NEIGHBORS_UNDER_WAY = 4 * MAX_NEIGHBORS  # for all unanswered requests together


class _Room:
    """Limits how many neighbours the unanswered requests ask for."""

    def __init__(self) -> None:
        self._taken = 0

    @contextlib.contextmanager
    def taken_by(self, questions: "Sequence[Query[Any]]") -> Iterator[int]:
        """Count the neighbours that questions ask for until they are answered. Raises Overloaded."""
        number = sum(query.num_queries * query.body.k for query in questions)
        if self._taken and self._taken + number > NEIGHBORS_UNDER_WAY:
            raise Overloaded("more neighbours are being looked for than fit: ask again later, or with a smaller k")
        self._taken += number
        try:
            yield number
        finally:
            self._taken -= number


def add_questions(app: FastAPI, service: Service) -> None:
    """Add the routes to an application."""
    room = _Room()

    async def answered(
        request: Request,
        kind: type[Any],
        ask: Callable[[Service, Any], Coroutine[Any, Any, Any]],
        show: Callable[[Any, Any, Texts], Any],
    ) -> Response:
        """The answers to all questions of a request: an object for one question, a list for a list."""
        began = time.monotonic()
        questions, many = await read_question(request, kind, service)
        with room.taken_by(questions) as num_neighbors:
            asking = _together([ask(service, question) for question in questions])
            found = await while_waited_for(request, asking)

            def answer() -> Response:
                texts = Texts()
                answers = [show(one, question, texts) for one, question in zip(found, questions, strict=True)]
                return json_answer(answers if many else answers[0])

            response = await service.worked(num_neighbors, answer)
        service.meter.took("request", time.monotonic() - began)
        return response

    @app.post(
        "/v1/search",
        summary="The nearest entries",
        operation_id="search",
        response_model=SearchAnswer | list[SearchAnswer | list[SearchAnswer]],
        **takes(SearchBody, lists=True, files=True),
    )
    async def search(request: Request) -> Response:
        return await answered(request, SearchBody, _search, _shown_neighbors)

    @app.post(
        "/v1/classify",
        summary="Decisions, with their evidence",
        operation_id="classify",
        response_model=DecisionAnswer | list[DecisionAnswer | list[DecisionAnswer]],
        **takes(ClassifyBody, lists=True, files=True),
    )
    async def classify(request: Request) -> Response:
        return await answered(request, ClassifyBody, _classify, _shown_decisions)

    @app.post(
        "/knn-service",
        summary="For clients of clip-retrieval",
        operation_id="knn_service",
        response_model=list[KnnAnswer],
        **takes(KnnBody),
    )
    async def knn_service(request: Request) -> Response:
        body = await read_json(request, KnnBody, service)
        if body.embedding_input is not None:
            vectors_QD = service.unit_vectors(np.array([body.embedding_input], np.float64))
        elif body.image is not None:
            vectors_QD = await service.embed([decode_image(body.image, "image")])
        else:
            said = next((name for name in ("text", "image_url") if getattr(body, name)), "embedding_input")
            raise Refused(
                422, "this memory is asked with an image or an embedding: it embeds no text and fetches no URL", said
            )
        wanted = Question(k=body.num_result_ids or body.num_images)
        searched = await service.search(vectors_QD, wanted, Asking().how)
        rows = searched.neighbors[0][: body.num_images]
        return await service.worked(len(rows), lambda: json_answer(Texts().of(rows, _as_knn)))


async def _together(asking: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of all. If one fails the others are cancelled, for nobody waits for them any more."""
    if len(asking) == 1:
        return [await asking[0]]
    tasks = [asyncio.ensure_future(one) for one in asking]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _search(service: Service, question: "Query[SearchBody]") -> Searched:
    return await service.search(await _vectors(service, question), question.body.question, question.body.how)


async def _classify(service: Service, question: "Query[ClassifyBody]") -> Decided:
    return await service.classify(await _vectors(service, question), question.body.question, question.body.how)


def _shown_neighbors(searched: Searched, question: "Query[SearchBody]", texts: Texts) -> Any:
    common = {
        "version": searched.version,
        "shards_answered": searched.shards_answered,
        "shards_total": searched.shards_total,
        "partial": searched.partial,
    }
    answers = [{"neighbors": texts.of(neighbors), **common} for neighbors in searched.neighbors]
    return answers if question.is_batch else answers[0]


def _shown_decisions(decided: Decided, question: "Query[ClassifyBody]", texts: Texts) -> Any:
    answers = [
        replace(decision, neighbors=()).to_json()
        | {"neighbors": texts.of(decision.neighbors), "partial": decided.partial}
        for decision in decided.decisions
    ]
    return answers if question.is_batch else answers[0]


def _as_knn(neighbor: Neighbor) -> dict[str, Any]:
    return {
        "id": neighbor.id,
        "id_text": str(neighbor.id),
        "similarity": neighbor.similarity,
        "url": neighbor.uri,
        "image_path": neighbor.uri,
        "caption": neighbor.label,
    }


async def _vectors(service: Service, question: "Query[Any]") -> np.ndarray:
    body: Asking = question.body
    if question.files is None:
        if body.embedding is None and body.image_base64 is None:
            raise Refused(422, "there is nothing to ask about: give image_base64 or embedding", "image_base64")
        if body.embedding is not None and body.image_base64 is not None:
            raise Refused(422, "both image_base64 and embedding were given: give one of them", "embedding")
    if question.num_queries > MAX_QUERIES:
        field = "embedding" if body.embedding is not None else "image_base64"
        raise Refused(422, f"more than {MAX_QUERIES} queries are too many for one request: ask in batches", field)

    def given() -> tuple[np.ndarray | None, list[bytes]]:
        vectors_QD = body.vectors_QD
        if vectors_QD is not None:
            return service.unit_vectors(vectors_QD), []
        return None, question.files if question.files is not None else body.images

    vectors_QD, images = await service.aside.run(given) if _is_large(body) else given()
    return vectors_QD if vectors_QD is not None else await service.embed(images, body.how.timeout_seconds)


def _is_large(body: Asking) -> bool:
    """Whether converting the body to arrays or bytes takes long enough to run outside the event loop."""
    texts = [body.image_base64] if isinstance(body.image_base64, str) else body.image_base64 or []
    return sum(map(len, texts)) > SMALL_BYTES or (body.embedding is not None and body.num_queries > 1)
