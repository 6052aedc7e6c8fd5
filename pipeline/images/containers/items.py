"""One image of a source on its way to the encoder."""

from dataclasses import dataclass, field

from pipeline.images.decoding.decode import Rejected


@dataclass(frozen=True)
class Item:
    """An image of a source. `content` is the bytes of its file, why there are none, or None before they are read.

    `kept` are the values of the kept columns (store/tables/kept_columns.py). `no_label` says why `label` is None.
    `span` is where its bytes lie in an uncompressed archive, as (offset, bytes).
    """

    uri: str
    label: str | None
    content: bytes | Rejected | None = None
    kept: tuple = ()
    no_label: str = field(default="", compare=False)
    span: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def described(self) -> int:
        """The characters of its label and kept values, which stay in memory until its part is done."""
        return len(self.label or "") + sum(len(value) for value in self.kept if isinstance(value, str))
