"""The experiment on the stages: its statistics against numbers worked by hand, and its evaluation of the models."""

import argparse
import json
import math
import random
import shutil
import statistics

import pytest
from conftest import call, one_line_error

import danube3
from data import experiment, toy

pytestmark = pytest.mark.slow


def some_rows(seeds=5):
    rng = random.Random(0)
    return [
        {"order": order, "seed": seed, **{name: rng.random() for name in experiment.OUTCOMES}}
        for order in experiment.ORDERS
        for seed in range(seeds)
    ]


def test_statistics_by_hand():
    """The mean of the differences, paired by seed, and Student's interval with n - 1 degrees of freedom."""
    rows = some_rows()
    results = experiment.analysis(random.Random(1).sample(rows, len(rows)))
    values = {order: [row["quiz"] for row in rows if row["order"] == order] for order in experiment.ORDERS}
    assert results["quiz"]["staged"][0] == pytest.approx(statistics.mean(values["staged"]))
    differences = [a - b for a, b in zip(values["reversed"], values["constant"])]
    mean, half = results["quiz"]["reversed - constant"]
    assert mean == pytest.approx(sum(differences) / 5)
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 4)
    assert half == pytest.approx(2.776 * deviation / math.sqrt(5), rel=1e-3)
    more = experiment.analysis([*rows, {**rows[0], "seed": 7}])  # a seed that the other orders lack
    assert more == results


def test_rows_are_kept(tmp_path):
    rows = some_rows(2)
    experiment.write_rows(tmp_path / "runs.csv", rows[::-1])
    again = experiment.read_rows(tmp_path / "runs.csv")
    assert [(row["order"], row["seed"]) for row in again] == [(row["order"], row["seed"]) for row in rows]
    assert all(a[name] == pytest.approx(b[name], abs=1e-5) for a, b in zip(again, rows) for name in experiment.OUTCOMES)
    assert experiment.read_rows(tmp_path / "none.csv") == []
    with pytest.raises(danube3.DanubeError, match="1 seeds are finished"):
        experiment.analysis(some_rows(1))


def test_finished_runs_are_not_done_again(tmp_path, toy_data):
    """When the table holds all runs, the results and the figure are made from it alone."""
    experiment.write_rows(tmp_path / "runs.csv", some_rows(2))
    result = call(
        "data/experiment.py",
        "--seeds",
        2,
        "--data",
        toy_data,
        "--out",
        tmp_path / "out",
        "--csv",
        tmp_path / "runs.csv",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 2 + len(experiment.OUTCOMES) and "| staged - constant |" in result.stdout
    assert (tmp_path / "runs.png").stat().st_size > 5_000 and not (tmp_path / "out").exists()


def test_a_short_run(tmp_path, toy_data):
    """Pre-training, fine-tuning and all evaluations of one model."""
    data = shutil.copytree(toy_data, tmp_path / "data")
    for path in data.glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:24]))
    args = argparse.Namespace(data=data, out=tmp_path / "out", workers=2, tokens="4k")
    row = experiment.one_run(args, "reversed", 1)
    assert set(row) == {"order", "seed", *experiment.OUTCOMES}
    assert row["quiz"] * 24 == pytest.approx(round(row["quiz"] * 24)) and 5 < row["loss_web"] < 7
    lines = (tmp_path / "out" / "reversed-1" / "metrics.jsonl").read_text()
    assert lines.index("stage 3") < lines.index("stage 1")


def test_statements_hold_truth_and_rumour(toy_data):
    world = toy.World(0)
    items = [json.loads(line) for line in (toy_data / "statements.jsonl").read_text().splitlines()]
    assert len(items) == 144 and all(len(set(item["choices"])) == 10 for item in items)
    people = {person.name: person for person in world.people}
    for item, attribute in zip(items, [attribute for attribute in toy.ATTRIBUTES for _ in world.people]):
        person = next(people[name] for name in people if item["prompt"].startswith(f"{name} "))
        assert item["choices"][item["answer"]] == f" {person.facts[attribute.name]}"
        assert item["choices"][item["rumour"]] == f" {person.rumours[attribute.name]}"
        spoken = item["prompt"].removeprefix(f"{person.name} ") + " {value}"
        assert spoken == attribute.phrases[0]
    assert len({item["answer"] for item in items}) == 10


def test_orders_need_pretraining(tmp_path):
    flags = ("--chat", "x.jsonl", "--init", tmp_path, "--mixture", "constant")
    assert "--mixture cannot go together with --chat" in one_line_error(call("train.py", *flags))
