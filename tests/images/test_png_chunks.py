"""PNGs whose pixels are well and whose other chunks are not, and transparent colours at every depth."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.images.decoding.decode import Rejected, as_displayed, decode, dimensions
from tests.images.pictures import encoded, gradient, packed, png, png_chunk

RED_BLUE = np.array([[(200, 30, 30)] * 4 + [(30, 60, 200)] * 4] * 8, np.uint8)
ROWS = [row.tobytes() for row in RED_BLUE]
PROFILE = b"profile\0\0" + zlib.compress(bytes(3000))
LARGE = zlib.compress(bytes(100 << 20))  # a hundred MiB in a hundred kB


def shown(data: bytes) -> np.ndarray:
    return np.asarray(decode(data).image)


DAMAGED = {
    "the CRC of a text": png_chunk(b"tEXt", b"Comment\0words", crc=1),
    "the CRC of a compressed text": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"words"), crc=1),
    "the CRC of an international text": png_chunk(b"iTXt", b"Comment\0\0\0\0\0words", crc=1),
    "the CRC of a profile": png_chunk(b"iCCP", PROFILE, crc=1),
    "the CRC of a time": png_chunk(b"tIME", bytes(7), crc=1),
    "the CRC of suggested palettes": png_chunk(b"sPLT", b"name\0\x08" + bytes(6), crc=1),
    "the CRC of a histogram": png_chunk(b"hIST", bytes(2), crc=1),
    "the CRC of a chunk nobody knows": png_chunk(b"abCd", b"private", crc=1),
    "the CRC of EXIF": png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0", crc=1),
    "the CRC of an animation": png_chunk(b"acTL", bytes(8), crc=1),
    "a gamma of two bytes": png_chunk(b"gAMA", b"\0\1"),
    "colours of eight bytes": png_chunk(b"cHRM", bytes(8)),
    "an intent of no bytes": png_chunk(b"sRGB", b""),
    "a pixel size of three bytes": png_chunk(b"pHYs", bytes(3)),
    "a profile compressed in an unknown way": png_chunk(b"iCCP", b"profile\0\x07" + bytes(30)),
    "a profile without a name": png_chunk(b"iCCP", b"no zero at all"),
    "a profile that is no zlib": png_chunk(b"iCCP", b"profile\0\0garbage"),
    "a text compressed in an unknown way": png_chunk(b"zTXt", b"Comment\0\x09" + bytes(10)),
    "a profile that swells to a hundred MiB": png_chunk(b"iCCP", b"profile\0\0" + LARGE),
    "a text that swells to a hundred MiB": png_chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "an international text that swells": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
    "texts of 80 MiB together": b"".join(png_chunk(b"tEXt", b"%d\0" % i + b"x" * (1 << 20)) for i in range(80)),
    "an animation of no frames": png_chunk(b"acTL", bytes(8)) + png_chunk(b"fcTL", bytes(26)),
    "a frame outside of the picture": png_chunk(b"acTL", struct.pack(">II", 2, 0))
    + png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 99, 99, 0, 0, 1, 1, 0, 0)),
    "a text called transparency": png_chunk(b"tEXt", b"transparency\0x"),
    "a text called interlace": png_chunk(b"tEXt", b"interlace\0x"),
    "a text called bbox": png_chunk(b"tEXt", b"bbox\0x"),
    "a transparency with a wrong CRC": png_chunk(b"tRNS", struct.pack(">3H", 200, 30, 30), crc=1),
    "a transparency of one byte": png_chunk(b"tRNS", b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_before_the_pixels_leaves_them_as_they_are(damage: str) -> None:
    assert (shown(png(ROWS, 8, 8, 2, before=DAMAGED[damage])) == RED_BLUE).all()
    assert dimensions(png(ROWS, 8, 8, 2, before=DAMAGED[damage])) == (8, 8)


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_behind_the_pixels_leaves_them_as_they_are(damage: str) -> None:
    assert (shown(png(ROWS, 8, 8, 2, after=DAMAGED[damage])) == RED_BLUE).all()


def test_a_transparency_behind_the_pixels_does_not_count() -> None:
    late = png_chunk(b"tRNS", struct.pack(">3H", 200, 30, 30))
    assert (shown(png(ROWS, 8, 8, 2, after=late)) == RED_BLUE).all()


def test_what_stays_beside_a_damaged_chunk_is_used() -> None:
    exif = Image.Exif()
    exif[0x0112] = 2
    sound = png_chunk(b"tRNS", struct.pack(">3H", 200, 30, 30)) + png_chunk(b"eXIf", exif.tobytes()[6:])
    found = shown(png(ROWS, 8, 8, 2, before=png_chunk(b"tEXt", b"a\0b", crc=1) + sound))
    assert (found[:, 4:] == 255).all()  # turned over, and the red is transparent
    assert (found[:, :4] == (30, 60, 200)).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(ROWS, 8, 8, 2, before=struct.pack(">I", 1 << 30) + b"tEXt"), "ends inside its tEXt chunk"),
        (png(ROWS, 8, 8, 2, before=b"\0\0\0\2\1\2\3\4bage"), "before its pixel data: no chunk begins there"),
        (png(ROWS, 8, 8, 2).replace(b"IHDR\0\0\0\x08", b"IHDR\0\0\0\x09"), "CRC.*IHDR"),
        (png(ROWS, 8, 8, 3, before=png_chunk(b"PLTE", bytes(30), crc=7)), "CRC.*PLTE"),
        (png(ROWS, 8, 3, 2), "no PNG of colour type 2 and 3 bits"),
        (png(ROWS, 8, 8, 5), "no PNG of colour type 5 and 8 bits"),
        (png(ROWS, 8, 8, 2).replace(b"IDAT", b"idAT"), "no pixel data"),
        (png(ROWS[:5], 8, 8, 2).replace(struct.pack(">II", 8, 5), struct.pack(">II", 8, 8)), "CRC"),
        (png(ROWS, 8, 8, 2)[:52], "truncated"),
        (png(ROWS, 8, 8, 2)[:40], ""),
    ],
)
def test_pixels_that_cannot_be_reached_are_a_true_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected, match=reason) as caught:
        decode(data)
    assert "not an image" not in caught.value.reason


def test_pixel_data_are_believed_by_their_own_checksum() -> None:
    """A wrong CRC of IDAT alone does not matter: the Adler-32 within says that the pixels are right."""
    whole = png(ROWS, 8, 8, 2)
    at = whole.index(b"IDAT")
    length = struct.unpack(">I", whole[at - 4 : at])[0]
    crc = at + 4 + length
    assert (shown(whole[:crc] + b"\1\2\3\4" + whole[crc + 4 :]) == RED_BLUE).all()
    with pytest.raises(Rejected, match="broken data stream"):
        decode(whole[: crc - 1] + bytes([whole[crc - 1] ^ 1]) + whole[crc:])


def test_a_png_without_its_end_is_whole_and_one_cut_in_its_pixels_is_not() -> None:
    whole = encoded(gradient(), "PNG")
    assert (shown(whole[:-12]) == np.asarray(gradient())).all()
    for cut in (30, 100, len(whole) // 2):
        for damage in (b"", DAMAGED["the CRC of a text"]):
            with pytest.raises(Rejected, match="truncated"):
                decode(whole[:33] + damage + whole[33:-cut])


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("depth", "named"), [(1, 0), (1, 1), (2, 1), (2, 3), (4, 7), (4, 15), (8, 129), (16, 30_000)])
def test_a_transparent_grey_is_white_at_every_depth(depth: int, named: int, interlaced: bool) -> None:
    top = (1 << depth) - 1
    greys = np.arange(64).reshape(8, 8) * 1009 % (top + 1)
    greys[3, 3] = named
    data = png(packed(greys, depth), 8, depth, 0, before=png_chunk(b"tRNS", struct.pack(">H", named)))
    if interlaced:
        data = interlace(greys, depth, 0, png_chunk(b"tRNS", struct.pack(">H", named)))
    expected = np.where(greys == named, 255, np.floor(greys * 255 / top + 0.5))
    assert (shown(data)[:, :, 0] == expected).all()


def interlace(values_HW: np.ndarray, depth: int, colour_type: int, before: bytes) -> bytes:
    """A PNG of greys, or of RGB given as numbers of 3 * depth bits, in Adam7's seven passes."""
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    rows: list[bytes] = []
    for top, down, left, across in passes:
        part = values_HW[top::down, left::across]
        rows += packed(part, depth) if part.size else []
    height, width = values_HW.shape
    header = struct.pack(">IIBBBBB", width, height, depth if colour_type == 0 else depth // 3, colour_type, 0, 0, 1)
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + pixels + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("interlaced", [False, True])
def test_a_transparent_colour_is_compared_at_the_depth_of_the_file(depth: int, interlaced: bool) -> None:
    scale = 1 << depth - 8
    named = np.array((200, 30, 7)) * scale + (5 if depth == 16 else 0)
    near = named + np.array((1, 0, 0))  # at 16 bits it differs in the lower half only
    colours = np.tile(np.stack([named, near, named[::-1], near]), (4, 1)).reshape(4, 4, 3)
    before = png_chunk(b"tRNS", struct.pack(">3H", *named.tolist()))
    numbers = colours[..., 0] << 2 * depth | colours[..., 1] << depth | colours[..., 2]
    data = png(packed(numbers, 3 * depth), 4, depth, 2, before=before)
    if interlaced:
        data = interlace(numbers, 3 * depth, 2, before)
    expected = np.where((colours == named).all(axis=2, keepdims=True), 255, colours // scale)
    assert (shown(data) == expected).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_transparent_entries_of_a_palette_are_laid_on_white(depth: int) -> None:
    num = 1 << depth
    palette = (np.arange(num * 3).reshape(num, 3) * 37 % 200).astype(np.uint8)
    alphas = bytes([0, 128][: min(2, num)])
    values = np.arange(64).reshape(8, 8) % num
    before = png_chunk(b"PLTE", palette.tobytes()) + png_chunk(b"tRNS", alphas)
    found = shown(png(packed(values, depth), 8, depth, 3, before=before)).astype(int)
    alpha = np.array([*alphas, *[255] * (num - len(alphas))])[values][:, :, None] / 255
    assert np.abs(found - (palette[values] * alpha + 255 * (1 - alpha))).max() <= 1


@pytest.mark.parametrize("colour_type", [4, 6])
def test_16_bit_alpha_is_laid_on_white(colour_type: int) -> None:
    channels = 2 if colour_type == 4 else 4
    values = (np.arange(8 * 8 * channels).reshape(8, 8, channels) * 977 % 65_536).astype(">u2")
    found = shown(png([row.tobytes() for row in values], 8, 16, colour_type)).astype(int)
    alpha = values[:, :, -1:] / 65_535
    assert np.abs(found - (values[:, :, :-1] / 257 * alpha + 255 * (1 - alpha))).max() <= 2


def test_a_pil_image_of_a_file_shows_what_its_bytes_show() -> None:
    greys = np.arange(64).reshape(8, 8) % 4
    data = png(packed(greys, 2), 8, 2, 0, before=png_chunk(b"tRNS", b"\0\1"))
    assert (np.asarray(as_displayed(Image.open(io.BytesIO(data)))) == shown(data)).all()


def test_an_animation_shows_its_default_image() -> None:
    frames = [gradient(), Image.new("RGB", (60, 40), "blue")]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert (shown(data) == np.asarray(frames[0])).all()
