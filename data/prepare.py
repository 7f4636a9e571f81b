"""Text -> a folder of token shards: `python data/prepare.py --out data/real web=texts/web wikipedia=wiki.jsonl.gz ..`

A source is given as name=PATTERN, as often as it has places: a file, a folder with all below it, a glob, or
hub:owner/name[:config[:split]] for a data set on the Hugging Face Hub, which is streamed. Or `--open --tokens 10B`: an
open data set for each of the six sources. What follows is in the order of the work:

    read         inputs, one after another -> records of bytes, in batches of about 4 MB
    spool        a pool of processes: each batch -> one file of documents as ids, with the digests of their texts
    shards       each takes its part of the range of digests from every spool file, and sorts it

A digest is a number that looks random but depends on the text alone. Sorted by it, the documents of a source are
shuffled, and the result is the same in whichever files and in whichever order they stood, and with however many
processes. Duplicates meet, and go (within a source). The digest's second half says whether a document is for
validation, now and in any later data set.

Files get their names when they are whole, so whatever ends the program, the same command goes on where it was. (Inputs
are read again up to there, which is quick for files, while data sets are downloaded again.) The spool takes as much
room on the disk as the result, and goes when that is finished.
"""
import argparse
import contextlib
import errno
import functools
import glob
import gzip
import hashlib
import heapq
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python data/prepare.py` finds danube3
import danube3  # noqa: E402
from danube3 import DanubeError  # noqa: E402
from data.read import Arguments, check_turns, positive, run_command, token_count  # noqa: E402
from data.toy import train_tokenizer  # noqa: E402

OPEN = {  # what stands in for the report's six sources, whose texts are not published [ours]
    "web": "hub:HuggingFaceFW/fineweb",
    "wikipedia": "hub:wikimedia/wikipedia:20231101.en",
    "academic": "hub:common-pile/peS2o_filtered",
    "synthetic": "hub:HuggingFaceTB/smollm-corpus:cosmopedia-v2",
    "instruct": "hub:HuggingFaceTB/smoltalk:all",
    "other": "hub:common-pile/project_gutenberg_filtered",
}
TEXT = (".txt", ".md", ".rst", ".html", ".py", ".txt.gz")   # one document a file
LINES = (".jsonl", ".jsonl.gz", ".json.gz")                 # one JSON object a line
SUFFIXES = (*TEXT, *LINES, ".parquet")

DOCUMENT_BYTES = 2 ** 20        # a longer text becomes several documents, cut at line ends [ours]
BATCH_BYTES = 4 * 2 ** 20       # of text in one spool file [ours]
LINE_BYTES = 64 * 2 ** 20       # a longer line of JSON is taken for a mistake [ours]
SAMPLE_BYTES = 10_000           # a tokenizer is trained on pieces of this size ..
SAMPLE_PIECES = 1_000           # .. this many of each source ..
SAMPLE_READ = 100_000           # .. from among this many, the first ones [ours]
BINS = 2 ** 16                  # parts of the range of digests; a shard is some neighbouring ones


# --------------------------------------------------------------------------------------------------------------- read
class Record(NamedTuple):
    """What one process reads and another takes apart: a text, or a JSON object that holds one."""
    place: str          # for messages
    offset: int         # of the first byte in its file
    is_json: bool
    content: bytes


def first_cut(block: bytes) -> int:
    """Where the first document of a text ends: behind the last line end that leaves it short enough, or else, in a
    line that long, between two characters."""
    if len(block) <= DOCUMENT_BYTES:
        return len(block)
    end = block.rfind(b"\n", 0, DOCUMENT_BYTES) + 1 or DOCUMENT_BYTES
    while DOCUMENT_BYTES - 4 < end and block[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


def text_records(file: io.BufferedIOBase, path: Path) -> Iterator[Record]:
    """A text file, of which no more than one document is in memory."""
    rest, offset = b"", 0
    while block := rest + file.read(DOCUMENT_BYTES + 1 - len(rest)):
        end = first_cut(block)
        yield Record(str(path), offset, False, block[:end])
        rest, offset = block[end:], offset + end


def line_records(file: io.BufferedIOBase, path: Path) -> Iterator[Record]:
    """A file of JSON objects, one a line; empty lines are passed over."""
    offset = 0
    for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), start=1):
        if len(line) == LINE_BYTES:
            raise DanubeError(f"{path}, line {number}, is longer than {LINE_BYTES:,} bytes: write one document a line")
        if line.strip():
            yield Record(f"{path}, line {number}", offset, True, line)
        offset += len(line)


def row_records(what: str, field: str, name: str, config: str | None = None, split: str = "train",
                **options: str) -> Iterator[Record]:
    """The rows of a data set as the package datasets streams them, each as JSON."""
    try:
        import datasets
    except ImportError as error:
        raise DanubeError(f"reading {what} takes the package datasets: pip install datasets") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(50)  # its errors are ours to tell
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True, **options)
        for number, row in enumerate(rows, start=1):
            used = {key: row[key] for key in (field, "messages") if key in row}
            yield Record(f"{what}, row {number}", 0, True, json.dumps(used).encode())
    except Exception as error:  # whatever goes wrong between here and the far end of the network
        raise DanubeError(f"{what} cannot be read: {error or type(error).__name__}") from error


def find_files(pattern: str) -> list[Path]:
    """The files that a pattern means, in an order that depends on their names alone."""
    path = Path(pattern)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    if not path.exists():
        matches = sorted(match for match in glob.glob(pattern, recursive=True) if os.path.exists(match))
        found = [file for match in matches for file in find_files(match)]
        if not found:
            raise DanubeError(f"{pattern}: no such file")
        return found
    if not path.name.endswith(SUFFIXES):
        raise DanubeError(f"{pattern}: what this file holds cannot be told from its name; known are "
                          f"{' '.join(SUFFIXES)}")
    return [path]


class Source:
    """The inputs of one source: files and data sets."""

    def __init__(self, name: str, patterns: list[str], field: str, tokens: int | None = None) -> None:
        self.name, self.patterns, self.field = name, patterns, field
        self.tokens = tokens    # how many of them are wanted; None for all
        self.inputs = [part for pattern in patterns
                       for part in ([pattern] if pattern.startswith("hub:") else find_files(pattern))]
        self.streamed = any(isinstance(part, str) for part in self.inputs)
        self.sizes = [part.stat().st_size if isinstance(part, Path) else 0 for part in self.inputs]
        self.position = 0       # bytes of the files read so far

    def identity(self) -> str:
        """A digest of what must be the same if a command goes on: names, sizes and times of change."""
        times = [part.stat().st_mtime_ns if isinstance(part, Path) else 0 for part in self.inputs]
        listing = [f"{part}\0{size}\0{time}\n" for part, size, time in zip(self.inputs, self.sizes, times)]
        return hashlib.sha256("".join(listing).encode(errors="surrogateescape")).hexdigest()

    def records(self) -> Iterator[Record]:
        for part, before in zip(self.inputs, itertools.accumulate(self.sizes, initial=0)):
            self.position = before
            if isinstance(part, str):
                name, *config_and_split = part.removeprefix("hub:").split(":")
                yield from row_records(part, self.field, name, *config_and_split)
            elif part.name.endswith(".parquet"):
                yield from row_records(str(part), self.field, "parquet", data_files=str(part))
            else:
                with open(part, "rb") as raw:
                    for record in self.file_records(raw, part):
                        self.position = before + raw.tell()
                        yield record

    def file_records(self, raw: io.BufferedReader, path: Path) -> Iterator[Record]:
        file: io.BufferedIOBase = gzip.open(raw) if path.name.endswith(".gz") else raw
        try:
            yield from (text_records if path.name.endswith(TEXT) else line_records)(file, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DanubeError(f"{path} is a broken gzip file, or one that was cut short ({error}): copy it again"
                              ) from error

    def batches(self) -> Iterator[tuple[list[Record], int]]:
        """Records, about BATCH_BYTES together, and the position behind them."""
        batch, size = [], 0
        for record in self.records():
            batch.append(record)
            size += len(record.content)
            if size >= BATCH_BYTES:
                yield batch, self.position
                batch, size = [], 0
        yield batch, self.position


# -------------------------------------------------------------------------------------------------------------- spool
def json_documents(record: Record, field: str) -> Iterator[str | list[dict]]:
    try:
        row = json.loads(record.content.decode())
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise DanubeError(f"not JSON ({error}): mend or remove it") from error
    if not isinstance(row, dict):
        raise DanubeError("not a JSON object in braces: mend or remove it")
    if not isinstance(row.get(field), str):
        if row.get("messages") is None:
            raise DanubeError(f'there is no text under "{field}": mend it, or name the field with --text-field')
        yield check_turns(row["messages"], fold_system=True)
        return
    try:
        rest = row[field].encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise DanubeError(f"not valid Unicode: {error}") from error
    while rest:
        end = first_cut(rest)
        yield rest[:end].decode()
        rest = rest[end:]


def documents(record: Record, field: str) -> Iterator[str | list[dict]]:
    """The texts and conversations of a record; texts of nothing but space are left out."""
    try:
        found: Iterable[str | list[dict]]
        if record.is_json:
            found = json_documents(record, field)
        else:  # the text as Python's text files give it: without byte order mark, lines end in \n
            found = [record.content.decode().removeprefix("\ufeff").replace("\r\n", "\n")]
        yield from (document for document in found if not isinstance(document, str) or document.strip())
    except UnicodeDecodeError as error:
        raise DanubeError(f"byte {record.offset + error.start} is not UTF-8 text: convert the file") from error


def digest(document: str | list[dict]) -> bytes:
    """16 bytes that stand for a document; conversations are equal if they have the same turns."""
    if not isinstance(document, str):
        document = json.dumps([(turn["role"], turn.get("content")) for turn in document])
    return hashlib.blake2b(document.encode(), digest_size=16).digest()


def encode(document: str | list[dict], tokenizer: danube3.Tokenizer) -> np.ndarray:
    """<s> .. </s> as uint16; the last </s> of a conversation is that of the document."""
    if isinstance(document, str):
        return np.array([1, *tokenizer.encode(document), 2], dtype="<u2")
    return np.array([1, *danube3.render_chat(document, tokenizer)[0]], dtype="<u2")


# A spool file: the number of documents n, an index of n entries, and the ids of the documents in the same order. All
# are little-endian, and everything starts at an even byte.
INDEX = np.dtype([("high", "<u8"), ("low", "<u8"), ("length", "<u4")])  # the halves of the digest; ids


def write_whole(path: Path, *parts: bytes | np.ndarray) -> None:
    """Write a file under a temporary name; it gets its own when it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        for part in parts:
            file.write(part)  # type: ignore[arg-type]  # an array is a buffer too
    danube3.sync(partial)
    partial.replace(path)


def read_index(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        return np.fromfile(file, INDEX, int(np.fromfile(file, "<u8", 1)[0]))


@functools.cache
def open_tokenizer(model_file: Path) -> danube3.Tokenizer:
    return danube3.Tokenizer(model_file)  # once in every process


def write_spool(path: Path, batch: list[Record], field: str, model_file: Path) -> int:
    """What one process does with one batch. -> rows left out: those of Hub data sets, which nobody here can mend, and
    which are neither text nor conversation; in a file they are an error"""
    digests: list[bytes] = []
    ids: list[np.ndarray] = []
    tokenizer, left_out = open_tokenizer(model_file), 0
    for record in batch:
        try:
            found = [(digest(document), encode(document, tokenizer)) for document in documents(record, field)]
        except DanubeError as error:
            if not record.place.startswith("hub:"):
                raise DanubeError(f"{record.place}: {error}") from error
            found, left_out = [], left_out + 1
        digests.extend(name for name, _ in found)
        ids.extend(each for _, each in found)
    index = np.zeros(len(ids), INDEX)
    index["high"], index["low"] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2).T
    index["length"] = [len(each) for each in ids]
    write_whole(path, np.array([len(ids)], "<u8"), index, *ids)
    return left_out


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are forked where that is usual, and so share the memory of the libraries loaded here."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, start_worker)
    pool.submit(int).result()  # so they are forked now: before the package datasets is loaded, and before any thread
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(jobs: Iterator[tuple[Path, Future | None, int]], ahead: int) -> Iterator[tuple[Path, Future | None, int]]:
    """The jobs as they were begun, with up to `ahead` more begun behind the first unfinished one."""
    begun: deque[tuple[Path, Future | None, int]] = deque()
    for job in jobs:
        begun.append(job)
        if len(begun) > ahead:
            yield begun.popleft()
    yield from begun


def spool_source(source: Source, folder: Path, pool: ProcessPoolExecutor, workers: int) -> list[Path]:
    """Turn a source into spool files, all of it or as many tokens as are wanted. -> the files that count"""
    finished = folder / f"{source.name}.finished"  # holds the number of files that count

    def begin(number: int, batch: list[Record], position: int) -> tuple[Path, Future | None, int]:
        path = folder / f"{source.name}-{number:06d}.spool"
        if path.is_file():
            return path, None, position
        model_file = folder.parent / "tokenizer.model"
        return path, pool.submit(write_spool, path, batch, source.field, model_file), position

    if finished.is_file():
        return [folder / f"{source.name}-{number:06d}.spool" for number in range(int(finished.read_text()))]
    paths, tokens, count, left_out = [], 0, 0, 0
    unit, total = ("token", source.tokens) if source.streamed else ("B", sum(source.sizes))
    jobs = (begin(number, *batch) for number, batch in enumerate(source.batches()))
    with tqdm(desc=source.name, total=total, unit=unit, unit_scale=True, leave=False, disable=None) as bar:
        for path, future, position in in_order(jobs, 2 * workers):
            if future:
                left_out += future.result()
            index = read_index(path)
            paths.append(path)
            tokens, count = tokens + int(index["length"].sum()), count + len(index)
            bar.update((tokens if source.streamed else position) - bar.n)
            if source.tokens and tokens >= source.tokens:
                break
    skipped = f"{left_out:,} rows are left out, which have neither messages nor text under {source.field!r}"
    if not count:
        raise DanubeError(f"source {source.name!r} has no documents in {', '.join(source.patterns)}"
                          + (f"; {skipped}: name the field with --text-field" if left_out else ""))
    if left_out:
        print(f"{source.name}: {skipped}")
    write_whole(finished, str(len(paths)).encode())
    return paths


# ------------------------------------------------------------------------------------------------------------- shards
def validation_threshold(name: str, spools: list[Path], fraction: float) -> int:
    """Documents whose digest has a lower half below this number are for validation: `fraction` of them, but at least
    one, and not all."""
    ends = [int(end) for path in spools if len(low := read_index(path)["low"]) for end in (low.min(), low.max())]
    lowest, highest = min(ends), max(ends)
    if lowest == highest:
        raise DanubeError(f"source {name!r} has only one document: give it at least two, one to train on and one for "
                          "validation")
    return min(max(int(fraction * 2 ** 64), lowest + 1), highest)


def part_of(index: np.ndarray, split: str, threshold: int) -> np.ndarray:
    """Which entries of an index belong to a split -> [n], bool"""
    return (index["low"] < np.uint64(threshold)) == (split == "val")


def plan_shards(spools: list[Path], split: str, threshold: int, shard_tokens: int) -> list[tuple[int, int]]:
    """The bins of each shard, first and end: neighbouring bins until they have `shard_tokens`, duplicates counted."""
    tokens = np.zeros(BINS)
    for index in map(read_index, spools):
        index = index[part_of(index, split, threshold)]
        tokens += np.bincount((index["high"] >> 48).astype(np.int64), index["length"], minlength=BINS)
    shards, first, filled = [], 0, 0
    for number in np.flatnonzero(tokens).tolist():
        filled += tokens[number]
        if filled >= shard_tokens:
            shards.append((first, number + 1))
            first, filled = number + 1, 0
    return [*shards, (first, BINS)] if filled else shards


ENTRY = np.dtype([*INDEX.descr, ("spool", "<u4"), ("start", "<u8")])  # which file; ids from the beginning of the file


def shard_entries(spools: list[Path], bins: tuple[int, int], split: str, threshold: int) -> np.ndarray:
    """An entry for each different document of a shard, sorted by digest."""
    parts = []
    for number, path in enumerate(spools):
        index = read_index(path)
        bin_of = index["high"] >> 48
        chosen = (bins[0] <= bin_of) & (bin_of < bins[1]) & part_of(index, split, threshold)
        part = np.zeros(chosen.sum(), ENTRY)
        for name, *_ in INDEX.descr:
            part[name] = index[name][chosen]
        begin = (8 + index.nbytes) // 2  # of the ids, behind the count and the index
        part["spool"], part["start"] = number, (begin + np.cumsum(index["length"]) - index["length"])[chosen]
        parts.append(part)
    entries = np.concatenate(parts)
    entries = entries[np.lexsort((entries["low"], entries["high"]))]
    same = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
    return entries[np.concatenate([[True], ~same])]


def gather(spools: list[Path], entries: np.ndarray) -> np.ndarray:
    """The documents of these entries, one after another -> [tokens], uint16. One spool file is open at a time."""
    ends = np.cumsum(entries["length"], dtype=np.int64)
    ids = np.empty(ends[-1], "<u2")
    by_spool = np.argsort(entries["spool"], kind="stable")
    bounds = np.searchsorted(entries["spool"][by_spool], np.arange(len(spools) + 1))
    for path, begin, end in zip(spools, bounds, bounds[1:]):
        mine = by_spool[begin:end]
        if not len(mine):
            continue
        words = np.memmap(path, "<u2", "r")
        columns = (entries["start"][mine], entries["length"][mine], ends[mine])
        for start, length, stop in zip(*(column.tolist() for column in columns)):
            ids[stop - length:stop] = words[start:start + length]
    return ids


def write_source(folder: Path, source: Source, spools: list[Path], fraction: float,
                 shard_tokens: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Write the shards that are not there yet. -> tokens of each, by split; documents read and duplicates among them"""
    threshold = validation_threshold(source.name, spools, fraction)
    counts: dict[str, list[int]] = {"train": [], "val": []}
    kept = 0
    plan = [(split, bins) for split in counts for bins in plan_shards(spools, split, threshold, shard_tokens)]
    for split, bins in tqdm(plan, desc=f"{source.name}: shards", unit="shard", leave=False, disable=None):
        path = folder / f"{source.name}-{split}-{len(counts[split]):05d}.bin"
        if not path.is_file():
            write_whole(path, gather(spools, shard_entries(spools, bins, split, threshold)))
        ids = np.memmap(path, "<u2", "r")
        counts[split].append(len(ids))
        kept += int((ids == 1).sum())  # a document's <s>; no text has one
    read = sum(len(read_index(path)) for path in spools)
    return counts, {"documents": read, "duplicates": read - kept}


# ---------------------------------------------------------------------------------------------------------- tokenizer
def sample_pieces(source: Source) -> Iterator[str]:
    """Pieces of a source to train a tokenizer on: those with the lowest digests, so not only the first in order."""
    def texts() -> Iterator[str]:
        for record in source.records():
            with contextlib.suppress(DanubeError, KeyError, TypeError):  # write_spool will say what is wrong
                for document in documents(record, source.field):
                    yield document if isinstance(document, str) else "\n".join(turn["content"] for turn in document)

    pieces = (text[i:i + SAMPLE_BYTES] for text in texts() for i in range(0, len(text), SAMPLE_BYTES))
    digests = ((digest(piece), piece) for piece in itertools.islice(pieces, SAMPLE_READ))
    return (piece for _, piece in heapq.nsmallest(SAMPLE_PIECES, digests))


def find_tokenizer(name: str) -> danube3.Tokenizer:
    """What --tokenizer names, if that is not to be trained."""
    path = Path(name, "tokenizer.model") if Path(name).is_dir() else Path(name)
    if name == "mistral":
        spec = importlib.util.find_spec("mistral_common")
        if spec is None or not spec.submodule_search_locations:
            raise DanubeError("--tokenizer mistral takes the package mistral-common: pip install mistral-common")
        path = Path(spec.submodule_search_locations[0], "data", "tokenizer.model.v1")
    tokenizer = danube3.Tokenizer(path)
    if tokenizer.vocab_size > 2 ** 16:
        raise DanubeError(f"{path} has {tokenizer.vocab_size:,} pieces, and shards hold numbers below 65,536: use a "
                          "smaller vocabulary")
    if (tokenizer.sp.bos_id(), tokenizer.sp.eos_id()) != (1, 2):
        raise DanubeError(f"{path} does not have <s> and </s> as ids 1 and 2: use another tokenizer")
    return tokenizer


def provide_tokenizer(found: danube3.Tokenizer | int, sources: list[Source], path: Path) -> danube3.Tokenizer:
    """Put a tokenizer at `path`, if it is not there: a copy of what was found, or one of so many pieces, trained."""
    if not path.is_file():
        partial = path.with_name("tokenizer.model.partial")
        if isinstance(found, int):
            train_tokenizer(itertools.chain.from_iterable(map(sample_pieces, sources)), found, partial)
        else:
            shutil.copyfile(found.model_file, partial)
        danube3.sync(partial)
        partial.replace(path)
    return danube3.Tokenizer(path)


# ---------------------------------------------------------------------------------------------------------- the whole
def begin_or_go_on(partial: Path, state: dict[str, object]) -> None:
    """Begin the folder that is to become --out, or see that it was begun with the same inputs and settings."""
    path = partial / "spool" / "state.json"
    if path.is_file():
        begun = danube3.read_json(path)
        if changed := sorted(key for key in {*state, *begun} if state.get(key) != begun.get(key)):
            raise DanubeError(f"{partial} was begun with another {', another '.join(changed)}: give the same command "
                              "again to go on, or remove that folder to begin anew")
    elif not (partial / "meta.json").is_file():  # else there was only the last renaming left to do
        shutil.rmtree(partial / "spool", ignore_errors=True)
        for leftover in partial.iterdir():
            leftover.unlink()
        path.parent.mkdir()
        write_whole(path, json.dumps(state).encode())


def write_all(partial: Path, sources: list[Source], found: danube3.Tokenizer | int, args: argparse.Namespace) -> None:
    """Tokenizer, spool files, shards, and last of all meta.json; each only if it is not there yet."""
    with worker_pool(args.workers) as pool:
        tokenizer = provide_tokenizer(found, sources, partial / "tokenizer.model")
        spools = [spool_source(source, partial / "spool", pool, args.workers) for source in sources]
    results = {source.name: write_source(partial, source, paths, args.val, args.shard_tokens)
               for source, paths in zip(sources, spools)}
    meta = {"sources": {name: counts for name, (counts, _) in results.items()}, "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256, "read": {name: read for name, (_, read) in results.items()}}
    write_whole(partial / "meta.json", f"{json.dumps(meta, indent=2)}\n".encode())


@contextlib.contextmanager
def locked_patiently(folder: Path) -> Iterator[None]:
    """As danube3.locked, but wait two seconds: the workers of a command that was killed hold the lock for a moment."""
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            with contextlib.suppress(DanubeError):
                stack.enter_context(danube3.locked(folder))
                break
            time.sleep(0.05)
        else:
            stack.enter_context(danube3.locked(folder))
        yield


def prepare(sources: list[Source], args: argparse.Namespace) -> None:
    """Write the data folder args.out, or go on writing it."""
    partial = args.out.with_name(f"{args.out.name}.partial")
    found = args.tokenizer if isinstance(args.tokenizer, int) else find_tokenizer(args.tokenizer)
    state = {"--tokenizer": found if isinstance(found, int) else found.sha256, "--val": args.val,
             "--shard-tokens": args.shard_tokens, "--tokens": args.tokens, "--text-field": args.text_field,
             "batch size": BATCH_BYTES, **{f"source {source.name}": source.identity() for source in sources}}
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with locked_patiently(partial):
            begin_or_go_on(partial, state)
            if not (partial / "meta.json").is_file():
                write_all(partial, sources, found, args)
            shutil.rmtree(partial / "spool", ignore_errors=True)
            danube3.write_checksums(partial)
            partial.rename(args.out)
            danube3.sync(args.out.parent)
    except KeyboardInterrupt as error:
        raise DanubeError(f"interrupted: the same command goes on with what is in {partial}") from error
    except BrokenProcessPool as error:
        raise DanubeError("one of the processes was killed (memory?): the same command goes on, perhaps with fewer "
                          "--workers") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DanubeError(f"the disk is full ({error}): what {partial} holds so far is valid; make room, and the "
                              "same command goes on") from error
        raise


def report(out: Path, sources: list[Source]) -> None:
    meta = danube3.read_json(out / "meta.json")
    print(f"{'source':16}{'documents':>14}{'duplicates':>14}{'train tokens':>18}{'val tokens':>16}{'shards':>8}")
    for source in sources:
        counts, read = meta["sources"][source.name], meta["read"][source.name]
        train, val = sum(counts["train"]), sum(counts["val"])
        print(f"{source.name:16}{read['documents']:>14,}{read['duplicates']:>14,}{train:>18,}{val:>16,}"
              f"{len(counts['train']) + len(counts['val']):>8,}")
        if source.tokens and train + val < source.tokens:
            print(f"  fewer than the {source.tokens:,} planned: training will read some of them more than once")
    print(f"try: python train.py --config 500m --data {out}")


def tokens_needed(total: int, fraction: float) -> dict[str, int]:
    """Tokens of each source that the three stages read in a run of `total`, and what goes to validation besides."""
    stages = danube3.TRAIN_CONFIGS["500m"].with_tokens(total).stages
    needed = {name: sum(stage.tokens * stage.mixture[name] / sum(stage.mixture.values()) for stage in stages)
              for name in danube3.SOURCES}
    return {name: math.ceil(tokens / (1 - fraction)) for name, tokens in needed.items()}


def fraction(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no fraction between 0 and 1")


def tokenizer_choice(text: str) -> str | int:
    """train:VOCAB as a number, anything else as it is."""
    if not text.startswith("train:"):
        return text
    vocab = text.removeprefix("train:")
    if not re.fullmatch(r"[1-9]\d{0,4}", vocab, re.ASCII) or int(vocab) > 2 ** 16:
        raise argparse.ArgumentTypeError(f"{text!r} does not name a number of pieces up to 65,536")
    return int(vocab)


def arguments() -> argparse.Namespace:
    parser, count = Arguments(__doc__.splitlines()[0]), positive
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("inputs", nargs="*", metavar="SOURCE=PATTERN",
                        help=f"a file, folder, glob or hub:owner/name[:config[:split]]; files: {' '.join(SUFFIXES)}")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--tokenizer", type=tokenizer_choice, required=True,
                        help="a tokenizer.model, a folder with one, mistral (from the package mistral-common), or "
                        "train:VOCAB to train one of VOCAB pieces on the sources")
    parser.add_argument("--open", action="store_true", help="take open data sets from the Hub for all six sources")
    parser.add_argument("--tokens", type=token_count, help="with --open: tokens of the run to prepare for")
    parser.add_argument("--val", type=fraction, default=0.005, help="the part of the documents kept for validation")
    parser.add_argument("--shard-tokens", type=count, default=2 ** 27, help="tokens of a shard, about")
    parser.add_argument("--workers", type=count, default=cores, help="processes")
    parser.add_argument("--text-field", default="text", help="where a JSON object or a row has its text")
    args = parser.parse_args()
    if args.open == bool(args.inputs) or args.open != bool(args.tokens):
        parser.error("give inputs as SOURCE=PATTERN, or --open and --tokens")
    for text in args.inputs:
        if not re.fullmatch(r"[a-z0-9_-]+=(hub:[^:]+(:[^:]*(:[^:]+)?)?|(?!hub:).+)", text, re.DOTALL):
            parser.error(f"{text!r} is not SOURCE=PATTERN, the source in small letters, digits, - and _, the pattern "
                         "a file, a folder, a glob or hub:owner/name[:config[:split]]")
    return args


def main() -> None:
    args = arguments()
    if args.out.exists():
        raise DanubeError(f"{args.out} already exists: remove it first, or choose another --out")
    patterns = {name: [pattern] for name, pattern in OPEN.items()} if args.open else {}
    for name, _, pattern in (text.partition("=") for text in args.inputs):
        patterns.setdefault(name, []).append(pattern)
    needed = tokens_needed(args.tokens, args.val) if args.open else {}
    sources = [Source(name, places, args.text_field, needed.get(name)) for name, places in patterns.items()]
    prepare(sources, args)
    report(args.out, sources)


if __name__ == "__main__":
    run_command(main)
