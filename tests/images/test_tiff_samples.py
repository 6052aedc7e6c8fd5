"""TIFFs of every depth, order of bytes and number format show the same picture; what cannot be read says why."""

import io
import lzma
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.images.decoding.decode import Rejected, as_displayed, decode, dimensions
from tests.images.pictures import encoded, gradient, packed, tiff

WIDTH, HEIGHT = 37, 23
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
GREYS_HW = np.linspace(0, 1, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)  # 0 is black, 1 is white
EXPECTED_HW = np.floor(GREYS_HW * 255 + 0.5).astype(int)


def shown(data: bytes) -> np.ndarray:
    return np.asarray(decode(data).image).astype(int)


def rows_of(values_HW: np.ndarray, bits: int, byte_order: str, sample_format: int = 1) -> list[bytes]:
    if bits in (8, 16, 32, 64):
        kind = {1: "u", 2: "i", 3: "f"}[sample_format]
        return [row.astype(f"{byte_order}{kind}{bits // 8}").tobytes() for row in values_HW]
    if bits == 24 and byte_order == "<":
        return [b"".join(int(value).to_bytes(3, "little") for value in row) for row in values_HW]
    return packed(values_HW, bits)


def tags_of(bits: int, photometric: int, **more: int) -> dict[int, int | tuple[int, ...]]:
    tags: dict[int, int | tuple[int, ...]] = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: photometric, 277: 1}
    return {**tags, 278: HEIGHT, **{int(tag.removeprefix("tag")): value for tag, value in more.items()}}


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("photometric", [BLACK_IS_ZERO, WHITE_IS_ZERO])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 24, 32])
def test_greys_of_every_depth(bits: int, photometric: int, byte_order: str) -> None:
    top = (1 << bits) - 1
    values = np.floor((GREYS_HW if photometric else 1 - GREYS_HW) * top + 0.5).astype(np.uint64)
    data = tiff([b"".join(rows_of(values, bits, byte_order))], tags_of(bits, photometric), byte_order)
    expected = np.floor((values if photometric else top - values) / top * 255 + 0.5)
    assert np.abs(shown(data) - expected[:, :, None]).max() <= (1 if bits in (2, 4) else 0)
    assert dimensions(data) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("photometric", [BLACK_IS_ZERO, WHITE_IS_ZERO])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_float_greys(bits: int, photometric: int, byte_order: str) -> None:
    values = GREYS_HW if photometric else 1 - GREYS_HW
    rows = rows_of(values, bits, byte_order, sample_format=3)
    data = tiff([b"".join(rows)], tags_of(bits, photometric, tag339=3), byte_order)
    assert np.abs(shown(data)[:, :, 0] - EXPECTED_HW).max() <= 1


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signed_greys_below_zero_are_black(bits: int) -> None:
    top = (1 << bits - 1) - 1
    values = np.floor((GREYS_HW * 2 - 1) * top).astype(np.int64)
    data = tiff([b"".join(rows_of(values, bits, "<", sample_format=2))], tags_of(bits, BLACK_IS_ZERO, tag339=2))
    if bits == 8:  # Pillow and libtiff take them for unsigned
        assert (shown(data)[:, :, 0] == values.astype(np.uint8)).all()
    else:
        assert np.abs(shown(data)[:, :, 0] - np.clip((GREYS_HW * 2 - 1) * 255, 0, 255)).max() <= 1


def pack_bits(body: bytes) -> bytes:
    return b"".join(bytes([len(body[i : i + 128]) - 1]) + body[i : i + 128] for i in range(0, len(body), 128))


PACKED: dict[int, Callable[[bytes], bytes]] = {
    1: bytes,
    8: zlib.compress,
    32946: zlib.compress,
    34925: lzma.compress,
    32773: pack_bits,
}


@pytest.mark.parametrize("rows_per_strip", [1, 7, HEIGHT, 1000])
@pytest.mark.parametrize("compression", PACKED)
def test_strips_of_any_height_in_any_compression(compression: int, rows_per_strip: int) -> None:
    pack = PACKED[compression]
    values = np.floor((1 - GREYS_HW) * 4095 + 0.5)
    rows = rows_of(values, 12, ">")
    strips = [pack(b"".join(rows[top : top + rows_per_strip])) for top in range(0, HEIGHT, rows_per_strip)]
    data = tiff(strips, {**tags_of(12, WHITE_IS_ZERO), 259: compression, 278: rows_per_strip}, ">")
    assert np.abs(shown(data)[:, :, 0] - EXPECTED_HW).max() <= 1


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("bits", [16, 32])
def test_differences_of_neighbours_are_added_up(bits: int, byte_order: str) -> None:
    top = (1 << bits) - 1
    values = np.floor(GREYS_HW * top).astype(np.uint64)
    differences = np.diff(values, axis=1, prepend=np.uint64(0)) & np.uint64(top)
    body = zlib.compress(b"".join(rows_of(differences, bits, byte_order)))
    data = tiff([body], {**tags_of(bits, BLACK_IS_ZERO), 259: 8, 317: 2}, byte_order)
    assert np.abs(shown(data)[:, :, 0] - EXPECTED_HW).max() <= 1


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_floats_split_by_the_weight_of_their_bytes_are_put_together(bits: int, byte_order: str) -> None:
    size = bits // 8
    rows = []
    for row in GREYS_HW:
        by_weight = np.frombuffer(row.astype(f">f{size}").tobytes(), np.uint8).reshape(-1, size).T.ravel()
        rows.append(np.diff(by_weight, prepend=np.uint8(0)).tobytes())
    tags = {**tags_of(bits, BLACK_IS_ZERO, tag339=3), 259: 8, 317: 3}
    assert np.abs(shown(tiff([zlib.compress(b"".join(rows))], tags, byte_order))[:, :, 0] - EXPECTED_HW).max() <= 1


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("is_planar", [False, True])
def test_colours_beside_each_other_and_in_planes(bits: int, is_planar: bool) -> None:
    colours = np.asarray(gradient(WIDTH, HEIGHT)).astype(np.uint64) * ((1 << bits) - 1) // 255
    tags = {**tags_of(bits, RGB), 258: (bits,) * 3, 277: 3, 284: 2 if is_planar else 1}
    if is_planar:
        strips = [b"".join(rows_of(colours[:, :, plane], bits, "<")) for plane in range(3)]
    else:
        strips = [b"".join(rows_of(colours.reshape(HEIGHT, -1), bits, "<"))]
    assert np.abs(shown(tiff(strips, tags)) - np.asarray(gradient(WIDTH, HEIGHT))).max() <= 1


@pytest.mark.parametrize(("kind", "premultiplied"), [(1, True), (2, False)])
@pytest.mark.parametrize("num_colours", [1, 3])
def test_alpha_of_16_bits_is_laid_on_white(num_colours: int, kind: int, premultiplied: bool) -> None:
    colours = np.tile(GREYS_HW[:, ::-1, None], num_colours)
    alpha = GREYS_HW[:, :, None]
    stored = np.concatenate([colours * alpha if premultiplied else colours, alpha], axis=2)
    rows = rows_of(np.floor(stored * 65_535).reshape(HEIGHT, -1), 16, "<")
    photometric, num = (RGB, 4) if num_colours == 3 else (BLACK_IS_ZERO, 2)
    data = tiff([b"".join(rows)], {**tags_of(16, photometric), 258: (16,) * num, 277: num, 338: kind})
    assert np.abs(shown(data) - 255 * (colours * alpha + 1 - alpha)).max() <= 2


def test_a_palette_of_many_colours() -> None:
    indices = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) % 512
    palette = np.arange(512 * 3).reshape(3, 512) * 41 % 65_536
    data = tiff([b"".join(rows_of(indices, 9, "<"))], {**tags_of(9, 3), 320: tuple(palette.ravel().tolist())})
    assert (shown(data) == (palette[:, indices] >> 8).transpose(1, 2, 0)).all()


def test_a_palette_of_8_bit_colours_where_16_belong() -> None:
    indices = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) % 256
    palette = np.arange(256 * 3).reshape(3, 256) * 41 % 256
    data = tiff([b"".join(rows_of(indices, 8, "<"))], {**tags_of(8, 3), 320: tuple(palette.ravel().tolist())})
    assert (shown(data) == palette[:, indices].transpose(1, 2, 0)).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_cielab_of_both_depths_shows_its_colours(bits: int) -> None:
    unit = 1 << bits - 8
    samples = {  # lightness, a, b of sRGB colours under D50
        (255, 255, 255): (100, 0, 0),
        (255, 0, 0): (54.29, 80.81, 69.89),
        (0, 0, 255): (29.57, 68.30, -112.03),
        (128, 128, 128): (53.59, 0, 0),
    }
    stored = np.array([[light * ((1 << bits) - 1) / 100, a * unit, b * unit] for light, a, b in samples.values()])
    values = np.tile(np.round(stored).astype(np.int64) % (1 << bits), (1, 1)).reshape(1, -1)
    tags = {**tags_of(bits, 8), 256: 4, 257: 1, 258: (bits,) * 3, 277: 3, 278: 1}
    assert np.abs(shown(tiff(rows_of(values, bits, "<"), tags))[0] - np.array(list(samples))).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_read_by_their_samples_are_turned(orientation: int) -> None:
    grey16 = np.floor(GREYS_HW * 65_535).astype(np.uint16)
    deep = tiff([grey16.tobytes()], tags_of(16, BLACK_IS_ZERO, tag274=orientation))
    plain = tiff([EXPECTED_HW.astype(np.uint8).tobytes()], tags_of(8, BLACK_IS_ZERO, tag274=orientation))
    assert shown(deep).shape == shown(plain).shape
    assert dimensions(deep) == dimensions(plain) == shown(deep).shape[1::-1]
    assert np.abs(shown(deep) - shown(plain)).max() <= 1


def test_a_pil_image_of_a_tiff_shows_what_its_bytes_show() -> None:
    data = tiff([np.floor((1 - GREYS_HW) * 65_535).astype("<u2").tobytes()], tags_of(16, WHITE_IS_ZERO))
    assert (np.asarray(as_displayed(Image.open(io.BytesIO(data)))) == shown(data)).all()
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    assert (np.asarray(as_displayed(loaded)) == shown(data)).all()
    frames = Image.open(io.BytesIO(encoded(gradient(), "TIFF", save_all=True, append_images=[gradient(30, 20)])))
    frames.seek(1)
    assert as_displayed(frames).size == (30, 20)


GREY16 = np.floor(GREYS_HW * 65_535).astype("<u2").tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            tiff([GREY16[:740], GREY16[740:-100]], {**tags_of(16, WHITE_IS_ZERO), 278: 10}),
            r"grey TIFF \(uncompressed\) is truncated",
        ),
        (tiff([zlib.compress(GREY16)[:-200]], {**tags_of(16, WHITE_IS_ZERO), 259: 8}), "damaged or truncated"),
        (tiff([GREY16], tags_of(16, BLACK_IS_ZERO))[:900], "truncated"),
        (tiff([GREY16], {**tags_of(16, BLACK_IS_ZERO), 259: 34887}), r"16-bit grey TIFF \(LERC\) cannot be read"),
        (tiff([GREY16], {**tags_of(16, BLACK_IS_ZERO), 259: 33005}), r"JPEG 2000\) cannot be read"),
        (tiff([GREY16], {**tags_of(16, BLACK_IS_ZERO), 259: 12345}), "compression 12345"),
        (tiff([GREY16], tags_of(16, 32803)), r"camera raw \(CFA\)"),
        (tiff([GREY16], tags_of(16, BLACK_IS_ZERO, tag339=6)), "complex"),
        (tiff([GREY16], {**tags_of(16, RGB), 258: (5, 6, 5), 277: 3}), "5 and 6 bits in one pixel"),
        (tiff([GREY16], {**tags_of(16, BLACK_IS_ZERO), 256: 0}), "does not say how large"),
        (tiff([GREY16], {**tags_of(16, BLACK_IS_ZERO), 256: 1 << 20, 257: 1 << 20}), "pixels"),
        (tiff([GREY16], {**tags_of(64, BLACK_IS_ZERO, tag339=3), 256: 13_000, 257: 13_000}), "bytes of samples"),
        (tiff([GREY16] * 2, {**tags_of(16, RGB), 258: 16, 277: 2, 284: 2}), "its colours need 3"),
    ],
)
def test_what_cannot_be_read_says_truly_why(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected, match=reason) as caught:
        decode(data)
    assert "not an image" not in caught.value.reason


def test_strips_that_share_their_bytes_are_not_copied_over_and_over() -> None:
    body = zlib.compress(bytes(200_000), 0)
    data = bytearray(tiff([body, *[b""] * 999], {**tags_of(16, WHITE_IS_ZERO), 257: 1000, 259: 8, 278: 1}))
    places = struct.pack("<1000I", *[8] * 1000)
    sizes = struct.pack("<1000I", *[len(body)] * 1000)
    data[-8000:] = places + sizes
    with pytest.raises(Rejected, match="longer than the file"):
        decode(bytes(data))
