"""Hundreds of pictures that other programs made look as ImageMagick shows them, or say truly why not."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.images.decoding.decode import Rejected, decode
from tests.images.other_programs import SIZES, VARIANTS, Variant, absent, rendered, write, write_scenes
from tests.images.pictures import png_chunk

pytestmark = pytest.mark.skipif(bool(absent()), reason=f"apt-get install {' '.join(absent())}")

MOST = 2.0  # grey levels of 255, the mean over a picture
REJECTED = {  # what Pillow's libtiff was built without
    "tif webp": "8-bit RGB TIFF (WebP) is damaged or truncated, or its compression is not known",
    "tif lerc": "8-bit RGB TIFF (LERC) cannot be read",
}


def difference(path: Path, variant: Variant) -> float | str:
    """The mean difference to ImageMagick's rendering in grey levels, or the reason of a reject."""
    theirs_HW3 = rendered(path, variant)
    try:
        ours_HW3 = np.asarray(decode(path.read_bytes()).image)
    except Rejected as rejected:
        return rejected.reason
    if ours_HW3.shape != theirs_HW3.shape:
        return f"{ours_HW3.shape} is not {theirs_HW3.shape}"
    return float(np.abs(ours_HW3.astype(int) - theirs_HW3).mean())


def test_pictures_look_as_imagemagick_shows_them(tmp_path: Path) -> None:
    def try_variant(variant: Variant) -> list[float | str]:
        found = []
        for number, scenes in enumerate(all_scenes[: 1 if variant.name in REJECTED else 2]):
            out = tmp_path / f"{VARIANTS.index(variant)}-{number}.{variant.ending}"
            write(variant, scenes, out)
            found.append(difference(out, variant))
        return found

    all_scenes = [write_scenes(tmp_path, size) for size in SIZES[:2]]
    with ThreadPoolExecutor(2) as threads:
        results = dict(zip([variant.name for variant in VARIANTS], threads.map(try_variant, VARIANTS), strict=True))
    num_pictures = sum(map(len, results.values()))
    print(f"\n{num_pictures} pictures of {len(results)} variants; the largest mean difference of each in grey levels")
    wrong = {}
    for name, found in results.items():
        worst = max(found, key=lambda one: (isinstance(one, str), one))
        print(f"  {name:50} {worst if isinstance(worst, str) else round(worst, 2)}")
        if not (isinstance(worst, str) and REJECTED.get(name, "\0") in worst) and (
            isinstance(worst, str) or worst > MOST or name in REJECTED
        ):
            wrong[name] = worst
    assert not wrong
    assert num_pictures >= 300
    assert len(results) >= 150


DAMAGES = {  # before the pixels of a PNG
    "text": png_chunk(b"tEXt", b"Comment\0words", crc=1),
    "profile": png_chunk(b"iCCP", b"icc\0\0garbage", crc=1),
    "gamma": png_chunk(b"gAMA", b"\0\1"),
    "transparency": png_chunk(b"tRNS", b"\0\1\0\2\0\3", crc=1),
    "unknown": png_chunk(b"abCd", b"private", crc=1),
    "long text": png_chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_pngs_look_as_imagemagick_shows_them(damage: str, tmp_path: Path) -> None:
    variants = [variant for variant in VARIANTS if variant.name in ("png RGB", "png grey 8", "png RGB 16", "png RGBA")]
    scenes = write_scenes(tmp_path, SIZES[0])
    for number, variant in enumerate(variants):
        out = tmp_path / f"{number}.png"
        write(variant, scenes, out)
        whole = out.read_bytes()
        out.write_bytes(whole[:33] + DAMAGES[damage] + whole[33:])
        found = difference(out, variant)
        assert isinstance(found, float), found
        assert found <= MOST


@pytest.mark.parametrize("tail", [b"", b"\xff", b"\0", bytes(100), b"\r\n"])
def test_jpeg_files_without_their_end_look_as_imagemagick_shows_them(tail: bytes, tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path, SIZES[1])
    for number, variant in enumerate(variant for variant in VARIANTS if variant.ending == "jpg"):
        if variant.name == "jpeg arithmetic":  # its coder leaves out zeros at the end: nobody can tell if it is whole
            continue
        out = tmp_path / f"{number}.jpg"
        write(variant, scenes, out)
        out.write_bytes(out.read_bytes()[:-2] + tail)
        found = difference(out, variant)
        assert isinstance(found, float), (variant.name, found)
        assert found <= MOST
