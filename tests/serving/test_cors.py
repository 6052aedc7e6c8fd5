"""Pages of other origins: let in by name, with preflights as browsers send them, and not let in otherwise."""

from collections.abc import Iterator

import httpx
import pytest

from pipeline import VisualMemory
from pipeline.errors import UsageError
from pipeline.serving.options import check_origins
from tests.serving.serving import Served, served

TOKEN = "a token of the tests"
OURS = "http://localhost:3000"
OTHERS = ["https://example.org", "http://localhost:3001", "https://localhost:3000", "http://localhost:3000.example.org"]


@pytest.fixture(scope="module")
def server(digits_memory: VisualMemory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("cors") / "memory"
    digits_memory.copy(place)
    with served(str(place), token=TOKEN, cors=[OURS, "https://photos.example.com"]) as server:
        yield server


def preflight(server: Served, origin: str, path: str, method: str = "POST", headers: str = "") -> httpx.Response:
    """What a browser asks before it sends what a plain form could not."""
    asking = {"Origin": origin, "Access-Control-Request-Method": method}
    return server.http.options(path, headers=asking | ({"Access-Control-Request-Headers": headers} if headers else {}))


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/search", "/v1/entries", "/v1/forget", "/v1/relabel"])
def test_a_preflight_of_a_call_with_the_token_is_let_through(server: Served, path: str) -> None:
    answer = preflight(server, OURS, path, headers="authorization,content-type,x-request-id")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == OURS
    assert {"POST"} <= set(answer.headers["access-control-allow-methods"].split(", "))
    allowed = answer.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in ("authorization", "content-type", "x-request-id"))
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize("origin", OTHERS)
def test_other_origins_are_not_let_in(server: Served, origin: str) -> None:
    assert "access-control-allow-origin" not in preflight(server, origin, "/v1/forget", headers="authorization").headers
    answer = server.http.get("/v1/status", headers={"Origin": origin})
    assert "access-control-allow-origin" not in answer.headers


def test_answers_and_refusals_can_be_read_by_the_page(server: Served) -> None:
    for method, path, status in (("GET", "/v1/status", 200), ("POST", "/v1/forget", 401), ("GET", "/nowhere", 404)):
        answer = server.http.request(method, path, headers={"Origin": OURS})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, OURS)
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]


def test_without_the_option_no_other_site_is_let_in(digits_memory: VisualMemory) -> None:
    with served(digits_memory.uri) as server:
        answer = preflight(server, "https://example.org", "/v1/classify")
        assert "access-control-allow-origin" not in answer.headers
        answer = server.http.get("/healthz", headers={"Origin": "https://example.org"})
        assert "access-control-allow-origin" not in answer.headers


def test_every_origin_is_let_in_without_credentials(digits_memory: VisualMemory) -> None:
    with served(digits_memory.uri, cors=["*"]) as server:
        answer = preflight(server, "https://example.org", "/v1/classify", headers="content-type")
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers
        answer = server.http.get("/healthz", headers={"Origin": "https://example.org", "Cookie": "a=b"})
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    "origins",
    [
        ["localhost:3000"],
        ["http://localhost:3000/"],
        ["https://*.example.org"],
        ["http://a b"],
        ["null"],
        [""],
        ["*", OURS],
        ["http://user@example.org"],
        ["https://example.org:443"],
        ["http://LOCALHOST:3000"],
    ],
)
def test_what_is_no_origin_is_refused_in_words(origins: list[str]) -> None:
    with pytest.raises(UsageError, match="origin"):
        check_origins(origins)


def test_origins_of_all_kinds_are_taken() -> None:
    check_origins([OURS, "https://example.org", "http://[::1]:8080", "https://xn--bcher-kva.example", "app://local"])
