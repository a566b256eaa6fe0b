"""One picture from a camera: picamera2 on a Raspberry Pi, else OpenCV."""

from __future__ import annotations

import numpy as np

from edge_gemma.errors import DeviceLost, MissingExtra
from edge_gemma.seeing.picture import Picture


def capture(camera: int | str = 0, *, warm_up_frames: int = 8) -> Picture:
    """One picture from a camera: picamera2 on a Raspberry Pi where it is installed, else OpenCV.

    Raises DeviceLost, MissingExtra.

    ``camera`` is a number, or for OpenCV a device path or stream. The first frames are thrown away:
    exposure is still settling.
    """
    if isinstance(camera, int):
        try:
            from picamera2 import Picamera2
        except ImportError:
            pass
        else:
            return _capture_picamera2(Picamera2, camera)
    try:
        import cv2
    except ImportError:
        raise MissingExtra(
            "Taking a picture with a camera (OpenCV; on a Raspberry Pi instead: sudo apt "
            "install python3-picamera2)",
            "camera",
        ) from None
    if hasattr(cv2, "setLogLevel"):  # OpenCV 4 talks to stderr about every camera it does not find
        cv2.setLogLevel(0)
    lens = cv2.VideoCapture(camera)
    try:
        if not lens.isOpened():
            raise DeviceLost(
                f"there is no camera {camera}; `ls /dev/video*` shows the ones there are"
            )
        frame = None
        for _ in range(warm_up_frames + 1):
            ok, latest = lens.read()
            frame = latest if ok else frame
        if frame is None:
            raise DeviceLost(
                f"camera {camera} opened but gave no picture; is another program using it?"
            )
        return Picture(
            np.ascontiguousarray(frame[:, :, ::-1]), name=f"camera {camera}"
        )  # OpenCV's order is BGR
    finally:
        lens.release()


def _capture_picamera2(picamera2, number: int) -> Picture:
    if number >= len(picamera2.global_camera_info()):
        raise DeviceLost(
            f"there is no camera {number}; `rpicam-hello --list-cameras` shows the ones there are"
        )
    with picamera2(number) as lens:
        lens.configure(
            lens.create_still_configuration(main={"format": "BGR888"})
        )  # picamera2 names the order of bytes backwards: this is RGB
        lens.start()
        return Picture(np.ascontiguousarray(lens.capture_array("main")), name=f"camera {number}")
