"""The floors of the house: no import runs up, none in a circle, and the heavy libraries stay in their rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import from its own room and from the rooms below it; rooms on one line may not know each other.
FLOORS: list[set[str]] = [
    {"pipeline.errors", "pipeline.plain_log", "pipeline.progress"},
    {"pipeline.deadline", "pipeline.extras", "pipeline.foreign_errors", "pipeline.resources"},
    {"pipeline.steps", "pipeline.tabular"},
    {"pipeline.recent"},
    {"pipeline.decisions"},
    {"pipeline.store.values"},
    {"pipeline.store.layout"},
    {"pipeline.store.storage"},
    {"pipeline.store.tables"},
    {"pipeline.store.segments"},
    {"pipeline.store.log"},
    {"pipeline.store.lookup", "pipeline.store.checks"},
    {"pipeline.images.decoding", "pipeline.images.names", "pipeline.index.search"},
    {"pipeline.images.reading", "pipeline.index.build"},
    {"pipeline.images.labels", "pipeline.index.verify", "pipeline.index.centroids"},
    {"pipeline.images.containers"},
    {"pipeline.images.sources", "pipeline.images.entry_pictures"},
    {"pipeline.embeddings"},
    {"pipeline.runner"},
    {"pipeline.edits.erasure"},
    {"pipeline.edits"},
    {"pipeline.questions"},
    {"pipeline.reader"},
    {"pipeline.visual_memory"},
    {"pipeline.serving.limits", "pipeline.serving.access", "pipeline.serving.encoded", "pipeline.serving.threads"},
    {"pipeline.serving.tokens", "pipeline.serving.client", "pipeline.serving.metrics"},
    {"pipeline.serving.service"},
    {"pipeline.serving.options", "pipeline.serving.in_process"},
    {"pipeline.serving.http"},
    {"pipeline.serving.application"},
    {"jobs.ray_cluster"},
    {"jobs.terminal"},
    {"jobs"},
    {"cluster"},
]
RAY_MAY_APPEAR = {"on_ray.py", "serving_on_ray.py", "submit.py"}
SERVING_WITH_RAY = {"pipeline.serving.application", "pipeline.serving.metrics"}


def modules() -> list[Path]:
    return sorted(path for folder in ("pipeline", "jobs", "cluster") for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(name: str) -> tuple[int, str] | None:
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if name == room or name.startswith(f"{room}."):
                return floor, room
    return None


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_run_down(path: Path) -> None:
    if dotted(path) == "pipeline":
        return  # the lazy door to VisualMemory, which every floor is allowed to be behind
    if not path.read_text():
        return  # the folder of some rooms
    own = room_of(dotted(path))
    assert own is not None, f"{path} is in no room: give it one in FLOORS"
    for name in imports_of(path):
        if name == "pipeline.VisualMemory":
            assert own[1] in {"jobs", "cluster"}
            continue
        other = room_of(name)
        if other is None or other[1] == own[1]:
            continue
        assert other[0] < own[0], f"{dotted(path)} imports {name} from above or beside it"


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_of(path)}
    room = dotted(path)
    if "ray" in tops:
        assert path.name in RAY_MAY_APPEAR or room in SERVING_WITH_RAY
    if tops & {"torch", "timm"}:
        assert room.startswith("pipeline.embeddings") or room == "pipeline.index.build.gpu"
    if tops & {"faiss", "autofaiss"}:
        assert room.startswith("pipeline.index")
    if room.startswith("pipeline.decisions"):
        assert tops <= {"numpy", "html", "dataclasses", "typing", "collections", "pipeline"}


def test_modules_make_no_circle() -> None:
    known = {dotted(path) for path in modules()}
    edges = {
        dotted(path): {
            target
            for name in imports_of(path)
            for target in (name, name.rpartition(".")[0])
            if target in known - {"pipeline"}
        }
        for path in modules()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in edges[module] - {module}:
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_embeddings_import_without_ray_and_faiss() -> None:
    """A GPU host may have torch and timm only: nothing but on_ray.py may need more."""
    seen: set[str] = set()
    todo = [path for path in (ROOT / "pipeline/embeddings").glob("*.py") if path.name != "on_ray.py"]
    while todo:
        path = todo.pop()
        names = imports_of(path)
        assert not {name.split(".")[0] for name in names} & {"ray", "faiss", "autofaiss"}, path
        for name in names:
            for target in (name, name.rpartition(".")[0]):
                file = ROOT / (target.replace(".", "/") + ".py")
                if target.startswith("pipeline.") and file.exists() and target not in seen:
                    seen.add(target)
                    todo.append(file)


def test_verbs_without_an_encoder_wait_for_neither_torch_nor_ray() -> None:
    code = "import sys, jobs.cli; from pipeline import VisualMemory; print({'torch', 'timm', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
