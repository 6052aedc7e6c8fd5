"""Small pictures of remembered images, for pages people look at."""

import base64
import io

from PIL import Image

from pipeline.images.decode import Rejected, decode, read_bytes

JPEG_QUALITY = 80


def thumbnail_data_uri(uri: str, pixels: int) -> str | None:
    """The image at `uri` as a data URI of a JPEG at most `pixels` a side; None when its file is gone or unreadable.

    Images smaller than half of that are enlarged without smoothing, so that their pixels can be seen.
    """
    try:
        image = decode(read_bytes(uri)).image
    except Rejected:
        return None
    if max(image.size) <= pixels // 2:
        factor = pixels // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((pixels, pixels))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
