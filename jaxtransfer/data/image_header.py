"""The size of an image by the first bytes of its file, before anything is decoded."""

import re
import struct
import zlib

_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that begin a frame
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length


def size_of(data: bytes) -> tuple[int, int] | None:
    """Returns (width, height) as an image file states them, the larger of several; None for no image that is known.

    Known are PNG, JPEG, BMP, WebP, TIFF, PBM/PGM/PPM, GIF, JPEG 2000 and AVIF.

    Raises:
      ValueError: where the file ends too early or contradicts itself; the message says how.
    """
    for begins, read in _KINDS:
        if re.match(begins, data, re.DOTALL):
            try:
                return read(data)
            except (struct.error, IndexError):
                raise ValueError("it is cut off") from None
    return None


def _png(data):
    width, height = struct.unpack_from(">II", data, 16)
    place, name = 8, b""
    while name != b"IEND":  # libpng would tell of damage on standard error, and not of which file
        end = place + 8 + struct.unpack_from(">I", data, place)[0]
        name = data[place + 4 : place + 8]
        if zlib.crc32(memoryview(data)[place + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError("it is corrupt, a checksum is wrong")
        place = end + 4
    return width, height


def _jpeg(data):
    place = 2
    while True:
        while data[place] != 0xFF:
            place += 1
        while data[place] == 0xFF:
            place += 1
        marker = data[place]
        if marker in _JPEG_SIZES:
            height, width = struct.unpack_from(">HH", data, place + 4)
            return width, height
        if marker in (0xD9, 0xDA):
            raise ValueError("it has no size")
        place += 1 if marker in _JPEG_BARE else 1 + struct.unpack_from(">H", data, place + 1)[0]


def _bmp(data):
    if struct.unpack_from("<I", data, 14)[0] == 12:
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height)


def _webp(data):
    kind = data[12:16]
    if kind == b"VP8X":
        return tuple(1 + int.from_bytes(data[place : place + 3], "little") for place in (24, 27))
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _tiff(data):
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    start = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    count = struct.unpack_from(order + ("Q" if big else "H"), data, start)[0]
    found = {}
    for number in range(min(count, 65536)):
        entry = start + (8 + 20 * number if big else 2 + 12 * number)
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag in (256, 257):
            form = {3: "H", 4: "I", 16: "Q"}.get(kind)
            if form is None:
                raise ValueError("its size is no number")
            found[tag] = struct.unpack_from(order + form, data, entry + (12 if big else 8))[0]
    if len(found) < 2:
        raise ValueError("it has no size")
    return found[256], found[257]


def _netpbm(data):
    found = re.match(rb"P[1-6](?:\s|#[^\n]*\n)+(\d+)(?:\s|#[^\n]*\n)+(\d+)\s", data)
    if found is None:
        raise ValueError("it has no size")
    return int(found[1]), int(found[2])


def _gif(data):
    return struct.unpack_from("<HH", data, 6)


def _boxes(name: bytes, order: str):
    """Reads the sizes in the boxes `name` of ISO base media files, which their images and parts of images have."""

    def read(data):
        sizes = [
            struct.unpack_from(">II", data, found.end() + 4 * (order == "wh")) for found in re.finditer(name, data)
        ]
        if not sizes:
            raise ValueError("it has no size")
        width, height = max(sizes, key=lambda size: size[0] * size[1])
        return (width, height) if order == "wh" else (height, width)

    return read


_KINDS = (
    (rb"\x89PNG\r\n\x1a\n", _png),
    (rb"\xff\xd8", _jpeg),
    (rb"BM", _bmp),
    (rb"RIFF....WEBP", _webp),
    (rb"II[*+]\0|MM\0[*+]", _tiff),
    (rb"P[1-6][\s#]", _netpbm),
    (rb"GIF8[79]a", _gif),
    (rb"....ftyp", _boxes(b"ispe", "wh")),
    (rb"\0\0\0\x0cjP  ", _boxes(b"ihdr", "hw")),
)
