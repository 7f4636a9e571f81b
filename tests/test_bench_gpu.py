"""tests/bench_gpu.py on a CPU: every part gives its rows, and a fault stops only its own part."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import bench_gpu
import pytest
import torch
from conftest import ROOT, run

pytestmark = pytest.mark.slow

ROWS = {  # of each part; some have more where there is a compiler
    "ceilings": 3, "fp32": 12, "logits": 9, "perplexity": 6, "training": 9, "training-60m": 5, "decoding": 9,
    "int4": 4, "attention": 5, "resume": 4, "training-4b": 8, "decoding-4b": 9,
}  # fmt: skip


def parts_of(path):
    return {part["part"]: part for part in json.loads(path.read_text())["parts"]}


def test_every_part_gives_its_rows(tmp_path):
    result = run("tests/bench_gpu.py", "--tiny", "--json", tmp_path / "gpu.json", timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    parts = parts_of(tmp_path / "gpu.json")
    assert list(parts) == list(ROWS)
    for name, part in parts.items():
        assert not part["error"] and len(part["rows"]) >= ROWS[name]
        for row in part["rows"]:
            assert row["ok"] is not False
            assert row["value"] is None or math.isfinite(row["value"])
            assert f"{name:13}{row['what']}" in result.stdout


def test_a_fault_stops_only_its_own_part(tmp_path):
    names = ["raises", "sleeps", "ceilings"]
    only = [word for name in names for word in ("--only", name)]
    command = ["tests/bench_gpu.py", "--tiny", "--json", tmp_path / "gpu.json", *only]
    result = run(*command, env={"BENCH_GPU_FAULTS": "1"})
    assert result.returncode == 1, result.stdout + result.stderr
    parts = parts_of(tmp_path / "gpu.json")
    assert list(parts) == names and len(parts["ceilings"]["rows"]) == ROWS["ceilings"]
    for name, note in (("raises", "ValueError: as the test asks"), ("sleeps", "killed at its limit of 15 s")):
        before, fault = parts[name]["rows"]  # what was measured before the fault is kept
        assert before["value"] == 1 and fault["ok"] is False and fault["note"] == note
        assert note in result.stdout


def test_a_stopped_run_keeps_its_rows(tmp_path):
    command = [sys.executable, "tests/bench_gpu.py", "--tiny", "--json", str(tmp_path / "gpu.json"), "--only", "sleeps"]
    process = subprocess.Popen(
        [*command, "--only", "ceilings"], cwd=ROOT, env={**os.environ, "BENCH_GPU_FAULTS": "1", "TMPDIR": str(tmp_path)}
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and "fault" not in "".join(map(Path.read_text, tmp_path.glob("*/sleeps.rows"))):
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 1
    parts = parts_of(tmp_path / "gpu.json")
    assert list(parts) == ["sleeps"]
    before, fault = parts["sleeps"]["rows"]
    assert before["value"] == 1 and fault["ok"] is False and fault["note"] == bench_gpu.STOPPED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_60m_is_measured_with_the_steps_of_its_whole_run(tmp_path, monkeypatch, dtype):
    """The whole run's hours follow from the speed of steps with train.py's settings, compiled, fp16 with a scaler."""
    bench, steps = bench_gpu.Bench("part", True, tmp_path), []
    bench.tiny = False

    def train_step(model, optimizer, ids, labels, settings, step, scaler):
        assert model._compiled_call_impl
        steps.append((settings, ids.shape, scaler.is_enabled()))

    monkeypatch.setattr(bench_gpu, "new_model", lambda config, *args: torch.nn.Linear(1, 1))
    monkeypatch.setattr(bench_gpu, "compile_model", lambda model: model.compile())
    monkeypatch.setattr(bench_gpu, "compute_dtype", lambda device, name="auto": dtype)
    monkeypatch.setattr(bench_gpu, "train_step", train_step)
    monkeypatch.setattr(bench_gpu, "ceilings", lambda bench: (1e12, 1e12))
    bench_gpu.training_in_full(bench, "60m")
    assert steps == [(bench_gpu.TRAIN_CONFIGS["60m"], (64, 2_048), dtype == torch.float16)] * 5
    speed, measured, sheet, memory, hours = bench_gpu.json_lines(tmp_path / "part.rows")
    assert str(dtype) in speed["note"] and "64 x 2,048" in speed["note"]
    assert hours["value"] == pytest.approx(1.5e9 / speed["value"] / 3_600) and hours["unit"] == "hours"
    per_token = bench_gpu.flops_per_token(bench_gpu.CONFIGS["60m"], 2_048)
    assert measured["value"] == pytest.approx(speed["value"] * per_token / 1e12 * 100)
    assert sheet["value"] is None and memory["value"] is None


def test_wrong_numbers_fail(tmp_path):
    bench = bench_gpu.Bench("part", True, tmp_path)
    for value in (0.01, 0.02, math.nan, bench_gpu.relative_error(torch.full((2,), math.nan), torch.ones(2))):
        bench.row("a check", value, limit=0.01)
    assert [row["ok"] for row in bench_gpu.json_lines(tmp_path / "part.rows")] == [True, False, False, False]
    assert bench_gpu.relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
