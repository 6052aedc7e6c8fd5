"""Directories of tags, as in TIFF and EXIF, measured before the values of their tags are read.

A tag has the place and the length of its value, so that thousands of tags may point at the same bytes: a reader then
copies the file over and over. In honest files the values do not overlap.
"""

import struct

MAX_TAGS = 4_096  # cameras write some hundred
MAX_NUMBERS = 1 << 20  # in one tag: the places of as many strips or tiles
_HARMLESS_BYTES = 64 << 20  # allowed for all tags of a directory together, in a file of any size

_EXIF = b"Exif\0\0"  # Pillow removes it twice
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_BYTES = (1, 2, 6, 7)  # types whose values stay bytes, however many they are


def refuse_bomb(data: bytes, what: str) -> None:
    """Raise ValueError if reading the first directory of `data` would take more than the bytes of `data`.

    `data` begins with the head of a TIFF, or with EXIF's head before it. Damaged or cut data pass: their reader reports
    them.
    """
    try:
        num_tags, num_bytes, most = _measured(data.removeprefix(_EXIF).removeprefix(_EXIF))
    except (struct.error, OverflowError):
        return
    if num_tags > MAX_TAGS:
        raise ValueError(f"the {what} has a directory of {num_tags:,} tags, more than {MAX_TAGS:,}")
    if num_bytes > max(len(data), _HARMLESS_BYTES):
        raise ValueError(f"the {what} says that its tags are longer than the file")
    if most > MAX_NUMBERS:
        raise ValueError(f"the {what} has a tag of {most:,} numbers, more than {MAX_NUMBERS:,}")


def is_bomb(data: bytes) -> bool:
    """Whether `refuse_bomb` would refuse it."""
    try:
        refuse_bomb(data, "EXIF")
    except ValueError:
        return True
    return False


def _measured(data: bytes) -> tuple[int, int, int]:
    """The number of tags, the bytes of their values, and the most numbers in a tag. Raises struct.error if cut."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = 43 in data[2:4]
    head, count, entry = ("8xQ", "Q", "HHQQ") if is_big else ("4xI", "H", "HHII")
    (start,) = struct.unpack_from(order + head, data)
    (num_tags,) = struct.unpack_from(order + count, data, start)
    if num_tags > MAX_TAGS:
        return num_tags, 0, 0
    entry_bytes, at = struct.calcsize("=" + entry), start + struct.calcsize("=" + count)
    directory = memoryview(data)[at : at + num_tags * entry_bytes]
    directory = directory[: len(directory) // entry_bytes * entry_bytes]
    num_bytes = most = 0
    for _, kind, number, _ in struct.iter_unpack(order + entry, directory):
        num_bytes += number * _SIZES.get(kind, 0)
        if kind in _SIZES and kind not in _BYTES:
            most = max(most, number)
    return num_tags, num_bytes, most
