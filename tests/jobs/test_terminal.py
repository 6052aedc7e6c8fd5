"""What reaches the terminal: help to read, text in any encoding, no control characters, pipes that end early."""

import contextlib
import importlib.metadata
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import typer
from PIL import Image

import pipeline
from jobs.cli import GROUPS, VERBS, application, main
from jobs.terminal import output
from jobs.terminal.arguments import count
from jobs.terminal.examples import EXAMPLES
from jobs.terminal.output import print_json, printable
from pipeline import VisualMemory

LABELS = {"accent": "café", "kanji": "日本", "escape": "\x1b[31mred", "line": "two\nlines", "bidi": "a\u202eb"}


@pytest.fixture(scope="module")
def odd_memory(digits_memory: VisualMemory, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' memory with images whose labels and paths no terminal should be given as they are."""
    root = tmp_path_factory.mktemp("odd")
    memory = Path(shutil.copytree(digits_memory.uri, root / "memory"))
    images = sorted((digits / "ask/1").iterdir())
    for image, label in zip(images, LABELS.values(), strict=False):
        (root / "source" / label).mkdir(parents=True)
        shutil.copy(image, root / "source" / label / f"{label}.png")
    latin = os.fsencode(root / "source") + b"/caf\xe9"
    os.mkdir(latin)
    with open(latin + b"/one.png", "wb") as stream:
        Image.fromarray(np.full((28, 28), 200, np.uint8)).save(stream, "PNG")
    VisualMemory(memory).add(root / "source")
    return memory


@pytest.fixture
def asked(odd_memory: Path) -> Path:
    return odd_memory.parent / "source" / LABELS["accent"] / f"{LABELS['accent']}.png"


def at(encoding: str, *words: object, **options: Any) -> subprocess.CompletedProcess:
    """A verb in a process of its own whose stdout and stderr have an encoding."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "COLUMNS": "100"}
    command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=100, **options)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, bytes, bytes]]:
    """Run a verb here, with stdout and stderr of an encoding: exit status, and the bytes of both.

    The streams are as Python makes them for PYTHONIOENCODING. A process of its own would import torch each time.
    """

    def run_verb(encoding: str, *words: object) -> tuple[int, bytes, bytes]:
        out, err = io.BytesIO(), io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout := stream_to(out, encoding, "strict"))
            patch.setattr(sys, "stderr", stderr := stream_to(err, encoding, "backslashreplace"))
            with pytest.raises(SystemExit) as ended:
                main([str(word) for word in words])
        for stream in (stdout, stderr):
            stream.flush()
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()

    return run_verb


def stream_to(file: IO[bytes], encoding: str, errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding, errors, newline="\n", write_through=True)


@pytest.mark.parametrize(
    ("verb", "encoding"),
    [
        *(("status {m}", encoding) for encoding in ("ascii", "latin-1", "cp1252", "cp437", "utf-16", "utf-8")),
        *(("history {m}", encoding) for encoding in ("ascii", "utf-8")),
        *(("search {m} {i} -k 104", encoding) for encoding in ("ascii", "cp1252", "utf-8")),
        *(("explain {m} {i}", encoding) for encoding in ("ascii", "cp1252")),
        ("classify {m} {i}", "ascii"),
    ],
)
def test_no_encoding_of_stdout_ends_a_verb(
    odd_memory: Path, asked: Path, written: Callable, verb: str, encoding: str
) -> None:
    words = [word.format(m=odd_memory, i=asked) for word in verb.split(" ")]
    code, printed, err = written(encoding, *words)
    assert code == 0, err
    out = printed.decode(encoding)
    assert b"Traceback" not in err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out.removeprefix("\ufeff"))
    if verb.startswith(("status", "search")):
        assert ("café" if encoding != "ascii" else r"caf\xe9") in out
        assert ("日本" if encoding.startswith("utf") else r"\u65e5\u672c") in out
        assert r"\x1b[31mred" in out
        assert r"two\nlines" in out

    code, document, err = written(encoding, *words, "--json")
    assert code == 0, err
    if encoding != "utf-16":
        assert json.loads(document.decode("utf-8"))
    if verb.startswith("search"):
        labels = {neighbor["label"] for neighbor in json.loads(document.decode(encoding))[0]}
        assert set(LABELS.values()) <= labels


@pytest.mark.parametrize("encoding", ["ascii", "utf-16"])
def test_a_process_writes_the_same_in_its_encoding(odd_memory: Path, written: Callable, encoding: str) -> None:
    done = at(encoding if encoding == "utf-16" else f"{encoding}:strict", "status", odd_memory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding) == written(encoding, "status", odd_memory)[1].decode(encoding)


def test_names_that_are_no_utf8_are_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"uri": "caf\udce9", "other": "日本"})
    assert json.loads(capsys.readouterr().out) == {"uri": "caf\udce9", "other": "日本"}


@pytest.mark.parametrize("words", ["status nowhere-\x1b[31m", "classify {m} two\nlines-\x1b]0;title\x07"])
def test_a_message_shows_control_characters_as_text(odd_memory: Path, written: Callable, words: str) -> None:
    code, _, err = written("utf-8", *(word.format(m=odd_memory) for word in words.split(" ")))
    assert code == 1
    assert b"\x1b" not in err
    assert b"\\x1b" in err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("tab\tand\rreturn", r"tab\tand\rreturn"),
        ("\x9b31mC1", r"\x9b31mC1"),
        ("\x7f\x00", r"\x7f\x00"),
        ("a\u2028b\u2066c", r"a\u2028b\u2066c"),
        ("[bold]not markup[/bold]", "[bold]not markup[/bold]"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text, "utf-8") == shown


def test_printable_in_encodings_that_lack_characters() -> None:
    assert printable("café … █", "ascii") == r"caf\xe9 ... #"
    assert printable("café 日", "latin-1") == r"café \u65e5"
    assert printable("caf\udce9", "utf-8") == r"caf\udce9"
    assert printable("日", None) == r"\u65e5"


@pytest.mark.parametrize("verb", ["status {m}", "status {m} --json", "--help", "add --help"])
def test_a_closed_pipe_ends_quietly(odd_memory: Path, verb: str) -> None:
    words = [word.format(m=odd_memory) for word in verb.split(" ")]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before anything was written, the hardest moment
    err = process.stderr.read().decode()
    assert process.wait(timeout=100) != 0
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert "BrokenPipe" not in err
    assert "error:" not in err


@pytest.mark.parametrize("verb", ["explain {m} {i}", "search {m} {i} -k 100 --json"])
def test_a_pipe_that_closes_amid_an_answer_ends_it_quietly(
    odd_memory: Path,
    asked: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An answer longer than the buffer meets the closed pipe as it is written, not as the process ends."""
    reader, writer = os.pipe()
    os.close(reader)
    pipe = io.TextIOWrapper(io.BufferedWriter(io.FileIO(writer, "w"), buffer_size=256), "utf-8")
    words = [word.format(m=odd_memory, i=asked) for word in verb.split(" ")]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        patch.setattr(output.stdout, "quiet", False)  # Rich sets it for good where a pipe is closed
        with pytest.raises(SystemExit) as ended:
            main(words)
        sys.stdout.flush()  # as the interpreter does at its end: nothing is raised
    assert ended.value.code not in (0, None)
    with contextlib.suppress(BrokenPipeError):
        pipe.close()
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert "error:" not in err


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_stream_that_was_closed_from_the_start_is_no_fault(odd_memory: Path, closed: str) -> None:
    command = shlex.join([sys.executable, "-m", "jobs.cli", "status", str(odd_memory)])
    done = subprocess.run(
        ["/bin/sh", "-c", f"{command} {closed}>&-"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stdout + done.stderr


def test_json_has_the_digits_that_mean_something(capsys: pytest.CaptureFixture[str]) -> None:
    similarity = float(np.float32(0.1) * np.float32(7))
    document = {
        "percent": 100 * (453 / 500),
        "sum": 0.1 + 0.2,
        "third": 1 / 3,
        "similarity": similarity,
        "tiny": 1.5e-45,
        "large": 1.7e308,
        "whole": 3.0,
        "id": (1 << 62) + 1,
        "nested": [{"x": (2.675, True, None)}],
    }
    print_json(document)
    text = capsys.readouterr().out
    found = json.loads(text)
    assert '"percent": 90.6,' in text
    assert '"sum": 0.3,' in text
    assert found["third"] == pytest.approx(1 / 3, abs=1e-12)
    assert np.float32(found["similarity"]) == np.float32(similarity)
    assert len(str(found["similarity"])) < len(str(similarity))
    assert (found["large"], found["whole"], found["id"]) == (1.7e308, 3.0, (1 << 62) + 1)
    assert found["nested"] == [{"x": [2.675, True, None]}]
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            print_json({"value": value})


def test_every_float32_is_written_so_that_it_is_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.uniform(-1, 1, 2_000), [0.0, 1.0, -1.0, 1e-30, 3.4e38]]).astype(np.float32)
    print_json([float(value) for value in values])
    text = capsys.readouterr().out
    assert np.array_equal(np.array(json.loads(text), np.float32), values)
    assert max(len(re.sub(r"[^0-9]", "", line.partition("e")[0]).lstrip("0")) for line in text.splitlines()) <= 9


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("200M", 200_000_000),
        ("1.5K", 1_500),
        ("1B", 10**9),
        ("1.5e9", 1_500_000_000),
        ("1E+6", 10**6),
        ("200_000_000", 200_000_000),
        ("1,000,000", 10**6),
        ("1g", 10**9),
        ("2B", 2 * 10**9),
        ("50,000", 50_000),
        ("50_000", 50_000),
        ("7", 7),
        (" 12 k", 12_000),
        ("-1", -1),
    ],
)
def test_counts_may_have_a_suffix(text: str, number: int) -> None:
    assert count(text) == number


@pytest.mark.parametrize(
    "text", ["many", "", "1.5", "M", "1e-6", "1e", "0x10", "5,00", "1KB", "\u0661\u0660", "1.0001K"]
)
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a whole number"):
        count(text)


def test_every_verb_is_in_one_group_and_has_examples() -> None:
    verbs = [verb for group in GROUPS.values() for verb in group]
    assert sorted(verbs) == sorted(set(verbs)) == sorted(VERBS) == sorted(EXAMPLES)


@pytest.mark.parametrize(
    ("verb", "example"), [(verb, example) for verb, examples in EXAMPLES.items() for example in examples]
)
def test_examples_are_what_their_verb_takes(verb: str, example: str) -> None:
    first, *words = shlex.split(example)
    assert first == verb
    group: Any = typer.main.get_command(application([verb]))
    context = group.commands[verb].make_context(verb, words)
    assert context.args == []


@pytest.mark.parametrize("verb", [*VERBS, None])
def test_help_names_no_types_and_shows_how_to_call_it(capsys: pytest.CaptureFixture[str], verb: str | None) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"] if verb else ["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert not re.search(r"<(bool|str|int|float|list\[.*|path)>", text)
    assert "{" not in text
    if verb is None:
        assert all(f" {group} ─" in text or f" {group} -" in text for group in GROUPS)
    else:
        assert f"visual-memory {EXAMPLES[verb][0]}" in text


def test_usage_as_people_write_it(capsys: pytest.CaptureFixture[str]) -> None:
    usages = {}
    for verb in ("add", "classify", "evaluate", "rollback", "demo", "submit"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        [usages[verb]] = re.findall(r"Usage: visual-memory (.*?) *\n", capsys.readouterr().out)
    assert usages == {
        "add": "add [OPTIONS] MEMORY SOURCE",
        "classify": "classify [OPTIONS] MEMORY IMAGE...",
        "evaluate": "evaluate [OPTIONS] MEMORY [SOURCE]",
        "rollback": "rollback [OPTIONS] MEMORY [VERSION]",
        "demo": "demo [OPTIONS]",
        "submit": "submit [OPTIONS] [VERB ...]",
    }


def test_help_says_what_is_true_of_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, words in (("index", "Build in this process"), ("classify", "With --out one SOURCE"), ("add", "Embed in")):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert words in re.sub(r"[│\s]+", " ", capsys.readouterr().out)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"visual-memory {pipeline.__version__}\n")
    assert pipeline.__version__ == importlib.metadata.version("visual-memory")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_verbs_and_options(shell: str) -> None:
    asked = {"COMP_WORDS": "visual-memory pl", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "visual-memory pl"}
    options = {
        "COMP_WORDS": "visual-memory add --thu",
        "COMP_CWORD": "2",
        "_TYPER_COMPLETE_ARGS": "visual-memory add --thu",
    }
    for words, expected in ((asked, "plan-capacity"), (options, "--thumbnails")):
        environment = (
            os.environ
            | words
            | {
                "_VISUAL_MEMORY_COMPLETE": f"complete_{shell}",
                "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            }
        )
        done = subprocess.run(
            [sys.executable, "-c", "import sys; sys.argv = ['visual-memory']; from jobs.cli import main; main()"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert expected in done.stdout, done.stderr


def in_terminal(words: list[object], typed: str) -> tuple[int, str]:
    """A verb at a real terminal, with what somebody types once it asks; its exit status and all that was shown."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *map(str, words)], stdin=slave, stdout=slave, stderr=slave, close_fds=True
    )
    os.close(slave)
    shown, answered = b"", False
    while True:
        ready, _, _ = select.select([master], [], [], 100)
        assert ready, shown
        try:
            shown += os.read(master, 4_096)
        except OSError:  # the other end was closed
            break
        if b"[y/N]" in shown and not answered:
            os.write(master, typed.encode())
            answered = True
    os.close(master)
    return process.wait(timeout=100), shown.decode()


@pytest.fixture
def memory(digits_memory: VisualMemory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_memory.uri, tmp_path / "memory"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_erasing_asks_at_a_terminal(memory: Path) -> None:
    before = contents(memory)
    for answer in ("n\n", "\n"):
        code, shown = in_terminal(["forget", memory, "--label", "3", "--erase"], answer)
        assert code == 1
        assert "erase 20 entries from every file and every version: label 3 (20); dataset remember (20)?" in shown
        assert "nothing was changed" in shown
        assert contents(memory) == before
    code, shown = in_terminal(["forget", memory, "--label", "3", "--erase"], "y\n")
    assert (code, "erased 20 entries from every file and every version" in shown) == (0, True)
    assert VisualMemory(memory).status()["entries"] == 80


def test_erasing_asks_nobody_with_yes_or_without_a_terminal(memory: Path) -> None:
    code, shown = in_terminal(["forget", memory, "--label", "3", "--erase", "--yes"], "")
    assert (code, "[y/N]" in shown) == (0, False)
    done = at("utf-8", "forget", memory, "--label", "2", "--erase", stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert VisualMemory(memory).status()["entries"] == 60


def test_forgetting_can_be_undone_and_asks_nothing(memory: Path) -> None:
    code, shown = in_terminal(["forget", memory, "--label", "3"], "")
    assert (code, "[y/N]" in shown, "forgot 20 entries" in shown) == (0, False, True)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_verb(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(exited.value.code or 0), printed.out, printed.err

    return run_verb


def test_a_dry_run_says_what_would_go_and_changes_nothing(run: Callable, memory: Path) -> None:
    entry = VisualMemory(memory).live().live_ids()[0]
    assert run("forget", memory, "--id", entry)[1].endswith("from version 2 on returns it\n")
    before = contents(memory)
    code, out, _ = run("forget", memory, "--dataset", "remember", "--dry-run")
    assert code == 0
    assert out.startswith("would forget 99 entries: label ")
    assert "and 0 more" not in out
    assert "dataset remember (99); nothing was changed" in out
    code, out, _ = run("forget", memory, "--dataset", "remember", "--erase", "--dry-run")
    assert "would erase 100 entries from every file and every version, 1 of them forgotten before: label " in out
    code, out, _ = run("forget", memory, "--label", "1", "--dry-run", "--json")
    assert (code, json.loads(out)) == (
        0,
        {
            "would_forget": 20,
            "would_erase": None,
            "labels": {"1": 20},
            "unlabelled": 0,
            "datasets": {"remember": 20},
            "version": 2,
        },
    )
    assert run("forget", memory, "--label", "nine", "--dry-run")[0] == 1
    assert run("forget", memory, "--dry-run")[0] == 2
    assert run("forget", memory, "--label", "1", "--dry-run", "--verify")[0] == 2
    assert contents(memory) == before


def test_evaluating_by_a_label_set_says_what_it_left_out(
    run: Callable, memory: Path, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "map.csv").write_text("label,mapped\n0,even\n2,even\n4,even\n1,odd\n")
    assert run("relabel", memory, "--label-set", "parity", "--map", tmp_path / "map.csv")[0] == 0
    source = Path(shutil.copytree(digits / "ask", tmp_path / "ask"))
    (source / "1" / "broken.png").write_bytes(b"broken")
    shutil.copy(next((source / "1").glob("0*.png")), source / "loose.png")
    code, out, _ = run("evaluate", memory, source, "--label-set", "parity", "-k", 10)
    assert code == 0
    assert (
        "40 queries (1 more could not be read, 1 more without a label, 10 more of labels that the label set parity has "
        "no word for)"
    ) in out
    found = json.loads(run("evaluate", memory, source, "--label-set", "parity", "-k", 10, "--json")[1])
    assert (found["skipped"], found["unreadable"], found["without_word"]) == (12, 1, 10)


def test_a_hub_that_does_not_answer_is_told_in_a_line(tmp_path: Path, digits: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "jobs.cli", "add", str(tmp_path / "memory"), str(digits / "ask")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if not re.match(r"(opening|loading|listing)", line)]
    assert re.fullmatch(
        r"error: the weights of vit_small_patch14_dinov2.lvd142m could not be fetched from timm's hub "
        r"\(http://127.0.0.1:9 does not answer: .*\): check the network, or give --weights FILE",
        line,
    )
    waited = max([int(seconds) for seconds in re.findall(r"loading the encoder: for (\d+) s", done.stderr)], default=0)
    assert waited <= 10 + 5 * os.getloadavg()[0]
