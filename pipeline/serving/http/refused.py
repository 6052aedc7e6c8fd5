"""A request that is refused."""


class Refused(Exception):
    """A request that is answered with a status, a sentence and the field it is about.

    `closes`: the connection is closed then, for the rest of a body would have to be read to its end else.
    """

    def __init__(self, status: int, detail: str, field: str | None = None, *, closes: bool = False) -> None:
        super().__init__(detail)
        self.status, self.detail, self.field, self.closes = status, detail, field, closes
