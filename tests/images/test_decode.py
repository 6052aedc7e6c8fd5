"""Decoding: every colour mode to the colours it shows, and every broken file to a reason."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipeline.images.decoding.decode import Decoded, Rejected, decode
from pipeline.images.names.uris import uri_of_path
from pipeline.images.reading.files import read_file
from tests.images.pictures import bomb, encoded, gradient, write_assortment


def pixels(data: bytes) -> np.ndarray:
    decoded = decode(data)
    assert decoded.image.mode == "RGB"
    return np.asarray(decoded.image).astype(int)


@pytest.mark.parametrize(
    ("kind", "mode", "tolerance"),
    [
        ("PNG", "RGB", 0),
        ("PNG", "RGBA", 0),
        ("PNG", "P", 60),
        ("BMP", "RGB", 0),
        ("TIFF", "RGB", 0),
        ("TIFF", "CMYK", 1),
        ("TIFF", "YCbCr", 3),
        ("TIFF", "LAB", 6),
        ("JPEG", "RGB", 12),
        ("JPEG", "CMYK", 12),
        ("WEBP", "RGB", 25),
        ("GIF", "RGB", 40),
    ],
)
def test_colour_modes_show_their_colours(kind: str, mode: str, tolerance: int) -> None:
    picture = gradient()
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        stored = ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB")
        assert stored is not None
    else:
        stored = picture.convert(mode)
    found = pixels(encoded(stored, kind))
    assert np.abs(found - np.asarray(picture).astype(int)).mean() <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes(mode: str) -> None:
    picture = gradient().convert("L").convert(mode)
    expected = np.asarray(picture.convert("L")).astype(int)
    assert (pixels(encoded(picture, "PNG")) == expected[:, :, None]).all()


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    found = pixels(encoded(Image.fromarray(grey), "PNG"))
    assert np.abs(found[:, :, 0] - np.round(grey / 257.0)).max() <= 1


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 255), (1.001, 255), (255.0, 255), (65_535.0, 255)])
def test_float_tiff_is_scaled_by_its_range(scale: float, expected: int) -> None:
    grey = np.linspace(0, scale, 64, dtype=np.float32).reshape(8, 8)
    grey[0, 0] = np.nan
    found = pixels(encoded(Image.fromarray(grey), "TIFF"))
    assert found.max() == expected
    assert found[0, 0].tolist() == [0, 0, 0]


def test_transparency_is_laid_on_white() -> None:
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    picture.putpixel((0, 0), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 128))
    found = pixels(encoded(picture, "PNG"))
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[0, 1].tolist() == pytest.approx([127, 127, 127], abs=1)
    assert found[3, 3].tolist() == [255, 255, 255]


def test_a_transparent_grey_of_16_bits_is_white_and_the_rest_as_it_was() -> None:
    grey = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    found = pixels(encoded(Image.fromarray(grey), "PNG", transparency=0))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert np.abs(found[1:, :, 0] - np.round(grey[1:] / 257.0)).max() <= 1


def test_palette_transparency_is_laid_on_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    found = pixels(encoded(picture, "PNG", transparency=0))
    assert found[0].tolist() == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    picture = gradient()
    stored = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
    }[orientation](picture)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(stored, "PNG", exif=exif.tobytes()))
    assert decoded.image.size == picture.size
    assert (np.asarray(decoded.image) == np.asarray(picture)).all()


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0] or pixels(data)[0, 0].tolist() == [254, 0, 0]


def test_a_broken_exif_block_does_not_reject_the_picture() -> None:
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0" + b"II*\0garbage that is no directory")
    assert decode(data).image.size == (60, 40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"this is text", "not an image in JPEG"),
        (encoded(gradient(), "JPEG")[:700], "truncated"),
        (encoded(gradient(), "PNG")[:60], ""),
        (bomb(), "pixels"),
        (encoded(gradient(), "ICO"), "not an image in JPEG"),
        (b"GIF89a", "a GIF file that cannot be read: its header is damaged or truncated"),
        (b"\xff\xd8\xff\xe0\0", "truncated: it ends before its pixels"),
        (b"\xff\xd8\xff\xe0\0\1", "a JPEG file that cannot be read: its header names no size"),
        (b"BM" + bytes(60), "BMP header type"),
        (b"\x89PNG\r\n\x1a\n", ""),
    ],
)
def test_bad_bytes_become_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        decode(data)
    assert caught.value.stage == "decode"
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_ordinary_pictures_are_what_pillow_converts(kind: str, mode: str) -> None:
    """To the bit: these pixels are part of the identity of encoders."""
    if (kind, mode) in {("JPEG", "P"), ("JPEG", "1"), ("PNG", "CMYK"), ("WEBP", "CMYK")}:
        mode = "RGB"
    picture = gradient(123, 77)
    for options in ({}, {"optimize": True}, {"quality": 60}, {"progressive": True}, {"lossless": True}):
        data = encoded(picture.convert(mode), kind, **options)
        with Image.open(io.BytesIO(data)) as opened:
            assert decode(data).image.tobytes() == opened.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_ordinary_alpha_is_what_pillow_composites(kind: str) -> None:
    picture = gradient(123, 77).convert("RGBA")
    picture.putalpha(gradient(123, 77).convert("L"))
    data = encoded(picture, kind, lossless=True)
    with Image.open(io.BytesIO(data)) as opened:
        rgba = opened.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    assert decode(data).image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_colour_profiles_are_not_applied(kind: str) -> None:
    """Numbers are taken for sRGB, whatever the file says: here, that they are XYZ."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    with_profile = encoded(gradient(), kind, icc_profile=profile)
    with Image.open(io.BytesIO(with_profile)) as opened:
        assert opened.info["icc_profile"] == profile
    assert decode(with_profile).image.tobytes() == decode(encoded(gradient(), kind)).image.tobytes()


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]), data=st.data())
def test_damaged_files_are_decoded_or_rejected_never_more(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(gradient(16, 12), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(decode(bytes(damaged[: data.draw(st.integers(1, len(damaged)))])), Decoded)
    except Rejected as rejected:
        assert rejected.reason


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    for name, reason in (
        ("empty.jpg", "the file is empty"),
        ("gone.jpg", "there is no such file"),
        (".", "cannot be read"),
    ):
        with pytest.raises(Rejected, match=reason) as caught:
            read_file(uri_of_path(str(tmp_path / name)))
        assert caught.value.stage == "read"


def test_the_assortment_is_as_good_as_it_says(tmp_path: Path) -> None:
    for name, good in write_assortment(tmp_path).items():
        try:
            decode(read_file(str(tmp_path / name)))
            assert good, name
        except Rejected:
            assert not good, name


def test_decoding_leaves_no_open_file() -> None:
    stream = io.BytesIO(encoded(gradient(), "PNG"))
    assert decode(stream.getvalue()).sha256 == decode(stream.getvalue()).sha256


@pytest.mark.parametrize(
    ("shortest", "expected"),
    [(None, (400, 300)), (301, (400, 300)), (151, (400, 300)), (150, (200, 150)), (37, (50, 38)), (2, (50, 38))],
)
def test_a_jpeg_is_decoded_no_smaller_than_allowed(shortest: int | None, expected: tuple[int, int]) -> None:
    decoded = decode(encoded(gradient(400, 300), "JPEG"), shortest)
    assert decoded.image.size == expected
    assert (decoded.width, decoded.height) == (400, 300)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_other_kinds_are_decoded_whole(kind: str) -> None:
    assert decode(encoded(gradient(400, 300), kind), 32).image.size == (400, 300)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_smaller_is_turned_and_has_its_whole_size(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(400, 300), "JPEG", exif=exif.tobytes())
    whole, scaled = decode(data), decode(data, 75)
    assert (scaled.width, scaled.height) == (whole.width, whole.height) == whole.image.size
    small = np.asarray(whole.image.resize(scaled.image.size)).astype(int)
    assert np.abs(small - np.asarray(scaled.image).astype(int)).mean() < 3
