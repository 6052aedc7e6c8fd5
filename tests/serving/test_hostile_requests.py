"""Requests made to cost much, to come from elsewhere, or to break what reads them: refused, quickly, in a sentence."""

import base64
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from PIL import Image

from pipeline import Client, VisualMemory
from pipeline.errors import UsageError
from pipeline.serving.http.bodies import MAX_LISTED, MAX_QUERIES
from pipeline.serving.http.json_bodies import check_amount
from pipeline.serving.http.refused import Refused
from pipeline.serving.http.sites import Hosts, check_hosts, name_of
from pipeline.serving.options import TOKEN as VARIABLE
from pipeline.serving.options import ServingOptions, token_of
from pipeline.serving.tokens import carries
from tests.serving.serving import Served, served

TOKEN = "ein Schlüssel der Tests"
HEADERS = {"Authorization": f"Bearer {TOKEN}".encode()}
SECONDS = 15.0
MEBIBYTE = 1 << 20
VECTOR = [0.5] * 1280


@pytest.fixture(scope="module")
def server(digits_memory: VisualMemory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("hostile") / "memory"
    digits_memory.copy(place)
    with served(str(place), token=TOKEN, hosts=["photos.example.org", "*.Example.net"]) as server:
        yield server


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def send(server: Served, path: str, content: bytes, **headers: str) -> httpx.Response:
    sent = {"Content-Type": "application/json", **HEADERS, **{name.replace("_", "-"): v for name, v in headers.items()}}
    return server.http.post(path, content=content, headers=sent)


# Bodies that cost more than they weigh

AMOUNTS: dict[str, Callable[[int], bytes]] = {
    "empty lists": lambda n: b'{"embedding":[' + b"[]," * (n // 3) + b"[]]}",
    "numbers and a word": lambda n: b'{"embedding":[' + b"0," * (n // 2) + b'"x"]}',
    "numbers": lambda n: b'{"embedding":[' + b"0," * (n // 2) + b"0]}",
    "questions of one digit": lambda n: b"[" + b"1," * (n // 2) + b"1]",
    "empty questions": lambda n: b"[" + b"{}," * (n // 3) + b"{}]",
    "lists of one": lambda n: b'{"embedding":[' + b"[0]," * (n // 4) + b"[0]]}",
    "empty images": lambda n: b'{"image_base64":[' + b'"",' * (n // 3) + b'""]}',
    "excluded": lambda n: b'{"embedding":[0],"exclude":[' + b"1," * (n // 2) + b"1]}",
    "weighed": lambda n: b'{"weigh":{' + b",".join(b'"%d":1' % i for i in range(n // 12)) + b"}}",
    "assumed": lambda n: b'{"assume":{' + b",".join(b'"%d":"a"' % i for i in range(n // 14)) + b"}}",
    "unknown fields": lambda n: b"{" + b",".join(b'"a%d":1' % i for i in range(n // 12)) + b"}",
    "one field again and again": lambda n: b"{" + b'"k":1,' * (n // 6) + b'"k":1}',
    "ids": lambda n: b'{"ids":[' + b"1," * (n // 2) + b"1]}",
    "labels": lambda n: b'{"labels":[' + b'"a",' * (n // 4) + b'"a"]}',
    "uris": lambda n: b'{"uri":[' + b"null," * (n // 5) + b"null]}",
    "an unknown field of lists": lambda n: b'{"x":[' + b"[]," * (n // 3) + b"[]]}",
    "digits": lambda n: b'{"k":' + b"1" * n + b"}",
    "a long name": lambda n: b'{"' + b"a" * n + b'":1}',
    "a long word": lambda n: b'{"voting":"' + b"a" * n + b'"}',
    "nested": lambda n: b'{"embedding":' + b"[" * (n // 2) + b"]" * (n // 2) + b"}",
    "spaces": lambda n: b" " * n,
    "broken lines": lambda n: b'{"embedding":[' + b"[],\n" * (n // 4) + b"[]]}",
    "a broken line in a word": lambda n: b'{"where":"a\nb","embedding":[' + b"[]," * (n // 3) + b"[]]}",
}


@pytest.mark.parametrize("amount", AMOUNTS.values(), ids=AMOUNTS)
@pytest.mark.parametrize(
    "path", ["/v1/classify", "/v1/search", "/knn-service", "/v1/entries", "/v1/forget", "/v1/relabel"]
)
def test_bodies_of_many_values_are_cheap(server: Served, path: str, amount: Callable[[int], bytes]) -> None:
    body = amount(5 * MEBIBYTE if path == "/v1/classify" else 600_000)
    before, began = rss_bytes(), time.monotonic()
    answer = send(server, path, body)
    assert answer.status_code in {400, 413, 422}, answer.text[:200]
    assert len(answer.content) < 2_000, "a refusal repeats little of what was sent"
    assert time.monotonic() - began < SECONDS / 3
    assert rss_bytes() - before < 150 * MEBIBYTE


def test_values_are_counted_by_what_the_memory_needs() -> None:
    batch = json.dumps({"embedding": np.random.default_rng(0).normal(size=(MAX_QUERIES, 1280)).tolist()}).encode()
    check_amount(batch, 1280)
    check_amount(b"[" + b",".join([batch[:26_000].rpartition(b",")[0] + b"]]}"] * MAX_QUERIES) + b"]", 1280)
    check_amount(b'{"image_base64":"' + b"A" * (30 * MEBIBYTE) + b'"}', 4)
    with pytest.raises(Refused, match="more values"):
        check_amount(batch * 3, 1280)


@pytest.mark.parametrize("name", ["weigh", "assume", "exclude"])
@pytest.mark.parametrize("path", ["/v1/classify"])
def test_dictionaries_are_bounded_as_lists_are(server: Served, path: str, name: str) -> None:
    ids = range(MAX_LISTED + 1)
    values: dict[str, Any] = {"weigh": dict.fromkeys(ids, 1), "assume": dict.fromkeys(ids, "a"), "exclude": [*ids]}
    answer = server.post(path, {"embedding": VECTOR, name: values[name]})
    assert (answer.status_code, answer.json()["field"]) == (422, name)
    assert str(MAX_LISTED) in answer.json()["detail"]
    files = {"image": b"x"}
    pairs = [f"{i}=1" for i in ids] if name != "exclude" else [str(i) for i in ids]
    assert server.http.post(path, files=files, data={name: pairs}).status_code in {400, 422}


def test_a_list_of_questions_lists_no_more_than_some_requests(server: Served) -> None:
    question = {"embedding": VECTOR, "exclude": [*range(900)]}
    answer = server.post("/v1/classify", [question] * 20)
    assert (answer.status_code, answer.json()["field"]) == (422, "exclude")


def test_a_request_has_one_where(server: Served) -> None:
    questions = [{"embedding": VECTOR, "k": 1, "where": f"label != '{i}'"} for i in range(2)]
    for path in ("/v1/classify", "/v1/search"):
        answer = server.post(path, questions)
        assert (answer.status_code, answer.json()["field"]) == (422, "where")
        assert server.post(path, [questions[0]] * 3 + [{"embedding": VECTOR, "k": 1}]).status_code == 200


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/search"])
def test_an_answer_has_a_size(server: Served, path: str) -> None:
    batch = {"embedding": [VECTOR] * 64, "k": 10_000}
    for body in (batch, [{"embedding": VECTOR, "k": 10_000}] * 64, [batch] * 2):
        answer = server.post(path, body)
        assert (answer.status_code, answer.json()["field"]) == (422, "k")
    image = png(3)
    answer = server.http.post(path, files=[("image", image)] * 64, data={"k": "10000"})
    assert (answer.status_code, answer.json()["field"]) == (422, "k")
    assert server.post(path, {"embedding": VECTOR, "k": 10_000}).status_code == 200
    assert len(server.post(path, {"embedding": [VECTOR] * 256, "k": 100}).json()) == 256


def test_the_client_asks_for_no_more_than_an_answer_holds(server: Served) -> None:
    vectors = np.random.default_rng(2).normal(size=(9, 1280))
    with Client(server.url) as client:
        assert (
            len(client.search(embeddings=vectors, k=10_000)) == len(client.classify(embeddings=vectors, k=9_999)) == 9
        )


def test_a_large_answer_is_the_same_as_small_ones(server: Served) -> None:
    vectors = np.random.default_rng(1).normal(size=(MAX_QUERIES, 1280)).tolist()
    for path in ("/v1/classify", "/v1/search"):
        alone = [server.post(path, {"embedding": vector, "k": 20}).json() for vector in vectors[:3]]
        assert server.post(path, {"embedding": vectors, "k": 20}).json()[:3] == alone


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 30, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


# Forms

CHARSETS = [
    "undefined",
    "punycode",
    "idna",
    "unicode_escape",
    "utf-7",
    "utf-16",
    "hex",
    "zlib",
    "rot13",
    "mbcs",
    "x" * 999,
    "\x00",
    '"',
]


@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/search", "/v1/entries"])
def test_a_form_in_a_strange_encoding_is_refused(server: Served, path: str, charset: str) -> None:
    part = b'--XX\r\nContent-Disposition: form-data; name="k"\r\n\r\n\xff\x80-x\r\n--XX--\r\n'
    for spelt in (
        f"boundary=XX; charset={charset}",
        f'charset="{charset}"; boundary=XX',
        f"boundary=XX;CHARSET = {charset}",
    ):
        if "\x00" in spelt:
            continue
        answer = send(server, path, part, Content_Type=f"multipart/form-data; {spelt}")
        assert 400 <= answer.status_code < 500, answer.text


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", "us-ascii", "iso-8859-1", "windows-1252", '"utf-8"'])
def test_a_form_in_a_usual_encoding_is_taken(server: Served, charset: str) -> None:
    part = b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + png(1) + b"\r\n--XX--\r\n"
    answer = send(server, "/v1/search", part, Content_Type=f"multipart/form-data; boundary=XX; charset={charset}")
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "[" * 300 + "]" * 300, "[" + "[]," * 300_000 + "[]]", "1" * 9_999, "NaN", ""],
)
def test_a_strange_embedding_in_a_form_is_refused(server: Served, text: str) -> None:
    answer = server.http.post("/v1/classify", files={"x": b""}, data={"embedding": text})
    assert 400 <= answer.status_code < 500
    part = f'--XX\r\nContent-Disposition: form-data; name="embedding"\r\n\r\n{text}\r\n--XX--\r\n'.encode()
    answer = send(server, "/v1/classify", part, Content_Type="multipart/form-data; boundary=XX")
    assert (answer.status_code, answer.json()["field"] in {"embedding", None}) == (422, True), answer.text


@pytest.mark.parametrize(
    "part",
    [
        b"--XX\r\nContent-Disposition: form-data; name*=undefined''%ff\r\n\r\na\r\n--XX--\r\n",
        b"--XX\r\nContent-Disposition: form-data; name=\xff\xfe\r\n\r\na\r\n--XX--\r\n",
        b"--XX\r\nContent-Disposition: \r\n\r\na\r\n--XX--\r\n",
        b"--XX\r\n\r\na\r\n--XX--\r\n",
        b"--XX\r\nContent-Disposition: form-data; name=\"a\"; filename*=punycode''a%00\r\n\r\na\r\n--XX--\r\n",
        b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n'
        b"Content-Type: a; charset=undefined\r\n\r\na\r\n--XX--",
        b"--XX--\r\n",
        b"--XX",
    ],
)
def test_a_part_with_strange_headers_is_refused(server: Served, part: bytes) -> None:
    for path in ("/v1/classify", "/v1/entries"):
        answer = send(server, path, part, Content_Type="multipart/form-data; boundary=XX")
        assert 400 <= answer.status_code < 500, answer.text


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary*=undefined''XX",
        "multipart/form-data; boundary=" + "X" * 9_000,
        "multipart/mixed; boundary=XX",
        "multipart/form-data; boundary=\xff",
    ],
)
def test_a_strange_boundary_is_refused(server: Served, content_type: str) -> None:
    sent = {"Content-Type": content_type.encode("latin-1")}
    assert 400 <= server.http.post("/v1/classify", content=b"--XX--", headers=sent).status_code < 500


# Names of fields


@pytest.mark.parametrize("name", ["5", "0", "path", "", "007", "None", "query", "²", "a" * 500])
def test_an_unknown_field_is_named_whatever_its_name(server: Served, name: str) -> None:
    for body in ({"embedding": VECTOR, name: 1}, [{"embedding": VECTOR, name: 1}]):
        answer = server.post("/v1/classify", body)
        assert (answer.status_code, answer.json()["field"][:60]) == (422, name[:60]), answer.text
        assert answer.json()["detail"].startswith(f"{name[:60]}")
        assert "None is" not in answer.json()["detail"] or name == "None"


# Hosts and sites


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8000",
        "localhost",
        "LOCALHOST:1",
        "[::1]:8000",
        "[::1]",
        "a.localhost",
        "10.1.2.3",
        "gpu-box:8000",
        "photos.example.org",
        "Photos.Example.org.:443",
        "a.example.net",
        "a.b.example.net",
    ],
)
def test_names_that_are_nobody_elses_are_answered_to(server: Served, host: str) -> None:
    assert server.http.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "example.net",
        "aexample.net",
        "photos.example.org.evil.example",
        "127.0.0.1:8000@evil.example",
        "[::1].evil.example",
        "[evil.example]",
        "evil.example:x",
        "1.2.3",
    ],
)
def test_other_names_are_not(server: Served, host: str) -> None:
    for method, path in (
        ("GET", "/healthz"),
        ("GET", "/docs"),
        ("POST", "/v1/search"),
        ("POST", "/v1/forget"),
        ("OPTIONS", "/"),
    ):
        answer = server.http.request(method, path, headers={"Host": host, **HEADERS}, json={"embedding": VECTOR})
        assert (answer.status_code, "--allow-host" in answer.json()["detail"]) == (421, True)
    assert "version" not in answer.text


def test_what_is_no_name_of_a_host_is_refused_in_words() -> None:
    check_hosts(["*", "*.example.org", "localhost", "a-b.c_d.example", "xn--bcher-kva.example", "EXAMPLE.org"])
    for name in ("http://a.b", "a.b:80", "a.b/c", "", "*.", "a.*.b", "-a.b", "a b", "a,b"):
        with pytest.raises(UsageError, match="host"):
            check_hosts([name])
    assert Hosts(["*"]).has("evil.example")
    assert Hosts(listens_at="memory.example.org").has("memory.example.org:80")
    assert name_of("A.B.:80") == "a.b"


FOREIGN: list[Mapping[str, str]] = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:1"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Origin": ""},
]


@pytest.mark.parametrize("marks", FOREIGN, ids=str)
def test_a_page_of_another_site_sends_nothing(server: Served, marks: Mapping[str, str]) -> None:
    body = json.dumps({"embedding": VECTOR, "k": 1}).encode()
    for content_type in ("application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=X"):
        for path in ("/v1/classify", "/v1/search", "/knn-service", "/v1/entries", "/v1/forget", "/v1/reload"):
            answer = server.http.post(path, content=body, headers={"Content-Type": content_type, **HEADERS, **marks})
            assert (answer.status_code, "--cors" in answer.json()["detail"]) == (403, True)


def test_this_servers_own_page_and_programs_may_send(server: Served) -> None:
    body = {"embedding": VECTOR, "k": 1}
    for marks in (
        {},
        {"Origin": server.url},
        {"Origin": server.url, "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ):
        assert server.http.post("/v1/search", json=body, headers=marks).status_code == 200
    own = {"Host": "photos.example.org", "Origin": "https://photos.example.org"}
    assert server.http.post("/v1/search", json=body, headers=own).status_code == 200


def test_a_named_origin_may_send(digits_memory: VisualMemory) -> None:
    page = {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "cross-site"}
    with served(digits_memory.uri, cors=["http://localhost:3000"]) as named:
        assert named.http.post("/v1/search", json={"embedding": VECTOR}, headers=page).status_code == 200
        page["Origin"] = "http://localhost:3001"
        assert named.http.post("/v1/search", json={"embedding": VECTOR}, headers=page).status_code == 403


def test_answers_are_marked_for_browsers(server: Served) -> None:
    for answer in (
        server.http.get("/healthz"),
        server.http.get("/nowhere"),
        server.http.get("/docs"),
        server.http.get("/healthz", headers={"Host": "evil.example"}),
        server.http.post("/v1/classify", content=b"{"),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


# Tokens


def given(value: bytes) -> dict[str, Any]:
    return {"headers": [(b"authorization", value)]}


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   ", "Bearer \t"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_token_is_taken_however_it_is_sent(server: Served, scheme: str, encoding: str) -> None:
    sent = f"{scheme}{TOKEN}".encode(encoding)
    assert server.http.post("/v1/reload", headers={"Authorization": sent}).status_code == 200
    assert carries(given(sent + b" "), TOKEN)


@pytest.mark.parametrize(
    "sent",
    [
        TOKEN.encode(),
        b"",
        b"Bearer",
        b"Bearer ",
        f"Basic {TOKEN}".encode(),
        f"Bearer {TOKEN[:-1]}".encode(),
        f"Bearer {TOKEN}".encode("utf-16"),
        b"Bearer " + b"?" * len(TOKEN),
        f"Bearer{TOKEN}".encode(),
        f"Bearer {TOKEN.upper()}".encode(),
    ],
)
def test_another_is_not(sent: bytes) -> None:
    assert not carries(given(sent), TOKEN)


def test_a_token_beyond_latin_1_matches_itself_only() -> None:
    assert carries(given("Bearer ключ".encode()), "ключ")
    assert not carries(given(b"Bearer ????"), "ключ")
    assert not carries(given(b"Bearer x"), None)
    assert not carries({"headers": [(b"authorization", b"Bearer a")] * 2}, "a")


@pytest.mark.parametrize("text", ["   ", "\t\n", "one\ntwo", "a\x00b", "a\x1bb", "a\rb"])
def test_a_token_that_can_never_match_is_refused_at_start(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_bytes(text.encode())
    with pytest.raises(UsageError, match="token"):
        token_of(ServingOptions(memory="m", token_file=str(tmp_path / "token")))
    if "\x00" not in text:
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(UsageError, match=VARIABLE):
            token_of(ServingOptions(memory="m"))


def test_white_space_around_a_token_is_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbf a token \r\n")
    assert token_of(ServingOptions(memory="m", token_file=str(tmp_path / "token"))) == "a token"
    monkeypatch.setenv(VARIABLE, "a token\n")
    assert token_of(ServingOptions(memory="m")) == "a token"
    monkeypatch.setenv(VARIABLE, "")
    assert token_of(ServingOptions(memory="m")) is None


# What is told to whom


def test_no_refusal_tells_where_the_memory_lies(server: Served) -> None:
    place = Path(server.service.place)
    image = base64.b64encode(b"no image").decode()
    for path, body in (
        ("/v1/classify", {"embedding": VECTOR, "label_set": "colours"}),
        ("/v1/search", {"embedding": VECTOR, "label_set": "colours"}),
        ("/v1/classify", {"embedding": VECTOR, "label_set": "colours", "balance": "auto"}),
        ("/v1/classify", {"embedding": VECTOR, "where": "nothing = 1"}),
        ("/v1/classify", {"embedding": VECTOR, "exclude": [5]}),
        ("/v1/classify", {"image_base64": image}),
    ):
        answer = server.post(path, body)
        assert answer.status_code == 422
        assert str(place) not in answer.text
        assert str(place.parent) not in answer.text
        assert " the memory the memory" not in answer.text


# The editor


class _Dead:
    """An editor whose process dies over what it is asked, as Ray tells it: with an error that is none of ours."""

    async def edit(self, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]) -> dict:
        raise ConnectionResetError("the actor died")


def test_a_dead_editor_is_no_500(server: Served) -> None:
    editor, server.service.editor = server.service.editor, _Dead()
    try:
        for path, body in (
            ("/v1/entries", {"image_base64": base64.b64encode(png(2)).decode()}),
            ("/v1/forget", {"labels": ["0"]}),
            ("/v1/relabel", {"ids": [1], "label": "x"}),
        ):
            answer = server.http.post(path, json=body, headers=HEADERS)
            assert (answer.status_code, "may or may not have been done" in answer.json()["detail"]) == (503, True)
            assert int(answer.headers["retry-after"]) >= 1
    finally:
        server.service.editor = editor


# And others meanwhile


def test_an_honest_question_is_answered_beside_hostile_ones(server: Served) -> None:
    bodies = [make(5 * MEBIBYTE) for make in AMOUNTS.values()]
    done = threading.Event()
    statuses: list[int] = []

    def attack() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not done.is_set():
                for body in bodies:
                    answer = client.post("/v1/classify", content=body, headers={"Content-Type": "application/json"})
                    statuses.append(answer.status_code)

    before = rss_bytes()
    attackers = [threading.Thread(target=attack) for _ in range(3)]
    for attacker in attackers:
        attacker.start()
    try:
        for _ in range(20):
            began = time.monotonic()
            assert server.post("/v1/search", {"embedding": VECTOR, "k": 1}).status_code == 200
            assert time.monotonic() - began < SECONDS
    finally:
        done.set()
        for attacker in attackers:
            attacker.join()
    assert set(statuses) <= {400, 413, 422, 429}
    assert rss_bytes() - before < 400 * MEBIBYTE
