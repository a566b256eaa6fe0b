"""One picture from a camera: picamera2 on a Raspberry Pi, else OpenCV."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_gemma.errors import DeviceLost, MissingExtra
from edge_gemma.seeing.picture import Picture


def capture(camera: int | str = 0, *, warm_up_frames: int = 8) -> Picture:
    """One picture from a camera: picamera2 on a Raspberry Pi where it is installed,
    else OpenCV.

    ``camera`` is a number, or for OpenCV a device path or stream. The first frames
    are thrown away: exposure is still settling. Raises DeviceLost, MissingExtra.
    """
    if isinstance(camera, int):
        try:
            from picamera2 import Picamera2
        except ImportError:
            pass
        else:
            return _capture_picamera2(Picamera2, camera)
    return _capture_opencv(camera, warm_up_frames)


def _capture_opencv(camera: int | str, warm_up_frames: int) -> Picture:
    try:
        import cv2
    except ImportError:
        raise MissingExtra(
            "Taking a picture with a camera (OpenCV; on a Raspberry Pi instead: sudo apt "
            "install python3-picamera2)",
            "camera",
        ) from None
    if hasattr(cv2, "setLogLevel"):  # OpenCV 4 prints to stderr for every camera it does not find
        cv2.setLogLevel(0)
    device = cv2.VideoCapture(camera)
    try:
        if not device.isOpened():
            raise DeviceLost(
                f"there is no camera {camera}; `ls /dev/video*` shows the ones there are"
            )
        frame = None  # [h, w, 3] uint8, the last that came
        for _ in range(warm_up_frames + 1):
            came, latest = device.read()
            frame = latest if came else frame
    finally:
        device.release()
    if frame is None:
        raise DeviceLost(
            f"camera {camera} opened but gave no picture; is another program using it?"
        )
    rgb = frame[:, :, ::-1]  # OpenCV's order is BGR
    return Picture(np.ascontiguousarray(rgb), name=f"camera {camera}")


def _capture_picamera2(picamera2: Any, number: int) -> Picture:
    """``picamera2`` is the class ``Picamera2``, which has no types."""
    if number >= len(picamera2.global_camera_info()):
        raise DeviceLost(
            f"there is no camera {number}; `rpicam-hello --list-cameras` shows the ones there are"
        )
    with picamera2(number) as device:
        # picamera2 names the order of bytes backwards: this is RGB
        configuration = device.create_still_configuration(main={"format": "BGR888"})
        device.configure(configuration)
        device.start()
        frame = device.capture_array("main")
        return Picture(np.ascontiguousarray(frame), name=f"camera {number}")
