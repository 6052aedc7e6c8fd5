"""Findings of a verification, each with advice."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import NotPermitted
from pipeline.store.layout import VERSIONS, way_out

# damage: an invariant is broken. unread: a file may not be read, so its state is unknown. waste: a file that no version
# and no lease needs. note: for information, no action is needed.
Severity = Literal["damage", "unread", "waste", "note"]

RESTORE = way_out(VERSIONS)
CLEAN = "run `verify --clean`"


@dataclass(frozen=True)
class Finding:
    """One finding: its severity, the file or folder it is about, what is wrong, and what to do."""

    severity: Severity
    path: str
    what: str
    advice: str

    def to_json(self) -> dict:
        return {"severity": self.severity, "path": self.path, "what": self.what, "advice": self.advice}


def not_looked_at(error: NotPermitted) -> Finding:
    """The finding for a file or folder that may not be read: nobody can tell whether it is sound."""
    advice = str(error).rpartition(": ")[2]
    return Finding("unread", error.path or "the memory", "is not readable (permission denied)", advice)


def damage(path: str, what: str, advice: str | None = None) -> Finding:
    """The finding for a broken invariant; if `advice` is None, the path decides it (`layout.way_out`)."""
    return Finding("damage", path, what, advice or way_out(path))
