"""Picture files as cameras, browsers and programs leave them: seen as they are, or refused with
what is wrong.
"""

from __future__ import annotations

import base64
import colorsys
import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from edge_gemma.errors import MediaError, UsageError
from edge_gemma.seeing.picture import Picture
from edge_gemma.seeing.png import without_large_texts

RED, GREEN = [255, 0, 0], [0, 255, 0]
WHITE = [255, 255, 255]
PIXELS = bytes([*RED, *GREEN])  # one row of two


def picture(what: str, happens: str):
    return pytest.mark.compat(kind="picture", what=what, happens=happens)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    row: bytes = PIXELS,
    *,
    bits: int = 8,
    kind: int = 2,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A PNG of two pixels; ``kind`` 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b"")


def seen(source) -> list[list[int]]:
    """The first row, as lists of red, green and blue."""
    return np.asarray(Picture(source).rgb())[0].tolist()


# ---- PNG


def text(name: bytes, n_bytes: int) -> bytes:
    """A text chunk or profile that is so long when it is inflated."""
    content = b"a" * n_bytes
    bodies = {
        b"tEXt": b"key\0" + content,
        b"zTXt": b"key\0\0" + zlib.compress(content),
        b"iTXt": b"key\0\1\0\0\0" + zlib.compress(content),
        b"iCCP": b"key\0\0" + zlib.compress(content),
    }
    return chunk(name, bodies[name])


@picture("PNG with a large text or colour profile", "seen; text and profile are passed over")
@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("n_bytes", [10, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 9 << 20])
def test_png_with_large_texts(tmp_path, name, n_bytes):
    large = text(name, n_bytes)
    for data in (png(before=large), png(after=large)):
        if name != b"iCCP" or data == png(before=large):
            assert seen(data) == [RED, GREEN]
    (tmp_path / "a.png").write_bytes(png(before=large))
    assert seen(tmp_path / "a.png") == [RED, GREEN]


@picture("PNG with hundreds of texts", "seen")
def test_png_with_many_texts():
    many = png(before=text(b"zTXt", 1 << 19) * 150, after=text(b"tEXt", 1 << 18) * 20)
    assert seen(many) == [RED, GREEN]


def test_png_whose_text_inflates_without_end():
    assert seen(png(before=text(b"zTXt", 40 << 20))) == [RED, GREEN]


def test_png_keeps_what_pillow_reads():
    small = png(before=text(b"tEXt", 100) + text(b"iCCP", 1000))
    assert without_large_texts(small) is small
    large = png(before=text(b"zTXt", 100) + text(b"zTXt", 2 << 20), after=text(b"tEXt", 50))
    assert without_large_texts(large) == png(before=text(b"zTXt", 100), after=text(b"tEXt", 50))


@picture("PNG with a transparent colour (tRNS)", "white there, as on a page")
@pytest.mark.parametrize(
    ("bits", "kind", "row", "before", "expected"),
    [
        (8, 2, PIXELS, chunk(b"tRNS", struct.pack(">3H", *RED)), [WHITE, GREEN]),
        (8, 2, PIXELS, chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)), [RED, GREEN]),
        (
            16,
            2,
            struct.pack(">6H", 65535, 0, 0, 0, 65535, 0),
            chunk(b"tRNS", struct.pack(">3H", 65535, 0, 0)),
            [WHITE, GREEN],
        ),
        (8, 0, b"\0\x80", chunk(b"tRNS", b"\0\0"), [WHITE, [128] * 3]),
        (16, 0, b"\0\0\x80\x80", chunk(b"tRNS", b"\0\0"), [WHITE, [128] * 3]),
        (1, 0, b"\x40", chunk(b"tRNS", b"\0\0"), [WHITE, WHITE]),
        (4, 0, b"\x0f", chunk(b"tRNS", b"\0\0"), [WHITE, WHITE]),
        (4, 0, b"\x1f", b"", [[17] * 3, WHITE]),
        (2, 0, b"\x60", b"", [[85] * 3, [170] * 3]),
        (8, 3, b"\0\1", chunk(b"PLTE", PIXELS) + chunk(b"tRNS", b"\0"), [WHITE, GREEN]),
        (
            8,
            3,
            b"\0\1",
            chunk(b"PLTE", PIXELS) + chunk(b"tRNS", b"\xff\x80"),
            [RED, [127, 255, 127]],
        ),
        (1, 3, b"\x40", chunk(b"PLTE", PIXELS), [RED, GREEN]),
        (16, 4, struct.pack(">4H", 0, 0, 0, 65535), b"", [WHITE, [0, 0, 0]]),
        (16, 2, struct.pack(">6H", 65535, 0, 0, 0, 65535, 0), b"", [RED, GREEN]),
        (16, 6, struct.pack(">8H", 0, 0, 0, 0, 0, 65535, 0, 65535), b"", [WHITE, GREEN]),
    ],
)
def test_png_of_every_kind(bits, kind, row, before, expected):
    assert seen(png(row, bits=bits, kind=kind, before=before)) == expected


# ---- EXIF


def orientation_chunk(type_number: int, count: int, value: bytes) -> bytes:
    """An eXIf chunk with one entry, the orientation, of any TIFF type."""
    entry = struct.pack(">HHI", 0x0112, type_number, count) + value
    return chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01" + entry + bytes(4))


@picture("EXIF orientation that is text, out of range, or in broken metadata", "seen as stored")
@pytest.mark.parametrize(
    "exif",
    [
        orientation_chunk(2, 2, b"6\0\0\0"),
        orientation_chunk(2, 4, b"top\0"),
        orientation_chunk(7, 4, b"\6\0\0\0"),
        orientation_chunk(3, 1, b"\0\0\0\0"),
        orientation_chunk(3, 1, b"\0\x09\0\0"),
        orientation_chunk(3, 1, b"\xff\xff\0\0"),
        orientation_chunk(9, 1, b"\xff\xff\xff\xff"),
        orientation_chunk(5, 1, b"\0\0\0\x20"),  # a fraction outside the data
        orientation_chunk(99, 1, b"\0\6\0\0"),
        orientation_chunk(3, 0, b"\0\0\0\0"),
        chunk(b"eXIf", b"garbage!"),
        chunk(b"eXIf", b""),
        chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    ],
)
def test_orientation_that_is_none(exif):
    assert seen(png(before=exif)) == [RED, GREEN]
    with Pillow.open(io.BytesIO(png(before=exif))) as image:
        assert Picture(image).width == 2  # a Pillow image, too


def test_orientation_that_is_one():
    for right in (orientation_chunk(3, 1, b"\0\6\0\0"), orientation_chunk(3, 2, b"\0\6\0\1")):
        turned = Picture(png(before=right))
        assert (turned.width, turned.height) == (1, 2)
        assert np.asarray(turned.rgb())[:, 0].tolist() == [RED, GREEN]


# ---- every mode and format


def smooth(height: int = 24, width: int = 32) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([8 * x, 10 * y, 255 - 4 * (x + y)], -1).clip(0, 255).astype(np.uint8)


def images() -> dict[str, Pillow.Image]:
    """An image of each of Pillow's modes, with transparency where it has it."""
    rgb = smooth()
    alpha = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (24, 1))
    rgba = np.dstack([rgb, alpha])
    grey = rgb[..., 0]
    wide = (grey.astype(np.uint16) * 257 + rgb[..., 1]).clip(0, 65535).astype(np.uint16)
    palette = Pillow.fromarray(rgb).quantize(64)
    keyed = palette.copy()
    keyed.info["transparency"] = int(np.asarray(palette)[3, 3])
    faded = palette.copy()
    faded.info["transparency"] = bytes(range(0, 256, 4))
    plain = Pillow.fromarray(rgb)
    made = {mode: plain.convert(mode) for mode in ("1", "L", "CMYK", "YCbCr", "HSV", "LAB", "RGBX")}
    made |= {
        "RGB": plain,
        "RGBA": Pillow.fromarray(rgba),
        "P": palette,
        "I;16": Pillow.fromarray(wide),
    }
    made |= {"P keyed": keyed, "P faded": faded, "I": Pillow.fromarray(wide.astype(np.int32))}
    made["LA"] = Pillow.merge("LA", (Pillow.fromarray(grey), Pillow.fromarray(alpha)))
    made["La"] = made["LA"].convert("La")
    made["RGBa"] = made["RGBA"].convert("RGBa")
    made["PA"] = made["LA"].convert("PA")
    made["I;16B"] = Pillow.frombytes("I;16B", (32, 24), wide.astype(">u2").tobytes())
    made["I;16L"] = Pillow.frombytes("I;16L", (32, 24), wide.astype("<u2").tobytes())
    return made


IMAGES = images()


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return colour * share + 255 * (1 - share)


def from_hsv(values: np.ndarray) -> np.ndarray:
    flat = [colorsys.hsv_to_rgb(*(pixel / 255)) for pixel in values.reshape(-1, 3)]
    return 255 * np.array(flat).reshape(values.shape)


def from_ycbcr(values: np.ndarray) -> np.ndarray:
    y, cb, cr = (values[..., k].astype(float) for k in range(3))
    blue, red = cb - 128, cr - 128  # JFIF
    channels = [y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue]
    return np.stack(channels, -1).clip(0, 255)


def from_palette(image: Pillow.Image) -> np.ndarray:
    colours = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    key = image.info.get("transparency")
    alphas = np.full(256, 255, np.uint8)
    if isinstance(key, bytes):
        alphas[: len(key)] = list(key)
    elif key is not None:
        alphas[key] = 0
    indices = np.asarray(image)
    return on_white(colours[indices], alphas[indices])


def expected_rgb(image: Pillow.Image) -> np.ndarray:
    """What is to be seen, written out apart from the package: ``[h, w, 3]`` float."""
    mode = image.mode
    if mode == "P":
        return from_palette(image)
    values = np.asarray(image).astype(np.int64)
    if mode in ("I", "I;16", "I;16B", "I;16L"):
        values = (values + 128) // 257
    if mode == "1":
        values = values * 255
    if values.ndim == 2:
        return np.repeat(values[..., None], 3, axis=2)
    if mode == "CMYK":
        return (255 - values[..., :3]) * (255 - values[..., 3:]) / 255
    if mode in ("YCbCr", "HSV"):
        return (from_ycbcr if mode == "YCbCr" else from_hsv)(values)
    if mode in ("LA", "La", "PA"):
        return expected_alpha(image, mode, values)
    if mode in ("RGBA", "RGBa"):
        colour = values[..., :3]
        if mode == "RGBA":
            return on_white(colour, values[..., 3])
        return colour + 255.0 - values[..., 3:]
    return values[..., :3]


def expected_alpha(image: Pillow.Image, mode: str, values: np.ndarray) -> np.ndarray:
    """Two channels, the second alpha."""
    if mode == "La":
        return np.repeat(values[..., :1] + 255.0 - values[..., 1:], 3, axis=2)
    if mode == "PA":
        colours = np.array(image.getpalette()).reshape(-1, 3)
        return on_white(colours[values[..., 0]], values[..., 1])
    return on_white(np.repeat(values[..., :1], 3, axis=2), values[..., 1])


FORMATS = {
    "PNG": {},
    "TIFF": {},
    "BMP": {},
    "PPM": {},
    "GIF": {},
    "ICO": {"sizes": [(32, 24)], "bitmap_format": "png"},
    "WEBP": {"lossless": True, "exact": True},
    "JPEG2000": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}
LOSSY = ("JPEG", "AVIF")
DIFFERENCE = 2  # of 255: rounding, once on each side


@picture("any mode of Pillow's, as an image in memory", "the same pixels, transparency on white")
@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_mode(name):
    image = IMAGES[name]
    shown = np.asarray(Picture(image).rgb()).astype(float)
    if image.mode == "LAB":
        assert np.abs(shown - smooth()).mean() < 3  # colours outside its range
    else:
        assert np.abs(shown - expected_rgb(image)).max() <= DIFFERENCE


@picture("every mode in each of ten formats that Pillow writes", "the same pixels as in the file")
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("format", FORMATS)
def test_files_of_every_mode_and_format(name, format):
    image = IMAGES[name]
    buffer = io.BytesIO()
    try:
        image.save(buffer, format, **FORMATS[format])
    except (OSError, ValueError, KeyError, TypeError):  # Pillow cannot
        assert name not in ("RGB", "L", "1") or (format, name) == ("JPEG2000", "1")
        return
    shown = np.asarray(Picture(buffer.getvalue()).rgb()).astype(float)
    with Pillow.open(io.BytesIO(buffer.getvalue())) as again:
        again.load()
        if again.mode != "LAB":
            assert np.abs(shown - expected_rgb(again)).max() <= DIFFERENCE
        # formats without transparent colours leave them out, GIF makes faded ones opaque
        keys = [type(each.info.get("transparency")) for each in (image, again)]
        is_whole = again.mode == image.mode and keys[0] == keys[1] and format not in LOSSY
    if is_whole and image.mode != "LAB":
        assert np.abs(shown - expected_rgb(image)).max() <= DIFFERENCE
    elif format in LOSSY and image.mode in ("RGB", "L"):
        assert np.abs(shown - expected_rgb(image)).mean() < 2


@picture("a photograph in two parts (MPO), an animation", "the first picture is seen")
@pytest.mark.parametrize("format", ["MPO", "GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several(format):
    first, second = (Pillow.new("RGB", (16, 16), color) for color in ("red", "blue"))
    buffer = io.BytesIO()
    first.save(buffer, format, save_all=True, append_images=[second])
    shown = np.asarray(Picture(buffer.getvalue()).rgb()).astype(int)
    assert np.abs(shown - RED).max() <= DIFFERENCE


# ---- cut and damaged


@picture("any format, cut", "refused: the data is damaged or incomplete")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_files_are_said_to_be(format, share):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Pillow.fromarray(noise).save(buffer, format)
    data = buffer.getvalue()[: int(share * buffer.tell())]
    with pytest.raises(MediaError, match="damaged|not a picture this can read"):
        Picture(data).rgb()


@settings(max_examples=60)
@given(st.data())
def test_any_damage_is_seen_or_refused(data):
    """Nothing but MediaError comes out of a damaged file, and no warning."""
    format = data.draw(st.sampled_from(["PNG", "TIFF", "GIF", "WEBP", "JPEG", "BMP", "ICO", "PPM"]))
    broken = bytearray(DAMAGED[format])
    for _ in range(data.draw(st.integers(1, 6))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        Picture(bytes(broken)).array(8)
    except MediaError:
        pass


def written(format: str) -> bytes:
    buffer = io.BytesIO()
    exif = Pillow.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    Pillow.fromarray(smooth()).save(buffer, format, **options)
    return buffer.getvalue()


DAMAGED = {f: written(f) for f in ("PNG", "TIFF", "GIF", "WEBP", "JPEG", "BMP", "ICO", "PPM")}


# ---- where it comes from


@picture("a data URI, BytesIO or open file", "seen as the file it holds")
def test_where_a_picture_comes_from(tmp_path):
    data = png()
    (tmp_path / "a.png").write_bytes(data)
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    used = io.BytesIO()
    Pillow.new("RGB", (2, 1), "red").save(used, "PNG")  # as a program leaves it: at its end
    with open(tmp_path / "a.png", "rb") as file:
        for source in (uri, io.BytesIO(data), bytearray(data), memoryview(data), file):
            assert seen(source) == [RED, GREEN]
            assert Picture(source) == Picture(data)
    assert seen(used) == [RED, RED]
    with pytest.raises(MediaError, match="0 bytes"):
        Picture(io.BytesIO())
    with pytest.raises(UsageError, match="must be opened for bytes"):
        Picture(io.StringIO("text"))
    with pytest.raises(MediaError, match="holds audio/wav; expected image/"):
        Picture("data:audio/wav;base64,AAAA")
    with pytest.raises(MediaError, match="not base64"):
        Picture("data:image/png;base64,????")


@picture("text, sound, noise, a folder, pipe, device or huge file called .png", "refused at once")
def test_what_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    contents = {
        "text.png": b"these are words\n" * 50,
        "noise.png": np.random.default_rng(0).bytes(5000),
        "zeros.png": bytes(5000),
        "sound.png": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with open(tmp_path / "huge.png", "wb") as file:
        file.write(png())
        file.truncate(10 << 30)  # sparse
    started = time.monotonic()
    for path, message in {
        tmp_path / "pipe.png": "is a pipe, not a file",
        tmp_path / "folder.png": "is a directory; name the image files in it",
        "/dev/zero": "is a device, not a file",
        tmp_path / "none.png": "there is no image file",
        tmp_path / "text.png": "is not a picture this can read",
        tmp_path / "noise.png": "is not a picture this can read",
        tmp_path / "zeros.png": "is not a picture this can read",
        tmp_path / "sound.png": "sound.png is a WAV sound; use Audio",
        tmp_path / "huge.png": "10.00 GiB; image files up to 256 MiB",
    }.items():
        with pytest.raises(MediaError, match=message):
            Picture(path)
    assert time.monotonic() - started < 5
