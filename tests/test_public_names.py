"""The public names: what users may rely on, under both names of the package, and typed."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
import visual_memory

ROOT = Path(__file__).parents[1]
NAMES = {
    "AddOptions",
    "AddPlan",
    "AddReport",
    "BulkReport",
    "CapacityPlan",
    "Client",
    "ClusterError",
    "CommitConflict",
    "CompactReport",
    "CopyReport",
    "DamagedFile",
    "Decision",
    "EncoderChoice",
    "EncoderError",
    "Evaluation",
    "ExpireReport",
    "ExportReport",
    "ForgetReport",
    "FormatError",
    "IdentityMismatch",
    "IndexBuildError",
    "IndexOptions",
    "InfluenceReport",
    "LibraryError",
    "MemoryMissing",
    "MissingExtra",
    "MissingFile",
    "Neighbor",
    "NotPermitted",
    "OutOfMemory",
    "Overloaded",
    "Progress",
    "Question",
    "Receipt",
    "RelabelReport",
    "RollbackReport",
    "SourceError",
    "StorageError",
    "Suspect",
    "SuspectsReport",
    "Unavailable",
    "UnknownName",
    "UsageError",
    "Verification",
    "VersionSummary",
    "VisualMemory",
    "VisualMemoryError",
    "WorkerError",
    "__version__",
}


def test_the_public_names_stay() -> None:
    assert pipeline.__all__ == visual_memory.__all__
    assert set(pipeline.__all__) == NAMES
    for name in NAMES:
        assert getattr(pipeline, name) == getattr(visual_memory, name)
        assert name in dir(pipeline)
        assert name in dir(visual_memory)
    assert not hasattr(visual_memory, "Nothing")


def test_type_checkers_see_the_names_that_are_loaded() -> None:
    """They read the imports, and the program reads the table beside them."""
    [imports, _] = [node for node in ast.parse(Path(pipeline.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {
        alias.asname: node.module for node in imports.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == pipeline._MODULES


def test_every_error_is_public_or_is_one_that_is() -> None:
    for error in vars(pipeline.errors).values():
        if isinstance(error, type) and issubclass(error, pipeline.VisualMemoryError):
            assert any(getattr(pipeline, base.__name__, None) is base for base in error.__mro__)


@pytest.mark.slow  # mypy reads everything anew: its cache is that of another folder
def test_users_see_types(tmp_path: Path) -> None:
    """With mypy, as a user's own program is checked: the marker is there, and the names have types."""
    (tmp_path / "program.py").write_text(
        "import visual_memory\n"
        "memory = visual_memory.VisualMemory('memory')\n"
        "for decision in memory.classify(['a.jpg'], k=3, where='id > 3'):\n"
        "    reveal_type(decision.neighbors[0].similarity)\n"
        "memory.classify(['a.jpg'], wher='id > 3')\n"
    )
    # With the settings of `make lint`, what that found out about our modules is taken from its cache.
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *settings, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert 'Revealed type is "float"' in done.stdout.replace("builtins.", "")
    assert "wher" in done.stdout
    assert (ROOT / "pipeline/py.typed").exists()
    assert (ROOT / "visual_memory/py.typed").exists()


def test_parts_are_loaded_when_they_are_asked_for() -> None:
    code = "import sys, visual_memory; visual_memory.UsageError, visual_memory.Question; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_a_file_of_ones_own_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """`pipeline.py` in a working folder hides the package of that name from others, and not from this one."""
    (tmp_path / "pipeline.py").write_text("raise SystemExit('mine')")
    done = subprocess.run(
        [sys.executable, "-c", "import visual_memory; print(visual_memory.VisualMemory.__name__)"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert (done.stdout, done.stderr) == ("VisualMemory\n", "")


def test_a_decision_shows_itself_short_and_in_a_notebook() -> None:
    neighbors = tuple(pipeline.Neighbor(rank, rank, f"/<{rank}>.png", "a&b", 0.5, "d", 1.0, 0.1) for rank in range(12))
    decision = pipeline.Decision("x.png", "a&b", 0.9, 0.2, False, "rank", 12, {"a&b": 0.9}, neighbors, 3, 1, 1)
    assert len(repr(decision)) < 150
    page = decision._repr_html_()
    assert page.count("<tr>") == 11
    assert "and 2 more" in page
    assert "a&amp;b" in page
    assert "/&lt;0&gt;.png" in page
    assert "no decision" in dataclasses.replace(decision, label=None, abstained=True, reason="too close")._repr_html_()


def test_reports_are_tables(digits_memory: pipeline.VisualMemory, digits: Path) -> None:
    evaluation = digits_memory.evaluate(digits / "ask", ks=(1, 5), votings=("rank", "plurality"))
    table = evaluation.to_pandas()
    assert list(table.columns) == ["voting", "k", "accuracy", "balanced_accuracy"]
    assert len(table) == 4
    assert digits_memory.verify().to_arrow().num_rows == 0
    assert len(repr(evaluation)) < 2_000


def test_every_public_method_is_described() -> None:
    """Args for every parameter by its name, and an example where users begin."""
    for kind in (pipeline.VisualMemory, pipeline.Client):
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            if name.startswith("_"):
                continue
            said = inspect.getdoc(method) or ""
            assert said, f"{kind.__name__}.{name}"
            parameters = [p for p in inspect.signature(method).parameters if p != "self"]
            missing = [p for p in parameters if f"{p}:" not in said and f"{p}," not in said]
            assert missing == [], f"{kind.__name__}.{name}"
    for name in ("add", "classify", "search", "forget", "relabel", "index"):
        assert "Example:" in (inspect.getdoc(getattr(pipeline.VisualMemory, name)) or ""), name
