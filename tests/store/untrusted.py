"""Memories as somebody else may hand them over: files that lie, and what is outside and must stay as it is."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.store.log.sealed import seal


@dataclass
class Outside:
    """A folder that belongs to somebody, with files of every kind that a memory names; `assert_untouched` checks it."""

    folder: Path
    before: dict[str, object] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path) -> "Outside":
        for name in ("precious.json", "id_rsa", "entries.parquet", "done/000000.json", "empty folder/"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir()
            else:
                path.write_bytes(b"CANARY of " + name.encode())
        outside = cls(folder)
        outside.before = outside.look()
        return outside

    def look(self) -> dict[str, object]:
        """Every file and folder with its bytes and the time of its last change."""
        found: dict[str, object] = {}
        for path in sorted([self.folder, *self.folder.rglob("*")]):
            status = path.lstat()
            data = path.read_bytes() if path.is_file() else b""
            found[str(path)] = (data, status.st_mtime_ns, status.st_ino, status.st_mode)
        return found

    def assert_untouched(self) -> None:
        assert self.look() == self.before


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a JSON file of a memory says, the seal of a version file made anew."""
    document = json.loads(path.read_bytes())
    change(document)
    if "versions" in path.parts and path.suffix == ".json":
        document.pop("sha256", None)
        body = json.dumps(document, indent=1).encode().removesuffix(b"}").rstrip()
        path.write_bytes(body + seal(body))
    else:
        path.write_text(json.dumps(document))


def up_to(root: Path, target: Path) -> str:
    """The path of a file, as one relative to a memory would lead out to it."""
    return os.path.relpath(target, root)
