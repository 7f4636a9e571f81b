"""Readers of what people write: JSON lines, texts, conversations, numbers."""

import argparse
import json
import re
from fractions import Fraction
from pathlib import Path

from danube3 import DanubeError, reading, require

# ---- Numbers on the command line

def token_count(text: str) -> int:
    """'200k', '1.5M', '10B', '4T' -> tokens."""
    units = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,12})?)([kmbt]?)", text.lower(), re.ASCII)
    count = Fraction(match[1]) * units[match[2]] if match else Fraction(0)
    if count.denominator != 1 or not 0 < count < 2**60:
        raise argparse.ArgumentTypeError(f"{text!r} is no token count: write 200k, 1.5M, 10B or 4T")
    return int(count)

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
        return Path(path).read_text(encoding="utf-8-sig")

def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a file with one JSON object per line; empty lines are skipped."""
    objects = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DanubeError(f"{path}, line {number}, is not JSON ({error}): fix or remove it") from error
        require(isinstance(value, dict), f"{path}, line {number}, is not a JSON object: fix or remove it")
        objects.append(value)
    require(objects, f"{path} is empty: it should hold JSON objects, one per line")
    return objects

def check_turns(messages: object, fold_system: bool = False) -> list[dict[str, str]]:
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
        messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        require(message.get("role") != "system", "System role not supported: remove it, or train with "
                "--system fold, which puts its text in front of the first user message")
        require(isinstance(message.get("content"), str), f"message {i + 1} has no text as its content")
        require(message.get("role") == expected, f"message {i + 1} has the role {message.get('role')!r} "
                f"where {expected!r} must come: user and assistant take turns, the user first")
    return messages

def conversation_of(item: dict) -> object:
    """The messages of a line: {"messages": [..]}, or {"text": .., "label": ..} as question and answer."""
    if "label" not in item:
        return item.get("messages")
    return [{"role": "user", "content": item.get("text")}, {"role": "assistant", "content": item["label"]}]

def read_conversations(path: str | Path, fold_system: bool = False) -> list[list[dict[str, str]]]:
    """The conversations of a jsonl file, each as its messages."""
    conversations = []
    for number, item in enumerate(read_jsonl(path), start=1):
        try:
            conversations.append(check_turns(conversation_of(item), fold_system))
        except DanubeError as error:
            raise DanubeError(f"{path}, conversation {number}: {error}") from error
    return conversations
