"""The hub is asked whether it answers, within seconds, before files are asked of it."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from pipeline.embeddings import hub
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.errors import EncoderError


class Answering(BaseHTTPRequestHandler):
    status = 200
    asked = 0

    def do_HEAD(self) -> None:
        type(self).asked += 1
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answering]]:
    """A hub of this test; `status` is what it answers with."""

    class Handler(Answering):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(hub, "PAUSE_SECONDS", 0.01)
    yield Handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [200, 404, 403])
def test_a_hub_that_answers_is_asked_once(answering: type[Answering], status: int) -> None:
    answering.status = status
    with hub.ask_once() as silent:
        assert silent is None
        assert not constants.HF_HUB_OFFLINE
    assert answering.asked == 1


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_is_down_is_asked_twice_and_then_not(answering: type[Answering], status: int) -> None:
    answering.status = status
    with hub.ask_once() as silent:
        assert silent == f"{constants.ENDPOINT} is down: it answers {status}"
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert answering.asked == 2


def test_a_hub_that_never_answers_takes_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.2)
        monkeypatch.setattr(hub, "PAUSE_SECONDS", 0.01)
        began = time.monotonic()
        with pytest.raises(
            EncoderError, match=r"could not be fetched from timm's hub \(http://.* does not answer: .*\)"
        ):
            Encoder.load(EncoderChoice("vit_tiny_patch16_224"))
        assert time.monotonic() - began < 10


def test_a_user_who_works_offline_is_not_made_to_wait(
    answering: type[Answering], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub.ask_once() as silent:
        assert silent is None
    assert (answering.asked, constants.HF_HUB_OFFLINE) == (0, True)
