"""Labelled texts and people's files: tables, conversation formats, templates, truncation, probabilities."""

import csv
import dataclasses
import gzip
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from conftest import SENTENCES, TINY, call, conversations_in, one_line_error, random_model
from transformers import AutoModelForCausalLM

import danube3
import quantize
import sample
import train
from data import classify, prepare, read
from data.classify import Task

LABELS = ["cold", "hot", "neither of both"]
ROWS = [
    {"text": text, "label": label, "id": f"row-{i}"}
    for i, (text, label) in enumerate(zip(SENTENCES * 3, ["hot", "cold", "hot", "neither of both"] * 3))
]
LONG = dataclasses.replace(TINY, max_position_embeddings=128)


def write_table(path, rows):
    """Rows as the suffix of a path says."""
    suffix = read.table_suffix(path)
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    opened = gzip.open(path, "wt", newline="") if path.suffix == ".gz" else open(path, "w", newline="")
    with opened as file:
        if suffix == ".csv":
            columns = list(dict.fromkeys(column for row in rows for column in row))
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        elif suffix == ".json":
            json.dump(rows, file, indent=1)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base") / "base"
    danube3.save_checkpoint(folder, random_model(LONG), tokenizer)
    return folder


# ---------------------------------------------------------------------------------------------------------- tables
NAMES = ["t.jsonl", "t.jsonl.gz", "t.ndjson", "t.json", "T.JSON", "t.csv", "t.csv.gz", "t.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_table_holds_the_same_rows(name, tmp_path):
    path = write_table(tmp_path / name, ROWS)
    assert [row for _, row in read.read_rows(path)] == ROWS == read.read_jsonl(path)


def test_places_of_rows(tmp_path):
    """Line numbers are those of an editor; a row of csv may have several lines."""
    lines = (tmp_path / "t.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n') and read.read_rows(tmp_path / "t.jsonl")
    assert lines == [(f"{tmp_path}/t.jsonl, line 1", {"a": 1}), (f"{tmp_path}/t.jsonl, line 3", {"a": 2})]
    (tmp_path / "t.csv").write_text('a,b\n"x\ny",1\n,2\n')
    assert [row for _, row in read.read_rows(tmp_path / "t.csv")] == [{"a": "x\ny", "b": "1"}, {"b": "2"}]
    assert read.read_rows(tmp_path / "t.csv")[1][0].endswith("t.csv, line 4")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("t.csv", "", "t.csv is empty"),
        ("t.csv", "text,label\n", "t.csv is empty"),
        ("t.csv", "text,label\na,b,c\n", "t.csv, line 2, has more fields than the first line: quote"),
        ("t.csv", 'text,label\n"a', "t.csv is no UTF-8 csv file after line"),
        ("t.csv", b"text,label\n\xff,b\n", "t.csv is no UTF-8 csv file"),
        ("t.jsonl", "", "t.jsonl is empty"),
        ("t.jsonl", '{"a": 1}\n{"a"', "t.jsonl, line 2, is not JSON .*: write one object per line"),
        ("t.jsonl", b'{"a": 1}\n{"a": "\xff"}', "t.jsonl, line 2, is not UTF-8 text: convert"),
        ("t.jsonl", '{"a": 1}\n[2]', "t.jsonl, line 2, is not a JSON object"),
        ("t.json", '[{"a": 1}, 2]', "t.json, line 1, is not a JSON object"),
        ("t.jsonl.gz", "no gzip", "t.jsonl.gz is missing or damaged"),
        ("t.parquet", "no parquet", "t.parquet cannot be read"),
        ("t.xlsx", "", "t.xlsx is no table: use .jsonl, .ndjson, .json, .csv, .parquet"),
    ],
)
def test_tables_that_cannot_be_read(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(danube3.DanubeError, match=words):
        read.read_rows(path)
    with pytest.raises(danube3.DanubeError, match="nowhere.csv does not exist"):
        read.read_rows(tmp_path / "nowhere.csv")


def test_a_line_of_json_has_a_limit(tmp_path, monkeypatch):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a": "xxxxxxxxxxxx"}\n')
    monkeypatch.setattr(read, "LINE_BYTES", 12)
    with pytest.raises(danube3.DanubeError, match="t.jsonl, line 2, is longer than 12 bytes: split it"):
        read.read_rows(tmp_path / "t.jsonl")


# ---------------------------------------------------------------------------------------------------- conversations
TALK = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
FORMATS = [
    {"messages": TALK},
    {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]},
    {"instruction": "Where?", "output": "Here."},
    {"instruction": "Where?", "input": "", "output": "Here."},
    {"prompt": "Where?", "completion": "Here."},
]


@pytest.mark.parametrize("row", FORMATS)
def test_formats_of_conversations(row, tmp_path, tokenizer):
    path = write_table(tmp_path / "t.jsonl", [row, row])
    found = conversations_in(path)
    assert [{name: message[name] for name in ("role", "content")} for message in found[0]] == TALK
    (_, texts), *rest = prepare.documents_of(row, "text", 2**20)
    assert texts == [b"<|prompt|>Where?", b"<|answer|>Here."] and not rest
    assert danube3.render_chat(found[1], tokenizer) == danube3.render_chat(TALK, tokenizer)


def test_the_input_of_alpaca_follows_an_empty_line(tmp_path):
    row = {"instruction": "Where?", "input": "The barn.", "output": "Here."}
    assert conversations_in(write_table(tmp_path / "t.jsonl", [row]))[0][0]["content"] == "Where?\n\nThe barn."


BAD = [
    ({"messages": [*TALK, {"role": "tool", "content": "4"}]}, "message 3 has the role 'tool'"),
    ({"messages": [{"role": "user", "content": None}]}, "message 1 has no text as its content"),
    ({"messages": [{"role": "system", "content": "Hi."}, *TALK]}, "System role not supported"),
    ({"conversations": [{"from": "gpt", "value": "Here."}]}, "message 1 has the role 'assistant'"),
    ({"conversations": [{"from": "function_call", "value": "f"}]}, "message 1 has the role 'function_call'"),
    ({"conversations": ["x"]}, "its conversations cannot be read"),
    ({"conversations": [{"from": ["x"]}]}, "its conversations cannot be read"),
    ({"conversations": 5}, "its conversations cannot be read"),
    ({"instruction": "x"}, r"its instruction cannot be read \(KeyError\('output'\)\)"),
    ({"instruction": 5, "output": "x"}, "its instruction cannot be read"),
    ({"prompt": "x"}, "its prompt cannot be read"),
    ({"prompt": "x", "completion": 5}, "message 2 has no text as its content"),
    ({"question": "x"}, "it has the columns question, but no messages, conversations, instruction, prompt"),
]


@pytest.mark.parametrize("row, words", BAD)
def test_unusable_conversations_are_left_out(row, words, tmp_path):
    table = read.read_rows(write_table(tmp_path / "t.jsonl", [{"messages": TALK}, row, row, {"messages": TALK}]))
    found, note = read.read_conversations(table, False, False)
    assert found == [TALK, TALK]
    assert note.startswith(f"2 conversations were left out, the first: {tmp_path}/t.jsonl, line 2: ")
    with pytest.raises(danube3.DanubeError, match=words):
        read.read_conversations(table, False, True)
    with pytest.raises(danube3.DanubeError, match=f"line 2: .*{words}"):
        read.read_conversations(table[1:3], False, False)
    assert read.read_conversations(table[:1], False, False) == ([TALK], "")


def test_left_out_or_strict_from_the_command_line(base, tmp_path):
    rows = [{"messages": TALK}, *(row for row, _ in BAD), *FORMATS]
    flags = ("--chat", write_table(tmp_path / "t.jsonl", rows), "--init", base, "--dry-run")
    result = call("train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert f"t.jsonl: {len(BAD)} conversations were left out, the first: " in result.stdout
    assert "t.jsonl, line 2: message 3 has the role 'tool'" in result.stdout and "6 conversations for" in result.stdout
    assert "line 2: message 3 has the role 'tool'" in one_line_error(call("train.py", *flags, "--strict"))
    folded = call("train.py", *flags, "--system", "fold")
    assert f"{len(BAD) - 1} conversations were left out" in folded.stdout


# ------------------------------------------------------------------------------------------------------- the prompt
@pytest.mark.parametrize(
    "where, size, text",
    [("left", 3, "efg"), ("right", 3, "abc"), ("middle", 3, "abg"), ("middle", 4, "abfg"), ("middle", 0, ""),
     ("left", 0, ""), ("right", 0, ""), ("middle", 1, "a"), ("left", 7, "abcdefg"), ("right", 9, "abcdefg")],
)  # fmt: skip
def test_shortened_texts(where, size, text):
    assert classify.shorten("abcdefg", size, where) == text


def test_templates(tokenizer):
    task = Task("{{{a}}} or {b}\n{a}", context=100, labels=LABELS)
    assert task.columns == ["a", "b", "a"]
    row = {"a": "{b}", "b": 5}
    assert task.fill(row, 99) == "{{b}} or 5\n{b}" and task.fill({"a": "x"}, 99) == "{x} or \nx"
    prompts, truncated = task.prompts([("", row)], tokenizer)
    assert prompts == [[{"role": "user", "content": "{{b}} or 5\n{b}"}]] and truncated == 0


@pytest.mark.parametrize(
    "template, words",
    [("{a", "the template is wrong"), ("a}", "the template is wrong"), ("none", "names no {column}"),
     ("{a:>3}", "more than a name"), ("{a!r}", "more than a name"), ("{a} {}", "without a name")],
)  # fmt: skip
def test_templates_that_are_wrong(template, words):
    with pytest.raises(danube3.DanubeError, match=words):
        Task(template).check([("", {"a": "x"})])


@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_the_longest_column_is_cut_first(where, tokenizer):
    """The template's words and short columns stay. What is kept is as much as fits, with the longest label."""
    text = " ".join(SENTENCES)
    task = Task("A: {a}\nB: {b}\nWhich?", truncate=where, context=90, labels=LABELS)
    rows = [("", {"a": "Ada", "b": text}), ("", {"a": text, "b": text}), ("", {"a": "x", "b": "y"})]
    prompts, truncated = task.prompts(rows, tokenizer)
    assert truncated == 2
    for (_, row), [prompt] in zip(rows, prompts):
        sizes = []
        for label in LABELS:
            ids, _ = danube3.render_chat([prompt, {"role": "assistant", "content": label}], tokenizer)
            sizes.append(len(ids))
        content = prompt["content"]
        assert max(sizes) <= 90 and content.startswith("A: ") and content.endswith("\nWhich?") and "\nB: " in content
        if len(row["b"]) > 1:
            assert max(sizes) > 80
    (first,), (second,), (third,) = (prompt for prompt in prompts)
    assert first["content"].startswith("A: Ada\nB: ") and third["content"] == "A: x\nB: y\nWhich?"
    b = first["content"].removeprefix("A: Ada\nB: ").removesuffix("\nWhich?")
    size = len(b)
    assert b == classify.shorten(text, size, where) and 20 < size < len(text)
    a, b = second["content"].removeprefix("A: ").removesuffix("\nWhich?").split("\nB: ")
    assert a == b == classify.shorten(text, len(a), where)
    longer = task.fill(rows[0][1], size + 1)  # one character more would not fit
    ids, _ = danube3.render_chat([{"role": "user", "content": longer}], tokenizer)
    assert len(ids) + max(sizes) - len(danube3.render_chat([third], tokenizer)[0]) > 90


def test_a_template_longer_than_the_context(tokenizer):
    with pytest.raises(danube3.DanubeError, match="the template and a label do not fit 20 tokens: shorten them"):
        Task(SENTENCES[0] + "{a}", context=20, labels=LABELS).prompts([("", {"a": "x" * 99})], tokenizer)


@pytest.mark.parametrize(
    "value, text",
    [("a", "a"), (" a ", "a"), (3, "3"), (True, "True"), (0, "0"), (2.0, "2"), ("2.0", "2"), ("-1.00", "-1"),
     ("007", "007"), ("v1.", "v1."),
     (None, None), (math.nan, None), ("", None), ("v1.2", "v1.2"), ("1.2.3", "1.2.3"), ("nan", "nan")],
)  # fmt: skip
def test_labels_as_text(value, text):
    assert classify.label_text(value) == text


@pytest.mark.parametrize("value", [0.37, "0.37", "-.5", 1e-3, "1.5E-3", "5.", 1e-5])
def test_regression_is_refused(value, base, tmp_path):
    rows = [*ROWS, {"text": "x", "label": value}]
    line = one_line_error(call("train.py", "--chat", write_table(tmp_path / "t.csv", rows), "--init", base))
    assert "t.csv, line 26: the label" in line and "is a fraction, and regression is not done here" in line


# -------------------------------------------------------------------------------------------- from table to figures
@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Fine-tuned on labels that depend on the text. -> full, adapters, both from tables with other columns"""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"a": row["text"], "b": "x" * i, "kind": row["label"]} for i, row in enumerate(ROWS * 4)]
    table = write_table(folder / "train.csv", [*rows, {"a": "no label", "b": "x"}])
    flags = ("--chat", table, "--init", base, "--template", "{a} / {b}", "--label-column", "kind", "--epochs", 20)
    for name, more in (("full", ("--learning-rate", 3e-3)), ("lora", ("--learning-rate", 2e-2, "--lora", 8))):
        more = (*more, "--merge", folder / "merged") if name == "lora" else more
        result = call("train.py", *flags, *more, "--out", folder / name, "--truncate", "middle")
        assert result.returncode == 0, result.stderr
        assert "train.csv: 0 of 49 texts truncated, 1 without a label left out" in result.stdout
    return folder


@pytest.mark.parametrize("name", ["full", "lora", "merged", "int8"])
def test_probabilities_against_scikit_learn(name, trained, tmp_path):
    """Figures from the file of predictions; the task comes with the folder, through merging and quantization."""
    if name == "int8":
        bits = quantize.layout(LONG, 8)
        config = dataclasses.replace(LONG, hidden_size=64, intermediate_size=64, head_dim=32)
        bits = quantize.layout(config, 8)
        source = tmp_path / "even"
        model = random_model(config)
        model.task = danube3.load_checkpoint(trained / "full")[0].task
        danube3.save_checkpoint(source, model, danube3.load_checkpoint(trained / "full")[1])
        quantize.quantize_folder(source, tmp_path / "int8", bits, {})
        folder = tmp_path / "int8"
    else:
        folder = trained / name
    rows = [{"a": row["text"], "b": "y", "kind": row["label"]} for row in ROWS[:7]] + [{"a": "new", "b": "z"}]
    table, out, figures = write_table(tmp_path / "test.csv", rows), tmp_path / "p.csv", tmp_path / "figures.json"
    result = call("sample.py", folder, "--classify", table, "--out", out, "--json", figures)
    assert result.returncode == 0, result.stderr
    with open(out, newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["id", *LABELS] and [line[0] for line in lines] == [str(i) for i in range(8)]
    p = np.array([[float(value) for value in line[1:]] for line in lines])
    assert np.abs(p.sum(1) - 1).max() < 1e-12 and p.min() >= 0
    truth, p = [row["kind"] for row in rows[:7]], p[:7]
    found = json.loads(figures.read_text())
    predicted = [LABELS[i] for i in p.argmax(1)]
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, predicted), abs=1e-6)
    expected = sklearn.metrics.balanced_accuracy_score(truth, predicted)
    assert found["macro accuracy"] == pytest.approx(expected, abs=1e-6)
    loss = sklearn.metrics.log_loss(truth, p, labels=LABELS)
    assert found["log loss"] == pytest.approx(loss, abs=1e-6) and math.isfinite(loss)
    assert found["texts"] == 8 and found["with a label"] == 7 and found["truncated"] == 0
    if name in ("full", "lora"):
        assert found["accuracy"] == 1.0  # so the columns and the template were those of the training


def test_label_log_likelihoods_are_transformers(trained, tokenizer, tmp_path):
    """Of the same ids, to 1e-5, in truncated rows too."""
    theirs = AutoModelForCausalLM.from_pretrained(danube3.find_checkpoint(trained / "full"), dtype=torch.float32)
    model, tokenizer = danube3.load_checkpoint(trained / "full")
    task = classify.task_of(model)
    assert task.truncate == "middle" and list(task.labels) == LABELS and task.context == 128
    rows = [("", {"a": SENTENCES[0], "b": "y"}), ("", {"a": SENTENCES[1], "b": " ".join(SENTENCES)})]
    prompts, truncated = task.prompts(rows, tokenizer)
    assert truncated == 1
    scores = sample.choice_log_likelihoods(
        model, tokenizer, [{"messages": prompt, "choices": LABELS} for prompt in prompts]
    )
    for prompt, row in zip(prompts, scores):
        for label, score in zip(LABELS, row):
            ids, labels = danube3.render_chat([*prompt, {"role": "assistant", "content": label}], tokenizer)
            with torch.no_grad():
                log_p = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = sum(log_p[t - 1, ids[t]].item() for t in range(len(ids)) if labels[t] >= 0)
            assert score == pytest.approx(total, abs=1e-5)


def test_eval_and_classify_agree(trained, tmp_path):
    """Also without --out, and with the same rows in another kind of file."""
    rows = [{"a": row["text"], "b": "y", "kind": row["label"]} for row in ROWS]
    outputs = {
        call("sample.py", trained / "full", flag, write_table(tmp_path / name, rows)).stdout
        for flag in ("--eval", "--classify")
        for name in ("t.csv", "t.jsonl.gz", "t.parquet")
    }
    assert len(outputs) == 1 and "log loss" in outputs.pop()


def test_one_class_or_none(trained, tmp_path):
    one = [{"a": row["text"], "b": "", "kind": "hot"} for row in ROWS if row["label"] == "hot"]
    result = call("sample.py", trained / "full", "--classify", write_table(tmp_path / "one.jsonl", one))
    assert "random baseline               0.3333" in result.stdout and "log loss" in result.stdout
    none = [{"a": row["text"]} for row in ROWS]  # the template's other column is missing: no row has it
    line = one_line_error(call("sample.py", trained / "full", "--classify", write_table(tmp_path / "n.jsonl", none)))
    assert "no row has the column 'b', or all have it empty: there are a" in line
    none[0]["b"] = "z"
    out = tmp_path / "p.csv"
    result = call("sample.py", trained / "full", "--classify", write_table(tmp_path / "n.jsonl", none), "--out", out)
    assert "with a label                       0" in result.stdout and "accuracy" not in result.stdout
    assert len(out.read_text().splitlines()) == 13


def test_labels_and_columns_by_hand(base, tmp_path):
    """A model without a task: labels and columns from the command line, ids from the table."""
    table = write_table(tmp_path / "t.csv", [{"t": row["text"], "id": row["id"]} for row in ROWS])
    flags = ("--classify", table, "--text-column", "t", "--out", tmp_path / "p.csv")
    assert "labels are needed, and here are 0" in one_line_error(call("sample.py", base, *flags))
    assert call("sample.py", base, *flags, "--labels", "b,1", "a").returncode == 0
    with open(tmp_path / "p.csv", newline="") as file:
        header, first, *_ = csv.reader(file)
    assert header == ["id", "b,1", "a"] and first[0] == "row-0"
    (tmp_path / "template.txt").write_text("Is it warm?\n{t}\n")
    other = call("sample.py", base, "--classify", table, "--template", tmp_path / "template.txt", "--labels", "b", "a")
    assert other.returncode == 0, other.stderr
    changes = classify.changes(
        SimpleNamespace(
            template=str(tmp_path / "template.txt"), text_column=None, label_column=None, truncate=None, labels=None
        )
    )
    assert changes == {"template": "Is it warm?\n{t}"}


@pytest.mark.parametrize(
    "program, flags, words",
    [
        ("sample", ["--classify", "{t}", "--text-column", "x"], "t.jsonl, line 1: no row has the column 'x', or all"),
        ("sample", ["--classify", "{t}", "--text-column", "x"], "have it empty: there are id, label, text"),
        ("sample", ["--classify", "{t}", "--template", "{text} {x}"], "no row has the column 'x'"),
        ("sample", ["--classify", "{t}", "--labels", "hot", "cold"], "label 'neither of both' is none of hot, cold"),
        ("sample", ["--classify", "{t}", "--out", "{tmp}/none/p.csv"], "is a folder, or lies in none that exists"),
        ("sample", ["--classify", "{t}", "--out", "{tmp}"], "is a folder, or lies in none that exists"),
        ("sample", ["--classify", "{t}", "--labels", "hot"], "--labels needs two names or more, each once"),
        ("train", ["--chat", "{t}", "--labels", "hot", "hot"], "--labels needs two names or more, each once"),
        ("train", ["--chat", "{one}"], "there is one label only, ['hot']: name all with --labels"),
        ("sample", ["--classify", "{t}", "--chat"], "cannot go together"),
        ("sample", ["--out", "p.csv", "x"], "are for --classify"),
        ("sample", ["--labels", "a", "b", "--eval", "{t}"], "are for --classify"),
        ("sample", ["--classify", "{t}", "--template", "{text}", "--text-column", "x"], "leave out --text-column"),
        ("train", ["--chat", "{t}", "--text-column", "x"], "no row has the column 'x'"),
        ("train", ["--chat", "{t}", "--label-column", "x"], "no row has the column 'x'"),
        ("train", ["--chat", "{t}", "--labels", "hot", "cold"], "label 'neither of both' is none of hot, cold"),
        ("train", ["--chat", "{e}"], "e.jsonl is empty"),
        ("train", ["--chat", "{t}", "--sequence-length", "129"], "129: the context of"),
    ],
)
def test_bad_flags_and_columns(program, flags, words, base, tmp_path):
    (tmp_path / "e.jsonl").write_text("\n")
    names = {"t": write_table(tmp_path / "t.jsonl", ROWS), "e": tmp_path / "e.jsonl", "tmp": tmp_path}
    names["one"] = write_table(tmp_path / "one.csv", [row for row in ROWS if row["label"] == "hot"])
    flags = [flag if "{text}" in flag else flag.format(**names) for flag in flags]
    model = [base] if program == "sample" else ["--init", base, "--out", tmp_path / "out"]
    assert words in one_line_error(call(f"{program}.py", *model, *flags))
    assert not (tmp_path / "out").exists()


def test_what_is_labelled(base, tmp_path):
    """A row without a label, or without a text, does not decide; a label beside a conversation does not count."""
    rows = [{"text": "x"}, {"text": "y", "label": "0.0"}, {"label": "1.0"}, {"text": "z", "label": "1.0"}]
    table = write_table(tmp_path / "t.csv", rows)
    flags = ("--init", base, "--dry-run", "--chat", table)
    result = call("train.py", *flags)
    assert "t.csv: 0 of 4 texts truncated, 1 without a label left out" in result.stdout, result.stderr
    out = tmp_path / "p.csv"
    result = call("sample.py", base, "--classify", table, "--labels", "0.0", "1", "--out", out)
    assert "with a label                       3" in result.stdout, result.stderr
    assert len(out.read_text().splitlines()) == 5 and not list(tmp_path.glob("*.partial"))
    assert call("sample.py", base, "--classify", table).returncode == 0  # the labels of the table
    for extra in ({"completion": "a"}, {"output": "a"}, {"choices": ["a", "b"]}, {"conversations": []}):
        assert not classify.is_labelled([("", {"text": "x", "label": "y", **extra})], Task())
    talks = write_table(tmp_path / "talks.jsonl", [{"messages": TALK}] * 3)
    result = call("train.py", *flags, talks, "--truncate", "left")
    assert "6 conversations for" in result.stdout, result.stderr


def test_a_damaged_task(base, tmp_path):
    model, tokenizer = danube3.load_checkpoint(base)
    model.task = {"surprise": 1}
    danube3.save_checkpoint(tmp_path / "model", model, tokenizer)
    line = one_line_error(call("sample.py", tmp_path / "model", "--classify", write_table(tmp_path / "t.csv", ROWS)))
    assert "task.json is damaged" in line


def test_labels_in_other_letters(base, tmp_path):
    out, labels = tmp_path / "p.csv", ["\u00e9t\u00e9", "\u51ac"]
    flags = ("--classify", write_table(tmp_path / "t.csv", ROWS[:2]), "--labels", *labels, "--out", out)
    assert call("sample.py", base, *flags, "--label-column", "id2").returncode == 0
    assert out.read_text(encoding="utf-8").splitlines()[0] == f"id,{labels[0]},{labels[1]}"
    found = classify.label_metrics(["a", "b"], np.array([[0.5, 0.5]]), ["a"])
    assert "AUC" not in found and found["log loss of the shares"] == 0 and str(found["log loss of the shares"]) == "0.0"


@pytest.mark.parametrize("bits, memory, fits", [(8, 16, True), (16, 16, True), (16, 1, False)])
def test_the_plan_of_adapters(bits, memory, fits, base, tmp_path):
    """The issue's own command: weights as they are stored, adapters; a plan that does not fit is printed too."""
    config = dataclasses.replace(LONG, hidden_size=64, intermediate_size=64, head_dim=32)
    if not fits:
        config = dataclasses.replace(config, max_position_embeddings=2**22)
    folder, model = tmp_path / "model", random_model(config)
    danube3.save_checkpoint(folder, model, danube3.load_checkpoint(base)[1], torch.bfloat16)
    if bits == 8:
        quantize.quantize_folder(folder, tmp_path / "int8", quantize.layout(config, 8), {})
        folder = tmp_path / "int8"
    text = "Ada lives in Marrow. " * (20_000 if not fits else 1)
    chat = write_table(tmp_path / "t.jsonl", [{"prompt": text, "completion": "Yes."}] * 3)
    flags = ("--chat", chat, "--init", folder, "--lora", 8, "--dry-run", "--gpu-memory", memory)
    result = call("train.py", *flags, "--activation-checkpointing", "off")
    stored = sum(weight.nbytes for name, weight in danube3.read_weights(folder).items())
    adapters = sum(8 * (linear.in_features + linear.out_features) for linear in danube3.decoder_linears(model).values())
    assert f"{stored / 1e9:26,.2f}  frozen weights" in result.stdout, result.stderr
    assert f"{adapters:,} weights of adapters of rank 8, twice, and two moments" in result.stdout
    steps = re.search(r"run +(\d+) steps, ([\d,]+) tokens, (\S+) FLOPs", result.stdout)
    tokens = int(steps[2].replace(",", ""))
    flops = danube3.flops_per_token(config, tokens // int(steps[1]) // 2, frozen=True) * tokens
    assert float(steps[3]) == pytest.approx(flops, rel=0.01)
    if fits:
        assert result.returncode == 0
    else:
        assert "can be used: take" in one_line_error(result)


def test_resume_with_another_template(base, tmp_path):
    flags = ("--chat", write_table(tmp_path / "t.jsonl", ROWS), "--init", base, "--out", tmp_path / "out")
    assert call("train.py", *flags).returncode == 0
    assert call("train.py", *flags, "--resume").returncode == 0
    line = one_line_error(call("train.py", *flags, "--resume", "--template", "x {text}"))
    assert "was made with another" in line


def test_conversations_and_labels_in_one_run(base, tmp_path):
    """Each file by what it holds. --sequence-length truncates texts, and cuts conversations."""
    talks = write_table(tmp_path / "talks.jsonl", [{"messages": TALK, "label": 5}] * 9)
    texts = write_table(tmp_path / "texts.jsonl", ROWS)
    flags = ("--init", base, "--out", tmp_path / "out", "--sequence-length", 60)
    result = call("train.py", "--chat", talks, texts, *flags)
    assert "texts.jsonl: 12 of 12 texts truncated" in result.stdout
    assert "21 conversations for 60 tokens" in result.stdout
    model = danube3.load_checkpoint(tmp_path / "out")[0]
    assert model.task["context"] == 60 and model.task["labels"] == LABELS


# ----------------------------------------------------------------------------------------------------------- figures
@pytest.mark.parametrize("labels", [2, 3])
def test_metrics_against_scikit_learn(labels):
    """Ties, certain and impossible labels, rows without a label; for two labels the area under the curve."""
    random = np.random.default_rng(0)
    names = [f"label {i}" for i in range(labels)]
    for _ in range(20):
        n = int(random.integers(5, 60))
        p = classify.softmax(random.integers(-3, 4, (n, labels)) * float(random.choice([0.3, 1.0, 300.0])))
        right = random.integers(0, labels, n)
        right[:labels] = range(labels)
        truth = [names[i] for i in right]
        found = classify.label_metrics(names, np.vstack([p, p[:2]]), [*truth, None, None])
        assert found["log loss"] == pytest.approx(sklearn.metrics.log_loss(truth, p, labels=names), abs=1e-6)
        predicted = [names[i] for i in p.argmax(1)]
        assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, predicted))
        assert found["macro accuracy"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(truth, predicted))
        shares = np.bincount(right) / n
        assert found["log loss of the shares"] == pytest.approx(-(shares * np.log(shares)).sum())
        for i, name in enumerate(names):
            assert found[f"accuracy on {name}"] == pytest.approx((p.argmax(1)[right == i] == i).mean())
        assert found["texts"] == n + 2 and found["with a label"] == n
        if labels == 2:
            assert found["AUC"] == pytest.approx(sklearn.metrics.roc_auc_score(right, p[:, 1]), abs=1e-9)
        else:
            assert "AUC" not in found


def test_softmax_of_very_unlikely_labels():
    torch.testing.assert_close(
        torch.from_numpy(classify.softmax([[-1e4, -1e4 - 1], [3.0, 3.0]])),
        torch.tensor([[-1e4, -1e4 - 1], [3.0, 3.0]], dtype=torch.float64).softmax(-1),
    )


# ---------------------------------------------------------------------------------------- published names, moved bases
class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub's protocol that downloads use, with one model."""

    folder, asked = None, None

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        type(self).asked.append(self.path)
        commit, path = "a" * 40, self.path.split("?")[0]
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        files |= {"README.md": b"x", "pytorch_model.bin": b"x"}
        body, headers = b"", {"X-Repo-Commit": commit}
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/api/models/h2oai/tiny/tree/"):
            tree = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
            body = json.dumps(tree).encode()
        elif path.startswith("/api/models/h2oai/tiny"):
            body = json.dumps({"id": "h2oai/tiny", "sha": commit, "siblings": []}).encode()
        elif path.startswith("/h2oai/tiny/resolve/") and name in files:
            body, headers["ETag"] = files[name], f'"{name}"'
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for header, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(base, tmp_path, monkeypatch):
    """A server in place of the Hub, an empty cache, and a folder to be in. -> what was asked for, the server"""
    import huggingface_hub.constants as constants

    Hub.folder, Hub.asked = base, []
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub.asked, server
    server.shutdown()
    server.server_close()


def test_published_names(hub, base, tokenizer, tmp_path, monkeypatch):
    """Downloaded once, only the files that are needed; then from the cache, without the server."""
    asked, server = hub
    monkeypatch.chdir(tmp_path)
    model, _ = danube3.load_checkpoint("h2oai/tiny")
    expected = danube3.load_checkpoint(base)[0].state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    files = {path.split("/")[-1] for path in asked if "/resolve/" in path}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model",
                     "tokenizer_config.json"}  # fmt: skip
    server.shutdown()
    server.server_close()
    cached = danube3.find_checkpoint("h2oai/tiny")
    assert cached.is_relative_to(tmp_path / "cache") and (cached / "config.json").is_file()
    with pytest.raises(danube3.DanubeError, match="^h2oai/other: no folder, no download"):
        danube3.load_checkpoint("h2oai/other")

    adapters = danube3.add_lora(danube3.load_checkpoint("h2oai/tiny")[0], 2, 0)
    weights = {name: tensor for name, tensor in adapters.state_dict().items() if ".lora_" in name}
    with danube3.atomic_folder(tmp_path / "adapters") as partial:
        danube3.write_adapters(partial, adapters, weights, base, danube3.weights_sha256(base))
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "h2oai/tiny"
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapters" / "SHA256SUMS").unlink()
    ids = torch.randint(3, 330, (1, 9))
    assert torch.equal(danube3.load_checkpoint(tmp_path / "adapters")[0](ids), model(ids))


def test_a_folder_is_no_published_name(hub, base, tmp_path, monkeypatch):
    """A mistyped name inside a folder that exists is never asked for, nor one with more or fewer parts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("out/tiny", "tiny", "h2oai/tiny/more"):
        with pytest.raises(danube3.DanubeError, match=f"^{name} does not exist, or is no checkpoint"):
            danube3.find_checkpoint(name)
    assert hub[0] == []
    (tmp_path / "h2oai").symlink_to(base.parent)
    assert danube3.find_checkpoint(f"h2oai/{base.name}") == danube3.Path("h2oai", base.name) and hub[0] == []


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(danube3.DanubeError, match="no download .needs huggingface_hub.: "):
        danube3.find_checkpoint("h2oai/tiny")


def test_a_base_that_moved(base, tmp_path):
    """--base says where it is. The checksum of its weights still counts."""
    moved, other = tmp_path / "old", tmp_path / "new"
    danube3.save_checkpoint(moved, *danube3.load_checkpoint(base))
    chat = write_table(tmp_path / "t.jsonl", ROWS)
    flags = ("--chat", chat, "--init", moved, "--lora", 2, "--out", tmp_path / "run")
    assert call("train.py", *flags).returncode == 0
    before = call("sample.py", tmp_path / "run", "--classify", chat).stdout
    moved.rename(other)
    line = one_line_error(call("sample.py", tmp_path / "run", "--classify", chat))
    assert "adapters to a base elsewhere (give --base): " in line and "old does not exist" in line
    after = call("sample.py", tmp_path / "run", "--classify", chat, "--base", other)
    assert after.stdout == before and "log loss" in before, after.stderr
    wrong = tmp_path / "wrong"
    danube3.save_checkpoint(wrong, random_model(LONG, seed=7), danube3.load_checkpoint(base)[1])
    line = one_line_error(call("sample.py", tmp_path / "run", "--classify", chat, "--base", wrong))
    assert "adapters to other weights" in line
    line = one_line_error(call("sample.py", base, "--classify", chat, "--base", other))
    assert "--base is for adapters" in line
    again = ("--chat", chat, "--init", tmp_path / "run", "--out", tmp_path / "more", "--dry-run")
    assert "give --base" in one_line_error(call("train.py", *again))
    assert call("train.py", *again, "--base", other).returncode == 0
    flags = ("--chat", chat, "--init", other, "--lora", 2, "--out", tmp_path / "run", "--resume")
    result = call("train.py", *flags, "--merge", tmp_path / "merged")
    assert result.returncode == 0, result.stderr
    assert danube3.load_checkpoint(tmp_path / "merged")[0].task["labels"] == LABELS


def test_names_of_runs():
    """out/NAME-chat, by the folder of the first weights or the published name."""
    for init, name in (("h2oai/tiny", "tiny"), ("out/toy", "toy"), ("out/toy/step-0000007", "toy"), ("a", "a")):
        args = SimpleNamespace(chat=["x"], init=init, out=None, config=None)
        assert train.output_directory(args, danube3.Path("/cache/snapshots/abc")) == danube3.Path(f"out/{name}-chat")
