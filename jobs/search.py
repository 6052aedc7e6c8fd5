"""`search MEMORY IMAGE…`: the nearest entries of each image."""

from typing import Annotated

import typer

from jobs.terminal.arguments import At, Images, Json, LabelSet, Memory, Where, count
from jobs.terminal.output import note, print_json, say
from jobs.terminal.progress import progress


def search(
    memory: Memory,
    images: Images,
    k: Annotated[int, typer.Option("-k", "--k", help="How many neighbours.", metavar="K", parser=count)] = 10,
    label_set: LabelSet = None,
    where: Where = None,
    at: At = None,
    json: Json = False,
) -> None:
    """Show the entries nearest to each IMAGE, whatever their labels."""
    with progress("loading the encoder"):
        from pipeline import VisualMemory

        found = VisualMemory(memory, at=at).search(images, k, label_set=label_set, where=where)
    if found and len(found[0]) < k:
        there = "the memory holds {:,} entries" if where is None else "{:,} entries satisfy --where"
        note(f"{there.format(len(found[0]))}, so there are no {k:,} neighbours to show")
    if json:
        print_json([[neighbor.to_json() for neighbor in neighbors] for neighbors in found])
        return
    for image, neighbors in zip(images, found, strict=True):
        say(image)
        for neighbor in neighbors:
            label = "(no label)" if neighbor.label is None else neighbor.label
            say(f"  {neighbor.rank:>4}  {neighbor.similarity:.4f}  {label:<20}  {neighbor.id}  {neighbor.uri}")
