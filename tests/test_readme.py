"""The README's figures against what they were made from."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

import danube3
from data import experiment

README = (ROOT / "README.md").read_text()


def table_rows(heading):
    """The rows of the first table under a heading, as lists of cells."""
    lines = README.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def test_the_experiments_table_is_that_of_its_csv():
    """Means and intervals worked out again from the committed runs, with scipy-free arithmetic of experiment.py (which
    test_experiment.py checks by hand), and every sentence's number after that."""
    rows = experiment.read_rows(ROOT / "data" / "experiment.csv")
    assert len(rows) == 15 and {row["seed"] for row in rows} == set(range(5))
    results = experiment.analysis(rows)
    assert experiment.as_table(results) in README
    assert (ROOT / "data" / "experiment.png").read_bytes().startswith(b"\x89PNG")
    better = {name for name, cells in results.items() if ("loss" in name) != (cells["reversed - constant"][0] > 0)}
    assert better - {"rumours"} == {"loss_web"}  # "worse in every outcome but one"
    for name in ("statements", "rumours", "quiz", "chat_first", "chat_second"):
        difference, half = results[name]["staged - constant"]
        assert abs(difference) < half
    assert all(cells["staged - constant"][0] > 0 for name, cells in results.items() if "loss" in name)
    assert f"{results['statements']['constant'][0]:.1%}".replace("%", " %") in README


def test_average_rates_of_the_experiment():
    """At which share of the peak rate the clean sources are read, in each order."""
    ranges = {}
    for order in experiment.ORDERS:
        recipe = danube3.remix(danube3.RECIPES["toy"], order)
        rates = [danube3.learning_rate(step, recipe) / recipe.learning_rate for step in range(recipe.total_steps)]
        averages = []
        for name in danube3.SOURCES[1:]:
            stages = [recipe.stages[recipe.stage_at(step)].mixture for step in range(recipe.total_steps)]
            shares = [mixture[name] / sum(mixture.values()) for mixture in stages]
            averages.append(sum(r * s for r, s in zip(rates, shares)) / sum(shares))
        ranges[order] = round(100 * min(averages)), round(100 * max(averages))
    assert ranges == {"staged": (25, 31), "constant": (50, 50), "reversed": (67, 72)}
    text = " ".join(README.split())
    assert (
        "at 25 to 31 % of the peak rate on average, in the even one at 50 %, in the backward one at 67 to 72 %" in text
    )


@pytest.mark.parametrize("name, gpu_days, days", [("500m", "462", "7.2"), ("4b", "4,785", "74.8")])
def test_costs_in_the_reproduction_table(name, gpu_days, days):
    """From the same formula as the plan's."""
    config, recipe = danube3.CONFIGS[name], danube3.RECIPES[name]
    row = next(
        row for row in table_rows("What the report publishes, and what this computes") if f"training {name}" in row[0]
    )
    tokens = recipe.total_steps * recipe.tokens_per_step
    cost = danube3.flops_per_token(config, recipe.sequence_length) * tokens / danube3.GPU_FLOPS / 86_400
    assert f"{cost:,.0f} GPU-days" in row[2] and gpu_days in row[2]
    assert f"{cost / 64:.1f} days on 64" in row[2] and days in row[2]
    assert f"{recipe.total_steps:,}" in README


def test_files_that_the_readme_names():
    for name in re.findall(r"`((?:data|tests)/[a-z_]+\.(?:py|csv|png|txt))`", README):
        assert Path(ROOT, name).is_file(), name
