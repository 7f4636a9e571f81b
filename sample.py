"""Let Danube3 go on with a text, `python sample.py out/toy "Once upon a time"`, talk with it, or examine it."""

import argparse
import contextlib
import json
import math
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import danube3
from danube3 import Danube3, DanubeError, Tokenizer
from data.read import check_turns, read_jsonl, read_text


# ----------------------------------------------------------------------------------------------------------- a dialogue
class Conversation:
    """A dialogue with a model, of which the newest exchanges are remembered, as many as the context holds.

    The ids that the model read and wrote are kept, not only their text, so that the cache of one answer serves the
    next; an answer that was cut gets the </s> that it lacks.
    """

    def __init__(self, model: Danube3, tokenizer: Tokenizer, max_new_tokens: int, **sampling: Any) -> None:
        self.model, self.tokenizer, self.max_new_tokens, self.sampling = model, tokenizer, max_new_tokens, sampling
        self.exchanges: list[list[int]] = []          # ids of a question and its answer
        self.messages: list[dict[str, str]] = []      # the same as text, forgotten ones too
        self.asked = {"role": "user", "content": ""}  # the last question
        self.ended = True                             # whether the last answer ended by itself
        context = model.config.max_position_embeddings
        self.room = context - min(max_new_tokens, context // 4)  # for all before an answer: 3/4 at least [C]
        self.kv_cache = danube3.KVCache(model.config, 1, context, model.dtype, model.device)

    def reset(self) -> None:
        self.exchanges, self.messages, self.kv_cache.length = [], [], 0

    def make_room(self, text: str) -> tuple[list[int], int]:
        """Make room for a question. -> its ids, for answer, and how many of the oldest exchanges had to be forgotten"""
        message, forgotten = {"role": "user", "content": text}, 0
        ids, _ = danube3.render_chat([message], self.tokenizer, add_generation_prompt=True)
        if len(ids) > self.room:
            raise DanubeError(f"that is {len(ids):,} tokens, and {self.room:,} fit: shorten it")
        while sum(map(len, self.exchanges)) + len(ids) > self.room:
            del self.exchanges[0]
            forgotten += 1
            self.kv_cache.length = 0  # every later token moves, and its key was turned for the old place
        self.asked = message
        return ids, forgotten

    def answer(self, question: list[int]) -> Generator[str, None, None]:
        """The answer piece by piece. However it ends, also if it is interrupted, it becomes part of the dialogue."""
        ids, eos = [*sum(self.exchanges, []), *question], self.model.config.eos_token_id
        new: list[int] = []
        pieces: list[str] = []
        decoder = danube3.StreamDecoder(self.tokenizer, ids)
        input_ids = torch.tensor([ids], device=self.model.device)
        try:
            for next_ids in danube3.generate_tokens(self.model, input_ids, self.max_new_tokens, **self.sampling,
                                                    kv_cache=self.kv_cache):
                new += next_ids.tolist()  # of one row
                pieces.append(decoder.feed(new[-1]))
                yield pieces[-1]
            pieces.append(decoder.rest())
            yield pieces[-1]
        finally:
            self.ended = new[-1:] == [eos]
            self.exchanges.append([*question, *new] + [eos] * (not self.ended))
            self.messages += [self.asked, {"role": "assistant", "content": "".join(pieces)}]


# ----------------------------------------------------------------------------------------------------------- evaluation
# The training loss says that a model learns, not what it can do. Three ways to examine it: how much a text surprises it
# (perplexity), which of several continuations it finds likeliest (multiple choice, and the labels of texts), and what
# it says by itself (free answers). Each gives a dict of numbers.

def windows_of(ids: list[int], context: int, stride: int) -> tuple[Tensor, Tensor]:
    """A long text as rows of input_ids and labels, 2 x [N, context]: windows that move on by `stride`, in which every
    token but the first is a label once, after at least context - stride tokens, where there are so many before it. Of
    ten ids, with context 4 and stride 2, these are labels: 1 2 3, 4 5, 6 7, 8 9."""
    rows = []
    for start in range(0, max(1, len(ids) - context + stride), stride):      # up to the window that reaches the end
        window = np.array(ids[start:start + context])                        # [T]
        new = np.arange(len(window)) >= (context - stride if start else 1)   # id 0 has nothing before it
        rows.append(np.stack([window, np.where(new, window, danube3.IGNORE)]))  # [2, T]
    return danube3.pad_rows(rows)


def text_perplexity(model: Danube3, tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """exp of the mean loss over all tokens of a text, after <s>. The context is the model's, at most 2,048; windows
    move on by half of it [C]."""
    ids = [model.config.bos_token_id, *tokenizer.encode(text)]
    context = min(2_048, model.config.max_position_embeddings)
    if len(ids) < 2:
        raise DanubeError("there is no text to measure")
    if context < 2:
        raise DanubeError("a context of one token predicts nothing: choose another model")
    input_ids, labels = windows_of(ids, context, context // 2)
    loss = danube3.mean_loss(model, input_ids, labels, max(1, danube3.LOGIT_TOKENS // context))
    bits = loss * (len(ids) - 1) / math.log(2)
    return {"tokens": len(ids) - 1, "context": context, "stride": context // 2, "loss": loss,
            "perplexity": math.exp(min(loss, 99)), "bits per byte": bits / len(text.encode())}


def loss_per_source(model: Danube3, tokenizer: Tokenizer, folder: str | Path) -> dict[str, float]:
    """Loss on VALIDATION_ROWS rows of each source of a data folder. Rows are half of the model's context, at most
    2,048, so that the toy is measured as it was trained [C]."""
    if (context := min(2_048, model.config.max_position_embeddings // 2)) < 2:
        raise DanubeError("a context of less than four tokens is too short for this: choose another model")
    data = danube3.matching_data(folder, tokenizer, model.config, context)
    rows = {name: danube3.validation_windows(data.open(name, "val")) for name in data.meta["sources"]}
    size = max(1, danube3.LOGIT_TOKENS // context)
    return {name: danube3.mean_loss(model, ids, ids, size) for name, ids in rows.items()}


@torch.no_grad()
def continuation_log_likelihood(model: Danube3, rows: list[tuple[list[int], int]]) -> list[float]:
    """For each (ids, start): the log-probability of ids[start:] after ids[:start], in natural logarithms.

    Rows of like length go together, the longest first; they are padded on the right, where a causal model does not
    look: position, not id, says what is padding.
    """
    device, results, left = model.device, [0.0] * len(rows), sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    bar = tqdm(total=len(rows), desc="choices", leave=False, disable=None)
    while left:
        length = len(rows[left[0]][0])
        size = max(1, danube3.LOGIT_TOKENS // length)  # logits are the largest tensor here
        picks, left = left[:size], left[size:]
        input_ids = torch.tensor([rows[i][0] + [0] * (length - len(rows[i][0])) for i in picks], device=device)
        log_p = model(input_ids)[:, :-1].log_softmax(-1)             # [B, T-1, V], at t for the token at t + 1
        log_p = log_p.gather(-1, input_ids[:, 1:, None])[..., 0]     # [B, T-1], of the token that stands there
        for i, scores in zip(picks, log_p):
            ids, start = rows[i]
            results[i] = scores[start - 1:len(ids) - 1].sum().item()  # scores[t - 1] is that of ids[t]
        bar.update(len(picks))
    bar.close()
    return results


def encoded_choice(question: dict, choice: str, tokenizer: Tokenizer, bos: int) -> tuple[list[int], int]:
    """-> ids of a question with one of its choices, and where the choice begins: at the first id that differs from the
    question's own encoding, since the two are encoded together, as the model would have met them. A "prompt" is text
    that goes on; "messages" are a conversation, in which the choice is the answer, with the </s> that ends it."""
    if "messages" in question:
        ids, _ = danube3.render_chat([*question["messages"], {"role": "assistant", "content": choice}], tokenizer)
        asked, _ = danube3.render_chat(question["messages"], tokenizer, add_generation_prompt=True)
        return ids, danube3.first_difference(asked, ids)
    ids = [bos, *tokenizer.encode(question["prompt"] + choice)]
    return ids, danube3.first_difference([bos, *tokenizer.encode(question["prompt"])], ids)


def asked_turns(question: dict, number: int) -> list[dict[str, str]]:
    """The "messages" of a question, which must be turns that end with the user."""
    try:
        turns = check_turns(question.get("messages"), fold_system=False)
    except DanubeError as error:
        raise DanubeError(f"question {number}: {error}") from error
    if len(turns) % 2 == 0:
        raise DanubeError(f"question {number} must end with the user")
    return turns


def choice_scores(model: Danube3, tokenizer: Tokenizer, questions: list[dict]) -> list[list[float]]:
    """The log-likelihood of every choice of each question, {"prompt" or "messages", "choices"}, summed over tokens."""
    rows, context = [], model.config.max_position_embeddings
    for number, question in enumerate(questions, start=1):
        choices = question.get("choices")
        if not (("messages" in question or isinstance(question.get("prompt"), str)) and isinstance(choices, list)
                and choices and all(isinstance(choice, str) for choice in choices)):
            raise DanubeError(f'question {number} lacks a "prompt" or a list of "choices"')
        if "messages" in question:
            asked_turns(question, number)
        for choice in choices:
            rows.append(encoded_choice(question, choice, tokenizer, model.config.bos_token_id))
            if len(rows[-1][0]) > context:
                raise DanubeError(f"question {number} has {len(rows[-1][0])} tokens, the context {context}: shorten it")
            if not choice or rows[-1][1] == len(rows[-1][0]):
                raise DanubeError(f"question {number} has a choice that adds nothing to its prompt: mend it")
    scores = iter(continuation_log_likelihood(model, rows))
    return [[next(scores) for _ in question["choices"]] for question in questions]


def multiple_choice(model: Danube3, tokenizer: Tokenizer, questions: list[dict]) -> dict[str, float]:
    """Questions as in choice_scores, with an "answer". acc is the share whose right choice has the highest log-
    likelihood, acc_stderr its standard error, acc_norm that share by log-likelihood per character, which does not
    favour short choices (names and definitions are lm-evaluation-harness's); guessing is what chance would give."""
    for number, question in enumerate(questions, start=1):
        choices = question.get("choices")
        answer = question.get("answer")
        if not isinstance(choices, list) or type(answer) is not int or answer not in range(len(choices)):
            raise DanubeError(f'question {number} lacks an "answer", the index of the right one of its "choices"')
    right = []  # by sum, by character
    for question, scores in zip(questions, choice_scores(model, tokenizer, questions)):
        per_character = [score / len(choice) for score, choice in zip(scores, question["choices"])]
        right.append([each.index(max(each)) == question["answer"] for each in (scores, per_character)])
    acc, acc_norm = np.mean(right, axis=0).tolist()
    stderr = math.sqrt(acc * (1 - acc) / max(1, len(questions) - 1))
    guessing = float(np.mean([1 / len(question["choices"]) for question in questions]))
    return {"questions": len(questions), "acc": acc, "acc_stderr": stderr, "acc_norm": acc_norm, "guessing": guessing}


def classification(model: Danube3, tokenizer: Tokenizer, items: list[dict]) -> dict[str, float]:
    """How often the likeliest label of {"text", "label"} items is the right one, all labels of the file being choices:
    among all items, among those of each label, and the mean of the latter (macro accuracy), in which rare labels count
    as much as frequent ones."""
    for number, item in enumerate(items, start=1):
        if not (isinstance(item.get("text"), str) and isinstance(item.get("label"), str) and item["label"]):
            raise DanubeError(f'question {number} lacks a "text" or a "label"')
    labels = sorted({item["label"] for item in items})
    questions = [{"messages": [{"role": "user", "content": item["text"]}], "choices": labels} for item in items]
    right: dict[str, list[bool]] = {label: [] for label in labels}
    for item, scores in zip(items, choice_scores(model, tokenizer, questions)):
        right[item["label"]].append(labels[scores.index(max(scores))] == item["label"])
    shares = {f"accuracy on {label}": sum(each) / len(each) for label, each in right.items()}
    return {"texts": len(items), "accuracy": sum(map(sum, right.values())) / len(items),
            "macro accuracy": sum(shares.values()) / len(labels), "guessing": 1 / len(labels), **shares}


def free_answers(model: Danube3, tokenizer: Tokenizer, conversations: list[list[dict]], max_new_tokens: int = 64,
                 batch_size: int = 64) -> list[tuple[str, bool]]:
    """The model's greedy answer to each conversation, always the likeliest token, and whether it ended by itself."""
    prompts = [danube3.render_chat(messages, tokenizer, add_generation_prompt=True)[0] for messages in conversations]
    answers, eos = {}, model.config.eos_token_id
    for length in tqdm(sorted(set(map(len, prompts))), desc="answers", leave=False, disable=None):
        same = [i for i, prompt in enumerate(prompts) if len(prompt) == length]  # a batch that needs no padding
        for picks in (same[i:i + batch_size] for i in range(0, len(same), batch_size)):
            input_ids = torch.tensor([prompts[i] for i in picks], device=model.device)
            for i, ids in zip(picks, danube3.generate(model, input_ids, max_new_tokens).tolist()):
                end = ids.index(eos, length) if eos in ids[length:] else len(ids)
                prompt_text = tokenizer.decode(ids[:length])
                answers[i] = tokenizer.decode(ids[:end])[len(prompt_text):], end < len(ids)
    return [answers[i] for i in range(len(prompts))]


def chat_questions(model: Danube3, tokenizer: Tokenizer, questions: list[dict]) -> dict[str, float]:
    """Answers to {"messages", "answer"} questions in free text: the share that hold the right one, as words, by the
    number of the turn; and the share that end by themselves."""
    for number, question in enumerate(questions, start=1):
        asked_turns(question, number)
        if not isinstance(question.get("answer"), str) or not question["answer"]:
            raise DanubeError(f'question {number} must have an "answer" that is text')
    answers = free_answers(model, tokenizer, [question["messages"] for question in questions])
    right: dict[int, list[bool]] = {}
    for question, (text, _) in zip(questions, answers):
        turn = (len(question["messages"]) + 1) // 2
        found = re.search(rf"(?<!\w){re.escape(question['answer'])}(?!\w)", text)
        right.setdefault(turn, []).append(bool(found))
    shares = {f"right in turn {turn}": sum(each) / len(each) for turn, each in sorted(right.items())}
    return {"questions": len(questions), **shares,
            "ended by themselves": sum(ended for _, ended in answers) / len(answers)}


def evaluate(model: Danube3, tokenizer: Tokenizer, path: str | Path) -> dict[str, float]:
    """Examine a model on a file of questions (.jsonl), on the validation part of a data folder, or on a text file."""
    if Path(path).is_dir():
        return loss_per_source(model, tokenizer, path)
    if str(path).endswith(".jsonl"):
        questions = read_jsonl(path)
        kinds = {"label": classification, "choices": multiple_choice, "messages": chat_questions}
        ask = next((kinds[key] for key in kinds if key in questions[0]), multiple_choice)
        try:
            return ask(model, tokenizer, questions)
        except DanubeError as error:
            raise DanubeError(f"{path}: {error}") from error
    return text_perplexity(model, tokenizer, read_text(path))


def as_table(results: dict[str, float]) -> str:
    """The scores of evaluate, a line each."""
    return "\n".join(f"{name:24}{value:>12,}" if isinstance(value, int) else f"{name:24}{value:>12.4f}"
                     for name, value in results.items())


# ---------------------------------------------------------------------------------------------------------- the program
def arguments() -> argparse.Namespace:
    parser = danube3.Arguments(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint folder, a run folder, or a published Danube3 folder")
    parser.add_argument("prompt", nargs="?", default="", help="the text to go on from; - reads it from standard input")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="stop after this many tokens, if not before")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest tokens; 0: among all")
    parser.add_argument("--top-p", type=float, default=0.9, help="choose among the likeliest tokens that make up p")
    parser.add_argument("--seed", type=int, help="of the choice: same seed, same text [a new one each time]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=list(danube3.DTYPES), help="type of the weights [as stored]")
    parser.add_argument("--chat", action="store_true", help="talk: each line of standard input is a question")
    parser.add_argument("--eval", metavar="PATH", help="examine the model: on the questions of a .jsonl file, on a "
                        "text file (perplexity), or on a data folder (loss of each source)")
    parser.add_argument("--json", metavar="FILE", help="with --eval: write the results here too")
    args = parser.parse_args()
    if bool(args.eval) + bool(args.prompt) + args.chat > 1:
        parser.error("a prompt, --chat and --eval cannot go together: choose one")
    if args.json and not args.eval:
        parser.error("--json is for the results of --eval")
    if not (args.temperature >= 0 and args.top_k >= 0 and 0 < args.top_p <= 1 and args.max_new_tokens >= 1):
        raise DanubeError("use --temperature and --top-k of 0 or more, --top-p above 0 and at most 1, "
                          "--max-new-tokens of 1 or more")
    if args.seed is not None and not 0 <= args.seed < 2 ** 63:
        raise DanubeError("use a --seed from 0 to 2^63 - 1")
    return args


def save(messages: list[dict[str, str]], path: str) -> None:
    """Add a dialogue to a file, as a line that train.py --chat can read."""
    if not path or not messages:
        raise DanubeError("/save takes the name of a file" if not path else "nothing has been said yet")
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}) + "\n")
    except OSError as error:
        raise DanubeError(f"{path} cannot be written: {error}") from error


def talk(conversation: Conversation) -> None:
    """Read questions from standard input, one a line, and print the answers."""
    if sys.stdin is None:
        raise DanubeError("--chat reads questions from standard input, which is closed: open it")
    if interactive := sys.stdin.isatty():
        print("/reset begins anew, /save FILE adds the conversation to a file, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            line = input("> " if interactive else "").strip()
            command, _, name = line.partition(" ")
            if command == "/reset":
                conversation.reset()
            elif command == "/save":
                save(conversation.messages, name.strip())
            elif line:
                question, forgotten = conversation.make_room(line)
                if forgotten:
                    print(f"(the context is full: {forgotten} of the oldest exchanges forgotten)", file=sys.stderr)
                with contextlib.closing(conversation.answer(question)) as pieces:
                    for piece in pieces:
                        print(piece, end="", flush=True)
                answered = len(conversation.exchanges[-1]) - len(question) - 1  # tokens before the </s> that was added
                print("" if conversation.ended else f" (cut after {answered} tokens)")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        except DanubeError as error:
            print(f"error: {error}", file=sys.stderr)


def main() -> None:
    args = arguments()
    device = danube3.pick_device(args.device)
    dtype = danube3.DTYPES.get(args.dtype)
    model, tokenizer = danube3.load_checkpoint(args.checkpoint, device, dtype, pack=not args.eval)
    if args.eval:
        results = evaluate(model, tokenizer, args.eval)
        print(as_table(results))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
        return
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    if args.chat:
        talk(Conversation(model, tokenizer, args.max_new_tokens, **sampling))
        return
    prompt = sys.stdin.buffer.read().decode("utf-8", "replace") if args.prompt == "-" else args.prompt
    ids = tokenizer.encode_prompt(prompt) or [model.config.bos_token_id]
    print(prompt, end="", flush=True)
    decoder, count, ended = danube3.StreamDecoder(tokenizer, ids), len(ids), False
    for next_ids in danube3.generate_tokens(model, torch.tensor([ids], device=device), args.max_new_tokens, **sampling):
        [token] = next_ids.tolist()  # of one row
        count, ended = count + 1, token == model.config.eos_token_id
        if not ended:
            print(decoder.feed(token), end="", flush=True)
    print(decoder.rest())
    if not ended and count == model.config.max_position_embeddings:
        print(f"(stopped: the context of {count} tokens is full)", file=sys.stderr)


if __name__ == "__main__":
    danube3.run_command(main)
