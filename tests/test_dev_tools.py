"""What a checkout has beside the shipped benchmarks, on models of a few KB."""

import sys

import pytest

from edge_gemma.benchmarks.dev import audio_reference, conversion, vision
from edge_gemma.benchmarks.dev.bundles import Maker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Stands in for torch_vision.py, whose torch is not here: the same commands, rows of zeros.
TORCH = """
import json, sys
command, folder, kind, threads = sys.argv[1:]
assert command == "worker" and kind == "siglip" and threads == "1"
out, size = sys.stdout.buffer, 64
out.write(b"a library greets\\nready\\n")
out.flush()
while len(sys.stdin.buffer.read(size * size * 3)) == size * size * 3:
    out.write(json.dumps([16, 256]).encode() + b"\\n" + bytes(4 * 16 * 256))
    out.flush()
"""


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(tmp_path_factory.mktemp("dev"), small=True, note=print)


def test_a_vision_tower_beside_mtmd(maker):
    choice = vision.Choice(
        maker.tower("siglip"),
        maker.work / "vision",
        ("f32", "int8"),
        mtmd_text=maker.gguf("270m"),
        n_threads=1,
    )
    rows = {row["file"]: row for row in vision.run(choice, rounds=1).rows}
    assert list(rows) == ["siglip-f32", "siglip-int8", "siglip-mmproj-f16.gguf"]
    assert rows["siglip-f32"]["relative_rms"] == 0.0
    # two implementations of one tower give the same soft tokens
    assert 0 < rows["siglip-mmproj-f16.gguf"]["relative_rms"] < 2e-3
    assert 0 < rows["siglip-int8"]["relative_rms"] < 5e-2


def test_torch_is_asked_in_its_own_interpreter(maker, tmp_path, monkeypatch):
    script = tmp_path / "torch_vision.py"
    script.write_text(TORCH)
    monkeypatch.setattr(vision, "TORCH", script)
    task = vision.Task(
        f"{vision.HERE}:TorchModule",
        str(maker.tower("siglip")),
        n_threads=1,
        settings=(("python", sys.executable), ("kind", "siglip")),
    )
    system = vision.TorchModule(task)
    system.load()
    assert system.facts() == {"watch_pid": system.process.pid} and system.cpu_seconds() >= 0
    assert system.encode_picture(vision.inputs.picture(64)).shape == (16, 256)
    system.close()
    assert system.process.returncode == 0


def test_one_pass_against_two(maker, tmp_path):
    outcome = conversion.run(maker.make("270m-bf16"), ["q8_0"], tmp_path)
    found = outcome["recipes"]["q8_0"]
    one, two = found["one_pass"], found["two_step"]
    assert one["written_bytes"] == pytest.approx(found["bundle_bytes"], rel=0.02)
    assert two["written_bytes"] > 2 * one["written_bytes"]  # an F16 file comes first
    assert one["peak_pss_bytes"] > 10 << 20 and not list(tmp_path.iterdir())
    assert "| q8_0 |" in conversion.table(outcome)


def test_the_encoder_equals_numpys(maker):
    assert audio_reference.largest_difference(maker.tower("audio"), 1.3) < 1e-5
