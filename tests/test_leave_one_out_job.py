"""Leave-one-out as a job over parts: the result of one process, killed and continued, here and on Ray."""

from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from jobs.cli import main
from pipeline import VisualMemory
from pipeline.errors import UsageError
from pipeline.index.build.plan import IndexOptions
from pipeline.progress import Progress
from pipeline.questions import leave_one_out_job, others
from pipeline.questions.others import labelled_in_part, starts_of_parts
from tests.conftest import MakeMemory
from tests.edits.given import add_given, unit

VOTINGS = ("rank", "plurality")


@pytest.fixture
def memory(make_memory: MakeMemory, monkeypatch: pytest.MonkeyPatch) -> VisualMemory:
    """Several parts: a large and a small segment with copies across, an index, forgotten and relabelled entries."""
    monkeypatch.setattr(others, "MAX_PART_ROWS", 300)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 1_200)
    vectors_ND = unit(rng.normal(size=(5, 8))[labels] + 1.2 * rng.normal(size=(1_200, 8)))
    names = [f"class {label}" if label else None for label in labels]
    memory = make_memory(vectors_ND, names)
    memory.index(IndexOptions(key="IVF4,Flat"))
    add_given(memory.log, vectors_ND[:130], names[:130])
    ids = memory.live().live_ids()
    memory.forget(ids=ids[10:40].tolist())
    memory.relabel(ids=[int(ids[3])], label="class 2")
    return memory


def killed_at(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    do = leave_one_out_job._Asker.do

    def dies(self: leave_one_out_job._Asker, number: int) -> object:
        if number == part:
            raise KeyboardInterrupt
        return do(self, number)

    monkeypatch.setattr(leave_one_out_job._Asker, "do", dies)


def test_parts_hold_each_labelled_entry_once(memory: VisualMemory) -> None:
    live, starts = memory.live(), starts_of_parts(memory.state())
    assert len(starts) > 3
    found = [labelled_in_part(live, starts, part) for part in range(len(starts))]
    assert np.concatenate([ids for ids, _ in found]).tolist() == np.sort(live.live_ids(labelled=True)).tolist()
    assert all((live.codes_of(ids) == codes).all() for ids, codes in found)


@pytest.mark.parametrize("balance", [0.0, "auto"])
def test_the_result_is_that_of_one_process(memory: VisualMemory, tmp_path: Path, balance: float) -> None:
    seen: list[Progress] = []
    options = {"ks": [1, 10], "votings": VOTINGS, "balance": balance}
    whole = memory.evaluate_leave_one_out(**options, sample="all")
    found = memory.evaluate_leave_one_out(**options, out=tmp_path / "out", on_progress=seen.append)
    assert found == whole
    assert found.sampling_error is None
    parts = [moment.done for moment in seen if moment.stage == "asking about entries"]
    assert parts == sorted(parts)
    assert parts[-1] == whole.num_queries == seen[-1].total
    assert len(parts) > 3
    rows = ds.dataset(tmp_path / "out/decisions", format="parquet").to_table()
    assert rows.schema.field("right_rank_10").type == pa.bool_()
    assert rows.num_rows == whole.num_queries
    right = np.mean(rows.column("right_plurality_1").to_numpy()) * 100
    assert right == whole.accuracy["plurality"][1]
    assert memory.evaluate_leave_one_out(**options, out=tmp_path / "out") == whole


def test_a_killed_job_goes_on_by_the_version_it_began_with(
    memory: VisualMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = memory.evaluate_leave_one_out(ks=[5], where="dataset != 'x'")
    with monkeypatch.context() as killed:
        killed_at(2, killed)
        with pytest.raises(KeyboardInterrupt):
            memory.evaluate_leave_one_out(ks=[5], where="dataset != 'x'", out=tmp_path / "out")
    done = set((tmp_path / "out/done").iterdir())
    assert len(done) == 2
    (tmp_path / "out/decisions/000002-of-a-dead-worker.parquet").write_bytes(b"half")
    memory.forget(labels=["class 1"])
    seen: list[Progress] = []
    found = memory.evaluate_leave_one_out(ks=[5], where="dataset != 'x'", out=tmp_path / "out", on_progress=seen.append)
    assert found == whole
    assert seen[0].done > 0
    assert not (tmp_path / "out/decisions/000002-of-a-dead-worker.parquet").exists()


def test_mistakes_change_nothing(memory: VisualMemory, tmp_path: Path) -> None:
    memory.evaluate_leave_one_out(ks=[5], out=tmp_path / "out")
    with pytest.raises(UsageError, match="made with other options"):
        memory.evaluate_leave_one_out(ks=[4], out=tmp_path / "out")
    with pytest.raises(UsageError, match="has other files in it"):
        memory.evaluate_leave_one_out(ks=[4], out=memory.uri)
    with pytest.raises(UsageError, match="`sample` is 9: leave one of them out"):
        memory.evaluate_leave_one_out(ks=[4], sample=9, out=tmp_path / "no")
    with pytest.raises(UsageError, match="say where to in `out`"):
        memory.evaluate_leave_one_out(ks=[4], runner="ray")
    assert not (tmp_path / "no").exists()


def test_on_the_command_line(
    memory: VisualMemory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*rest: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", memory.uri, "--leave-one-out", "-k", "5", *rest, "--json"])
        said = capsys.readouterr()
        return ended.value.code, said.err if ended.value.code else said.out

    out = ["--out", str(tmp_path / "out")]
    with monkeypatch.context() as killed:
        killed_at(1, killed)
        code, said = answer(*out)
    assert code == 130
    assert "run the same command again" in said
    assert answer(*out) == answer()
    assert answer(*out, "--sample", "9")[0] == 2
    assert answer("--runner", "ray") == (2, ANY)


@pytest.mark.slow
def test_on_ray(memory: VisualMemory, tmp_path: Path) -> None:
    from jobs.ray_cluster.on_ray import start_ray

    whole = memory.evaluate_leave_one_out(ks=[1, 10])
    start_ray()
    assert memory.evaluate_leave_one_out(ks=[1, 10], out=tmp_path / "out", runner="ray") == whole
