"""tests/bench_gpu.py on a CPU: every part gives its rows, and a fault stops only its own part."""

import json
import math

import bench_gpu
import pytest
import torch
from conftest import run

pytestmark = pytest.mark.slow

ROWS = {  # of each part; some have more where there is a compiler
    "ceilings": 3, "fp32": 12, "logits": 9, "perplexity": 6, "training": 9, "decoding": 9, "int4": 4, "attention": 5,
    "resume": 4, "training-4b": 8, "decoding-4b": 9,
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
            assert f"{name:12}{row['what']}" in result.stdout


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


def test_wrong_numbers_fail(tmp_path):
    bench = bench_gpu.Bench("part", True, tmp_path)
    for value in (0.01, 0.02, math.nan, bench_gpu.relative_error(torch.full((2,), math.nan), torch.ones(2))):
        bench.row("a check", value, limit=0.01)
    assert [row["ok"] for row in bench_gpu.json_lines(tmp_path / "part.rows")] == [True, False, False, False]
    assert bench_gpu.relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
