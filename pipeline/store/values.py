"""The allowed values of fields in a memory's own files.

A memory may come from somebody else, so none of its files is trusted. A field that names a file must be a path inside
the memory, a hash must have the form of one, and a number must be one that this release could have written.
"""

from typing import Annotated

from pydantic import Field, StringConstraints

MAX_INT64 = (1 << 63) - 1
MAX_COUNT = 1 << 53  # of rows or bytes: 9 petabytes, and exact as a float too
MAX_VERSION = 1 << 53
MAX_SEGMENT = (1 << 24) - 1  # an id has 24 bits for it
MAX_GENERATION = 999_999_999
MAX_DIMENSION = 1 << 24
MAX_PIXELS = 1 << 20  # of a side of an encoder's input

# Folders and a name. Each has only the characters of a memory's own files and does not begin with a dot: so a path has
# no "..", no leading or double slash, no backslash and no NUL. A name may be as long as file systems allow.
_NAME = r"[0-9A-Za-z_-][0-9A-Za-z._-]{0,254}"
PathInside = Annotated[str, StringConstraints(pattern=rf"^(?:{_NAME}/)*{_NAME}$", max_length=1_024)]

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Nonce = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Hexadecimal = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{0,64}$")]  # not part of a file name

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_COUNT)]
EntryId = Annotated[int, Field(ge=0, le=MAX_INT64)]
Digest = Annotated[int, Field(ge=0, lt=1 << 64)]
Balance = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]  # of counts; a wrong version may make it negative
VersionNumber = Annotated[int, Field(ge=0, le=MAX_VERSION)]
SegmentNumber = Annotated[int, Field(ge=0, le=MAX_SEGMENT)]
Generation = Annotated[int, Field(ge=0, le=MAX_GENERATION)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
