"""Does a model answer from the document? `python tests/bench_rag.py out/toy-chat out/toy-rag` (models, side by side).

rag-quiz.jsonl asks about people whom the model has never read of, and about people of the world, where the document
contradicts all that the model has read. The greedy answer may be the document's or the memorised one. The same
questions without their documents show what the model remembers. chat-quiz.jsonl shows what the ability costs.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import danube3  # noqa: E402
import sample  # noqa: E402
from data.cli import Arguments, run_command  # noqa: E402
from data.read import read_jsonl  # noqa: E402


def without_document(question: dict) -> dict:
    """The message is a document and, in the last line, the question."""
    asked = question["messages"][0]["content"].splitlines()[-1]
    return {**question, "messages": [{"role": "user", "content": asked}]}


def two_people(questions: list[dict]) -> list[dict]:
    """Each document together with one about somebody else, who has another value of the same attribute. The file has
    four questions about each person, in the order of the attributes."""
    joined = []
    for number, question in enumerate(questions):
        same_attribute = (questions[number:] + questions[:number])[::4]
        other = next(each for each in same_attribute if each["answer"] != question["answer"])
        document, asked = question["messages"][0]["content"].split("\n")
        documents = [document, other["messages"][0]["content"].split("\n")[0]]
        if number % 2:
            documents.reverse()
        content = f"{' '.join(documents)}\n{asked}"
        joined.append({"messages": [{"role": "user", "content": content}], "answer": question["answer"],
                       "other": other["answer"]})
    return joined


def measure(checkpoint: str, data: Path) -> dict[str, float]:
    """The shares of right answers, by what counts as right."""
    model, tokenizer = danube3.load_checkpoint(checkpoint)

    def right(questions: list[dict], turn: int = 1) -> float:
        return sample.generative_evaluation(model, tokenizer, questions)[f"right in turn {turn}"]

    quiz, chat = read_jsonl(data / "rag-quiz.jsonl"), read_jsonl(data / "chat-quiz.jsonl")
    unknown = [question for question in quiz if "memorised" not in question]
    contradicted = [question for question in quiz if "memorised" in question]
    memorised = [{**question, "answer": question["memorised"]} for question in contradicted]
    pairs = two_people(unknown)
    return {"unknown people: the document's": right(unknown),
            "contradiction: the document's": right(contradicted),
            "contradiction: the memorised": right(memorised),
            "two people: the right one's": right(pairs),
            "two people: the other one's": right([{**pair, "answer": pair["other"]} for pair in pairs]),
            "unknown people, no document": right([without_document(question) for question in unknown]),
            "memorised, no document": right([without_document(question) for question in memorised]),
            "chat-quiz, first turn": right([each for each in chat if len(each["messages"]) == 1]),
            "chat-quiz, second turn": right([each for each in chat if len(each["messages"]) == 3], 2)}


def main() -> None:
    parser = Arguments(__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="models that were fine-tuned on conversations")
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="the toy world with both quizzes")
    args = parser.parse_args()
    columns = [measure(checkpoint, args.data) for checkpoint in args.checkpoints]
    for name in columns[0]:
        print(f"{name:32}" + "".join(f"{column[name]:>8.1%}" for column in columns))


if __name__ == "__main__":
    run_command(main)
