"""The samples of a TIFF as stored, of any depth, for files that Pillow reads wrongly or not at all.

Pillow's table of TIFFs lacks most greys beyond 8 bits. Pillow unpacks others without undoing the byte order or white at
zero. Here its libtiff only decompresses: it gets strips and tiles as 8-bit greys of one byte a pixel, so that it
returns the bytes of the samples, whatever they mean.
"""

import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from pipeline.images.decoding.tiff_header import COMPRESSIONS, FLOAT, SIGNED, UNCOMPRESSED, UNSIGNED, TiffHeader

MAX_BYTES = 4 * 178_956_970  # of all samples: as many as an RGBA image with the most pixels
_BYTES_AT_ONCE = 64 << 20
_SAMPLES_AT_ONCE = 1 << 20
_MIRRORED = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], dtype=np.uint8)


class TiffSamples:
    """The bytes of all samples, decompressed; `rows` gives them as numbers."""

    def __init__(self, data: bytes, header: TiffHeader) -> None:
        """Raises ValueError with the reason if the samples cannot be read. Holds their bytes in memory."""
        self.header = header
        _refuse_unknown(header)
        self._byte_order = header.byte_order
        planes = header.num_samples if header.is_planar else 1
        self._planes = [self._read_plane(data, plane) for plane in range(planes)]

    def rows(self) -> Iterator[np.ndarray]:
        """Runs of rows from the top: unsigned, signed or float [rows, width, samples]."""
        header = self.header
        step = max(1, _SAMPLES_AT_ONCE // (header.width * header.num_samples))
        for top in range(0, header.height, step):
            numbers = [self._numbers(plane[top : top + step]) for plane in self._planes]
            yield np.concatenate(numbers, axis=2) if len(numbers) > 1 else numbers[0]

    def _numbers(self, bytes_HB: np.ndarray) -> np.ndarray:
        header = self.header
        a_pixel = 1 if header.is_planar else header.num_samples
        a_row = header.width * a_pixel
        if header.bits in (8, 16, 32, 64):
            kind = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}[header.sample_format]
            numbers = np.ascontiguousarray(bytes_HB).view(np.dtype(f"{self._byte_order}{kind}{header.bits // 8}"))
        elif header.bits == 24:
            of_three = bytes_HB[:, : a_row * 3].reshape(-1, a_row, 3).astype(np.uint32)
            low, high = (0, 2) if self._byte_order == "<" else (2, 0)
            numbers = of_three[:, :, low] | of_three[:, :, 1] << 8 | of_three[:, :, high] << 16
        else:  # packed from the left, in either byte order
            bits = np.unpackbits(bytes_HB, axis=1, count=a_row * header.bits).reshape(-1, a_row, header.bits)
            numbers = np.zeros(bits.shape[:2], np.uint16 if header.bits <= 16 else np.uint32)
            for place in range(header.bits):
                numbers = numbers << 1 | bits[:, :, place]
        return numbers[:, :a_row].reshape(-1, header.width, a_pixel)

    def _read_plane(self, data: bytes, plane: int) -> np.ndarray:
        """The bytes of a plane, with its tiles put together: uint8 [height, bytes of a row]."""
        header = self.header
        width, height = header.rectangle
        a_pixel = 1 if header.is_planar else header.num_samples
        row_bytes = (width * a_pixel * header.bits + 7) // 8
        across, down = -(-header.width // width), -(-header.height // height)
        first, num = plane * across * down, across * down
        lines = down * height if header.is_tiled else header.height
        bytes_HB = self._read_rectangles(data, first, num, row_bytes, across * lines)
        self._byte_order = _undo_predictor(bytes_HB, header, a_pixel, width)
        if header.is_tiled:
            tiles = bytes_HB.reshape(down, across, height, row_bytes).swapaxes(1, 2)
            bytes_HB = tiles.reshape(down * height, across * row_bytes)[: header.height]
        return bytes_HB

    def _read_rectangles(self, data: bytes, first: int, num: int, row_bytes: int, lines: int) -> np.ndarray:
        """The bytes of `num` strips or tiles from `first` on, one below the other: uint8 [lines, row_bytes]."""
        header, height = self.header, self.header.rectangle[1]
        offsets, counts = header.offsets[first : first + num], header.counts[first : first + num]
        if len(offsets) < num:
            raise ValueError(f"the {header.kind} is truncated: {num} strips or tiles, and {len(offsets)} places")
        stored_HB = np.empty((lines, row_bytes), np.uint8)
        if header.compression == UNCOMPRESSED:
            for index, offset in enumerate(offsets):
                part = stored_HB[index * height : (index + 1) * height]
                found = np.frombuffer(data, np.uint8)[offset : offset + part.size]
                is_short = num > 1 and len(counts) == num and counts[index] < part.size  # one may be wrong
                if found.size < part.size or is_short:
                    raise ValueError(f"the {header.kind} is truncated")
                part[:] = found.reshape(part.shape)
            return _MIRRORED[stored_HB] if header.bits_from_right else stored_HB
        if len(counts) < num:
            raise ValueError(f"the {header.kind} does not say how long its strips or tiles are")
        if sum(counts) > 4 * len(data):  # strips that share bytes would be copied over and over
            raise ValueError(f"the {header.kind} says that its strips or tiles are longer than the file")
        at_once = max(1, _BYTES_AT_ONCE // (height * row_bytes))
        for start in range(0, num, at_once):
            places = zip(offsets[start : start + at_once], counts[start : start + at_once], strict=True)
            rectangles = [data[offset : offset + count] for offset, count in places]
            part = stored_HB[start * height : (start + len(rectangles)) * height]
            part[:] = _decompress(rectangles, header, row_bytes, height, len(part))
        return stored_HB


def _refuse_unknown(header: TiffHeader) -> None:
    if not header.bytewise:
        raise ValueError(f"the {header.kind} cannot be read: this compression is not known, or not with such samples")
    sizes = {UNSIGNED: range(1, 33), SIGNED: (8, 16, 32), FLOAT: (16, 32, 64)}.get(header.sample_format, ())
    if header.bits not in sizes:
        raise ValueError(f"the {header.kind} cannot be read: samples of this size are not known")
    width, height = header.rectangle
    if not 0 < width <= 1 << 24 or not 0 < height <= 1 << 24:
        raise ValueError(f"the {header.kind} has tiles of {width} x {height} pixels")
    if header.is_tiled and width * header.bits % 8:
        raise ValueError(f"the {header.kind} has tiles whose rows end within a byte")
    across, down = -(-header.width // width), -(-header.height // height)
    lines = down * height if header.is_tiled else header.height
    num_bytes = across * width * lines * header.num_samples * header.bits // 8
    if num_bytes > MAX_BYTES:
        raise ValueError(f"the {header.kind} has {num_bytes:,} bytes of samples, more than {MAX_BYTES:,}")
    if header.predictor not in (1, 2, 3) or (header.predictor == 2 and header.bits not in (8, 16, 32, 64)):
        raise ValueError(f"the {header.kind} has predictor {header.predictor}, which is not known for its samples")
    if header.predictor == 3 and header.sample_format != FLOAT:
        raise ValueError(f"the {header.kind} has the predictor of floats")


def _decompress(rectangles: list[bytes], header: TiffHeader, row_bytes: int, height: int, lines: int) -> np.ndarray:
    """Rectangles, decompressed, one below the other: uint8 [lines, row_bytes]. All but the last have `height` lines."""
    counts = [len(rectangle) for rectangle in rectangles]
    num = len(rectangles)
    body = b"".join(rectangles)
    tables = 8 + len(body)
    offsets = np.cumsum([8, *counts[:-1]]).tolist()
    places = struct.pack(f"<{2 * num}I", *offsets, *counts)
    order = 2 if header.bits_from_right else 1
    entries = [(256, row_bytes), (257, lines), (258, 8), (259, header.compression), (262, 1), (266, order)]
    entries += [(273, tables if num > 1 else offsets[0]), (277, 1), (278, height)]
    entries += [(279, tables + 4 * num if num > 1 else counts[0])]
    directory = struct.pack("<H", len(entries))
    for tag, value in entries:
        directory += struct.pack("<HHII", tag, 4, num if tag in (273, 279) else 1, value)
    start = struct.pack("<2sHI", b"II", 42, tables + len(places))
    name = COMPRESSIONS[header.compression]
    try:
        with Image.open(io.BytesIO(start + body + places + directory + b"\0\0\0\0"), formats=("TIFF",)) as image:
            return np.array(image)
    except OSError as error:
        raise ValueError(f"the {name} data of the {header.bits}-bit TIFF are damaged or truncated") from error


def _undo_predictor(bytes_HB: np.ndarray, header: TiffHeader, a_pixel: int, width: int) -> str:
    """Turn differences into values, in place. Returns the byte order of the values."""
    if header.predictor == 1 or header.compression == UNCOMPRESSED:
        return header.byte_order
    size = header.bits // 8
    step = max(1, _SAMPLES_AT_ONCE // (width * a_pixel))
    for top in range(0, len(bytes_HB), step):
        rows = bytes_HB[top : top + step]
        if header.predictor == 2:
            values = rows.view(np.dtype(f"{header.byte_order}u{size}")).astype(f"<u{size}").reshape(-1, width, a_pixel)
            rows[:] = np.cumsum(values, axis=1, dtype=values.dtype).view(np.uint8).reshape(rows.shape)
        else:  # differences of bytes, grouped by significance, the most significant first
            planes = np.cumsum(rows.reshape(-1, width * size, a_pixel), axis=1, dtype=np.uint8)
            rows[:] = planes.reshape(-1, size, width * a_pixel).swapaxes(1, 2).reshape(rows.shape)
    return "<" if header.predictor == 2 else ">"
