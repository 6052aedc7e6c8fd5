"""The receipt of a proof: the request, the actions and the findings, as a JSON document and as text for people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.edits.erasure.all_versions import Duplicate


@dataclass(frozen=True)
class Trace:
    """A trace of a forgotten entry in a file: an id, a uri, a hash, a vector or the value of a kept column."""

    path: str
    what: str
    count: int


@dataclass(frozen=True)
class Receipt:
    """The request, the actions and the findings. `proven` says that no trace was found that must not exist."""

    memory: str
    version: int
    written_at: str
    asked: Mapping[str, Any]
    entries: Sequence[Mapping[str, Any]]
    erased: bool
    files_rewritten: Sequence[str]
    files_removed: int
    versions_redacted: int
    answers: Mapping[str, Any]
    files_scanned: int
    bytes_scanned: int
    found: Sequence[Trace]
    live_duplicates: Sequence[Duplicate]
    quantizer: Mapping[str, Any] | None
    noncurrent_versions: Sequence[str]
    work_under_way: Sequence[str]

    @property
    def proven(self) -> bool:
        """Whether the request is proven: no answer returns the entries; after an erasure no trace of them remains."""
        held = self.quantizer is not None and self.quantizer["holds_a_vector"]
        gone = not (self.found or self.noncurrent_versions or self.work_under_way or held)
        return not self.answers["returned"] and (gone or not self.erased)

    def to_json(self) -> dict:
        return {"proven": self.proven, **asdict(self)}

    def to_text(self) -> str:
        """The receipt as text for people."""
        verb = "erased" if self.erased else "forgotten"
        noun = "entry" if len(self.entries) == 1 else "entries"
        lines = [
            f"Receipt: {len(self.entries):,} {noun} {verb} from {self.memory}",
            f"written {self.written_at} for version {self.version}",
            "",
            f"asked       {json.dumps(self.asked, ensure_ascii=False)}",
            f"proven      {'yes' if self.proven else 'NO'}",
            "",
            f"answers     {self.answers['queries']:,} of their own vectors asked, k = {self.answers['k']}, under "
            f"{', '.join(self.answers['votings'])}: {self.answers['returned']:,} forgotten entries came back",
            f"files       {self.files_scanned:,} files with {self.bytes_scanned:,} bytes searched for ids, uris, "
            "hashes, vectors and kept values",
        ]
        lines += [f"  found     {found.count:,} x {found.what} in {found.path}" for found in self.found]
        if not self.erased:
            lines.append("  note      forgotten, not erased: the bytes stay until `forget --erase`")
        elif not self.found:
            lines.append("  found     nothing")
        if self.erased:
            lines.append(
                f"rewritten   {len(self.files_rewritten):,} files; {self.files_removed:,} removed; "
                f"{self.versions_redacted:,} versions redacted"
            )
        for duplicate in self.live_duplicates:
            lines.append(f"duplicate   entry {duplicate.id} ({duplicate.uri}) has the same {duplicate.same}, and stays")
        if self.quantizer:
            lines.append(f"quantizer   {self.quantizer['key']}: {self.quantizer['remains']}")
        lines += [f"noncurrent  {path}" for path in self.noncurrent_versions]
        lines += [
            f"under way   {work}: when that is done, `verify --clean` removes what it leaves"
            for work in self.work_under_way
        ]
        lines += ["", "entries"]
        lines += [f"  {entry['id']}  {entry['uri']}  {entry['label'] or '(no label)'}" for entry in self.entries]
        return "\n".join(lines) + "\n"
