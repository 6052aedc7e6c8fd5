"""What a verification can say of a memory, and what to do about it."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import NotPermitted
from pipeline.store.layout import VERSIONS, way_out

# An invariant is broken; a file may not be read, so that nobody knows; something belongs to nobody; or something is
# worth knowing and needs nothing done.
Severity = Literal["damage", "unread", "waste", "note"]

RESTORE = way_out(VERSIONS)
CLEAN = "run `verify --clean`"


@dataclass(frozen=True)
class Finding:
    """One thing found: how bad it is, the file or folder it is about, what is wrong, and the way out."""

    severity: Severity
    path: str
    what: str
    advice: str

    def to_json(self) -> dict:
        return {"severity": self.severity, "path": self.path, "what": self.what, "advice": self.advice}


def not_looked_at(error: NotPermitted) -> Finding:
    """A file or folder that may not be read: whether it is sound cannot be known."""
    advice = str(error).rpartition(": ")[2]
    return Finding("unread", error.path or "the memory", "is not readable (permission denied)", advice)


def damage(path: str, what: str, advice: str | None = None) -> Finding:
    """A broken invariant; the advice is what the kind of file suggests, unless there is a better one."""
    return Finding("damage", path, what, advice or way_out(path))
