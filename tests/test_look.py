"""Pictures in messages: encoded on demand, cached on disk, refused when too many; and the cache
itself.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import seeing

from edge_gemma.bundles.folder import Bundle
from edge_gemma.errors import MediaError, PlanRefused, UnsupportedModel, UsageError
from edge_gemma.messages import Audio, Image
from edge_gemma.plan.records import Settings
from edge_gemma.seeing.cache import SoftTokenCache
from edge_gemma.seeing.picture import Picture
from edge_gemma.seeing.soft_tokens import PictureEncoder, prepare, soft_token_cost
from edge_gemma.seeing.video import Video
from edge_gemma.senses import Senses


@pytest.fixture
def bundle(seeing_bundle):
    return Bundle.open(seeing_bundle)


def test_every_way_to_name_a_picture(bundle, tmp_path):
    from PIL import Image as Pillow

    pixels = seeing.picture(6)
    Pillow.fromarray(pixels).save(tmp_path / "a.png")
    senses = Senses(bundle, Settings(n_ctx=4096))
    expected = senses.encode_image(Image(pixels))
    np.testing.assert_allclose(expected, seeing.reference("g3mm")["soft_6"], atol=1e-4)
    for image in (
        Image(tmp_path / "a.png"),
        Image(str(tmp_path / "a.png")),
        Image((tmp_path / "a.png").read_bytes()),
        Image(Pillow.fromarray(pixels)),
        Image(Picture(pixels)),
        Image(Picture(pixels), size=224),
    ):
        assert np.array_equal(senses.encode_image(image), expected)
    rows = np.ones((16, 256), np.float32)
    assert senses.encode_image(Image(rows=rows)) is rows
    with pytest.raises(UsageError, match="Audio"):
        senses.encode_image(Image(Audio()))
    with pytest.raises(
        UsageError, match="pictures of 512 px were asked for; this encoder takes 224"
    ):
        senses.encode_image(Image(pixels, size=512))
    senses.close()


def test_encoder_comes_when_needed_and_goes_when_told(bundle, tmp_path):
    cache = SoftTokenCache(tmp_path)
    look = PictureEncoder(bundle, cache=cache)
    assert not look.loaded
    first = look.encode(Picture(seeing.picture(1)))
    assert look.loaded
    look.release()
    assert (
        np.array_equal(look.encode(Picture(seeing.picture(1))), first) and not look.loaded
    )  # from the cache
    look.encode(Picture(seeing.picture(2)))
    assert look.loaded
    with PictureEncoder(bundle, keep=False, cache=None) as frugal:
        assert (
            np.array_equal(frugal.encode(Picture(seeing.picture(1))), first) and not frugal.loaded
        )


def test_a_picture_is_read_before_the_encoder_is_loaded(bundle):
    with PictureEncoder(bundle) as look:
        with pytest.raises(MediaError):
            look.encode(Picture(b"no picture"))
        assert not look.loaded


def test_cache_knows_encoder_crop_and_size(bundle, siglip_checkpoint, tmp_path):
    cache = SoftTokenCache(tmp_path / "cache")
    other = seeing.encoder_bundle(siglip_checkpoint, tmp_path / "f16", "f16")
    wide = Picture(seeing.picture(3, 300, 700))
    with (
        PictureEncoder(bundle, cache=cache) as look,
        PictureEncoder(other, cache=cache) as look_f16,
    ):
        assert not np.array_equal(look.encode(wide), look_f16.encode(wide))
        assert not np.array_equal(look.encode(wide), look.encode(wide.crops()[0]))
        assert len(list((tmp_path / "cache").iterdir())) == 3


def test_prepare_opens_counts_and_expands(bundle, tmp_path):
    vision = bundle.manifest.vision
    wide, square = seeing.picture(3, 300, 700), seeing.picture(3, 300, 300)
    parts = prepare(["Look:", Image(Picture(wide)), Image(source=square), "Well?"], vision, 100)
    assert [type(part).__name__ for part in parts] == ["str", "Image", "Image", "str"]
    assert all(isinstance(part.source, Picture) for part in parts[1:3])
    parts = prepare([Image(wide), Image(square)], vision, 1000, pan_and_scan=True)
    assert [part if isinstance(part, str) else "image" for part in parts] == [
        "Here is the original image ",
        "image",
        " and here are some crops to help you see better ",
        "image",
        " ",
        "image",
        "image",
    ]
    assert prepare(["only text"], None, 0) == ["only text"]
    rows = Image(rows=np.zeros((16, 256), np.float32))
    assert prepare([rows], None, 0) == [rows]


def test_prepare_samples_video_into_what_is_left(bundle, tmp_path):
    from PIL import Image as Pillow

    frames = [Pillow.new("L", (8, 8), 20 * number) for number in range(10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=1000)
    parts = prepare(["What happens?", Video(tmp_path / "a.gif")], bundle.manifest.vision, 1000)
    assert sum(isinstance(part, Image) for part in parts) == 10
    parts = prepare(
        [Image(seeing.picture(1)), Video(tmp_path / "a.gif")], bundle.manifest.vision, 130
    )
    assert [part for part in parts if isinstance(part, str)] == ["00:00 ", "\n00:03 ", "\n00:06 "]


def test_too_many_pictures_are_refused_with_the_number_that_fits(bundle):
    cost = soft_token_cost(bundle.manifest.vision)
    with pytest.raises(
        PlanRefused,
        match=rf"21 pictures take 21 × {cost} = {21 * cost} tokens and 400 of the context are "
        rf"free: {400 // cost} fit",
    ):
        prepare([Image(seeing.picture(1, 8, 8))] * 21, bundle.manifest.vision, 400)


def test_a_text_bundle_cannot_see():
    with pytest.raises(
        UnsupportedModel,
        match="gemma-270m has no vision encoder, so it cannot see; Gemma 3 4B and Gemma 3n can",
    ):
        prepare(["What?", Image(seeing.picture(1, 8, 8))], None, 4096, name="gemma-270m")


def test_a_bundle_that_hears_only_cannot_see(encoder_bundle):
    with pytest.raises(UnsupportedModel, match="cannot see"):
        PictureEncoder(Bundle.open(encoder_bundle))


# ---- the cache


def test_cache_returns_the_bits_and_ignores_damage(tmp_path):
    cache = SoftTokenCache(tmp_path / "c")
    rows = np.random.default_rng(0).standard_normal((4, 8), np.float32)
    assert cache.get("k", (4, 8)) is None
    cache.put("k", rows)
    assert np.array_equal(cache.get("k", (4, 8)), rows)
    assert cache.get("k", (4, 9)) is None
    (entry,) = (tmp_path / "c").iterdir()
    for damage in (b"", entry.read_bytes()[:-5], b"\x93NUMPY" + bytes(50), os.urandom(5000)):
        entry.write_bytes(damage)
        assert cache.get("k", (4, 8)) is None
    cache.put("k", np.full((4, 8), np.nan, np.float32))
    assert cache.get("k", (4, 8)) is None


def test_cache_keeps_under_its_cap_and_drops_the_oldest(tmp_path):
    cache = SoftTokenCache(tmp_path, cap_bytes=5 * 1200)
    rows = np.ones((16, 16), np.float32)  # 1024 bytes and npy's header
    for number in range(8):
        cache.put(str(number), rows)
        os.utime(cache._path(str(number)), ns=(number, number))
        if number == 4:
            assert cache.get("0", (16, 16)) is not None  # used: now the youngest
    assert cache.total_bytes() <= 5 * 1200
    assert (
        cache.get("0", (16, 16)) is not None
        and cache.get("1", (16, 16)) is None
        and cache.get("7", (16, 16)) is not None
    )
    assert cache.clear() > 0 and cache.total_bytes() == 0
    nothing = SoftTokenCache(tmp_path, cap_bytes=0)
    nothing.put("a", rows)
    assert nothing.total_bytes() == 0


def test_cache_survives_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    cache = SoftTokenCache(tmp_path / "file")
    cache.put("a", np.ones((1, 1), np.float32))
    assert cache.get("a", (1, 1)) is None and cache.total_bytes() == 0
