"""The routes by which a server is asked: decisions, neighbours, and clip-retrieval's shape of them."""

import asyncio
import time
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response

from pipeline.serving.answers import DecisionAnswer, KnnAnswer, SearchAnswer, json_answer
from pipeline.serving.bodies import Asking, ClassifyBody, KnnBody, SearchBody
from pipeline.serving.documentation import takes
from pipeline.serving.encoded import decoded
from pipeline.serving.requests import MAX_QUERIES, Query, Refused, asked, stated
from pipeline.serving.service import Service


def add_questions(app: FastAPI, service: Service) -> None:
    """Put the routes into an application."""

    @app.post(
        "/v1/search",
        summary="The nearest entries",
        operation_id="search",
        response_model=SearchAnswer | list[SearchAnswer | list[SearchAnswer]],
        **takes(SearchBody, lists=True, files=True),
    )
    async def search(request: Request) -> Response:
        began = time.monotonic()
        questions, many = await asked(request, SearchBody)
        answers = await asyncio.gather(*(_search(service, question) for question in questions))
        service.meter.took("request", time.monotonic() - began)
        return json_answer(answers if many else answers[0])

    @app.post(
        "/v1/classify",
        summary="Decisions, with their evidence",
        operation_id="classify",
        response_model=DecisionAnswer | list[DecisionAnswer | list[DecisionAnswer]],
        **takes(ClassifyBody, lists=True, files=True),
    )
    async def classify(request: Request) -> Response:
        began = time.monotonic()
        questions, many = await asked(request, ClassifyBody)
        answers = await asyncio.gather(*(_classify(service, question) for question in questions))
        service.meter.took("request", time.monotonic() - began)
        return json_answer(answers if many else answers[0])

    @app.post(
        "/knn-service",
        summary="For clients of clip-retrieval",
        operation_id="knn_service",
        response_model=list[KnnAnswer],
        **takes(KnnBody),
    )
    async def knn_service(request: Request) -> Response:
        body = await stated(request, KnnBody)
        if body.embedding_input is not None:
            vectors_QD = service.unit_vectors(np.array([body.embedding_input], np.float64))
        elif body.image is not None:
            vectors_QD = await service.embed([decoded(body.image, "image")])
        else:
            said = next((name for name in ("text", "image_url") if getattr(body, name)), "embedding_input")
            raise Refused(
                422, "this memory is asked with an image or an embedding: it embeds no text and fetches no URL", said
            )
        searched = await service.search(vectors_QD, body.num_result_ids or body.num_images, Asking().how)
        return json_answer(
            [
                {
                    "id": neighbor.id,
                    "id_text": str(neighbor.id),
                    "similarity": neighbor.similarity,
                    "url": neighbor.uri,
                    "image_path": neighbor.uri,
                    "caption": neighbor.label,
                }
                for neighbor in searched.neighbors[0][: body.num_images]
            ]
        )


async def _search(service: Service, question: "Query[SearchBody]") -> Any:
    vectors_QD = await _vectors(service, question)
    searched = await service.search(vectors_QD, question.body.k, question.body.how)
    common = {
        "version": searched.version,
        "shards_answered": searched.shards_answered,
        "shards_total": searched.shards_total,
        "partial": searched.partial,
    }
    answers = [{"neighbors": [n.to_json() for n in neighbors], **common} for neighbors in searched.neighbors]
    return answers if question.is_batch else answers[0]


async def _classify(service: Service, question: "Query[ClassifyBody]") -> Any:
    vectors_QD = await _vectors(service, question)
    decided = await service.classify(vectors_QD, question.body.options, question.body.how)
    answers = [decision.to_json() | {"partial": decided.partial} for decision in decided.decisions]
    return answers if question.is_batch else answers[0]


async def _vectors(service: Service, question: "Query[Any]") -> np.ndarray:
    body: Asking = question.body
    if question.files is None:
        if body.embedding is None and body.image_base64 is None:
            raise Refused(422, "there is nothing to ask about: give image_base64 or embedding", "image_base64")
        if body.embedding is not None and body.image_base64 is not None:
            raise Refused(422, "both image_base64 and embedding were given: give one of them", "embedding")
    given = body.vectors_QD
    images = question.files if question.files is not None else body.images
    if len(images) > MAX_QUERIES or (given is not None and len(given) > MAX_QUERIES):
        field = "image_base64" if images else "embedding"
        raise Refused(422, f"more than {MAX_QUERIES} queries are too many for one request: ask in batches", field)
    if given is not None:
        return service.unit_vectors(given)
    return await service.embed(images, body.how.timeout_seconds)
