"""`submit`: what is refused, what travels, what is passed on. On a cluster: tests/end_to_end/test_rehearsal.py."""

import contextlib
import itertools
import json
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from jobs import cli
from jobs.ray_cluster.job_log import JobLog
from jobs.ray_cluster.on_ray import start_ray
from jobs.submit import entry_point, shipped_files
from pipeline.errors import UsageError

Run = Callable[..., tuple[int, str, str]]
NOWHERE = "http://127.0.0.9:9"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `submit`: exit status, stdout, stderr."""
    # The mode and the token of the tests' own Ray stay: Ray reads them once in a process, and refuses a mode of tokens
    # that is left without one.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def run_submit(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main(["submit", *map(str, arguments)])
        printed = capsys.readouterr()
        return int(exited.value.code or 0), printed.out, printed.err

    return run_submit


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a VERB"),
        (["--address", NOWHERE], "give a VERB"),
        (["status", "s3://b/m", "--attach", "add-1", "--address", NOWHERE], "give a VERB"),
        (["--attach", "add-1", "--stop", "add-1", "--address", NOWHERE], "give a VERB"),
        (["--attach", "add-1", "--no-wait", "--address", NOWHERE], "--env and --no-wait are for a VERB"),
        (["status", "s3://b/m"], "submit needs --address URL"),
        (["status", "s3://b/m", "--address", "127.0.0.9:6379"], "is not the address of a cluster's dashboard"),
        (["status", "s3://b/m", "--address", "auto"], "is not the address of a cluster's dashboard"),
        (["demo", "--address", NOWHERE], "demo is a tour of this machine"),
        (["serve", "s3://b/m", "--address", NOWHERE], "serve answers for as long as it runs"),
        (["submit", "status", "s3://b/m", "--address", NOWHERE], "name the verb that the cluster is to run"),
        (["stattus", "s3://b/m", "--address", NOWHERE], "stattus is no verb"),
        (["status", "s3://b/m", "--no-such", "--address", NOWHERE], "No such option: --no-such"),
        (["status", "--address", NOWHERE], "MEMORY"),
        (["status", "my.memory", "--address", NOWHERE], "MEMORY my.memory is a relative path"),
        (["add", "s3://b/m", "photos", "--address", NOWHERE], "SOURCE photos is a relative path"),
        (["classify", "s3://b/m", "s3://b/p", "--out", "d", "--address", NOWHERE], "--out d is a relative path"),
        (["classify", "s3://b/m", "s3://b/1.jpg", "2.jpg", "--address", NOWHERE], "2.jpg is a relative path"),
        (["status", "s3://b/m", "--env", "NOT_THERE", "--address", NOWHERE], "--env NOT_THERE: there is no such"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(run: Run, arguments: list[str], said: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert said in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_no_server_at_the_address(run: Run) -> None:
    status, out, err = run("status", "s3://b/m", "--address", NOWHERE)
    assert (status, out) == (1, "")
    assert err.endswith(f"error: no Ray job server answers at {NOWHERE}: give the address of the cluster's dashboard\n")
    assert len(err.splitlines()) <= 2  # what it was doing, where that took a moment


def test_the_address_may_be_in_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE)
    assert f"no Ray job server answers at {NOWHERE}" in run("status", "s3://b/m")[2]
    assert "answers at http://127.0.0.9:10" in run("status", "s3://b/m", "--address", "http://127.0.0.9:10")[2]


def test_a_verb_that_is_not_submitted_does_not_take_a_dashboard_for_its_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE)
    with pytest.raises(UsageError, match="where jobs are taken: submit the command"):
        start_ray()


@contextlib.contextmanager
def server(status: int, version: bool = False) -> Iterator[str]:
    """An HTTP server that gives every request this answer; with `version`, it passes for a cluster at first."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = version and self.path == "/api/version"
            self.send_response(200 if known else status)
            self.end_headers()
            self.wfile.write(json.dumps({"version": "4", "ray_version": "2.60.0"}).encode() if known else b"no")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused(run: Run, status: int) -> None:
    with server(status) as url:
        code, out, err = run("status", "s3://b/m", "--address", url)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: the cluster at {url} refuses the token: set RAY_AUTH_TOKEN")
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--attach", "--stop"])
def test_a_job_that_nobody_knows(run: Run, option: str) -> None:
    with server(404, version=True) as url:
        code, _, err = run(option, "add-12345678", "--address", url)
    assert code == 1
    assert err.startswith(f"error: the cluster at {url} knows no job add-12345678")
    assert err.count("\n") == 1


def test_a_path_of_this_machine_is_remarked_upon(run: Run, tmp_path: Path) -> None:
    _, _, err = run("add", "s3://b/m", tmp_path, "--address", NOWHERE)
    assert f"note: {tmp_path} is on this machine: the cluster finds it only in a file system" in err


def test_no_value_of_the_environment_is_printed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-very-secret")
    _, out, err = run("status", "s3://b/m", "--env", "AWS_SECRET_ACCESS_KEY", "--address", NOWHERE)
    assert "the-very-secret" not in out + err


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_a_shell_reads_the_entry_point_as_it_was_typed(arguments: list[str]) -> None:
    assert shlex.split(entry_point(["add", *arguments])) == ["python", "-m", "jobs.cli", "add", *arguments]


def test_our_packages_travel_and_nothing_else() -> None:
    root = Path(sys.modules["jobs"].__path__[0]).parent
    with shipped_files() as folder:
        there = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        expected = {
            path.relative_to(root)
            for package in ("pipeline", "jobs")
            for path in (root / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert there == expected
        assert sum((folder / path).stat().st_size for path in there) < 10_000_000
    assert not folder.exists()


def test_no_verb_has_an_option_that_submit_takes_for_its_own() -> None:
    group = typer.main.get_command(cli.application())
    options = {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    own = options.pop("submit") - {"--help"}
    assert {name: own & theirs for name, theirs in options.items() if own & theirs} == {}


def passed_on(pieces: list[str], *, document: bool = True) -> tuple[str, str]:
    told: list[str] = []
    rest: list[str] = []
    log = JobLog(told.append, rest.append, json=document)
    for piece in pieces:
        log.write(piece)
    log.end()
    return "".join(told), "".join(rest)


DOCUMENT = '{\n "entries": 10,\n "rejects": [\n  {\n   "uri": "a"\n  }\n ]\n}\n'
LOG = f"Running entrypoint for job add-1: python -m jobs.cli\nembedding: 5 of 10\n{DOCUMENT}"


@given(st.lists(st.integers(0, len(LOG))))
def test_the_document_is_told_from_the_log_however_it_is_cut(cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(LOG)]
    document, rest = passed_on([LOG[a:b] for a, b in itertools.pairwise(ends)])
    assert (document, rest) == (DOCUMENT, LOG.removesuffix(DOCUMENT))


@pytest.mark.parametrize(
    ("log", "document", "rest"),
    [
        ("a\nb", "", "a\nb"),
        ("a\n[]\n", "[]\n", "a\n"),
        ("{}\nb\n", "{}\n", "b\n"),
        ("[\n 1\n]\nb\n", "[\n 1\n]\n", "b\n"),
        ("{ not one }\n[\n 1\n]\n", "[\n 1\n]\n", "{ not one }\n"),
        ("[2026] a warning\n{\n 1: 2\n}\n", "", "[2026] a warning\n{\n 1: 2\n}\n"),
        ("[2026] a warning\n{\n}\n", "{\n}\n", "[2026] a warning\n"),
        ('{\n}\n{\n "a": 1\n}\n', '{\n "a": 1\n}\n', "{\n}\n"),
        ('{\n "a": 1', "", '{\n "a": 1'),
    ],
)
def test_what_is_no_document_is_log(log: str, document: str, rest: str) -> None:
    assert passed_on([log]) == (document, rest)
    assert passed_on([log], document=False) == (log, "")


def test_a_log_that_is_read_again_is_passed_on_once() -> None:
    told: list[str] = []
    log = JobLog(told.append, told.append, json=False)
    log.write("one\ntw")
    for pieces in (["on"], ["one\n", "two\nthree\nfo"], ["one\ntwo\nthree\nfour"]):
        log.reopen()
        for piece in pieces:
            log.write(piece)
    log.end()
    assert "".join(told) == "one\ntwo\nthree\nfour"
