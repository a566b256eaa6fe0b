"""Texts that every Python brings along: one to measure quality on, one to calibrate with; none of
the second is in the first.
"""

from __future__ import annotations

import importlib
import inspect
import warnings

SHORTEST = 200  # characters of a docstring that is taken
CALIBRATION_MODULES = (
    "json argparse collections.abc asyncio logging email http.client ipaddress statistics "
    "subprocess textwrap threading typing unittest unittest.mock urllib.request zipfile "
    "tarfile "
    "difflib functools itertools random shutil socket ssl string tempfile traceback csv "
    "datetime decimal fractions enum dataclasses contextlib concurrent.futures configparser "
    "heapq "
    "bisect calendar cmd code codecs copy getpass gettext glob gzip hashlib inspect locale "
    "mailbox mimetypes multiprocessing numbers operator optparse os pathlib pickle platform "
    "plistlib pprint queue re sched secrets selectors shelve shlex signal smtplib "
    "socketserver struct time timeit tokenize trace turtle uuid weakref xml.dom "
    "xml.etree.ElementTree"
).split()


def evaluation_text() -> str:
    """The Python reference's topics, about 110,000 tokens."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def calibration_text() -> str:
    """Docstrings of the standard library, about 80,000 tokens."""
    found: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in CALIBRATION_MODULES:
            found |= dict.fromkeys(_docstrings(name))
    return "\n\n".join(found)


def _docstrings(name: str) -> list[str]:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return []  # turtle wants Tk, which not every Python has
    texts = [module.__doc__]
    for value in vars(module).values():
        is_definition = inspect.isclass(value) or inspect.isfunction(value)
        if is_definition and value.__module__ == name:
            texts.append(inspect.getdoc(value))
    return [text for text in texts if text and len(text) > SHORTEST]
