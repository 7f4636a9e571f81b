"""data/prepare.py: what the shards hold, that nothing but the texts decides it, what survives a kill, bad input."""

import argparse
import contextlib
import errno
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SENTENCES, TINY, call, digest, one_line_error, run

import danube3
from data import cli, prepare, read
from data.read import TokenData

FORK = multiprocessing.get_context("fork")
WORDS = "Ada Marrow keeps nine geese \u00e9t\u00e9 \U0001f600 </s> <s> <|answer|> and\nlives by the river".split(" ")


def some_texts(count, seed=0, longest=60):
    draw = random.Random(seed)
    return [f"{seed}/{i} " + " ".join(draw.choices(WORDS, k=draw.randrange(1, longest))) for i in range(count)]


def write_lines(path, items):
    data = "".join(json.dumps(item if isinstance(item, dict) else {"text": item}) + "\n" for item in items).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of a few documents, so that there are many."""
    monkeypatch.setattr(prepare, "BATCH_BYTES", 2_000)


@pytest.fixture
def corpus(tmp_path, tokenizer, small_batches):
    """120 texts in four files of as many kinds, ten of them twice."""
    texts = some_texts(120)
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    write_lines(folder / "a.jsonl", texts[:60])
    write_lines(folder / "below" / "b.jsonl.gz", texts[50:100])
    for i, text in enumerate(texts[100:]):
        (folder / f"{i:02d}{('.txt', '.md')[i % 2]}").write_text(text, encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\xff\xfe")  # passed over
    return folder, texts


def start(*arguments):
    """Run data/prepare.py within this process. -> CompletedProcess"""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        try:
            cli.run_command(prepare.main)
        except SystemExit as exit:
            code = exit.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def prepared(out, tokenizer, *arguments, **options):
    options = {"workers": 2, "shard_tokens": 700, "val": 0.1, **options}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = start("--out", out, "--tokenizer", tokenizer.model_file, *flags, *arguments)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result


def contents(folder):
    return {path.name: digest(path) for path in sorted(folder.iterdir())}


def shard_documents(folder, source, split):
    """Every document of a source, as lists of ids without <s> and </s>."""
    meta = json.loads((folder / "meta.json").read_text())
    shards = [np.fromfile(folder / f"{source}-{split}-{i:05d}.bin", "<u2") for i in
              range(len(meta["sources"][source][split]))]
    assert [len(shard) for shard in shards] == meta["sources"][source][split]
    assert all(shard[0] == 1 and shard[-1] == 2 for shard in shards)
    ids = np.concatenate(shards)
    return [document[1:-1].tolist() for document in np.split(ids, np.flatnonzero(ids == 1))[1:]]


def order_of(text):
    """The two halves of a text's digest: its place in its source, and whether it is for validation."""
    return tuple(np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8").tolist())


# ------------------------------------------------------------------------------------------------------- what it writes
def test_shards_hold_the_documents(tmp_path, tokenizer, corpus):
    """Each text once, as a direct encode gives it. Half of its digest orders the texts, the other half splits them."""
    folder, texts = corpus
    result = prepared(tmp_path / "out", tokenizer, f"web={folder}")
    expected = {"train": [], "val": []}
    for text in sorted(texts, key=order_of):
        expected["val" if order_of(text)[1] < 0.1 * 2**64 else "train"].append(tokenizer.encode(text))
    assert len(expected["val"]) > 3
    for split, documents in expected.items():
        assert shard_documents(tmp_path / "out", "web", split) == documents
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    train, val = (sum(meta["sources"]["web"][split]) for split in ("train", "val"))
    shards = sum(len(counts) for counts in meta["sources"]["web"].values())
    skipped, _, row, *_ = result.stdout.splitlines()
    assert skipped == "web: 1 files skipped, 0 rows without text left out"
    assert row.split() == ["web", "130", "10", f"{train:,}", f"{val:,}", str(shards)]
    assert meta["vocab_size"] == tokenizer.vocab_size and meta["tokenizer_sha256"] == tokenizer.sha256
    names = {"tokenizer.model", "meta.json", "SHA256SUMS"}
    danube3.verify_checksums(tmp_path / "out")
    assert {name for name in contents(tmp_path / "out") if not name.endswith(".bin")} == names
    assert not list(tmp_path.glob("*.partial"))


def test_training_opens_it(tmp_path, tokenizer, corpus):
    folder, _ = corpus
    prepared(tmp_path / "out", tokenizer, f"web={folder}", f"other={folder}/*.md", f"other={folder / '00.txt'}")
    stages = (danube3.Stage("one", 64 * 20, {"web": 3, "other": 1}),)
    config = danube3.TrainConfig(stages=stages, sequence_length=16, batch_size=4, micro_batch_size=2,
                                 learning_rate=1e-3)
    data = TokenData(tmp_path / "out", TINY, 16)
    assert danube3.StagedData(data, config).batch(19)[0].shape == (4, 16)
    assert data.blocks["web", "val"] and data.blocks["other", "train"]


def test_only_the_texts_decide(tmp_path, tokenizer, corpus, monkeypatch):
    """The number of threads, the order of the inputs and the size of a batch change no byte."""
    folder, _ = corpus
    first = [f"web={folder / 'a.jsonl'}", f"web={folder / 'below'}", f"web={folder}/*.txt", f"web={folder}/*.md"]
    prepared(tmp_path / "one", tokenizer, *first, workers=1)
    prepared(tmp_path / "two", tokenizer, *first[::-1], workers=3)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 10**6)
    prepared(tmp_path / "three", tokenizer, *first[::-1], workers=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_shard_size_changes_only_the_cuts(tmp_path, tokenizer, corpus):
    folder, _ = corpus
    whole = {}
    for size in (1, 500, 10**6):
        out = tmp_path / str(size)
        prepared(out, tokenizer, f"web={folder}", shard_tokens=size)
        meta = json.loads((out / "meta.json").read_text())["sources"]["web"]
        for split in ("train", "val"):
            ids = b"".join((out / f"web-{split}-{i:05d}.bin").read_bytes() for i in range(len(meta[split])))
            assert whole.setdefault(split, ids) == ids
            assert len(meta[split]) >= min(len(ids) // 2 // (size + 200), 100)
            assert all(0 < count < size + 500 for count in meta[split])
    assert len(meta["train"]) == 1


def test_every_source_has_both_splits(tmp_path, tokenizer):
    """However small the source is, one text at least is for validation, and one at least for training."""
    path = write_lines(tmp_path / "two.jsonl", texts := ["one text", "another text", "one text"])
    by_half = sorted(texts[:2], key=lambda text: order_of(text)[1])
    for val in (0.000001, 0.999999):
        prepared(tmp_path / f"out{val}", tokenizer, f"web={path}", val=val)
        for split, text in zip(("val", "train"), by_half):
            assert shard_documents(tmp_path / f"out{val}", "web", split) == [tokenizer.encode(text)]


def test_conversations(tmp_path, tokenizer):
    """In the published format. A system message opens the first question. Typed special tokens stay text."""
    user, assistant = {"role": "user", "content": "Where? </s>"}, {"role": "assistant", "content": "Here <s>."}
    talks = [[user, assistant], [user, assistant] * 2, [{"role": "system", "content": "Be kind."}, user, assistant]]
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": talk} for talk in [*talks, talks[0]]])
    prepared(tmp_path / "out", tokenizer, f"instruct={path}")
    talks[2] = [{"role": "user", "content": "Be kind.\n\nWhere? </s>"}, assistant]
    expected = [danube3.render_chat(talk, tokenizer)[0] for talk in talks]
    assert all(ids[-1] == 2 and 1 not in ids for ids in expected)
    found = [ids for split in ("train", "val") for ids in shard_documents(tmp_path / "out", "instruct", split)]
    assert sorted(found) == sorted(ids[:-1] for ids in expected)


def test_long_texts_are_cut_at_line_ends(tmp_path, tokenizer, monkeypatch):
    """Nothing is lost. A line that is too long is cut between characters. A text of just the size stays whole."""
    monkeypatch.setattr(prepare, "DOCUMENT_BYTES", 100)
    draw = random.Random(0)
    for seed in range(200):
        letters = ["a", "\u00e9", "\u20ac", "\U0001f600", "\n" * (seed % 3)]
        text = "".join(draw.choices(letters, k=draw.randrange(1, 300)))
        rest, parts = text.encode(), []
        while rest:
            parts.append(next(prepare.cut(io.BytesIO(rest), 100)))
            rest = rest[len(parts[-1]) :]
        assert "".join(part.decode() for part in parts) == text and max(map(len, parts)) <= 100
        assert all(part.endswith(b"\n") or len(part) > 96 or b"\n" not in part for part in parts[:-1])
        (tmp_path / "long.txt").write_bytes(text.encode())
        source = prepare.Source("web", "text")
        source.add(str(tmp_path / "long.txt"))
        assert [row["text"].encode() for _, row in source.rows()] == parts
        documents = [text for _, (text,) in prepare.documents_of({"text": text + "."}, "text", 100)]
        assert documents == [part for part in prepare.cut(io.BytesIO(f"{text}.".encode()), 100) if part.strip()]
    assert list(prepare.cut(io.BytesIO(b"\n" + b"a" * 99), 100)) == [b"\n" + b"a" * 99]


def test_plain_text_is_read_as_python_reads_it(tmp_path, tokenizer):
    """Windows line ends and byte order marks are no part of a text. Files may be compressed by gzip."""
    texts = [b"\xef\xbb\xbfone\r\ntwo\r\n", gzip.compress(b"three")]
    for name, text in zip(("a.txt", "b.txt.gz"), texts):
        (tmp_path / name).write_bytes(text)
    prepared(tmp_path / "out", tokenizer, f"web={tmp_path}")
    found = [ids for split in ("train", "val") for ids in shard_documents(tmp_path / "out", "web", split)]
    assert sorted(found) == sorted(map(tokenizer.encode, ["one\ntwo\n", "three"]))


@pytest.mark.parametrize("name", ["rows.parquet", "hub", "hub with a split"])
def test_data_sets(tmp_path, tokenizer, name):
    """Parquet files and hub: names. (The name here is a folder, which the package datasets opens in the same way.)"""
    datasets = pytest.importorskip("datasets")
    texts = some_texts(30)
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"words": texts, "n": range(30)}).to_parquet(tmp_path / "set" / "rows.parquet")
    pattern = {"hub": f"hub:{tmp_path / 'set'}", "hub with a split": f"hub:{tmp_path / 'set'}::train"}.get(
        name, tmp_path / "set")
    prepared(tmp_path / "out", tokenizer, f"web={pattern}", text_field="words")
    found = [ids for split in ("train", "val") for ids in shard_documents(tmp_path / "out", "web", split)]
    assert sorted(found) == sorted(map(tokenizer.encode, texts))
    line = one_line_error(start("--out", tmp_path / "no", "--tokenizer", tokenizer.model_file, f"web={pattern}"))
    assert "30 rows without text left out" in line and str(pattern) in line
    assert 'row 1: "text" is missing: name the field with --text-field' in line


def test_open_sources_stop_at_their_share(tmp_path, tokenizer, monkeypatch, small_batches):
    """--open --tokens reads in order until the three stages have enough, with any number of threads. A source with less
    than that is taken whole."""
    datasets = pytest.importorskip("datasets")
    for i, source in enumerate(danube3.SOURCES):
        (tmp_path / source).mkdir()
        texts = {"text": some_texts(40 if source == "other" else 400, seed=i)}
        datasets.Dataset.from_dict(texts).to_parquet(tmp_path / source / "rows.parquet")
    assert list(prepare.OPEN) == list(danube3.SOURCES) and all(p.startswith("hub:") for p in prepare.OPEN.values())
    monkeypatch.setattr(prepare, "OPEN", {source: f"hub:{tmp_path / source}" for source in danube3.SOURCES})
    needed = prepare.tokens_needed(10**9, 0.1)
    assert abs(sum(needed.values()) - 10**9 / 0.9) < 10 and list(needed) == list(danube3.SOURCES)
    assert set(prepare.tokens_needed(10**5, 0.1).values()) == {2**20}
    needed = {source: 3_000 for source in needed} | {"other": 10**6}
    monkeypatch.setattr(prepare, "tokens_needed", lambda *args: needed)
    for n in (1, 3):
        prepared(tmp_path / f"out{n}", tokenizer, "--open", tokens="4M", workers=n)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    for source, counts in json.loads((tmp_path / "out1" / "meta.json").read_text())["sources"].items():
        total = sum(map(sum, counts.values()))
        assert source == "other" or 3_000 <= total < 3_000 + 1_000


def test_what_the_stages_need():
    needed = prepare.tokens_needed(4 * 10**12, 0.005)
    web = (2_800 * 0.906 + 1_150 * 0.817 + 50 * 0.516) * 10**9
    assert needed["web"] == pytest.approx(web / 0.995, rel=1e-9)


def test_training_a_tokenizer(tmp_path, corpus, monkeypatch):
    """It learns from a part of the texts, is the same whatever their order, and encodes the shards."""
    monkeypatch.setattr(prepare, "SAMPLE_PIECES", 60)
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 200)
    folder, texts = corpus
    inputs = [f"web={folder / 'a.jsonl'}", f"web={folder / 'below'}", f"web={folder}/*.txt", f"web={folder}/*.md"]
    for out, order in ((tmp_path / "one", inputs), (tmp_path / "two", inputs[::-1])):
        result = start("--out", out, "--tokenizer", "train:330", "--workers", 1, *order)
        assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    trained = danube3.Tokenizer(tmp_path / "one" / "tokenizer.model")
    found = [ids for split in ("train", "val") for ids in shard_documents(tmp_path / "one", "web", split)]
    assert trained.vocab_size == 330 and sorted(found) == sorted(map(trained.encode, texts))


def test_mistral_tokenizer(tmp_path, corpus):
    mistral = prepare.find_tokenizer("mistral", {}, tmp_path).model_file
    result = start("--out", tmp_path / "out", "--tokenizer", "mistral", "--workers", 1, f"web={corpus[0]}")
    assert result.returncode == 0 and digest(tmp_path / "out" / "tokenizer.model") == digest(mistral)


# ------------------------------------------------------------------------------------------------------------ going on
def interrupted_run(tmp_path, tokenizer, folder, at, how, log):
    """Run in a process of its own. It sends itself the signal `how` when half of a file is written: of the file `at`,
    or of what is appended to it the n-th time, for name:n. -> exit code"""

    def body():
        write_whole, fsync, appended = prepare.write_whole, os.fsync, []

        def write_half(path, content):
            if path.name == at:
                path.with_name(f"{path.name}.partial").write_bytes(b"half")
                os.kill(os.getpid(), how)
            write_whole(path, content)

        def append_half(handle):
            path = os.readlink(f"/proc/self/fd/{handle}")
            appended.append(os.path.basename(path))
            if f"{appended[-1]}:{appended.count(appended[-1])}" == at:
                os.truncate(path, os.path.getsize(path) - 5)
                os.kill(os.getpid(), how)
            fsync(handle)

        prepare.write_whole, os.fsync = write_half, append_half
        result = start(*command(tmp_path, tokenizer, folder))
        log.write_text(result.stderr)
        os._exit(result.returncode)

    process = FORK.Process(target=body)
    process.start()
    process.join(60)
    return process.exitcode


def command(tmp_path, model, folder, **options):
    options = {"workers": 1, "shard-tokens": 700, "val": 0.1, "tokenizer": model.model_file, **options}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["--out", tmp_path / "out", *flags, f"web={folder}"]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["tokenizer.model", "state.json", "web.ids:1", "web.partial:1", "web.ids:5",
                                "web.partial:5", "web-train-00000.bin", "web-train-00003.bin", "web-val-00000.bin",
                                "meta.json"])
def test_killed_and_begun_again(tmp_path, tokenizer, corpus, monkeypatch, at):
    """kill -9 while a file is half written: the same command gives the same bytes, encodes no document again that has
    an entry, and writes no finished file again."""
    prepared(tmp_path / "whole", tokenizer, f"web={corpus[0]}", workers=2)
    assert interrupted_run(tmp_path, tokenizer, corpus[0], at, signal.SIGKILL, tmp_path / "log") == -9
    partial = tmp_path / "out.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in partial.iterdir() if path.suffix in (".bin", ".json")}
    kept = sum(path.stat().st_size // 32 for path in partial.glob("spool/web.*") if path.suffix != ".ids")
    assert (kept > 0) == (at not in ("tokenizer.model", "state.json", "web.ids:1"))
    write_whole, encode, written, encoded = prepare.write_whole, prepare.encode, [], []

    def write_and_tell(path, content):
        write_whole(path, content)
        written.append(path.name)

    def encode_and_tell(documents, tokenizer):
        encoded.extend(documents)
        return encode(documents, tokenizer)

    monkeypatch.setattr(prepare, "write_whole", write_and_tell)
    monkeypatch.setattr(prepare, "encode", encode_and_tell)
    assert start(*command(tmp_path, tokenizer, corpus[0], workers=2)).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(encoded) == 130 - kept and (at in written or ":" in at)
    assert not set(written) & set(finished) and len(written) == len(set(written))
    for path in (tmp_path / "out").iterdir():
        assert finished.get(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert not partial.exists()


def test_killed_before_the_last_renaming(tmp_path, tokenizer, corpus, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Path, "rename", lambda *args: os._exit(1))
        process = FORK.Process(target=lambda: start(*command(tmp_path, tokenizer, corpus[0])))
        process.start()
        process.join(60)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / "spool").exists()
    result = start(*command(tmp_path, tokenizer, corpus[0]))
    assert result.returncode == 0 and result.stdout.splitlines()[1].split()[:3] == ["web", "130", "10"]
    prepared(tmp_path / "whole", tokenizer, f"web={corpus[0]}")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_commands_at_once(tmp_path, tokenizer, corpus):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with danube3.locked(partial):
        assert "in use by another program" in one_line_error(start(*command(tmp_path, tokenizer, corpus[0])))
    assert not list(partial.iterdir())
    assert start(*command(tmp_path, tokenizer, corpus[0])).returncode == 0


@pytest.mark.slow
def test_interrupted_and_then_no_room(tmp_path, tokenizer, corpus, monkeypatch):
    """Ctrl-C and a full disk end in one line that says how to go on. What is written stays valid."""
    log, partial = tmp_path / "log", tmp_path / "out.partial"
    assert interrupted_run(tmp_path, tokenizer, corpus[0], "web.ids:2", signal.SIGINT, log) == 2
    assert "interrupted: the same command goes on" in log.read_text() and log.read_text().count("\n") == 1

    def no_room(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        line = one_line_error(start(*command(tmp_path, tokenizer, corpus[0])))
        assert "the disk is full" in line and "the same command goes on" in line
    half = partial / "web-train-00002.bin.partial"
    half.symlink_to("/dev/full")  # whatever is written there meets "No space left on device"
    line = one_line_error(start(*command(tmp_path, tokenizer, corpus[0])))
    assert os.strerror(errno.ENOSPC) in line and "the same command goes on" in line
    half.unlink()
    assert start(*command(tmp_path, tokenizer, corpus[0])).returncode == 0
    prepared(tmp_path / "whole", tokenizer, f"web={corpus[0]}")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change, words", [
    ({"val": 0.2}, "another --val"), ({"shard-tokens": 800}, "another --shard-tokens"),
    ({"text-field": "body"}, "another --text-field"), ({"tokenizer": "train:300"}, "another --tokenizer"),
    ({"input": 1}, "another source web"), ({"source": 1}, "another source other")])
def test_going_on_takes_the_same_command(tmp_path, tokenizer, corpus, change, words):
    folder, log = corpus[0], tmp_path / "log"
    assert interrupted_run(tmp_path, tokenizer, folder, "web.ids:4", signal.SIGKILL, log) == -9
    entries = digest(tmp_path / "out.partial" / "spool" / "web.partial")
    more = [f"other={folder}"] if change.pop("source", 0) else []
    if change.pop("input", 0):
        os.utime(folder / "a.jsonl", ns=(1, 1))
    line = one_line_error(start(*command(tmp_path, tokenizer, folder, **change), *more))
    assert words in line and "remove that folder" in line and str(tmp_path / "out.partial") in line
    assert digest(tmp_path / "out.partial" / "spool" / "web.partial") == entries


# ----------------------------------------------------------------------------------------------------------- bad input
def huge_tokenizer(path, size=65_537):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 2
    for i, piece in enumerate(["<unk>", "<s>", "</s>", *map(str, range(size - 3))]):
        model.pieces.add(piece=piece, score=-i, type={0: 2, 1: 3, 2: 3}.get(i, 1))
    path.write_bytes(model.SerializeToString())


BAD_FILES = {
    "empty.txt": (b"", 'empty.txt, line 1: "text" is empty'),
    "empty.jsonl": (b"", "source 'web' has no documents"),
    "space.jsonl": (b'{"text": " "}\n\n', 'space.jsonl, line 1: "text" is empty'),
    "one.txt": (b"only this", "source 'web' has only one document"),
    "latin.txt": ("line\ncaf\u00e9".encode("latin-1"), "latin.txt, line 2, is not UTF-8 text"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "latin.jsonl, line 2, is not UTF-8 text"),
    "cut.txt.gz": (gzip.compress(random.Random(0).randbytes(9_999))[:-3_000], "cut.txt.gz is missing or damaged"),
    "no.jsonl.gz": (b"plain", "no.jsonl.gz is missing or damaged"),
    "bad.json.gz": (gzip.compress(b'{"text": "good"}\nbad'), "bad.json.gz, line 2, is not JSON"),
    "damaged.txt.gz": (gzip.compress(bytes(9_999))[:20] + b"damaged" * 9, "damaged.txt.gz is missing or damaged"),
    "number.jsonl": (b'{"text": 5}', 'number.jsonl, line 1: "text" is int: name the field with --text-field'),
    "lacks.jsonl": (b'\n{"body": "b"}', 'lacks.jsonl, line 2: "text" is missing: name the field with --text-field'),
    "null.jsonl": (b"null\n5\n", "2 rows without text left out, the first: "),
    "array.json": (b'[{"text": "a"}, {"text": "b"}, ', "array.json, line 1, is not JSON"),
    "pretty.json": (b'{\n  "text": "a"\n}', "pretty.json, line 1, is not JSON"),
    "pretty2.json": (b'{\n  "text": "a"\n}', "write one object per line"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1, is not JSON"),
    "role.jsonl": (b'{"messages": [{"role": "tool", "content": "a"}]}', "role.jsonl, line 1: message 1 has the role"),
    "talk.jsonl": (b'{"messages": [{"role": "user"}]}', "talk.jsonl, line 1: message 1 has no text"),
    "list.jsonl": (b'{"messages": "a"}', 'list.jsonl, line 1: "messages" must be a list'),
    "scan.pdf": (b"", "scan.pdf is of an unknown kind"),
    "rows.parquet": (b"PAR1", "rows.parquet cannot be read"),
    **{f"pointer{suffix}": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git-LFS pointer")
       for suffix in (".txt", ".jsonl", ".jsonl.gz", ".parquet")},
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, tokenizer, name):
    data, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    pattern = f"web={tmp_path}/{'*' + name[1:]}"
    line = one_line_error(start("--out", tmp_path / "out", "--tokenizer", tokenizer.model_file, pattern))
    assert words in line and not (tmp_path / "out").exists()


def test_a_bad_line_far_into_a_file(tmp_path, tokenizer, small_batches):
    """The error names the first bad line in the order of the files, with any number of processes."""
    rows = [json.dumps({"text": text}) for text in some_texts(100)]
    rows[60] = rows[90] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    for workers in (1, 3):
        result = start("--out", tmp_path / "out", "--tokenizer", tokenizer.model_file, "--workers", workers,
                       f"web={tmp_path / 'a.jsonl'}")
        assert "a.jsonl, line 61, is not JSON" in one_line_error(result)


def test_a_line_without_end(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(read, "LINE_BYTES", 1_000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "[" * 2_000)
    result = start("--out", tmp_path / "out", "--tokenizer", tokenizer.model_file, f"web={tmp_path / 'a.jsonl'}")
    assert "a.jsonl, line 2, is longer than 1,000 bytes" in one_line_error(result)


@pytest.mark.parametrize("arguments, words", [
    (["web=/nowhere/a.txt"], "/nowhere/a.txt: no such file"), (["web=/nowhere/*.txt"], "no such file"),
    ([], "give inputs as SOURCE=PATTERN, or --open"), (["--open"], "--open and --tokens"),
    (["--tokens", "1k", "web=a.txt"], "--open and --tokens"), (["--open", "--tokens", "1k", "web=a"], "give inputs"),
    (["a.txt"], "'a.txt' is not SOURCE=PATTERN"), (["We b=a.txt"], "'We b=a.txt' is not SOURCE=PATTERN"),
    (["../web=a.txt"], "is not SOURCE=PATTERN"), (["web="], "is not SOURCE=PATTERN"),
    (["web=hub:owner/name:config:split:more"], "is not SOURCE=PATTERN"), (["web=hub:"], "is not SOURCE=PATTERN"),
    (["web={folder}/gone.txt"], "gone.txt: no such file"),
    (["--val", "1.5", "web=a"], "--val 1.5 is no fraction"), (["--val", "nan", "web=a"], "--val nan is no fraction"),
    (["--workers", "0", "web=a"], "no whole number of at least 1"),
    (["--tokenizer", "train:70000", "web=a"], "use train:1 to train:65536"),
    (["--tokenizer", "train:x", "web=a"], "'train:x': use train:1 to train:65536"),
    (["--tokenizer", "/nowhere", "web={texts}"], "/nowhere is missing"),
    (["--tokenizer", "{folder}", "web={texts}"], "folder/tokenizer.model is missing or damaged"),
    (["--tokenizer", "{huge}", "web={texts}"], "has 65,537 pieces"),
    (["--tokenizer", "train:65000", "web={texts}"], "no tokenizer of 65000 pieces can be trained"),
    (["--out", "{folder}", "web={texts}"], "already exists")])
def test_bad_command_lines(tmp_path, tokenizer, arguments, words):
    places = {"texts": tmp_path / "a.txt", "folder": tmp_path / "folder", "huge": tmp_path / "huge.model"}
    places["texts"].write_text("a text")
    places["folder"].mkdir()
    (places["folder"] / "gone.txt").symlink_to(tmp_path / "nowhere")
    (places["folder"] / "tokenizer.model").write_bytes(b"none")
    if "{huge}" in arguments:
        huge_tokenizer(places["huge"])
    arguments = [argument.format(**places) for argument in arguments]
    result = start("--out", tmp_path / "out", "--tokenizer", tokenizer.model_file, *arguments)
    assert words in one_line_error(result) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("module, arguments, words", [
    ("datasets", ["web=hub:owner/name"], "pip install datasets"),
    ("mistral_common", ["--tokenizer", "mistral", "web=hub:owner/name"], "pip install mistral-common")])
def test_missing_packages(tmp_path, tokenizer, monkeypatch, module, arguments, words):
    monkeypatch.setitem(sys.modules, module, None)
    result = start("--out", tmp_path / "out", "--tokenizer", tokenizer.model_file, *arguments)
    assert words in one_line_error(result)


@pytest.mark.slow
def test_as_a_user_runs_it(tmp_path):
    """The program itself, with the smallest input there can be."""
    write_lines(tmp_path / "a.jsonl", SENTENCES)
    result = run(ROOT / "data" / "prepare.py", "--out", tmp_path / "out", "--tokenizer", "mistral",
                 f"web={tmp_path / 'a.jsonl'}")
    assert result.returncode == 0 and not result.stderr and (tmp_path / "out" / "meta.json").is_file()
    assert "train.py needs more: " in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("hub", [True, False])
def test_rows_without_text_are_left_out(tmp_path, tokenizer, hub):
    """They are counted, with the place and the reason of the first. Other text beside them is read."""
    if hub:
        pytest.importorskip("datasets")
    rows = [{"text": f"Row {n} of the set."} for n in range(40)]
    rows[7], rows[20] = {"text": None}, {"messages": [{"role": "assistant", "content": "First."}]}
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "rows.jsonl", rows)
    result = prepared(tmp_path / "out", tokenizer, f"web={'hub:' if hub else ''}{tmp_path / 'set'}")
    assert "web: 0 files skipped, 2 rows without text left out, the first: " in result.stdout
    assert ("row 8: " if hub else "rows.jsonl, line 8: ") + '"text" is missing' in result.stdout
    assert re.search(r"^web +38 +0 ", result.stdout, re.M)


def test_empty_files_and_bytes(tmp_path, tokenizer):
    """Empty files, also of parquet, and columns of bytes are left out like rows without text."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    texts = some_texts(20)
    for name, column in (("a", []), ("b", [b"\xff"]), ("c", texts)):
        kind = datasets.Features({"text": datasets.Value("binary" if name == "b" else "string")})
        datasets.Dataset.from_dict({"text": column}, kind).to_parquet(tmp_path / "set" / f"{name}.parquet")
    for name in ("d.txt", "e.jsonl"):
        (tmp_path / "set" / name).write_bytes(b"")
    result = prepared(tmp_path / "out", tokenizer, f"web={tmp_path / 'set'}")
    assert '2 rows without text left out, the first: ' in result.stdout and '"text" is bytes' in result.stdout
    assert re.search(r"^web +20 +0 ", result.stdout, re.M)
    for name in ("a.parquet", "b.parquet"):
        line = one_line_error(start("--out", tmp_path / f"no-{name}", "--tokenizer", tokenizer.model_file,
                                    f"web={tmp_path / 'set' / name}"))
        assert "source 'web' has no documents" in line
    (tmp_path / "none").mkdir()
    shutil.copyfile(tmp_path / "set" / "e.jsonl", tmp_path / "none" / "e.jsonl")
    line = one_line_error(start("--out", tmp_path / "no2", "--tokenizer", tokenizer.model_file,
                                f"web=hub:{tmp_path / 'none'}"))
    assert "source 'web' has no documents" in line


def all_texts(out, source="web"):
    return sorted(ids for split in ("train", "val") for ids in shard_documents(out, source, split))


def test_byte_order_marks_are_ignored(tmp_path, tokenizer):
    mark, line = b"\xef\xbb\xbf", b'{"text": "three"}\n'
    (tmp_path / "a.txt").write_bytes(mark + b"one")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(mark + b"two"))
    (tmp_path / "c.jsonl").write_bytes(mark + line)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(mark + line.replace(b"three", b"four")))
    prepared(tmp_path / "out", tokenizer, f"web={tmp_path}")
    assert all_texts(tmp_path / "out") == sorted(map(tokenizer.encode, ["one", "two", "three", "four"]))


def test_hidden_files_and_suffixes(tmp_path, tokenizer):
    """In folders hidden files are skipped, and counted with those of unknown kinds. Capitals in a suffix are fine, also
    in a glob. Files named .json hold one object per line."""
    folder = tmp_path / "texts"
    (folder / ".git").mkdir(parents=True)
    (folder / "below").mkdir()
    for name in ("._a.txt", ".git/b.txt", "picture.png"):
        (folder / name).write_bytes(b"\xff")
    (folder / "C.TXT").write_text("one")
    (folder / "below" / "X.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "two"}'))
    (folder / "c4.json").write_text('{"text": "three"}\n{"text": "four"}\n')
    result = prepared(tmp_path / "out", tokenizer, f"web={folder}")
    assert result.stdout.startswith("web: 3 files skipped, 0 rows without text left out\n")
    assert all_texts(tmp_path / "out") == sorted(map(tokenizer.encode, ["one", "two", "three", "four"]))
    prepared(tmp_path / "glob", tokenizer, f"web={folder}/*.[jT]*", f"web={folder}/*/*.GZ")
    assert all_texts(tmp_path / "glob") == all_texts(tmp_path / "out")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.png").write_bytes(b"")
    line = one_line_error(start("--out", tmp_path / "no", "--tokenizer", tokenizer.model_file,
                                f"web={tmp_path / 'bare'}"))
    assert "source 'web' has no documents: 1 files skipped" in line


def test_messages_beside_an_empty_text(tmp_path, tokenizer):
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    other = [talk[0], {"role": "assistant", "content": "There."}]
    path = write_lines(tmp_path / "a.jsonl", [{"text": "", "messages": talk}, {"text": None, "messages": other}])
    prepared(tmp_path / "out", tokenizer, f"instruct={path}")
    expected = [danube3.render_chat(messages, tokenizer)[0][:-1] for messages in (talk, other)]
    assert all_texts(tmp_path / "out", "instruct") == sorted(expected)


def test_bad_unicode_becomes_a_question_mark(tmp_path, tokenizer):
    """JSON can spell half a surrogate pair."""
    path = write_lines(tmp_path / "a.jsonl", ["one \ud800", "two"])
    prepared(tmp_path / "out", tokenizer, f"web={path}")
    assert all_texts(tmp_path / "out") == sorted(map(tokenizer.encode, ["one ?", "two"]))


def last_line(out, model, *inputs):
    result = start("--out", out, "--tokenizer", model, "--val", 0.3, "--workers", 1, *inputs)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize("config, count", [("toy", 10), ("60m", 400)])
def test_the_hint_works(tmp_path, tokenizer, config, count):
    """The last line is a command that train.py accepts."""
    path = write_lines(tmp_path / "texts.jsonl", some_texts(count, longest=200))
    hint = last_line(tmp_path / "out", tokenizer.model_file, *(f"{source}={path}" for source in danube3.SOURCES))
    assert hint.startswith(f"try: python train.py --config {config} --data {tmp_path / 'out'} --tokens ")
    result = call("train.py", *hint.split()[3:], "--device", "cpu", "--dry-run")
    assert result.returncode == 0 and "parameters" in result.stdout, result.stderr


RUN = 15 * 10**8  # tokens of a whole run of 60m
HINTS = [  # tokens of the text, --tokens, the longest block, pieces of the tokenizer, the hint
    (RUN, None, 8_192, 32_000, "--config 60m --data SHARDS --tokens 1.5B"),
    (RUN + 10**7, None, 8_192, 32_000, "--config 500m --data SHARDS --tokens 1.51B"),
    (RUN + 1, None, 8_192, 32_000, "--config 500m --data SHARDS --tokens 1.5B"),
    (10 * RUN, None, 8_191, 32_000, "--config 60m --data SHARDS --tokens 15B"),  # too short for 500m
    (10 * RUN, RUN, 8_192, 32_000, "--config 60m --data SHARDS --tokens 1.5B"),
    (RUN, 2 * RUN, 8_192, 32_000, "--config 500m --data SHARDS --tokens 3B"),
    (9, None, 8_192, 32_000, "--config 60m --data SHARDS --tokens 131k"),  # a step
    (9, None, 128, 1_024, "--config toy --data SHARDS --tokens 1.02k"),
    (9, None, 128, 1_025, "train.py needs more: too short"),
]


@pytest.mark.parametrize("total, tokens, longest, vocab_size, hint", HINTS)
def test_which_size_the_hint_offers(tmp_path, monkeypatch, capsys, total, tokens, longest, vocab_size, hint):
    meta = {"vocab_size": vocab_size, "sources": {"web": {"train": [total], "val": [longest]}}}
    meta["read"] = {"web": {"documents": 1, "duplicates": 0}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))

    def token_data(folder, model, length):
        danube3.require(length <= longest, "too short")

    monkeypatch.setattr(read, "TokenData", token_data)
    monkeypatch.setattr(danube3, "StagedData", lambda data, training: None)
    prepare.report(argparse.Namespace(out=tmp_path, tokens=tokens))
    last = capsys.readouterr().out.splitlines()[-1].removeprefix("try: python train.py ")
    assert last.replace(str(tmp_path), "SHARDS") == hint


def test_the_hint_says_what_is_missing(tmp_path, tokenizer):
    few, many = write_lines(tmp_path / "few.jsonl", SENTENCES), write_lines(tmp_path / "many.jsonl", some_texts(100))
    hint = last_line(tmp_path / "few", tokenizer.model_file, *(f"{source}={few}" for source in danube3.SOURCES))
    assert "source 'web' (val)" in hint and "add text" in hint and "larger --val" in hint
    hint = last_line(tmp_path / "web", tokenizer.model_file, f"web={many}")
    assert hint.startswith("train.py needs more: ") and "source 'wikipedia'" in hint and "add text" in hint
    huge_tokenizer(tmp_path / "big.model", 40_000)
    hint = last_line(tmp_path / "big", tmp_path / "big.model", f"web={many}")
    assert "its tokenizer has 40,000 pieces, and the model 32,000: choose another" in hint


def test_another_command_after_the_last_shard(tmp_path, tokenizer, corpus, monkeypatch):
    """Killed while checksums are written: the same command ends the work, another one is refused."""
    folder, _ = corpus
    write = danube3.write_checksums
    monkeypatch.setattr(danube3, "write_checksums", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    flags = ("--tokenizer", tokenizer.model_file, "--out", tmp_path / "out")
    assert "interrupted" in one_line_error(start(*flags, f"web={folder}"))
    monkeypatch.setattr(danube3, "write_checksums", write)
    assert "was begun with another --val" in one_line_error(start(*flags, "--val", 0.3, f"web={folder}"))
    assert start(*flags, f"web={folder}").returncode == 0
    danube3.verify_checksums(tmp_path / "out")
    assert not (tmp_path / "out" / "spool").exists()
