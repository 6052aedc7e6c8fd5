"""One decision as a self-contained HTML page: the question, the votes, and every neighbour with its weight.

The page has no script and sends no request: thumbnails are embedded, and colours follow the reader's light or dark
setting. To make a page, this module reads the files that an add has read (images/entry_pictures.py) and the queried
image. If a picture cannot be shown, the page gives the reason and a remedy.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from pipeline.decisions.decision import Decision, Neighbor
from pipeline.errors import UsageError
from pipeline.images.decoding.decode import Rejected
from pipeline.images.decoding.thumbnails import KEPT_PIXELS, data_uri
from pipeline.images.entry_pictures import picture_at, picture_of
from pipeline.store.lookup.originals import Original

QUERY_PIXELS = 256
MAX_REASON = 120  # characters of the text in place of a picture
GONE = "its file is gone or was moved"
DOCTYPE = "<!doctype html>"

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #60646c; --ground: #fcfcfd; --card: #ffffff;
  --line: #e0e1e6; --for: #0d74ce; --against: #b9bbc6; --for-text: #0d74ce; }
@media (prefers-color-scheme: dark) { :root { --text: #edeef0; --soft: #b0b4ba; --ground: #111113; --card: #18191b;
  --line: #363a3f; --for: #3b9eff; --against: #5a6169; --for-text: #70b8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .75rem; }
p { margin: .25rem 0; }
.soft { color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }
header { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: center; }
header .picture { width: 10rem; height: 10rem; }
header > div:last-child { flex: 1 1 18rem; min-width: 0; }
.picture { display: grid; place-items: center; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; overflow: hidden; text-align: center; font-size: .75rem; color: var(--soft); }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.picture span { padding: .5rem; overflow-wrap: anywhere; }
.note { background: var(--card); border: 1px solid var(--line); border-left: .25rem solid var(--for); max-width: 46rem;
  border-radius: .5rem; padding: .6rem .9rem; margin: 0 0 .9rem; font-size: .875rem; overflow-wrap: anywhere; }
.votes { display: grid; grid-template-columns: minmax(4rem, max-content) 1fr 4rem; gap: .35rem .75rem;
  align-items: center; max-width: 40rem; }
.votes span { overflow-wrap: anywhere; }
.votes .share { text-align: right; font-variant-numeric: tabular-nums; }
.bar { height: .6rem; border-radius: .3rem; background: var(--against); min-width: 2px; }
.for .bar, .bar.for { background: var(--for); }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; min-width: 0; }
li .picture { width: 100%; aspect-ratio: 1; border: 0; background: var(--ground); margin-bottom: .5rem; }
li .label { font-weight: 600; overflow-wrap: anywhere; }
li.for .label { color: var(--for-text); }
li .bar { margin: .3rem 0; }
li .soft { font-size: .75rem; line-height: 1.35; }
.figures { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .5rem; font-size: .8125rem;
  font-variant-numeric: tabular-nums; }
"""


def explanation_page(
    decision: Decision, memory: str, kept: Mapping[int, bytes], originals: Mapping[int, Original]
) -> str:
    """The page of one decision.

    `kept` are stored thumbnails (JPEG) by id. Neighbours without a thumbnail are shown from their `originals`. If a
    picture cannot be shown, its place holds the reason, and a note above all pictures holds the remedy.
    """
    asked = _asked_picture(decision.uri) if decision.uri else "it was given as bytes"
    pictures = {n.id: kept.get(n.id) or entry_picture(originals.get(n.id)) for n in decision.neighbors}
    verdict = "No decision" if decision.abstained else escape(decision.label or "")
    reason = f"<p>Abstained: {escape(decision.reason)}.</p>" if decision.reason else ""
    agreeing = sum(neighbor.label == decision.label for neighbor in decision.neighbors)
    balance = f", balance {decision.balance:g}" if decision.balance else ""
    label_set = f"; labels of the label set {escape(decision.label_set)}" if decision.label_set is not None else ""
    where = f"; where {escape(decision.where)}" if decision.where is not None else ""
    summary = (
        f"<p>confidence {decision.confidence:.1%} · margin {decision.margin:.1%} · "
        f"{agreeing} of {len(decision.neighbors)} neighbours agree</p>"
    )
    heaviest = max((neighbor.weight or 0.0 for neighbor in decision.neighbors), default=0.0)
    neighbors = "\n".join(_neighbor(n, decision.label, heaviest, pictures[n.id]) for n in decision.neighbors)
    return f"""{DOCTYPE}
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{verdict}: why?</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<div class="picture">{shown(asked, "the image asked about")}</div>
<div>
<h1>{verdict}</h1>
{reason}{summary}
<p class="soft">{escape(decision.uri or "an image without a uri")}</p>
<p class="soft">memory {escape(memory)}, version {decision.version}; {decision.voting} voting at
k = {decision.k}{balance}{label_set}{where}; {_answered(decision)}</p>
</div>
</header>
<h2>Votes</h2>
<div class="votes">
{_votes(decision)}
</div>
<h2>The entries that decided, nearest first</h2>
{note_of_missing([found for found in pictures.values() if isinstance(found, str)], len(pictures))}<ol>
{neighbors}
</ol>
</body>
</html>
"""


def write_page(page: str, path: Path) -> None:
    """Write a page atomically. It may replace an older page. Raises UsageError if another file is at the path."""
    check_place(path)
    aside = path.with_name(f".{path.name}.aside")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raises UsageError if a page cannot be written to the path: another file is there, or no folder."""
    if path.is_dir() or (path.exists() and not path.read_bytes()[: len(DOCTYPE)].decode(errors="replace") == DOCTYPE):
        raise UsageError(f"{path} is there already and is no page: name another file for the page")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist: make it first")


def _votes(decision: Decision) -> str:
    if not decision.votes:
        return '<span class="soft">nothing voted</span>'
    return "\n".join(
        f'<span>{escape(label)}</span><div class="bar{" for" if label == decision.label else ""}" '
        f'style="width:{share:.2%}"></div><span class="share">{share:.1%}</span>'
        for label, share in decision.votes.items()
    )


def _neighbor(neighbor: Neighbor, winner: str | None, heaviest: float, picture: bytes | str) -> str:
    weight = neighbor.weight or 0.0
    agrees = neighbor.label is not None and neighbor.label == winner
    return f"""<li{' class="for"' if agrees else ""}>
<div class="picture">{shown(picture, neighbor.label or "no label")}</div>
<div class="label">{escape(neighbor.label or "no label")}</div>
<div class="bar" style="width:{weight / heaviest if heaviest else 0.0:.2%}"></div>
<div class="figures"><span title="share of all votes">weight {weight:.1%}</span>
<span title="cosine similarity">sim {neighbor.similarity:.3f}</span></div>
<div class="soft" title="{escape(neighbor.uri)}">{escape(_short(neighbor.uri))}<br>id {neighbor.id}</div>
</li>"""


def _asked_picture(uri: str) -> bytes | str:
    """The queried image as a small JPEG, or a clause with the reason why it cannot be shown."""
    try:
        return picture_at(uri, QUERY_PIXELS)
    except Rejected as rejected:
        return _why(rejected)


def entry_picture(original: Original | None) -> bytes | str:
    """The image of an entry as a small JPEG, or a clause with the reason why it cannot be shown."""
    if original is None:
        return "nothing is known of its file"
    try:
        return picture_of(original, KEPT_PIXELS)
    except Rejected as rejected:
        return _why(rejected)


def _why(rejected: Rejected) -> str:
    return GONE if rejected.reason == "there is no such file" else rejected.reason


def shown(picture: bytes | str, text: str) -> str:
    """A picture as HTML, or the clause in its place."""
    if isinstance(picture, bytes):
        return f'<img src="{data_uri(picture)}" alt="{escape(text)}">'
    return f"<span>no picture: {escape(_clause(picture))}</span>"


def _clause(reason: str) -> str:
    line = " ".join(reason.split())
    return f"{line[:MAX_REASON]}…" if len(line) > MAX_REASON else line


def note_of_missing(reasons: Sequence[str], of: int) -> str:
    """A note with the counted reasons of missing pictures, and the remedy; empty if no picture is missing."""
    if not reasons:
        return ""
    counts = Counter(_clause(reason) for reason in reasons)
    why = "; ".join(f"{count} because {escape(reason)}" for reason, count in counts.most_common(3))
    more = f"; {len(counts) - 3} other reasons" if len(counts) > 3 else ""
    return (
        f'<p class="note">{len(reasons)} of {of} pictures cannot be shown: {why}{more}. Put the files back where they '
        "were; or forget these entries and add the images again with <code>--thumbnails</code>, which keeps a small "
        "picture with each entry.</p>\n"
    )


def _answered(decision: Decision) -> str:
    if not decision.shards_total:
        return "searched exactly"
    return f"{decision.shards_answered} of {decision.shards_total} shards answered"


def _short(uri: str) -> str:
    """The last two parts of a path: the class folder and the file name."""
    return "/".join(uri.rstrip("/").split("/")[-2:])
