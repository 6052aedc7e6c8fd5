"""Turns errors of Arrow, FAISS, NumPy, torch and Ray that nothing nearer explained into errors of the library.

What reads a file, a source or a message knows more, and raises its own error there (`file_refs.reading`, the readers of
containers, `run_steps_on_ray`). This is for the rest: memory that ran out, a limit of Arrow, a process that died.
The public methods of a memory and the command line use it. The cause stays: `raise … from`, and `--debug` shows it.

Ray, FAISS and torch are recognised without importing them.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.errors import ClusterError, LibraryError, OutOfMemory, VisualMemoryError, WorkerError

SHOWN_CHARACTERS = 300  # of another library's message

_OF_FAISS = re.compile(r"\bfaiss\b|\bfaiss::")  # FAISS raises RuntimeError, with the C++ function and file
_REASON_OF_FAISS = re.compile(r".*?(?:Error: |\.(?:cpp|h|cu):\d+: )", re.DOTALL)
_MEMORY_OF_RAY = ("OutOfMemoryError", "ObjectStoreFullError")
_CLUSTER_OF_RAY = ("RpcError", "RaySystemError", "AuthenticationError", "LocalRayletDiedError", "GetTimeoutError")

Class = TypeVar("Class", bound=type)


def own_error(error: BaseException, work: str) -> VisualMemoryError | None:
    """The library's error for one of another library that ended `work`, a noun such as "an index build".

    An error that the library raised on purpose is returned as it is, also one from a process of Ray. None for any other
    error: an OSError, or a fault of the code.
    """
    error = _first_cause(error)
    if isinstance(error, VisualMemoryError):
        return error
    if isinstance(error, pa.ArrowCancelled):
        return None  # Ctrl-C
    if memory_ran_out(error):
        return OutOfMemory(
            f"memory ran out in {work} ({_shown(error)}): use a machine with more memory, or leave more of it to this"
        )
    if isinstance(error, pa.ArrowException):
        return LibraryError(f"{work} failed in Arrow ({_shown(error)}): {_WAY_OUT}")
    if type(error) is RuntimeError and _OF_FAISS.search(str(error)):
        return LibraryError(f"{work} failed in FAISS ({_REASON_OF_FAISS.sub('', str(error))}): {_WAY_OUT}")
    if isinstance(error, _ray_errors("RayError")):
        if isinstance(error, _ray_errors(*_CLUSTER_OF_RAY)):
            return ClusterError(
                f"{work} lost the Ray cluster ({_shown(error)}): see that its nodes run, and run the command again"
            )
        return WorkerError(
            f"{work} lost a process of Ray ({_shown(error)}): run the command again; the logs of Ray say why"
        )
    return None


_WAY_OUT = "run `verify`, which finds damaged files; if it finds none, report this with its traceback"


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error means that this machine, a GPU or a node of Ray has too little memory."""
    error = _first_cause(error)
    of_torch = any(cls.__name__ == "OutOfMemoryError" and cls.__module__ == "torch" for cls in type(error).__mro__)
    return of_torch or isinstance(error, (MemoryError, *_ray_errors(*_MEMORY_OF_RAY)))


@contextmanager
def own_errors(work: str) -> Iterator[None]:
    """Raise errors of other libraries as the library's own."""
    try:
        yield
    except Exception as error:
        found = own_error(error, work)
        if found is None or found is error:
            raise
        raise found from error


def with_own_errors(cls: Class) -> Class:
    """A class decorator: the public methods raise errors of other libraries as the library's own.

    Objects of the class have a `uri`, which the message names. A method that calls another is named by the inner one.
    """
    for name, method in list(vars(cls).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(cls, name, _with_own_errors(method))
    return cls


def _with_own_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with own_errors(f"{method.__name__} on the memory at {self.uri}"):
            return method(self, *args, **kwargs)

    return call


def _first_cause(error: BaseException) -> BaseException:
    """The error that a worker of Ray met, if it was sent along; otherwise the error itself."""
    while isinstance(error, _ray_errors("RayTaskError")) and isinstance(error.cause, BaseException):  # type: ignore[attr-defined]
        error = error.cause  # type: ignore[attr-defined]
    return error


def _ray_errors(*names: str) -> tuple[type[BaseException], ...]:
    """Error types of Ray; none while Ray is not imported, since then nothing can have raised them."""
    ray = sys.modules.get("ray.exceptions")
    return tuple(getattr(ray, name) for name in names) if ray is not None else ()


def _shown(error: BaseException) -> str:
    """One line of a message: the last line of Ray's reports, which end with the reason; the first of others."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1 if isinstance(error, _ray_errors("RayError")) else 0].strip().rstrip(".:")
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"
