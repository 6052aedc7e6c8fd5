"""An erasure that was killed while it redacts: its memory is not damaged, and `verify` says first how to finish it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import VisualMemory
from pipeline.edits.erasure.erase import erase
from pipeline.store.checks.verify import Verification
from pipeline.store.log.version_log import VersionLog
from tests.edits.erasing import Doomed
from tests.edits.test_erase import memory, peopled  # noqa: F401, a fixture
from tests.store.dying import Died, DyingStorage, bury


class DyingAtReplacing(DyingStorage):
    """It counts nothing but the version files that are redacted."""

    def _change(self) -> None:
        pass

    def replace(self, path: str, data: bytes) -> None:
        if path.startswith("versions/0"):
            super()._change()
        super().replace(path, data)


def killed_while_redacting(whole: VisualMemory, doomed: Doomed, tmp_path: Path) -> Iterator[VisualMemory]:
    """The memory after an erasure was killed at its n-th redaction, each n in turn."""
    for redactions in range(100):
        target = tmp_path / f"killed-{redactions}"
        shutil.copytree(whole.uri, target)
        try:
            erase(VersionLog(DyingAtReplacing(target, redactions)), np.array(doomed.ids), "forget --erase")
        except Died:
            killed = VisualMemory(target)
            bury(killed.log.storage)  # type: ignore[arg-type]
            yield killed
        else:
            assert redactions > 3
            return


def first_is_how_to_finish(report: Verification) -> bool:
    first = report.findings[0]
    return first.path.startswith("erasures/") and "verify --clean" in first.advice


def test_what_waits_to_be_redacted_is_no_damage(memory: VisualMemory, tmp_path: Path) -> None:  # noqa: F811
    doomed = peopled(memory)
    for killed in killed_while_redacting(memory, doomed, tmp_path):
        report = killed.verify()
        assert first_is_how_to_finish(report)
        assert [f for f in report.findings if f.severity == "damage"] == []
        assert not any("copy of the memory" in finding.advice for finding in report.findings)
        assert killed.verify(clean=True).findings == ()
        assert doomed.audit(killed.uri) == []


def test_damage_beside_it_is_told_without_the_advice_to_restore(
    memory: VisualMemory,  # noqa: F811
    tmp_path: Path,
) -> None:
    doomed = peopled(memory)
    [*_, killed] = killed_while_redacting(memory, doomed, tmp_path)
    [kept, *_] = killed.state().entries_files()
    path = Path(killed.uri) / kept.path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    report = killed.verify()
    assert first_is_how_to_finish(report)
    [damaged] = [f for f in report.findings if f.severity == "damage" and f.path == kept.path]
    assert "the erasure" in damaged.advice
    assert not any("copy of the memory" in finding.advice for finding in report.findings)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"nonce": "ab"}'])
def test_a_plan_that_is_none(memory: VisualMemory, tmp_path: Path, content: bytes) -> None:  # noqa: F811
    [killed, *_] = killed_while_redacting(memory, peopled(memory), tmp_path)
    [path] = (Path(killed.uri) / "erasures").iterdir()
    path.write_bytes(content)
    path.with_name("ab.json").write_bytes(content)
    report = killed.verify()
    assert report.findings[0].path == f"erasures/{path.name}"
    assert "not a whole plan" in report.findings[0].what
    assert {finding.severity for finding in report.findings if finding.path == "erasures/ab.json"} == {"waste"}
