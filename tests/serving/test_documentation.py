"""/docs without any other site, stable names, and answers that are what the document says."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel, ConfigDict, TypeAdapter

from pipeline import VisualMemory
from pipeline.serving.http import answers
from tests.serving.serving import Served, served

TOKEN = "a token of the tests"
OPERATIONS = {
    ("post", "/v1/classify"): "classify",
    ("post", "/v1/search"): "search",
    ("post", "/knn-service"): "knn_service",
    ("get", "/v1/entries/{id}"): "get_entry",
    ("get", "/v1/entries/{id}/image"): "get_entry_image",
    ("post", "/v1/entries"): "add_entries",
    ("post", "/v1/forget"): "forget",
    ("post", "/v1/relabel"): "relabel",
    ("post", "/v1/reload"): "reload",
    ("get", "/v1/status"): "get_status",
    ("get", "/healthz"): "get_health",
}


@pytest.fixture(scope="module")
def server(digits_memory: VisualMemory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("documented") / "memory"
    digits_memory.copy(place)
    with served(str(place), token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def document(server: Served) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get("/openapi.json").json()
    return found


def test_the_page_names_no_other_site(server: Served) -> None:
    page = server.http.get("/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) == 3
    for address in loaded:
        assert address.startswith("/docs/files/"), address
        answer = server.http.get(address)
        assert answer.status_code == 200
        assert len(answer.content) > 1_000
    assert not re.findall(r"https?://", page)
    css = server.http.get(next(address for address in loaded if address.endswith(".css"))).text
    assert not re.findall(r"@import|url\(\s*['\"]?(?:https?:)?//", css)
    assert server.http.get("/redoc").status_code == 404
    assert server.http.get("/docs/files/../http.py").status_code == 404


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_that_reaches_no_other_site_shows_the_page(server: Served, tmp_path: Path) -> None:
    closed = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", closed, f"--user-data-dir={tmp_path}"]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=20000", "--dump-dom", f"{server.url}/docs"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    ).stdout
    assert "Visual Memory" in shown
    assert all(f"operations-default-{name}" in shown for name in OPERATIONS.values())


def test_operations_have_names_that_stay(document: dict[str, Any]) -> None:
    found = {
        (method, path): operation["operationId"]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert found == OPERATIONS


def test_every_answer_and_every_body_is_a_named_type(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answer = operation["responses"]["200"]["content"]
            if "application/json" in answer:
                assert "$ref" in json.dumps(answer["application/json"]["schema"]), (method, path)
            body = operation.get("requestBody", {}).get("content", {})
            for schema in body.values():
                assert "$ref" in json.dumps(schema["schema"]), (method, path)
                assert "properties" not in schema["schema"], (method, path)
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert named <= set(schemas)
    assert not [name for name, schema in schemas.items() if schema.get("type") == "object" and "title" not in schema]
    assert document["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}


def exact(model: type[BaseModel]) -> type[BaseModel]:
    """The model, which takes no field that it does not name."""
    return type(model.__name__, (model,), {"model_config": ConfigDict(extra="forbid")})


def test_answers_have_the_fields_of_their_types_and_no_others(server: Served) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), "teal").save(stream, "PNG")
    image = base64.b64encode(stream.getvalue()).decode()
    added = server.post("/v1/entries", {"image_base64": image, "label": "teal"}, TOKEN).json()
    entry = added["id"]
    asked = [
        (answers.AddAnswer, added),
        (answers.EntryAnswer, server.http.get(f"/v1/entries/{entry}").json()),
        (answers.StatusAnswer, server.http.get("/v1/status").json()),
        (answers.HealthAnswer, server.http.get("/healthz").json()),
        (answers.ReloadAnswer, server.post("/v1/reload", {}, TOKEN).json()),
        (answers.SearchAnswer, server.post("/v1/search", {"image_base64": image}).json()),
        (answers.DecisionAnswer, server.post("/v1/classify", {"image_base64": image}).json()),
        (answers.KnnAnswer, server.post("/knn-service", {"image": image}).json()[0]),
        (answers.RelabelAnswer, server.post("/v1/relabel", {"ids": [entry], "label": "green"}, TOKEN).json()),
        (answers.ForgetAnswer, server.post("/v1/forget", {"ids": [entry], "erase": True}, TOKEN).json()),
        (answers.Refusal, server.post("/v1/forget", {"ids": [entry]}).json()),
    ]
    for model, answer in asked:
        exact(model).model_validate(answer, strict=True)
        assert set(answer) == set(model.model_fields), model


def test_lists_of_questions_are_lists_of_answers(server: Served) -> None:
    one = {"embedding": [0.5] * 1280, "k": 1}
    batch = {"embedding": [[0.5] * 1280] * 2, "k": 1}
    adapter = TypeAdapter(answers.SearchAnswer | list[answers.SearchAnswer | list[answers.SearchAnswer]])
    for question, shape in ((one, dict), (batch, list), ([one, batch], list)):
        answer = server.post("/v1/search", question).json()
        adapter.validate_python(answer)
        assert isinstance(answer, shape)
