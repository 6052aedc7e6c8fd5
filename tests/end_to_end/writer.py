"""A process that forks writers on request, for tests that kill them: `python -m tests.end_to_end.writer WEIGHTS`.

It loads the encoder once. Each line on stdin is a JSON request: {"run": {"uri", "operations", "journal"}} forks a
writer and answers with its pid, {"wait": pid} answers once it has ended. A writer notes in its journal what it is about
to do and each file it is about to publish, so that it can be told afterwards where a kill met it.
"""

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any

import faiss
import torch

from pipeline import VisualMemory
from pipeline.edits.compact import compact
from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.errors import CommitConflict, MemoryMissing, StorageError, UnknownName, UsageError
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.object_store import ObjectStorage

ENCODER = "tf_efficientnet_lite0"
IMAGE_SIZE = 32


def main() -> None:
    torch.set_num_threads(1)  # a process that ran threads cannot be forked safely
    faiss.omp_set_num_threads(1)
    encoder = Encoder.load(EncoderChoice(ENCODER, sys.argv[1], "positional", IMAGE_SIZE))
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer({"status": status})
            continue
        pid = os.fork()
        if pid == 0:
            write(encoder, **request["run"])
            os._exit(0)
        answer({"pid": pid})


def answer(document: dict) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def write(encoder: Encoder, uri: str, operations: list[dict], journal: str) -> None:
    """Carry out operations one after another. Nothing that goes wrong may be silent."""
    note = _journal(journal)
    try:
        if not any("limit" in operation for operation in operations):  # the journal is a file too
            trace_files(note)
        for operation in operations:
            memory = VisualMemory(uri)
            memory._encoder = encoder  # loaded before the fork
            note({"begin": operation["name"]})
            refused: str | None = None
            try:
                limit_files(operation.get("limit", resource.RLIM_INFINITY))
                perform(memory, operation)
            except (CommitConflict, UnknownName, MemoryMissing, UsageError, StorageError, OSError) as error:
                refused = f"{type(error).__name__}: {error}"
            finally:
                limit_files(resource.RLIM_INFINITY)
            if refused is not None:
                note({"refused": operation["name"], "why": refused})
            note({"end": operation["name"]})
    except BaseException:
        note({"failed": traceback.format_exc()})


def limit_files(num_bytes: int) -> None:
    """Let no file grow beyond a size, as a disk that fills: the write that would is cut off there, and fails."""
    sys.dont_write_bytecode = True  # a module cut short by the limit would be imported by the next process
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def perform(memory: VisualMemory, operation: dict[str, Any]) -> None:
    """One operation, committed under its own name."""
    command = operation["name"]
    match operation["do"]:
        case "add":
            memory.carry_out(memory.plan_add(operation["source"]), command=command)
        case "forget":
            memory.forget(uris=[operation["uri"]], command=command)
        case "erase":
            memory.forget(uris=[operation["uri"]], erase=True, command=command)
        case "relabel":
            ids = memory.live().matching(uri=operation["uri"]).tolist()
            if ids:
                memory.relabel(ids=ids, label=operation["label"], command=command)
        case "compact":
            compact(memory.log, command)
        case "rollback":
            kept = memory.log.retained()
            target = kept[operation["back"] % len(kept)]
            memory.rollback(target, command=f"{command} {target}")
        case "expire":
            memory.expire(operation["keep"], command=command)


def trace_files(note: Callable[[dict], None]) -> None:
    """Have every publishing of a file noted before it begins and after it ended."""
    for storage in (LocalStorage, ObjectStorage):
        for method in ("create", "replace", "delete"):
            setattr(storage, method, _traced(getattr(storage, method), method, note))
        storage.publishing = _traced(storage.publishing, "publishing", note)  # type: ignore[method-assign]


def _traced(method: Callable, name: str, note: Callable[[dict], None]) -> Callable:
    def traced(self: object, path: Any, *rest: Any) -> Any:
        if name == "delete":
            path = list(path)
        note({"file": path if isinstance(path, str) else path[:1], "by": name})
        result = method(self, path, *rest)
        if name != "publishing":
            note({"published": path if isinstance(path, str) else path[:1]})
        return result

    return traced


def _journal(path: str) -> Callable[[dict], None]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(document: dict) -> None:
        os.write(descriptor, (json.dumps(document) + "\n").encode())

    return note


if __name__ == "__main__":
    main()
