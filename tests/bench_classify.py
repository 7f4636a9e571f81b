"""Classification beside its simplest baseline: `python tests/bench_classify.py data/toy/passages.jsonl [FOLDER ...]`.

The baseline is a logistic regression on TF-IDF features. Its n-grams (words, or words and pairs of words) and the
strength of its regularization are chosen by five-fold cross-validation. It learns from the file and is evaluated on
the -quiz file beside it. So is each FOLDER, a model that `train.py --chat` has fine-tuned on the file.
Needs `pip install scikit-learn`.
"""
import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, recall_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import danube3  # noqa: E402
import sample  # noqa: E402
from data.read import Arguments, read_jsonl, run_command  # noqa: E402


def baseline(train: list[dict], test: list[dict]) -> tuple[float, float]:
    """-> accuracy and macro accuracy (the mean of the labels' recalls)"""
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]")  # punctuation marks too
    model = make_pipeline(words, LogisticRegression(max_iter=2_000))
    choices = {"tfidfvectorizer__ngram_range": [(1, 1), (1, 2)], "logisticregression__C": [1, 3, 10, 30, 100, 300]}
    search = GridSearchCV(model, choices, scoring="balanced_accuracy", cv=5, n_jobs=1)
    search.fit([item["text"] for item in train], [item["label"] for item in train])
    print(f"baseline: {search.best_params_}, {search.best_score_:.4f} in cross-validation")
    answers, truth = search.predict([item["text"] for item in test]), [item["label"] for item in test]
    return accuracy_score(truth, answers), recall_score(truth, answers, average="macro")


def main() -> None:
    parser = Arguments(__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, help='{"text": .., "label": ..} a line; NAME-quiz.jsonl lies beside it')
    parser.add_argument("folders", nargs="*", help="models that were fine-tuned on it")
    args = parser.parse_args()
    quiz = args.texts.with_name(f"{args.texts.stem}-quiz.jsonl")
    rows = [("TF-IDF and logistic regression", *baseline(read_jsonl(args.texts), read_jsonl(quiz)))]
    for folder in args.folders:
        results = sample.evaluate(*danube3.load_checkpoint(folder), quiz)
        rows.append((folder, results["accuracy"], results["macro accuracy"]))
    for name, accuracy, macro in rows:
        print(f"{name:40} accuracy {accuracy:.4f}  macro accuracy {macro:.4f}")


if __name__ == "__main__":
    run_command(main)
