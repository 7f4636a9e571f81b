"""Token shards and the staged mixture: shares, permutations, stage boundaries, pure functions, damaged files."""

import dataclasses
import json
import os
import random
import resource
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from conftest import SENTENCES, TINY

import danube3
from data import read, toy
from data.read import TokenData

T = 16


def write_data(folder, tokenizer, tokens, shard_tokens=100):
    """A data folder of sources with the given numbers of tokens: documents of random ids."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.model_file.read_bytes())
    counts = {}
    for name, count in tokens.items():

        def documents(seed):
            draw, left = random.Random(f"{seed}{name}"), count
            while left > 0:
                length = min(left - 2, draw.randrange(5, 40)) if left > 7 else left - 2
                length = length if left - length - 2 > 2 or left == length + 2 else left - 2
                yield [draw.randrange(3, TINY.vocab_size) for _ in range(length)]
                left -= length + 2

        counts[name] = {
            split: toy.write_shards(folder, name, split, documents(split), shard_tokens)
            for split in ("train", "val")
        }
        assert sum(counts[name]["train"]) == count
    meta = {"sources": counts, "vocab_size": TINY.vocab_size, "tokenizer_sha256": tokenizer.sha256}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def small_config(**changes):
    stages = (
        danube3.Stage("one", 64 * 37, {"a": 7, "b": 2, "c": 1}),
        danube3.Stage("two", 64 * 20, {"a": 1, "b": 2, "c": 3}),
    )
    config = danube3.TrainConfig(
        stages=stages, sequence_length=T, batch_size=4, micro_batch_size=2, learning_rate=1e-3
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture
def folder(tmp_path, tokenizer):
    return write_data(tmp_path / "data", tokenizer, {"a": 1000, "b": 333, "c": 170})


def staged(folder, config=None):
    return danube3.StagedData(TokenData(folder, TINY, T), config or small_config())


def test_shards_hold_documents(folder):
    meta = json.loads((folder / "meta.json").read_text())
    for name in "abc":
        files = sorted(folder.glob(f"{name}-train-*.bin"))
        shards = [np.fromfile(path, dtype="<u2") for path in files]
        assert [len(s) for s in shards] == meta["sources"][name]["train"] and len(files) > 1
        assert all(s[0] == 1 and s[-1] == 2 for s in shards)  # whole documents
        tokens = np.concatenate(shards)
        assert (tokens == 1).sum() == (tokens == 2).sum() and set(tokens[1:][tokens[:-1] == 2]) == {1}


def test_blocks_run_across_shards(folder):
    data = TokenData(folder, TINY, T)
    tokens = np.concatenate([np.fromfile(path, dtype="<u2") for path in sorted(folder.glob("a-train-*.bin"))])
    assert data.blocks["a", "train"] == 1000 // T
    for i in range(1000 // T):
        assert np.array_equal(data.block("a", "train", i), tokens[i * T : (i + 1) * T])


def test_blocks_are_spread_evenly(folder):
    """From the first to nearly the last, or all of them where there are fewer."""
    data = TokenData(folder, TINY, T)
    total = data.blocks["a", "val"]
    input_ids, labels = data.evenly_spread("a", "val", 3)
    spread = input_ids.numpy()
    assert torch.equal(input_ids, labels)
    assert spread.shape == (3, T) and spread.dtype == np.int64
    assert all(np.array_equal(spread[i], data.block("a", "val", i * total // 3)) for i in range(3))
    assert len(data.evenly_spread("c", "val", 1000)[0]) == data.blocks["c", "val"]


@pytest.mark.parametrize(
    "weights",
    [
        {"web": 906, "b": 20, "c": 20, "d": 24, "e": 15, "f": 15},
        {"a": 1},
        {"a": 1, "b": 0, "c": 2},
        {"a": 333, "b": 333, "c": 334},
        {"a": 1, "b": 1000},
    ],
)
def test_mixture_pattern(weights):
    """One period, which goes on for ever; beside each source, how many of its sequences came before."""
    total, given = sum(weights.values()), Counter()
    pattern = danube3.mixture_pattern(weights)
    names = [name for name, _ in pattern]
    assert len(names) == total and (names * 7)[: 2 * total + 5] == reference.mixture_pattern(weights, 2 * total + 5)
    for name, earlier in pattern:
        assert earlier == given[name]
        given[name] += 1


@pytest.mark.parametrize("seed", [*range(100), *danube3.three_stages(1, 1, 1)])
def test_every_prefix_has_its_shares(seed):
    """Of random mixtures, and of the report's stages."""
    if isinstance(seed, danube3.Stage):
        weights = seed.mixture
    else:
        draw = random.Random(seed)
        weights = {f"s{i}": draw.randrange(1, draw.choice([5, 50, 500])) for i in range(draw.randrange(2, 9))}
    given, total = Counter(), sum(weights.values())
    for t, (name, _) in enumerate(danube3.mixture_pattern(weights), start=1):
        given[name] += 1
        assert all(abs(given[s] - Fraction(t * w, total)) < 1 for s, w in weights.items())


def test_more_shards_than_open_files(tmp_path, tokenizer):
    """As runs of trillions of tokens have. A shard that becomes shorter later on is noticed."""
    folder = write_data(tmp_path / "data", tokenizer, {"a": 600}, shard_tokens=3)
    meta = json.loads((folder / "meta.json").read_text())
    meta["sources"]["a"]["train"] = [1] * 300
    for i in range(300):
        np.array([i + 3], dtype="<u2").tofile(folder / f"a-train-{i:05d}.bin")
    (folder / "meta.json").write_text(json.dumps(meta))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limit[1]))
    try:
        data = TokenData(folder, TINY, 100)
        assert [data.block("a", "train", i).tolist() for i in (0, 2)] == [[*range(3, 103)], [*range(203, 303)]]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    data.shard("a", "train", 1).write_bytes(b"")  # one token less than when it was opened
    with pytest.raises(danube3.DanubeError, match="a-train-00001.bin is damaged: make the data again"):
        data.block("a", "train", 0)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 16, 17, 99, 100, 101, 1000])
def test_permuted_index_is_a_permutation(size):
    order = [danube3.permuted_index(i, size, "0/web/0") for i in range(size)]
    assert sorted(order) == list(range(size))
    if size >= 99:
        again = [danube3.permuted_index(i, size, "0/web/1") for i in range(size)]
        assert sum(a == b for a, b in zip(order, again)) < 10 and order != list(range(size))
        assert abs(np.corrcoef(order, range(size))[0, 1]) < 0.25
        steps = np.diff(order) % size
        assert len(set(steps)) > size / 3  # no fixed stride


def test_batches_are_what_the_brute_force_gives(folder):
    """Sequence by sequence, with counters. A stage begins its own pattern; the blocks of a source go on."""
    config = small_config()
    batches, used = staged(folder, config), Counter()
    step = 0
    for stage, end in zip(config.stages, config.stage_ends):
        names = reference.mixture_pattern(stage.mixture, (end - step) * config.batch_size)
        for s in range(step, end):
            assert batches.stage(s) == stage.name
            for i in range(config.batch_size):
                name = names[(s - step) * config.batch_size + i]
                blocks = batches.data.blocks[name, "train"]
                epoch, place = divmod(used[name], blocks)
                block = danube3.permuted_index(place, blocks, f"{config.seed}/{name}/{epoch}")
                assert batches.locate(s, i) == (name, "train", block)
                assert np.array_equal(batches.batch(s)[0][i], batches.data.block(name, "train", block))
                used[name] += 1
        step = end
    assert step == batches.total_steps and used == batches.used[-1]
    assert used["c"] > 3 * batches.data.blocks["c", "train"]  # epochs end within the run, and across the stages


def test_a_single_source(folder):
    """A mixture of one source reads all its blocks before any of them again."""
    config = small_config(stages=(danube3.Stage("only", 64 * 40, {"a": 5}),))
    batches = staged(folder, config)
    n = batches.data.blocks["a", "train"]
    blocks = [batches.locate(step, i)[2] for step in range(40) for i in range(4)]
    assert blocks[:n] == [danube3.permuted_index(i, n, "0/a/0") for i in range(n)]
    assert blocks[n : 2 * n] == [danube3.permuted_index(i, n, "0/a/1") for i in range(n)]


def test_no_block_repeats_before_all_were_used(folder):
    config = small_config()
    batches, seen = staged(folder, config), {name: [] for name in "abc"}
    for step in range(batches.total_steps):
        for i in range(config.batch_size):
            name, _, block = batches.locate(step, i)
            seen[name].append(block)
    for name, blocks in seen.items():
        n = batches.data.blocks[name, "train"]
        for start in range(0, len(blocks), n):
            epoch = blocks[start : start + n]
            assert len(set(epoch)) == len(epoch)
        assert blocks[:n] != blocks[n : 2 * n] or len(blocks) < 2 * n


def test_a_batch_needs_no_history(folder):
    """Any order of asking, a new object, another micro-batch size: the same batch."""
    one, two = staged(folder), staged(folder, small_config(micro_batch_size=4, save_every=3))
    for step in (50, 3, 36, 37, 3, 56):
        (a, labels), (b, _) = one.batch(step), two.batch(step)
        assert torch.equal(a, b) and torch.equal(a, labels) and a.dtype == torch.int64 and a.shape == (4, T)
    assert not torch.equal(one.batch(3)[0], staged(folder, small_config(seed=1)).batch(3)[0])


def test_each_rank_reads_its_part_of_the_global_batch(folder):
    """Whatever the number of ranks, together they read the same sequences."""
    batches = staged(folder)
    for world_size in (1, 2, 4):
        parts = [batches.batch(5, rank, world_size)[0] for rank in range(world_size)]
        together = torch.empty(4, T, dtype=torch.int64)
        for rank, part in enumerate(parts):
            together[rank::world_size] = part
        assert torch.equal(together, batches.batch(5)[0])


def test_real_training_configs_are_cheap_to_index(folder):
    """The arithmetic of the 4b training config at its far end: no list as long as the run."""
    data = TokenData(folder, TINY, T)
    data.blocks = {(name, split): 10**9 for name in danube3.SOURCES for split in ("train", "val")}
    config = danube3.TRAIN_CONFIGS["4b"]
    batches = danube3.StagedData(data, config)
    assert all(len(pattern) <= 1000 for pattern in batches.patterns)
    share = Counter(batches.locate(batches.total_steps - 1, i)[0] for i in range(config.batch_size))
    assert abs(share["web"] - 0.516 * config.batch_size) < 2
    used = batches.used[-1]
    expected = sum(
        Fraction(stage.mixture["web"], 1000) * (end - start) * config.batch_size
        for stage, start, end in zip(config.stages, [0, *config.stage_ends], config.stage_ends)
    )
    assert abs(used["web"] - expected) < 3 and sum(used.values()) == batches.total_steps * config.batch_size


def damage(folder, how):
    shard, meta = folder / "b-train-00001.bin", json.loads((folder / "meta.json").read_text())
    if how == "missing shard":
        shard.unlink()
    elif how == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-20])
    elif how == "odd shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "foreign ids":
        shard.write_bytes(np.full(shard.stat().st_size // 2, 60_000, dtype="<u2").tobytes())
    elif how == "one id too many":
        shard.write_bytes(np.full(shard.stat().st_size // 2, TINY.vocab_size, dtype="<u2").tobytes())
    elif how == "no meta":
        (folder / "meta.json").unlink()
    elif how == "broken meta":
        (folder / "meta.json").write_text("{")
    elif how == "no source":
        del meta["sources"]["b"]
        (folder / "meta.json").write_text(json.dumps(meta))
    elif how == "other tokenizer":
        other = toy.train_tokenizer(SENTENCES[::2] * 3, 300, folder / "tokenizer.model")
        assert other.sha256 != meta["tokenizer_sha256"]
    elif how == "small vocabulary":
        return dataclasses.replace(TINY, vocab_size=300)
    return TINY


@pytest.mark.parametrize(
    "how, words",
    [
        ("missing shard", "b-train-00001.bin is missing or was cut short: make it again"),
        ("truncated shard", "b-train-00001.bin is missing or was cut short: make it again"),
        ("odd shard", "b-train-00001.bin is missing or was cut short: make it again"),
        ("foreign ids", "b-train-00001.bin is damaged: make the data again"),
        ("one id too many", "b-train-00001.bin is damaged: make the data again"),
        ("no meta", "no data at .*: make it with data/prepare.py"),
        ("broken meta", "meta.json .* damaged .*: copy it again"),
        ("no source", r"source 'b' \(val\) is missing or too short: add text"),
        ("other tokenizer", "made with another tokenizer: choose other data"),
        ("small vocabulary", "its tokenizer has 330 pieces, and the model 300: choose another"),
    ],
)
def test_damaged_data(folder, how, words):
    config = damage(folder, how)
    with pytest.raises(danube3.DanubeError, match=words):
        batches = danube3.StagedData(TokenData(folder, config, T), small_config())
        for step in range(20):
            batches.batch(step)


def test_checksums_of_a_data_folder(folder, monkeypatch):
    """A changed token is noticed, unless its shard is too large to read at the start. Conversations may be edited."""
    (folder / "chat.jsonl").write_text("{}")
    danube3.write_checksums(folder)
    (folder / "chat.jsonl").write_text('{"messages": []}')
    staged(folder)
    shard = folder / "b-train-00001.bin"
    ids = np.fromfile(shard, "<u2")
    ids[5] = 7 if ids[5] != 7 else 8
    shard.write_bytes(ids.tobytes())
    with pytest.raises(danube3.DanubeError, match="b-train-00001.bin is missing or damaged"):
        staged(folder)
    monkeypatch.setattr(read, "SMALL_FILE", shard.stat().st_size - 1)
    staged(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(danube3.DanubeError, match="no meta.json"):
        staged(folder)


def test_source_shorter_than_a_sequence(tmp_path, tokenizer):
    folder = write_data(tmp_path / "tiny", tokenizer, {"a": 100, "b": 100, "c": 9})
    with pytest.raises(danube3.DanubeError, match=r"source 'c' \(val\) is missing or too short: add text"):
        staged(folder)


def test_source_too_short_to_evaluate(tmp_path, tokenizer):
    """quantize.py and sample.py read data folders without a training config: a line says which source is too short."""
    data = TokenData(write_data(tmp_path / "tiny", tokenizer, {"a": 100, "c": 9}), TINY, T)
    with pytest.raises(danube3.DanubeError, match=r"source 'c' \(val\) is missing or too short: add text"):
        data.evenly_spread("c", "val", 4)


@pytest.mark.parametrize(
    "sources", [None, 5, "web", ["a"], {}, {"a": 5}, {"a": {}}, {"a": {"train": 5}}, {"a": {"train": [-1]}}]
)
def test_meta_of_the_wrong_shape(folder, sources):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "sources": sources}))
    with pytest.raises(danube3.DanubeError, match="meta.json .* damaged|names no sources|a-train-00000.bin"):
        TokenData(folder, TINY, T)  # sample.py and quantize.py ask for no more


def test_permuted_index_never_changes():
    """Recorded from our first version: a resumed run must read the same blocks with any later version."""
    assert [danube3.permuted_index(i, 10, "0/web/0") for i in range(10)] == [5, 9, 6, 3, 7, 4, 0, 2, 8, 1]
    square = [5, 11, 6, 3, 14, 4, 13, 12, 15, 1, 0, 9, 2, 10, 7, 8]
    assert [danube3.permuted_index(i, 16, "0/web/0") for i in range(16)] == square
    assert [danube3.permuted_index(i, 10**9, "7/web/3") for i in range(3)] == [459083794, 5971220, 50517585]


def test_how_often_a_source_is_read(folder):
    """Its sequences in the run divided by its blocks. More than a hundred epochs are refused, with the number."""
    data = TokenData(folder, TINY, T)
    blocks = {name: data.blocks[name, "train"] for name in ("a", "b")}
    stage = danube3.Stage("one", 40 * 4 * T, {"a": 3, "b": 1})
    config = small_config(stages=(stage,))
    batches = danube3.StagedData(data, config)
    assert batches.epochs == {"a": 120 / blocks["a"], "b": 40 / blocks["b"]}
    longer = dataclasses.replace(config, stages=(dataclasses.replace(stage, tokens=400 * blocks["b"] * T),))
    assert danube3.StagedData(data, longer).epochs["b"] == 100
    longer = dataclasses.replace(config, stages=(dataclasses.replace(stage, tokens=440 * blocks["b"] * T),))
    with pytest.raises(danube3.DanubeError, match="source 'a' would be read 106 times: add text"):
        danube3.StagedData(data, longer)
