"""Small pictures of remembered images, for pages that people read."""

import base64
import io

from PIL import Image

JPEG_QUALITY = 80
KEPT_PIXELS = 112  # the largest side of the thumbnails stored in a memory: about 3 KB each


def thumbnail(image: Image.Image, pixels: int = KEPT_PIXELS) -> bytes:
    """An RGB image as a JPEG at most `pixels` a side.

    Images smaller than half of that are enlarged without smoothing, so that their pixels can be seen.
    """
    if max(image.size) <= pixels // 2:
        factor = pixels // max(image.size)
        small = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        small = image.copy()
        small.thumbnail((pixels, pixels))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def data_uri(jpeg: bytes) -> str:
    """A JPEG as a data URI, for a page that loads nothing from elsewhere."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
