"""Which model answers better? `python data/arena.py A B [C ...] --votes votes.jsonl` asks you.

The report rates its chat models by blind votes of people [paper]. The formulas are the usual ones [ours].
**Bradley-Terry model**: each model has a strength s, and P(i beats j) = 1 / (1 + exp(s_j - s_i)). Strengths
are those that make all votes most probable (**maximum likelihood**). A tie is half a win for each. A rating
is 1000 + s 400 / ln 10 (**Elo scale**), with a mean of 1000: 100 points more win 64 % of the votes. **95 %
interval**: what if the prompts had been others? They are drawn with replacement, each with all of its votes,
and rated again, 1,000 times (**bootstrap**). The interval holds 95 % of these ratings.
"""
import itertools
import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that this program finds danube3
import danube3  # noqa: E402
import sample  # noqa: E402
from data import cli, read  # noqa: E402

KEYS = {"1": "a", "2": "b", "tie": "tie"}             # the winner, by what a person types
WINS = {"a": (1, 0), "b": (0, 1), "tie": (0.5, 0.5)}  # of a and of b, by the winner

def fit(wins: np.ndarray) -> np.ndarray:
    """Ratings with a mean of 0, for S sets of votes at once. wins [S, P, P], of row over column -> [S, P]

    If a model only wins, a higher rating always fits better. So rated is the largest group in which chains of
    wins lead from each to each other (Ford 1957). The rest: inf if above more models than below, else -inf.
    Trap: Newton's method can overshoot. Steps that move two models apart by at most 1 always lead uphill."""
    identity, s, sets = np.eye(wins.shape[-1]), np.zeros(wins.shape[:2]), np.arange(len(wins))
    chain = np.linalg.matrix_power((wins + identity > 0) * 1.0, len(identity)) > 0  # [S, P, P]
    mutual = chain & chain.swapaxes(1, 2)  # [S, P, P]: in the same group
    inside = wins * mutual
    games = inside + inside.swapaxes(1, 2)
    for _ in range(50):  # enough for 8,000 points
        p = 1 / (1 + np.exp(s[:, None] - s[:, :, None]))  # [S, P, P]: row beats column
        weights = games * p * (1 - p)  # the variance of the wins
        hessian = identity * weights.sum(-1)[:, None] - weights + mutual  # + mutual: a group keeps its mean
        step = np.linalg.solve(hessian, (inside - games * p).sum(-1)[..., None])[..., 0]  # wins - expected
        s += step / np.maximum(1, np.ptp(step, axis=-1, keepdims=True))
    largest = mutual.sum(-1).argmax(-1)  # [S]: a model of the largest group
    outside = np.where(chain.sum(-1) > chain.sum(-2), np.inf, -np.inf)
    return np.where(mutual[sets, largest] & games.any(-1), s * 400 / np.log(10), outside)

def rate(votes: list[dict], resamples: int = 1_000) -> list[tuple]:
    """Name, votes, rating and ends of the interval of each model, the best first. An end may be infinite."""
    names, numbers = sorted({vote[side] for vote in votes for side in "ab"}), dict[str, int]()
    wins = np.zeros((len(votes), len(names), len(names)))  # the first index is the number of the prompt
    for vote in votes:
        number = numbers.setdefault(vote["prompt"], len(numbers))
        i, j = names.index(vote["a"]), names.index(vote["b"])
        wins[number, (i, j), (j, i)] += WINS[vote["winner"]]
    count, total = len(numbers), wins.sum(0)  # [P, P]
    ratings = 1000 + fit(total[None])[0]      # [P]
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples)  # [S, prompts]
    samples = fit(np.tensordot(draws, wins[:count], 1))  # [S, P]
    rated = np.isfinite(samples) & np.isfinite(ratings)  # these keep the mean that they have in all votes
    mean = np.where(rated, ratings, 0).sum(-1, keepdims=True) / np.maximum(1, rated.sum(-1, keepdims=True))
    low, high = np.sort(samples + mean, axis=0)[[resamples // 40, -1 - resamples // 40]]
    return sorted(zip(names, total.sum(0) + total.sum(1), ratings, low, high), key=lambda row: -row[2])

def play(models: dict, questions: list | itertools.repeat, votes: list, exact: bool, path: Path) -> None:
    """Add votes to a list and to a file: a person's on one pair a question, or exact ones on all pairs."""
    chance, pairs = np.random.default_rng(), list(itertools.combinations(sorted(models), 2))
    typed = filter(None, iter(lambda: input("You (/quit ends):\n").strip(), "/quit"))  # lines of a person
    for item in questions:
        known, sampling, chosen, answers = item.get("answer", ""), {}, pairs, {}
        danube3.require(not exact or isinstance(known, str) and known.strip(), f'{item} lacks an "answer"')
        messages = item.get("messages") or [{"role": "user", "content": item.get("prompt") or next(typed)}]
        sample.check_question({"messages": messages})
        prompt = "\n".join(message["content"] for message in messages)
        if not exact:  # the pair with the fewest votes, in random order
            voted = [tuple(sorted((vote["a"], vote["b"]))) for vote in votes]
            chance.shuffle(pairs)
            chosen = [chance.permutation(min(pairs, key=voted.count)).tolist()]
            sampling = {"temperature": 0.7, "top_p": 0.9, "seed": int(chance.integers(2**31))}  # [ours]
        for name in set(itertools.chain(*chosen)):
            model, tokenizer = models[name]
            ids, _ = danube3.render_chat(messages, tokenizer, add_generation_prompt=True)
            answers[name] = "".join(sample.ChatSession(model, tokenizer, 200, **sampling).answer(ids)).strip()
        for a, b in chosen:
            texts = [answers[a], answers[b]]
            if exact:
                more = sample.contains_answer(texts[0], known) - sample.contains_answer(texts[1], known)
                winner = {1: "a", 0: "tie", -1: "b"}[more]
            else:
                print(f"\n{prompt}\n\n--- 1\n{texts[0] or '(an empty answer)'}")
                print(f"\n--- 2\n{texts[1] or '(an empty answer)'}\n\nWhich is better: 1, 2 or tie?")
                winner = next(KEYS[line] for line in typed if line in KEYS)
            votes.append({"prompt": prompt, "a": a, "b": b, "winner": winner, "answers": texts, **sampling})
            with open(path, "a") as file:
                file.write(json.dumps(votes[-1]) + "\n")
            danube3.sync(path)  # a kill loses no vote

def main() -> None:
    parser = cli.Arguments(__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="their folders")
    parser.add_argument("--votes", type=Path, required=True, help="a file that grows by a line for each vote")
    parser.add_argument("--questions", type=read.read_jsonl, help="a table of prompts [you type them]")
    parser.add_argument("--judge", choices=["exact"], help="the answer with the known one wins [you vote]")
    args, votes, models = parser.parse_args(), [], {}
    danube3.require(len(set(args.models)) > 1, "one model alone has no opponent: name two or more folders")
    if args.votes.is_file() and args.votes.stat().st_size:
        votes = read.read_jsonl(args.votes)
        with danube3.reading(args.votes):
            danube3.require(args.votes.read_bytes().endswith(b"\n"), f"end the last line of {args.votes}")
            rate(votes)  # fails if they are no votes
    for name in args.models:
        models[name] = danube3.load_checkpoint(name, cli.pick_device(), fast=True)
    with suppress(EOFError, StopIteration):
        play(models, args.questions or itertools.repeat({}), votes, args.judge == "exact", args.votes)
    for name, games, rating, low, high in votes and rate(votes):
        shown = f"{rating:5,.0f}   95 % interval {low:,.0f} to {high:,.0f}"
        shown = {np.inf: "too few losses to rate", -np.inf: "too few wins to rate"}.get(float(rating), shown)
        print(f"{name:40}{games:8,.0f} votes   {shown}")

if __name__ == "__main__":
    cli.run_command(main)
