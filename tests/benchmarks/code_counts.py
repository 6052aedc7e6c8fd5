"""Count what makes the code costly to change, in a checkout of any release.

    python -m tests.benchmarks.code_counts PATH

- rereads: handlers of damage that read again by hand, or look by hand whether versions or erasures moved meanwhile;
- path_files: files with a literal of a folder of a memory within a longer path;
- option_lists: classes and functions that list four or more options of a question;
- wide: functions of more than 8 parameters outside of jobs/;
- long: files of more than 300 lines;
- rooms, arrows, flat: folders with modules, pairs of them of which one imports from the other, most modules in one;
- arrows_above: the same pairs, of the folders directly below pipeline/;
- words: definitions (modules, classes, functions) whose whole name is an overloaded word.
"""

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

OPTIONS = {"voting", "exclude", "weigh", "assume", "balance", "abstain_below", "label_set", "where"}
FOLDERS = "versions|segments|index|labels|tombstones|erasures|encoder|packs|leases|thumbnails|singles|checkpoints"
WORDS = ("kept", "found", "facts", "candidates", "plan", "group", "share", "fold", "hold", "held", "standing", "named")
MOVED = re.compile(r"\.(kept|latest|newest|retained)\(|\.erasures")

Module = tuple[Path, ast.Module]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def called(nodes: list[ast.stmt]) -> set[str]:
    return {ast.unparse(n.func) for node in nodes for n in ast.walk(node) if isinstance(n, ast.Call)}


def rereads(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                kind = ast.unparse(handler.type) if handler.type is not None else ""
                body = "\n".join(map(ast.unparse, handler.body))
                if re.search("Damaged|Missing", kind) and (
                    called(handler.body) & called(node.body) or MOVED.search(body)
                ):
                    yield handler.lineno


def wide(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len([name for name in names if name not in ("self", "cls")]) > 8:
                yield node.name


def option_lists(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        names: set[str] = set()
        if isinstance(node, Function):
            names = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
        elif isinstance(node, ast.ClassDef):
            names = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        if len(OPTIONS & names) >= 4:
            yield node.name  # type: ignore[attr-defined]


def path_literals(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant):
            text = ast.unparse(node)
            if len(text) < 200 and re.search(rf"""['"/](?:{FOLDERS})/(?=[\\{{\\(\\\\0-9])""", text):
                yield text


def words(path: Path, tree: ast.Module) -> Iterator[str]:
    yield path.stem.strip("_")
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name.lower().strip("_")


def arrows(root: Path, modules: list[Module]) -> set[tuple[str, str]]:
    known = {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p, _ in modules}
    made = set()
    for path, tree in modules:
        room = ".".join(path.parent.relative_to(root).parts)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    target = full if full in known else node.module
                    if target in known and target.rpartition(".")[0] not in ("", room):
                        made.add((room, target.rpartition(".")[0]))
    return made


def first_floor(room: str) -> str:
    return ".".join(room.split(".")[:2])


def counts(root: Path) -> dict:
    files = sorted((root / "pipeline").rglob("*.py"))
    modules = [(path, ast.parse(path.read_text())) for path in files]

    def every(look: object) -> list[str]:
        return [f"{path.relative_to(root)}:{at}" for path, tree in modules for at in look(tree)]  # type: ignore[operator]

    said = Counter(word for path, tree in modules for word in words(path, tree))
    per_folder = Counter(path.parent for path in files if path.name != "__init__.py")
    where = {look.__name__: every(look) for look in (rereads, option_lists, wide)}
    path_files = sorted({str(path.relative_to(root)) for path, tree in modules if any(path_literals(tree))})
    return {
        "modules": len(files),
        **{name: len(places) for name, places in where.items()},
        "path_files": len(path_files),
        "long": sum(len(path.read_text().splitlines()) > 300 for path in files),
        "rooms": len(per_folder),
        "arrows": len(made := arrows(root, modules)),
        "arrows_above": len({(a, b) for a, b in (map(first_floor, pair) for pair in made) if a != b}),
        "flat": max(per_folder.values()),
        "words": {word: said[word] for word in WORDS if said[word]},
        "where": where | {"path_files": path_files},
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(counts(Path(sys.argv[1])), indent=1) + "\n")
