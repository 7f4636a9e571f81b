"""Let Danube3 go on with a text, `python sample.py out/toy "Once upon a time"`, talk with it, or examine it."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch

import danube3
from danube3 import DanubeError


def as_table(results: dict[str, float]) -> str:
    """The scores of danube3.evaluate, a line each."""
    return "\n".join(f"{name:24}{value:>12,}" if isinstance(value, int) else f"{name:24}{value:>12.4f}"
                     for name, value in results.items())


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


def talk(conversation: danube3.Conversation) -> None:
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
        results = danube3.evaluate(model, tokenizer, args.eval)
        print(as_table(results))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
        return
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    if args.chat:
        talk(danube3.Conversation(model, tokenizer, args.max_new_tokens, **sampling))
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
