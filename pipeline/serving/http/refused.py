"""The error that refuses a request."""


class Refused(Exception):
    """A refusal with a status, a sentence and the field that it is about.

    `closes`: the connection is closed afterwards, because otherwise the rest of the body would have to be read.
    """

    def __init__(self, status: int, detail: str, field: str | None = None, *, closes: bool = False) -> None:
        super().__init__(detail)
        self.status, self.detail, self.field, self.closes = status, detail, field, closes
