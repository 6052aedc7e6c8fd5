"""What `index_peers` has measured, drawn: recall against queries/s, latency, build time and bytes, light and dark.

    python -m tests.benchmarks.index_plots index_peers.json --out FOLDER

Needs matplotlib. Writes SVG: `index-batch`, `index-single` and `index-cost`, each for a light and a dark page.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit("drawing needs matplotlib: pip install matplotlib")

matplotlib.use("svg")
from matplotlib import pyplot  # after the choice of what draws
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INKS = {"light": ("#1f2328", "#d0d7de", "#ffffff"), "dark": ("#e6edf3", "#3d444d", "#0d1117")}  # text, grid, page
OURS = {"light": ("#cf222e", "#bc4c00", "#bf3989"), "dark": ("#ff7b72", "#ffa657", "#f778ba")}
PEERS = {
    "light": ("#0969da", "#54aeff", "#1a7f37", "#6fb77f", "#8250df", "#b692f6", "#57606a", "#9a6700", "#0a7d91"),
    "dark": ("#58a6ff", "#a5d6ff", "#3fb950", "#9be9a8", "#bc8cff", "#e2c5ff", "#9198a1", "#d29922", "#39c5cf"),
}
MARKERS = "osD^vP*Xph<>"
LEAST_RECALL = 0.5
LEAST_MISSED = 0.0005  # of the neighbours: what is nearer to a recall of 1 is drawn here


def name_of(contender: dict, path: str | None) -> str:
    """What the legend says."""
    name = str(contender["name"])
    if not name.startswith("ours"):
        return name
    key = contender["build"].get("key", "")
    given = " (given)" if " " in name else ""
    return f"memory, {key}{given}" + (", candidates only" if path == "candidates" else "")


def curves(document: dict) -> list[tuple[dict, str, list[dict]]]:
    """Each contender's curve with its name; a memory has one of its candidates and one of its whole search."""
    found = []
    for contender in document["contenders"]:
        points = contender.get("points", [])
        for path in dict.fromkeys(point["effort"].get("path") for point in points):
            here = [point for point in points if point["effort"].get("path") == path]
            found.append((contender, name_of(contender, path), here))
    return found


def missed(point: dict) -> float:
    """The share of the ten nearest that was not found, as it is drawn."""
    return max(1 - float(point["recall_at_10"]), LEAST_MISSED)


def frontier(points: Sequence[dict], value: str, *, more: bool) -> list[dict]:
    """Points that no other point beats in recall and in a value at once, by recall; `more` of the value is better."""
    best: list[dict] = []
    for point in sorted(points, key=lambda p: (missed(p), -p[value] if more else p[value])):
        if not best or (point[value] > best[-1][value] if more else point[value] < best[-1][value]):
            best.append(point)
    return best[::-1]


def colours(document: dict, theme: str) -> dict[str, str]:
    """One colour for each contender: warm ones for memories."""
    ours, peers = iter(OURS[theme] * 4), iter(PEERS[theme] * 2)
    names = (str(contender["name"]) for contender in document["contenders"])
    return {name: next(ours if name.startswith("ours") else peers) for name in names}


def drawn_curves(document: dict, theme: str, value: str, label: str, *, more: bool) -> Figure:
    """Recall@10 against a value on a logarithmic scale; the recall axis is stretched towards 1."""
    figure, axes = pyplot.subplots(figsize=(8.4, 5.2), layout="constrained")
    colour = colours(document, theme)
    for number, (contender, name, points) in enumerate(curves(document)):
        line = [point for point in frontier(points, value, more=more) if point["recall_at_10"] >= LEAST_RECALL]
        ours = contender["name"].startswith("ours")
        axes.plot(
            [missed(point) for point in line],
            [point[value] for point in line],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=2.4 if ours else 1.4,
            linestyle="--" if name.endswith("only") else "-",
            color=colour[contender["name"]],
            label=name,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log")
    axes.set_xlim(1 - LEAST_RECALL, LEAST_MISSED * 0.8)
    ticks = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
    axes.set_xticks([1 - tick for tick in ticks], [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_yscale("log")
    axes.set_xlabel("recall@10")
    axes.set_ylabel(label)
    axes.set_title(title(document), loc="left", fontsize=10, color=INKS[theme][0])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=INKS[theme][0])
    coloured(figure, axes, theme)
    return figure


def drawn_costs(document: dict, theme: str) -> Figure:
    """Bars: seconds of a build, its peak memory, and bytes on disk and in memory while searching."""
    measured = [contender for contender in document["contenders"] if contender.get("build")]
    names = [name_of(contender, None) for contender in measured]
    kinds = (
        ("build, seconds", lambda c: c["build"]["seconds"]),
        ("peak of the build, MB", lambda c: c["build"]["peak_bytes"] / 1e6),
        ("on disk, MB", lambda c: c["build"]["searched_bytes"] / 1e6),
        ("resident while searching, MB", lambda c: c["memory"]["resident_bytes"] / 1e6 if "memory" in c else 0.0),
    )
    height = 1.2 + 0.34 * len(measured)
    figure, row = pyplot.subplots(1, len(kinds), figsize=(11.5, height), sharey=True, layout="constrained")
    colour = colours(document, theme)
    for axes, (label, value) in zip(row, kinds, strict=True):
        bars = axes.barh(names, [value(c) for c in measured], color=[colour[c["name"]] for c in measured], height=0.7)
        axes.bar_label(bars, fmt=_figure, padding=3, fontsize=8, color=INKS[theme][0])
        axes.margins(x=0.25)
        axes.set_title(label, loc="left", fontsize=9, color=INKS[theme][0])
        coloured(figure, axes, theme)
        axes.grid(visible=False)
        axes.set_xticks([])
    row[0].invert_yaxis()
    return figure


def title(document: dict) -> str:
    machine = document["machine"]
    return (
        f"{document['rows']:,} vectors of {document['dimension']} dimensions, {document['threads']} threads of "
        f"{machine['processor']}, {machine['date']}"
    )


def coloured(figure: Figure, axes: Axes, theme: str) -> None:
    """Ink and page of a theme."""
    ink, grid, page = INKS[theme]
    figure.set_facecolor(page)
    axes.set_facecolor(page)
    axes.grid(visible=True, color=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(ink)
    for spine in axes.spines.values():
        spine.set_color(grid)


def save(figure: Figure, path: Path, **options: Any) -> None:
    figure.savefig(path, facecolor=figure.get_facecolor(), metadata={"Date": None}, **options)
    pyplot.close(figure)
    print(path, file=sys.stderr)


def _figure(value: float) -> str:
    """What stands at a bar."""
    if not value:
        return "not measured"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="what index_peers has printed")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    document = json.loads(arguments.document.read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    for theme in INKS:
        batch = drawn_curves(document, theme, "batch_per_second", "queries/s, all asked at once", more=True)
        save(batch, arguments.out / f"index-batch-{theme}.svg")
        single = drawn_curves(document, theme, "single_ms", "ms a query, one by one (median)", more=False)
        save(single, arguments.out / f"index-single-{theme}.svg")
        save(drawn_costs(document, theme), arguments.out / f"index-cost-{theme}.svg")


if __name__ == "__main__":
    main()
