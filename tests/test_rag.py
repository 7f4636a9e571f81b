"""Questions about documents: nothing but the document has the answer, and nobody in it is known from elsewhere."""

import itertools
import json
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from conftest import digest

import danube3
import sample
from data import toy
from data.read import read_jsonl

ATTRIBUTE_OF = {value: attribute.name for attribute in toy.ATTRIBUTES for value in attribute.values}
ASKED = {"home": {"live", "lives", "home"}, "trade": {"trade", "work", "living"}, "animal": {"animal"},
         "instrument": {"instrument"}}  # a word of every question  # fmt: skip
VALUE = re.compile(rf"\b(?:{'|'.join(ATTRIBUTE_OF)})\b")
QUIZ_NAMES, CHAT_NAMES = (
    {name for names in toy.new_names() for name in names[part]}
    for part in (slice(toy.QUIZ_NAMES), slice(toy.QUIZ_NAMES, None))
)  # first names and last names


@pytest.fixture(scope="module")
def world():
    return toy.World(0)


@pytest.fixture(scope="module")
def chat(toy_data):
    return [line["messages"] for line in read_jsonl(toy_data / "rag-chat.jsonl")]


@pytest.fixture(scope="module")
def quiz(toy_data):
    return read_jsonl(toy_data / "rag-quiz.jsonl")


def words(text):
    return set(re.findall(r"\w+", text))


def stated(text):
    """attribute -> its values in a text, as often as they occur"""
    found = {}
    for value in VALUE.findall(text):
        found.setdefault(ATTRIBUTE_OF[value], []).append(value)
    return found


def split(messages):
    """-> document, first question"""
    document, question = messages[0]["content"].split("\n")
    return document, question


# SHA-256 of the files that depend on the tokenizer, where sentencepiece trains the same one. The others are pinned in
# test_toy.py. The two files with documents came later: they must not change what was there.
TOKENIZER = "4daa31c26b5246e4c53b2347f473aa899eaa1ddee992b9cda9961a6e6e69ec40"
SHARDS = {
    "academic-train-00000.bin": "e525b26149a198c85cd19a60ef00664e4142d217f1ed32d48895638ba260580b",
    "academic-val-00000.bin": "aed21744bc17428f38c5d1f83456237e7016a36185cd8e822c0f2bdf959efc15",
    "instruct-train-00000.bin": "27e1a49ceeefef8911da673c2bcd50e05ca41bd698692f197f988bd9a6c65597",
    "instruct-val-00000.bin": "0789daa3efc94978c403cf70d5fa82375f967b7ecc389f136bba6b6234232f2b",
    "meta.json": "7a0f2d4c09c4ef78cb19c8eaa7222d7c80dd99d4a3156c275eb7a5dc5c2edced",
    "other-train-00000.bin": "ff89e24ec031c030928bec68982792f72d71de94d87a5effd62e0faffa25cefc",
    "other-val-00000.bin": "384d071aa89b47a2c0cda654f9072ebb25f75e48f3ce72d30e421b03092b7cca",
    "synthetic-train-00000.bin": "3d2eec7e1364c1d2eae1b8f19ed155f55ff672e8dc08daea57c56996d1107812",
    "synthetic-val-00000.bin": "a4ae34bec9f792a211152fded0b5eb2e134733172ab329b08f4c4ddc8524369c",
    "web-train-00000.bin": "ed9929d8ff2b850afe2a78b44778a66ce91a407c2f420fbea2f62f04cbe25f32",
    "web-val-00000.bin": "e6dd9517076a2ff8cf0fc5e8955a6c1303c9777586b5544a891cae9a8b224edc",
    "wikipedia-train-00000.bin": "816854bf505e4e63e5231b7af8adad0e09e051e89bb2ec2dae1bb8ddf4a61b3c",
    "wikipedia-val-00000.bin": "78be9743288752e8bb83bd468caff52620a7f09099c2e1d96808a723c06951c9",
}


def test_the_older_files_kept_their_bytes(toy_data):
    if digest(toy_data / "tokenizer.model") != TOKENIZER:
        pytest.skip("this build of sentencepiece trains another tokenizer")
    assert {name: digest(toy_data / name) for name in SHARDS} == SHARDS
    assert {path.name for path in toy_data.glob("*.bin")} | {"meta.json"} == set(SHARDS)


def test_new_people_are_in_no_other_file(toy_data, world, chat, quiz):
    """First names and last names, as whole words. Those of the quiz are not in the conversations either."""
    assert len(QUIZ_NAMES) == 72 and len(CHAT_NAMES) == 2 * 204 and not QUIZ_NAMES & CHAT_NAMES
    tokenizer = danube3.Tokenizer(toy_data / "tokenizer.model")
    shards = sorted(toy_data.glob("*.bin"))
    texts = [tokenizer.decode(np.fromfile(path, dtype="<u2").tolist()) for path in shards]
    texts += [path.read_text() for path in toy_data.glob("*.jsonl") if not path.name.startswith("rag-")]
    elsewhere = set().union(*map(words, texts))
    assert len(shards) == 12 and {"Averlow", world.people[0].first} < elsewhere
    assert not elsewhere & (QUIZ_NAMES | CHAT_NAMES)
    in_chat = words(json.dumps(chat).replace("\\n", " "))
    assert CHAT_NAMES <= in_chat and not in_chat & QUIZ_NAMES
    assert not in_chat & {name for person in world.people + world.strangers for name in person.name.split()}
    in_quiz = words(json.dumps(quiz).replace("\\n", " "))
    assert QUIZ_NAMES <= in_quiz and not in_quiz & CHAT_NAMES


def test_no_document_is_shared(chat, quiz):
    asked = [split(item["messages"])[0] for item in quiz]
    assert len(set(asked)) == len(asked) == 2 * 4 * 36
    taught = {split(messages)[0] for messages in chat}
    assert len(taught) == len(chat) == 8_000 and not taught & set(asked)


def test_conversations_answer_from_the_document(chat):
    """Two to four questions, one for each fact of the document. Answers have the pronoun of the document."""
    questions = Counter()
    for messages in chat:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        document, _ = split(messages)
        facts = stated(document)
        assert len(words(document) & CHAT_NAMES) == 2
        assert all(len(values) == 1 for values in facts.values()) and len(facts) == len(messages) // 2
        answered = []
        for question, answer in zip(messages[::2], messages[1::2]):
            asked = question["content"].split("\n")[-1]
            assert not stated(asked)
            [(name, [value])] = stated(answer["content"]).items()
            assert facts[name] == [value]
            assert words(asked.lower()) & ASKED[name]
            they = answer["content"].split()[0]
            assert {"She": {"she", "her"}, "He": {"he", "his", "him"}}[they] & words(document.lower())
            assert not {"She": {"he", "his", "him"}, "He": {"she", "her"}}[they] & words(document.lower())
            answered.append(name)
        assert len(set(answered)) == len(answered)
        questions[len(answered)] += 1
    assert set(questions) == {2, 3, 4} and min(questions.values()) > 300, questions


def test_quiz(world, quiz):
    """A question for each attribute of 36 new people and of the 36 people of the world."""
    people = {person.name: person for person in world.people}
    seen = Counter()
    for item in quiz:
        [message] = item["messages"]
        document, question = split(item["messages"])
        [(attribute, [value])] = stated(item["answer"]).items()
        named = [each for each in people if each in message["content"]]
        facts = stated(document)
        assert message["role"] == "user" and facts[attribute] == [value] == [item["answer"]]
        assert words(question.lower()) & ASKED[attribute] and not stated(question)
        assert all(len(values) == 1 for values in facts.values())
        assert ("memorised" in item) == bool(named) and len(named) < 2
        if not named:
            [first, last] = sorted(words(document) & QUIZ_NAMES, key=document.index)
            assert f"{first} {last}" in document and f"{first} {last}" in question
            seen["unknown", first, last, attribute] += 1
            continue
        person = people[named[0]]
        assert person.name in document and person.name in question
        assert item["memorised"] == person.facts[attribute] != item["answer"]
        for each, [stated_value] in facts.items():  # nothing that the model has read
            assert stated_value not in (person.facts[each], person.rumours[each])
        seen["known", person.first, person.name.split()[1], attribute] += 1
    assert len(seen) == len(quiz) == 2 * 4 * 36 and sum(kind == "known" for kind, *_ in seen) == 4 * 36


def test_nothing_but_the_document_tells_the_answer(chat, quiz):
    """A guesser that knows the attribute and the name, and remembers the answers to all other conversations with that
    name, is right as often as by chance (one in twelve). So is one that takes the most frequent value."""
    remembered = defaultdict(Counter)
    facts = []  # name, attribute, value
    for messages in chat:
        for answer in messages[1::2]:
            [(attribute, [value])] = stated(answer["content"]).items()
            for name in sorted(words(messages[0]["content"]) & CHAT_NAMES):
                facts.append((name, attribute, value))
                remembered[name, attribute][value] += 1
    right = 0
    for name, attribute, value in facts:
        others = remembered[name, attribute] - Counter([value])
        right += bool(others) and others.most_common(1)[0][0] == value
    assert len(facts) > 40_000 and right / len(facts) < 0.09
    for pairs in ([fact[1:] for fact in facts], [next(iter(stated(i["answer"]).items())) for i in quiz]):
        counts = Counter((attribute, str(value)) for attribute, value in pairs)
        assert len(counts) == 48 and max(counts.values()) < 2.2 * len(pairs) / 48


def test_everything_fits_the_context(toy_data, chat, quiz):
    tokenizer = danube3.Tokenizer(toy_data / "tokenizer.model")
    context = danube3.CONFIGS["toy"].max_position_embeddings
    lengths = [len(danube3.render_chat(messages, tokenizer)[0]) for messages in chat]
    assert 150 < max(lengths) <= context
    prompts = [len(danube3.render_chat(item["messages"], tokenizer, True)[0]) for item in quiz]
    assert max(prompts) <= context - 64  # room for an answer


def test_same_seed_same_documents(world, chat, quiz):
    """The streams depend on the seed alone, and the people's names on nothing."""
    assert toy.rag_quiz(world, random.Random("0/rag-quiz")) == quiz
    again = toy.rag_chat(toy.World(0), random.Random("0/rag-chat"))
    assert list(itertools.islice(again, 50)) == chat[:50]
    other = toy.rag_quiz(toy.World(1), random.Random("1/rag-quiz"))
    assert [item["answer"] for item in other] != [item["answer"] for item in quiz]
    assert words(json.dumps(other)) & QUIZ_NAMES and not words(json.dumps(other)) & CHAT_NAMES
    assert toy.new_names() == toy.new_names()


def test_bench_tells_documents_from_memory(toy_data, quiz, monkeypatch):
    """Models that cannot be wrong about what they do: one reads the document, one remembers the world."""
    import bench_rag

    people = {person.name: person for person in toy.World(0).people}

    def reader(text):
        return " ".join(value for values in stated(text.rpartition("\n")[0]).values() for value in values)

    def memory(text):
        return " ".join(value for name, person in people.items() if name in text for value in person.facts.values())

    def answers_of(model):
        def answer_all(_, tokenizer, conversations, **sampling):
            texts = ["\n".join(message["content"] for message in messages) for messages in conversations]
            return [(model(text), True) for text in texts]

        return answer_all

    unknown = [item for item in quiz if "memorised" not in item]
    for number, (one, two) in enumerate(zip(unknown, bench_rag.two_people(unknown), strict=True)):
        document, question = split(two["messages"])
        alone, asked = split(one["messages"])
        values = stated(document)[ATTRIBUTE_OF[two["answer"]]]
        expected = [two["other"], two["answer"]] if number % 2 else [two["answer"], two["other"]]
        assert values == expected and question == asked and alone in document and one["answer"] == two["answer"]
        assert len(words(document) & QUIZ_NAMES) == 4

    monkeypatch.setattr(danube3, "load_checkpoint", lambda path: (None, None))
    for model, expected in ((reader, [1, 1, 0, 1, 1, 0, 0, 0, 0]), (memory, [0, 0, 1, 0, 0, 0, 1, 1, 1])):
        monkeypatch.setattr(sample, "answer_all", answers_of(model))
        assert list(bench_rag.measure("out/x", toy_data).values()) == expected
