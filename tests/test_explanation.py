"""The page of a decision: what is shown in the place of a picture that is gone, and that all of it is escaped."""

import hashlib
import re
from pathlib import Path

import pytest
from PIL import Image

from pipeline.decisions.decision import Decision, Neighbor
from pipeline.questions.page import explanation_page
from pipeline.store.lookup.originals import Original


def decision(uris: list[str], label: str = "cat", uri: str | None = None) -> Decision:
    share = 1 / len(uris)
    neighbors = tuple(Neighbor(rank, rank, uri, label, 0.5, "d", 1.0, share) for rank, uri in enumerate(uris))
    return Decision(
        uri=uri, label=label, confidence=1.0, margin=1.0, abstained=False, reason=None, voting="rank", balance=0.0,
        k=len(uris), label_set=None, where=None, votes={label: 1.0}, neighbors=neighbors, version=1, shards_answered=0,
        shards_total=0,
    )  # fmt: skip


def page_of(shown: Decision, memory: str = "m", kept: dict[int, bytes] | None = None) -> str:
    """The page of a decision whose neighbours an add has read at their uris, as they are."""
    originals = {}
    for neighbor in shown.neighbors:
        path = Path(neighbor.uri)
        is_there = neighbor.uri.startswith("/") and path.is_file()
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if is_there else "0" * 64
        originals[neighbor.id] = Original(neighbor.uri, sha256, "parquet" if "#row" in neighbor.uri else "file")
    return explanation_page(shown, memory, kept or {}, originals)


def note(page: str) -> str:
    found = re.findall(r'<p class="note">(.*?)</p>', page, re.DOTALL)
    assert len(found) <= 1
    return found[0] if found else ""


def test_a_page_with_all_its_pictures_has_no_note(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    page = page_of(decision([str(tmp_path / "a.png")], uri=str(tmp_path / "a.png")))
    assert "no picture" not in page
    assert note(page) == ""


def test_each_reason_is_told_and_counted(tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG nothing")
    (tmp_path / "empty.png").write_bytes(b"")
    gone = [str(tmp_path / "moved" / name) for name in ("1.png", "2.png")]
    uris = [*gone, "sha256:" + "0" * 64, str(tmp_path / "damaged.png"), "three", str(tmp_path / "empty.png")]
    page = page_of(decision(uris))
    assert page.count("no picture: its file is gone or was moved") == 2
    assert page.count("no picture: it was taught as bytes") == 1
    assert page.count("no picture: its uri is not that of a file") == 1
    assert "no picture: the file is empty" in page
    told = note(page)
    assert told.startswith("6 of 6 pictures cannot be shown: 2 because its file is gone or was moved; 1 because")
    assert "<code>--thumbnails</code>" in told
    assert "Put the files back" in told


def test_a_kept_thumbnail_needs_no_file(tmp_path: Path) -> None:
    kept = {0: b"\xff\xd8a", 1: b"\xff\xd8b"}
    page = page_of(decision([str(tmp_path / "gone.png"), "sha256:0"]), kept=kept)
    assert page.count("data:image/jpeg") == 2
    assert note(page) == ""


@pytest.mark.parametrize(
    "evil", ['<script>alert("x")</script>', "\"><img src=x onerror='y'>", "a & b", "</span></li><li>", "x\ny\u2028z"]
)
def test_nothing_of_a_name_is_markup(tmp_path: Path, evil: str) -> None:
    uris = [f"{tmp_path}/{evil}/a.png", f"zip://{evil}", f"{tmp_path}/{evil}.tar#{evil}", evil]
    page = page_of(decision(uris, label=evil, uri=f"{tmp_path}/{evil}"), evil)
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("<li") == 4
    assert page.count("no picture: ") == 5
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    table = tmp_path / f"{'x' * 200}.parquet"
    table.write_bytes(b"no table")
    page = page_of(decision([f"{table}#row=0", f"nosuchscheme://{'x' * 5_000}/a.png"]))
    assert f"{table}"[:40] in page
    assert max(map(len, re.findall(r"no picture: ([^<]*)<", page))) < 300
    assert len(note(page)) < 600
