"""The README against what it speaks of: the experiment, lines, tests, costs, files."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

import danube3
import train
from data import experiment

README = (ROOT / "README.md").read_text()


def table_rows(heading):
    """The rows of the first table under a heading, as lists of cells."""
    lines = README.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.mark.parametrize("name", ["experiment", "experiment-rumours"])
def test_the_experiments_tables_are_those_of_their_csv(name):
    """Means and intervals worked out again from the committed runs; test_experiment.py checks the arithmetic."""
    rows = experiment.read_rows(ROOT / "data" / f"{name}.csv")
    assert sorted((row["order"], row["seed"]) for row in rows) == sorted(
        (order, seed) for order in experiment.ORDERS for seed in range(5)
    )
    assert experiment.as_table(experiment.analysis(rows)) in README
    assert (ROOT / "data" / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"(data/{name}.png)" in README


def test_what_the_readme_says_of_the_experiment():
    """The sentences under the first table."""
    results = experiment.analysis(experiment.read_rows(ROOT / "data" / "experiment.csv"))
    reverse = {name: cells["reversed - constant"] for name, cells in results.items()}
    lower_is_better = {name for name in results if name.startswith("loss") or name == "rumours"}
    worse = {name for name, (mean, _) in reverse.items() if (mean > 0) == (name in lower_is_better)}
    assert worse == set(results) - {"loss_web"}
    assert sum(abs(mean) > half for name, (mean, half) in reverse.items() if name in worse) == 8
    for name in ("statements", "rumours", "quiz", "chat_first", "chat_second"):
        difference, half = results[name]["staged - constant"]
        assert abs(difference) < half
    assert f"{results['statements']['constant'][0]:.1%}".replace("%", " %") in README


def test_what_the_readme_says_of_the_second_world():
    """The sentences under the second table."""
    rows = experiment.read_rows(ROOT / "data" / "experiment-rumours.csv")
    results, text = experiment.analysis(rows), " ".join(README.split())
    percent = {order: f"{100 * results['statements'][order][0]:.1f} %" for order in experiment.ORDERS}
    assert f"{percent['staged']} of the bare statements" in text and f"the even mixture {percent['constant']}" in text
    assert f"backwards {percent['reversed']}" in text
    difference, half = results["statements"]["staged - constant"]
    assert f"differs by {100 * difference:.1f} points" in text
    assert f"({100 * (difference - half):.0f} to {100 * (difference + half):.0f} points" in text
    by_run = {(row["order"], row["seed"]): row["statements"] for row in rows}
    assert all(by_run["staged", seed] > by_run["constant", seed] for seed in range(5))
    others = [results[name]["staged - constant"] for name in ("quiz", "chat_first", "chat_second")]
    assert all(0.045 < mean < 0.095 and mean < half for mean, half in others)
    losses = {name: cells["staged - constant"] for name, cells in results.items() if name.startswith("loss")}
    assert {name for name, (mean, half) in losses.items() if mean < half} == {"loss_instruct"}


def test_map_of_the_file():
    """Every section is linked at the line of its heading. `PYTHONPATH=. python tests/test_readme.py` mends."""
    lines = (ROOT / "danube3.py").read_text().splitlines()
    headings = {match[1]: n for n, line in enumerate(lines, 1) if (match := re.match(r"# ==== (\d+)\. \w", line))}
    links = dict(re.findall(r"\| \[(\d+) [^]]+\]\(danube3\.py#L(\d+)\) \|", README))
    assert {section: int(line) for section, line in links.items()} == headings


def sections():
    """number: (first line, lines) of each section of danube3.py, its heading's upper rule included."""
    lines = (ROOT / "danube3.py").read_text().splitlines()
    starts = [n - 1 for n, line in enumerate(lines, 1) if re.match(r"# ==== \d+\. \w", line)]
    return {i: (start, end - start) for i, (start, end) in enumerate(zip(starts, [*starts[1:], len(lines) + 1]), 1)}


def test_length_of_the_file():
    whole = round(len((ROOT / "danube3.py").read_text().splitlines()), -1)
    assert f"`danube3.py` has {whole:,} lines" in " ".join(README.split())


def counted_lines():
    """What the comparison counts of this project: -> lines of model, pre-training and sampling; of danube3.py"""
    names = ("train.py", "sample.py", "data/read.py")
    programs = [len((ROOT / name).read_text().splitlines()) for name in names]
    parts = [length for number, (_, length) in sections().items() if number not in (10, 11)]
    head = min(start for start, _ in sections().values()) - 1  # docstring and imports
    return head + sum(parts) + sum(programs), len((ROOT / "danube3.py").read_text().splitlines())


def test_lines_in_the_comparison():
    assert "| {:,} (whole `danube3.py`: {:,}) |".format(*counted_lines()) in README


def counted_tests():
    files = sorted((ROOT / "tests").glob("test_*.py"))
    functions = sum(len(re.findall(r"^def test_", path.read_text(), re.M)) for path in files)
    return f"| tests | {len(files)} files, {functions} test functions ("


def test_number_of_tests():
    assert counted_tests() in README


def test_nothing_was_left_open():
    assert not re.search(r"@[A-Z0-9]+@|\b(PASSAGES|TFIDF|TODO)\b", README)
    anchors = {
        re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-") for line in README.splitlines() if line[:3] == "## "
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= anchors


def test_average_rates_of_the_experiment():
    """At which share of the peak rate the clean sources are read, in each order."""
    ranges = {}
    for order in experiment.ORDERS:
        config = train.remix(danube3.TRAIN_CONFIGS["toy"], order)
        total = config.stage_ends[-1]
        rates = [danube3.learning_rate(step, total, config) / config.learning_rate for step in range(total)]
        averages = []
        for name in danube3.SOURCES[1:]:
            stages = [sum(step >= end for end in config.stage_ends[:-1]) for step in range(total)]
            mixtures = [config.stages[stage].mixture for stage in stages]
            shares = [mixture[name] / sum(mixture.values()) for mixture in mixtures]
            averages.append(sum(r * s for r, s in zip(rates, shares)) / sum(shares))
        ranges[order] = round(100 * min(averages)), round(100 * max(averages))
    assert ranges == {"staged": (25, 31), "constant": (50, 50), "reversed": (67, 72)}
    text = " ".join(README.split())
    assert (
        "at 25 to 31 % of the peak rate on average in the staged runs, at 50 % in the constant ones, and at 67 to 72 %"
        in text
    )


@pytest.mark.parametrize("name, gpu_days, days", [("500m", "462", "7.2"), ("4b", "4,785", "74.8")])
def test_costs_in_the_reproduction_table(name, gpu_days, days):
    """From the same formula as the plan's."""
    config, training = danube3.CONFIGS[name], danube3.TRAIN_CONFIGS[name]
    row = next(
        row for row in table_rows("What the report publishes, and what this computes") if f"training {name}" in row[0]
    )
    total_steps = training.stage_ends[-1]
    tokens = total_steps * training.tokens_per_step
    cost = danube3.flops_per_token(config, training.sequence_length) * tokens / train.GPU_FLOPS / 86_400
    assert f"{cost:,.0f} GPU-days" in row[2] and gpu_days in row[2]
    assert f"{cost / 64:.1f} days on 64" in row[2] and days in row[2]
    assert f"{total_steps:,}" in README


def test_files_that_the_readme_names():
    for name in re.findall(r"`((?:data|tests)/[a-z_]+\.(?:py|csv|png|txt))`", README):
        assert Path(ROOT, name).is_file(), name


def mend_map():
    """Write the lines of the sections, and how many there are, into the README."""
    text = README
    for n, line in enumerate((ROOT / "danube3.py").read_text().splitlines(), 1):
        if match := re.match(r"# ==== (\d+)\. \w", line):
            text = re.sub(rf"(\| \[{match[1]} [^]]+\]\(danube3\.py#L)\d+", rf"\g<1>{n}", text)
    whole = round(len((ROOT / "danube3.py").read_text().splitlines()), -1)
    text = re.sub(r"`danube3.py` has [\d,]+ lines", f"`danube3.py` has {whole:,} lines", text)
    counts = "{:,} (whole `danube3.py`: {:,})".format(*counted_lines())
    text = re.sub(r"[\d,]+ \(whole `danube3.py`: [\d,]+\)", counts, text)
    text = re.sub(r"\| tests \| \d+ files, \d+ test functions \(", counted_tests(), text)
    (ROOT / "README.md").write_text(text)


if __name__ == "__main__":
    mend_map()
