"""What people write: texts, tables, conversations; and what data/prepare.py writes: token shards."""

import contextlib
import csv
import glob
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

import danube3
from danube3 import Batch, DanubeError, Messages, Tokenizer, reading, require

# ---- Texts and tables

Rows = Iterator[tuple[str, Any]]  # a place, for messages; a row, usually {column: value}
Table = list[tuple[str, dict[str, Any]]]  # all rows
LINE_BYTES = 64 * 2**20  # [ours] a longer line of JSON is an error

@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """A file of bytes, unpacked if its name ends in .gz."""
    require(path.is_file(), f"{path} does not exist, or is no file")
    with reading(path), path.open("rb") as raw:
        yield gzip.open(raw) if path.name.lower().endswith(".gz") else raw

def read_text(path: str | Path) -> str:
    """A text file, whole, without a byte order mark."""
    with open_file(Path(path)) as file:
        try:
            return io.TextIOWrapper(file, "utf-8-sig").read()
        except UnicodeDecodeError as error:
            raise DanubeError(f"{path} is not UTF-8 text ({error}): convert or unpack it") from error

def json_rows(file: BinaryIO, name: str) -> Rows:
    """One JSON value per line, or one array of them. Empty lines are skipped."""
    lines = iter(lambda: file.readline(LINE_BYTES), b"")
    for number, line in enumerate(lines, start=1):
        place = f"{name}, line {number}"
        require(len(line) < LINE_BYTES, f"{place}, is longer than {LINE_BYTES:,} bytes: split it")
        try:
            text = line.decode("utf-8-sig").strip()
            if number == 1 and text.startswith("["):
                for value in json.loads(text + file.read().decode()):
                    yield place, value
            elif text:
                yield place, json.loads(text)
        except UnicodeDecodeError as error:
            raise DanubeError(f"{place}, is not UTF-8 text: convert or unpack the file") from error
        except (ValueError, RecursionError) as error:
            raise DanubeError(f"{place}, is not JSON ({error}): write one object per line") from error

def csv_rows(file: BinaryIO, name: str) -> Rows:
    """The first line of a csv file names the columns. An empty field counts as none."""
    csv.field_size_limit(LINE_BYTES)
    table = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    try:
        for row in table:
            place = f"{name}, line {table.line_num}"
            require(None not in row, f"{place}, has more fields than the first line: quote those with commas")
            yield place, {column: value or None for column, value in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DanubeError(f"{name} is no UTF-8 csv file after line {table.line_num} ({error})") from error

def data_set_rows(what: str, name: str, config: str = "", split: str = "train", **options: str) -> Rows:
    """The rows of a data set, as the package datasets streams them."""
    try:
        import datasets
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(50)  # its errors are reported here
        builder = datasets.load_dataset_builder(name, config or None, **options)
        builder.config.batch_size = getattr(builder.config, "batch_size", None) or 1_000  # 0 in empty parquet
        for number, row in enumerate(builder.as_streaming_dataset(split), start=1):
            yield f"{what}, row {number}", row
    except ImportError as error:
        raise DanubeError(f"{what} needs the package datasets ({error}): pip install datasets") from error
    except StopIteration:  # all its files are empty
        return
    except Exception as error:  # from the network, the format, or the names
        raise DanubeError(f"{what} cannot be read: {error or type(error).__name__}") from error

def parquet_rows(file: BinaryIO, name: str) -> Rows:
    return data_set_rows(name, "parquet", data_files=glob.escape(name))

TABLES: dict[str, Callable[[BinaryIO, str], Rows]] = {
    ".jsonl": json_rows, ".ndjson": json_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}

def table_suffix(path: str | Path) -> str:
    """One of TABLES, or "" for another kind of file. The name may end in .gz."""
    suffix = Path(str(path).lower().removesuffix(".gz")).suffix
    return suffix if suffix in TABLES else ""

def table_rows(path: str | Path) -> Rows:
    """The rows of a table, one by one."""
    suffix = table_suffix(path)
    require(suffix, f"{path} is no table: use {', '.join(TABLES)}, perhaps with .gz")
    with open_file(Path(path)) as file:
        yield from TABLES[suffix](file, str(path))

def read_rows(path: str | Path) -> Table:
    """All rows of a table, each with its place. Null fields are left out."""
    rows = []
    for place, row in table_rows(path):
        require(isinstance(row, dict), f"{place}, is not a JSON object: fix or remove it")
        rows.append((place, {column: value for column, value in row.items() if value is not None}))
    require(rows, f"{path} is empty: it should hold rows, such as JSON objects, one per line")
    return rows

def read_jsonl(path: str | Path) -> list[dict[str, Any]]:  # the same without places
    return [row for _, row in read_rows(path)]

# ---- Conversations

def sharegpt(row: dict) -> Any:
    roles, messages = {"human": "user", "gpt": "assistant"}, []
    for turn in row["conversations"]:
        role = turn.get("from")
        messages.append({**turn, "role": roles.get(role, role), "content": turn.get("value")})
    return messages

def alpaca(row: dict) -> Any:
    request = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
    return completion({"prompt": request, "completion": row["output"]})

def completion(row: dict) -> Any:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]

FORMATS: dict[str, Callable[[dict], Any]] = {  # a column that tells how a row becomes messages
    "messages": lambda row: row["messages"],  # OpenAI's
    "conversations": sharegpt, "instruction": alpaca, "prompt": completion}

def messages_of(row: dict) -> Any:
    """The messages of a row in one of these formats."""
    for column, convert in FORMATS.items():
        if row.get(column) is not None:
            try:
                system = {"role": "system", "content": row.get("system")}
                return [system, *convert(row)] if system["content"] else convert(row)
            except (AttributeError, KeyError, TypeError) as error:
                raise DanubeError(f"its {column} cannot be read ({error!r})") from error
    raise DanubeError(f"it has the columns {', '.join(row)}, but no {', '.join(FORMATS)}")

NOT_TEXT = ("tool_calls", "function_call", "reasoning_content")  # of messages by other programs
def check_turns(messages: object, fold_system: bool = False) -> Messages:
    """The messages of a conversation, if user and assistant take turns, the user first.

    The published template has no place for a system message [paper]. With `fold_system` its text, followed
    by an empty line, begins the first user message [ours]."""
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise DanubeError('"messages" must be a list of at least one {"role": .., "content": ..}')
    if fold_system and messages[0].get("role") == "system" and len(messages) > 1:
        system, text = messages[0].get("content"), messages[1].get("content")
        are_texts = isinstance(system, str) and isinstance(text, str)
        require(are_texts, "the system message, or the user's after it, has no text as its content")
        folded = f"{system}\n\n{text}" if system.strip() else text
        messages = [{**messages[1], "content": folded}, *messages[2:]]
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        require(message.get("role") != "system", "System role not supported: remove it, or train with "
                "--system fold, which puts its text in front of the first user message")
        require(isinstance(message.get("content"), str), f"message {i + 1} has no text as its content")
        learnt = 0 not in (message.get("weight"), message.get("train"))  # null counts as absent
        require(learnt and not any(map(message.get, NOT_TEXT)), f"message {i + 1} is not to be learnt, or is "
                "more than text (tool calls, reasoning): remove it, or what is not text")
        require(message.get("role") == expected, f"message {i + 1} has the role {message.get('role')!r} "
                f"where {expected!r} must come: user and assistant take turns, the user first")
    return messages

def read_conversations(rows: Table, fold_system: bool, strict: bool) -> tuple[list[Messages], str]:
    """The usable conversations of a table, and a note on the others. With `strict` these are an error."""
    conversations, reason = [], ""
    for place, row in rows:
        try:
            conversations.append(check_turns(messages_of(row), fold_system))
        except DanubeError as error:
            reason = reason or f"{place}: {error}"
    left_out = len(rows) - len(conversations)
    require(not left_out or (conversations and not strict), reason)
    return conversations, reason and f"{left_out:,} conversations were left out, the first: {reason}"

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
        require(count, f"{self.folder}: source {name!r} ({split}) is missing or too short: add text, or use "
                "a larger --val with data/prepare.py")
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
