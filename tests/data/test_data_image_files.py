"""Image files as they come: every kind that the decoder reads, and those that must not be decoded."""

import io
import os
import struct
import time
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest

from jaxtransfer.data import image_header, images
from jaxtransfer.errors import InputError

Image = pytest.importorskip("PIL.Image")

ROWS, COLUMNS = 48, 64


@pytest.fixture(scope="module")
def picture():
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (COLUMNS, ROWS))


def encoded(picture, kind, **options):
    suffix = {"JPEG2000": ".jp2", "AVIF": ".avif", "GIF": ".gif"}.get(kind)
    if suffix is not None and not cv2.haveImageWriter(suffix):
        pytest.skip(f"this OpenCV was built without {kind}")
    if kind in ("JPEG2000", "AVIF"):
        return cv2.imencode(suffix, picture[..., ::-1])[1].tobytes()
    file = io.BytesIO()
    image = Image.fromarray(picture)
    image = image.convert("P") if kind == "GIF" else image
    image.save(file, kind, **options)
    return file.getvalue()


KINDS = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95}),
    "progressive.jpg": ("JPEG", {"quality": 95, "progressive": True}),
    "bmp": ("BMP", {}),
    "webp": ("WEBP", {"quality": 95}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "tif": ("TIFF", {}),
    "deflated.tiff": ("TIFF", {"compression": "tiff_deflate"}),
    "ppm": ("PPM", {}),
    "gif": ("GIF", {}),
    "jp2": ("JPEG2000", {}),
    "avif": ("AVIF", {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_and_its_size_known_before(tmp_path, picture, name):
    kind, options = KINDS[name]
    data = encoded(picture, kind, **options)
    path = tmp_path / f"image.{name}"
    path.write_bytes(data)
    assert path.suffix in images.SUFFIXES
    image = images.read(path)
    assert image.shape == (ROWS, COLUMNS, 3)
    expected = picture if kind in ("AVIF", "JPEG2000") else np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(image.astype(int) - expected).mean() < (8 if kind == "AVIF" else 2)
    assert image_header.size_of(data) == (COLUMNS, ROWS)
    named = tmp_path / "other.png"  # contents count, not names
    named.write_bytes(data)
    np.testing.assert_array_equal(images.read(named), image)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_cut_off_is_named(tmp_path, picture, name, share, capfd):
    kind, options = KINDS[name]
    data = encoded(picture, kind, **options)
    path = tmp_path / f"image.{name}"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=rf"cannot decode the image .*image\.{name}: .*; mend or remove it"):
        images.read(path)
    if name == "png":
        assert capfd.readouterr().err == ""  # the decoder would speak up on its own


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_flipped_bit_of_a_png_is_told_by_us_alone(tmp_path, picture, share, capfd):
    data = bytearray(encoded(picture, "PNG"))
    data[int(share * len(data))] ^= 16
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"cannot decode the image .*a\.png: it is corrupt, a checksum is wrong"):
        images.read(tmp_path / "a.png")
    assert capfd.readouterr().err == ""


def test_grey_maps_and_sixteen_bits(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    for suffix in (".pgm", ".png", ".tif"):
        assert cv2.imwrite(str(tmp_path / f"a{suffix}"), grey)
        np.testing.assert_array_equal(images.read(tmp_path / f"a{suffix}"), np.repeat(grey[..., None], 3, 2))
    assert cv2.imwrite(str(tmp_path / "deep.png"), grey.astype(np.uint16) * 256)
    np.testing.assert_array_equal(images.read(tmp_path / "deep.png")[..., 1], grey)
    (tmp_path / "plain.ppm").write_bytes(b"P3 # a comment\n# another\n2 1\n255\n1 2 3 4 5 6\n")
    np.testing.assert_array_equal(images.read(tmp_path / "plain.ppm"), [[[1, 2, 3], [4, 5, 6]]])


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, picture, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / "turned.jpg"
    path.write_bytes(encoded(picture, "JPEG", quality=95, exif=exif))
    meant = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: np.rot90(picture, 2).transpose(1, 0, 2),
        8: np.rot90(picture),
    }[turn]
    assert np.abs(images.read(path).astype(int) - meant).mean() < 4


def png(width, height, rows=b""):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bombs():
    """Files of some bytes that say that they are large."""
    side = struct.pack("<HH", 30000, 30000)
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, 30000, 0) for tag in (256, 257))
    return {
        "a.png": png(30000, 30000),
        "a.jpg": b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 30000, 30000, 3) + bytes(20),
        "a.bmp": b"BM" + bytes(12) + struct.pack("<Iii", 40, 30000, -30000) + bytes(60),
        "a.gif": b"GIF89a" + side + bytes(20),
        "a.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4),
        "a.ppm": b"P6\n30000 30000\n255\n",
        "lossless.webp": b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0/" + struct.pack("<I", 16382 | 16382 << 14) + bytes(20),
        "wide.webp": b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + (29999).to_bytes(3, "little") * 2 + bytes(20),
        "a.avif": b"\0\0\0\x1cftypavif" + bytes(12) + b"\0\0\0\x14ispe" + struct.pack(">III", 0, 30000, 30000),
        "a.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x16ihdr" + struct.pack(">II", 30000, 30000) + bytes(8),
    }


@pytest.mark.parametrize("name", bombs())
def test_a_file_that_would_fill_the_memory_is_not_decoded(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bombs()[name])
    tracemalloc.start()
    with pytest.raises(
        InputError, match=rf"the image .*{name} says that it has \d+ x \d+ pixels, expected at most 134,217,728 in all"
    ):
        images.read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_real_bomb_is_small_on_disk(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(13000, 13000, bytes(2**20)))
    with pytest.raises(InputError, match=r"bomb\.png says that it has 13000 x 13000 pixels"):
        images.read(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "image.png"
    what = {"folder": "a folder", "device": "a device"}.get(kind, "a named pipe")
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe") if kind != "pipe" else os.rename(tmp_path / "pipe", path)
    begin = time.monotonic()
    with pytest.raises(InputError, match=rf"image\.png is {what}, expected a regular file"):
        images.read(path)
    assert time.monotonic() - begin < 5


def test_no_image_and_no_file(tmp_path):
    for name, data, why in (
        ("empty.png", b"", "it is empty"),
        ("text.png", b"not an image", "no image of a known kind"),
        ("noise.jpg", b"\xff\xd8" + bytes(100), "it is cut off"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"cannot decode the image .*{name}: .*{why}"):
            images.read(tmp_path / name)
    with pytest.raises(InputError, match=r"gone\.png: No such file or directory"):
        images.read(tmp_path / "gone.png")


def test_a_name_that_is_no_utf8_is_shown_escaped(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(path, "wb") as file:
        file.write(b"no image")
    with pytest.raises(InputError, match=r"caf\\xe9\.png"):
        images.read(os.fsdecode(path))


def test_alpha_where_it_is_asked_for(tmp_path, picture):
    alpha = np.arange(ROWS * COLUMNS, dtype=np.uint32).reshape(ROWS, COLUMNS, 1).astype(np.uint8)
    rgba = np.concatenate([picture, alpha], axis=2)
    for name in ("a.png", "a.webp"):
        Image.fromarray(rgba).save(tmp_path / name, **({"lossless": True, "exact": True} if name == "a.webp" else {}))
        np.testing.assert_array_equal(images.read(tmp_path / name, 4), rgba)
        np.testing.assert_array_equal(images.read(tmp_path / name), picture)
    Image.fromarray(picture).save(tmp_path / "opaque.png")
    whole = images.read(tmp_path / "opaque.png", 4)
    np.testing.assert_array_equal(whole[..., :3], picture)
    assert (whole[..., 3] == 255).all()
    assert images.check_shape((8, 8, 4)) == (8, 8, 4)
    assert images.fit(rgba, (24, 32, 4)).shape == (24, 32, 4)
    np.testing.assert_array_equal(images.fit(picture, (ROWS, COLUMNS, 4)), whole)
    assert images.fit(picture[..., :1], (24, 32, 4))[..., 3].min() == 255
    np.testing.assert_array_equal(images.fit(rgba, (ROWS, COLUMNS, 3)), picture)
