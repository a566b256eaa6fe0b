"""describe: pictures, a video or a camera, and a question about them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.answering import Cost, finish, load_model, stream
from edge_gemma.cli.common import BundleArg, JsonOption, StatsOption, note
from edge_gemma.cli.options import LOADING, SAMPLING, LoadingOptions, SamplingOptions, grouped
from edge_gemma.sources import exists, is_data_uri, typed

if TYPE_CHECKING:
    from edge_gemma.seeing.picture import Picture

QUESTION = "Describe what you see."
# A last word with such an ending is a picture that is missing, not a question.
_PICTURE_ENDINGS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
    ".svg",
    ".pdf",
    ".ico",
    ".jp2",
    ".ppm",
)


def register(app: typer.Typer) -> None:
    app.command("describe")(grouped(describe))


def split(words: list[str]) -> tuple[list[str], str]:
    """``IMAGE… ["question"]`` → (images, question): the last word is the question unless it is a
    file, is named like a picture, or is a data URI.

    >>> split(["photo.jpg", "What is this?"])
    (['photo.jpg'], 'What is this?')
    """
    pictures, last = list(map(typed, words)), words[-1] if words else ""
    if not words or exists(pictures[-1]) or is_data_uri(last):
        return pictures, QUESTION
    if pictures[-1].lower().endswith(_PICTURE_ENDINGS):
        return pictures, QUESTION
    return pictures[:-1], last


def describe(
    bundle: BundleArg,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar='IMAGE… ["question"]', help="Pictures, then what to ask about them."
        ),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(
            "--video", help="A clip or animation, as frames with their times. Repeatable."
        ),
    ] = None,
    rate: Annotated[
        float,
        typer.Option(
            "--fps", help="Frames of a video per second; fewer when they do not fit the context."
        ),
    ] = 1.0,
    camera: Annotated[
        str | None,
        typer.Option(
            "--camera", help="Take a picture with this camera: a number, or a device path."
        ),
    ] = None,
    pan_and_scan: Annotated[
        bool,
        typer.Option("--pan-and-scan", help="Gemma 3: show wide or tall pictures in crops, too."),
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            help="Side of the encoder's input in pixels, where it takes several: Gemma 3n 768, "
            "512 or 256.",
        ),
    ] = None,
    sampling: SamplingOptions = SAMPLING,
    loading: LoadingOptions = LOADING,
    stats: StatsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what pictures show, or answer a question about them. Several pictures can be compared."""
    from edge_gemma.errors import UsageError
    from edge_gemma.machine.peak import PeakSampler
    from edge_gemma.messages import Image, Part
    from edge_gemma.seeing.video import Video

    images, question = split(words or [])
    if not images and not video and camera is None:
        raise UsageError(
            "no picture: name one or more files, then the question in quotes: edge-gemma "
            'describe BUNDLE photo.jpg "What is this?"'
        )
    pictures = _pictures(images, camera)  # before the model is loaded: a wrong name costs no time
    media: list[Part | Video] = [
        *(Image(source=picture, size=size) for picture in pictures),
        *(Video(path, rate_hz=rate) for path in video or ()),
        question,
    ]
    options = sampling.sampling(bundle)
    with PeakSampler() as peak:
        model, load_s = load_model(bundle, loading, ("vision",))
        peak.rebase()
        with model, model.chat(pan_and_scan=pan_and_scan) as talk:
            started = time.perf_counter()
            chunks = talk.send(media, options)
            answer = stream(chunks, talk.cancel, quiet=as_json)
            wall_s = time.perf_counter() - started
    cost = Cost(load_s, wall_s, model.plan.total_bytes, peak.peak_pss_bytes)
    finish(answer, cost, as_json=as_json, stats=stats)


def _pictures(images: list[str], camera: str | None) -> list[Picture]:
    """The files' pictures and, behind them, the camera's. Raises MediaError."""
    from edge_gemma.seeing.camera import capture
    from edge_gemma.seeing.picture import Picture

    pictures = [Picture(path) for path in images]
    if camera is not None:
        pictures.append(capture(int(camera) if camera.isdigit() else camera))
    for picture in pictures:
        if picture.animated:
            note(
                f"{picture.name} is animated; its first frame is shown. --video "
                f"{picture.name} shows more of it"
            )
    return pictures
