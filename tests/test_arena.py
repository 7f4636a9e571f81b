"""Votes: ratings against scikit-learn and plain loops, coverage of the intervals, and a person at a terminal."""

import builtins
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pty
import random
import re
import select
import signal
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, TINY, call, one_line_error, random_model

import danube3
import sample
from data import arena
from data.read import read_jsonl

POINTS = 400 / math.log(10)


def vote(prompt, a, b, winner):
    return {"prompt": str(prompt), "a": a, "b": b, "winner": winner}


def tournament(strengths, count, seed, ties=False):
    """Votes on a prompt each, by the Bradley-Terry model. With ties a vote is two such draws: one each is a tie."""
    rng, votes = random.Random(seed), []
    for number in range(count):
        a, b = rng.sample(sorted(strengths), 2)
        chance = 1 / (1 + 10 ** ((strengths[b] - strengths[a]) / 400))
        draws = [rng.random() < chance for _ in range(1 + ties)]
        votes.append(vote(number, a, b, "a" if all(draws) else "tie" if any(draws) else "b"))
    return votes


def ratings_of(votes):
    return {name: rating for name, _, rating, _, _ in arena.rate(votes, 40)}


# ---- Ratings


def test_ratings_by_hand():
    """Three wins in four votes are odds of 3 to 1. Two ties are a win each. The mean is 1000, the best comes first."""
    votes = [vote(n, "x", "y", "a") for n in range(2)] + [vote(2, "y", "x", "b"), vote(3, "y", "x", "a")]
    rows = arena.rate(votes)
    assert [row[:2] for row in rows] == [("x", 4), ("y", 4)]
    assert rows[0][2] == pytest.approx(1000 + 200 * math.log10(3)) and rows[0][2] + rows[1][2] == pytest.approx(2000)
    tied = ratings_of([*votes[:1], vote(2, "y", "x", "tie"), vote(3, "x", "y", "tie"), vote(4, "x", "y", "a")])
    assert tied["x"] == pytest.approx(rows[0][2])
    assert ratings_of([vote(1, "x", "y", "tie")]) == pytest.approx({"x": 1000, "y": 1000})
    third = {row[0]: row for row in arena.rate([*votes, vote(1, "z", "y", "tie")])}
    assert third["y"][1] == 5 and third["z"][1] == 1 and third["z"][2] == pytest.approx(third["y"][2])


@pytest.mark.parametrize("seed", range(6))
def test_ratings_are_those_of_a_logistic_regression(seed):
    """scikit-learn's, without a penalty: a vote is +1 for a, -1 for b, a tie a row of half weight for each."""
    from sklearn.linear_model import LogisticRegression

    rng = random.Random(seed)
    names = "abcdefg"[: 3 + seed % 5]
    strengths = {name: rng.gauss(1000, 250) for name in names}
    votes = tournament(strengths, 60 * len(names), seed, ties=seed % 2)
    votes += tournament({name: strengths[name] for name in names[:2]}, 150, seed + 100)  # one pair voted on more
    rows, won, weights = [], [], []
    for each in votes:
        row = [(name == each["a"]) - (name == each["b"]) for name in names]
        for outcome, weight in ((1, arena.WINS[each["winner"]][0]), (0, arena.WINS[each["winner"]][1])):
            rows.append(row), won.append(outcome), weights.append(weight)
    regression = LogisticRegression(C=math.inf, fit_intercept=False, tol=1e-10, max_iter=100_000)
    regression.fit(rows, won, sample_weight=weights)
    expected = regression.coef_[0] - regression.coef_[0].mean()
    ratings = ratings_of(votes)
    assert [ratings[name] for name in names] == pytest.approx(1000 + POINTS * expected, abs=1e-3)


def newton(wins, steps=50):
    """Full steps, as in a textbook. -> strengths, or None where the matrix cannot be inverted"""
    s, games = np.zeros(len(wins)), wins + wins.T
    for _ in range(steps):
        p = 1 / (1 + np.exp(s - s[:, None]))
        weights = games * p * (1 - p)
        try:
            s = s + np.linalg.solve(np.diag(weights.sum(1)) - weights + 1, (wins - games * p).sum(1))
        except np.linalg.LinAlgError:
            return None
    return s


@pytest.mark.parametrize(
    "wins, overshoots",
    [
        ([[0, 1, 3787, 0], [5, 0, 0, 0], [0, 0, 0, 1], [0, 18656, 4468, 0]], True),
        ([[0, 0, 13, 1380, 0], [618, 0, 0, 0, 9], [0, 0, 0, 0, 1885], [1, 910, 0, 0, 17], [0, 2546, 401, 5, 0]], False),
        ([[0, 0, 61, 2589], [72, 0, 0, 65], [0, 9, 0, 2], [0, 1, 109, 0]], False),
    ],
)
def test_newton_arrives(wins, overshoots):
    """At the maximum each model has as many wins as the model expects. Full steps go astray in the first case."""
    wins = np.array(wins, float)
    with np.errstate(over="ignore", invalid="ignore"):
        naive = newton(wins)
    assert (naive is None) == overshoots
    ratings = arena.fit(wins[None])[0]
    expected = (wins + wins.T) / (1 + 10 ** ((ratings - ratings[:, None]) / 400))
    assert expected.sum(1) == pytest.approx(wins.sum(1), rel=1e-9) and ratings.mean() == pytest.approx(0, abs=1e-6)
    assert overshoots or ratings == pytest.approx(naive * POINTS, abs=1e-6)


def test_a_difference_of_thousands_of_points():
    """920 points, seven times in a row."""
    wins = np.zeros((1, 8, 8))
    wins[0, range(7), range(1, 8)], wins[0, range(1, 8), range(7)] = 200, 1
    assert np.diff(arena.fit(wins)[0]) == pytest.approx(-400 * math.log10(200), abs=1e-6)


def wins_of(text):
    """"ab cb" -> wins of a over b and of c over b. [1, P, P]"""
    names = sorted(set(text) - {" "})
    wins = np.zeros((1, len(names), len(names)))
    for winner, loser in text.split():
        wins[0, names.index(winner), names.index(loser)] += 1
    return wins


UP, DOWN = math.inf, -math.inf


@pytest.mark.parametrize(
    "text, expected",
    [
        ("ab", [UP, DOWN]),
        ("ba", [DOWN, UP]),
        ("ab ba", [0, 0]),
        ("ab bc ca da db dc", [0, 0, 0, UP]),
        ("ab bc ca ad", [0, 0, 0, DOWN]),
        ("ab ba cd", [0, 0, UP, DOWN]),  # c and d have not met the others
        ("ea ab bc cd da", [0, 0, 0, 0, UP]),
        ("ab bc cd dc", [UP, UP, 0, 0]),  # a beat b and b the group: both are above it
        ("cd dc cb ba", [DOWN, DOWN, 0, 0]),
        ("ab bc cd da ae ef fe fg", [0, 0, 0, 0, DOWN, DOWN, DOWN]),  # e and f are a group too, a smaller one
        ("ab bc cd da ea fa ef fe", [0, 0, 0, 0, UP, UP]),
        ("ab bc cd de ea", [0] * 5),  # the longest chain
    ],
)
def test_who_has_a_finite_rating(text, expected):
    """The largest group in which everybody is above everybody, through however many wins."""
    assert arena.fit(wins_of(text))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_sets_of_votes_do_not_touch_each_other():
    texts = ["ab bc ca", "ab bc ca ab", "ab bc ac", "ab ba cb"]
    together = arena.fit(np.concatenate([wins_of(text) for text in texts]))
    for text, ratings in zip(texts, together, strict=True):
        assert ratings.tolist() == pytest.approx(arena.fit(wins_of(text))[0].tolist(), abs=1e-9)


# ---- Intervals


def slow_fit(votes, names):
    """Bradley-Terry by plain loops (Zermelo's iteration). -> ratings around 0; the models that have one"""
    wins = Counter()
    for each in votes:
        wins[each["a"], each["b"]] += arena.WINS[each["winner"]][0]
        wins[each["b"], each["a"]] += arena.WINS[each["winner"]][1]
    above = {name: {name} for name in names}
    for _ in names:
        for x, y in itertools.product(names, names):
            if wins[x, y]:
                above[x] |= above[y]
    groups = [[y for y in names if y in above[x] and x in above[y]] for x in names]
    group = max(groups, key=len)
    below = {x: sum(x in above[y] for y in names) for x in names}
    ratings = {x: math.inf if len(above[x]) > below[x] else -math.inf for x in names}
    if len(group) == 1:
        return ratings, []
    powers = dict.fromkeys(group, 1.0)
    before = {}
    while any(abs(math.log(powers[x] / before.get(x, 0.5))) > 1e-9 for x in group):
        before = dict(powers)
        for x in group:
            others = [y for y in group if y != x]
            games = sum((wins[x, y] + wins[y, x]) / (powers[x] + powers[y]) for y in others)
            powers[x] = sum(wins[x, y] for y in others) / games
    logs = {x: math.log(powers[x]) for x in group}
    mean = sum(logs.values()) / len(logs)
    return {**ratings, **{x: POINTS * (logs[x] - mean) for x in group}}, group


def slow_rate(votes, resamples):
    """What arena.rate promises, by plain loops. -> name: rating, ends of the interval"""
    names = sorted({each[side] for each in votes for side in "ab"})
    prompts = list(dict.fromkeys(each["prompt"] for each in votes))
    ratings, _ = slow_fit(votes, names)
    chances = np.full(len(prompts), 1 / len(prompts))
    samples = {name: [] for name in names}
    for draws in np.random.default_rng(0).multinomial(len(prompts), chances, resamples):
        times = dict(zip(prompts, draws, strict=True))
        drawn = [each for each in votes for _ in range(times[each["prompt"]])]
        again, group = slow_fit(drawn, names)
        group = [name for name in group if math.isfinite(ratings[name])]
        mean = sum(ratings[name] for name in group) / max(1, len(group))
        for name in names:
            samples[name].append(again[name] + mean)
    tail = resamples // 40
    ends = {name: sorted(values)[tail :: resamples - 1 - 2 * tail] for name, values in samples.items()}
    return {name: (1000 + ratings[name], 1000 + ends[name][0], 1000 + ends[name][1]) for name in names}


@pytest.mark.parametrize("count, prompts, seed", [(60, 60, 0), (24, 24, 2), (14, 14, 1), (60, 20, 3)])
def test_intervals_against_plain_loops(count, prompts, seed):
    """Few votes too: in some resamples a model has lost everything, or nobody has a finite rating."""
    votes = tournament({"x": 1200, "y": 1000, "z": 900, "w": 1000}, count, seed, ties=seed % 2)
    for number, each in enumerate(votes):
        each["prompt"] = str(number % prompts)
    rows = {name: row for name, _, *row in arena.rate(votes, 80)}
    expected = slow_rate(votes, 80)
    assert set(rows) == set(expected)
    for name, row in rows.items():
        assert row == pytest.approx(expected[name], abs=1e-3), (name, row, expected[name])
    table = np.array(list(expected.values()))
    assert np.isinf(table).any() == (count < 60) and np.isfinite(table[:, 0]).any()


def test_an_end_can_be_infinite():
    """One loss in thirty: a resample in three has none, so nothing limits the rating from above. Such resamples do
    not move the others, who are equal to each other."""
    votes = [vote(n, "best", "xy"[n % 2], "a") for n in range(29)] + [vote(29, "best", "y", "b")]
    votes += [vote(n, "x", "y", "ab"[n // 2 % 2]) for n in range(30, 90)]
    rows = {name: row for name, *row in arena.rate(votes)}
    games, rating, low, high = rows["best"]
    assert games == 30 and math.isfinite(rating) and math.isfinite(low) and low < rating and high == math.inf
    for name in "xy":
        assert rows[name][3] - rows[name][2] < 600, rows
    unbeaten = {name: row for name, *row in arena.rate(votes[:29] + votes[30:])}
    assert unbeaten["best"][1:] == [math.inf] * 3
    assert unbeaten["x"][1] + unbeaten["y"][1] == pytest.approx(2000) and unbeaten["x"][3] < 1200


def test_votes_on_one_prompt_stay_together():
    """Each vote nine times: on the same prompts the intervals stay what they were, on prompts of their own they
    shrink to a third."""
    votes = tournament({"x": 1100, "y": 1000, "z": 900}, 150, 0)
    rows = arena.rate(votes)
    same = arena.rate(votes * 9)
    apart = arena.rate([{**each, "prompt": f"{n} {each['prompt']}"} for n in range(9) for each in votes])
    for row, other, narrow in zip(rows, same, apart, strict=True):
        assert row[0] == other[0] == narrow[0] and other[1] == narrow[1] == 9 * row[1]
        assert [*row[2:]] == pytest.approx([*other[2:]], abs=1e-6) and narrow[2] == pytest.approx(row[2], abs=1e-6)
        assert 2.4 < (row[4] - row[3]) / (narrow[4] - narrow[3]) < 3.6


def test_the_same_votes_give_the_same_table():
    votes = tournament({"x": 1100, "y": 1000}, 30, 0)
    assert arena.rate(votes) == arena.rate(votes)


@pytest.mark.slow
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spread", [(1000, 1000, 1000, 1000), (850, 950, 1050, 1150), (600, 900, 1100, 1400)])
def test_coverage_of_the_intervals(spread, ties):
    """200 tournaments of four players with known ratings and 300 votes each: how often the interval holds them."""
    strengths, covered = dict(zip("wxyz", spread, strict=True)), []
    for seed in range(200):
        for name, _, rating, low, high in arena.rate(tournament(strengths, 300, seed, ties)):
            assert math.isfinite(rating)
            covered.append(low <= strengths[name] <= high)
    print(f"coverage {np.mean(covered):.3f}")
    assert len(covered) == 800 and 0.90 <= np.mean(covered) <= 0.98


# ---- Votes


def one_letter_model(tokenizer, piece):
    """A model that answers with one piece for ever, however it is sampled; </s>: with nothing."""
    model = random_model(dataclasses.replace(TINY, num_hidden_layers=1))
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0 if name == "model.embed_tokens.weight" or weight.dim() == 1 else 0.0)
    model.lm_head.weight.data[tokenizer.sp.piece_to_id(piece)] = 1.0
    return model


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Three models on disk, by name: what each says."""
    folder, pieces = tmp_path_factory.mktemp("models"), {"alpha": "a", "omega": "o", "silent": "</s>"}
    for name, piece in pieces.items():
        danube3.save_checkpoint(folder / name, one_letter_model(tokenizer, piece), tokenizer)
    return {name: str(folder / name) for name in pieces}



def write_jsonl(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


class Person:
    """Types into the program as at a keyboard, and reads its screen."""

    def __init__(self, *flags):
        command = [sys.executable, "data/arena.py", *map(str, flags)]
        self.screen, self.seen = "", 0
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, command, {**os.environ, "COLUMNS": "200"})

    def read_until(self, text, seconds=120):
        """Wait for a text after what was read so far. -> everything up to it"""
        end = time.monotonic() + seconds
        while text not in self.screen[self.seen :]:
            assert time.monotonic() < end, self.screen
            if select.select([self.terminal], [], [], 0.2)[0]:
                try:
                    self.screen += os.read(self.terminal, 4096).decode().replace("\r\n", "\n")
                except OSError:  # the program has ended
                    assert text in self.screen[self.seen :], self.screen
        start, self.seen = self.seen, self.screen.index(text, self.seen) + len(text)
        return self.screen[start : self.seen]

    def type(self, line):
        os.write(self.terminal, line.encode())

    def ask(self, prompt):
        """-> the two answers, as shown"""
        self.read_until("ends):\n")
        self.type(f"{prompt}\n")
        page = self.read_until("1, 2 or tie?")
        return re.search(r"--- 1\n(.*?)\n\n--- 2\n(.*?)\n\nWhich", page, re.S).groups()

    def vote(self, *keys):
        for key in keys:
            self.read_until("ends):\n")
            self.type(f"{key}\n")

    def exit_code(self, seconds=60):
        end, done = time.monotonic() + seconds, (0, 0)
        while not done[0] and time.monotonic() < end:
            with contextlib.suppress(OSError):
                if select.select([self.terminal], [], [], 0.1)[0]:
                    self.screen += os.read(self.terminal, 4096).decode().replace("\r\n", "\n")
            done = os.waitpid(self.pid, os.WNOHANG)
        assert done[0] == self.pid
        self.pid = None
        return os.waitstatus_to_exitcode(done[1])

    def kill(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = None


@pytest.mark.slow
def test_a_person_at_a_terminal(folders, tmp_path):
    """Prompts, answers without names in an order that changes, votes, a kill, /quit and Ctrl-D."""
    path, names = tmp_path / "votes.jsonl", ("alpha", "silent")
    flags = [*(folders[name] for name in names), "--votes", path]
    person = Person(*flags)
    try:
        orders, expected = set(), []
        while len(orders) < 2 or len(expected) < 4:  # both orders come, at the latest after some forty
            assert len(expected) < 40
            texts = person.ask(f"Hello {len(expected)}")
            shown = ["silent" if text == "(an empty answer)" else "alpha" for text in texts]
            assert sorted(shown) == sorted(names) and set(texts[shown.index("alpha")]) == {"a"}
            orders.add(shown[0])
            key = ("1", "2", "tie")[len(expected) % 3]
            person.vote("3", "", "hello", key)  # the first three are no votes
            expected.append((folders[shown[0]], folders[shown[1]], {"1": "a", "2": "b"}.get(key, key)))
        person.ask("This one gets no vote")  # all votes before it are in the file by now
        assert [(each["a"], each["b"], each["winner"]) for each in read_jsonl(path)] == expected
        person.kill()
        assert not any(name in person.screen for name in names), person.screen
        votes = read_jsonl(path)
        assert [(each["a"], each["b"], each["winner"]) for each in votes] == expected
        assert votes[1]["prompt"] == "Hello 1" and sorted(votes[1]["answers"])[0] == ""

        person = Person(*flags)
        person.ask("One more")
        person.vote("1")
        person.read_until("ends):\n")
        person.type("/quit\n")
        assert person.exit_code() == 0
        assert read_jsonl(path)[:-1] == votes and len(read_jsonl(path)) == len(votes) + 1
        rows = re.findall(r"^(\S+) +(\d+) votes +(.*)$", person.screen, re.M)
        assert sorted(row[0] for row in rows) == sorted(flags[:2])
        assert {row[1] for row in rows} == {str(len(votes) + 1)} and "95 % interval" in rows[0][2]

        person = Person(*flags)
        person.ask("No vote")
        person.read_until("ends):\n")
        person.type("\x04")
        assert person.exit_code() == 0 and len(re.findall("^/.* votes ", person.screen, re.M)) == 2
        assert len(read_jsonl(path)) == len(votes) + 1
    finally:
        person.kill()


def say(monkeypatch, *lines):
    """Type these lines; then the input ends."""
    lines = iter(lines)

    def read(question):
        with contextlib.suppress(StopIteration):
            return next(lines)
        raise EOFError

    monkeypatch.setattr(builtins, "input", read)


def test_pairs_and_orders_are_balanced(folders, monkeypatch, tmp_path, capsys):
    """The pair with the fewest votes comes next, those of earlier sessions counted. The order is random."""
    models = {name: danube3.load_checkpoint(folders[name]) for name in ("silent", "alpha", "omega")}
    votes = [vote(0, "omega", "alpha", "a")] * 5 + [vote(0, "alpha", "silent", "tie")] * 2
    say(monkeypatch, *[line for n in range(23) for line in (f"Hello {n}", "1")])
    with pytest.raises(EOFError):
        arena.play(models, itertools.repeat({}), votes, False, tmp_path / "votes.jsonl")
    pairs = [frozenset((each["a"], each["b"])) for each in votes]
    assert set(pairs[7:9]) == {frozenset(("omega", "silent"))}  # until it has two votes as well
    assert Counter(pairs) == dict.fromkeys(pairs, 10)
    assert all(len(set(pairs[15 + 3 * n :][:3])) == 3 for n in range(5))  # in turn
    assert len({tuple(pairs[15 + 3 * n :][:3]) for n in range(5)}) > 1  # in changing turns
    new = votes[7:]
    first = sum(each["a"] == min(each["a"], each["b"]) for each in new)
    assert 1 <= first <= 22 and {each["winner"] for each in new} == {"a"}
    for each in new:
        for side, text in zip("ab", each["answers"], strict=True):
            assert text == "" if each[side] == "silent" else set(text) == {each[side][0]}
    page = capsys.readouterr().out
    assert page.count("(an empty answer)") == sum("silent" in (each["a"], each["b"]) for each in new)
    shown = re.findall(r"\nHello \d+\n\n--- 1\n(.*)\n\n--- 2\n(.*)\n\nWhich", page)
    assert [tuple(text or "(an empty answer)" for text in each["answers"]) for each in new] == shown
    assert len(read_jsonl(tmp_path / "votes.jsonl")) == 23


def test_a_vote_is_on_disk_before_the_next_prompt(folders, monkeypatch, tmp_path):
    """Its line is whole when the file is synced. It says what is needed to get both answers again."""
    models = {"x": danube3.load_checkpoint(folders["alpha"]), "y": danube3.load_checkpoint(folders["omega"])}
    model = random_model(TINY)
    models["x"] = (model, models["x"][1])
    path, synced = tmp_path / "votes.jsonl", []
    monkeypatch.setattr(danube3, "sync", lambda path: synced.append(path.read_text()))
    say(monkeypatch, "Ada", "3", "the first", "tie", "Ada", "2")
    with pytest.raises(EOFError):
        arena.play(models, itertools.repeat({}), [], False, path)
    votes = read_jsonl(path)
    assert synced == [json.dumps(votes[0]) + "\n", path.read_text()] and votes[1]["winner"] == "b"
    assert votes[0]["seed"] != votes[1]["seed"] and set(votes[0]["answers"]) != set(votes[1]["answers"])
    assert (votes[0]["temperature"], votes[0]["top_p"]) == (0.7, 0.9)
    for each in votes:
        for name, text in zip((each["a"], each["b"]), each["answers"], strict=True):
            sampling = {key: each[key] for key in ("temperature", "top_p", "seed")}
            session = sample.ChatSession(*models[name], 200, **sampling)
            ids, _ = session.ask("Ada")
            assert "".join(session.answer(ids)).strip() == text


def test_prompts_from_a_file(folders, monkeypatch, tmp_path):
    """Prompts and conversations. A person sees all of a conversation. After the last question, the ratings."""
    talk = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Ho"), ("user", "Who?"))]
    questions = write_jsonl(tmp_path / "questions.jsonl", [{"prompt": "First"}, {"messages": talk}])
    say(monkeypatch, "1", "tie", "never read")
    flags = (folders["alpha"], folders["omega"], "--questions", questions, "--votes", tmp_path / "votes.jsonl")
    result = call("data/arena.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "\nFirst\n\n--- 1\n" in result.stdout and "\nHi\nHo\nWho?\n\n--- 1\n" in result.stdout
    votes = read_jsonl(tmp_path / "votes.jsonl")
    assert [each["prompt"] for each in votes] == ["First", "Hi\nHo\nWho?"]
    assert result.stdout.count("2 votes   ") == 2


def test_an_answer_of_empty_lines_is_empty(folders, tokenizer, monkeypatch, tmp_path, capsys):
    models = {"x": danube3.load_checkpoint(folders["alpha"]), "y": (one_letter_model(tokenizer, "<0x0A>"), tokenizer)}
    say(monkeypatch, "Hello", "1")
    with pytest.raises(EOFError):
        arena.play(models, itertools.repeat({}), [], False, tmp_path / "votes.jsonl")
    assert "" in read_jsonl(tmp_path / "votes.jsonl")[0]["answers"] and "(an empty answer)" in capsys.readouterr().out


def test_nothing_is_rated_before_the_first_vote(folders, monkeypatch, tmp_path):
    say(monkeypatch, "/quit")
    path = tmp_path / "votes.jsonl"
    result = call("data/arena.py", folders["alpha"], folders["omega"], "--votes", path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    path.write_text("")
    assert call("data/arena.py", folders["alpha"], folders["omega"], "--votes", path).returncode == 0


def test_judge_exact(folders, tmp_path):
    """All questions for all pairs, without sampling: the answer with the known one as a word wins; both or neither is
    a tie. A second command adds to the file."""
    session = sample.ChatSession(*danube3.load_checkpoint(folders["alpha"]), 200)
    alphas = "".join(session.answer(session.ask("Hi")[0])).strip()
    items = [{"prompt": "Hi", "answer": alphas}, {"prompt": "Ho", "answer": "a"}]  # the second is no whole word
    items += [{"messages": [{"role": "user", "content": "Hi"}], "answer": alphas}]
    questions = write_jsonl(tmp_path / "questions.jsonl", items)
    path = tmp_path / "votes.jsonl"
    flags = (*folders.values(), "--votes", path, "--questions", questions, "--judge", "exact")
    result = call("data/arena.py", *flags)
    assert result.returncode == 0, result.stderr
    votes = read_jsonl(path)
    assert len(votes) == 9 and not any("seed" in each for each in votes)
    for each in votes:
        sides = [side for side in "ab" if each[side] == folders["alpha"]]
        assert each["winner"] == ("tie" if each["prompt"] == "Ho" or not sides else sides[0])
        assert [text == alphas for text in each["answers"]] == [each[side] == folders["alpha"] for side in "ab"]
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == [folders["alpha"], "6", "votes"] and len(lines) == 3
    assert call("data/arena.py", *flags).returncode == 0 and len(read_jsonl(path)) == 18


def test_a_model_without_losses_is_shown_as_such(folders, monkeypatch, tmp_path):
    path = write_jsonl(tmp_path / "votes.jsonl", [vote(n, "x", "y", "a") for n in range(1_200)])
    say(monkeypatch)
    result = call("data/arena.py", folders["alpha"], folders["omega"], "--votes", path)
    assert [line.split(maxsplit=3) for line in result.stdout.splitlines()] == [
        ["x", "1,200", "votes", "too few losses to rate"],
        ["y", "1,200", "votes", "too few wins to rate"],
    ]
    write_jsonl(path, [vote(n, "x", "y", "ab"[n % 2]) for n in range(10)])
    result = call("data/arena.py", folders["alpha"], folders["omega"], "--votes", path)
    assert re.fullmatch(r"x +10 votes   1,000   95 % interval 8\d\d to 1,1\d\d", result.stdout.splitlines()[0])


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "x", "a": "A", "b": "B", "winner": "a"}\n{"prompt": "x", "a', "votes.jsonl, line 2, is not JSON"),
        ('{"prompt": "x", "a": "A", "b": "B", "winner": "a"}', "end the last line of "),
        ('{"prompt": "x", "a": "A", "b": "B", "winner": "A"}\n', "votes.jsonl is missing or damaged ('A')"),
        ('{"prompt": "x", "a": "A", "b": "B"}\n', "votes.jsonl is missing or damaged ('winner')"),
        ('{"messages": []}\n', "votes.jsonl is missing or damaged"),
    ],
)
def test_damaged_files_of_votes_are_left_alone(text, message, folders, tmp_path):
    """Half a line, as a full disk leaves it; a file of something else."""
    path = tmp_path / "votes.jsonl"
    path.write_text(text)
    assert message in one_line_error(call("data/arena.py", *folders.values(), "--votes", path))
    assert path.read_text() == text


def test_refusals(folders, tmp_path, monkeypatch):
    path, alpha, omega = tmp_path / "votes.jsonl", folders["alpha"], folders["omega"]
    for models in ([alpha], [alpha, alpha]):
        assert "one model alone" in one_line_error(call("data/arena.py", *models, "--votes", path))
    assert "--votes" in one_line_error(call("data/arena.py", alpha, omega))
    flags = (alpha, omega, "--votes", path)
    assert 'lacks an "answer"' in one_line_error(call("data/arena.py", *flags, "--judge", "exact"))
    for answer in (3, " "):
        questions = write_jsonl(tmp_path / "questions.jsonl", [{"prompt": "x", "answer": answer}])
        command = ("data/arena.py", *flags, "--judge", "exact", "--questions", questions)
        assert 'lacks an "answer"' in one_line_error(call(*command))
    write_jsonl(questions, [{"messages": [{"role": "assistant", "content": "x"}]}])
    assert "has the role 'assistant'" in one_line_error(call("data/arena.py", *flags, "--questions", questions))
    assert "nowhere" in one_line_error(call("data/arena.py", *flags, "--questions", tmp_path / "nowhere.jsonl"))
    assert "nowhere" in one_line_error(call("data/arena.py", alpha, tmp_path / "nowhere", "--votes", path))
    say(monkeypatch, "Hello", "1")
    assert "nowhere" in one_line_error(call("data/arena.py", alpha, omega, "--votes", tmp_path / "nowhere/votes.jsonl"))
    assert not path.exists()
    say(monkeypatch, "word " * 100, "1")
    assert "does not fit" in one_line_error(call("data/arena.py", *flags))
