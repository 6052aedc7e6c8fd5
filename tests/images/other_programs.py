"""Pictures as other programs write them: ImageMagick, libtiff's tools, netpbm, libwebp's and libjpeg-turbo's tools.

Each variant is a command that makes one file of {scene} (RGB), {grey}, {cutout} (RGBA) or {second} (RGB, of the same
size as the scene). `rendered` is what ImageMagick shows of a file, its transparent parts on white.
"""

import io
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tests.images.pictures import tiff

PROGRAMS = {
    "imagemagick": "identify",
    "libtiff-tools": "tiffcp",
    "netpbm": "pnmtopng",
    "webp": "cwebp",
    "libjpeg-turbo-progs": "cjpeg",
}
SIZES = [(61, 47), (64, 64), (33, 100), (128, 96), (17, 23)]
SECONDS = 60  # more than enough for one small file


def absent() -> list[str]:
    """The Debian packages whose programs are not at hand."""
    return [package for package, program in PROGRAMS.items() if shutil.which(program) is None]


@dataclass(frozen=True)
class Variant:
    """A kind of file: the ending and the shell command that writes {out}.

    ImageMagick 6 undoes a white at zero in TIFFs of 1, 8 and 16 bits and forgets it at other depths, where libtiff's
    and netpbm's tools undo it: its rendering of `deep_white_at_zero` is inverted before it is compared.
    """

    name: str
    ending: str
    command: str
    deep_white_at_zero: bool = False


def _greys(ending: str, depths: dict[str, str], more: dict[str, str]) -> list[Variant]:
    return [
        Variant(
            f"{ending} grey {depth} {name}".strip(),
            ending,
            f"convert {{grey}} {how} {options} {{out}}",
            deep_white_at_zero="white at zero" in name and depth not in ("1", "8", "16"),
        )
        for depth, how in depths.items()
        for name, options in more.items()
    ]


JPEG = [
    Variant("jpeg 4:2:0", "jpg", "convert {scene} -quality 90 -sampling-factor 2x2 {out}"),
    Variant("jpeg 4:4:4", "jpg", "convert {scene} -quality 95 -sampling-factor 1x1 {out}"),
    Variant("jpeg 4:1:1", "jpg", "convert {scene} -quality 90 -sampling-factor 4x1 {out}"),
    Variant("jpeg grey", "jpg", "convert {grey} -quality 92 {out}"),
    Variant("jpeg progressive", "jpg", "convert {scene} -quality 90 -interlace JPEG {out}"),
    Variant("jpeg CMYK", "jpg", "convert {scene} -colorspace CMYK -quality 92 {out}"),
    Variant("jpeg RGB", "jpg", "cjpeg -rgb -quality 92 {scene} > {out}"),
    Variant("jpeg arithmetic", "jpg", "cjpeg -arithmetic -quality 92 {scene} > {out}"),
    Variant("jpeg restarts", "jpg", "cjpeg -restart 1 -quality 92 {scene} > {out}"),
    Variant("jpeg two quantizations", "jpg", "cjpeg -quality 90,60 -sample 2x1 {scene} > {out}"),
    Variant("jpeg with a comment and a profile", "jpg", "convert {scene} -set comment words -quality 90 {out}"),
]
PNG = [
    *_greys(
        "png",
        {bits: f"-define png:color-type=0 -define png:bit-depth={bits}" for bits in ("1", "2", "4", "8", "16")},
        {"": ""},
    ),
    Variant("png RGB", "png", "convert {scene} -define png:color-type=2 {out}"),
    Variant("png RGB 16", "png", "convert {scene} -attenuate 0.1 +noise Uniform -define png:bit-depth=16 {out}"),
    Variant("png RGBA", "png", "convert {cutout} -define png:color-type=6 {out}"),
    Variant("png RGBA 16", "png", "convert {cutout} -define png:color-type=6 -define png:bit-depth=16 {out}"),
    Variant("png grey and alpha", "png", "convert {cutout} -colorspace Gray -define png:color-type=4 {out}"),
    Variant(
        "png grey and alpha 16",
        "png",
        "convert {cutout} -colorspace Gray -define png:color-type=4 -define png:bit-depth=16 {out}",
    ),
    *[
        Variant(f"png palette {bits}", "png", f"convert {{scene}} +dither -colors {1 << bits} PNG8:{{out}}")
        for bits in (1, 2, 4, 8)
    ],
    Variant("png palette with alpha", "png", "convert {cutout} +dither -colors 200 PNG8:{out}"),
    Variant("png interlaced", "png", "convert {scene} -interlace PNG {out}"),
    *[
        Variant(
            f"png grey {bits} transparent",
            "png",
            f"convert {{grey}} +dither -colors {1 << bits} ppm:- | ppmtopgm | pamdepth {(1 << bits) - 1} |"
            f" pnmtopng -force -transparent =rgb:{colour} > {{out}}",
        )
        for bits, colour in ((1, "00/00/00"), (2, "55/55/55"), (4, "88/88/88"), (8, "80/80/80"))
    ],
    Variant("png RGB transparent", "png", "pnmtopng -force -transparent =rgb:28/3c/c8 {scene} > {out}"),
    Variant("png of netpbm with gamma", "png", "pnmtopng -gamma 0.45455 {scene} > {out}"),
    Variant("png of netpbm with a background", "png", "pnmtopng -background red {scene} > {out}"),
]
GIF = [
    Variant("gif", "gif", "convert {scene} +dither -colors 256 {out}"),
    Variant("gif 87a", "gif", "convert {scene} +dither -colors 16 GIF87:{out}"),
    Variant("gif interlaced", "gif", "convert {scene} -colors 64 -interlace GIF {out}"),
    Variant("gif transparent", "gif", "convert {cutout} {out}"),
    Variant("gif animation", "gif", "convert -delay 10 -loop 0 {scene} {second} {out}"),
    Variant("gif animation dispose background", "gif", "convert -dispose Background {cutout} {second} {out}"),
    Variant("gif animation dispose previous", "gif", "convert -dispose Previous {cutout} {second} {out}"),
    Variant("gif first frame smaller than its canvas", "gif", "convert -page 140x120+5+7 {scene} {second} {out}"),
]
BMP = [
    Variant("bmp 1", "bmp", "convert {grey} -monochrome -type bilevel {out}"),
    Variant("bmp 4", "bmp", "convert {scene} +dither -colors 16 -type palette {out}"),
    Variant("bmp 8", "bmp", "convert {scene} +dither -colors 250 -type palette -compress none {out}"),
    Variant("bmp 8 run lengths", "bmp", "convert {scene} +dither -colors 30 -type palette -compress RLE {out}"),
    Variant("bmp 16 5-5-5", "bmp", "convert {scene} -define bmp:subtype=RGB555 {out}"),
    Variant("bmp 16 5-6-5", "bmp", "convert {scene} -define bmp:subtype=RGB565 {out}"),
    Variant("bmp 24", "bmp", "convert {scene} -type truecolor BMP3:{out}"),
    Variant("bmp 32", "bmp", "convert {cutout} {out}"),
    Variant("bmp OS/2", "bmp", "ppmtobmp -os2 {scene} > {out}"),
    Variant("bmp OS/2 palette", "bmp", "pnmquant 200 {scene} | ppmtobmp -os2 > {out}"),
    Variant("bmp Windows of netpbm", "bmp", "ppmtobmp -windows -bpp 24 {scene} > {out}"),
    Variant("bmp version 2", "bmp", "convert {scene} BMP2:{out}"),
]
TIFF = [
    *_greys(
        "tif",
        {str(bits): f"-depth {bits}" for bits in (1, 2, 4, 8, 12, 16, 32)},
        {
            "black at zero": "-compress none -define quantum:polarity=min-is-black",
            "white at zero": "-compress none -define quantum:polarity=min-is-white",
            "white at zero, big-endian": "-compress lzw -define tiff:endian=msb -define quantum:polarity=min-is-white",
            "black at zero, big-endian": "-compress zip -define tiff:endian=msb -define quantum:polarity=min-is-black",
        },
    ),
    *_greys(
        "tif",
        {
            f"float {bits}": f"-depth {bits} -define quantum:format=floating-point -compress zip"
            for bits in (16, 32, 64)
        },
        {"": ""},
    ),
    *_greys(
        "tif",
        {f"float {bits}": f"-depth {bits} -define quantum:format=floating-point -compress zip" for bits in (32, 64)},
        {"white at zero": "-define quantum:polarity=min-is-white"},
    ),
    Variant(
        "tif RGB float 32", "tif", "convert {scene} -depth 32 -define quantum:format=floating-point -compress zip {out}"
    ),
    Variant("tif RGB 16", "tif", "convert {scene} -depth 16 -compress none {out}"),
    Variant("tif RGB 32", "tif", "convert {scene} -depth 32 -compress none {out}"),
    Variant("tif RGB 12", "tif", "convert {scene} -depth 12 -compress none {out}"),
    Variant("tif grey and alpha 16", "tif", "convert {cutout} -colorspace Gray -depth 16 {out}"),
    Variant("tif palette", "tif", "convert {scene} +dither -colors 200 -type palette {out}"),
    Variant("tif palette 4", "tif", "convert {scene} +dither -colors 16 -type palette {out}"),
    Variant("tif unassociated alpha", "tif", "convert {cutout} -define tiff:alpha=unassociated {out}"),
    Variant("tif associated alpha", "tif", "convert {cutout} -define tiff:alpha=associated {out}"),
    Variant("tif associated alpha 16", "tif", "convert {cutout} -depth 16 -define tiff:alpha=associated {out}"),
    Variant("tif CMYK", "tif", "convert {scene} -colorspace CMYK {out}"),
    Variant("tif CMYK 16", "tif", "convert {scene} -colorspace CMYK -depth 16 {out}"),
    Variant("tif CIELAB", "tif", "convert {scene} -colorspace Lab -depth 8 {out}"),
    Variant("tif CIELAB 16", "tif", "convert {scene} -colorspace Lab -depth 16 {out}"),
    Variant("tif two pages", "tif", "convert {scene} {second} {out}"),
    *[
        Variant(f"tif {name}", "tif", f"convert {{scene}} -depth 8 tif:{{out}}.0 && tiffcp {options} {{out}}.0 {{out}}")
        for name, options in {
            "lzw with a predictor": "-c lzw:2",
            "deflate with a predictor": "-c zip:2",
            "packbits": "-c packbits",
            "jpeg": "-c jpeg:95 -r 16",
            "jpeg RGB": "-c jpeg:r:95 -r 16",
            "zstd": "-c zstd",
            "lzma": "-c lzma",
            "webp": "-c webp:95",
            "lerc": "-c lerc",
            "tiled": "-t -w 32 -l 48",
            "tiled lzw": "-t -w 32 -l 16 -c lzw:2",
            "separate planes": "-p separate",
            "separate planes lzw": "-p separate -c lzw:2",
            "separate planes tiled": "-p separate -t -w 16 -l 16 -c zip",
            "BigTIFF": "-8 -c lzw",
            "bits from the right": "-f lsb2msb -c lzw",
            "one strip": "-r 100000",
            "strips of a row": "-r 1",
        }.items()
    ],
    *[
        Variant(
            f"tif 16 {name}", "tif", f"convert {{scene}} -depth 16 tif:{{out}}.0 && tiffcp {options} {{out}}.0 {{out}}"
        )
        for name, options in {
            "tiled deflate": "-t -w 16 -l 32 -c zip:2",
            "big-endian lzw": "-B -c lzw:2",
        }.items()
    ],
    *[
        Variant(
            f"tif grey {name}",
            "tif",
            f"convert {{grey}} {how} -depth {depth} tif:{{out}}.0 && tiffcp {options} {{out}}.0 {{out}}",
        )
        for name, how, depth, options in [
            ("16 tiled", "", 16, "-t -w 16 -l 16"),
            ("16 big-endian tiled zstd", "", 16, "-B -t -w 32 -l 16 -c zstd:2"),
            ("float 32 with a predictor", "-define quantum:format=floating-point -compress zip", 32, "-c zip:3"),
            ("float 16 big-endian", "-define quantum:format=floating-point -compress zip", 16, "-B -c none"),
            ("float 32 big-endian", "-define quantum:format=floating-point -compress zip", 32, "-B -c lzw:2"),
            (
                "float 64 big-endian",
                "-define quantum:format=floating-point -compress zip",
                64,
                "-B -t -w 16 -l 16 -c none",
            ),
            (
                "float 32 tiled with a predictor",
                "-define quantum:format=floating-point -compress zip",
                32,
                "-t -w 16 -l 16 -c zstd:3",
            ),
            ("12 lzw", "", 12, "-c lzw"),
            ("12 tiled", "", 12, "-t -w 16 -l 16"),
            ("16 bits from the right", "", 16, "-f lsb2msb"),
        ]
    ],
    *[
        Variant(f"tif {name}", "tif", f"convert {{grey}} -monochrome -depth 1 -compress {how} {{out}}")
        for name, how in {"CCITT group 3": "Fax", "CCITT group 4": "Group4", "1 packbits": "RLE"}.items()
    ],
    Variant("tif 16 separate planes", "tif", "convert {scene} -depth 16 -interlace plane -compress none {out}"),
    Variant("tif 16 separate planes lzw", "tif", "convert {scene} -depth 16 -interlace plane -compress lzw {out}"),
    Variant("tif RGBA 16 separate planes", "tif", "convert {cutout} -depth 16 -interlace plane -compress zip {out}"),
    Variant(
        "tif float RGBA", "tif", "convert {cutout} -depth 32 -define quantum:format=floating-point -compress zip {out}"
    ),
    Variant("tif 10", "tif", "convert {grey} -depth 10 {out}"),
    Variant("tif 14 RGB", "tif", "convert {scene} -depth 14 -compress lzw {out}"),
    *[
        Variant(
            f"tif of netpbm, white at zero {name}",
            "tif",
            f"{how} | pamtotiff -miniswhite {options} -output {{out}}",
            deep_white_at_zero="2" in name or "4" in name,
        )
        for name, how, options in [
            ("1", "pgmtopbm {grey}", "-packbits"),
            ("2", "pamdepth 3 {grey}", ""),
            ("4", "pamdepth 15 {grey}", "-lzw -predictor=1"),
            ("8", "cat {grey}", "-flate"),
            ("16", "pamdepth 65535 {grey}", "-lzw -predictor=2"),
        ]
    ],
    Variant("tif YCbCr", "tif", "convert {scene} -colorspace YCbCr -depth 8 {out}"),
    Variant("tif YCbCr jpeg 2x2", "tif", "convert {scene} -compress JPEG -quality 95 {out}"),
    Variant("tif of netpbm", "tif", "pamtotiff -truecolor {scene} -output {out}"),
]
WEBP = [
    Variant("webp lossy", "webp", "cwebp -quiet -q 90 {scene} -o {out}"),
    Variant("webp lossless", "webp", "cwebp -quiet -lossless {scene} -o {out}"),
    Variant("webp alpha", "webp", "cwebp -quiet -q 90 {cutout} -o {out}"),
    Variant("webp lossless alpha", "webp", "cwebp -quiet -lossless -exact {cutout} -o {out}"),
    Variant("webp of ImageMagick", "webp", "convert {cutout} -quality 92 {out}"),
    Variant(
        "webp animation",
        "webp",
        "cwebp -quiet -lossless {scene} -o {out}.0 && cwebp -quiet {second} -o {out}.1 &&"
        " webpmux -frame {out}.0 +100 -frame {out}.1 +100 -loop 0 -o {out} > {out}.log 2>&1",
    ),
]
TURNED = [
    Variant(f"{ending} turned {turn}", ending, f"convert {{scene}} -orient {turn} -quality 92 {{out}}")
    for ending in ("jpg", "tif")
    for turn in ("TopRight", "BottomRight", "BottomLeft", "LeftTop", "RightTop", "RightBottom", "LeftBottom")
]
VARIANTS = [*JPEG, *PNG, *GIF, *BMP, *TIFF, *WEBP, *TURNED]


def write_scenes(folder: Path, size: tuple[int, int]) -> dict[str, Path]:
    """A scene of smooth colours, discs and grain; another one; its greys; and the scene cut out with soft edges."""
    width, height = size
    random = np.random.default_rng(width * 1000 + height)
    down, across = np.mgrid[0:height, 0:width]
    scenes = []
    for _ in range(2):
        pixels = np.stack([across * 255 / width, down * 255 / height, np.full_like(down, 90)], axis=2)
        for _ in range(6):
            x, y, radius = random.random() * width, random.random() * height, random.uniform(0.1, 0.4) * min(size)
            pixels[(across - x) ** 2 + (down - y) ** 2 < radius**2] = random.integers(0, 256, 3)
        pixels += random.normal(0, 4, pixels.shape)
        pixels[: height // 4, : width // 4] = (0x28, 0x3C, 0xC8)
        scenes.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    edge = np.hypot((across - width / 2) / width, (down - height / 2) / height)
    cutout = scenes[0].copy()
    cutout.putalpha(Image.fromarray(((0.6 - edge) * 900).clip(0, 255).astype(np.uint8)))
    paths = {name: folder / f"{name}-{width}x{height}.{ending}" for name, ending in _SCENES.items()}
    for name, image in zip(_SCENES, [scenes[0], scenes[1], scenes[0].convert("L"), cutout], strict=True):
        image.save(paths[name])
    return paths


_SCENES = {"scene": "ppm", "second": "ppm", "grey": "pgm", "cutout": "png"}


def write(variant: Variant, scenes: dict[str, Path], out: Path) -> None:
    """Run the command of a variant. Raises CalledProcessError if it fails, with what the program said."""
    command = variant.command.format(out=out, **scenes)
    subprocess.run(command, shell=True, check=True, timeout=SECONDS, capture_output=True)


def rendered(path: Path, variant: Variant) -> np.ndarray:
    """uint8 [H, W, 3]: the first frame on its canvas, turned upright, on white, no profile applied."""
    options = ["-coalesce"] if path.suffix in {".gif", ".webp"} else []
    command = ["convert", f"{path}[0]", *options, "-auto-orient", "-background", "white", "-alpha", "remove"]
    command += ["-alpha", "off", "-colorspace", "sRGB", "-depth", "8", "ppm:-"]
    shown = subprocess.run(command, check=True, timeout=SECONDS, capture_output=True).stdout
    pixels_HW3 = np.asarray(Image.open(io.BytesIO(shown)).convert("RGB"))
    return 255 - pixels_HW3 if variant.deep_white_at_zero and _forgets_white_at_zero(path.parent) else pixels_HW3


@cache
def _forgets_white_at_zero(folder: Path) -> bool:
    """Whether this ImageMagick shows a TIFF of 2 bits black that is white, as version 6 does."""
    path = folder / "white at zero.tif"
    path.write_bytes(tiff([bytes(8)], {256: 4, 257: 8, 258: 2, 259: 1, 262: 0, 277: 1, 278: 8}))
    return bool(rendered(path, Variant("white", "tif", "")).max() == 0)
