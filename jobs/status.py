"""`status MEMORY`: what a memory holds."""

from jobs.arguments import At, Json, Memory
from jobs.terminal import counted, print_json, say

LABELS_SHOWN = 12


def status(memory: Memory, at: At = None, json: Json = False) -> None:
    """Show what MEMORY holds: entries, datasets, labels, encoder and index."""
    from pipeline import VisualMemory

    found = VisualMemory(memory, at=at).status()
    if json:
        print_json(found)
        return
    say(f"memory    {found['uri']}, version {found['version'] or 'none yet'}")
    for add in found["under_way"]:
        how = "running" if add["running"] else "not running: the same `add` goes on"
        said = f"{add['done']:,} of {add['planned']:,} images done, {add['rejected']:,} rejected, {add['left']:,} left"
        say(f"adding    {add['source']}: {said}, {add['parts_done']:,} of {add['parts']:,} parts ({how})")
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
        return
    index = found["index"]
    say(
        f"index     {index['key']} with {index['parameters'] or 'no parameters'}: {counted(found['shards'], 'shard')}, "
        f"{index['bytes'] / 1e6:,.1f} MB, recall@10 {index['recall_at_10']:.3f}; "
        f"{counted(found['fresh'], 'fresh entry')} beside it"
    )
