"""What people write: command lines, texts, JSON lines, conversations; and data/prepare.py: token shards."""

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

import numpy as np
import safetensors
import torch
import torch.distributed as dist

import danube3
from danube3 import Batch, DanubeError, Messages, Tokenizer, reading, require

# ---- The command line

class Arguments(argparse.ArgumentParser):
    """argparse that shows defaults in --help and raises DanubeError."""
    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=self.Formatter)

    def error(self, message: str) -> NoReturn:
        raise DanubeError(f"{message} (see {self.prog} --help)")

def pick_device(name: str = "auto") -> torch.device:
    """"auto" is the first available of cuda, mps and cpu. Under torchrun process i takes GPU i."""
    # On Hopper GPUs cuDNN attention takes 20 to 900 ms per new length: only train.py switches it on.
    torch.backends.cuda.enable_cudnn_sdp(False)
    rank = os.environ.get("LOCAL_RANK")
    if name == "auto":
        mps = torch.backends.mps.is_available() and rank is None  # gloo does not know MPS
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.startswith("cuda") and rank is not None:
        name = f"cuda:{rank}"
    try:
        zero = torch.zeros(1, device=name)
        zero.item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise DanubeError(f"device {name!r} is not available ({torch.cuda.device_count()} GPUs are): use "
                          "--device auto, and one process per GPU") from error
    return zero.device

def pick_dtype(wish: str, device: torch.device, config: danube3.DanubeConfig) -> str:
    """"auto" is bf16 on CPUs that compute in it too, but for the toy, so that its figures are everyone's."""
    known: dict = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch know nothing
    fast = device.type == "cpu" and (known.get("avx512_bf16") or known.get("amx_bf16"))
    wide = config.hidden_size > danube3.CONFIGS["toy"].hidden_size
    return "bfloat16" if wish == "auto" and fast and wide else wish

def join_processes(device: torch.device) -> None:
    """Meet the other processes that torchrun has started, if it has."""
    if "LOCAL_RANK" not in os.environ:
        return
    backend, own = "gloo", None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, own = "nccl", device
    dist.init_process_group(backend, device_id=own)

def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a program. What the user can fix ends in one line on stderr, exit code 2."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bytes that are no text, characters it cannot show
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of our output has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DanubeError, OSError, safetensors.SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not re.search("tried to allocate|out of memory|MemoryError", repr(error)):
            raise
        print("error: out of memory: shorten the text, use a smaller --micro-batch-size, or "
              "--activation-checkpointing on", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)

def token_count(text: str) -> int:
    """'200k', '1.5M', '10B', '4T' -> tokens."""
    units = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,12})?)([kmbt]?)", text.lower(), re.ASCII)
    count = Fraction(match[1]) * units[match[2]] if match else Fraction(0)
    if count.denominator != 1 or not 0 < count < 2**60:
        raise argparse.ArgumentTypeError(f"{text!r} is no token count: write 200k, 1.5M, 10B or 4T")
    return int(count)

def short_count(number: float) -> str:
    """1234567 -> 1.23M"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # 999,999 is 1M, not 1000k
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"

def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"0*[1-9]\d{0,17}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)

# ---- Files

def read_text(path: str | Path) -> str:
    """A text file, whole, without a byte order mark."""
    require(Path(path).is_file(), f"{path} does not exist, or is no file")
    with reading(Path(path)):
        try:
            return Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DanubeError(f"{path} is not UTF-8 text ({error}): convert or unpack it") from error

def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a file: one per line, or one array. Empty lines and null fields are left out."""
    text, objects = read_text(path), []
    is_array = text.lstrip().startswith("[")
    for number, line in enumerate([text] if is_array else text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DanubeError(f"{path}, line {number}, is not JSON ({error}): fix or remove it") from error
        for item in value if is_array else [value]:
            require(isinstance(item, dict), f"{path}, line {number}, is not a JSON object: fix or remove it")
            objects.append({name: field for name, field in item.items() if field is not None})
    require(objects, f"{path} is empty: it should hold JSON objects, one per line")
    return objects

NOT_TEXT = ("tool_calls", "function_call", "reasoning_content")  # of messages by other programs

def check_turns(messages: object, fold_system: bool = False) -> Messages:
    """The messages of a conversation, if user and assistant take turns, the user first.

    The published template has no place for a system message [paper]. With `fold_system` its text, followed
    by an empty line, begins the first user message [ours].
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise DanubeError('"messages" must be a list of at least one {"role": .., "content": ..}')
    if fold_system and messages[0].get("role") == "system" and len(messages) > 1:
        system, user, *rest = messages
        require(isinstance(system.get("content"), str) and isinstance(user.get("content"), str),
                "the system message, or the user's after it, has no text as its content")
        folded = f"{system['content']}\n\n{user['content']}" if system["content"].strip() else user["content"]
        messages = [{**user, "content": folded}, *rest]
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        require(message.get("role") != "system", "System role not supported: remove it, or train with "
                "--system fold, which puts its text in front of the first user message")
        require(isinstance(message.get("content"), str), f"message {i + 1} has no text as its content")
        learnt = message.get("weight", 1) and message.get("train", True)
        require(learnt and not any(map(message.get, NOT_TEXT)), f"message {i + 1} is not to be learnt, or is "
                "more than text (tool calls, reasoning): remove it, or what is not text")
        require(message.get("role") == expected, f"message {i + 1} has the role {message.get('role')!r} "
                f"where {expected!r} must come: user and assistant take turns, the user first")
    return messages

def conversation_of(item: dict) -> object:
    """The messages of a line: {"messages": [..]}, or {"text": .., "label": ..} as question and answer."""
    if "messages" in item or "label" not in item:
        return item.get("messages")
    return [{"role": "user", "content": item.get("text")}, {"role": "assistant", "content": item["label"]}]

def read_conversations(path: str | Path, fold_system: bool = False) -> list[Messages]:
    """The conversations of a jsonl file, each as its messages."""
    conversations = []
    for number, item in enumerate(read_jsonl(path), start=1):
        try:
            conversations.append(check_turns(conversation_of(item), fold_system))
        except DanubeError as error:
            raise DanubeError(f"{path}, conversation {number}: {error}") from error
    return conversations

# ---- Token shards

SMALL_FILE = 2**24  # [ours] bytes; `sha256sum -c` checks larger shards

class TokenData:
    """A folder of token shards, read in blocks of T consecutive ids of one source."""
    def __init__(self, folder: str | Path, config: danube3.DanubeConfig, sequence_length: int,
                 tokenizer: Tokenizer | None = None):
        self.folder, self.sequence_length = Path(folder), sequence_length
        self.vocab_size, path = config.vocab_size, self.folder / "meta.json"
        require(path.is_file(), f"no data at {folder} (no meta.json): make it with data/prepare.py")
        danube3.verify_checksums(self.folder, largest=SMALL_FILE)
        self.tokenizer = Tokenizer(self.folder / "tokenizer.model")
        self.starts, self.blocks = {}, {}  # by (source, split): first id of each shard, number of blocks
        with reading(path):
            meta = danube3.read_json(path)
            same = meta["tokenizer_sha256"] == self.tokenizer.sha256 == (tokenizer or self.tokenizer).sha256
            require(same, f"{folder} was made with another tokenizer: choose other data")
            size = self.tokenizer.vocab_size
            require(size <= self.vocab_size, f"{folder}: its tokenizer has {size:,} pieces, and the model "
                    f"{self.vocab_size:,}: choose another")
            require(meta["sources"], f"{path} names no sources: make the data again")
            for name in meta["sources"]:
                for split in ("train", "val"):
                    counts = meta["sources"][name][split]
                    self.starts[name, split] = np.cumsum([0, *counts])
                    self.blocks[name, split] = sum(counts) // sequence_length
                    for number, count in enumerate(counts):
                        path = self.shard(name, split, number)
                        whole = path.is_file() and path.stat().st_size == 2 * count
                        require(whole, f"{path} is missing or was cut short: make it again")

    def shard(self, name: str, split: str, number: int) -> Path:
        return self.folder / f"{name}-{split}-{number:05d}.bin"

    def block(self, name: str, split: str, index: int) -> np.ndarray:
        """Block `index` of a source, from one shard or several. -> ids [T], int64"""
        T, starts, ids = self.sequence_length, self.starts[name, split], np.empty(0, np.int64)
        while len(ids) < T:  # shards are opened for each read: there may be too many to keep open
            position = index * T + len(ids)
            number = int(np.searchsorted(starts, position, side="right")) - 1
            path, count = self.shard(name, split, number), min(T - len(ids), starts[number + 1] - position)
            part = np.fromfile(path, "<u2", count, offset=2 * (position - starts[number]))
            intact = len(part) == count and part.max() < self.vocab_size
            require(intact, f"{path} is damaged: make the data again")
            ids = np.append(ids, part)
        return ids

    def count_blocks(self, name: str, split: str) -> int:
        """The number of blocks of a source, at least 1."""
        count = self.blocks.get((name, split), 0)
        more = ", or use a larger --val with data/prepare.py" if split == "val" else ""
        require(count, f"{self.folder}: source {name!r} ({split}) is missing or too short: add text{more}")
        return count

    def read(self, blocks: list[tuple[str, str, int]]) -> Batch:
        """Blocks by source, split and index -> input_ids and labels, 2 x [N, T]"""
        input_ids = torch.from_numpy(np.stack([self.block(*block) for block in blocks]))
        return input_ids, input_ids  # every token but the first is a target

    def evenly_spread(self, name: str, split: str, count: int) -> Batch:
        """`count` blocks of a source, or all if there are fewer. -> input_ids and labels, 2 x [N, T]"""
        total = self.count_blocks(name, split)
        count = min(total, count)
        return self.read([(name, split, i * total // count) for i in range(count)])
