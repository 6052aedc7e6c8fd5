"""`status MEMORY`: what a memory holds."""

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.index import show_candidates
from jobs.terminal.arguments import At, Json, Memory
from jobs.terminal.output import counted, print_json, say
from jobs.terminal.progress import progress

if TYPE_CHECKING:
    from pipeline.index.build.key_choice import Table

LABELS_SHOWN = 12

# Of the distance to the nearest centroid, as a multiple of the training sample's. Trained on 50 classes of CIFAR-100,
# more of these are 1.07 times as far, and the other 50 classes 1.26 (256 lists) to 1.31 times (1,024).
DRIFT_WORTH_A_WORD = 1.2
OUTGROWN = 4  # times as many entries as a key was chosen for: twice as many lists would suit them


def status(
    memory: Memory,
    at: At = None,
    index: Annotated[
        bool, typer.Option("--index", help="Show every shard as measured, and the keys the index was chosen from.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what MEMORY holds: entries, datasets, labels, encoder and index."""
    with progress("reading the entries"):
        from pipeline import VisualMemory

        target = VisualMemory(memory, at=at)
        found = target.status()
        table = target.index_candidates() if found["index"] is not None else None
    if index and found["index"] is not None:
        found["index"]["candidates"] = table.to_json() if table else None
    if json:
        print_json(found)
        return
    say(f"memory    {found['uri']}, version {found['version'] or 'none yet'}")
    for add in found["under_way"]:
        say(f"adding    {add['source']}: {_how_far(add)}")
    if not found["version"] and not found["under_way"]:
        say("adding    the first `add` was begun and has planned nothing: wait for it, or run it again")
    if found["identity"] is None:
        return
    pixels = found["identity"]["preprocessing"]
    rejected = counted(found["rejected"], "image")
    say(f"entries   {found['entries']:,} ({found['forgotten']:,} forgotten, {rejected} rejected)")
    say(f"datasets  {', '.join(f'{name} ({count:,})' for name, count in found['datasets'].items()) or 'none'}")
    labels = [f"{name} ({count:,})" for name, count in found["entries_by_label"].items()]
    more = f", and {len(labels) - LABELS_SHOWN} more" if len(labels) > LABELS_SHOWN else ""
    say(f"labels    {found['labels']}: {', '.join(labels[:LABELS_SHOWN])}{more}" if labels else "labels    none")
    if found["label_sets"]:
        sets = [f"{name} ({counted(number, 'label')})" for name, number in found["label_sets"].items()]
        say(f"sets      {', '.join(sets)}")
    if found["kept"]:
        say(f"kept      {', '.join(f'{name} ({kind})' for name, kind in found['kept'].items())}")
    seen = f"resize {pixels['resize']}, crop {pixels['crop']}" if pixels else "vectors given without an encoder"
    say(f"encoder   {found['encoder']}, {found['dimension']} dimensions, {seen}")
    if found["index"] is None:
        say("index     none: every entry is searched exactly")
    else:
        show_index(found, table, shards=index)
    if found["index_due"]:
        say(f"due       {found['index_due']}")


def _how_far(add: dict) -> str:
    """What an add under way has done, and whether it is at work."""
    if add["stage"] == "planning":
        return "its plan is being made (running)"
    how = "running" if add["running"] else "not running: the same `add` goes on"
    if add["stage"] == "committing":
        how = "about to be committed" if add["running"] else "not running: the same `add` commits it"
    so_far = (
        f"{add['done']:,} of {add['planned']:,} images done" if add["counted"] else f"{add['done']:,} images so far"
    )
    said = [so_far, f"{add['rejected']:,} rejected"]
    said += [f"{add['left']:,} left"] if add["counted"] else []
    parts, done, of = "parts", add["parts_done"], add["parts"]
    if not add["counted"]:
        parts, done, of = "archives", add["archives_done"], add["archives"]
    return f"{', '.join(said)}, {done:,} of {of:,} {parts} ({how})"


def show_index(found: dict, table: "Table | None", *, shards: bool) -> None:
    """The index in a line; with `shards` each of them, and the keys it was chosen from."""
    built = found["index"]
    say(
        f"index     {built['key']} with {built['parameters'] or 'no parameters'}: {counted(found['shards'], 'shard')}, "
        f"{built['bytes_in_memory'] / 1e6:,.1f} MB in memory, recall@10 {built['recall_at_10']:.3f}; "
        f"{counted(found['fresh'], 'fresh entry')} beside it"
    )
    if built["drift"] is not None and built["drift"] > DRIFT_WORTH_A_WORD:
        say(
            f"          entries added since it was trained are {built['drift']:.2f} times as far from its centroids as "
            "those it was trained on: `index --rebuild` would search them with less work"
        )
    if table is not None and found["entries"] > OUTGROWN * table.rows:
        say(
            f"          its key was chosen for {table.rows:,} entries: `index --rebuild` chooses one for the "
            f"{found['entries']:,} there are now"
        )
    if not shards:
        return
    for shard in built["shards"]:
        quality = shard["quality"]
        measured = (
            "exact"
            if quality is None
            else (
                f"recall@1 {quality['recall_at_1']:.3f}, @10 {quality['recall_at_10']:.3f}, "
                f"@100 {quality['recall_at_100']:.3f}; {quality['seconds_alone'] * 1e3:.2f} ms alone, "
                f"{1 / max(quality['seconds_in_batch'], 1e-9):,.0f} queries/s at once"
            )
        )
        say(f"shard {shard['number']:<4}{shard['rows']:,} rows, {shard['bytes_per_vector']:.0f} bytes each: {measured}")
    if table is not None:
        show_candidates(table)
