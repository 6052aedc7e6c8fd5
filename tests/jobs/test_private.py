"""What may be read by its owner alone, and what is not to be written anywhere: tokens, copies, receipts, passwords."""

import json
import stat
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.ray_cluster.modes import others_who_read
from jobs.ray_cluster.on_ray import own_folder
from pipeline import VisualMemory
from pipeline.errors import UsageError
from pipeline.store.storage.file_cache import FileCache
from pipeline.store.storage.open_storage import open_storage, refuse_secrets


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hunter2@bucket/photos",
        "S3://AKIA:hunter2@bucket",
        "gs://user:hunter2@bucket/a",
        "simplecache::s3://AKIA:hunter2@bucket/a.tar",
        "https://user:hunter2@host/a.tar",
        "abfs://user:hunter2@container/path",
        "https://host/a.tar?X-Amz-Signature=hunter2",
        "s3://bucket/a.tar?X-Amz-Credential=x&X-Amz-Signature=hunter2",
        "https://account.blob.core.windows.net/c/a.tar?sv=1&sig=hunter2",
    ],
)
def test_a_source_with_a_secret_is_refused_and_not_kept(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("add", str(tmp_path / "memory"), uri, "--dry-run") == 2
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err
    assert "credentials" in said.err or "environment" in said.err
    assert not (tmp_path / "memory").exists()
    with pytest.raises(UsageError) as refused:
        open_storage(uri)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/photo@2x/a:b@c.jpg",
        "abfs://container@account.dfs.core.windows.net/path",
        "s3://bucket/what?.jpg",
        "/home/user:x@y/photos",
        "C:/photos@home",
        "file:///a:b@c",
        "s3://bucket/sig=1/x",
    ],
)
def test_names_that_look_alike_are_not(uri: str) -> None:
    refuse_secrets(uri)


def test_a_source_on_the_web_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("add", str(tmp_path / "memory"), "http://127.0.0.1:9/photos/") == 1
    assert "fetch it" in capsys.readouterr().err


def test_receipts_are_of_their_owner_alone(digits_memory: VisualMemory, tmp_path: Path) -> None:
    digits_memory.copy(tmp_path / "memory")
    where = str(tmp_path / "gone")
    assert run("forget", str(tmp_path / "memory"), "--label", "3", "--verify", "--receipt", where) == 0
    assert [mode_of(tmp_path / f"gone{suffix}") for suffix in (".json", ".txt")] == [0o600, 0o600]


def test_folders_of_copies_and_of_ray_are_of_their_owner_alone(tmp_path: Path) -> None:
    FileCache(tmp_path / "copies", 1_000)
    assert mode_of(tmp_path / "copies") == 0o700
    folder = own_folder()
    folder.chmod(0o777)  # as an earlier Ray may have left it
    assert mode_of(own_folder()) == 0o700


def test_a_folder_that_somebody_else_put_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path)[:40])
    (tmp_path / "elsewhere").mkdir()
    short = Path(str(tmp_path))
    monkeypatch.setattr("jobs.ray_cluster.on_ray.LONGEST_TEMPORARY", 1_000)
    monkeypatch.setattr("tempfile.tempdir", str(short))
    own = own_folder()
    own.rmdir()
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="somebody else"):
        own_folder()


def test_a_token_that_others_can_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "token"
    token.write_text("a token of the tests\n")
    for mode, who in ((0o604, "every user"), (0o640, "its group")):
        token.chmod(mode)
        assert who in (others_who_read(token) or "")
        run("serve", str(tmp_path / "no.memory"), "--token-file", str(token))
        assert f"{token} " in capsys.readouterr().err.replace(")", " ")
    token.chmod(0o600)
    assert others_who_read(token) is None


def test_json_holds_no_control_characters(
    digits_memory: VisualMemory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits_memory.copy(tmp_path / "memory")
    label = "\x1b]0;PWNED\x07\x9b31m\u202e\x7f\n"
    memory = VisualMemory(tmp_path / "memory")
    entry = int(memory.live().live_ids()[0])
    memory.relabel(ids=[entry], label=label)
    for verb in (["status", "--json"], ["history", "--json"], ["status"], ["history"]):
        assert run(verb[0], str(tmp_path / "memory"), *verb[1:]) == 0
        said = capsys.readouterr()
        assert all(line.isprintable() for line in (said.out + said.err).splitlines())
        if "--json" in verb:
            json.loads(said.out)
