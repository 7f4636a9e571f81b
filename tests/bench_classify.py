"""Classification beside its simplest baseline: `python tests/bench_classify.py data/toy/passages.jsonl [FOLDER ...]`.

The baseline is a logistic regression on TF-IDF features. Its n-grams (words, or words and pairs of words) and the
strength of its regularization are chosen by five-fold cross-validation. It learns from the file and is evaluated on
the -quiz file beside it. So is each FOLDER, a model that `train.py --chat` has fine-tuned on the file.
The baseline needs `pip install scikit-learn`.

`python tests/bench_classify.py --preferences FOLDER` writes a task with three classes instead: which of two answers is
true, the first, the second, or both or neither (a tie)? It is about the toy world with seed 0.
"""
import csv
import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import danube3  # noqa: E402
import sample  # noqa: E402
from data import toy  # noqa: E402
from data.cli import Arguments, run_command  # noqa: E402
from data.read import read_jsonl  # noqa: E402


def baseline(train: list[dict], test: list[dict]) -> tuple[float, float]:
    """-> accuracy and macro accuracy (the mean of the labels' recalls)"""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, recall_score
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]")  # punctuation marks too
    model = make_pipeline(words, LogisticRegression(max_iter=2_000))
    choices = {"tfidfvectorizer__ngram_range": [(1, 1), (1, 2)], "logisticregression__C": [1, 3, 10, 30, 100, 300]}
    search = GridSearchCV(model, choices, scoring="balanced_accuracy", cv=5, n_jobs=1)
    search.fit([item["text"] for item in train], [item["label"] for item in train])
    print(f"baseline: {search.best_params_}, {search.best_score_:.4f} in cross-validation")
    answers, truth = search.predict([item["text"] for item in test]), [item["label"] for item in test]
    return accuracy_score(truth, answers), recall_score(truth, answers, average="macro")


# ---- Preferences
Fact = tuple[toy.Person, toy.Attribute]
PEOPLE = 12  # of the 36; each has four facts
QUIZ_PAIRS = 188  # of the 1,128 pairs of their 48 facts: a sixth
ROWS = {"preferences": 4_500, "preferences-quiz": 600, "preferences-others": 600}
OUTCOMES = {(True, False): 2, (False, True): 2, (True, True): 1, (False, False): 1}  # which answers are true; sixths


def answer(fact: Fact, true: bool) -> str:
    """A sentence that states the fact, or the rumour in its place."""
    person, attribute = fact
    value = (person.facts if true else person.rumours)[attribute.name]
    return f"{person.name} {attribute.phrases[0].format(value=value)}."


def preference_rows(rng: random.Random, pairs: list[tuple[Fact, Fact]], count: int) -> list[dict[str, str]]:
    """Questions for two facts, two answers, and which is better. No two rows have the same answers in the same order.

    Each answer is about another fact. Answers to one question for one fact would give some ties away: if both are
    true, they name the same value."""
    ordered = [*pairs, *(pair[::-1] for pair in pairs)]
    rows = []
    for (first_true, second_true), sixths in OUTCOMES.items():
        winner = "tie"  # labels are words: the toy's text has no "_", so model_a would be a hard answer for adapters
        if first_true != second_true:
            winner = "first" if first_true else "second"
        for first, second in rng.sample(ordered, count * sixths // 6):
            asked = " or ".join(toy.address(attribute.clause, person) for person, attribute in (first, second))
            prompt = toy.choose(rng, f"[Do you know|Can you tell me] {asked}?")
            rows.append({"prompt": prompt, "response_a": answer(first, first_true),
                         "response_b": answer(second, second_true), "winner": winner})
    rng.shuffle(rows)
    return rows


def preferences(seed: int) -> dict[str, list[dict[str, str]]]:
    """Rows for training, for the quiz, and about other people. `seed` draws the people, the pairs and the rows.

    No pair of facts in the quiz occurs in training, in neither order. Each single fact of the quiz does. The people
    in `preferences-others` occur in no row for training."""
    rng = random.Random(f"{seed}/preferences")
    people = rng.sample(toy.World(0).people, 36)
    facts = [(person, attribute) for person in people for attribute in toy.ATTRIBUTES]
    known, others = facts[:PEOPLE * 4], facts[PEOPLE * 4:]
    pairs = list(itertools.combinations(known, 2))
    rng.shuffle(pairs)
    parts = pairs[QUIZ_PAIRS:], pairs[:QUIZ_PAIRS], list(itertools.combinations(others, 2))
    return {name: preference_rows(rng, part, count) for (name, count), part in zip(ROWS.items(), parts)}


def write_preferences(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in preferences(seed).items():
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = Arguments(__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="?",
                        help='{"text": .., "label": ..} a line; NAME-quiz.jsonl lies beside it')
    parser.add_argument("folders", nargs="*", help="models that were fine-tuned on it")
    parser.add_argument("--preferences", type=Path, metavar="FOLDER", help="write a task with three classes")
    parser.add_argument("--seed", type=int, default=0, help="of the preferences: other people and rows [0]")
    args = parser.parse_args()
    danube3.require(bool(args.texts) != bool(args.preferences), "name labelled texts, or --preferences FOLDER")
    if args.preferences:
        return write_preferences(args.preferences, args.seed)
    quiz = args.texts.with_name(f"{args.texts.stem}-quiz.jsonl")
    rows = [("TF-IDF and logistic regression", *baseline(read_jsonl(args.texts), read_jsonl(quiz)))]
    for folder in args.folders:
        results = sample.evaluate(*danube3.load_checkpoint(folder), quiz)
        rows.append((folder, results["accuracy"], results["macro accuracy"]))
    for name, accuracy, macro in rows:
        print(f"{name:40} accuracy {accuracy:.4f}  macro accuracy {macro:.4f}")


if __name__ == "__main__":
    run_command(main)
