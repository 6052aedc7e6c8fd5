"""Errors of Arrow, FAISS, NumPy and Ray reach the user as the library's own, with their cause."""

import inspect
import os
from collections.abc import Callable

import faiss
import numpy as np
import pyarrow as pa
import pytest
import ray

from jobs.cli import main
from pipeline import VisualMemory
from pipeline.errors import LibraryError, OutOfMemory, UsageError, VisualMemoryError, WorkerError
from pipeline.foreign_errors import own_error, own_errors
from pipeline.index.search.live_entries import LiveEntries
from pipeline.reader import Reader
from pipeline.steps import Step
from pipeline.store.lookup.digests import Digests
from tests.conftest import MakeMemory, unit
from tests.serving.serving import served


def too_large() -> np.ndarray:
    return np.empty(1 << 62, np.uint8)


def too_large_for_arrow() -> pa.Buffer:
    return pa.allocate_buffer(1 << 62)


def not_a_number() -> pa.Array:
    return pa.array(["one"]).cast(pa.int64())


def untrainable() -> None:
    faiss.index_factory(4, "IVF100,Flat").train(np.zeros((5, 4), np.float32))


@pytest.mark.parametrize(
    ("fail", "kind", "said"),
    [
        (too_large, OutOfMemory, "memory ran out in a test (Unable to allocate 4.00 EiB"),
        (too_large_for_arrow, OutOfMemory, "memory ran out in a test (malloc of size"),
        (not_a_number, LibraryError, "a test failed in Arrow (Failed to parse string: 'one'"),
        (untrainable, LibraryError, "a test failed in FAISS ('nx >= static_cast<idx_t>(k)' failed: Number of training"),
    ],
)
def test_an_error_of_another_library_becomes_one_of_ours(
    fail: Callable[[], object], kind: type[VisualMemoryError], said: str
) -> None:
    with pytest.raises(kind) as raised, own_errors("a test"):
        fail()
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is not None
    assert not isinstance(raised.value.__cause__, VisualMemoryError)


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("a bug"), OSError("full"), TypeError(), SystemError()])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert own_error(error, "a test") is None
    with pytest.raises(type(error)) as raised, own_errors("a test"):
        raise error
    assert raised.value is error


def test_an_error_of_ours_stays_as_it_is() -> None:
    with pytest.raises(UsageError) as raised, own_errors("a test"):
        raise UsageError("no")
    assert str(raised.value) == "no"
    assert raised.value.__cause__ is None


CALLS: dict[str, Callable[[VisualMemory], object]] = {
    "search": lambda memory: memory.search(embeddings=np.ones((1, 8))),
    "classify": lambda memory: memory.classify(embeddings=np.ones((1, 8))),
    "evaluate_leave_one_out": lambda memory: memory.evaluate_leave_one_out(),
}


@pytest.mark.parametrize("name", CALLS)
def test_methods_of_a_memory_raise_our_errors(
    name: str, make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make_memory(unit(np.random.default_rng(0).normal(size=(20, 8))), ["a"] * 20)
    monkeypatch.setattr(LiveEntries, "search", lambda *_, **__: too_large())
    with pytest.raises(OutOfMemory, match=f"memory ran out in {name} on the memory at {memory.uri} "):
        CALLS[name](memory)


def test_every_public_method_of_a_memory_does_so() -> None:
    methods = [
        method
        for cls in (Reader, VisualMemory)
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith("_")
    ]
    assert len(methods) > 25
    assert all(hasattr(method, "__wrapped__") for method in methods)
    assert "embeddings" in inspect.signature(VisualMemory.search).parameters


def test_the_command_line_says_it_in_one_line_and_debug_shows_where(
    make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = make_memory(unit(np.random.default_rng(0).normal(size=(20, 8))), ["a"] * 20)
    monkeypatch.setattr(Digests, "of", lambda *_: not_a_number())
    monkeypatch.setattr("pipeline.index.search.leave_one_out.COPY_SIMILARITY", -1.0)
    command = ["evaluate", memory.uri, "--leave-one-out", "-k", "1"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: evaluate_leave_one_out on the memory at {memory.uri} failed in Arrow (Failed to par"
    )
    assert "run `verify`" in line
    with pytest.raises(LibraryError) as raised:
        main([*command, "--debug"])
    assert isinstance(raised.value.__cause__, pa.ArrowInvalid)


@pytest.mark.parametrize(("fail", "status"), [(too_large, 503), (not_a_number, 500)])
def test_over_http_it_is_a_clean_refusal(
    fail: Callable[[], object], status: int, make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make_memory(unit(np.random.default_rng(0).normal(size=(20, 8))), ["a"] * 20)
    with served(memory.uri, token="secret") as server:
        monkeypatch.setattr("pipeline.visual_memory.forgetting.forget", lambda *_, **__: fail())
        answer = server.post("/v1/forget", {"labels": ["a"]}, token="secret")
        assert answer.status_code == status, answer.text
        assert "forget on the memory" in answer.json()["detail"]
        assert "Traceback" not in answer.text
        monkeypatch.setattr(LiveEntries, "search", lambda *_, **__: fail())
        asked = server.post("/v1/classify", {"embedding": [1.0] * 8})
        assert asked.status_code == 503
        assert memory.uri not in asked.text


@pytest.mark.slow
def test_what_a_worker_of_ray_met_reaches_the_caller() -> None:
    from jobs.ray_cluster.on_ray import start_ray
    from pipeline.index.build.on_ray import run_steps_on_ray

    start_ray()
    with pytest.raises(OutOfMemory, match="memory ran out in work on Ray"):
        list(run_steps_on_ray([Step(0, too_large, 1 << 20)]))
    with pytest.raises(WorkerError, match="a process that did a step of the work failed"):
        list(run_steps_on_ray([Step(0, not_a_number, 1 << 20)]))

    @ray.remote(max_retries=0)
    def die() -> None:
        os._exit(1)

    with pytest.raises(WorkerError, match="a test lost a process of Ray"), own_errors("a test"):
        ray.get(die.remote())
    with pytest.raises(LibraryError, match="a test failed in Arrow"), own_errors("a test"):
        ray.get(ray.remote(not_a_number).remote())
