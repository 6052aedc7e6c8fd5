"""Every error a user can cause or meet, as one tree.

    VisualMemoryError
    ├── UsageError          an option has a value that can never work            (exit status 2)
    ├── SourceError         a source, a query image or a file of labels is missing, empty or unreadable
    ├── EncoderError        an unknown model, or weights that do not fit it
    │   └── IdentityMismatch    vectors of two encoders would mix
    ├── MemoryMissing       there is no memory at this URI, or no such version of it
    │   └── FirstAddUnfinished  its first add has not been committed yet
    ├── StorageError        the place of a memory cannot be reached, written to, or relied upon
    │   └── NotPermitted        it can, but this user, or these credentials, may not
    ├── FormatError         the memory was written in a format this release does not read
    ├── DamagedFile         a file of the memory is missing, cut short or altered
    │   └── MissingFile         it is not there
    ├── MissingExtra        a library is not installed that an extra of the package brings
    ├── UnknownName         an id, uri, label, dataset or label set that the memory does not hold
    ├── IndexBuildError     no index can be built, or none reaches the recall asked for
    ├── WorkerError         a process that worked for this one died
    ├── Unavailable         a server, or a part of it, does not answer just now        (HTTP 503)
    │   ├── Overloaded          it has more to do than it can in time                 (HTTP 429)
    │   ├── Superseded          it answers by a newer version than the one asked about
    │   ├── TooLate             a question was not answered before its deadline
    │   └── QuestionFailed      a question met a fault that nobody foresaw; others are answered
    ├── ClusterError        a Ray cluster cannot be reached, refuses the token, or knows no such job
    └── CommitConflict      another writer changed what this one had built upon

Each message is one sentence that says what is wrong, where, and what to do about it. It names parameters in backticks,
as Python spells them; the command line shows them as options (jobs/terminal/options.py), HTTP as fields.
"""


class VisualMemoryError(Exception):
    """The root: whatever the library raises on purpose. `field` is the part of a request it is about, if one is."""

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
    """The place of a memory cannot be reached, refuses the credentials, or lacks what a memory needs of it."""


class NotPermitted(StorageError):
    """A file of a memory may not be read or written by this user, or with these credentials; it need not be damaged.

    `path` is the file or folder in the memory, empty for the memory itself.
    """

    path: str = ""


class FormatError(VisualMemoryError):
    """The memory was written in a format this release does not read."""


class DamagedFile(VisualMemoryError):
    """A file of the memory is missing, cut short or altered."""


class MissingFile(DamagedFile):
    """A file of the memory is not there. `path` is where it should be in the memory."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message, path)
        self.path = path

    def __str__(self) -> str:
        return str(self.args[0])


class MissingExtra(VisualMemoryError):
    """A library that an extra of the package brings is not installed. The message names the extra."""


class UnknownName(VisualMemoryError):
    """An id, uri, label, dataset or label set that the memory does not hold."""


class IndexBuildError(VisualMemoryError):
    """No index can be built, or none reaches the recall asked for."""


class WorkerError(VisualMemoryError):
    """A process that worked for this one died."""


class Unavailable(VisualMemoryError):
    """A server, or a part of it, does not answer just now: it may be asked again after `retry_seconds`."""

    def __init__(self, message: str, retry_seconds: float = 1.0) -> None:
        super().__init__(message, retry_seconds)
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        return str(self.args[0])


class Overloaded(Unavailable):
    """A server has more to do than it can in time."""


class Superseded(Unavailable):
    """A version is answered by no more, for there is a newer one: a server goes on to it and asks again."""


class TooLate(Unavailable):
    """A question was not answered before its deadline, and is worked at no longer."""


class QuestionFailed(Unavailable):
    """A question met a fault that nobody foresaw, which the log of the server tells; others are answered."""


class ClusterError(VisualMemoryError):
    """A Ray cluster cannot be reached, refuses the token, or knows no such job."""


class CommitConflict(VisualMemoryError):
    """Another writer changed what this one had built upon."""
