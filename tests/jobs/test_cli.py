"""The verbs as a user meets them: documents on stdout, one sentence for each mistake, nothing changed by it."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import main
from pipeline import VisualMemory
from pipeline.store.tables.schemas import read_table
from tests.conftest import ENCODER, IMAGE_SIZE
from tests.images.pictures import write_assortment

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a verb: exit status, stdout, stderr."""

    def run_verb(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(exited.value.code or 0), printed.out, printed.err

    return run_verb


@pytest.fixture
def document(run: Run) -> Callable[..., object]:
    """Run a verb with --json: the document, which must be all there is on stdout."""

    def run_json(*arguments: object) -> object:
        status, out, err = run(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    return run_json


@pytest.fixture
def memory(digits_memory: VisualMemory, tmp_path: Path) -> Path:
    """A copy of the digits' memory that a test may change."""
    return Path(shutil.copytree(digits_memory.uri, tmp_path / "memory"))


@pytest.fixture
def asked(digits: Path) -> list[Path]:
    return [next((digits / "ask" / str(digit)).iterdir()) for digit in range(5)]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_add_reports_what_it_did(document: Callable, tmp_path: Path, weights: str) -> None:
    write_assortment(tmp_path / "photos")
    flags = ["--encoder", ENCODER, "--weights", weights, "--weights-order", "positional", "--image-size", IMAGE_SIZE]
    plan = document("add", tmp_path / "memory", tmp_path / "photos", *flags, "--dry-run")
    assert (plan["planned"], plan["parts"], plan["dataset"], plan["dimension"]) == (13, 1, "photos", 1280)
    assert not (tmp_path / "memory").exists()
    added = document("add", tmp_path / "memory", tmp_path / "photos", *flags)
    assert added["entries"] + added["rejected"] == added["planned"] == 13
    assert {"segment", "version", "images_per_second"} <= set(added)
    again = document("add", tmp_path / "memory", tmp_path / "photos")
    assert (again["entries"], again["already"]) == (0, 1)


def test_status(document: Callable, memory: Path) -> None:
    status = document("status", memory)
    assert {"version", "entries", "fresh", "forgotten", "rejected", "shards", "dimension", "encoder"} <= set(status)
    assert (status["entries"], status["labels"], status["datasets"]) == (100, 5, {"remember": 100})
    assert status["index"] is None
    document("index", memory)
    assert {"key", "bytes", "recall_at_10"} <= set(document("status", memory)["index"])


def test_verify(document: Callable, run: Run, memory: Path) -> None:
    found = document("verify", memory)
    assert (found["sound"], found["findings"], found["version"], found["removed"]) == (True, [], 1, None)
    assert found["files"] == 7  # a version, the weights, a plan, one file of entries, two of digests and one of counts
    kinds = ("versions", "encoder", "segments/*/plan", "segments/*/entries", "segments/*/digests", "counts")
    named = [path for kind in kinds for path in memory.glob(f"{kind}/*")]
    assert found["bytes"] == sum(path.stat().st_size for path in named)
    (memory / "packs").mkdir()
    (memory / "packs" / "loose.parquet").write_bytes(b"loose")
    status, out, _ = run("verify", memory)
    assert status == 0
    assert "waste   packs/loose.parquet: 1 file of 5 bytes named by no version" in out
    assert "sound: 1 version up to 1, 7 files of" in out
    status, out, _ = run("verify", memory, "--clean")
    assert (status, "removed 1 file that belonged to nobody" in out) == (0, True)
    [entries] = memory.glob("segments/*/entries/*.parquet")
    entries.write_bytes(entries.read_bytes()[:-1])
    status, out, _ = run("verify", memory)
    assert status == 1
    assert re.search(r"^damage  segments/.*parquet: has [\d,]+ bytes .*restore it from a copy", out, re.MULTILINE)
    assert "not sound (1 damaged)" in out
    status, out, _ = run("verify", memory, "--json")
    assert (status, json.loads(out)["sound"]) == (1, False)


def test_search_is_a_list_a_query(document: Callable, memory: Path, asked: list[Path]) -> None:
    found = document("search", memory, *asked, "-k", 3)
    assert [len(neighbors) for neighbors in found] == [3] * 5
    first = found[0][0]
    assert {"rank", "id", "uri", "label", "similarity"} <= set(first)
    assert first["rank"] == 0
    similarities = [neighbor["similarity"] for neighbor in found[0]]
    assert similarities == sorted(similarities, reverse=True)


def test_classify_gives_decisions_in_the_order_asked(document: Callable, memory: Path, asked: list[Path]) -> None:
    decisions = document("classify", memory, *asked, "-k", 20)
    assert [Path(decision["uri"]) for decision in decisions] == asked
    decision = decisions[0]
    expected = "uri label confidence margin abstained voting k votes neighbors version shards_answered shards_total"
    assert set(expected.split()) <= set(decision)
    assert sum(decision["votes"].values()) == pytest.approx(1.0)
    assert sum(neighbor["weight"] for neighbor in decision["neighbors"]) == pytest.approx(1.0)
    assert decision["confidence"] == decision["votes"][decision["label"]]
    fields = {"rank", "id", "id_text", "uri", "label", "similarity", "reliability", "weight"}
    assert fields == set(decision["neighbors"][0]) - {"dataset"}
    for image, together in zip(asked, decisions, strict=True):
        assert document("classify", memory, image, "-k", 20) == [together]


def test_what_ifs_move_the_decision(document: Callable, memory: Path, asked: list[Path]) -> None:
    [before] = document("classify", memory, asked[0], "-k", 5)
    own = [n["id"] for n in before["neighbors"] if n["label"] == before["label"]]
    [without] = document("classify", memory, asked[0], "-k", 5, *[f for i in own for f in ("--exclude", i)])
    assert not {n["id"] for n in without["neighbors"]} & set(own)
    first = before["neighbors"][0]["id"]
    [heavy] = document("classify", memory, asked[0], "-k", 5, "--weigh", f"{first}=0")
    assert heavy["neighbors"][0]["weight"] == 0
    [assumed] = document("classify", memory, asked[0], "-k", 1, "--assume", f"{first}=seven")
    assert assumed["label"] == "seven"
    [abstained] = document("classify", memory, asked[0], "--abstain-below", 1.0, "--balance", "auto")
    assert abstained["abstained"]
    assert abstained["label"] is None
    assert abstained["votes"]
    assert document("classify", memory, asked[0], "-k", 5) == [before]


def test_explain_as_text_and_as_a_page(run: Run, memory: Path, asked: list[Path], tmp_path: Path) -> None:
    status, out, _ = run("explain", memory, asked[2], "-k", 7, "--html", tmp_path / "why.html")
    assert status == 0
    assert re.search(r"decision: \d", out)
    assert len(re.findall(r"^ +\d+  \d +0\.\d{4} +\d+\.\d%  \d+  /", out, re.MULTILINE)) == 7
    page = (tmp_path / "why.html").read_text()
    assert page.count("<li") == 7
    assert page.count("data:image/jpeg;base64,") == 8
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_explain_says_when_a_picture_is_gone(
    run: Run, document: Callable, tmp_path: Path, digits: Path, weights: str, asked: list[Path]
) -> None:
    shutil.copytree(digits / "ask", tmp_path / "<moved> & gone")
    flags = ["--encoder", ENCODER, "--weights", weights, "--weights-order", "positional", "--image-size", IMAGE_SIZE]
    document("add", tmp_path / "m", tmp_path / "<moved> & gone", *flags)
    shutil.rmtree(tmp_path / "<moved> & gone")
    assert run("explain", tmp_path / "m", asked[0], "-k", 4, "--html", tmp_path / "why.html")[0] == 0
    page = (tmp_path / "why.html").read_text()
    assert page.count("no picture") == 4
    assert "&lt;moved&gt; &amp; gone" in page


def test_evaluate(document: Callable, run: Run, memory: Path, digits: Path) -> None:
    found = document(
        "evaluate", memory, digits / "ask", "--k", 1, "--k", 10, "--voting", "rank", "--voting", "plurality"
    )
    assert found["num_queries"] == 50
    assert set(found["accuracy"]) == {"rank", "plurality"}
    assert set(found["accuracy"]["rank"]) == {"1", "10"}
    assert found["accuracy"]["rank"]["1"] == found["accuracy"]["plurality"]["1"] > 60
    classified = document("classify", memory, *sorted((digits / "ask").rglob("*.png")), "-k", 10)
    right = np.mean([decision["label"] == Path(decision["uri"]).parent.name for decision in classified]) * 100
    assert found["accuracy"]["rank"]["10"] == pytest.approx(right)
    left_out = document("evaluate", memory, "--leave-one-out", "--k", 1)
    assert left_out["num_queries"] == 100
    assert left_out["accuracy"]["plurality"]["1"] < 100  # an entry that found itself would always be right
    assert (left_out["labelled"], left_out["sampling_error"]) == (100, None)
    sampled = document("evaluate", memory, "--leave-one-out", "--k", 1, "--sample", 40)
    assert (sampled["num_queries"], sampled["labelled"]) == (40, 100)
    assert 0 < sampled["sampling_error"]["rank"]["1"] < 15
    assert document("evaluate", memory, "--leave-one-out", "--k", 1, "--sample", "all") == left_out
    said = run("evaluate", memory, "--leave-one-out", "--k", 1, "--sample", 40)[1]
    assert said.startswith("40 queries drawn at random from 100 labelled entries (accurate to ±")
    assert "voting" in run("evaluate", memory, digits / "ask")[1]


def test_forget_and_the_past(document: Callable, memory: Path, asked: list[Path]) -> None:
    forgotten = document("forget", memory, "--label", "3", "--label", "4")
    assert (forgotten["forgotten"], forgotten["version"]) == (40, 2)
    assert document("status", memory)["entries"] == 60
    assert document("status", memory, "--at", 1)["entries"] == 100
    labels = {n["label"] for found in document("search", memory, *asked, "-k", 60) for n in found}
    assert labels == {"0", "1", "2"}


def test_one_image_and_compact(run: Run, document: Callable, memory: Path, asked: list[Path]) -> None:
    added = document("add", memory, asked[3])
    assert (added["planned"], added["entries"], added["already"], added["version"]) == (1, 1, None, 2)
    again = document("add", memory, asked[3])
    assert (again["entries"], again["segment"], again["already"]) == (0, None, added["segment"])
    assert "was added before" in run("add", memory, asked[3])[1]
    assert document("add", memory, asked[3], "--dry-run")["already"] == added["segment"]
    assert "nothing to add" in run("add", memory, asked[3], "--dry-run")[1]
    [before] = document("search", memory, asked[3], "-k", 9)
    packed = document("compact", memory)
    assert {"committed": True, "pending": 1, "entries": 101, "version": 3, "files_after": 1}.items() <= packed.items()
    assert document("search", memory, asked[3], "-k", 9) == [before]
    status, out, err = run("compact", memory)
    assert (status, out) == (0, "there is nothing to pack: 1 file of entries and what lies over them\n"), err
    run("add", memory, asked[4])
    status, out, _ = run("compact", memory)
    assert status == 0
    assert "packed 1 file and 1 single add into 1 file; the memory is at version 5." in " ".join(out.split())


def test_erase_and_its_receipt(
    run: Run, document: Callable, memory: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [first, second, *_] = sorted((digits / "remember/3").iterdir())
    document("add", memory, second, "--dataset", "again")
    done = document("forget", memory, "--uri", first, "--erase", "--verify")
    assert (done["forgotten"], done["version"], done["erased"], done["live_duplicates"]) == (1, 3, 1, [])
    assert done["receipt"]["proven"]
    assert done["receipt_files"] == [str(tmp_path / "receipt-3.json"), str(tmp_path / "receipt-3.txt")]
    assert json.loads((tmp_path / "receipt-3.json").read_text()) == done["receipt"]
    assert str(first) not in run("history", memory)[1]
    (tmp_path / "list.txt").write_text(f"{second}\n")
    (tmp_path / "mine.txt").write_text("not to be lost")
    status, out, err = run(
        *("forget", memory, "--file", tmp_path / "list.txt", "--label", "4"), "--verify", "--receipt", tmp_path / "mine"
    )
    assert status == 0
    assert re.match("forgot 22 entries: no answer from version 4 on", out)
    assert f"receipt: proven for answers; the bytes stay without --erase: {tmp_path / 'mine-2.json'}" in out
    assert "yes" in (tmp_path / "mine-2.txt").read_text()
    assert (tmp_path / "mine.txt").read_text() == "not to be lost"
    [kept] = [row["id"] for row in done_entries(memory, second) if row["dataset"] == "remember"]
    status, out, err = run("forget", memory, "--id", kept, "--erase")
    assert out == "erased 1 entry (1 of them forgotten before) from every file and every version; " + (
        "the memory is at version 5\n"
    )
    assert re.search(rf"note: 1 entry stays, and has the uri or the bytes of an erased one: \d+ \({second}\)", err)
    assert not {"receipt-5.json", "receipt-5.txt"} & {path.name for path in tmp_path.iterdir()}


def done_entries(memory: Path, image: Path) -> list[dict]:
    """Rows of all entries of an image, forgotten or not."""
    found = VisualMemory(memory, at=2)
    state = found.state()
    files = [read_table(found.log.storage, file).to_pylist() for file in state.entries_files()]
    singles = [single.model_dump() for single in state.pending]
    return [row for row in [*(row for rows in files for row in rows), *singles] if row["uri"] == str(image)]


def test_what_is_not_proven_is_a_failure(run: Run, memory: Path, digits: Path, tmp_path: Path) -> None:
    first = min((digits / "remember/3").iterdir())
    (memory / "notes.txt").write_text(f"seen: {first}")
    target = tmp_path / "receipts"
    target.mkdir()
    status, out, _ = run("forget", memory, "--uri", first, "--erase", "--verify", "--receipt", target)
    assert status == 1
    assert f"receipt: NOT PROVEN, and it says why: {target / 'receipt-2.json'}" in out
    assert "found     1 x uri in notes.txt" in (target / "receipt-2.txt").read_text()
    status, out, _ = run("forget", memory, "--label", "3", "--erase", "--verify", "--receipt", target, "--json")
    assert status == 0  # of these nothing is in the notes
    assert len(list(target.iterdir())) == 4


def test_relabel_and_label_sets(
    run: Run, document: Callable, memory: Path, digits: Path, asked: list[Path], tmp_path: Path
) -> None:
    first, second = (n["id"] for n in document("search", memory, asked[0], "-k", 2)[0])
    done = document("relabel", memory, "--id", first, "--id", second, "--label", "seven")
    assert {"relabelled": 2, "version": 2, "label_set": None, "labels": 6}.items() <= done.items()
    assert document("classify", memory, asked[0], "-k", 2)[0]["label"] == "seven"
    assert document("search", memory, asked[0], "-k", 1, "--at", 1)[0][0]["label"] == "0"
    (tmp_path / "parity.json").write_text(json.dumps({"even": ["0", "2", "4"], "odd": ["1", "3"], "none": ["9"]}))
    status, out, err = run("relabel", memory, "--label-set", "parity", "--map", tmp_path / "parity.json")
    assert (status, out.count("\n")) == (0, 1)
    assert "label set parity: 2 labels, 98 entries relabelled" in out
    assert "covers 5 of 6 labels" in err
    assert "seven" in err
    assert "1 label of the map belongs to no entry: 9" in err
    assert "nothing to change" in run("relabel", memory, "--label-set", "parity", "--map", tmp_path / "parity.json")[1]
    by_parity = document("classify", memory, *asked, "--label-set", "parity", "--assume", f"{first}=even")
    assert {decision["label"] for decision in by_parity} <= {"even", "odd"}
    assert {decision["label_set"] for decision in by_parity} == {"parity"}
    (tmp_path / "labels.csv").write_text(f"id,label\n{first},even\n{second},even\n")
    _, out, _ = run("relabel", memory, "--file", tmp_path / "labels.csv", "--label-set", "parity")
    assert out == "relabelled 2 entries in the label set parity: every answer from version 4 on knows it\n"
    assert document("status", memory)["label_sets"] == {"parity": 2}
    assert "parity (2 labels)" in run("status", memory)[1]
    assert document("evaluate", memory, digits / "ask", "--k", 5, "--label-set", "parity")["label_set"] == "parity"
    assert document("evaluate", memory, "--leave-one-out", "--k", 5, "--label-set", "parity")["num_queries"] == 100
    found = document("search", memory, asked[0], "-k", 5, "--label-set", "parity")
    assert {neighbor["label"] for neighbor in found[0]} <= {"even", "odd"}
    assert run("explain", memory, asked[0], "--label-set", "parity", "--html", tmp_path / "why.html")[0] == 0
    assert "label set parity" in (tmp_path / "why.html").read_text()


def test_influence(document: Callable, run: Run, memory: Path, digits: Path) -> None:
    ids = VisualMemory(memory).live().live_ids()[:3].tolist()
    named = [word for entry_id in ids for word in ("--id", entry_id)]
    found = document("influence", memory, *named, "-k", 5, "--limit", 1000)
    assert (found["entries"], found["num_questions"], found["voting"]) == (3, 100, "rank")
    assert found["voted_in"] == len([each for each in found["swayed"] if each["share"] > 0]) > 0
    asked = document("influence", memory, digits / "ask", *named, "-k", 5)
    assert asked["num_questions"] == 50
    assert asked["accuracy"]["before"] == document("evaluate", memory, digits / "ask", "-k", 5)["accuracy"]["rank"]["5"]
    _, out, _ = run("influence", memory, "--assume", f"{ids[0]}=4", "-k", 5)
    assert re.match(r"1 entry, 100 questions, rank voting at k = 5, version 1: voted in \d+, with ", out)
    assert re.search(r"accuracy \d+\.\d\d% now, \d+\.\d\d% then; balanced", out)
    run("forget", memory, *named)
    after = document("evaluate", memory, "--leave-one-out", "-k", 5)
    assert after["accuracy"]["rank"]["5"] == found["accuracy"]["after"]
    assert after["balanced_accuracy"]["rank"]["5"] == found["balanced_accuracy"]["after"]
    assert document("evaluate", memory, digits / "ask", "-k", 5)["accuracy"]["rank"]["5"] == asked["accuracy"]["after"]


def test_suspects(document: Callable, run: Run, memory: Path, tmp_path: Path) -> None:
    first = int(VisualMemory(memory).live().live_ids()[0])
    run("relabel", memory, "--id", first, "--label", "4")
    page, table = tmp_path / "suspects.html", tmp_path / "suspects.csv"
    found = document("suspects", memory, "--limit", 3, "--html", page, "--out", table)
    assert (found["html"], found["out"], found["labelled"]) == (str(page), str(table), 100)
    suspect = found["suspects"][0]
    assert (suspect["id"], suspect["kind"], suspect["label"], suspect["suggested"]) == (first, "mislabelled", "4", "0")
    assert len(suspect["neighbors"]) == 10
    text = page.read_text()
    assert text.count('<li class="suspect">') == len(found["suspects"])
    assert '<del>4</del> <span class="to">0</span>' in text
    assert "data:image/jpeg" in text
    assert "<script" not in text
    header, *rows = table.read_text().splitlines()
    assert header == "id,label,stored_label,kind,uri"
    assert rows[0].startswith(f"{first},0,4,mislabelled,/")
    assert len(rows) == len(found["suspects"])
    _, out, _ = run("suspects", memory, "--limit", 3)
    assert re.match(rf"100 labelled entries, version 2: {found['mislabelled']} mislabelled, ", out)
    assert re.search(rf"  mislabelled +4 -> 0 .* {first}  /", out)
    refused = run("suspects", memory, "--out", table)
    assert refused[0] == 2
    assert "is there already" in refused[2]
    assert run("relabel", memory, "--file", table)[0] == 0
    assert document("suspects", memory, "--kind", "mislabelled")["mislabelled"] == 0
    assert run("forget", memory, "--file", table)[0] == 0
    assert document("status", memory)["entries"] == 100 - len(rows)


def test_versions(document: Callable, run: Run, memory: Path, tmp_path: Path) -> None:
    document("forget", memory, "--label", "3", "--label", "4")
    rolled = document("rollback", memory, 1)
    assert rolled == {"version": 3, "rolled_back_to": 1, "entries_before": 60, "entries": 100}
    assert document("rollback", memory, "--to", 2)["entries"] == 60
    versions = document("history", memory)
    assert [version["version"] for version in versions] == [4, 3, 2, 1]
    said = ["rollback --to 2", "rollback 1", "forget --label 3 --label 4"]
    assert [version["command"] for version in versions[:3]] == said
    assert [version["rows_after"] for version in versions] == [60, 100, 60, 100]
    assert document("history", memory, "--limit", 1) == versions[:1]
    planned = document("expire", memory, "--keep", "2", "--dry-run")
    expired = document("expire", memory, "--keep", "2v")
    assert planned == expired
    assert expired | {"bytes": 0} == {"dropped": 2, "files": 2, "bytes": 0, "first_kept": 3, "newest": 4}
    assert document("expire", memory, "--keep", "30d")["dropped"] == 0
    copied = document("copy", memory, tmp_path / "copy")
    assert {"uri", "first_version", "version", "versions", "files", "bytes", "already", "seconds"} == set(copied)
    assert (copied["version"], copied["versions"]) == (4, 2)
    status, copied_status = document("status", memory), document("status", tmp_path / "copy")
    assert copied_status == status | {"uri": copied_status["uri"]}


def test_the_history_fits_a_terminal(run: Run, memory: Path) -> None:
    assert run("forget", memory, "--label", "3", "--label", "4", *["--label", "3"] * 20)[0] == 0
    assert run("rollback", memory, 1)[0] == 0
    status, out, _ = run("history", memory)
    lines = out.splitlines()
    assert status == 0
    assert max(len(line) for line in lines if "@" not in line) <= 80  # a host's name may be long
    assert [line.split()[0] for line in lines if line[:7].strip()] == ["version", "3", "2", "1"]
    assert re.fullmatch(r" {6}3  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d          100        \+40  \S+@\S+", lines[1])
    assert lines[2] == "         rollback 1 -> rollback to 1"


def test_a_version_keeps_the_command_without_what_gives_access(run: Run, tmp_path: Path, weights: str) -> None:
    from jobs.terminal.arguments import TYPED, command_line

    write_assortment(tmp_path / "my photos")
    flags = ["--encoder", ENCODER, f"--weights={weights}", "--weights-order", "positional", "--image-size", IMAGE_SIZE]
    assert run("add", tmp_path / "m", tmp_path / "my photos", *flags, "--json", "--debug")[0] == 0
    [version] = VisualMemory(tmp_path / "m").history()
    order = f"--weights-order positional --image-size {IMAGE_SIZE}"
    assert version.command == f"add '{tmp_path}/my photos' --encoder {ENCODER} {order}"
    source = "https://me:secret@host/a.tar?X-Amz-Signature=0123"
    TYPED.set(["add", "m", source, "--weights", "s3://k:s@b/w", "--token", "t", "--dataset", "m"])
    assert command_line("m") == "add https://host/a.tar --dataset m"
    TYPED.set(["forget", "m", *["--id", "12345678901"] * 1_000])
    assert len(command_line("m")) <= 1_002
    assert re.fullmatch(r"forget( --id 12345678901)+( --id)? …", command_line("m"))


def test_progress_goes_to_stderr(run: Run, tmp_path: Path, digits: Path, weights: str) -> None:
    flags = ["--encoder", ENCODER, "--weights", weights, "--weights-order", "positional", "--image-size", IMAGE_SIZE]
    _, out, err = run("add", tmp_path / "m", digits / "remember", *flags)
    assert "embedding: 100 of 100" in err
    assert "remembered 100 of 100 images" in out


def test_fewer_entries_than_k_is_noted_and_answered(run: Run, memory: Path, asked: list[Path]) -> None:
    status, out, err = run("classify", memory, asked[0], "-k", 500, "--json")
    assert status == 0
    assert len(json.loads(out)[0]["neighbors"]) == 100
    assert "note: 100 entries can vote, fewer than -k 500" in err
    assert "holds 100 entries" in run("search", memory, asked[0], "-k", 500)[2]


MISTAKES: list[tuple[list[str], int, str]] = [
    (["add", "{new}", "{tmp}/nowhere"], 1, "there is no source at"),
    (["add", "{new}", "{tmp}/empty"], 1, "is empty: give a folder"),
    (["add", "{new}", "{tmp}/texts"], 1, "holds 1 files but no image"),
    (["add", "{new}", "{ask}", "--encoder", "resnet5000"], 1, "has no model named resnet5000"),
    (["add", "{new}", "{ask}", "--encoder", "resnet10t", "--weights", "{weights}"], 1, "do not fit the model"),
    (["add", "{new}", "{ask}", "--encoder", "resnet10t", "--weights", "{tmp}/nowhere"], 1, "there are no weights at"),
    (["add", "{new}", "{ask}", "--encoder", "resnet10t", "--weights", "{tmp}/texts/a.txt"], 1, "cannot be read"),
    (["add", "{new}", "{ask}", "--labels", "file"], 2, "give folder"),
    (["add", "{new}", "{ask}", "--image-size", "0"], 2, "not a number of pixels"),
    (["add", "{new}", "{ask}", "--weights-order", "random"], 2, "give name or positional"),
    (["add", "{new}", "{ask}", "--precision", "half"], 2, "give auto, float32 or bfloat16"),
    (["add", "{new}", "{ask}", "--decoding", "fast"], 2, "give exact or scaled"),
    (["add", "{memory}", "{ask}", "--decoding", "scaled"], 1, "not of decoding scaled: leave out"),
    (["add", "{new}", "{ask}", "--runner", "spark"], 2, "give auto, here or ray"),
    (["add", "{tmp}/texts", "{ask}"], 1, "it comes before SOURCE"),
    (["add", "{memory}", "{ask}", "--encoder", "resnet18"], 1, "is one of tf_efficientnet_lite0"),
    (["add", "{memory}", "{ask}", "--dataset", " "], 2, "--dataset is empty"),
    (["index", "{new}"], 1, "there is no memory at"),
    (["index", "{memory}", "--key", "IVF4096,Flat"], 1, "at least 4,096 rows"),
    (["index", "{memory}", "--key", "Banana"], 1, "FAISS does not know the key Banana"),
    (["index", "{memory}", "--max-memory", "much"], 2, "is not a size"),
    (["index", "{memory}", "--max-memory", "0"], 2, "is no room for an index"),
    (["index", "{memory}", "--target-recall", "95"], 2, "is not a share"),
    (["index", "{memory}", "--shard-rows", "0"], 2, "not a number of rows"),
    (["index", "{memory}", "--max-latency-ms", "-1"], 2, "not a time"),
    (["add", "{ask}", "{memory}"], 2, "is a memory, not a source of images: MEMORY comes first"),
    (["add", "{memory}", "{tmp}/broken.png"], 1, "broken.png cannot be used (not an image in"),
    (["add", "{memory}", "{image}", "--dataset", " "], 2, "--dataset is empty"),
    (["compact", "{new}"], 1, "there is no memory at"),
    (["compact", "{memory}", "--at", "1"], 2, "No such option"),
    (["compact"], 2, "Missing argument"),
    (["index", "{memory}", "--max-memory", "1K", "--key", "Flat"], 1, "allow more with --max-memory"),
    (["classify", "{memory}", "{ask}", "{ask}", "--out", "{tmp}/out"], 2, "--out takes one SOURCE and 2 were"),
    (["classify", "{memory}", "{ask}", "--out", "{ask}"], 2, "has other files in it"),
    (["classify", "{memory}", "{ask}", "--out", "{tmp}/out", "--max-rejected", "7"], 2, "is not a share"),
    (["classify", "{memory}", "{ask}", "--out", "{tmp}/out", "--runner", "gpu"], 2, "give auto, here or ray"),
    (["add", "{memory}", "{ask}", "--labels", "column:x", "--max-rejected", "-1"], 2, "is not a share"),
    (["classify", "{memory}", "what://example.org/a.jpg"], 1, "give a path, or a URI that fsspec knows"),
    (["explain", "{memory}", "{image}", "--html", "{image}"], 2, "is there already and is no page"),
    (["explain", "{memory}", "{image}", "--html", "{tmp}"], 2, "is there already and is no page"),
    (["search", "{new}", "{image}"], 1, "there is no memory at"),
    (["search", "{memory}", "{tmp}/nowhere.png"], 1, "cannot be used (there is no such file)"),
    (["search", "{memory}", "{ask}"], 1, "is a folder: name image files"),
    (["search", "{memory}", "{image}", "-k", "0"], 2, "not a number of neighbours"),
    (["search", "{memory}", "{image}", "-k", "many"], 2, "many is not a whole number"),
    (["search", "{memory}", "{image}", "--at", "9"], 1, "has no version 9"),
    (["search", "{memory}"], 2, "Missing argument"),
    (["classify", "{memory}", "{image}", "--voting", "majority"], 2, "give one of plurality"),
    (["classify", "{memory}", "{image}", "--exclude", "5"], 1, "names id 5, which is no entry"),
    (["classify", "{memory}", "{image}", "--weigh", "5=2"], 1, "names id 5"),
    (["classify", "{memory}", "{image}", "--weigh", "5=heavy"], 2, "is not a number"),
    (["classify", "{memory}", "{image}", "--weigh", "{id}=-1"], 2, "cannot be: give 0 to"),
    (["classify", "{memory}", "{image}", "--assume", "5"], 2, "is not ID=VALUE"),
    (["classify", "{memory}", "{image}", "--balance", "strong"], 2, "neither a number nor auto"),
    (["classify", "{memory}", "{image}", "--balance", "-1"], 2, "is not a strength"),
    (["classify", "{memory}", "{image}", "--abstain-below", "60"], 2, "is not a share"),
    (["classify", "{memory}", "{tmp}/texts/a.txt"], 1, "not an image in JPEG"),
    (["explain", "{memory}", "{image}", "--html", "{tmp}/no/such/why.html"], 2, "does not exist: make it first"),
    (["explain", "{memory}", "{tmp}/nowhere.png"], 1, "there is no such file"),
    (["evaluate", "{memory}"], 2, "give either SOURCE"),
    (["evaluate", "{memory}", "{ask}", "--leave-one-out"], 2, "give either SOURCE"),
    (["evaluate", "{memory}", "{ask}", "--sample", "9"], 2, "--sample goes with --leave-one-out"),
    (["evaluate", "{memory}", "--leave-one-out", "--sample", "half"], 2, "half is not a whole number"),
    (["evaluate", "{memory}", "--leave-one-out", "--sample", "-1"], 2, "give 1 or more, or all"),
    (["evaluate", "{memory}", "{ask}/0"], 1, "has a label: put them into one sub-folder a class"),
    (["evaluate", "{memory}", "{ask}", "--k", "0"], 2, "not a number of neighbours"),
    (["evaluate", "{memory}", "{ask}", "--voting", "loud"], 2, "is unknown"),
    (["evaluate", "{memory}", "{tmp}/empty"], 1, "is empty"),
    (["serve", "{new}"], 1, "there is no memory at"),
    (["serve", "s3:///nowhere"], 2, "names no bucket"),
    (["serve", "{memory}", "--port", "0"], 2, "greater than or equal to 1"),
    (["serve", "{memory}", "--groups", "0"], 2, "greater than or equal to 1"),
    (["serve", "{memory}", "--timeout", "0"], 2, "greater than or equal to 0.001"),
    (["serve", "{memory}", "--host", "nowhere.invalid"], 2, "cannot be listened on"),
    (["serve", "{memory}", "--host", "192.0.2.1"], 2, "cannot be listened on"),
    (["serve", "{memory}", "--cache-size", "large"], 2, "is not a size"),
    (["serve", "{memory}", "--allow-host", "http://photos.example.org/"], 2, "is not the name of a host"),
    (["serve", "{memory}", "--pictures", "http://127.0.0.1/x"], 2, "--pictures http://127.0.0.1/x cannot be read from"),
    (["serve", "{memory}", "--pictures", "{tmp}/nowhere"], 2, "is no folder: give one that holds images"),
    (["serve", "{memory}", "--token-file", "{tmp}/nowhere"], 2, "cannot be read"),
    (["serve", "{memory}", "--token-file", "{tmp}/blank.txt"], 2, "is empty: write the token into it"),
    (["forget", "{memory}"], 2, "nothing was named to forget"),
    (["forget", "{memory}", "--label", "33"], 1, "has no entry with label '33': it has 3"),
    (["forget", "{memory}", "--id", "12"], 1, "has no entry with id 12"),
    (["forget", "{memory}", "--id", "99999999999999999999"], 1, "has no entry with id 99999999999999999999"),
    (["classify", "{memory}", "{image}", "--exclude", "99999999999999999999"], 1, "which is no entry"),
    (["classify", "{memory}", "{image}", "--balance", "200"], 2, "is not a strength"),
    (["classify", "{memory}", "{image}", "--weigh", "{id}=1.7e308"], 2, "cannot be: give 0 to"),
    (["forget", "{memory}", "--uri", "{tmp}/nowhere.png"], 1, "has no entry with uri"),
    (["forget", "{memory}", "--dataset", "remembr"], 1, "it has remember"),
    (["forget", "{new}", "--label", "3"], 1, "there is no memory at"),
    (["forget", "{new}", "--label", "3", "--erase"], 1, "there is no memory at"),
    (["forget", "{memory}", "--erase"], 2, "nothing was named to forget"),
    (["forget", "{memory}", "--label", "33", "--erase"], 1, "has no entry with label '33': it has 3"),
    (["forget", "{memory}", "--id", "99999999999999999999", "--erase"], 1, "has no entry with id 9999999999999999999"),
    (["forget", "{memory}", "--uri", "{tmp}/nowhere.png", "--erase"], 1, "has no entry with uri"),
    (["forget", "{memory}", "--file", "{tmp}/nowhere.txt"], 1, "cannot be read (No such file or directory)"),
    (["forget", "{memory}", "--file", "{tmp}/texts"], 1, "cannot be read (Is a directory)"),
    (["forget", "{memory}", "--file", "{weights}", "--erase"], 1, "cannot be read (it is no text)"),
    (["forget", "{memory}", "--file", "{labels}", "--erase"], 1, "has no entry with uri '/nowhere.png'"),
    (["forget", "{memory}", "--label", "3", "--receipt", "{tmp}/r"], 2, "a receipt is written with --verify"),
    (["forget", "{memory}", "--label", "3", "--verify", "--receipt", "{memory}/r"], 2, "cannot lie in the memory"),
    (["forget", "{memory}", "--label", "3", "--verify", "--receipt", "{tmp}/no/r"], 2, "a receipt cannot be written"),
    (["forget", "{memory}", "--label", "3", "--verify", "--receipt", "s3://a/r"], 2, "is not on this machine"),
    (["relabel", "{memory}"], 2, "nothing was named to relabel"),
    (["relabel", "{memory}", "--id", "{id}"], 2, "with no --label"),
    (["relabel", "{memory}", "--id", "{id}", "--label", ""], 2, "with an empty --label"),
    (["relabel", "{memory}", "--id", "nan", "--label", "a"], 2, "valid integer"),
    (["relabel", "{memory}", "--id", "12", "--label", "a"], 1, "has no entry with id 12"),
    (["relabel", "{memory}", "--label", "a"], 2, "--label was given without --id"),
    (["relabel", "{memory}", "--id", "{id}", "--label", "a", "--file", "{labels}"], 2, "two of --id, --file and --map"),
    (["relabel", "{memory}", "--file", "{tmp}/nowhere.csv"], 1, "there is no file"),
    (["relabel", "{memory}", "--file", "{tmp}/texts"], 1, "is a folder: give a .csv"),
    (["relabel", "{memory}", "--file", "{tmp}/texts/a.txt"], 1, "is no file of labels"),
    (["relabel", "{memory}", "--file", "s3://bucket/labels.csv"], 1, "is not on this machine"),
    (["relabel", "{memory}", "--file", "{labels}"], 1, "has no entry with uri '/nowhere.png'"),
    (["relabel", "{memory}", "--map", "{labels}"], 2, "--map was given without --label-set"),
    (["relabel", "{memory}", "--label-set", "", "--map", "{labels}"], 2, "--label-set is empty"),
    (["relabel", "{memory}", "--label-set", "x", "--map", "{labels}"], 1, "has no column mapped, but 'uri', 'label'"),
    (["relabel", "{memory}", "--label-set", "x"], 2, "nothing was named to relabel"),
    (["relabel", "{new}", "--id", "5", "--label", "a"], 1, "there is no memory at"),
    (["classify", "{memory}", "{image}", "--label-set", "coarse"], 1, "no label set 'coarse': it has none"),
    (["evaluate", "{memory}", "--leave-one-out", "--label-set", "coarse"], 1, "no label set 'coarse'"),
    (["search", "{memory}", "{image}", "--label-set", ""], 1, "no label set ''"),
    (["status", "{new}"], 1, "there is no memory at"),
    (["status", "{image}"], 2, "is a file: a memory is a folder"),
    (["status", "ftp://host/memory"], 2, "give a folder, s3://BUCKET/FOLDER"),
    (["status", "{memory}", "--at", "0"], 1, "has no version 0"),
    (["verify", "{new}"], 1, "there is no memory at"),
    (["verify", "{new}", "--clean"], 1, "there is no memory at"),
    (["verify", "{image}"], 2, "is a file: a memory is a folder"),
    (["verify", "{tmp}/texts"], 1, "there is no memory at"),
    (["demo", "--out", "{tmp}/texts"], 1, "holds something that is not an earlier demo"),
    (["history", "{new}"], 1, "there is no memory at"),
    (["history", "{memory}", "--limit", "0"], 2, "not a number of versions"),
    (["history", "{memory}", "--limit", "all"], 2, "all is not a whole number"),
    (["history"], 2, "Missing argument"),
    (["rollback", "{memory}"], 2, "give one VERSION to roll back to"),
    (["rollback", "{memory}", "1", "--to", "1"], 2, "give one VERSION to roll back to"),
    (["rollback", "{memory}", "1"], 2, "is the newest one already"),
    (["rollback", "{memory}", "7"], 1, "has no version 7: it goes from 1 to 1"),
    (["rollback", "{memory}", "--to", "0"], 1, "has no version 0"),
    (["rollback", "{memory}", "yesterday"], 2, "valid integer"),
    (["rollback", "{new}", "1"], 1, "there is no memory at"),
    (["expire", "{memory}"], 2, "Missing option"),
    (["expire", "{memory}", "--keep", "0"], 2, "not a number of versions to keep"),
    (["expire", "{memory}", "--keep", "3x"], 2, "is neither an age nor a number of versions"),
    (["expire", "{memory}", "--keep", "-3d"], 2, "is neither an age nor a number of versions"),
    (["expire", "{memory}", "--keep", "99999999999d"], 2, "longer ago than any clock tells"),
    (["expire", "{new}", "--keep", "30d"], 1, "there is no memory at"),
    (["expire", "{new}", "--keep", "30d", "--dry-run"], 1, "there is no memory at"),
    (["copy", "{new}", "{tmp}/copy"], 1, "there is no memory at"),
    (["copy", "{memory}"], 2, "Missing argument"),
    (["copy", "{memory}", "{tmp}/texts"], 2, "is not empty: name an empty or new place"),
    (["copy", "{memory}", "{memory}"], 2, "lie in one another"),
    (["copy", "{memory}", "{memory}/inside"], 2, "lie in one another"),
    (["copy", "{memory}", "{image}"], 2, "is a file: a memory is a folder"),
    (["copy", "{memory}", "ftp://host/copy"], 2, "cannot hold a memory"),
    (["remember", "{memory}"], 2, "No such command"),
    (["status", "{memory}", "--jsn"], 2, "No such option"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), MISTAKES, ids=lambda value: str(value)[:80])
def test_mistakes_are_named_and_change_nothing(
    run: Run, arguments: list[str], status: int, message: str, memory: Path, digits: Path, asked: list[Path],
    tmp_path: Path, weights: str,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("no image, no weights")
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "labels.csv").write_text("uri,label\n/nowhere.png,a\n")
    (tmp_path / "blank.txt").write_text("\n")
    places = {
        "new": tmp_path / "new",
        "tmp": tmp_path,
        "ask": digits / "ask",
        "memory": memory,
        "image": asked[0],
        "weights": weights,
        "labels": tmp_path / "labels.csv",
        "id": VisualMemory(memory).live().live_ids()[0],
    }
    before = contents(tmp_path)
    code, out, err = run(*[argument.format(**places) for argument in arguments])
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert code == status, shown
    assert message in shown
    assert "Traceback" not in err
    assert out == ""
    if status == 1:
        assert re.fullmatch(r"(?:loading the encoder …\n)?error: [^\n]+\n", err), err  # progress shows after a second
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("versions/*.json", "is not a whole version file: restore it"),
        ("segments/*/entries/*.parquet", "bytes where"),
        ("encoder/*.safetensors", "does not hold the weights it is named after"),
    ],
)
def test_damaged_files_are_named(run: Run, memory: Path, asked: list[Path], pattern: str, message: str) -> None:
    [path] = memory.glob(pattern)
    path.write_bytes(path.read_bytes()[:-100])
    before = contents(memory)
    code, out, err = run("classify", memory, asked[0])
    assert (code, out) == (1, "")
    assert path.name in err
    assert message in err
    assert contents(memory) == before


@pytest.mark.parametrize("pattern", ["versions/*.json", "segments/*/entries/*.parquet", "encoder/*.safetensors"])
def test_missing_files_are_named(run: Run, memory: Path, asked: list[Path], pattern: str) -> None:
    [path] = memory.glob(pattern)
    path.unlink()
    code, _, err = run("classify", memory, asked[0])
    assert code == 1
    lost = "is not finished (all of it is embedded)"  # as a first add leaves it that was killed before its commit
    assert lost in err if "versions" in pattern else f"{path.name} is missing" in err
    assert "restore them from a copy" in err or "versions" not in pattern


@pytest.mark.parametrize("name", ["index.faiss", "ids.npy", "labels.npy", "vectors.f16", "entries.arrow"])
def test_a_damaged_index_is_rebuilt_as_the_message_says(run: Run, memory: Path, asked: list[Path], name: str) -> None:
    assert run("index", memory, "--key", "IVF4,Flat")[0] == 0
    [path] = memory.glob(f"index/*/shards/0/{name}")
    path.unlink()
    code, _, err = run("classify", memory, asked[0])
    assert code == 1
    assert f"{name} is missing" in err
    assert "run `index --rebuild`" in err
    assert run("index", memory, "--rebuild")[0] == 0
    assert run("classify", memory, asked[0])[0] == 0


def test_lost_versions_are_no_invitation_to_start_over(run: Run, memory: Path, digits: Path) -> None:
    assert run("index", memory)[0] == 0
    shutil.rmtree(memory / "versions")
    for arguments in (["status", memory], ["add", memory, digits / "ask"]):
        code, _, err = run(*arguments)
        assert code == 1
        assert "has lost its versions/" in err


def test_an_interrupt_is_told(run: Run, memory: Path, digits: Path, tmp_path: Path) -> None:
    # Asked through a process of its own, because the signal would stop the tests; interrupted as soon as work is done.
    [image, *_] = sorted((digits / "ask" / "3").iterdir())
    (tmp_path / "many").mkdir()
    for number in range(8_000):
        (tmp_path / "many" / f"{number}.png").symlink_to(image)
    command = [sys.executable, "-m", "jobs.cli", "add", str(memory), str(tmp_path / "many"), "--runner", "here"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(memory.glob("segments/00000002/done/*.json")), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "note: interrupted: run the same command again" in err
    assert "Traceback" not in err


def test_an_interrupt_while_modules_load_is_told(memory: Path) -> None:
    command = [sys.executable, "-m", "jobs.cli", "status", str(memory)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "numpy" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "note: interrupted" in err
    assert "Traceback" not in err


def wait_for(reached: Callable[[], bool], process: subprocess.Popen) -> None:
    for _ in range(6_000):
        if reached():
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    process.kill()
    raise AssertionError("the process did not come to the moment waited for")


def test_vectors_go_out_and_in_again(
    document: Callable, run: Run, memory: Path, asked: list[Path], tmp_path: Path
) -> None:
    document("forget", memory, "--label", "4")
    exported = document("export", memory, tmp_path / "out", "--rows-per-file", 50)
    assert (exported["entries"], exported["files"], exported["format"]) == (80, 2, "clip-retrieval")
    assert {"uri", "version", "bytes", "dimension", "encoder", "seconds"} <= set(exported)
    plan = document("add", tmp_path / "back", tmp_path / "out", "--dry-run")
    assert (plan["planned"], plan["parts"], plan["encoder"][:28]) == (80, 1, f"given:{ENCODER}@")
    status, _, err = run("add", tmp_path / "back", tmp_path / "out", "--encoder", "given:digits")
    assert (status, "are by tf_efficientnet_lite0" in err) == (1, True)
    added = document("add", tmp_path / "back", tmp_path / "out")
    assert (added["entries"], added["rejected"], added["skipped"]) == (80, 0, 0)
    status, out, _ = run("status", tmp_path / "back")
    assert (status, "1280 dimensions, vectors given without an encoder" in out) == (0, True)
    evaluated = document("evaluate", tmp_path / "back", tmp_path / "out", "-k", 1, "--voting", "plurality")
    assert (evaluated["num_queries"], evaluated["accuracy"]) == (80, {"plurality": {"1": 100.0}})
    decided = document("classify", tmp_path / "back", tmp_path / "out", "--out", tmp_path / "decided")
    assert decided["decided"] == 80
    status, out, err = run("classify", tmp_path / "back", asked[0])
    assert (status, out) == (1, "")
    assert re.fullmatch(r"error: no image can be embedded where the vectors were given without.*\n", err)
    assert document("verify", tmp_path / "back")["findings"] == []
    status, out, _ = run("export", tmp_path / "back", tmp_path / "parquet", "--format", "parquet")
    assert (status, "exported 80 entries of version 1 in 1 file of vectors" in out) == (0, True)
    status, _, err = run("export", tmp_path / "back", tmp_path / "parquet")
    assert (status, "has other files in it, such as entries_0000.parquet" in err) == (2, True)


def test_another_format_is_named(run: Run, memory: Path) -> None:
    [path] = memory.glob("versions/*.json")
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    code, _, err = run("status", memory)
    assert code == 1
    assert "is in format 3 and this release reads format 2" in err


def test_debug_shows_where_an_error_came_from(memory: Path) -> None:
    from pipeline.errors import UnknownName

    with pytest.raises(UnknownName):
        main(["forget", str(memory), "--id", "12", "--debug"])


@pytest.mark.parametrize(
    "verb",
    [
        *("add", "index", "search", "classify", "explain", "evaluate", "forget", "relabel", "status", "demo"),
        *("compact", "history", "rollback", "expire", "copy", "export"),
    ],
)
def test_every_verb_has_help(run: Run, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "Usage" in out


def test_duplicates_are_told_and_left_out(run: Run, memory: Path, digits: Path, tmp_path: Path) -> None:
    some = tmp_path / "some" / "3"
    some.mkdir(parents=True)
    for path in [*sorted((digits / "remember" / "3").iterdir())[:4], *sorted((digits / "ask" / "3").iterdir())[:2]]:
        shutil.copy(path, some)
    kept = shutil.copytree(memory, tmp_path / "kept")
    status, _, err = run("add", kept, some.parent)
    assert status == 0
    assert "4 of these 6 images were in the memory already, by the bytes: `--duplicates skip` leaves" in err
    status, out, _ = run("add", memory, some.parent, "--duplicates", "skip")
    assert status == 0
    assert "remembered 2 of 6 images" in out
    assert "4 of these 6 images were in the memory already, by the bytes, and left out" in out
    assert "rejected" not in out
    status, _, err = run("add", memory, some.parent, "--duplicates", "drop")
    assert (status, err) == (2, "error: --duplicates drop is unknown: give keep or skip\n")


def test_a_small_class_is_hinted_at_where_it_lost(run: Run, memory: Path, digits: Path, tmp_path: Path) -> None:
    wolf = tmp_path / "few" / "wolf"
    wolf.mkdir(parents=True)
    for path in sorted((digits / "ask" / "3").iterdir())[:3]:
        shutil.copy(path, wolf)
    status, _, err = run("add", memory, wolf.parent)
    assert status == 0
    wanted = "wolf (3 entries) is a class far smaller than others (20), which outvote it: ask with `--balance auto`"
    assert wanted in " ".join(err.split())
    asked = sorted((digits / "ask" / "3").iterdir())[0]
    status, out, err = run("classify", memory, asked, "--json")
    assert json.loads(out)[0]["label"] == "3"
    assert wanted in " ".join(err.split())
    assert wanted not in " ".join(run("classify", memory, asked, "--balance", "auto")[2].split())
    assert wanted not in " ".join(run("classify", memory, asked, "-k", "1")[2].split())  # it did not lose
