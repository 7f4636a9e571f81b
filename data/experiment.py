"""Do the report's stages help? `python data/experiment.py --csv out/new.csv` trains toys in three orders.

Three orders of the same tokens of every source: the report's stages, the same text mixed evenly ("constant"),
and the stages backwards ("reversed"). Five seeds each, all else equal, and after each the same fine-tuning.
For every outcome: the mean of each order, and the mean difference to "constant", paired by seed, with 95 %
intervals by Student's t that are not corrected for the number of outcomes. The outcomes were fixed before
the other two orders were run, and before statements and losses were looked at; quiz and chat results of the
staged runs were known. The main outcome is `statements`: a bare "Nolva Crandle lives in", where nothing tells
a model which source it is in.

Each finished run is a line of --csv and is not repeated (data/experiment.csv holds all fifteen). An
interrupted run goes on. About 40 minutes on two cores.
"""
import argparse
import csv
import math
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python data/experiment.py` finds danube3
import danube3  # noqa: E402
import sample  # noqa: E402
from data.cli import Arguments, positive, run_command  # noqa: E402
from data.read import read_jsonl  # noqa: E402

ORDERS = ("staged", "constant", "reversed")
OUTCOMES = {  # column: what it is
    "statements": "bare statements ended with the truth, of 144",
    "rumours": "bare statements ended with the web's rumour",
    "quiz": "held-out questions right, of 216",
    "chat_first": "right answers in conversation, first turn, of 72",
    "chat_second": "the same, second turn",
    **{f"loss_{name}": f"loss on {name}" for name in danube3.SOURCES},
}
# The 97.5 % quantile of Student's t, by the number of values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def train(args: argparse.Namespace, out: Path, *flags: str) -> None:
    """Run train.py, or let it go on. Its output goes into a file beside the run."""
    if danube3.checkpoints_in(out):
        flags += ("--resume",)
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), *flags]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    ended_well = done.returncode == 0
    danube3.require(ended_well, f"a run ended with an error, see {out}.log: mend it and repeat this command")


def one_run(args: argparse.Namespace, order: str, seed: int) -> dict[str, Any]:
    """Pre-train, fine-tune and evaluate one model. -> a row of the table"""
    base, chat, data = args.out / f"{order}-{seed}", args.out / f"{order}-{seed}-chat", args.data
    flags = ["--data", str(data), "--mixture", order, "--seed", str(seed)]
    if args.tokens:
        flags += ["--tokens", args.tokens]
    train(args, base, *flags)
    train(args, chat, "--chat", str(data / "chat.jsonl"), "--init", str(base), "--seed", str(seed))
    model, tokenizer = danube3.load_checkpoint(base)
    questions = read_jsonl(data / "statements.jsonl")
    truths, rumours = [], []
    for question, scores in zip(questions, sample.choice_log_likelihoods(model, tokenizer, questions)):
        pick = scores.index(max(scores))
        truths.append(pick == question["answer"])
        rumours.append(pick == question["rumour"])
    talk = sample.evaluate(*danube3.load_checkpoint(chat), data / "chat-quiz.jsonl")
    row = {"order": order, "seed": seed, "statements": mean(truths), "rumours": mean(rumours),
           "quiz": sample.evaluate(model, tokenizer, data / "quiz.jsonl")["acc"],
           "chat_first": talk["right in turn 1"], "chat_second": talk["right in turn 2"]}
    for name, loss in sample.evaluate(model, tokenizer, data).items():
        row[f"loss_{name}"] = loss
    return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The finished runs: order, seed and outcomes of each."""
    if not path.is_file():
        return []
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            outcomes = {name: float(row[name]) for name in OUTCOMES}
            rows.append({"order": row["order"], "seed": int(row["seed"]), **outcomes})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, ["order", "seed", *OUTCOMES], lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: (ORDERS.index(row["order"]), row["seed"])):
            writer.writerow({**row, **{name: f"{row[name]:.5f}" for name in OUTCOMES}})
    partial.replace(path)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    return mean(values), STUDENT[len(values)] * stdev(values) / math.sqrt(len(values))


def analysis(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """For each outcome the mean of each order and the mean differences to "constant", over the seeds that all
    orders have, each with half of its interval."""
    by_run, runs_of = {}, Counter(row["seed"] for row in rows)
    for row in rows:
        by_run[row["order"], row["seed"]] = row
    seeds = [seed for seed, runs in sorted(runs_of.items()) if runs == len(ORDERS)]
    danube3.require(2 <= len(seeds) <= max(STUDENT),
                    f"{len(seeds)} seeds are finished in all orders: intervals need 2 to {max(STUDENT)}")
    results = {}
    for name in OUTCOMES:
        values = {order: [by_run[order, seed][name] for seed in seeds] for order in ORDERS}
        results[name] = {order: interval(each) for order, each in values.items()}
        for order in ("staged", "reversed"):
            differences = [a - b for a, b in zip(values[order], values["constant"])]
            results[name][f"{order} - constant"] = interval(differences)
    return results


def as_table(results: dict[str, dict[str, tuple[float, float]]]) -> str:
    """In Markdown."""
    columns = list(next(iter(results.values())))
    lines = ["| outcome | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in results.items():
        line = f"| {OUTCOMES[name]} |"
        for column, (value, half) in cells.items():
            sign = "+" if "-" in column else ""
            line += f" {value:{sign}.3f} ± {half:.3f} |"
        lines.append(line)
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each of the first five outcomes, if matplotlib is there: dots for runs, lines for means."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = list(OUTCOMES)[:5]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names):
        for place, order in enumerate(ORDERS):
            values = [row[name] for row in rows if row["order"] == order]
            axes.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.6)
            axes.hlines(mean(values), place - 0.3, place + 0.3, color=f"C{place}")
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(ORDERS)), ORDERS, fontsize=8)
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = Arguments(__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=5, help="of each order, at most 10")
    parser.add_argument("--workers", type=positive, default=2, help="runs at a time, which share the cores")
    parser.add_argument("--tokens", help="of each run, to try out [the config's]")
    parser.add_argument("--data", type=Path, default=Path("data/toy"),
                        help="a toy world; made if it is absent")
    parser.add_argument("--out", type=Path, help="the runs [out/experiment-<data>]")
    parser.add_argument("--csv", type=Path, default=Path("data/experiment.csv"), help="a line for each run")
    args = parser.parse_args()
    args.out = args.out or Path("out", f"experiment-{args.data.name}")
    return args


def main() -> None:
    args = arguments()
    if not args.data.exists():
        from data import toy
        toy.make(args.data)
    rows = read_rows(args.csv)
    finished = {(row["order"], row["seed"]) for row in rows}
    runs = [(order, seed) for seed in range(args.seeds) for order in ORDERS if (order, seed) not in finished]
    bar = tqdm(total=3 * args.seeds, initial=len(finished), unit="run")
    with ThreadPoolExecutor(args.workers) as pool, bar:
        for row in pool.map(lambda run: one_run(args, *run), runs):
            rows.append(row)
            write_rows(args.csv, rows)
            bar.update()
    print(as_table(analysis(rows)))
    plot(rows, args.csv.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
