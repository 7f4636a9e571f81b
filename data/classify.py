"""Text classification: rows become prompts, and log-likelihoods of labels become probabilities."""

import argparse
import csv
import os
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import danube3
from danube3 import Danube3, DanubeError, Messages, Tokenizer, require
from data import read
from data.read import Table

# ---- From rows to prompts

def shorten(text: str, size: int, where: str) -> str:
    """At most `size` characters of a text: without its left end, its right end, or its middle."""
    first = {"left": 0, "right": size, "middle": (size + 1) // 2}[where]
    last = size - first
    return text if len(text) <= size else text[:first] + text[len(text) - last:]

def label_text(value: Any) -> str | None:
    """A label as text, or None for a missing one. A whole number may end in .0, as pandas writes it."""
    if value is None or value != value:  # NaN
        return None
    require(not isinstance(value, (list, dict)), f"the label {value} is not one value: write one name")
    text = re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())
    is_number = re.fullmatch(r"-?(\d*\.\d+|\d+\.?)(e[+-]?\d+)?", text, re.IGNORECASE)
    require(not is_number or re.fullmatch(r"-?\d+", text),
            f"the label {text} is a fraction, and regression is not done here: use a few named classes")
    return text or None

@dataclass(frozen=True)
class Task:
    """How rows become prompts and labels. It is saved with a model, so that evaluation repeats training."""
    template: str = "{text}"     # {column} stands for the text of that column
    label_column: str = "label"
    truncate: str = "right"      # which part of a column goes if the prompt is too long
    context: int = 0             # tokens of prompt and label together
    labels: Sequence[str] = ()

    @property
    def columns(self) -> list[str]:
        """The columns that the template names. {{ and }} are braces."""
        columns = []
        try:
            for _, column, form, conversion in string.Formatter().parse(self.template):
                require(not form and not conversion, f"the template has more than a name in {{{column}..}}")
                require(column != "", "the template has {} without a name: double braces that are text")
                if column:
                    columns.append(column)
        except ValueError as error:
            raise DanubeError(f"the template is wrong ({error}): double braces that are text") from error
        require(columns, "the template names no {column}, so all prompts would be the same")
        return columns

    def fill(self, row: dict[str, Any], size: int) -> str:
        """The prompt of a row, with at most `size` characters of each column."""
        text = ""
        for literal, column, _, _ in string.Formatter().parse(self.template):
            text += literal
            if column:
                text += shorten(str(row.get(column, "")), size, self.truncate)
        return text

    def fit(self, row: dict[str, Any], tokenizer: Tokenizer, room: int) -> tuple[str, bool]:
        """The prompt of a row in at most `room` tokens, and whether it was truncated.

        All columns keep the same number of characters, as many as fit. So the longest column is cut first,
        and the words of the template stay. Bisection finds that number."""
        def fits(size: int) -> bool:
            prompt, _ = danube3.render_chat([{"role": "user", "content": self.fill(row, size)}], tokenizer)
            return len(prompt) <= room

        longest = 0
        for column in self.columns:
            longest = max(longest, len(str(row.get(column, ""))))
        if fits(longest):
            return self.fill(row, longest), False
        require(fits(0), f"the template and a label do not fit {self.context:,} tokens: shorten them")
        low, high = 0, longest  # `low` fits, `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            if fits(middle):
                low = middle
            else:
                high = middle
        return self.fill(row, low), True

    def prompts(self, rows: Table, tokenizer: Tokenizer) -> tuple[list[Messages], int]:
        """The prompts of all rows, which leave room for every label, and how many were truncated."""
        longest, prompts, truncated = 0, [], 0
        for label in self.labels:
            answer, _ = danube3.render_chat([{"role": "assistant", "content": label}], tokenizer)
            longest = max(longest, len(answer))
        room = self.context - longest
        for _, row in rows:
            text, cut = self.fit(row, tokenizer, room)
            prompts.append([{"role": "user", "content": text}])
            truncated += cut
        return prompts, truncated

    def labels_of(self, rows: Table) -> list[str | None]:
        """The label of each row, one of `labels` if there are some, or None."""
        found = []
        for place, row in rows:
            try:
                label = label_text(row.get(self.label_column))
            except DanubeError as error:
                raise DanubeError(f"{place}: {error}") from error
            known = not self.labels or label is None or label in self.labels
            require(known, f"{place}: the label {label!r} is none of {', '.join(self.labels)}: correct it, "
                    "or name all with --labels")
            found.append(label)
        return found

    def check(self, rows: Table, *more: str) -> None:
        """Refuse columns that no row has."""
        known = sorted({column for _, row in rows for column in row})
        for column in (*self.columns, *more):
            require(column in known, f"{rows[0][0]}: no row has the column {column!r}, or all have it empty: "
                    f"there are {', '.join(known)}")

# ---- The command line, and files

def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--template", metavar="TEXT", help="prompts for labels, {column} in place of a "
                        "column's text; or a file with such a text [{text}]")
    parser.add_argument("--text-column", metavar="NAME", help="where texts to label are [text]")
    parser.add_argument("--label-column", metavar="NAME", help="where labels are [label]")
    parser.add_argument("--truncate", choices=["left", "right", "middle"],
                        help="the part of a too long text that goes [right]")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="all labels [those of the training]")

def changes(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of a Task."""
    require(not (args.template and args.text_column), "--template names its columns: leave out --text-column")
    template, labels = args.template, args.labels
    if labels:
        labels = [label_text(label) or "" for label in labels]
        require(1 < len(labels) == len(set(labels)), "--labels needs two names or more, each once")
    if args.text_column:
        template = "{" + args.text_column + "}"
    elif template and os.path.isfile(template):
        template = read.read_text(template).removesuffix("\n")
    given = {"template": template, "label_column": args.label_column, "truncate": args.truncate,
             "labels": labels}
    return {name: value for name, value in given.items() if value}

def task_of(model: Danube3, **changes: Any) -> Task:
    """The task that was saved with a model, with changes."""
    try:
        return Task(**{"context": model.config.max_position_embeddings, **model.task, **changes})
    except TypeError as error:
        raise DanubeError(f"the model's task.json is damaged ({error}): copy the folder again") from error

def is_labelled(rows: Table, task: Task) -> bool:
    """Whether a table holds labelled texts, and neither conversations nor questions."""
    columns = {column for _, row in rows for column in row}
    others = {"messages", "conversations", "choices", "completion", "output"}
    return task.label_column in columns and not others & columns

def read_examples(paths: list[Path], task: Task, tokenizer: Tokenizer, labelled: bool, fold_system: bool,
                  strict: bool) -> tuple[list[Messages], list[str], Task | None]:
    """What to fine-tune on: conversations, and labelled texts (if `labelled`, all tables without messages).
    -> conversations; notes; the task with its labels, if there are labelled texts"""
    texts: dict[Path, Table] = {}
    conversations, notes, found = [], [], set[str | None]()
    for path in paths:
        rows = read.read_rows(path)
        is_chat = not {"messages", "conversations"}.isdisjoint(rows[0][1])
        if is_labelled(rows, task) or (labelled and not is_chat):
            texts[path] = rows
            found |= {*task.labels_of(rows)}
            continue
        more, note = read.read_conversations(rows, fold_system, strict)
        conversations += more
        if note:
            notes.append(f"{path}: {note}")
    if not texts:
        return conversations, notes, None
    task = replace(task, labels=task.labels or sorted(filter(None, found)))
    for rows in texts.values():
        task.check(rows, task.label_column)
    require(len(task.labels) > 1, f"there is one label only, {task.labels}: name all with --labels")
    for path, rows in texts.items():
        more, note = labelled_conversations(rows, task, tokenizer)
        conversations += more
        notes.append(f"{path}: {note}")
    return conversations, notes, task

def labelled_conversations(rows: Table, task: Task, tokenizer: Tokenizer) -> tuple[list[Messages], str]:
    """Prompt and label of each row as question and answer, and a note. Rows without a label are left out."""
    prompts, truncated = task.prompts(rows, tokenizer)
    conversations = []
    for prompt, label in zip(prompts, task.labels_of(rows)):
        if label is not None:
            conversations.append([*prompt, {"role": "assistant", "content": label}])
    lost = len(rows) - len(conversations)
    return conversations, f"{truncated:,} of {len(rows):,} texts truncated, {lost:,} without a label left out"

def check_out(path: Path) -> None:
    """Refuse a file that could not be written, before hours of work."""
    usable = path.parent.is_dir() and not path.is_dir()
    require(usable, f"{path} is a folder, or lies in none that exists: name a file")

def write_probabilities(path: Path, rows: Table, labels: Sequence[str], probabilities: np.ndarray) -> None:
    """A csv file: "id", or the number of the row, from 0, and the probability of each label."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *labels])
        for number, ((_, row), values) in enumerate(zip(rows, probabilities.tolist())):
            writer.writerow([row.get("id", number), *map(repr, values)])
    danube3.sync(partial)
    partial.replace(path)

# ---- From log-likelihoods to figures

def softmax(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """Log-likelihoods [N, labels] -> probabilities, float64, rows sum to 1"""
    exponentials = np.exp(np.array(scores) - np.max(scores, axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)

def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """AUC: how often a positive text scores higher than a negative one; a tie counts half. 2 x [N]

    Let R be the sum of the ranks of the n positive texts. Among themselves they have at least the ranks
    1 .. n, with the sum n (n + 1) / 2. Each rank above that is a negative text with a lower score."""
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]  # equal scores share their mean rank
    n = positive.sum()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))

def label_metrics(labels: Sequence[str], probabilities: np.ndarray,
                  truth: list[str | None]) -> dict[str, float]:
    """Accuracy, log loss and, for two labels, AUC of the rows that have a label. probabilities [N, labels]

    Macro accuracy is the mean over labels: rare labels count as much as frequent ones. Log loss is the mean
    of -log p(right label), with p clipped as in scikit-learn. Its baseline predicts the labels' shares."""
    known = np.array([label is not None for label in truth])
    results: dict[str, float] = {"texts": len(truth), "with a label": int(known.sum())}
    if not known.any():
        return results
    p, epsilon = probabilities[known], np.finfo(np.float64).eps
    right = np.array([labels.index(label) for label in truth if label is not None])  # [N]
    predicted = p.argmax(axis=1) == right
    counts = np.bincount(right, minlength=len(labels))
    shares = counts / len(right)
    by_label = {labels[i]: float(predicted[right == i].mean()) for i in np.flatnonzero(counts)}
    results |= {
        "accuracy": float(predicted.mean()),
        "macro accuracy": float(np.mean(list(by_label.values()))),
        "random baseline": 1 / len(labels),
        "log loss": float(-np.log(p[np.arange(len(p)), right].clip(epsilon, 1 - epsilon)).mean()),
        "log loss of the shares": abs(float(np.log(shares[right]).mean()))}
    if len(labels) == 2 and counts.all():
        results["AUC"] = area_under_curve(p[:, 1], right == 1)
    return results | {f"accuracy on {label}": share for label, share in by_label.items()}
