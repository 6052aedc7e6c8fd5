"""JPEG files that lack only their end marker are decoded, those that lack pixels are not."""

import itertools

import numpy as np
import pytest
from PIL import Image

from pipeline.images.decoding.decode import Rejected, decode, dimensions
from tests.images.pictures import encoded, gradient

END = b"\xff\xd9"


def grain(width: int = 67, height: int = 45) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


def half_white() -> Image.Image:
    picture = gradient(120, 160)
    picture.paste("white", (0, 60, 120, 160))
    return picture


PICTURES = {
    "gradient": gradient(100, 75),
    "grain": grain(),
    "half white": half_white(),
    "white": Image.new("RGB", (64, 64), "white"),
    "grey": gradient(100, 75).convert("L"),
    "CMYK": gradient(100, 75).convert("CMYK"),
}
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "own codes": {"optimize": True},
    "progressive": {"progressive": True},
    "fine": {"quality": 100, "subsampling": 0},
    "restarts": {"restart_marker_blocks": 2},
}
FILES = {
    f"{picture}, {option}": encoded(PICTURES[picture], "JPEG", **OPTIONS[option])
    for picture, option in itertools.product(PICTURES, OPTIONS)
    if not (picture == "grey" and option == "fine")
}
TAILS = {
    "nothing": b"",
    "half of the marker": b"\xff",
    "filling bytes": b"\xff\xff\xff",
    "a zero": b"\0",
    "a hundred zeros": b"\0" * 100,
    "zeros to the end of a block of the disk": b"\0" * 8192,
    "an end of line": b"\r\n",
    "garbage": b"garbage" * 50,
}


# Zeros behind pixels that are all coded as zeros: nobody can tell where the picture ends.
AMBIGUOUS = {("white, own codes", tail) for tail, added in TAILS.items() if added.startswith(b"\0")}


@pytest.mark.parametrize(("file", "tail"), sorted(set(itertools.product(FILES, TAILS)) - AMBIGUOUS))
def test_a_whole_picture_without_its_end_marker_is_decoded(file: str, tail: str) -> None:
    whole = FILES[file]
    assert whole.endswith(END)
    found = decode(whole[:-2] + TAILS[tail])
    assert np.array_equal(np.asarray(found.image), np.asarray(decode(whole).image))


@pytest.mark.parametrize("tail", ["nothing", "half of the marker", "filling bytes"])
@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("white")])
def test_a_picture_that_lacks_coefficients_is_truncated(file: str, tail: str) -> None:
    """Unless what is missing shows nowhere, as in the blocks beyond the edge of the picture."""
    body = FILES[file][:-2]
    for cut in (2, 3, 5, 10, 40, len(body) // 4, len(body) // 2):
        try:
            found = decode(body[:-cut] + TAILS[tail])
        except Rejected as rejected:
            assert "truncated" in rejected.reason or "broken" in rejected.reason
        else:
            assert cut <= 10
            assert np.array_equal(np.asarray(found.image), np.asarray(decode(FILES[file]).image))


@pytest.mark.parametrize("zeros", [1_000, 100_000])
@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("white")])
def test_half_a_picture_filled_up_with_zeros_is_truncated(file: str, zeros: int) -> None:
    half = FILES[file][: len(FILES[file]) // 2]
    with pytest.raises(Rejected, match="truncated"):
        decode(half + b"\0" * zeros)


def test_a_progressive_picture_that_lacks_its_last_scans_is_truncated() -> None:
    whole = FILES["gradient, progressive"]
    scans = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 3
    tables = whole.rindex(b"\xff\xc4", 0, scans[-1])
    with pytest.raises(Rejected, match="scans are missing"):
        decode(whole[:tables])


def test_it_is_decoded_smaller_as_a_whole_one_is() -> None:
    whole = encoded(gradient(400, 300), "JPEG")
    found, expected = decode(whole[:-2], 75), decode(whole, 75)
    assert found.image.size == expected.image.size == (100, 75)
    assert (found.width, found.height) == (400, 300)
    assert np.array_equal(np.asarray(found.image), np.asarray(expected.image))


def test_a_thumbnail_in_front_has_an_end_marker_of_its_own() -> None:
    thumbnail = encoded(gradient(16, 16), "JPEG")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail
    whole = encoded(gradient(), "JPEG", exif=exif)
    assert np.array_equal(np.asarray(decode(whole[:-2] + bytes(500)).image), np.asarray(decode(whole).image))
    with pytest.raises(Rejected, match="truncated"):
        decode(whole[:-300] + bytes(50_000))


@pytest.mark.parametrize(
    "segment",
    [
        b"\xff\xe2\0\x10ICC_PROFILE\0\1",  # a profile of no parts
        b"\xff\xed\0\x17Photoshop 3.0\0\x38BIM\x03\xed",  # settings that end in the middle
        b"\xff\xe0\0\x09JFIF\0\1\1"[:-1],
        b"\xff\xe1\0\x0eExif\0\0MM\0*zz",
        b"\xff\xee\0\x08Adobe\0"[:-1] + b"\0",
    ],
)
def test_what_programs_store_beside_the_pixels_may_be_damaged(segment: bytes) -> None:
    whole = encoded(gradient(), "JPEG")
    damaged = whole[:2] + segment + whole[2:]
    assert np.array_equal(np.asarray(decode(damaged).image), np.asarray(decode(whole).image))
    assert dimensions(damaged) == (60, 40)


def test_a_depth_that_cannot_be_read_is_named() -> None:
    whole = encoded(gradient(), "JPEG")
    at = whole.index(b"\xff\xc0") + 4
    with pytest.raises(Rejected, match="a JPEG file that cannot be read: cannot handle 12-bit layers"):
        decode(whole[:at] + b"\x0c" + whole[at + 1 :])
