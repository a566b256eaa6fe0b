"""The kernel's counters, on real allocations and a real mapped file."""

import mmap
import os
import resource
import subprocess
import sys
import time

import pytest

from edge_gemma.errors import MissingExtra
from edge_gemma.machine import footprint as memory
from edge_gemma.machine import peak
from edge_gemma.machine.footprint import (
    PAGE_BYTES,
    footprint,
    mapping_of,
    resident_bytes,
)
from edge_gemma.machine.peak import PeakSampler
from edge_gemma.units import MiB

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def touched(n_bytes: int) -> mmap.mmap:
    """Fresh anonymous memory, every page used: not from the heap, where what an earlier test freed
    would serve.
    """
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, n_bytes, PAGE_BYTES):
        block[page] = 1
    return block


@linux
def test_a_block_shows_as_anonymous_memory():
    before = footprint()
    block = touched(64 * MiB)
    after = footprint()
    assert 63 * MiB < after.anon_bytes - before.anon_bytes < 66 * MiB
    assert after.exact and abs(footprint(exact=False).rss_bytes - after.rss_bytes) < 4 * MiB
    block.close()


@linux
def test_pages_of_a_mapped_file_are_counted_by_range(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * PAGE_BYTES))
    assert mapping_of(path) == []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        view.madvise(mmap.MADV_RANDOM)  # no read-around: exactly what is touched becomes resident
        (mapping,) = mapping_of(path)
        assert mapping.end - mapping.start == 64 * PAGE_BYTES and mapping.offset == 0
        for page in range(8, 16):
            view[page * PAGE_BYTES]
        assert resident_bytes(path, [(8 * PAGE_BYTES, 8 * PAGE_BYTES)]) == 8 * PAGE_BYTES
        view.madvise(mmap.MADV_DONTNEED, 8 * PAGE_BYTES, 4 * PAGE_BYTES)
        assert (
            resident_bytes(
                path, [(8 * PAGE_BYTES, 4 * PAGE_BYTES), (12 * PAGE_BYTES, 4 * PAGE_BYTES)]
            )
            == 4 * PAGE_BYTES
        )


@linux
def test_the_sampler_keeps_what_came_and_went_and_names_the_phase():
    with PeakSampler(interval_s=0.01, keep_timeline=True) as sampler:
        idle = sampler.mark("idle").anon_bytes
        sampler.mark("work")
        block = touched(80 * MiB)
        time.sleep(0.1)
        block.close()
        sampler.mark("rest")
    assert sampler.phase("work").peak_anon_bytes - idle > 78 * MiB
    assert sampler.phase("idle").peak_anon_bytes - idle < 20 * MiB
    assert sampler.peak_pss_bytes <= sampler.peak_rss_bytes
    assert [seconds for seconds, _ in sampler.timeline] == sorted(
        seconds for seconds, _ in sampler.timeline
    )
    with pytest.raises(KeyError):
        sampler.phase("never")


@linux
def test_rebase_forgets_the_load_peak():
    with PeakSampler(interval_s=0.01) as sampler:
        block = touched(80 * MiB)
        time.sleep(0.05)
        block.close()
        loaded = sampler.mark("loaded")
        sampler.rebase()
    assert sampler.peak_pss_bytes < loaded.pss_bytes + 20 * MiB


@linux
def test_another_process_is_watched_until_it_ends():
    child = subprocess.Popen(
        [sys.executable, "-c", "b = bytearray(50 << 20); import time; time.sleep(0.5)"]
    )
    with PeakSampler(pid=child.pid, interval_s=0.02) as sampler:
        child.wait()
    assert sampler.peak_rss_bytes > 50 * MiB
    with pytest.raises(ProcessLookupError):
        footprint(child.pid)


def test_sampling_is_cheap():
    """Counted, not timed: at most ``duty`` of the time goes into page-table walks."""
    calls = []

    def counted(pid=None, *, exact=True):
        calls.append(exact)
        return footprint(pid, exact=exact)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak, "footprint", counted)
        with PeakSampler(interval_s=0.001):
            time.sleep(0.3)
    walks, looks = calls.count(True), calls.count(False)
    assert looks > 30  # it did sample
    assert 2 <= walks < 30  # at the mark and at the end, and few between


def test_without_psutil_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingExtra, match=r"pip install 'edge-gemma\[bench\]'"):
        memory.load_psutil()


def test_major_faults_are_the_twelfth_field_whatever_the_process_is_called(monkeypatch):
    """proc(5): pid, (name), and from the third field on the fields here hold their own number."""
    line = b"7 (a) b) " + b" ".join(b"%d" % number for number in range(3, 53))
    monkeypatch.setattr(memory.Path, "read_bytes", lambda path: line)
    assert memory.major_faults() == 12


@linux
def test_counters_of_this_process():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    found = memory.major_faults()
    assert before <= found <= resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    assert memory.high_water_bytes() >= footprint(exact=False).rss_bytes - 4 * MiB
    assert memory.high_water_bytes(os.getpid()) > MiB
