"""Our multiple choice against EleutherAI's lm-evaluation-harness, question by question:

    python tests/bench_lm_eval.py CHECKPOINT QUIZ.jsonl

The harness (`pip install "lm-eval[hf]"`) opens the unchanged folder by transformers, with its tokenizer, and scores the
quiz as a task in its own format. Ours scores it by sample.choice_log_likelihoods. This program compares the
log-likelihood of every choice, and the chosen answer: by log-likelihood (`acc`) and by log-likelihood per character
(`acc_norm`). With --write FOLDER the task file stays there, and the harness's own command is printed. The exit code is
1 if anything differs.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

import danube3  # noqa: E402
import sample  # noqa: E402
from data.read import read_jsonl  # noqa: E402

TASK = """task: danube3_quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: {quiz}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""  # our choices begin with their own space
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


def split_alike(tokenizer, question):
    """Whether the harness finds the same boundary between prompt and choice as ours.

    The harness encodes the prompt without the white space at its end, and lets the choice begin after that many tokens.
    The boundaries differ after half a word, and after a prompt that ends in a newline."""
    prompt = tokenizer.encode(question["prompt"])
    for choice in question["choices"]:
        ids = tokenizer.encode(question["prompt"] + choice)
        start = danube3.first_difference(prompt, ids)
        if ids[:start] != tokenizer.encode(question["prompt"].rstrip()) or start in (0, len(ids)):
            return False
    return True


def our_scores(checkpoint, questions):
    """Our answer by log-likelihood, and the log-likelihood of every choice."""
    model, tokenizer = danube3.load_checkpoint(checkpoint, dtype=torch.float32)
    if unlike := [i for i, question in enumerate(questions, start=1) if not split_alike(tokenizer, question)]:
        sys.exit(f"questions {unlike} cannot be compared: let prompts end with a word, choices begin with their space")
    scores = sample.choice_log_likelihoods(model, tokenizer, questions)
    return [each.index(max(each)) for each in scores], scores


def harness_scores(folder, model_args):
    """The log-likelihoods by question and choice, whether each answer was right by either score, and both shares."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    result = lm_eval.simple_evaluate(
        "hf", model_args, ["danube3_quiz"], batch_size=64, device="cpu", task_manager=tasks, bootstrap_iters=0
    )
    samples = sorted(result["samples"]["danube3_quiz"], key=lambda sample: sample["doc_id"])
    scores = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
    right = {name: [sample[name] for sample in samples] for name in ("acc", "acc_norm")}
    return scores, right, {name: result["results"]["danube3_quiz"][f"{name},none"] for name in right}


def best(scores, choices):
    """The choice that is likeliest for its number of characters."""
    values = [score / len(choice) for score, choice in zip(scores, choices)]
    return values.index(max(values))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint or an output directory")
    parser.add_argument("quiz", type=Path, help='a file of {"prompt", "choices", "answer"} lines')
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="leave the harness's task file there")
    args = parser.parse_args()
    try:
        import accelerate  # noqa: F401
        import lm_eval  # noqa: F401
    except ImportError as error:
        sys.exit(f'{error}: pip install "lm-eval[hf]"')
    checkpoint, questions = danube3.find_checkpoint(args.checkpoint), read_jsonl(args.quiz)
    picks, ours = our_scores(checkpoint, questions)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.write or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        task = TASK.format(quiz=json.dumps(str(args.quiz.resolve())))
        (folder / "danube3_quiz.yaml").write_text(task, encoding="utf-8")
        # <s> first, as ours, whatever the folder says; and float32, whatever it stores.
        model_args = {"pretrained": str(checkpoint), "dtype": "float32", "add_bos_token": True}
        theirs, right, shares = harness_scores(folder, model_args)
    assert [len(scores) for scores in theirs] == [len(scores) for scores in ours], "not the same questions"

    gaps = [abs(a - b) for mine, other in zip(ours, theirs) for a, b in zip(mine, other)]
    close, total = sum(gap <= 1e-4 for gap in gaps), len(questions)
    print(f"log-likelihoods: {close} of {len(gaps)} agree within 1e-4; the largest difference is {max(gaps):.1e}")
    agree = close == len(gaps)
    choices = [question["choices"] for question in questions]
    pairs = {
        "acc": (picks, [scores.index(max(scores)) for scores in theirs]),
        "acc_norm": (list(map(best, ours, choices)), list(map(best, theirs, choices))),
    }
    for name, (mine, other) in pairs.items():
        marks = [a == question["answer"] for a, question in zip(mine, questions)]
        unlike = [i + 1 for i in range(total) if mine[i] != other[i] or marks[i] != right[name][i]]
        same, differ = total - len(unlike), f"; questions that differ: {unlike[:20]}" if unlike else ""
        print(f"{name}: {same} of {total} answers are the same; right are {shares[name]:.4f} by the harness, "
              f"{sum(marks) / total:.4f} by ours{differ}")  # fmt: skip
        agree &= not unlike
    if args.write:
        joined = ",".join(f"{name}={value}" for name, value in model_args.items())
        print(f"lm_eval --model hf --model_args {shlex.quote(joined)} --tasks danube3_quiz "
              f"--include_path {shlex.quote(str(folder))} --device cpu --batch_size 64")  # fmt: skip
    sys.exit(not agree)


if __name__ == "__main__":
    main()
