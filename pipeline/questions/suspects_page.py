"""Suspects as a self-contained HTML page: each with its picture, its labels, and its nearest others.

As the page of a decision (page.py): no script, no request, thumbnails embedded, light or dark as the reader has it.
"""

from collections.abc import Mapping
from html import escape

from pipeline.decisions.decision import Neighbor
from pipeline.questions.page import DOCTYPE, STYLE, entry_picture, note_of_missing, shown
from pipeline.questions.suspects import Suspect, SuspectsReport
from pipeline.store.lookup.originals import Original

NEIGHBORS_SHOWN = 6

_STYLE = """
ol.suspects { grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); }
.suspect { display: flex; flex-wrap: wrap; gap: .75rem; }
.suspect > .picture { width: 7.5rem; height: 7.5rem; aspect-ratio: auto; margin: 0; flex: none; }
.suspect > div:last-child { flex: 1 1 15rem; min-width: 0; }
.suspect del { color: var(--soft); text-decoration-thickness: 1px; }
.suspect .to { color: var(--for-text); }
.kind { font-size: .75rem; border: 1px solid var(--line); border-radius: 1rem; padding: .05rem .5rem; float: right; }
ul.near { list-style: none; display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .35rem;
  margin: .5rem 0 0; padding: 0; }
ul.near li { border: 0; padding: 0; background: none; font-size: .6875rem; line-height: 1.2; overflow-wrap: anywhere; }
ul.near .picture { margin-bottom: .2rem; font-size: .5625rem; }
ul.near li.for { color: var(--for-text); }
"""


def pictured(report: SuspectsReport) -> list[int]:
    """The ids of the entries whose pictures the page of a report shows."""
    near = {neighbor.id for suspect in report.suspects for neighbor in suspect.neighbors[:NEIGHBORS_SHOWN]}
    return sorted(near | {suspect.id for suspect in report.suspects})


def suspects_page(
    report: SuspectsReport, memory: str, kept: Mapping[int, bytes], originals: Mapping[int, Original]
) -> str:
    """The page of a report. `kept` are stored thumbnails (JPEG) by id; others are shown from their `originals`."""
    pictures = {i: kept.get(i) or entry_picture(originals.get(i)) for i in pictured(report)}
    counts = " · ".join(f"{count:,} {kind}" for kind, count in report.counts.items())
    label_set = f"; labels of the label set {escape(report.label_set)}" if report.label_set is not None else ""
    where = f"; where {escape(report.where)}" if report.where is not None else ""
    suspects = "\n".join(_suspect(suspect, pictures) for suspect in report.suspects)
    return f"""{DOCTYPE}
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{len(report.suspects):,} suspects</title>
<style>{STYLE}{_STYLE}</style>
</head>
<body>
<h1>{len(report.suspects):,} suspects</h1>
<p>Of {report.labelled:,} labelled entries: {counts}.</p>
<p class="soft">memory {escape(memory)}, version {report.version}; each entry asked about by its
{report.k} nearest others{label_set}{where}</p>
<h2>The most suspicious first</h2>
{note_of_missing([found for found in pictures.values() if isinstance(found, str)], len(pictures))}<ol class="suspects">
{suspects}
</ol>
</body>
</html>
"""


def _suspect(suspect: Suspect, pictures: Mapping[int, bytes | str]) -> str:
    near = "\n".join(_near(n, suspect.suggested, pictures[n.id]) for n in suspect.neighbors[:NEIGHBORS_SHOWN])
    label = escape(suspect.label)
    if suspect.kind == "mislabelled" and suspect.suggested is not None:
        label = f'<del>{label}</del> <span class="to">{escape(suspect.suggested)}</span>'
    elif suspect.kind == "ambiguous" and suspect.suggested is not None:
        label = f"{label} or {escape(suspect.suggested)}"
    other = f", {suspect.suggested_share:.0%} for {escape(suspect.suggested)}" if suspect.suggested is not None else ""
    same = f"<br>a copy of id {suspect.duplicate_of}, or nearly" if suspect.duplicate_of is not None else ""
    return f"""<li class="suspect">
<div class="picture">{shown(pictures[suspect.id], suspect.label)}</div>
<div><span class="kind">{suspect.kind}</span><div class="label">{label}</div>
<div class="soft">votes {suspect.share:.0%} for its label{other}; as a neighbour right {suspect.right:,}, wrong
{suspect.wrong:,}{same}<br>id {suspect.id} · {escape(suspect.uri)}</div>
<ul class="near">
{near}
</ul></div>
</li>"""


def _near(neighbor: Neighbor, suggested: str | None, picture: bytes | str) -> str:
    label = neighbor.label or "no label"
    agrees = ' class="for"' if suggested is not None and neighbor.label == suggested else ""
    return f'<li{agrees}><div class="picture">{shown(picture, label)}</div>{escape(label)}</li>'
