"""Files whose decoding would take hours or gigabytes are refused by their headers; those that people have are not."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.images.decoding.decode import MAX_PIXELS, Heavy, Rejected, decode, work_of
from pipeline.images.decoding.passes import MAX_SCANS, passes_over
from tests.images import bombs

ROOT = Path(__file__).parents[2]


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bombs.jpeg_of_scans(64, 2_000), "more than 500 scans"),
        (bombs.jpeg_of_scans(4_000, 400), "passes over 4000 x 4000 pixels are more than"),
        (bombs.jpeg_of_scans(64, 600, mode="CMYK"), "more than 500 scans"),
        (bombs.jpeg_in_several_scans(64, 600), "more than 500 scans"),
        (bombs.with_segments(bombs.jpeg_of_scans(8, 0), [(0xEA, b"")] * 20_000), "more than 16,384 segments"),
        (bombs.with_junk(bombs.jpeg_of_scans(8, 0), bytes(5 << 20)), "junk between them"),
        (
            bombs.with_segments(
                bombs.jpeg_of_scans(8, 0), [(0xE1, b"Exif\0\0" + bombs.overlapping_tags(4_000, 65_000))]
            ),
            "the JPEG's EXIF says that its tags are longer",
        ),
        (
            bombs.with_segments(bombs.jpeg_of_scans(8, 0), [(0xE1, b"Exif\0\0" + bytes(65_000))] * 70),
            "more than 4 MiB of EXIF",
        ),
        (bombs.png_of_chunks(200_000), "more than 131,072 chunks"),
        (bombs.gif_with(bombs.gif_comment(6 << 20)), "4 MiB of comments or junk"),
        (bombs.gif_with(bombs.gif_comment(1 << 20) * 6), "4 MiB of comments or junk"),
        (bombs.gif_with(bytes(6 << 20)), "4 MiB of comments or junk"),
        (bombs.tiff_of_jpeg(6_000, 200), "100 passes over 6000 x 6000 pixels"),
        (bombs.rle_bmp(9_000, 9_000, 9_000), "64 passes over 9000 x 9000 pixels"),
        (bombs.rle_bmp(8, 8, 8) + bytes(5 << 20), "many times the codes"),
        (bombs.overlapping_tags(4_000, 1 << 20), "the TIFF says that its tags are longer"),
        (bombs.directory([(1_000 + tag, 3, 1, 0) for tag in range(5_000)]), "a directory of 5,000 tags"),
        (bombs.directory([(273, 3, 2 << 20, 8)], 8 << 20), "a tag of 2,097,152 numbers"),
        (
            bombs.directory(
                [
                    *((tag, 4, 1, value) for tag, value in ((256, 1), (257, 1), (258, 8), (259, 5), (262, 1))),
                    *((tag, 4, 1, value) for tag, value in ((322, 65_536), (323, 65_536), (324, 8), (325, 8))),
                ]
            ),
            "65536 x 65536 pixels is more than",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_what_would_take_long_is_refused_by_its_headers(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as raised:
        decode(data)
    assert reason in raised.value.reason
    assert "\n" not in raised.value.reason


@pytest.mark.parametrize("exif", [bombs.overlapping_tags(4_000, 1 << 20), bombs.overlapping_tags(3, 100)])
def test_exif_that_lies_does_not_reject_a_png(exif: bytes) -> None:
    assert decode(bombs.with_exif_chunk(exif)).image.getpixel((0, 0)) == (255, 0, 0)


def test_exif_that_lies_does_not_reject_a_webp() -> None:
    data = bombs.saved(Image.new("RGB", (4, 4), "red"), "WEBP", exif=bombs.overlapping_tags(4_000, 1 << 20))
    assert decode(data).image.size == (4, 4)


@pytest.mark.parametrize(
    ("save", "passes"),
    [
        (lambda: bombs.saved(photo(64, 64), "JPEG"), 1),
        (lambda: bombs.saved(photo(64, 64).convert("L"), "JPEG"), 1),
        (lambda: bombs.saved(photo(64, 64), "JPEG", progressive=True), 10),
        (lambda: bombs.saved(photo(64, 64), "PNG"), 1),
        (lambda: bombs.saved(photo(64, 64), "WEBP"), 1),
        (lambda: bombs.saved(photo(64, 64), "TIFF"), 1),
    ],
)
def test_what_programs_write_is_taken(save: Callable[[], bytes], passes: int) -> None:
    data = save()
    assert passes_over(data) == passes
    assert work_of(data).pixels == 64 * 64
    assert decode(data).image.size == (64, 64)


def test_bytes_within_segments_are_no_scans() -> None:
    """Such as thumbnails within EXIF; the scans of this file are ten."""
    noise = b"\xff\xda" * 30_000
    data = bombs.with_segments(bombs.saved(photo(64, 64), "JPEG", progressive=True), [(0xED, noise)] * 3)
    assert 10 <= passes_over(data) <= MAX_SCANS
    assert decode(data).image.size == (64, 64)


def test_scans_of_pictures_behind_the_first_do_not_count() -> None:
    first = bombs.saved(photo(64, 64), "JPEG", progressive=True)
    data = first + bombs.jpeg_of_scans(64, 600)
    assert passes_over(data) == 10
    assert decode(data).image.size == (64, 64)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_only_the_first_frame_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (255, 120, 10)]
    data = bombs.saved(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    monkeypatch.setattr(Image.Image, "seek", lambda *_: pytest.fail("a frame behind the first was asked for"))
    assert decode(data).image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_what_costs_too_much_is_told_before_it_is_decoded(kind: str) -> None:
    data = bombs.saved(photo(100, 100), kind)
    with pytest.raises(Heavy) as raised:
        decode(data, most=9_999)
    assert (raised.value.work.pixels, raised.value.work.cost) == (10_000, 10_000)
    assert decode(data, most=10_000).image.size == (100, 100)


def test_a_jpeg_without_its_end_costs_more() -> None:
    """It is decoded several times before it is known to be whole."""
    data = bombs.saved(photo(100, 100), "JPEG")[:-2] + bytes(10)
    with pytest.raises(Heavy):
        decode(data, most=10_000)
    assert decode(data, most=100_000).image.size == (100, 100)


@pytest.mark.parametrize(
    ("name", "bytes_a_pixel"),
    [("float", 9), ("RGBA", 9), ("LA", 9), ("P", 6), ("I;16", 7), ("RGB", 5)],
)
def test_memory_grows_with_the_pixels_only(name: str, bytes_a_pixel: int, tmp_path: Path) -> None:
    """Pillow takes 4 bytes a pixel for RGB, and its source up to 4 more: wider numbers are of a few rows."""
    side = 6_000
    data = (
        bombs.float_tiff(side, side, 500)
        if name == "float"
        else bombs.saved(Image.new(name, (side, side)), "PNG", compress_level=1)
    )
    (tmp_path / "image").write_bytes(data)
    code = (
        "import resource, sys\n"
        "from pipeline.images.decoding.decode import decode\n"
        "from PIL import Image\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); decode(data); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "image")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(done.stdout) * 1024 < side * side * bytes_a_pixel + (100 << 20)


def test_the_scans_of_a_jpeg_in_a_tiff_are_counted() -> None:
    assert work_of(bombs.tiff_of_jpeg(64, 30)).passes == 36
    assert decode(bombs.tiff_of_jpeg(64, 30)).image.size == (64, 64)
    several = bombs.saved(photo(200, 200), "TIFF", compression="jpeg", tiffinfo={278: 16})
    assert work_of(several).passes == 1


def test_the_most_pixels_are_taken_as_before() -> None:
    assert MAX_PIXELS == 178_956_970
    data = bombs.float_tiff(13_000, 13_700, 500)
    assert work_of(data).pixels == 178_100_000


def test_floats_are_scaled_the_same_in_runs() -> None:
    values = bombs.ramp(700, 500)
    values[0, :4] = np.nan, np.inf, -np.inf, -1.0
    expected = (np.clip(np.nan_to_num(values.astype(np.float64), nan=0, posinf=0, neginf=0), 0, 1) * 255 + 0.5).astype(
        np.uint8
    )
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    assert (np.asarray(decode(stream.getvalue()).image)[:, :, 0] == expected).all()
