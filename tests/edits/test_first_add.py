"""A memory during its first add: at every moment it says how far it is, and nobody takes it for no memory."""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import main
from pipeline import VisualMemory
from pipeline.errors import DamagedFile, FirstAddUnfinished, MemoryMissing, SourceError
from pipeline.progress import Progress
from pipeline.store.checks.verify import Verification
from pipeline.store.log.version_log import VersionLog
from pipeline.store.segments.first_add import SILENT_SECONDS
from pipeline.store.storage.open_storage import open_storage
from tests.conftest import ENCODER
from tests.edits.test_add import many_pictures
from tests.images.archives import tar_of
from tests.store.dying import Died, DyingStorage, bury
from tests.store.seaweed import SeaweedFS

IMAGES = 150  # two parts
MOMENTS = range(1, 14)  # an add of them makes fourteen changes to its memory; a slow one renews its lease besides


@pytest.fixture
def options(weights: str) -> dict:
    return {"encoder": ENCODER, "weights": weights, "weights_order": "positional", "image_size": 32}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return many_pictures(tmp_path_factory.mktemp("source") / "pictures", IMAGES)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a verb: exit status, stdout, stderr."""

    def run_verb(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(exited.value.code or 0), printed.out, printed.err

    return run_verb


def dying(root: Path, changes: int) -> VisualMemory:
    """A memory whose process dies after so many changes to its place."""
    memory = VisualMemory(root)
    memory.log = VersionLog(DyingStorage(root, changes))
    return memory


def stopped(root: Path | str, source: Path, options: dict, images: int = 128) -> VisualMemory:
    """A memory whose first add was stopped once so many images were done."""

    def stop(moment: Progress) -> None:
        if moment.stage == "embedding" and moment.done >= images:
            raise KeyboardInterrupt

    memory = VisualMemory(root)
    with pytest.raises(KeyboardInterrupt):
        memory.add(source, on_progress=stop, **options)
    return memory


@pytest.mark.parametrize("changes", MOMENTS)
def test_at_every_moment_the_state_is_told(
    run: Callable, tmp_path: Path, pictures: Path, options: dict, changes: int
) -> None:
    root = tmp_path / "memory"
    with contextlib.suppress(Died):
        dying(root, changes).add(pictures, **options)
    memory = VisualMemory(root)
    found = memory.status()
    if any(root.glob("versions/*.json")):
        assert (found["version"], changes >= MOMENTS[-1]) == (1, True)  # it died after its commit
        return
    marks = len([*root.glob("segments/*/done/*.json")])
    planned = any(root.glob("segments/*/segment.json"))
    stage = ["embedding", "embedding", "committing"][marks] if planned else "planning"
    assert (found["version"], found["entries"], found["index"]) == (0, 0, None)
    [add] = found["under_way"]
    assert (add["source"], add["running"]) == (str(pictures), True)  # this process, whose lease stands
    assert (add["stage"], add["done"]) == (stage, [0, 128, IMAGES][marks])
    code, out, _ = run("status", root)
    assert (code, "version none yet" in out, f"adding    {pictures}: " in out) == (0, True, True)

    bury(open_storage(str(root)))
    code, out, _ = run("status", root, "--json")
    assert (code, json.loads(out)["version"]) == (0, 0)
    running = [add["running"] for add in json.loads(out)["under_way"]]
    assert running == ([False] if stage != "planning" else [])
    code, out, _ = run("status", root)
    told = "not running: the same `add`" if running else "the first `add` was begun and has planned nothing"
    assert (code, told in out) == (0, True)

    code, out, _ = run("verify", root)
    assert code == 0, out
    assert "sound: no version yet" in out
    assert "the first add is not finished" in out
    assert run("history", root, "--json")[:2] == (0, "[]\n")
    assert "the first add to the memory at" in run("history", root)[2]


@pytest.mark.parametrize("changes", [2, 4, 8, 11])
def test_the_same_add_goes_on(tmp_path: Path, pictures: Path, options: dict, changes: int) -> None:
    memory = VisualMemory(tmp_path / "memory")
    with pytest.raises(Died):
        dying(tmp_path / "memory", changes).add(pictures, **options)
    done = sum(add["done"] for add in memory.status()["under_way"])
    bury(open_storage(str(memory.uri)))
    report = memory.add(pictures, **options)
    assert (report.entries + report.rejected, report.resumed) == (IMAGES, done)
    found = memory.status()
    assert (found["version"], found["entries"], found["under_way"]) == (1, report.entries, [])


@pytest.mark.parametrize(
    "verb",
    [
        "search {memory} {image}",
        "classify {memory} {image}",
        "classify {memory} {source} --out {out}",
        "explain {memory} {image}",
        "evaluate {memory} {source}",
        "evaluate {memory} --leave-one-out",
        "forget {memory} --label 1",
        "forget {memory} --label 1 --dry-run",
        "forget {memory} --label 1 --erase",
        "relabel {memory} --id 5 --label a",
        "index {memory}",
        "index {memory} --dry-run",
        "compact {memory}",
        "expire {memory} --keep 3",
        "rollback {memory} 1",
        "copy {memory} {out}",
        "export {memory} {out}",
        "plan-capacity {memory} --rows 1M",
        "serve {memory}",
    ],
)
def test_other_verbs_say_that_it_is_not_finished(
    run: Callable, tmp_path: Path, pictures: Path, options: dict, verb: str
) -> None:
    memory = tmp_path / "memory"
    stopped(memory, pictures, options)
    before = {path: path.read_bytes() for path in memory.rglob("*") if path.is_file()}
    image = next(pictures.rglob("*.png"))
    words = [word.format(memory=memory, image=image, source=pictures, out=tmp_path / "out") for word in verb.split(" ")]
    code, out, err = run(*words)
    assert (code, out) == (1, "")
    assert re.search(
        r"error: the first add to the memory at .* is not finished \(128 of 150 images done\): wait for it, or run the "
        r"same `add` again where it was stopped",
        err,
    ), err
    assert {path: path.read_bytes() for path in memory.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_nothing_is_still_nothing(run: Callable, tmp_path: Path, pictures: Path, options: dict) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Died):
        dying(tmp_path / "early", 0).add(pictures, **options)  # before it could leave a lease
    for place in ("empty", "new", "early"):
        code, _, err = run("status", tmp_path / place)
        assert (code, "there is no memory at" in err) == (1, True)
        with pytest.raises(MemoryMissing) as missing:
            VisualMemory(tmp_path / place).status()
        assert not isinstance(missing.value, FirstAddUnfinished)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("a_part_each")
def test_archives_count_where_images_are_not_counted_yet(run: Callable, tmp_path: Path, options: dict) -> None:
    source = tmp_path / "tars"
    source.mkdir()
    for number in range(4):
        pictures = many_pictures(tmp_path / f"of{number}", 10 * (number + 1))
        members = {path.name: path.read_bytes() for path in sorted(pictures.rglob("*.png"))}
        (source / f"{number}.tar").write_bytes(tar_of(members))
    seen: list[Progress] = []

    def stop(moment: Progress) -> None:
        seen.append(moment)
        if moment.archives_done == 2:
            raise KeyboardInterrupt

    memory = VisualMemory(tmp_path / "memory")
    with pytest.raises(KeyboardInterrupt):
        memory.add(source, on_progress=stop, **options)
    embedding = [moment for moment in seen if moment.stage == "embedding"]
    assert [(m.done, m.total, m.archives_done, m.archives) for m in embedding] == [
        (0, None, 0, 4),
        (10, None, 1, 4),
        (30, None, 2, 4),
    ]
    [add] = memory.status()["under_way"]
    assert (add["archives"], add["archives_done"], add["counted"], add["done"]) == (4, 2, False, 30)
    assert "30 images so far, 2 rejected, 2 of 4 archives (not running" in run("status", memory.uri)[1]
    with pytest.raises(FirstAddUnfinished, match="2 of 4 archives done"):
        memory.state()

    embedding.clear()
    memory.add(source, on_progress=embedding.append, **options)
    embedding = [moment for moment in embedding if moment.stage == "embedding"]
    assert [(m.done, m.total) for m in embedding] == [(30, None), (60, None), (100, 100)]


def test_verify_names_what_is_damaged_of_a_first_add(tmp_path: Path, pictures: Path, options: dict) -> None:
    memory = stopped(tmp_path / "memory", pictures, options, IMAGES)
    assert memory.verify().sound
    [entries, *_] = sorted((tmp_path / "memory").glob("segments/*/entries/*.parquet"))
    whole = entries.read_bytes()
    altered = bytearray(whole)
    altered[len(whole) // 2] ^= 1
    for data in (bytes(altered), whole[:-1], None):
        entries.unlink()
        if data is not None:
            entries.write_bytes(data)
        found = memory.verify()
        [damage] = [finding for finding in found.findings if finding.severity == "damage"]
        assert damage.path == f"segments/00000001/entries/{entries.name}"
        assert "remove segments/00000001/done/000000.json and run the same `add` again" in damage.advice
    (tmp_path / "memory/segments/00000001/done/000000.json").unlink()  # as it says
    assert memory.add(pictures, **options).planned == IMAGES
    assert memory.verify().sound


@pytest.mark.parametrize("what", ["segment.json", "done/000000.json"])
def test_a_damaged_description_or_mark_is_named(tmp_path: Path, pictures: Path, options: dict, what: str) -> None:
    memory = stopped(tmp_path / "memory", pictures, options)
    (tmp_path / "memory/segments/00000001" / what).write_text("{")
    found = memory.verify()
    assert [finding.path for finding in found.findings if finding.severity == "damage"] == [f"segments/00000001/{what}"]
    if what == "segment.json":
        assert memory.status()["version"] == 0
    else:
        with pytest.raises(DamagedFile, match="run the same `add` again"):
            memory.status()


def test_another_process_watches_it_run(tmp_path: Path, weights: str, digits: Path) -> None:
    image = next((digits / "ask/3").iterdir())
    many = tmp_path / "many"
    many.mkdir()
    for number in range(6_000):
        (many / f"{number}.png").symlink_to(image)
    memory = tmp_path / "memory"
    flags = ["--encoder", ENCODER, "--weights", weights, "--weights-order", "positional", "--image-size", "64"]
    command = [sys.executable, "-m", "jobs.cli", "add", str(memory), str(many), *flags, "--runner", "here"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    seen = []
    try:
        while process.poll() is None:
            asked = subprocess.run(
                [sys.executable, "-m", "jobs.cli", "status", str(memory), "--json"],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            if asked.returncode == 0:
                seen.append(json.loads(asked.stdout))
            else:
                assert not seen, asked.stderr  # once it has begun, it is told of
                assert "there is no memory at" in asked.stderr
            if seen and (seen[-1]["version"] or sum(add["done"] for add in seen[-1]["under_way"]) > 0):
                break
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    [add] = seen[-1]["under_way"]
    assert (add["running"], add["planned"], add["source"]) == (True, 6_000, str(many))
    assert 0 < add["done"] < 6_000
    [add] = VisualMemory(memory).status()["under_way"]
    assert add["running"] is False


def test_a_first_add_on_s3_is_told(s3: SeaweedFS, run: Callable, pictures: Path, options: dict) -> None:
    uri = f"{s3.uri()}/memory"
    assert run("status", uri)[0] == 1
    memory = stopped(uri, pictures, options)
    code, out, _ = run("status", uri)
    assert (code, "128 of 150 images done" in out, "not running" in out) == (0, True, True)
    assert "sound: no version yet" in run("verify", uri)[1]
    assert run("history", uri, "--json")[:2] == (0, "[]\n")
    assert "128 of 150 images done" in run("search", uri, next(pictures.rglob("*.png")))[2]
    assert memory.add(pictures, **options).resumed == 128
    assert run("status", uri)[0] == 0


def test_a_verification_of_a_first_add_has_the_fields_of_any(tmp_path: Path, pictures: Path, options: dict) -> None:
    found = stopped(tmp_path / "memory", pictures, options).verify()
    assert isinstance(found, Verification)
    document = found.to_json()
    assert (document["version"], document["versions"], document["sound"]) == (0, 0, True)
    assert document["files"] >= 2
    assert document["bytes"] > 0
    assert np.all([{"severity", "path", "what", "advice"} == set(finding) for finding in document["findings"]])


def test_a_clean_up_leaves_a_first_add_that_was_stopped(
    run: Callable, tmp_path: Path, pictures: Path, options: dict
) -> None:
    memory = stopped(tmp_path / "memory", pictures, options)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    code, out, _ = run("verify", tmp_path / "memory", "--clean")
    assert (code, "nothing was removed: the first add goes on" in out) == (0, True)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert memory.verify(clean=True).removed == 0
    assert memory.add(pictures, **options).resumed == 128


def test_a_first_add_is_told_while_its_source_is_listed(
    run: Callable, tmp_path: Path, pictures: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing two hundred million keys takes hours, and that is when one asks."""
    place, seen = tmp_path / "memory", []

    def look(progress: Progress) -> None:
        if progress.stage == "listing" and not seen:
            time.sleep(SILENT_SECONDS + 0.5)
            status, said, _ = run("status", place)
            seen.append((status, said))

    VisualMemory(place).add(pictures, **options, on_progress=look)
    [(status, said)] = seen
    assert status == 0
    assert f"adding    {pictures}: its plan is being made (running)" in said
    assert not (place / "leases").exists()


def test_what_fails_while_it_is_planned_leaves_nothing(tmp_path: Path, options: dict) -> None:
    source = tmp_path / "empty"
    source.mkdir()

    def slow(_: Progress) -> None:
        time.sleep(SILENT_SECONDS + 0.2)

    with pytest.raises(SourceError):
        VisualMemory(tmp_path / "memory").add(source, **options, on_progress=slow)
    assert not (tmp_path / "memory").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises((SourceError, MemoryMissing)):
        VisualMemory(tmp_path / "mine").add(source, **options, on_progress=slow)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
