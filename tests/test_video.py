"""Video: which frames, at which times, within how many tokens; cameras; and each refusal."""

from __future__ import annotations

import sys
import types
import wave

import av
import numpy as np
import pytest
from PIL import Image as Pillow

from edge_gemma.errors import DeviceLost, MediaError, UsageError
from edge_gemma.seeing.camera import capture
from edge_gemma.seeing.picture import Picture
from edge_gemma.seeing.video import Video, expand, timestamp

RATE_HZ = 10


def write_clip(path, seconds: float, *, codec: str = "mpeg4", gop: int = 12) -> None:
    """A clip whose grey level is 2 × the frame's number."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE_HZ)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = (
            64,
            48,
            "yuvj420p" if codec == "mjpeg" else "yuv420p",
            gop,
        )
        for number in range(int(seconds * RATE_HZ)):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 2 * number, np.uint8), format="rgb24"
            )
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, 12)
    return path


def levels(frames) -> list[float]:
    return [float(np.asarray(image.rgb()).mean()) for _, image in frames]


def test_one_frame_a_second(clip):
    frames = list(Video(clip).frames(32))
    assert [round(time_s, 2) for time_s, _ in frames] == [float(second) for second in range(12)]
    np.testing.assert_allclose(
        levels(frames), [2 * RATE_HZ * second for second in range(12)], atol=4
    )
    assert frames[3][1].name == "clip.mp4 @ 00:03" and frames[0][1].array(32).shape == (
        1,
        3,
        32,
        32,
    )


def test_start_end_and_jumping_ahead(clip):
    frames = list(Video(clip, rate_hz=0.2, start_s=1).frames(32))
    assert [round(time_s, 2) for time_s, _ in frames] == [1.0, 6.5]
    np.testing.assert_allclose(
        levels(frames), [2 * RATE_HZ * time_s for time_s, _ in frames], atol=4
    )
    assert [round(t, 1) for t, _ in Video(clip, rate_hz=2, start_s=3, end_s=5).frames(32)] == [
        3.0,
        3.5,
        4.0,
        4.5,
    ]


def test_frames_beyond_the_limit_are_spread_over_the_whole(clip):
    frames = list(Video(clip, rate_hz=5, max_frames=4).frames(32))
    assert [round(time_s) for time_s, _ in frames] == [0, 3, 6, 9]


def test_parts_are_budgeted_and_timed(clip):
    parts = Video(clip).parts(32, tokens_per_image=256, max_tokens=3 * 268)
    assert parts[0::2] == ["00:00 ", "\n00:04 ", "\n00:08 "]
    assert all(isinstance(part, Picture) for part in parts[1::2])
    with pytest.raises(
        MediaError, match="one frame takes 268 tokens and 100 are free; no frame of clip.mp4 fits"
    ):
        Video(clip).parts(32, 256, 100)


def test_expand_shares_the_tokens(clip):
    parts = expand(["What?", Video(clip), "and", Video(clip)], 32, 256, 4 * 268)
    assert [part for part in parts if isinstance(part, str)] == [
        "What?",
        "00:00 ",
        "\n00:06 ",
        "and",
        "00:00 ",
        "\n00:06 ",
    ]


def test_animations_without_pyav(tmp_path):
    frames = [Pillow.new("L", (8, 8), 40 * number) for number in range(5)]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], duration=500, lossless=True
        )
        seen = list(Video(tmp_path / name, rate_hz=1).frames(8))
        assert [time_s for time_s, _ in seen] == [0.0, 1.0], name
        np.testing.assert_allclose(levels(seen), [0, 80], atol=2)


def test_bad_videos(tmp_path, clip):
    with pytest.raises(UsageError, match="0 < rate_hz ≤ 120"):
        Video(clip, rate_hz=0)
    with pytest.raises(UsageError, match="to a later end_s; got 5 to 2"):
        Video(clip, start_s=5, end_s=2)
    with pytest.raises(MediaError, match="there is no video file"):
        list(Video(tmp_path / "none.mp4").frames(8))
    with pytest.raises(MediaError, match="is a directory; name the video files"):
        list(Video(tmp_path).frames(8))
    with pytest.raises(MediaError, match="is a network address; download it first"):
        list(Video("http://a.org/b.mp4").frames(8))
    Pillow.new("RGB", (8, 8)).save(tmp_path / "still.jpg")
    with pytest.raises(MediaError, match="still.jpg is a picture, not a video"):
        list(Video(tmp_path / "still.jpg").frames(8))
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(MediaError, match="noise.mp4 is not a video this can read"):
        list(Video(tmp_path / "noise.mp4").frames(8))
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        (
            file.setnchannels(1),
            file.setsampwidth(2),
            file.setframerate(8000),
            file.writeframes(bytes(1600)),
        )
    with pytest.raises(MediaError, match=r"sound.wav has no pictures \(its streams: audio\)"):
        list(Video(tmp_path / "sound.wav").frames(8))
    with pytest.raises(MediaError, match="clip.mp4 has no frames between 100 s and its end"):
        list(Video(clip, start_s=100).frames(8))
    with pytest.raises(MediaError, match="frames of 64 × 48; the limit is 100 pixels"):
        list(Video(clip, max_pixels=100).frames(8))


def test_a_video_without_frames(tmp_path):
    write_clip(tmp_path / "empty.avi", 0)
    with pytest.raises(MediaError, match="empty.avi"):
        list(Video(tmp_path / "empty.avi").frames(8))


def test_a_playlist_cannot_name_other_files(tmp_path):
    secret = tmp_path / "secret.mp4"
    write_clip(secret, 1)
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(MediaError):
        list(Video(tmp_path / "list.m3u8").frames(8))


def test_camera(tmp_path):
    pytest.importorskip("cv2")
    write_clip(tmp_path / "lens.avi", 2, codec="mjpeg")  # OpenCV opens a file like a camera
    seen = capture(str(tmp_path / "lens.avi"), warm_up_frames=8)
    assert (seen.width, seen.height) == (64, 48)
    np.testing.assert_allclose(np.asarray(seen.rgb()).mean(), 16, atol=4)  # the ninth frame
    with pytest.raises(DeviceLost, match="there is no camera"):
        capture(str(tmp_path / "none.avi"))


class Lens:
    """Stands for ``cv2.VideoCapture``: camera 0 gives frames 0, 1, 2 …, camera 1 none, no other
    is there.
    """

    def __init__(self, camera):
        self.camera, self.n, self.released = camera, 0, False
        Lens.last = self

    def isOpened(self):
        return self.camera in (0, 1)

    def read(self):
        self.n += 1
        frame = np.zeros((4, 6, 3), np.uint8)
        frame[..., 0] = 10 * self.n  # blue: OpenCV's order is BGR
        return (True, frame) if self.camera == 0 else (False, None)

    def release(self):
        self.released = True


def test_a_camera_through_a_stand_in_for_opencv(monkeypatch):
    stand_in = types.SimpleNamespace(VideoCapture=Lens, setLogLevel=lambda level: None)
    monkeypatch.setitem(sys.modules, "cv2", stand_in)
    monkeypatch.setitem(sys.modules, "picamera2", None)  # not installed
    seen = capture(0, warm_up_frames=2)
    assert (seen.width, seen.height, seen.name) == (6, 4, "camera 0")
    assert np.asarray(seen.rgb())[0, 0].tolist() == [0, 0, 30]  # the third frame, as RGB
    assert Lens.last.released
    with pytest.raises(DeviceLost, match="camera 1 opened but gave no picture"):
        capture(1)
    assert Lens.last.released
    with pytest.raises(DeviceLost, match="there is no camera 2"):
        capture(2)
    assert Lens.last.released


def test_a_camera_through_a_stand_in_for_picamera2(monkeypatch):
    class Camera:
        def __init__(self, number):
            self.number = number

        @staticmethod
        def global_camera_info():
            return [{}]

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def create_still_configuration(self, main):
            return main["format"]

        def configure(self, configuration):
            self.configuration = configuration

        def start(self):
            assert self.configuration == "BGR888"

        def capture_array(self, stream):
            assert stream == "main"
            return np.full((4, 6, 3), (1, 2, 3), np.uint8)

    monkeypatch.setitem(sys.modules, "picamera2", types.SimpleNamespace(Picamera2=Camera))
    assert np.asarray(capture(0).rgb())[0, 0].tolist() == [1, 2, 3]
    with pytest.raises(DeviceLost, match="there is no camera 1; `rpicam-hello"):
        capture(1)


def test_timestamps():
    assert [timestamp(t) for t in (0, 59.9, 61, 7325)] == ["00:00", "00:59", "01:01", "2:02:05"]
