"""The OpenAPI document, and a page that shows it without loading other sites: its files come with a package."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pipeline.serving.http.bodies import AddBody, ClassifyBody, ForgetBody, KnnBody, RelabelBody, SearchBody
from pipeline.serving.http.requests import PAIRS

PAGE_FILES = "/docs/files"  # of Swagger UI
_BODIES: tuple[type[BaseModel], ...] = (ClassifyBody, SearchBody, AddBody, ForgetBody, RelabelBody, KnnBody)
_NOT_IN_FORMS = {"image_base64", "embedding", *PAIRS}
_FILE = {"type": "string", "format": "binary"}


def add_documentation(app: FastAPI) -> None:
    """Add /docs and its files to an application, and all models to its OpenAPI document."""
    app.mount(PAGE_FILES, StaticFiles(directory=str(files("fastapi_offline") / "static")), name="files of the page")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "").rstrip("/")
        place = f"{root}{PAGE_FILES}"
        return get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=app.title,
            swagger_js_url=f"{place}/swagger-ui-bundle.js",
            swagger_css_url=f"{place}/swagger-ui.css",
            swagger_favicon_url=f"{place}/favicon.png",
        )

    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        components = document.setdefault("components", {})
        components.setdefault("securitySchemes", {})["bearer"] = {"type": "http", "scheme": "bearer"}
        components.setdefault("schemas", {}).update(_schemas_of_bodies())
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def takes(
    kind: type[BaseModel], *, lists: bool = False, files: bool = False, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The OpenAPI entry of a route that reads its own body: JSON or, with `files`, also a form."""
    alone = {"$ref": f"#/components/schemas/{kind.__name__}"}
    schema = {"anyOf": [alone, {"type": "array", "items": alone, "minItems": 1}]} if lists else alone
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": getattr(kind, "example", {})}}
    if files:
        content["multipart/form-data"] = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}Form"}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}, **(extra or {})}}


def _schemas_of_bodies() -> dict[str, Any]:
    _, found = models_json_schema(
        [(kind, "validation") for kind in _BODIES], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = found["$defs"]
    for kind in (ClassifyBody, SearchBody, AddBody):
        schemas[f"{kind.__name__}Form"] = _form_of(schemas[kind.__name__])
    return schemas


def _form_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a body as a form: images as files, other options as text."""
    options = {name: part for name, part in schema["properties"].items() if name not in _NOT_IN_FORMS}
    image = {"type": "array", "items": _FILE, "minItems": 1, "description": "An image file; several make a batch."}
    return {
        "type": "object",
        "title": f"{schema['title']}Form",
        "properties": {"image": image, **options},
        "required": ["image"],
    }
