"""What people write, read: JSON lines, texts, conversations."""
import json
from pathlib import Path

from danube3 import DanubeError


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a file with one JSON object a line; empty lines are passed over."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # -sig: perhaps with a mark in front
    except FileNotFoundError as error:
        raise DanubeError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        raise DanubeError(f"{path} is not UTF-8 text: {error}") from error
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise DanubeError(f"{path}, line {number}, is not JSON ({error}): mend or remove it") from error
        if objects and not isinstance(objects[-1], dict):
            raise DanubeError(f"{path}, line {number}, is not a JSON object in braces: mend or remove it")
    if not objects:
        raise DanubeError(f"{path} is empty: it should hold JSON objects, one a line")
    return objects


def read_text(path: str | Path) -> str:
    """A text file, whole."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DanubeError(f"{path} is neither a folder of token shards nor a text file: {error}") from error


def check_turns(messages: object, fold_system: bool) -> list[dict[str, str]]:
    """The messages of a conversation that can be learned from: user and assistant in turn, the user first.

    The published template has no place for a system message [R]. With `fold_system` its text, an empty line after it,
    begins the first user message [C]."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise DanubeError('"messages" must be a list of at least one {"role": .., "content": ..}')
    if fold_system and messages[0].get("role") == "system" and len(messages) > 1:
        system, user, *rest = messages
        if not isinstance(system.get("content"), str) or not isinstance(user.get("content"), str):
            raise DanubeError("the system message, or the user's after it, has no text as its content")
        messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        if message.get("role") == "system":
            raise DanubeError("System role not supported: remove it, or train with --system fold, which puts its "
                              "text in front of the first user message")
        if message.get("role") != expected:
            raise DanubeError(f"message {i + 1} has the role {message.get('role')!r} where {expected!r} must come: "
                              "user and assistant take turns, the user first")
    return messages


def conversation_of(item: dict) -> object:
    """The messages of a line: {"messages": [..]}, or {"text": .., "label": ..}, where the text asks and the label is
    the answer: to classify is to have a very short conversation."""
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
