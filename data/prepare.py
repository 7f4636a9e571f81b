"""Text to token shards: `python data/prepare.py --out data/mine --tokenizer mistral web=texts other=o.jsonl`

A source is given as name=PATTERN, once for each of its places: a file, a folder with all below it, a glob,
or hub:owner/name[:config[:split]], a data set that is streamed. Threads encode its documents (texts and
conversations). The ids are appended to one file, an entry per document to another (the **spool**). Each
shard then collects a range of digests, sorted.

A **digest** is a hash of a document's text. Sorting by digest shuffles, whatever the order of inputs. Equal
documents meet, so duplicates can go. The second half of a digest decides if its document is for validation.
A killed command can be given again: it goes on after the last entry. Memory holds batches and one shard."""

import argparse
import errno
import glob
import hashlib
import heapq
import importlib.resources
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python data/prepare.py` finds danube3
import danube3  # noqa: E402
from danube3 import CHAT_MARKERS, DanubeError, Tokenizer, require  # noqa: E402
from data import cli, read, toy  # noqa: E402

OPEN = {  # [ours] in place of the report's six sources, whose texts are not published
    "web": "hub:HuggingFaceFW/fineweb",
    "wikipedia": "hub:wikimedia/wikipedia:20231101.en",
    "academic": "hub:common-pile/peS2o_filtered",
    "synthetic": "hub:HuggingFaceTB/smollm-corpus:cosmopedia-v2",
    "instruct": "hub:HuggingFaceTB/smoltalk:all",
    "other": "hub:common-pile/project_gutenberg_filtered",
}
TEXTS = (".txt", ".md", ".rst", ".html", ".py", ".txt.gz")  # one document per file
DOCUMENT_BYTES = 2**20  # [ours] a longer text becomes several documents
BATCH_BYTES = 4 * 2**20  # [ours] of text are encoded in one call
SAMPLE_BYTES, SAMPLE_PIECES, SAMPLE_READ = 10_000, 1_000, 100_000  # [ours] see sample_pieces
BINS = 2**16  # equal parts of the range of digests; a shard has one or several

Document = tuple[bytes, list[bytes]]  # digest; texts, each of which ends with </s>
ENTRY = np.dtype([(name, "<u8") for name in ("high", "low", "start", "length")])  # digest; place of the ids

# ---- Reading

def cut(file: BinaryIO, most: int) -> Iterator[bytes]:
    """Parts of at most so many bytes, cut at line ends, or in a very long line between two characters."""
    block = file.read(most + 1)
    while len(block) > most:
        end = block.rfind(b"\n", 0, most) + 1 or most
        while end > most - 4 and block[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        yield block[:end]
        block = block[end:] + file.read(most + 1 + end - len(block))
    yield block

def text_rows(file: Any, name: str, field: str) -> read.Rows:
    """The parts of a text, each with its place."""
    number = 1
    for part in cut(file, DOCUMENT_BYTES):
        try:
            yield f"{name}, line {number}", {field: part.decode("utf-8-sig").replace("\r\n", "\n")}
        except UnicodeDecodeError as error:
            number += part.count(b"\n", 0, error.start)
            raise DanubeError(f"{name}, line {number}, is not UTF-8 text: convert the file") from error
        number += part.count(b"\n")

def documents_of(row: Any, field: str, most: int) -> Iterator[Document]:
    """The text of a row, in parts of at most so many bytes, or its conversation. DanubeError: neither."""
    require(isinstance(row, dict), "it is no JSON object: write one object per line")
    text = row.get(field)
    if isinstance(text, str) and text.strip():
        for part in cut(io.BytesIO(text.encode("utf-8", "replace")), most):  # bad Unicode: "?"
            if part.strip():
                yield hashlib.blake2b(part, digest_size=16).digest(), [part]
    else:
        found = {str: "empty", type(None): "missing"}.get(type(text), type(text).__name__)
        is_chat = any(row.get(column) is not None for column in read.FORMATS)
        require(is_chat, f'"{field}" is {found}: name the field with --text-field')
        messages = read.check_turns(read.messages_of(row), fold_system=True)
        turns = [(turn["role"], turn["content"]) for turn in messages]
        texts = [(CHAT_MARKERS[role] + content).encode("utf-8", "replace") for role, content in turns]
        yield hashlib.blake2b(json.dumps(turns).encode(), digest_size=16).digest(), texts

class Source:
    """A name, inputs, and how many tokens are wanted (None: all)."""
    def __init__(self, name: str, field: str, tokens: int | None = None):
        self.name, self.field, self.tokens = name, field, tokens
        self.inputs: list[list] = []  # name of a file, size and time of change; or hub:.., 0, 0
        self.skipped, self.left_out, self.reason = 0, 0, ""

    def add(self, pattern: str) -> None:
        """Add inputs. In folders hidden files and those of an unknown kind are skipped."""
        if pattern.startswith("hub:"):
            self.inputs.append([pattern, 0, 0])
            return
        places = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        require(any(map(os.path.exists, places)), f"{pattern}: no such file")
        for place in map(Path, places):
            for path in filter(Path.is_file, [place, *sorted(place.rglob("*"))]):
                known = path.name.lower().endswith(TEXTS) or read.table_suffix(path)
                kinds = " ".join((*TEXTS, *read.TABLES))
                require(known or path != place, f"{path} is of an unknown kind: use {kinds}")
                if known and not any(part.startswith(".") for part in path.relative_to(place).parts):
                    self.inputs.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
                else:
                    self.skipped += 1

    def rows(self) -> read.Rows:
        for name, _, _ in self.inputs:
            if name.startswith("hub:"):
                yield from read.data_set_rows(name, *name.removeprefix("hub:").split(":"))
            elif read.table_suffix(name):
                yield from read.table_rows(name)
            else:
                with read.open_file(Path(name)) as file:
                    yield from text_rows(file, name, self.field)

    def documents(self, most: int) -> Iterator[Document]:
        """All documents, of at most so many bytes. Rows that have none are left out and counted."""
        self.left_out = 0
        for place, row in self.rows():
            try:
                yield from documents_of(row, self.field, most)
            except DanubeError as error:
                self.left_out += 1
                self.reason = self.reason or f", the first: {place}: {error}"

# ---- Spool and shards

def encode(documents: list[Document], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Entries and ids. A document is <s> text </s>, or <s> message </s> message </s> .."""
    flat = [text for _, texts in documents for text in texts]
    # One call for all: Python runs other threads meanwhile. No text becomes a special token.
    encoded = iter(tokenizer.sp.encode(flat, num_threads=1, out_type="numpy"))
    entries, ids = np.zeros(len(documents), ENTRY), [np.array([], "<u2")]
    for i, (digest, texts) in enumerate(documents):
        parts = [np.array([1])]
        for part in itertools.islice(encoded, len(texts)):
            parts += [part, np.array([2])]
        ids.append(np.concatenate(parts).astype("<u2"))
        entries[i] = (*np.frombuffer(digest, "<u8"), 0, len(ids[-1]))
    return entries, np.concatenate(ids)

def encode_all(documents: Iterator[Document], tokenizer: Tokenizer, workers: int) -> Iterator[tuple]:
    """Entries and ids of batches, in order. Threads are up to 2 * workers batches ahead."""
    begun, batch, size = [], [], 0
    with ThreadPoolExecutor(workers) as pool:
        for document in documents:
            batch.append(document)
            size += 200 + sum(map(len, document[1]))  # a short document needs memory too
            if size >= BATCH_BYTES:
                begun.append(pool.submit(encode, batch, tokenizer))
                batch, size = [], 0
            if len(begun) > 2 * workers:
                yield begun.pop(0).result()
        begun.append(pool.submit(encode, batch, tokenizer))
        for job in begun:
            yield job.result()

def spool(source: Source, folder: Path, tokenizer: Tokenizer, workers: int) -> Path:
    """Write <source>.ids, and <source>.partial, which becomes <source>.entries. -> the path of the latter"""
    finished, partial = folder / f"{source.name}.entries", folder / f"{source.name}.partial"
    if finished.is_file():
        return finished
    bar = tqdm(None, source.name, source.tokens, leave=False, unit="token", unit_scale=True, disable=None)
    with bar, open(partial, "ab") as entry_file, open(folder / f"{source.name}.ids", "ab") as id_file:
        count, size = partial.stat().st_size // ENTRY.itemsize, ENTRY.itemsize
        last = np.fromfile(partial, ENTRY, 1, offset=max(0, count - 1) * size)  # none, or one
        tokens = int((last["start"] + last["length"]).sum())
        entry_file.truncate(count * size)  # drop half an entry, and ids without one
        id_file.truncate(2 * tokens)
        documents = itertools.islice(source.documents(DOCUMENT_BYTES), count, None)
        for entries, ids in encode_all(documents, tokenizer, workers):
            entries["start"] = tokens + np.cumsum(entries["length"]) - entries["length"]
            tokens += len(ids)
            entries = entries[entries["start"] < (source.tokens or 2**63)]  # no document begins later
            for file, array in ((id_file, ids), (entry_file, entries)):  # an entry comes after its ids
                file.write(array)
                file.flush()
                os.fsync(file.fileno())
            bar.update(tokens - bar.n)
            if source.tokens and tokens >= source.tokens:
                break
    notes = f"{source.skipped:,} files skipped, {source.left_out:,} rows without text left out{source.reason}"
    require(partial.stat().st_size, f"source {source.name!r} has no documents: {notes}")
    print(f"{source.name}: {notes}")
    partial.replace(finished)
    return finished

def write_whole(path: Path, content: Any) -> None:  # bytes or an array
    """Write a file under a temporary name. It gets its own when it is whole and on disk."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    danube3.sync(partial)
    partial.replace(path)

def select(entries: np.ndarray, split: str, threshold: int, first: int = 0, end: int = BINS) -> Iterator[Any]:
    """The entries of a split in a range of bins, and their bins, from a million documents at a time."""
    for start in range(0, len(entries), 2**20):
        part = entries[start:start + 2**20]
        bins = (part["high"] >> 48).astype(np.int64)
        mine = (part["low"] < np.uint64(threshold)) == (split == "val")
        mine &= (first <= bins) & (bins < end)
        yield part[mine], bins[mine]

def write_shards(folder: Path, name: str, path: Path, args: argparse.Namespace) -> tuple[dict, dict]:
    """Write the missing shards of a source. Validation gets the documents with a second half of the digest
    below a threshold: args.val of them, but one at least, and not all. -> tokens of shards; documents"""
    entries, ids = np.memmap(path, ENTRY, "r"), np.asarray(np.memmap(path.with_suffix(".ids"), "<u2", "r"))
    lowest, highest, kept = int(entries["low"].min()), int(entries["low"].max()), 0
    require(lowest < highest, f"source {name!r} has only one document: add one, to train on and to validate")
    threshold = min(max(int(args.val * 2**64), lowest + 1), highest)
    counts: dict[str, list[int]] = {"train": [], "val": []}
    for split, sizes in counts.items():
        tokens = np.zeros(BINS)
        for part, bins in select(entries, split, threshold):
            tokens += np.bincount(bins, part["length"], minlength=BINS)
        ends, cuts = np.append(0, np.cumsum(tokens)), [0]
        while ends[cuts[-1]] < ends[-1]:
            cuts.append(min(BINS, int(np.searchsorted(ends, ends[cuts[-1]] + args.shard_tokens))))
        for first, end in tqdm([*zip(cuts, cuts[1:])], f"{name}-{split}", leave=False, disable=None):
            shard = folder / f"{name}-{split}-{len(sizes):05d}.bin"
            if not shard.is_file():
                chosen = np.concatenate([part for part, _ in select(entries, split, threshold, first, end)])
                chosen = chosen[np.lexsort((chosen["low"], chosen["high"]))]
                digests = chosen[["high", "low"]]
                places = chosen[["start", "length"]][np.append(True, digests[1:] != digests[:-1])].tolist()
                write_whole(shard, np.concatenate([ids[start:start + length] for start, length in places]))
            written = np.memmap(shard, "<u2", "r")
            sizes.append(len(written))
            kept += int((written == 1).sum())  # <s>: one per document
    return counts, {"documents": len(entries), "duplicates": len(entries) - kept}

def find_tokenizer(name: str, sources: dict[str, Source], work: Path) -> Tokenizer:
    """The tokenizer that --tokenizer names, or one trained on a sample of the sources."""
    path = Path(name, "tokenizer.model") if Path(name).is_dir() else Path(name)
    if name.startswith("train:"):
        texts, path = [], work / "trained.model"
        for source in sources.values():
            first = itertools.islice(source.documents(SAMPLE_BYTES), SAMPLE_READ)
            for _, parts in heapq.nsmallest(SAMPLE_PIECES, first):
                texts.append(b"\n".join(parts).decode())
        toy.train_tokenizer(texts, int(name.removeprefix("train:")), path)
    if name == "mistral":
        found = importlib.util.find_spec("mistral_common")
        require(found, "--tokenizer mistral needs the package mistral-common: pip install mistral-common")
        path = Path(str(importlib.resources.files("mistral_common")), "data", "tokenizer.model.v1")
    tokenizer = Tokenizer(path)
    size, special = tokenizer.vocab_size, (tokenizer.sp.bos_id(), tokenizer.sp.eos_id())
    require(size <= 2**16, f"{path} has {size:,} pieces: use one of at most 65,536")
    require(special == (1, 2), f"{path} does not have <s> and </s> as ids 1 and 2: use another tokenizer")
    return tokenizer

# ---- The command

def prepare(sources: dict[str, Source], args: argparse.Namespace) -> None:
    """Write the folder --out, each of its files only if it is missing."""
    partial = args.out.with_name(f"{args.out.name}.partial")
    work, model, meta = partial / "spool", partial / "tokenizer.model", partial / "meta.json"
    state = {f"source {name}": source.inputs for name, source in sources.items()}
    for name in ("tokenizer", "val", "tokens", "shard_tokens", "text_field"):
        state[f"--{name.replace('_', '-')}"] = getattr(args, name)
    partial.mkdir(parents=True, exist_ok=True)
    with danube3.locked(partial):
        work.mkdir(exist_ok=True)
        begun = danube3.read_json(work / "state.json")
        changed = [key for key in sorted({*state, *begun}) if state.get(key) != begun.get(key)]
        require(not begun or not changed, f"{partial} was begun with another "
                f"{', another '.join(changed)}: give the same command, or remove that folder")
        if not meta.is_file():  # else only checksums and the last name are missing
            if not begun:
                write_whole(model, find_tokenizer(args.tokenizer, sources, work).content)
                write_whole(work / "state.json", json.dumps(state).encode())
            tokenizer, counts, numbers = Tokenizer(model), {}, {}
            for name, source in sources.items():
                entries = spool(source, work, tokenizer, args.workers)
                counts[name], numbers[name] = write_shards(partial, name, entries, args)
            content = {"sources": counts, "vocab_size": tokenizer.vocab_size,
                       "tokenizer_sha256": tokenizer.sha256, "read": numbers}
            write_whole(meta, f"{json.dumps(content, indent=2)}\n".encode())
        danube3.write_checksums(partial)
        shutil.rmtree(work, ignore_errors=True)
        partial.rename(args.out)
        danube3.sync(args.out.parent)

def tokens_needed(total: int, fraction: float) -> dict[str, int]:
    """Tokens of each source that a run of `total` reads, and a fraction for validation besides. A million at
    least, for several documents."""
    needed: dict[str, float] = dict.fromkeys(danube3.SOURCES, 0.0)
    for stage in danube3.TRAIN_CONFIGS["500m"].with_tokens(total).stages:
        for name, weight in stage.mixture.items():
            needed[name] += stage.tokens * weight / sum(stage.mixture.values())
    return {name: max(2**20, int(tokens / (1 - fraction)) + 1) for name, tokens in needed.items()}

def report(args: argparse.Namespace) -> None:
    """Print what was written, and a command that trains on it, or else what it lacks."""
    meta, folder, total = danube3.read_json(args.out / "meta.json"), shlex.quote(str(args.out)), 0
    print("source               documents    duplicates      train tokens      val tokens  shards")
    for name, counts in meta["sources"].items():
        train, val, shards = sum(counts["train"]), sum(counts["val"]), len(counts["train"] + counts["val"])
        documents, duplicates = meta["read"][name].values()
        total += train
        print(f"{name:16}{documents:>14,}{duplicates:>14,}{train:>18,}{val:>16,}{shards:>8,}")
    tokens, names = args.tokens or total, ["60m"]
    if tokens > sum(stage.tokens for stage in danube3.TRAIN_CONFIGS["60m"].stages):  # of a whole run [ours]
        names.insert(0, "500m")
    if meta["vocab_size"] <= danube3.CONFIGS["toy"].vocab_size:
        names.append("toy")
    for config in names:  # the first one that it fits
        training = danube3.TRAIN_CONFIGS[config]
        number = cli.short_count(max(tokens, training.tokens_per_step))
        try:
            data = read.TokenData(args.out, danube3.CONFIGS[config], training.sequence_length)
            danube3.StagedData(data, training.with_tokens(cli.token_count(number)))
            hint = f"try: python train.py --config {config} --data {folder} --tokens {number}"
            break
        except DanubeError as error:
            hint = f"train.py needs more: {error}"
    print(hint)

def arguments() -> argparse.Namespace:
    parser, count = cli.Arguments((__doc__ or "").splitlines()[0]), cli.positive
    parser.add_argument("inputs", nargs="*", metavar="SOURCE=PATTERN", help="a file, folder, glob or hub:..")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--tokenizer", required=True, help="a file, a folder, mistral, or train:VOCAB")
    parser.add_argument("--open", action="store_true", help="take open data sets for all six sources")
    parser.add_argument("--tokens", type=cli.token_count, help="with --open: tokens of the later run")
    parser.add_argument("--val", type=float, default=0.005, help="the part of documents for validation")
    parser.add_argument("--shard-tokens", type=count, default=2**27, help="tokens of a shard, about")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="threads")
    parser.add_argument("--text-field", default="text", help="where a JSON object or a row has its text")
    args = parser.parse_args()
    require(args.open != bool(args.inputs) and args.open == bool(args.tokens),
            "give inputs as SOURCE=PATTERN, or --open and --tokens")
    require(0 < args.val < 1, f"--val {args.val} is no fraction between 0 and 1")
    vocab = re.fullmatch(r"(?!train:).*|train:([1-9]\d{0,4})", args.tokenizer, re.ASCII)
    require(vocab and int(vocab[1] or 1) <= 2**16, f"{args.tokenizer!r}: use train:1 to train:65536")
    for text in args.inputs:
        valid = re.fullmatch(r"[a-z0-9_-]+=(hub:[^:]+(:[^:]*(:[^:]+)?)?|(?!hub:).+)", text, re.DOTALL)
        require(valid, f"{text!r} is not SOURCE=PATTERN, the source in small letters, digits, - and _")
    require(not args.out.exists(), f"{args.out} already exists: remove it, or choose another --out")
    return args

def main() -> None:
    args = arguments()
    sources: dict[str, Source] = {}
    needed = tokens_needed(args.tokens, args.val) if args.open else {}
    for text in args.inputs or map("=".join, OPEN.items()):
        name, _, pattern = text.partition("=")
        sources.setdefault(name, Source(name, args.text_field, needed.get(name))).add(pattern)
    try:
        prepare(sources, args)
    except KeyboardInterrupt as error:
        raise DanubeError("interrupted: the same command goes on") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        require(not full, f"the disk is full ({error}): make room, and the same command goes on")
        raise
    report(args)

if __name__ == "__main__":
    cli.run_command(main)
