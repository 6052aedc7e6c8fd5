"""What `add` prints about labels and passed-over files: a line each, with advice if something looks wrong."""

from typing import TYPE_CHECKING

from jobs.terminal.output import counted, note, say

if TYPE_CHECKING:
    from pipeline.edits.add import AddPlan, AddReport
    from pipeline.images.containers.notes import ContainerNotes
    from pipeline.images.labels.census import LabelCensus
    from pipeline.images.names.leftovers import PassedOver

LABELS_SHOWN = 8
NAMES_SHOWN = 5


def show_labels(census: "LabelCensus") -> None:
    """Print the first labels with their counts, and how many images have none."""
    first = [f"{label} ({number:,})" for label, number in census.first_labels(LABELS_SHOWN).items()]
    more = f", and {len(census.counts) - len(first):,} more" if len(census.counts) > len(first) else ""
    containers = f"{census.unread:,} {'archive or table' if census.unread == 1 else 'archives and tables'}"
    unread = f"; those in {containers} are known when they are read" if census.unread else ""
    if census.counts:
        without = f"; {counted(census.without, 'image')} without one" if census.without else ""
        say(f"labels: {', '.join(first)}{more}{without}{unread}")
    elif unread:
        say(f"labels: {unread.removeprefix('; ')}")


def show_first(plan: "AddPlan", peeked: "tuple[str, LabelCensus, ContainerNotes] | None") -> None:
    """Print the labels of the first images in an archive or table, and what is wrong with them."""
    if peeked is None:
        return
    container, census, notes = peeked
    number = census.labelled + census.without
    labels = [f"{label} ({count:,})" for label, count in census.first_labels(LABELS_SHOWN).items()]
    without = [f"{census.without:,} without one"] if census.without else []
    say(f"the first {counted(number, 'image')} in {container}: {', '.join([*labels, *without]) or 'none'}")
    show_passed_over(notes.passed_over)
    _note_questionable(census)
    _note_unlabelled(census, plan)
    _note_samples(notes)


def show_passed_over(passed: "PassedOver") -> None:
    """Print how many files are no images, by their endings; how many are leftovers, or excluded."""
    said = []
    if passed.endings:
        endings = [f"{number:,} {ending or 'without an ending'}" for ending, number in passed.endings.most_common()]
        are = "is no image" if passed.num_files == 1 else "are no images"
        said.append(f"{counted(passed.num_files, 'file')} that {are} ({_listed(endings)})")
    if passed.leftovers:
        said.append(
            f"leftovers and hidden names ({_listed([f'{n:,} {name}' for name, n in passed.leftovers.most_common()])})"
        )
    if passed.excluded:
        said.append(f"{passed.excluded:,} excluded")
    if said:
        say(f"passed over: {'; '.join(said)}")


def note_before(plan: "AddPlan") -> None:
    """Print the problems with labels that are known before anything is embedded."""
    listing = plan.listing
    for uri, reason in list(listing.passed_over.unreadable.items())[:NAMES_SHOWN]:
        note(f"the folder {uri} cannot be read ({reason}), so its images are not in this add")
    if len(listing.passed_over.unreadable) > NAMES_SHOWN:
        note(f"{len(listing.passed_over.unreadable):,} folders cannot be read in all")
    if listing.is_file:  # a single image takes a moment: note_after prints it
        return
    census = listing.census + listing.inside
    _note_questionable(census)
    _note_mask_like(listing.mask_like)
    if not listing.containers.num_rows:
        _note_unmatched(census, plan)
    _note_unlabelled(census, plan)


def note_label_of_file(census: "LabelCensus") -> None:
    """Print where the label of a single added image comes from."""
    [label] = census.counts
    note(f"the image has the label {label}, the name of its folder: `--label NAME` gives it another")


def note_after(report: "AddReport", plan: "AddPlan") -> None:
    """Print the problems with labels that were not known before the images were read."""
    listing = plan.listing
    if plan.is_labelled_by_folder:
        note_label_of_file(report.census)
    elif listing.is_file:
        _note_unlabelled(report.census, plan)
    if not listing.containers.num_rows:
        return
    before = listing.census + listing.inside
    if report.census.counts.keys() != before.counts.keys():
        _note_questionable(report.census)
    _note_unmatched(report.census, plan)
    if report.census.unlabelled != before.unlabelled:
        _note_unlabelled(report.census, plan)
    _note_samples(report.notes)


def _note_samples(notes: "ContainerNotes") -> None:
    """Print samples with several images, and sidecars that could not be read."""
    if notes.masks:
        names = list(notes.masks)
        note(
            f"{counted(sum(notes.masks.values()), 'image')} passed over beside the picture of their sample "
            f"({_listed(names)}): `--image-extension {names[0].lstrip('.')}` would take these instead"
        )
    if notes.together:
        names = list(notes.together)
        note(
            f"samples of these archives hold several images ({_listed(names)}), each of which is an entry: "
            f"`--image-extension {names[0].lstrip('.')}` would take one of them"
        )
    _note_mask_like(notes.mask_like)
    if notes.sidecars:
        said = [f"{number:,}: {reason}" for reason, number in notes.sidecars.items()]
        note(f"{counted(sum(notes.sidecars.values()), 'sidecar')} could not be read ({_listed(said)})")


def _note_mask_like(endings: "dict[str, int]") -> None:
    if endings:
        name = next(iter(endings))
        note(
            f"{counted(sum(endings.values()), 'image')} are named like masks of others ({_listed(list(endings))}), and "
            f"are entries all the same: `--exclude '*{name}'` passes them over"
        )


def _note_questionable(census: "LabelCensus") -> None:
    alike = [" and ".join(repr(label) for label in group) for group in census.alike()]
    if alike:
        note(f"these labels may be meant as one: {_listed(alike)}; `relabel` makes them one")
    doubtful = [f"{label!r} ({census.counts[label]:,})" for label in census.doubtful()]
    if doubtful:
        note(f"these labels may stand for none, or are no UTF-8: {_listed(doubtful)}; `relabel` corrects them")
    names = census.questionable()
    if names:
        said = [f"{name} ({census.counts[name]:,})" for name in names]
        note(
            f"{'these labels look' if len(names) > 1 else 'this label looks'} like a split or a folder of images, not "
            f"like a class: {_listed(said)}; `--labels parent` takes the folder that holds each image, `--label NAME` "
            "one label for all"
        )


def _note_unmatched(census: "LabelCensus", plan: "AddPlan") -> None:
    if census.num_unmatched:
        first = f", such as '{census.unmatched[0]}'" if census.unmatched else ""
        note(
            f"{census.num_unmatched:,} of {counted(census.num_rows, 'row')} of the label file name no image of the "
            f"source{first}: name images by their path from {plan.listing.uri} on"
        )


def _note_unlabelled(census: "LabelCensus", plan: "AddPlan") -> None:
    reasons = {reason: number for reason, number in census.unlabelled.items() if reason != "labels were not asked for"}
    if not reasons:
        return
    number = sum(reasons.values())
    whole = number + census.labelled
    why = "; ".join(
        reason if len(reasons) == 1 else f"{count:,}: {reason}"
        for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1])[:NAMES_SHOWN]
    )
    asked, tables = plan.options.asked_labels, plan.listing.passed_over.label_files
    if asked.startswith("file:"):
        way = f"give them rows in {asked.removeprefix('file:')}"
    elif tables:
        way = f"`--labels file:{tables[0]}` reads labels from the file there"
    else:
        way = "`--label NAME` gives all of them one, `--labels` says where else to look"
    which = "no image of these" if number == whole and not census.unread else f"{number:,} of these images"
    has = "has a label" if which.startswith("no ") else "have no label"
    note(f"{which} {has}, which `classify` needs ({why}): {way}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
