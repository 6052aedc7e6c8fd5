"""Each option of a question says the same on the command line, in the library, in bulk, over HTTP and by the client."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from pipeline import Client, VisualMemory
from pipeline.decisions.decision import Decision
from pipeline.decisions.question import Question
from pipeline.errors import UsageError
from tests.serving.serving import Served, served


@dataclass
class Asked:
    """A memory that is served, an image, and ids of its nearest neighbours."""

    memory: VisualMemory
    server: Served
    image: Path
    ids: list[int]

    def value(self, option: str) -> Any:
        """A value of an option that changes what is decided about the image."""
        first, second, *_ = self.ids
        values = {
            "k": 3,
            "voting": "softmax",
            "exclude": [first, second],
            "weigh": {first: 0.25, second: 3.0},
            "assume": {first: "seven", second: "seven"},
            "balance": 0.5,
            "abstain_below": 1.0,
            "label_set": "size",
            "where": f"id > {sorted(self.ids)[5]}",
        }
        assert set(values) == {each.name for each in fields(Question)}, "give the new option a value"
        return values[option]

    def arguments(self, option: str) -> list[str]:
        """The same on the command line."""
        value, flag = self.value(option), f"--{option.replace('_', '-')}"
        if isinstance(value, dict):
            return [text for entry_id, each in value.items() for text in (flag, f"{entry_id}={each}")]
        if isinstance(value, list):
            return [text for each in value for text in (flag, str(each))]
        return [flag, str(value)]


@pytest.fixture(scope="module")
def asked(digits_memory: VisualMemory, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    root = tmp_path_factory.mktemp("question")
    digits_memory.copy(root / "memory")
    memory = VisualMemory(root / "memory")
    memory.forget(ids=memory.live().matching(label="0")[:10].tolist())  # so that a balance weighs
    memory.relabel(label_set="size", map={label: "small" if label in "01" else "large" for label in "01234"})
    image = sorted((digits / "ask" / "3").iterdir())[0]
    ids = [neighbor.id for neighbor in memory.search([image], k=10)[0]]
    with served(memory.uri) as server:
        yield Asked(memory, server, image, ids)


def assert_same(printed: dict, decision: Decision) -> None:
    """What the command line prints is rounded to twelve digits."""
    expected = decision.to_json()
    weights = [[neighbor["weight"] for neighbor in document.pop("neighbors")] for document in (printed, expected)]
    assert weights[0] == pytest.approx(weights[1], abs=1e-11)
    for name in ("confidence", "margin", "votes"):
        assert printed.pop(name) == pytest.approx(expected.pop(name), abs=1e-11)
    assert printed == expected


@pytest.mark.parametrize("option", [each.name for each in fields(Question)])
def test_an_option_says_the_same_everywhere(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    question = Question(**{option: asked.value(option)})
    assert Question.from_json(json.loads(json.dumps(question.to_json()))) == question
    [usual] = asked.memory.classify([asked.image])
    [decision] = asked.memory.classify([asked.image], question=question)
    assert decision != usual, "the value changes nothing, so that it tells nothing"
    keywords = {} if option in ("k", "voting") else {option: asked.value(option)}
    positional = {option: asked.value(option)} if option in ("k", "voting") else {}
    assert asked.memory.classify([asked.image], **positional, **keywords) == [decision]

    capsys.readouterr()
    with pytest.raises(SystemExit) as exited:
        main(["classify", asked.memory.uri, str(asked.image), "--json", *asked.arguments(option)])
    assert exited.value.code in (0, None)
    [printed] = json.loads(capsys.readouterr().out)
    assert_same(printed, decision)

    with Client(asked.server.url) as client:
        [answered] = client.classify([asked.image], question=question)
        [spelt_out] = client.classify([asked.image], **positional, **keywords)
    assert answered == spelt_out
    assert answered == replace(decision, uri=None)

    out = tmp_path / "out"
    asked.memory.classify_source(asked.image.parent, out, question=question)
    rows = [row for file in sorted((out / "decisions").iterdir()) for row in pq.read_table(file).to_pylist()]
    [row] = [row for row in rows if row["uri"].endswith(asked.image.name)]
    assert row["label"] == decision.label
    assert row["confidence"] == pytest.approx(decision.confidence, rel=1e-5)  # images of a source are embedded together
    assert [neighbor["id"] for neighbor in row["neighbors"]] == [n.id for n in decision.neighbors]
    told = json.loads((out / "job.json").read_text())["options"]
    said = told["rule"] | told
    assert said[option] == question.to_json()[option]


def test_a_question_and_options_besides_are_refused(asked: Asked) -> None:
    for ask in (asked.memory.classify, asked.memory.explain):
        image: Any = [asked.image] if ask == asked.memory.classify else asked.image
        with pytest.raises(UsageError, match="a question was given, and where besides"):
            ask(image, question=Question(), where="id > 3")
