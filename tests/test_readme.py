"""The three READMEs against what they describe: the experiment, lines, tests, costs, files, links.

README.md holds the map of danube3.py, data/README.md the experiment, tests/README.md costs and comparison.
`PYTHONPATH=.:tests python tests/test_readme.py` corrects line numbers and counts in all three.
"""

import itertools
import re
import statistics
from pathlib import Path

import pytest
from conftest import ROOT
from scipy import stats

import danube3
import train
from data import experiment

NAMES = ("README.md", "data/README.md", "tests/README.md")
README, DATA, TESTS = ((ROOT / name).read_text() for name in NAMES)


def one_line(text):
    """With single spaces, so that a sentence can be found wherever its lines end."""
    return " ".join(text.split())


def table_rows(heading):
    """The rows of the first table under a heading of tests/README.md, as lists of cells."""
    lines = TESTS.split(f"\n## {heading}\n")[1].split("\n## ")[0].split("\n### ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.mark.parametrize("name", ["experiment", "experiment-rumours"])
def test_the_experiments_tables_are_those_of_their_csv(name):
    """Means and intervals worked out again from the committed runs; test_experiment.py checks the arithmetic."""
    rows = experiment.read_rows(ROOT / "data" / f"{name}.csv")
    assert sorted((row["order"], row["seed"]) for row in rows) == sorted(
        (order, seed) for order in experiment.ORDERS for seed in range(5)
    )
    assert experiment.as_table(experiment.analysis(rows)) in DATA
    assert (ROOT / "data" / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"({name}.png)" in DATA


def reversed_is_worse(results, certain):
    """In all outcomes but the loss on the web; for so many of them the interval excludes zero."""
    reverse = {name: cells["reversed - constant"] for name, cells in results.items()}
    lower_is_better = {name for name in results if name.startswith("loss") or name == "rumours"}
    worse = {name for name, (mean, _) in reverse.items() if (mean > 0) == (name in lower_is_better)}
    found = sum(abs(mean) > half for name, (mean, half) in reverse.items() if name in worse)
    return worse == set(results) - {"loss_web"} and found == certain


def test_what_the_readme_says_of_the_experiment():
    """The sentences under the first table."""
    results = experiment.analysis(experiment.read_rows(ROOT / "data" / "experiment.csv"))
    assert reversed_is_worse(results, certain=8)
    for name in ("statements", "rumours", "quiz", "chat_first", "chat_second"):
        difference, half = results[name]["staged - constant"]
        assert abs(difference) < half
    assert f"{results['statements']['constant'][0]:.1%}".replace("%", " %") in DATA


def test_what_the_readme_says_of_the_repeated_runs():
    runs = [experiment.read_rows(ROOT / "data" / f"{name}.csv") for name in ("experiment", "experiment-repeated")]
    first, again = map(experiment.analysis, runs)
    assert reversed_is_worse(again, certain=9)
    ratios = {}  # of root mean squared differences: to the first run with its seed, and to those with other seeds
    for name in first:
        before, after = ({(row["order"], row["seed"]): row[name] for row in rows} for rows in runs)
        same = [(before[run] - after[run]) ** 2 for run in before]
        pairs = [(a, b) for a, b in itertools.permutations(before, 2) if a[0] == b[0]]
        ratios[name] = (statistics.mean(same) / statistics.mean((before[a] - after[b]) ** 2 for a, b in pairs)) ** 0.5
    largest, *others = sorted(ratios.values(), reverse=True)
    assert largest > 0.9 and (f"{min(others):.2f}", f"{max(others):.2f}") == ("0.46", "0.66")
    assert "(0.46 to 0.66)" in DATA
    for results, quiz, turn in ((first, "-2.0 ± 5.5", "5.0 ± 6.0"), (again, "5.9 ± 5.1", "6.9 ± 4.0")):
        for name, text in (("quiz", quiz), ("chat_first", turn)):
            mean, half = results[name]["staged - constant"]
            assert text == f"{100 * mean:.1f} ± {100 * half:.1f}" and text in one_line(DATA)
        losses = {name: cells["staged - constant"] for name, cells in results.items() if name.startswith("loss")}
        higher = {name.removeprefix("loss_") for name, (mean, half) in losses.items() if mean > half}
        assert higher == {"web", "academic", "synthetic", "other"}
    others = [again[name]["staged - constant"] for name in ("statements", "rumours", "chat_second")]
    assert all(abs(mean) < half for mean, half in others)
    p_values = {}  # of 22 paired t-tests with four degrees of freedom
    for name, cells in again.items():
        for difference in ("staged - constant", "reversed - constant"):
            mean, half = cells[difference]
            t = abs(mean) / half * stats.t.ppf(0.975, 4)
            p_values[name, difference] = 2 * stats.t.sf(t, 4)
    in_order = sorted(p_values, key=p_values.get)
    holm = list(itertools.takewhile(lambda key: p_values[key] <= 0.05 / (22 - in_order.index(key)), in_order))
    kept = {name.removeprefix("loss_") for name, difference in holm if difference == "staged - constant"}
    assert kept == {"academic", "synthetic", "other"}


def test_what_the_readme_says_of_the_second_world():
    """The sentences under the second table."""
    rows = experiment.read_rows(ROOT / "data" / "experiment-rumours.csv")
    results, text = experiment.analysis(rows), one_line(DATA)
    percent = {order: f"{100 * results['statements'][order][0]:.1f} %" for order in experiment.ORDERS}
    assert f"{percent['staged']} of the bare statements" in text and f"the even mixture {percent['constant']}" in text
    assert f"the reversed order {percent['reversed']}" in text
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
    """Every section is linked at the line of its heading."""
    lines = (ROOT / "danube3.py").read_text().splitlines()
    headings = {match[1]: n for n, line in enumerate(lines, 1) if (match := re.match(r"# ==== (\d+)\. \w", line))}
    links = dict(re.findall(r"\| \[(\d+) [^]]+\]\(danube3\.py#L(\d+)\) \|", README))
    assert {section: int(line) for section, line in links.items()} == headings


def sections():
    """number: (first line, lines) of each section of danube3.py, its heading's upper rule included."""
    lines = (ROOT / "danube3.py").read_text().splitlines()
    starts = [n - 1 for n, line in enumerate(lines, 1) if re.match(r"# ==== \d+\. \w", line)]
    return {i: (start, end - start) for i, (start, end) in enumerate(zip(starts, [*starts[1:], len(lines) + 1]), 1)}


def test_the_readme_stays_short():
    assert len(README.encode()) <= 15_000 and len(README.splitlines()) <= 240


def test_length_of_the_file():
    whole = round(len((ROOT / "danube3.py").read_text().splitlines()), -1)
    assert f"`danube3.py` has {whole:,} lines" in one_line(README)


def counted_lines():
    """What the comparison counts of this project: -> lines of model, pre-training and sampling; of danube3.py"""
    names = ("train.py", "sample.py", "data/read.py", "data/cli.py", "data/classify.py")
    programs = [len((ROOT / name).read_text().splitlines()) for name in names]
    parts = [length for number, (_, length) in sections().items() if number not in (10, 11)]
    head = min(start for start, _ in sections().values()) - 1  # docstring and imports
    return head + sum(parts) + sum(programs), len((ROOT / "danube3.py").read_text().splitlines())


def toy_lines():
    return len((ROOT / "data" / "toy.py").read_text().splitlines())


def test_lines_in_the_comparison():
    assert "| {:,} (whole `danube3.py`: {:,}) |".format(*counted_lines()) in TESTS
    assert f"`data/toy.py` ({toy_lines()})" in TESTS


def counted_tests():
    files = sorted((ROOT / "tests").glob("test_*.py"))
    functions = sum(len(re.findall(r"^def test_", path.read_text(), re.M)) for path in files)
    return f"| tests | {len(files)} files, {functions} test functions ("


def test_number_of_tests():
    assert counted_tests() in TESTS


@pytest.mark.parametrize("name", NAMES)
def test_nothing_was_left_open(name):
    assert not re.search(r"@[a-zA-Z0-9-]+@|\b(PASSAGES|TFIDF|TODO)\b", (ROOT / name).read_text())


def anchors(text):
    """Of the headings of a Markdown text, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(name):
    """The relative links of a Markdown file whose file or anchor does not exist."""
    text, broken = (ROOT / name).read_text(), []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        found = target.exists()
        if found and anchor and target.suffix == ".md":
            found = anchor in anchors(target.read_text())
        elif found and anchor:  # a line of a program
            number = re.fullmatch(r"L(\d+)", anchor)
            found = number and 0 < int(number[1]) <= len(target.read_text().splitlines())
        if not found:
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    assert broken_links(name) == []


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("# A\n\n## To `do`, now\n")
    (tmp_path / "data" / "a.py").write_text("x\ny\n")
    links = ["../README.md", "../README.md#to-do-now", "a.py#L2", "#b", "https://a.b/c#d"]
    wrong = ["toy.md", "../README.md#to-do", "a.py#L3", "#a", "a.py#x"]
    text = "# B\n" + "".join(f"[x]({link})\n" for link in links + wrong)
    (tmp_path / "data" / "README.md").write_text(text)
    assert broken_links("data/README.md") == wrong


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
    text = one_line(DATA)
    assert (
        "at 25 to 31 % of the peak rate on average in the staged runs, at 50 % in the constant ones, and at 67 to 72 %"
        in text
    )


@pytest.mark.parametrize("name, gpu_days, days", [("500m", "609", "9.5"), ("4b", "5,634", "88.0")])
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
    assert f"{total_steps:,}" in TESTS
    assert f"{train.GPU_FLOPS / 1e12:.1f} TFLOP/s" in TESTS and train.GPU_FLOPS == 0.4 * 989e12


def test_published_parameters():
    row = next(row for row in table_rows("What the report publishes, and what this computes") if "parameters" in row[0])
    counts = [danube3.count_parameters(danube3.CONFIGS[name]) for name in ("500m", "4b")]
    assert row[1] == "; ".join(f"{count:,}" for count in counts)


def test_files_that_the_readmes_name():
    for name in re.findall(r"`((?:data|tests)/[a-z_]+\.(?:py|csv|png|txt))`", README + DATA + TESTS):
        assert Path(ROOT, name).is_file(), name


def mend():
    """Write the lines of the sections, and what is counted, into the three files."""
    lines = (ROOT / "danube3.py").read_text().splitlines()
    counts = "{:,} (whole `danube3.py`: {:,})".format(*counted_lines())
    for name in NAMES:
        text = (ROOT / name).read_text()
        for n, line in enumerate(lines, 1):
            if match := re.match(r"# ==== (\d+)\. \w", line):
                text = re.sub(rf"(\| \[{match[1]} [^]]+\]\(danube3\.py#L)\d+", rf"\g<1>{n}", text)
        text = re.sub(r"`danube3.py` has [\d,]+ lines", f"`danube3.py` has {round(len(lines), -1):,} lines", text)
        text = re.sub(r"[\d,]+ \(whole `danube3.py`: [\d,]+\)", counts, text)
        text = re.sub(r"`data/toy.py` \(\d+\)", f"`data/toy.py` ({toy_lines()})", text)
        text = re.sub(r"\| tests \| \d+ files, \d+ test functions \(", counted_tests(), text)
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    mend()
