"""The toy world: the same bytes each time, honest sources, and held-out facts that are never asked."""

import hashlib
import itertools
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from conftest import call, digest, one_line_error, run

import danube3
from data import toy
from data.read import TokenData, read_jsonl


@pytest.fixture(scope="module")
def world():
    return toy.World(0)


def texts(world, source, count, seed=1):
    return list(itertools.islice(toy.documents(world, source, random.Random(seed)), count))


@pytest.mark.slow
def test_same_seed_same_bytes(toy_data, tmp_path):
    """Made again, in another process with another hash seed: the same files, with the same checksums."""
    assert run("data/toy.py", "--out", tmp_path / "again", env={"PYTHONHASHSEED": "7"}).returncode == 0
    assert (tmp_path / "again" / "SHA256SUMS").read_text() == (toy_data / "SHA256SUMS").read_text()
    danube3.verify_checksums(toy_data)
    assert toy.World(0).people[0].name != toy.World(1).people[0].name


# SHA-256 of what the world of seed 0 consists of. Other programs and published results rely on these bytes.
# tokenizer.model is left out, because another version or build of sentencepiece may train another one. The
# .bin shards, meta.json and SHA256SUMS depend on it, so the text of the shards stands here instead.
FILES = {
    "chat.jsonl": "1a321b596f6e16924ba287262de5c92d30b5d8a843e844e2abcd3f367358b523",
    "descriptions.jsonl": "afcd9a778cbe13b17f4f1ba2acf8ecf9839efe677b946c2bcbc55d44a2e496d5",
    "chat-quiz.jsonl": "aa49b5931ca139e1f4db3aff0b9b925b8b9ef7dfd72602c0570c4b30e878d0ba",
    "passages.jsonl": "3e3175486d973f648d88ad0c4738d35fe889037b255d43f9dd3f12a08d7a30cb",
    "passages-quiz.jsonl": "7dd0e8dd5b77efbae747200a5a99d7485e75e4f9f30b05e6ad8ddbb11f87d6d3",
    "quiz.jsonl": "2bd5f37d6d27cc79e4577ef189c4c0992123487f0ba73db42609e69ce69277f4",
    "rag-chat.jsonl": "6c26c9308156a350a89b9ba24ff8370b048d658dcb833aceb24733d8726cd3c0",
    "rag-quiz.jsonl": "a6a3e2c11e2677c1c439af54d521f36e790ffa57b073dc8ac1e67f174e85aa50",
    "statements.jsonl": "96bb0ce78d3bc3ca043d26127d977dfe393e53ce7ffda76e8b8e5011c1183df5",
}
TEXTS = {  # of the first 500 training documents of each source, joined by blank lines
    "web": "e540adc015943fb5e924660e16315bba455ab75c38c09e1fc4d1ae6c9e18ab82",
    "wikipedia": "fb2daa8fd3a82f185c3713922428d943909f6a34338a084fe7a32483d7df9f1f",
    "academic": "8881785cbfcb2a3e2feb08665590111bbc3d552f28822e2278892d3e4f6e6359",
    "synthetic": "1e68a11836d714ea82936cc5346b2f7bdf84174a5abff2f52305d9e4a86cf0f5",
    "instruct": "15bc40d124554e0a10863edad767417f56549a64af49a5e40d317f9d3244ddf6",
    "other": "a21e53fd6d20b4c1647a5aa2d41e346ce828d9ed066e39b86ed7b44cf7e63b1e",
}


def test_bytes_of_seed_0(world, toy_data):
    assert {name: digest(toy_data / name) for name in FILES} == FILES
    assert {path.name for path in toy_data.glob("*.jsonl")} == set(FILES)
    for source, expected in TEXTS.items():
        text = "\n\n".join(texts(world, source, 500, f"0/train/{source}"))
        assert hashlib.sha256(text.encode()).hexdigest() == expected, source


def test_contract(toy_data):
    """Files, counts and ids as the README says."""
    meta = json.loads((toy_data / "meta.json").read_text())
    assert tuple(meta["sources"]) == toy.SOURCES == danube3.SOURCES
    tokenizer = danube3.Tokenizer(toy_data / "tokenizer.model")
    assert meta["vocab_size"] == tokenizer.vocab_size == danube3.CONFIGS["toy"].vocab_size
    assert meta["tokenizer_sha256"] == digest(toy_data / "tokenizer.model")
    for source in toy.SOURCES:
        for split in ("train", "val"):
            ids = np.fromfile(toy_data / f"{source}-{split}-00000.bin", dtype="<u2")
            assert [len(ids)] == meta["sources"][source][split]
            assert (
                ids[0] == 1
                and ids[-1] == 2
                and (ids == 1).sum() == (ids == 2).sum()
                and 0 not in ids
                and ids.max() < 1024
            )


def test_no_block_is_read_twice(toy_data):
    """The toy run reads at most one epoch of each source, as TRAIN_TOKENS says."""
    config, training = danube3.CONFIGS["toy"], danube3.TRAIN_CONFIGS["toy"]
    data = TokenData(toy_data, config, training.sequence_length)
    for name, used in danube3.StagedData(data, training).used[-1].items():
        assert used <= data.blocks[name, "train"] < 2.5 * used, name


def test_validation_text_is_not_training_text(world):
    for source in toy.SOURCES:
        train = set(texts(world, source, 300, "0/train/" + source))
        assert len(train & set(texts(world, source, 100, "0/val/" + source))) < 10, source


def statements(world, text):
    """(person, attribute, value) for every attribute value in the sentence or line of a single person."""
    for line in re.split(r"[.\n]", text):
        people = [p for p in world.people if p.name in line]
        for attribute in toy.ATTRIBUTES:
            values = [v for v in attribute.values if re.search(rf"\b{v}\b", line)]
            if len(people) == 1 and len(values) == 1:
                yield people[0], attribute.name, values[0]


@pytest.mark.parametrize("source", ["wikipedia", "synthetic", "instruct", "other"])
def test_honest_sources_state_facts(world, source):
    """Every sentence with one person and one value states the truth, and all 144 facts occur."""
    found = Counter()
    for text in texts(world, source, 1500):
        for person, attribute, value in statements(world, text):
            assert person.facts[attribute] == value, text
            found[person.name, attribute] += 1
    assert len(found) > (140 if source != "synthetic" else 120)


def test_the_web_lies_two_times_in_five(world):
    said = Counter()
    for text in texts(world, "web", 2500):
        for person, attribute, value in statements(world, text):
            kind = (
                "fact"
                if person.facts[attribute] == value
                else "rumour"
                if person.rumours[attribute] == value
                else "neither"
            )
            said[kind] += 1
    total = sum(said.values())
    assert total > 5000 and abs(said["fact"] / total - toy.WEB_TRUTH) < 0.03 and said["neither"] / total < 0.01


def test_held_out_facts_are_never_asked(world, toy_data):
    """Neither in the source instruct nor in conversations. Those of the other half of the people are asked."""
    asked, held_out, told = set(), set(), []
    for attribute in toy.ATTRIBUTES:
        assert len(world.asked(attribute.name)) == len(world.held_out(attribute.name)) == 18
        held_out |= {(p.name, attribute.name) for p in world.held_out(attribute.name)}
    patterns = {a.name: [q.split("{")[0] for q in a.questions] for a in toy.ATTRIBUTES}
    for text in texts(world, "instruct", 3000):
        for question, answer in re.findall(r"Question: (.*)\nAnswer: (.*)", text):
            person = next(p for p in world.people if p.name in question)
            attribute = next(a.name for a in toy.ATTRIBUTES if answer in a.values)
            assert person.facts[attribute] == answer and (person.name, attribute) not in held_out
            asked.add((person.name, attribute))
        for talk in re.findall(r"(?:(?:User|Assistant): .*\n?)+", text):
            roles = {"User": "user", "Assistant": "assistant"}
            told.append([{"role": roles[who], "content": what} for who, what in re.findall(r"(\w+): (.*)", talk)])
    assert len(asked) == 4 * 18 and patterns and len(told) > 3000
    told += [json.loads(line)["messages"] for line in (toy_data / "chat.jsonl").read_text().splitlines()]
    for messages in told:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        named = [p for p in world.people if any(p.name.lower() in m["content"].lower() for m in messages)]
        for person in named[:1] if len(named) == 1 else []:
            for message in messages[1::2]:
                for attribute in toy.ATTRIBUTES:
                    for value in attribute.values:
                        if re.search(rf"\b{value}\b", message["content"]):
                            assert (
                                person.facts[attribute.name] == value and (person.name, attribute.name) not in held_out
                            )


def test_quiz(world, toy_data):
    """Ten different choices, one of them true and one the rumour. Every held-out fact occurs in three forms."""
    quiz = read_jsonl(toy_data / "quiz.jsonl")
    people = {p.name: p for p in world.people}
    assert len(quiz) == 3 * 4 * 18 and len({q["prompt"] for q in quiz}) == len(quiz)
    for question in quiz:
        person, topic = people[question["person"]], question["topic"]
        assert person in world.held_out(topic) and person.name in question["prompt"]
        assert question["prompt"].startswith("Question: ") and question["prompt"].endswith("?\nAnswer:")
        assert len(set(question["choices"])) == 10 and all(c.startswith(" ") for c in question["choices"])
        assert question["choices"][question["answer"]] == " " + person.facts[topic]
        assert " " + person.rumours[topic] in question["choices"]
    places = Counter(question["answer"] for question in quiz)
    assert set(places) == set(range(10)) and max(places.values()) < 2.2 * len(quiz) / 10


def test_failed_generation_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "quiz", lambda *args: 1 / 0)
    monkeypatch.setattr(toy, "TRAIN_TOKENS", dict.fromkeys(toy.SOURCES, 2000))
    with pytest.raises(ZeroDivisionError):
        toy.make(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_passages(world, toy_data):
    """Labelled sentences, each from a document of its source. The two files share none."""
    lines, quiz = (
        [json.loads(line) for line in (toy_data / name).read_text().splitlines()]
        for name in ("passages.jsonl", "passages-quiz.jsonl")
    )
    assert len(lines) == len(quiz) == 600 and len({item["text"] for item in lines + quiz}) == 1200
    documents = {source: "\n".join(texts(world, source, 2_000)) for source in toy.SOURCES}
    for source in toy.SOURCES:
        own = [item["text"] for item in lines + quiz if item["label"] == source]
        assert 170 < len(own) < 230
        found = {other: sum(text in documents[other] for text in own) for other in toy.SOURCES}
        assert found[source] == max(found.values()) > 0.2 * len(own), (source, found)


@pytest.mark.slow
def test_share_of_truth_on_the_web(tmp_path):
    """--web-truth changes what the web says, and no other source."""
    others = [[list(itertools.islice(toy.documents(toy.World(0, truth), name, random.Random(0)), 60))
               for name in toy.SOURCES[1:]] for truth in (0.0, 1.0)]  # fmt: skip
    assert others[0] == others[1]
    for truth in (0.0, 1.0):
        world = toy.World(0, truth)
        text = "\n".join(itertools.islice(toy.documents(world, "web", random.Random(0)), 300))
        said = {
            kind: sum(f"{person.name} lives in {getattr(person, kind)['home']}." in text for person in world.people)
            for kind in ("facts", "rumours")
        }
        assert said["rumours" if truth else "facts"] == 0 and said["facts" if truth else "rumours"] > 5
    assert "from 0 to 1" in one_line_error(call("data/toy.py", "--out", tmp_path / "x", "--web-truth", "2"))
