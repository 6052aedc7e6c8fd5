"""All errors of the library, as one tree.

    VisualMemoryError
    ├── UsageError          an option has a value that can never work            (exit status 2)
    ├── SourceError         a source, a query image or a file of labels is missing, empty or unreadable
    ├── EncoderError        an unknown model, or weights that do not fit it
    │   └── IdentityMismatch    vectors of two encoders would mix
    ├── MemoryMissing       there is no memory at this URI, or no such version of it
    │   └── FirstAddUnfinished  its first add has not been committed yet
    ├── StorageError        the place of a memory cannot be reached, written to, or relied upon
    │   └── NotPermitted        this user, or these credentials, lack the permission
    ├── FormatError         the memory was written in a format this release does not read
    ├── DamagedFile         a file of the memory is missing, cut short or altered
    │   └── MissingFile         it is not there
    ├── MissingExtra        a library is not installed; an extra of the package brings it
    ├── UnknownName         an id, uri, label, dataset or label set that the memory does not hold
    ├── IndexBuildError     no index can be built, or none reaches the recall asked for
    ├── WorkerError         a process that worked for this one died
    ├── OutOfMemory         this machine, a GPU or a node of a cluster has too little memory
    ├── LibraryError        Arrow or FAISS failed in a way that nothing foresaw
    ├── Unavailable         a server, or a part of it, cannot answer now              (HTTP 503)
    │   ├── Overloaded          it has more requests than it can answer in time       (HTTP 429)
    │   ├── Superseded          it has moved on to a newer version than the requested one
    │   ├── TooLate             a question was not answered before its deadline
    │   └── QuestionFailed      a question met an unexpected error; other questions are answered
    ├── ClusterError        a Ray cluster cannot be reached, refuses the token, or does not have the job
    └── CommitConflict      another writer changed the state that this commit was based on

Each message is one sentence: what is wrong, where, and what to do about it. It has parameter names in backticks, as in
Python; the command line shows them as options (jobs/terminal/options.py), HTTP as fields.
"""

from typing import Literal


class VisualMemoryError(Exception):
    """The base of all errors that the library raises on purpose. `field` is the request field it is about, or None."""

    field: str | None = None


class UsageError(VisualMemoryError):
    """An option has a value that can never work, whatever the memory holds."""


class SourceError(VisualMemoryError):
    """A source, a query image or a file of labels is missing, empty or unreadable."""


class EncoderError(VisualMemoryError):
    """An unknown model, or weights that do not fit it."""


class IdentityMismatch(EncoderError):
    """Vectors of two encoders would mix."""


class MemoryMissing(VisualMemoryError):
    """There is no memory at this URI, or no such version of it."""


class FirstAddUnfinished(MemoryMissing):
    """The first add of a memory has not been committed yet: it is running, or was stopped."""


class StorageError(VisualMemoryError):
    """The place of a memory cannot be reached, refuses the credentials, or lacks a feature that a memory needs."""


class NotPermitted(StorageError):
    """This user, or these credentials, may not read or write a file of a memory. The file is not known to be damaged.

    `path` is the file or folder in the memory, empty for the memory itself.
    """

    path: str = ""


class FormatError(VisualMemoryError):
    """The memory was written in a format this release does not read.

    `found` is the number of that format, `reads` the one that this release reads. Both are None if it is unknown.
    """

    def __init__(self, message: str, found: int | None = None, reads: int | None = None) -> None:
        super().__init__(message, found, reads)
        self.found, self.reads = found, reads

    def __str__(self) -> str:
        return str(self.args[0])


class DamagedFile(VisualMemoryError):
    """A file of the memory is missing, cut short or altered."""


class MissingFile(DamagedFile):
    """A file of the memory is missing. `path` is its path in the memory."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message, path)
        self.path = path

    def __str__(self) -> str:
        return str(self.args[0])


class MissingExtra(VisualMemoryError):
    """A library is not installed that an extra of the package installs. The message names the extra."""


class UnknownName(VisualMemoryError):
    """An id, uri, label, dataset or label set that the memory does not hold."""


class IndexBuildError(VisualMemoryError):
    """No index can be built, or none reaches the recall asked for."""


class WorkerError(VisualMemoryError):
    """A process that worked for this one died."""


class OutOfMemory(VisualMemoryError):
    """This machine, a GPU or a node of a cluster has too little memory for the work."""


class LibraryError(VisualMemoryError):
    """Arrow or FAISS failed in a way that nothing foresaw. The cause is the error that it raised."""


class Unavailable(VisualMemoryError):
    """A server, or a part of it, cannot answer now. The client may retry after `retry_seconds`."""

    def __init__(self, message: str, retry_seconds: float = 1.0) -> None:
        super().__init__(message, retry_seconds)
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        return str(self.args[0])


class Overloaded(Unavailable):
    """A server has more requests than it can answer in time."""


class Superseded(Unavailable):
    """A process no longer answers with this version, as there is a newer one. The server loads that and asks again."""


class TooLate(Unavailable):
    """A question was not answered before its deadline, and the work on it has ended."""


class QuestionFailed(Unavailable):
    """A question met an unexpected error, which is in the server's log; other questions are answered."""


class ClusterError(VisualMemoryError):
    """A Ray cluster cannot be reached, refuses the token, or does not have the job."""


ConflictCause = Literal[
    "another encoder",  # another writer fixed the memory's encoder first
    "same source",  # another writer added the same source
    "index changed",  # another writer built, extended or dropped the index
    "entries moved",  # another writer moved entries into other files: folded, compacted or indexed them
    "rewritten",  # another writer erased entries, rolled the memory back, or made it anew
    "versions dropped",  # another process dropped versions that this one needed
    "version committed",  # another writer committed a version where nothing may come between
    "lease lost",  # this process was taken for dead
    "at work",  # another process is at work on the same: wait until it is done
    "erasure unfinished",  # `verify --clean` has to finish an erasure first
    "too many writers",  # others were faster every time
]


class CommitConflict(VisualMemoryError):
    """Another writer changed the state that this commit was based on, or is about to. `reason` says how."""

    def __init__(self, message: str, reason: ConflictCause) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])
