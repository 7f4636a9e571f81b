"""Complete a text with Danube3 (`python sample.py out/toy "Once upon a time"`), chat, or evaluate it."""

import argparse
import contextlib
import json
import math
import re
import sys
import time
import unicodedata
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import danube3
from danube3 import Danube3, DanubeError, Tokenizer, require
from data import classify
from data.cli import Arguments, pick_device, prepare_decoding, run_command
from data.read import Table, TokenData, check_turns, read_rows, read_text, table_suffix

# ---- Chat

class ChatSession:
    """A conversation with a model. When the context is full, the oldest exchanges are dropped.

    The ids that the model read and wrote are kept, not only their text. So the next prompt begins with
    them, and the cache still holds them. An answer that was cut gets the </s> that it lacks."""

    def __init__(self, model: Danube3, tokenizer: Tokenizer, max_new_tokens: int, **sampling: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.exchanges: list[list[int]] = []          # ids of a question and its answer
        self.messages: list[dict[str, str]] = []      # the same as text, dropped ones too
        self.asked = {"role": "user", "content": ""}  # the last question
        self.ended = True                             # whether the last answer ended with a stop token
        context = model.config.max_position_embeddings
        self.room = context - min(max_new_tokens, context // 4)  # [ours] for everything before an answer
        self.kv_cache = danube3.KVCache(model.config, 1, context, model.dtype, model.device)
        self.cached: list[int] = []                   # the ids whose keys and values it holds

    def reset(self) -> None:
        self.exchanges, self.messages = [], []

    def ask(self, text: str) -> tuple[list[int], int]:
        """Make room for a question. -> its ids, for `answer`; how many exchanges were dropped"""
        message, dropped = {"role": "user", "content": text}, 0
        ids, _ = danube3.render_chat([message], self.tokenizer, add_generation_prompt=True)
        require(len(ids) <= self.room, f"that is {len(ids):,} tokens, and {self.room:,} fit: shorten it")
        while sum(map(len, self.exchanges)) + len(ids) > self.room:
            del self.exchanges[0]
            dropped += 1
        self.asked = message
        return ids, dropped

    def answer(self, question: list[int]) -> Generator[str, None, None]:
        """The answer piece by piece. It becomes part of the conversation even if it is interrupted."""
        ids = [*sum(self.exchanges, []), *question]
        shared = danube3.first_difference(self.cached, ids)
        self.kv_cache.length = min(shared, len(ids) - 1)  # the logits of the last one are needed
        new_ids: list[int] = []
        pieces: list[str] = []
        detokenizer = danube3.StreamingDetokenizer(self.tokenizer, ids)
        input_ids = torch.tensor([ids], device=self.model.device)  # [1, T]
        try:
            for next_ids in danube3.generate_tokens(self.model, input_ids, self.max_new_tokens,
                                                    kv_cache=self.kv_cache, **self.sampling):
                new_ids.append(int(next_ids[0]))
                pieces.append(detokenizer.push(new_ids[-1]))
                yield pieces[-1]
            pieces.append(detokenizer.flush())
            yield pieces[-1]
        finally:
            self.cached = [*ids, *new_ids][:self.kv_cache.length]
            self.ended = bool(new_ids) and new_ids[-1] in self.model.stop_ids
            if not self.ended:
                new_ids.append(self.model.config.eos_token_id)
            self.exchanges.append([*question, *new_ids])
            self.messages += [self.asked, {"role": "assistant", "content": "".join(pieces)}]

# ---- Evaluation
#
# Three ways to measure what a model can do: how much a text surprises it (perplexity), which of several
# choices it finds likeliest (multiple choice and classification, by log-likelihood), and what it answers
# by itself (generative evaluation). Each returns a dict of numbers.

def sliding_windows(ids: list[int], context: int, stride: int) -> tuple[Tensor, Tensor]:
    """A long text as input_ids and labels, 2 x [N, context], in windows that move on by `stride`.

    Every token but the first is a target once, after at least context - stride tokens where there are that
    many. Of ten ids, with context 4 and stride 2, the targets are 1 2 3, 4 5, 6 7, 8 9."""
    windows = []
    for start in range(0, max(1, len(ids) - context + stride), stride):  # to the window that reaches the end
        window = np.array(ids[start:start + context])  # [T]
        seen = context - stride if start else 1        # targets of the window before; id 0 is never one
        is_target = np.arange(len(window)) >= seen
        windows.append(np.stack([window, np.where(is_target, window, danube3.IGNORE_INDEX)]))  # [2, T]
    return danube3.pad_sequences(windows)

def text_perplexity(model: Danube3, tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """exp of the mean loss over all tokens of a text, after <s>. Windows have the model's context, at most
    2,048, and move on by half of it [ours]."""
    ids = [model.config.bos_token_id, *tokenizer.encode(text)]
    context = min(2_048, model.config.max_position_embeddings)
    require(len(ids) >= 2, "there is no text to measure")
    require(context >= 2, "a context of one token predicts nothing: choose another model")
    input_ids, labels = sliding_windows(ids, context, context // 2)
    loss = danube3.evaluate_loss(model, input_ids, labels, max(1, danube3.LOGIT_TOKENS // context))
    bits = loss * (len(ids) - 1) / math.log(2)
    return {"tokens": len(ids) - 1, "context": context, "stride": context // 2, "loss": loss,
            "perplexity": math.exp(min(loss, 99)), "bits per byte": bits / len(text.encode())}

def loss_per_source(model: Danube3, tokenizer: Tokenizer, folder: str | Path) -> dict[str, float]:
    """Validation loss of each source of a data folder, in sequences of half the context, at most 2,048, so
    that the toy is measured as it was trained [ours]."""
    length = min(2_048, model.config.max_position_embeddings // 2)
    require(length >= 2, "a context of less than four tokens is too short for this: choose another model")
    data, losses = TokenData(folder, model.config, length, tokenizer), {}
    for name, split in data.blocks:
        if split == "val":
            batch = data.evenly_spread(name, split, danube3.VALIDATION_SEQUENCES)
            losses[name] = danube3.evaluate_loss(model, *batch, max(1, danube3.LOGIT_TOKENS // length))
    return losses

@torch.no_grad()
def continuation_log_likelihoods(model: Danube3, sequences: list[tuple[list[int], int]]) -> list[float]:
    """For each (ids, start): the log-probability of ids[start:] after ids[:start], in natural logarithms.

    Sequences of similar length share a batch, the longest first. Padding is on the right, where a causal
    model does not look."""
    results = [0.0] * len(sequences)
    longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
    bar = tqdm(total=len(sequences), desc="choices", leave=False, disable=None)
    while longest_first:
        length = len(sequences[longest_first[0]][0])
        size = max(1, danube3.LOGIT_TOKENS // length)  # logits are the largest tensor
        batch, longest_first = longest_first[:size], longest_first[size:]
        padded = [sequences[i][0] + [0] * (length - len(sequences[i][0])) for i in batch]
        input_ids = torch.tensor(padded, device=model.device)     # [B, T]
        log_p = model(input_ids)[:, :-1].log_softmax(-1)          # [B, T-1, V]: at t, for the token at t + 1
        log_p = log_p.gather(-1, input_ids[:, 1:, None])[..., 0]  # [B, T-1]: of the token that is there
        for i, scores in zip(batch, log_p):
            ids, start = sequences[i]
            results[i] = scores[start - 1:len(ids) - 1].sum().item()  # scores[t - 1] belongs to ids[t]
        bar.update(len(batch))
    bar.close()
    return results

def encode_choice(question: dict, choice: str, tokenizer: Tokenizer, bos: int) -> tuple[list[int], int]:
    """-> ids of a question followed by a choice; where the choice starts.

    Both are encoded together, as the model met such text in training. The choice starts at the first id
    that differs from the question's own encoding. After "messages" the choice is an answer and its </s>."""
    if "messages" in question:
        answer = {"role": "assistant", "content": choice}
        ids, _ = danube3.render_chat([*question["messages"], answer], tokenizer)
        asked, _ = danube3.render_chat(question["messages"], tokenizer, add_generation_prompt=True)
        return ids, danube3.first_difference(asked, ids)
    ids = [bos, *tokenizer.encode(question["prompt"] + choice)]
    return ids, danube3.first_difference([bos, *tokenizer.encode(question["prompt"])], ids)

def check_question(question: dict) -> None:
    """The "messages" of a question take turns and end with the user."""
    messages = check_turns(question.get("messages"))
    require(len(messages) % 2 == 1, "it must end with the user")

def choice_log_likelihoods(model: Danube3, tokenizer: Tokenizer, questions: list[dict]) -> list[list[float]]:
    """The log-likelihood of every choice of each {"prompt" or "messages", "choices"}."""
    sequences, context = [], model.config.max_position_embeddings
    for number, question in enumerate(questions, start=1):
        with numbered(number):
            choices = question.get("choices", [])
            are_texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
            require(are_texts and choices, 'it lacks a list of "choices"')
            require(len(set(choices)) == len(choices), "two of its choices are the same")
            require("messages" in question or isinstance(question.get("prompt"), str), 'it lacks a "prompt"')
            if "messages" in question:
                check_question(question)
            for choice in choices:
                ids, start = encode_choice(question, choice, tokenizer, model.config.bos_token_id)
                require(len(ids) <= context, f"it has {len(ids)} tokens, the context {context}: shorten it")
                require(choice and start < len(ids), "it has a choice that adds nothing to its prompt")
                sequences.append((ids, start))
    scores = iter(continuation_log_likelihoods(model, sequences))
    return [[next(scores) for _ in question["choices"]] for question in questions]

@contextlib.contextmanager
def numbered(number: int) -> Generator[None, None, None]:
    """Errors inside name the question."""
    try:
        yield
    except DanubeError as error:
        raise DanubeError(f"question {number}: {error}") from error

def multiple_choice(model: Danube3, tokenizer: Tokenizer, questions: list[dict]) -> dict[str, float]:
    """Accuracy on questions with "choices" and an "answer", the index of the right one.

    Names and definitions are lm-evaluation-harness's. acc: the share whose right choice has the highest
    log-likelihood. acc_stderr: its standard error. acc_norm: the same by log-likelihood per character,
    which does not favour short choices. "random baseline" is what chance would give."""
    for number, question in enumerate(questions, start=1):
        choices, answer = question.get("choices"), question.get("answer")
        require(isinstance(choices, list) and type(answer) is int and answer in range(len(choices)),
                f'question {number}: {answer!r} is no "answer", the index of one of its "choices"')
    right, chance = [], []
    for question, scores in zip(questions, choice_log_likelihoods(model, tokenizer, questions)):
        per_character = [score / len(choice) for score, choice in zip(scores, question["choices"])]
        right.append([each.index(max(each)) == question["answer"] for each in (scores, per_character)])
        chance.append(1 / len(scores))
    acc, acc_norm = np.mean(right, axis=0).tolist()
    stderr = math.sqrt(acc * (1 - acc) / max(1, len(questions) - 1))
    return {"questions": len(questions), "acc": acc, "acc_stderr": stderr, "acc_norm": acc_norm,
            "random baseline": float(np.mean(chance))}

def classification(model: Danube3, tokenizer: Tokenizer, rows: Table, task: classify.Task,
                   out: Path | None = None) -> dict[str, float]:
    """Label each row, by softmax over the log-likelihoods of all labels as the answer. Figures are of rows
    that have a label. The probabilities are written to `out`."""
    task.check(rows)
    truth = task.labels_of(rows)
    names = list(task.labels) or sorted({label for label in truth if label is not None})
    require(len(names) > 1, f"labels are needed, and here are {len(names)}: name all with --labels")
    prompts, truncated = replace(task, labels=names).prompts(rows, tokenizer)
    questions = [{"messages": prompt, "choices": names} for prompt in prompts]
    probabilities = classify.softmax(choice_log_likelihoods(model, tokenizer, questions))  # [N, labels]
    if out:
        classify.write_probabilities(out, rows, names, probabilities)
    return {"truncated": truncated, **classify.label_metrics(names, probabilities, truth)}

def answer_all(model: Danube3, tokenizer: Tokenizer, conversations: list[list[dict]],
               max_new_tokens: int = 64, batch_size: int = 64, **sampling: Any) -> list[tuple[str, bool]]:
    """The model's answer to each conversation, and whether it ended with a stop token."""
    by_length: dict[int, list[tuple[int, list[int]]]] = {}  # prompts of equal length need no padding
    for number, messages in enumerate(conversations):
        prompt, _ = danube3.render_chat(messages, tokenizer, add_generation_prompt=True)
        by_length.setdefault(len(prompt), []).append((number, prompt))
    answers = {}
    for length, prompts in tqdm(sorted(by_length.items()), desc="answers", leave=False, disable=None):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start:start + batch_size]
            input_ids = torch.tensor([prompt for _, prompt in batch], device=model.device)  # [B, T]
            outputs = danube3.generate(model, input_ids, max_new_tokens, **sampling).tolist()
            for (number, prompt), ids in zip(batch, outputs):
                end = length  # of the answer: its first stop token
                while end < len(ids) and ids[end] not in model.stop_ids:
                    end += 1
                answers[number] = tokenizer.decode(ids[:end])[len(tokenizer.decode(prompt)):], end < len(ids)
    return [answers[number] for number in range(len(conversations))]

def contains_answer(text: str, answer: str) -> bool:  # as words, not as a part of one
    letter = r"[^\W\u3040-\u30ff\u3400-\u9fff]"  # of a word; Chinese and Japanese put no spaces in between
    answer = re.escape(unicodedata.normalize("NFC", answer))
    return bool(re.search(f"(?<!{letter}){answer}(?!{letter})", unicodedata.normalize("NFC", text)))

def generative_evaluation(model: Danube3, tokenizer: Tokenizer, questions: list[dict],
                          **sampling: Any) -> dict[str, float]:
    """Answers to {"messages", "answer"}, greedy unless `sampling` says otherwise: the share that contain the
    right one as words, by turn, and the share that end with a stop token."""
    for number, question in enumerate(questions, start=1):
        with numbered(number):
            check_question(question)
            answer = question.get("answer")
            require(isinstance(answer, str) and answer.strip(), 'its "answer" must be text')
    answers = answer_all(model, tokenizer, [question["messages"] for question in questions], **sampling)
    right: dict[int, list[bool]] = {}
    for question, (text, _) in zip(questions, answers):
        turn = (len(question["messages"]) + 1) // 2
        right.setdefault(turn, []).append(contains_answer(text, question["answer"]))
    shares = {f"right in turn {turn}": sum(each) / len(each) for turn, each in sorted(right.items())}
    return {"questions": len(questions), **shares,
            "ended by themselves": sum(ended for _, ended in answers) / len(answers)}

def evaluate(model: Danube3, tokenizer: Tokenizer, path: str | Path) -> dict[str, float]:
    """Evaluate on a table of questions or labelled texts, on a data folder's validation part, or a text."""
    if Path(path).is_dir():
        return loss_per_source(model, tokenizer, path)
    if not table_suffix(path):
        return text_perplexity(model, tokenizer, read_text(path))
    rows, task = read_rows(path), classify.task_of(model)
    questions = [row for _, row in rows]
    try:
        if classify.is_labelled(rows, task):
            return classification(model, tokenizer, rows, task)
        if "messages" in questions[0] and "choices" not in questions[0]:
            return generative_evaluation(model, tokenizer, questions)
        return multiple_choice(model, tokenizer, questions)
    except DanubeError as error:
        raise DanubeError(f"{path}: {error}") from error

def as_table(results: dict[str, float]) -> str:
    """The results of evaluate, one per line."""
    lines = []
    for name, value in results.items():
        lines.append(f"{name:24}{value:>12,}" if isinstance(value, int) else f"{name:24}{value:>12.4f}")
    return "\n".join(lines)

def stored_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())

@torch.no_grad()
def measure_decoding(model: Danube3, tokens: int = 64) -> tuple[float, float]:
    """Tokens per second after a prompt of 8, and the bytes of weights read per second."""
    next_ids, best = torch.full((1, 8), model.config.bos_token_id, device=model.device), math.inf
    kv_cache = danube3.KVCache(model.config, 1, 256 + tokens, model.dtype, model.device)
    for _ in range(4):  # the best counts; the first may compile, or record a CUDA graph
        kv_cache.length = 0
        model.next_logits(next_ids.expand(1, 8), kv_cache)
        start = time.perf_counter()
        for _ in range(tokens):
            logits = model.next_logits(next_ids[:, -1:], kv_cache)  # [1, V]
            next_ids = logits.argmax(-1, keepdim=True)              # [1, 1]
        next_ids.item()  # waits for the device
        best = min(best, (time.perf_counter() - start) / tokens)
    read = stored_bytes(model) - stored_bytes(model.model.embed_tokens)
    return 1 / best, read / best

# ---- The program

def arguments() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, an output directory, or a published model")
    parser.add_argument("prompt", nargs="?", default="", help="text to complete; - for standard input")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="stop after this many tokens")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.9, help="sample from the likeliest that add up to p")
    parser.add_argument("--seed", type=int, help="same seed, same text [a new one each time]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=list(danube3.DTYPES), help="type of the weights [as stored]")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the pass of one "
                        "token: slow to start, faster afterwards [on GPUs, but for small models]")
    parser.add_argument("--chat", action="store_true", help="chat: each line of standard input is a question")
    parser.add_argument("--eval", metavar="PATH", help="evaluate on a table of questions or labels, a text "
                        "(perplexity) or a data folder (loss of each source)")
    parser.add_argument("--classify", metavar="TABLE", help="label texts (.jsonl, .csv, .parquet)")
    parser.add_argument("--out", type=Path, metavar="CSV", help="with --classify: write the probabilities")
    parser.add_argument("--json", metavar="FILE", help="write the results of --eval or --classify here too")
    parser.add_argument("--base", help="where the base of adapters is now")
    classify.add_arguments(parser)
    args = parser.parse_intermixed_args()
    if bool(args.eval) + bool(args.classify) + bool(args.prompt) + args.chat > 1:
        parser.error("a prompt, --chat, --eval and --classify cannot go together: choose one")
    if args.json and not (args.eval or args.classify):
        parser.error("--json is for the results of --eval or --classify")
    if (args.out or classify.changes(args)) and not args.classify:
        parser.error("--labels, --template, --truncate, columns and --out are for --classify")
    if args.out:
        classify.check_out(args.out)
    require(args.temperature >= 0 and args.top_k >= 0 and 0 < args.top_p <= 1 and args.max_new_tokens >= 1,
            "use --temperature and --top-k of 0 or more, --top-p above 0 and at most 1, and --max-new-tokens "
            "of 1 or more")
    require(args.seed is None or 0 <= args.seed < 2**63, "use a --seed from 0 to 2^63 - 1")
    return args

def save(messages: list[dict[str, str]], path: str) -> None:
    """Append a conversation to a file, as a line that train.py --chat can read."""
    require(path, "/save needs the name of a file")
    require(messages, "nothing has been said yet")
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}) + "\n")
    except OSError as error:
        raise DanubeError(f"{path} cannot be written: {error}") from error

def respond(session: ChatSession, line: str) -> None:
    """Do what one line of input says: a command, or a question."""
    command, _, name = line.partition(" ")
    if command == "/reset":
        session.reset()
    elif command == "/save":
        save(session.messages, name.strip())
    elif line:
        question, dropped = session.ask(line)
        if dropped:
            print(f"(the context is full: the {dropped} oldest exchanges were dropped)", file=sys.stderr)
        with contextlib.closing(session.answer(question)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        answered = len(session.exchanges[-1]) - len(question) - 1  # without the </s> that was appended
        print("" if session.ended else f" (cut after {answered} tokens)")

def chat(session: ChatSession) -> None:
    """Read questions from standard input, one per line, and print the answers."""
    require(sys.stdin is not None, "--chat reads questions from standard input, which is closed: open it")
    interactive, prompt = sys.stdin.isatty(), ""
    if interactive:
        prompt = "> "
        print("/reset starts anew, /save FILE appends the conversation, Ctrl-C stops an answer, Ctrl-D quits")
    while True:
        try:
            respond(session, input(prompt).removeprefix("\ufeff").strip())
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        except DanubeError as error:
            print(f"error: {error}", file=sys.stderr)

def complete(model: Danube3, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **sampling: Any) -> None:
    """Print a text and its continuation, token by token."""
    ids = tokenizer.encode_prompt(prompt) or [model.config.bos_token_id]
    print(prompt, end="", flush=True)
    detokenizer, count, ended = danube3.StreamingDetokenizer(tokenizer, ids), len(ids), False
    input_ids = torch.tensor([ids], device=model.device)  # [1, T]
    for next_ids in danube3.generate_tokens(model, input_ids, max_new_tokens, **sampling):
        token_id = int(next_ids[0])
        count, ended = count + 1, token_id in model.stop_ids
        if not ended:
            print(detokenizer.push(token_id), end="", flush=True)
    print(detokenizer.flush())
    if not ended and count == model.config.max_position_embeddings:
        print(f"(stopped: the context of {count} tokens is full)", file=sys.stderr)

def main() -> None:
    args = arguments()
    device, dtype = pick_device(args.device), danube3.DTYPES.get(args.dtype)
    measured = args.eval or args.classify
    model, tokenizer = danube3.load_checkpoint(args.checkpoint, device, dtype, not measured, args.base)
    if not measured:
        prepare_decoding(model, args.compile)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    if "<|prompt|>" not in str(tokenizer.chat_template) and not args.prompt:
        print("warning: the model has another chat template; Danube3's is used here", file=sys.stderr)
    if measured:
        if args.eval:
            results = evaluate(model, tokenizer, args.eval)
        else:
            task = classify.task_of(model, **classify.changes(args))
            results = classification(model, tokenizer, read_rows(args.classify), task, args.out)
        print(as_table(results))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    elif args.chat:
        chat(ChatSession(model, tokenizer, args.max_new_tokens, **sampling))
    else:
        prompt = args.prompt
        if prompt == "-":
            text = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
            prompt = text.replace("\r\n", "\n").removesuffix("\n")
        complete(model, tokenizer, prompt, args.max_new_tokens, **sampling)

if __name__ == "__main__":
    run_command(main)
