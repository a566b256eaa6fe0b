"""Pictures: every mode and orientation to RGB, the encoder's input, pan and scan, and each refusal
with its message.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow
from seeing import picture, squeezed

from edge_gemma.errors import MediaError, UsageError
from edge_gemma.seeing.picture import Crop, Picture, pan_and_scan, with_crops


def file_bytes(image: Pillow.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rgb(source) -> np.ndarray:
    return np.asarray(Picture(source).rgb())


# ---- exactness


def test_array_is_bilinear_squeeze_and_scale():
    pixels = picture(1, 48, 64)
    assert np.array_equal(Picture(pixels).array(32), squeezed(pixels, 32))
    np.testing.assert_allclose(
        Picture(pixels).array(32, 0.5, 0.5), squeezed(pixels, 32, 0.5, 0.5), atol=1e-6
    )
    array = Picture(pixels).array(32, 0.5, 0.5)
    assert array.dtype == np.float32 and array.shape == (1, 3, 32, 32) and array.flags.c_contiguous


def test_path_bytes_array_and_pillow_agree(tmp_path):
    pixels = picture(1, 20, 30)
    path = tmp_path / "a.png"
    Pillow.fromarray(pixels).save(path)
    for source in (
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        pixels,
        Pillow.fromarray(pixels),
    ):
        assert np.array_equal(rgb(source), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    pixels = picture(2, 20, 30)
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[::-1],
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: pixels.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    seen = Picture(file_bytes(Pillow.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif))
    assert (seen.width, seen.height) == (30, 20)
    assert np.array_equal(np.asarray(seen.rgb()), pixels)


def test_transparency_lies_on_white():
    pixels = np.zeros((4, 4, 4), np.uint8)  # black under full transparency
    pixels[2:, :, 3] = 255
    seen = rgb(file_bytes(Pillow.fromarray(pixels), "PNG"))
    assert (seen[:2] == 255).all() and (seen[2:] == 0).all()
    assert (rgb(np.full((2, 2, 4), 0, np.uint8)) == 255).all()


def test_palette_grey_and_bilevel():
    pixels = np.zeros((6, 6, 3), np.uint8)
    pixels[:3] = (200, 30, 40)
    palette = Pillow.fromarray(pixels).quantize(4)
    assert np.array_equal(rgb(file_bytes(palette, "PNG")), pixels)
    palette.info["transparency"] = int(np.asarray(palette)[5, 5])
    assert (
        rgb(file_bytes(palette, "PNG", transparency=palette.info["transparency"]))[5, 5] == 255
    ).all()
    grey = np.arange(36, dtype=np.uint8).reshape(6, 6)
    assert np.array_equal(rgb(grey)[..., 1], grey)
    bilevel = Pillow.fromarray(grey > 17).convert("1")
    assert set(np.unique(rgb(file_bytes(bilevel, "PNG")))) == {0, 255}


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257 * 7, 30000, 65535]], np.uint16)
    assert rgb(file_bytes(Pillow.fromarray(values), "PNG"))[0, :, 0].tolist() == [0, 7, 117, 255]
    assert rgb(file_bytes(Pillow.fromarray(values), "TIFF"))[0, :, 2].tolist() == [0, 7, 117, 255]


def test_cmyk():
    seen = rgb(file_bytes(Pillow.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert seen[4, 4, 0] > 200 and seen[4, 4, 1:].max() < 60  # red


def test_first_frame_of_an_animation():
    frames = [Pillow.new("RGB", (8, 8), color) for color in ("red", "blue")]
    seen = Picture(file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert seen.animated and np.asarray(seen.rgb())[0, 0].tolist() == [255, 0, 0]
    assert not Picture(file_bytes(frames[0], "PNG")).animated


def test_one_pixel_and_very_wide():
    assert np.array_equal(
        Picture(np.full((1, 1, 3), 51, np.uint8)).array(8), np.full((1, 3, 8, 8), 0.2, np.float32)
    )
    wide = Picture(file_bytes(Pillow.new("RGB", (20_000, 20), "white"), "PNG"))
    assert wide.array(16).min() == 1.0


# ---- pan and scan


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [  # what Gemma 3's image processor of transformers 5.23 gives for the same numbers
        (1000, 900, []),
        (400, 300, []),
        (1000, 500, [(0, 0, 500, 500), (500, 0, 1000, 500)]),
        (
            3000,
            700,
            [(0, 0, 750, 700), (750, 0, 1500, 700), (1500, 0, 2250, 700), (2250, 0, 3000, 700)],
        ),
        (500, 1100, [(0, 0, 500, 550), (0, 550, 500, 1100)]),
        (1001, 300, [(0, 0, 334, 300), (334, 0, 668, 300), (668, 0, 1001, 300)]),
        (5000, 100, []),
    ],
)
def test_pan_and_scan(width, height, expected):
    assert pan_and_scan(width, height, 256, 4, 1.2) == [Crop(*box) for box in expected]


def test_crops_are_cuts_with_digests_of_their_own():
    pixels = picture(3, 300, 700)
    seen = Picture(pixels)
    crops = seen.crops()
    assert [(crop.width, crop.height) for crop in crops] == [(350, 300), (350, 300)]
    assert np.array_equal(np.asarray(crops[1].rgb()), pixels[:, 350:])
    assert len({seen.digest, *(crop.digest for crop in crops)}) == 3
    parts = with_crops(seen)
    assert parts == [
        "Here is the original image ",
        seen,
        " and here are some crops to help you see better ",
        crops[0],
        " ",
        crops[1],
    ]
    assert with_crops(square := Picture(picture(3, 300, 300))) == [square]


# ---- identity


def test_digest_follows_content(tmp_path):
    pixels = picture(4, 10, 12)
    (tmp_path / "a.png").write_bytes(data := file_bytes(Pillow.fromarray(pixels), "PNG"))
    (tmp_path / "b.png").write_bytes(data)
    assert (
        Picture(tmp_path / "a.png").digest
        == Picture(tmp_path / "b.png").digest
        == Picture(data).digest
    )
    assert Picture(pixels) == Picture(pixels.copy())
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    assert Picture(changed) != Picture(pixels)
    assert Picture(np.zeros((2, 6, 3), np.uint8)) != Picture(np.zeros((6, 2, 3), np.uint8))


def test_a_file_that_changed_is_not_taken_for_the_old_one(tmp_path):
    path = tmp_path / "a.png"
    Pillow.fromarray(picture(5, 10, 12)).save(path)
    seen = Picture(path)
    path.write_bytes(path.read_bytes())  # rewritten, same content: fine
    assert seen.rgb().size == (12, 10)
    Pillow.fromarray(picture(6, 10, 12)).save(path)
    with pytest.raises(MediaError, match="changed after it was put into the message"):
        seen.rgb()
    path.unlink()
    with pytest.raises(MediaError, match="is gone"):
        seen.rgb()


# ---- refusals


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(20_000, 5_000), (12_000, 12_000), (60_000, 60_000)])
def test_decompression_bombs(width, height):
    with pytest.raises(MediaError, match="the limit is 50,000,000") as refusal:
        Picture(png_header(width, height))
    assert "resize" in str(refusal.value)
    assert isinstance(refusal.value, MediaError) and refusal.value.exit_code == 6


def test_limit_can_be_set():
    with pytest.raises(MediaError, match=r"40 × 30 = 1,200 pixels; the limit is 1,000"):
        Picture(picture(1, 30, 40), max_pixels=1000)


def test_truncated_jpeg():
    data = file_bytes(Pillow.fromarray(picture(1)), "JPEG")
    seen = Picture(data[: len(data) // 2], name="half.jpg")  # the header is whole
    with pytest.raises(MediaError, match="half.jpg is damaged: .*truncated.*incomplete download"):
        seen.array(64)
    with pytest.raises(
        MediaError, match="a JPEG whose header is damaged. Perhaps an incomplete download"
    ):
        Picture(data[:3])


@pytest.mark.parametrize("position", [30, 60, 200, 500])
def test_flipped_bytes_never_raise_anything_else(position):
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        data = bytearray(file_bytes(Pillow.fromarray(picture(1, 40, 50)), format))
        for offset in range(position, min(position + 24, len(data)), 3):
            broken = bytearray(data)
            broken[offset] ^= 0xFF
            try:
                Picture(bytes(broken)).array(16)
            except MediaError:
                pass


def test_zero_size(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(MediaError, match=r"empty.png is empty \(0 bytes\)"):
        Picture(tmp_path / "empty.png")
    with pytest.raises(MediaError, match="0 bytes"):
        Picture(b"")
    with pytest.raises(UsageError, match=r"got \[0, 4, 3\] uint8"):
        Picture(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(MediaError, match="flat.png is a PNG whose header is damaged"):
        Picture(png_header(0, 5), name="flat.png")


def test_directory_svg_pdf_missing(tmp_path):
    with pytest.raises(MediaError, match="is a directory; name the image files"):
        Picture(tmp_path)
    with pytest.raises(MediaError, match="there is no image file"):
        Picture(tmp_path / "nothing.jpg")
    with pytest.raises(
        MediaError, match="https://a.org/b.jpg is a network address; download it first"
    ):
        Picture("https://a.org/b.jpg")
    (tmp_path / "a.svg").write_text(
        '<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>'
    )
    with pytest.raises(MediaError, match="a.svg is an SVG drawing, not pixels; render it first"):
        Picture(tmp_path / "a.svg")
    with pytest.raises(MediaError, match="is a PDF"):
        Picture(b"%PDF-1.7 ...", name="a.pdf")
    with pytest.raises(MediaError, match="is not a picture this can read .*68 65 6c 6c 6f"):
        Picture(b"hello")
    with pytest.raises(MediaError, match="looks like a video"):
        Picture(b"\x00\x00\x00\x20ftypisom" + bytes(20))


def test_heic_names_the_plug_in():
    data = b"\x00\x00\x00\x18ftypheic" + bytes(40)
    with pytest.raises(MediaError, match="HEIC"):
        Picture(data, name="a.heic")


def test_postscript_is_never_started():
    with pytest.raises(MediaError, match="not a picture"):
        Picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")


def test_floats_and_odd_types():
    with pytest.raises(MediaError, match="floating-point pixels"):
        Picture(file_bytes(Pillow.fromarray(np.ones((4, 4), np.float32)), "TIFF")).array(8)
    with pytest.raises(UsageError, match=r"got \[4, 4, 3\] float32"):
        Picture(np.ones((4, 4, 3), np.float32))
    with pytest.raises(UsageError, match="got int"):
        Picture(7)
    with pytest.raises(MediaError, match="from 0 to 70000; expected 0 to 65535"):
        Picture(Pillow.fromarray(np.array([[0, 70000]], np.int32))).array(8)


def test_too_large_a_file(tmp_path):
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate(300 << 20)  # sparse
    with pytest.raises(MediaError, match="300 MiB; image files up to 256 MiB"):
        Picture(path)
