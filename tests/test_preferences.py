"""The preference set of bench_classify.py: does each row say what the toy world says, and is it learned?"""

import csv
import dataclasses
import re
from collections import Counter

import bench_classify
import pytest
from conftest import TINY, call, one_line_error

import danube3
from data import read, toy

PEOPLE = {person.name: person for person in toy.World(0).people}


def stated(sentence):
    """What an answer states. -> the person's name, the attribute's name, the value"""
    name = " ".join(sentence.split()[:2])
    found = []
    for attribute in toy.ATTRIBUTES:
        for value in attribute.values:
            if sentence == f"{name} {attribute.phrases[0].format(value=value)}.":
                found.append((name, attribute.name, value))
    assert len(found) == 1, sentence
    return found[0]


def stated_facts(row):
    """The two facts of a row, without order or values."""
    return frozenset(stated(row[column])[:2] for column in ("response_a", "response_b"))


@pytest.fixture(scope="module")
def tables():
    return bench_classify.preferences(0)


def test_labels_are_right(tables):
    """According to the world, from the text alone. A wrong answer is the rumour."""
    for row in (row for rows in tables.values() for row in rows):
        true = []
        for column in ("response_a", "response_b"):
            name, attribute, value = stated(row[column])
            assert value in (PEOPLE[name].facts[attribute], PEOPLE[name].rumours[attribute])
            true.append(value == PEOPLE[name].facts[attribute])
        winner = {(True, False): "first", (False, True): "second"}.get(tuple(true), "tie")
        assert row["winner"] == winner and list(row) == ["prompt", "response_a", "response_b", "winner"]


def test_prompts_ask_for_what_the_answers_state(tables):
    for row in (row for rows in tables.values() for row in rows):
        asked = re.fullmatch(r"(?:Do you know|Can you tell me) (.*) or (.*)\?", row["prompt"]).groups()
        for clause, column in zip(asked, ("response_a", "response_b")):
            name, attribute, _ = stated(row[column])
            (found,) = [each for each in toy.ATTRIBUTES if each.name == attribute]
            assert clause == found.clause.format(who=name)


def test_shares(tables):
    """The same number of each label; half of the ties have two true answers. No two rows have the same answers."""
    assert {name: len(rows) for name, rows in tables.items()} == {
        "preferences": 4_500, "preferences-quiz": 600, "preferences-others": 600}  # fmt: skip
    for rows in tables.values():
        assert set(Counter(row["winner"] for row in rows).values()) == {len(rows) // 3}
        assert len({(row["response_a"], row["response_b"]) for row in rows}) == len(rows)
        true = 0
        for row in rows:
            name, attribute, value = stated(row["response_a"])
            true += row["winner"] == "tie" and value == PEOPLE[name].facts[attribute]
        assert true == len(rows) // 6
        assert len({row["winner"] for row in rows[:30]}) == 3  # in no order


def test_training_and_quiz_are_disjoint(tables):
    """No two facts of the quiz are together in training, in neither order. The third table is about other people."""
    train, quiz, others = ({stated_facts(row) for row in rows} for rows in tables.values())
    assert not train & quiz
    assert all(len(facts) == 2 for facts in train | quiz | others)
    facts = [{fact for pair in pairs for fact in pair} for pairs in (train, quiz, others)]
    assert len(facts[0]) == 48 and facts[1] <= facts[0] and len(facts[2]) == 96
    people = [{name for name, _ in each} for each in facts]
    assert people[0] == people[1] and len(people[0]) == 12 and not people[0] & people[2]


def test_files_are_deterministic(tables, tmp_path):
    """As the program writes them; another seed draws other people."""
    for folder in ("one", "two"):
        result = call("tests/bench_classify.py", "--preferences", tmp_path / folder)
        assert result.returncode == 0, result.stderr
    assert call("tests/bench_classify.py", "--preferences", tmp_path / "other", "--seed", 1).returncode == 0
    for name, rows in tables.items():
        path = tmp_path / "one" / f"{name}.csv"
        assert [row for _, row in read.read_rows(path)] == rows
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()
    people = {frozenset(name for row in rows["preferences"] for name, _ in stated_facts(row))
              for rows in (tables, bench_classify.preferences(1))}  # fmt: skip
    assert len(people) == 2


def test_what_to_do_must_be_named(tmp_path):
    for flags in ([], ["texts.jsonl", "--preferences", tmp_path / "out"]):
        line = one_line_error(call("tests/bench_classify.py", *flags))
        assert "name labelled texts, or --preferences FOLDER" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_model_learns_preferences(tmp_path, monkeypatch):
    """Four people instead of twelve, and a small model without pre-training. No quiz row was in training."""
    rows = {"preferences": 600, "preferences-quiz": 120, "preferences-others": 60}
    for name, value in (("PEOPLE", 4), ("QUIZ_PAIRS", 20), ("ROWS", rows)):
        monkeypatch.setattr(bench_classify, name, value)
    bench_classify.write_preferences(tmp_path, 0)
    texts = [text for row in bench_classify.preferences(0)["preferences"] for text in row.values()]
    tokenizer = toy.train_tokenizer(texts, 400, tmp_path / "tokenizer.model")
    config = dataclasses.replace(TINY, hidden_size=64, intermediate_size=192, head_dim=16, initializer_range=0.04,
                                 vocab_size=400, max_position_embeddings=128)  # fmt: skip
    danube3.save_checkpoint(tmp_path / "base", danube3.Danube3.new(config, 0), tokenizer)
    result = call("train.py", "--chat", tmp_path / "preferences.csv", "--init", tmp_path / "base", "--epochs", 8,
                  "--template", "{response_a} or {response_b}", "--label-column", "winner", "--learning-rate", "3e-3",
                  "--out", tmp_path / "out")  # fmt: skip
    assert result.returncode == 0, result.stderr
    quiz, found = tmp_path / "preferences-quiz.csv", tmp_path / "probabilities.csv"
    result = call("sample.py", tmp_path / "out", "--classify", quiz, "--out", found)
    figures = dict(re.findall(r"^(\D+?) +([\d.]+)$", result.stdout, re.M))
    assert float(figures["log loss of the shares"]) == pytest.approx(1.0986, abs=1e-4)
    assert float(figures["log loss"]) <= 0.9 * float(figures["log loss of the shares"])
    with open(found, newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["id", "first", "second", "tie"] and len(lines) == 120
    for line in lines:
        assert sum(map(float, line[1:])) == pytest.approx(1, abs=1e-12)
