"""The images of the containers of one part, one container after another."""

from collections.abc import Generator, Sequence

from pipeline.images.containers.container import MAX_DESCRIBED, Container, ImageChoice, images_in
from pipeline.images.containers.items import Item
from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.labels.labels import Labels
from pipeline.store.tables.kept_columns import KeptColumn


def images_in_turn(
    containers: Sequence[Container],
    labels: Labels,
    kept: Sequence[KeptColumn] = (),
    choice: ImageChoice = ImageChoice(),
    notes: ContainerNotes | None = None,
) -> Generator[Item]:
    """The images of some containers in order, as `images_in` gives them. Raises StorageError.

    A broken container costs its own images only. `notes` is complete after the last image. The labels and kept values
    have at most MAX_DESCRIBED characters in all: each container may use an equal share of what is left.
    """
    left = MAX_DESCRIBED
    for at, container in enumerate(containers):
        of_one = ContainerNotes()
        share = left // (len(containers) - at)
        for item in images_in(container, labels, kept, choice, of_one, share):
            left -= item.described
            yield item
        if notes is not None:
            notes.add(of_one)
