"""How often sampled answers are right: `python tests/bench_chat.py out/toy-chat data/toy/chat-quiz.jsonl`.

sample.py --eval takes the likeliest tokens. Somebody who chats meets sampled answers. This asks every question
several times, at the temperature and top-p of sample.py.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import danube3  # noqa: E402
import sample  # noqa: E402
from data.read import read_jsonl  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("questions", help='lines of {"messages": .., "answer": ..}')
    parser.add_argument("--samples", type=int, default=10, help="answers to each question [10]")
    args = parser.parse_args()
    model, tokenizer = danube3.load_checkpoint(args.checkpoint)
    questions, runs = read_jsonl(args.questions), []
    for seed in range(args.samples):
        sampling = {"temperature": 0.7, "top_p": 0.9, "seed": seed}
        runs.append(sample.generative_evaluation(model, tokenizer, questions, **sampling))
    print(sample.as_table({name: mean(run[name] for run in runs) for name in runs[0]}))


if __name__ == "__main__":
    main()
