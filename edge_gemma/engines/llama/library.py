"""llama.cpp itself: the library, its log, and what its CPU kernels do with a weight.

The only module that imports llama_cpp, with the schema converter in grammar.py.

In: nothing but the installed llama-cpp-python. Out: its low-level module (:func:`library`) for
decoder.py, context.py and sampler.py, and answers to questions about it: may layers go to a GPU,
is a weight copied here, does a file's vocabulary load. Reasons for failures are read off
llama.cpp's log (:func:`last_log`), which is kept from the terminal unless asked for.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_gemma.errors import BundleError, MissingExtra, RuntimeFailure

_VERBOSE = False
_log_tail: deque[str] = deque(maxlen=200)
_reported: list[tuple[str, int]] = []  # (buffer, bytes) of every "… buffer size = … MiB" line
_log_lock = threading.Lock()


def version() -> str:
    """Its name and version, as states of the KV cache depend on it."""
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}"


def set_verbose(on: bool) -> None:
    """Let llama.cpp's log through to stderr (`-v`)."""
    global _VERBOSE
    _VERBOSE = on


@functools.cache
def library():
    """llama_cpp's low-level module, with its log in our hands and its backends started. Imported on
    first use only.
    """
    try:
        import llama_cpp
        from llama_cpp import llama_cpp as low
    except ImportError as error:
        raise MissingExtra(f"Decoding (llama-cpp-python: {error})", "all") from None
    if not hasattr(low.llama_context_params, "n_outputs_max"):
        raise RuntimeFailure(
            f"llama-cpp-python {llama_cpp.__version__} is too old; expected 0.3.36 or newer. "
            "pip install -U llama-cpp-python"
        )

    @low.llama_log_callback
    def on_log(level, text, _):
        line = text.decode("utf-8", "replace")
        with _log_lock:
            _log_tail.append(line)
            if match := re.search(
                r"(\S+)\s+(model|KV|compute|output)\s+buffer size\s*=\s*([0-9.]+) MiB", line
            ):
                _reported.append((f"{match[1]} {match[2]}", int(float(match[3]) * (1 << 20))))
        if _VERBOSE:
            sys.stderr.write(line)

    low._edge_gemma_on_log = on_log  # the C side keeps the pointer: it must outlive every model
    with interrupts_held():
        low.llama_log_set(on_log, ctypes.c_void_p(0))
        low.llama_backend_init()
        leave_amx_out()
    return low


@contextmanager
def interrupts_held(stop: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Ctrl-C in here calls ``stop`` at once and is raised when the block is left: ctypes prints and
    forgets what is raised in a callback.

    To be put around calls of llama.cpp that call back into Python (its log, its progress). Does
    nothing off the main thread, where no signal is handled.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    came = []

    def hold(number: int, frame) -> None:
        came.append((number, frame))
        stop()

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if came:
            previous(*came[0])


def last_log(pattern: str = "error|fail|invalid|wrong|missing|unknown|unsupported") -> str:
    with _log_lock:
        lines = [line.strip() for line in _log_tail if re.search(pattern, line, re.I)]
    return lines[-1] if lines else "llama.cpp gave no reason"


def forget_log() -> None:
    """Start a new tail and a new sum of buffers: a load follows."""
    with _log_lock:
        _log_tail.clear()
        _reported.clear()


def reported_bytes() -> dict[str, int]:
    """What llama.cpp said it allocated since :func:`forget_log`: ``{"CPU_REPACK model": bytes,
    …}``.
    """
    sizes: dict[str, int] = {}
    with _log_lock:
        for buffer, nbytes in _reported:
            sizes[buffer] = sizes.get(buffer, 0) + nbytes
    return sizes


def kv_overrides(values: Mapping[str, bool | int]) -> ctypes.Array:
    """Metadata that count instead of a file's, as ``llama_model_params`` takes them. Keep the array
    while a model loads.
    """
    low = library()
    array = (low.llama_model_kv_override * (len(values) + 1))()  # ends with an empty key
    for item, (key, value) in zip(array, values.items(), strict=False):
        item.key = key.encode()
        if isinstance(value, bool):
            item.tag, item.value.val_bool = low.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        else:
            item.tag, item.value.val_i64 = low.LLAMA_KV_OVERRIDE_TYPE_INT, value
    return array


def supports_gpu() -> bool:
    """Whether this build of llama.cpp can offload layers."""
    return bool(library().llama_supports_gpu_offload())


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def _library_folder() -> Path:
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder:
        return Path(folder)
    package = sys.modules["llama_cpp"].__file__
    assert package is not None
    return Path(package).parent / "lib"


@functools.cache
def ggml() -> dict[str, Callable[..., Any]]:
    """The ggml functions used here, from the libraries that llama_cpp already loaded."""
    lib_dir = _library_folder()
    libs = [
        ctypes.CDLL(str(path))
        for name in ("ggml", "ggml-base", "ggml-cpu")
        for path in sorted(lib_dir.glob(f"lib{name}.*"))[:1]
    ]
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, size, size]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_backend_dev_by_type": (pointer, [ctypes.c_int]),
        "ggml_backend_dev_backend_reg": (pointer, [pointer]),
        "ggml_backend_reg_get_proc_address": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_buft_alloc_buffer": (pointer, [pointer, ctypes.c_size_t]),
        "ggml_backend_buffer_free": (None, [pointer]),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, [pointer, pointer]),
        "ggml_backend_buft_name": (ctypes.c_char_p, [pointer]),
        "ggml_backend_cpu_buffer_type": (pointer, []),
        "ggml_backend_cpu_buffer_from_ptr": (pointer, [pointer, ctypes.c_size_t]),
        "ggml_backend_buffer_get_type": (pointer, [pointer]),
        "ggml_backend_buffer_get_base": (pointer, [pointer]),
        "ggml_backend_buffer_get_size": (ctypes.c_size_t, [pointer]),
        "ggml_backend_buffer_clear": (None, [pointer, ctypes.c_uint8]),
    }
    found = {}
    for name, (result, arguments) in signatures.items():
        function = next(f for lib in libs if (f := getattr(lib, name, None)) is not None)
        function.restype, function.argtypes = result, arguments
        found[name] = function
    return found


def _extra_buffer_types():
    """The CPU backend's own list of buffer types that hold a weight in another layout: an array of
    pointers that ends with a null; None if it has none.
    """
    g = ggml()
    device = g["ggml_backend_dev_by_type"](0)  # GGML_BACKEND_DEVICE_TYPE_CPU
    address = g["ggml_backend_reg_get_proc_address"](
        g["ggml_backend_dev_backend_reg"](device), b"ggml_backend_dev_get_extra_bufts"
    )
    return (
        ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device) or None
        if address
        else None
    )


def leave_amx_out() -> None:
    """Take AMX (matrix units of server CPUs) off that list, so that the loader uses the kernels
    laptops have.

    GCC before 13 takes _tile_loadconfig to read 8 of its 64 bytes and leaves the rest unset; a
    llama.cpp built with it dies at the first product (llama.cpp issue 20824). Which compiler made a
    wheel cannot be seen from here, and a crash cannot be caught.
    """
    listed = _extra_buffer_types()
    if not listed:
        return
    kept = 0
    for i in itertools.takewhile(lambda i: listed[i], itertools.count()):
        if ggml()["ggml_backend_buft_name"](listed[i]) != b"AMX":
            listed[kept], kept = listed[i], kept + 1
    listed[kept] = None


@functools.cache
def repacks(type_id: int, row: int, n_rows: int) -> bool:
    """Whether llama.cpp copies a 2-D weight of this type and shape into a repacked buffer on this
    CPU.

    Asks the CPU backend's extra buffer types the very question its loader asks
    (llama-model-loader.cpp, weight_buft_supported), so no list of CPUs is kept here.
    """
    library()
    g, listed = ggml(), _extra_buffer_types()
    device = g["ggml_backend_dev_by_type"](0)
    context = g["ggml_init"](_InitParams(1 << 16, None, True))
    try:
        weight = g["ggml_new_tensor_2d"](context, type_id, row, n_rows)
        product = g["ggml_mul_mat"](context, weight, g["ggml_new_tensor_2d"](context, 0, row, 512))
        i = 0
        while listed and listed[i]:
            buffer = g["ggml_backend_buft_alloc_buffer"](listed[i], 0)
            # struct ggml_tensor { enum ggml_type type; struct ggml_backend_buffer * buffer; … }:
            # the pointer is at byte 8
            ctypes.c_void_p.from_address(weight + 8).value = buffer
            supported = g["ggml_backend_dev_supports_op"](device, product)
            g["ggml_backend_buffer_free"](buffer)
            if supported:
                return True
            i += 1
        return False
    finally:
        g["ggml_free"](context)


def check_loads(path: Path) -> None:
    """Let llama.cpp read the header and vocabulary in a child process, so that an abort there is
    our error, not our end.
    """
    code = (
        "import sys; from edge_gemma.engines.llama import library; "
        "library._load_vocabulary(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=300
    )
    if done.returncode == 0:
        return
    reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
    how = f"stopped with signal {-done.returncode}" if done.returncode < 0 else "refused it"
    raise BundleError(
        f"llama.cpp {how} while reading {path.name}: {reason[0]}. The file is damaged or not "
        "for this version"
    )


def _load_vocabulary(path: str) -> None:
    low = library()
    params = low.llama_model_default_params()
    params.vocab_only = True
    model = low.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        sys.exit(last_log())
    low.llama_model_free(model)
