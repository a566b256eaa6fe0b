"""The one error tree. Every message says what was found, what was expected and what to do next.

    EdgeGemmaError
    ├── UsageError           the request cannot mean anything: an empty prompt, say  [exit 2]
    │   └── MissingExtra     the request needs an optional package that is not installed
    ├── BundleError          a bundle, GGUF or manifest that is broken or not ours  [exit 3]
    │   ├── HashMismatch     a file's bytes are not the ones the manifest names
    │   └── UnsupportedModel an architecture or feature that this version does not run
    ├── CheckpointError      a Hugging Face folder that cannot be converted  [exit 3]
    ├── PlanRefused          the request does not fit; carries the plan  [exit 4]
    ├── HubError             a download failed, or offline and not in the cache  [exit 5]
    ├── MediaError           audio or image input that cannot be used  [exit 6]
    │   └── DeviceLost       a microphone or camera that is absent or went away
    ├── RuntimeFailure       a foreign library or the disk failed at run time  [exit 7]
    │   ├── ContextFull      a turn that cannot fit the context even alone
    │   └── ServiceBusy      a service whose queue is full, or which is closing
    └── Cancelled            a decode that was stopped from another thread  [exit 130]

The command line prints ``str(error)`` and leaves with the exit code named here; ``--debug`` shows
the traceback.
"""

from __future__ import annotations


class EdgeGemmaError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class UsageError(EdgeGemmaError, ValueError):
    exit_code = 2


class MissingExtra(UsageError):
    """An optional dependency is absent; the message names the extra to install."""

    def __init__(self, what: str, extra: str):
        super().__init__(
            f"{what} needs a package that is not installed. Install it with: pip install "
            f"'edge-gemma[{extra}]'"
        )
        self.extra = extra


class BundleError(EdgeGemmaError):
    exit_code = 3


class HashMismatch(BundleError):
    pass


class UnsupportedModel(BundleError):
    pass


class CheckpointError(EdgeGemmaError):
    exit_code = 3


class PlanRefused(EdgeGemmaError):
    """``plan`` is the refused :class:`edge_gemma.plan.records.Plan`; the message shows its
    arithmetic.
    """

    exit_code = 4

    def __init__(self, message: str, plan=None):
        super().__init__(message)
        self.plan = plan


class HubError(EdgeGemmaError):
    exit_code = 5


class MediaError(EdgeGemmaError):
    exit_code = 6


class MediaWarning(UserWarning):
    """What was done to an audio or image input so that it could be used; the command line shows it
    as a note.
    """


class DeviceLost(MediaError):
    pass


class RuntimeFailure(EdgeGemmaError):
    exit_code = 7


class ContextFull(RuntimeFailure):
    pass


class ServiceBusy(RuntimeFailure):
    """``retry_after_s``: when to ask again, in seconds; None when the service is closing."""

    def __init__(self, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Cancelled(EdgeGemmaError):
    """A decode was stopped by ``cancel()``: positions before ``position`` are intact, later ones
    are gone.
    """

    exit_code = 130

    def __init__(self, position: int):
        super().__init__("stopped")
        self.position = position


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's text, or its type where there is no text."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
