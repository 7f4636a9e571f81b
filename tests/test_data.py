"""Token shards and the staged mixture: shares, permutations, boundaries, purity, and damaged files."""

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
from data import toy

T = 16


def write_data(folder, tokenizer, tokens, shard_tokens=100):
    """A data folder of sources with the given numbers of tokens; each token id tells its source and half its place."""
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


def small_recipe(**changes):
    stages = (
        danube3.Stage("one", 64 * 37, {"a": 7, "b": 2, "c": 1}),
        danube3.Stage("two", 64 * 20, {"a": 1, "b": 2, "c": 3}),
    )
    return dataclasses.replace(danube3.Recipe(stages, T, 64, 2, 1e-3), **changes)


@pytest.fixture
def folder(tmp_path, tokenizer):
    return write_data(tmp_path / "data", tokenizer, {"a": 1000, "b": 333, "c": 170})


def staged(folder, recipe=None):
    return danube3.StagedData(danube3.TokenData(folder, TINY, T), recipe or small_recipe())


def test_shards_hold_documents(folder):
    meta = json.loads((folder / "meta.json").read_text())
    for name in "abc":
        files = sorted(folder.glob(f"{name}-train-*.bin"))
        shards = [np.fromfile(path, dtype="<u2") for path in files]
        assert [len(s) for s in shards] == meta["sources"][name]["train"] and len(files) > 1
        assert all(s[0] == 1 and s[-1] == 2 for s in shards)  # whole documents
        tokens = np.concatenate(shards)
        assert (tokens == 1).sum() == (tokens == 2).sum() and set(tokens[1:][tokens[:-1] == 2]) == {1}


def test_windows_run_across_shards(folder):
    source = danube3.TokenData(folder, TINY, T).open("a", "train")
    tokens = np.concatenate([np.fromfile(path, dtype="<u2") for path in sorted(folder.glob("a-train-*.bin"))])
    assert source.windows == 1000 // T
    for i in range(source.windows):
        assert np.array_equal(source.window(i), tokens[i * T : (i + 1) * T])


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
    rows = 2 * sum(weights.values()) + 5
    pattern = danube3.mixture_pattern(weights, rows)
    assert pattern == reference.mixture_rows(weights, rows)
    assert pattern[: sum(weights.values())] == pattern[sum(weights.values()) : 2 * sum(weights.values())]


@pytest.mark.parametrize("seed", [*range(100), *danube3.MIXTURES], ids=str)
def test_every_prefix_has_its_shares(seed):
    """Of random mixtures, and of the report's stages."""
    if isinstance(seed, dict):
        weights = seed
    else:
        draw = random.Random(seed)
        weights = {f"s{i}": draw.randrange(1, draw.choice([5, 50, 500])) for i in range(draw.randrange(2, 9))}
    given, total = Counter(), sum(weights.values())
    for t, name in enumerate(danube3.mixture_pattern(weights, min(total, 1000)), start=1):
        given[name] += 1
        assert all(abs(given[s] - Fraction(t * w, total)) < 1 for s, w in weights.items())


def test_more_shards_than_open_files(tmp_path):
    """As runs of trillions of tokens have."""
    counts = [3] * 200
    for i in range(200):
        np.arange(3 * i, 3 * i + 3, dtype="<u2").tofile(tmp_path / f"a-train-{i:05d}.bin")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limit[1]))
    try:
        source = danube3.TokenSource(tmp_path, "a", "train", counts, 10, 600)
        assert [source.window(i).tolist() for i in (0, 59)] == [[*range(10)], [*range(590, 600)]]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    source.files[1].write_bytes(b"\1\0")  # two tokens less than when it was opened
    with pytest.raises(danube3.DanubeError, match="a-train-00001.bin has become shorter"):
        source.window(0)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 16, 17, 99, 100, 101, 1000])
def test_shuffled_is_a_permutation(size):
    order = [danube3.shuffled(i, size, "0/web/0") for i in range(size)]
    assert sorted(order) == list(range(size))
    if size >= 99:
        again = [danube3.shuffled(i, size, "0/web/1") for i in range(size)]
        assert sum(a == b for a, b in zip(order, again)) < 10 and order != list(range(size))
        assert abs(np.corrcoef(order, range(size))[0, 1]) < 0.25
        steps = np.diff(order) % size
        assert len(set(steps)) > size / 3  # no fixed stride


def test_batches_are_what_the_brute_force_gives(folder):
    """Row by row, with counters: the mixture of each stage starts anew, the windows of a source go on."""
    recipe = small_recipe()
    batches, used = staged(folder, recipe), Counter()
    step = 0
    for stage, end in zip(recipe.stages, recipe.stage_ends):
        names = reference.mixture_rows(stage.mixture, (end - step) * recipe.rows_per_step)
        for s in range(step, end):
            for i in range(recipe.rows_per_step):
                name = names[(s - step) * recipe.rows_per_step + i]
                source = batches.sources[name]
                epoch, place = divmod(used[name], source.windows)
                window = danube3.shuffled(place, source.windows, f"{recipe.seed}/{name}/{epoch}")
                assert batches.row(s, i) == (name, window)
                assert np.array_equal(batches.batch(s)[0][i], source.window(window))
                used[name] += 1
        step = end
    assert used["c"] > 3 * batches.sources["c"].windows  # so epochs were crossed, and the stage boundary with them


def test_a_single_source(folder):
    """A mixture of one: its windows, all of them before any comes again."""
    recipe = small_recipe(stages=(danube3.Stage("only", 64 * 40, {"a": 5}),))
    batches = staged(folder, recipe)
    n = batches.sources["a"].windows
    windows = [batches.row(step, i)[1] for step in range(40) for i in range(4)]
    assert windows[:n] == [danube3.shuffled(i, n, "0/a/0") for i in range(n)]
    assert windows[n : 2 * n] == [danube3.shuffled(i, n, "0/a/1") for i in range(n)]


def test_no_window_repeats_before_all_were_used(folder):
    recipe = small_recipe()
    batches, seen = staged(folder, recipe), {name: [] for name in "abc"}
    for step in range(recipe.total_steps):
        for i in range(recipe.rows_per_step):
            name, window = batches.row(step, i)
            seen[name].append(window)
    for name, windows in seen.items():
        n = batches.sources[name].windows
        for start in range(0, len(windows), n):
            epoch = windows[start : start + n]
            assert len(set(epoch)) == len(epoch)
        assert windows[:n] != windows[n : 2 * n] or len(windows) < 2 * n


def test_a_batch_needs_no_history(folder):
    """Any order of asking, a new object, another micro-batch size: the same batch."""
    one, two = staged(folder), staged(folder, small_recipe(micro_batch_size=4, save_every=3))
    for step in (50, 3, 36, 37, 3, 56):
        (a, labels), (b, _) = one.batch(step), two.batch(step)
        assert torch.equal(a, b) and torch.equal(a, labels) and a.dtype == torch.int64 and a.shape == (4, T)
    assert not torch.equal(one.batch(3)[0], staged(folder, small_recipe(seed=1)).batch(3)[0])


def test_real_recipes_are_cheap_to_index(monkeypatch):
    """Row arithmetic of the 4b recipe at its far end: no list as long as the run."""

    class Fake:
        windows = 10**9

    monkeypatch.setattr(danube3.TokenData, "open", lambda *args: Fake)
    recipe = danube3.RECIPES["4b"]
    batches = danube3.StagedData(danube3.TokenData.__new__(danube3.TokenData), recipe)
    assert all(len(pattern) <= 1000 for pattern in batches.patterns)
    share = Counter(batches.row(recipe.total_steps - 1, i)[0] for i in range(recipe.rows_per_step))
    assert abs(share["web"] - 0.516 * recipe.rows_per_step) < 2
    used = batches.used[-1]
    expected = sum(
        Fraction(stage.mixture["web"], 1000) * (end - start) * recipe.rows_per_step
        for stage, start, end in zip(recipe.stages, [0, *recipe.stage_ends], recipe.stage_ends)
    )
    assert abs(used["web"] - expected) < 3 and sum(used.values()) == recipe.total_steps * recipe.rows_per_step


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
        ("missing shard", "b-train-00001.bin is missing"),
        ("truncated shard", "b-train-00001.bin has .* bytes"),
        ("odd shard", "b-train-00001.bin has .* bytes"),
        ("foreign ids", "b-train-00001.bin holds token id 60000, outside the vocabulary"),
        ("one id too many", "b-train-00001.bin holds token id 330, outside the vocabulary"),
        ("no meta", "no data at"),
        ("broken meta", "meta.json cannot be read as JSON"),
        ("no source", "source 'b', but .* only a, c"),
        ("other tokenizer", "is not the tokenizer that the shards were made with"),
        ("small vocabulary", "330 pieces, the configuration only 300"),
    ],
)
def test_damaged_data(folder, how, words):
    config = damage(folder, how)
    with pytest.raises(danube3.DanubeError, match=words):
        batches = danube3.StagedData(danube3.TokenData(folder, config, T), small_recipe())
        for step in range(20):
            batches.batch(step)


def test_digests_of_a_data_folder(folder, monkeypatch):
    """A changed token that is one of the vocabulary is noticed too, in shards that are not too large to read through;
    conversations may be edited."""
    (folder / "chat.jsonl").write_text("{}")
    danube3.write_digests(folder)
    (folder / "chat.jsonl").write_text('{"messages": []}')
    staged(folder)
    shard = folder / "b-train-00001.bin"
    ids = np.fromfile(shard, "<u2")
    ids[5] = 7 if ids[5] != 7 else 8
    shard.write_bytes(ids.tobytes())
    with pytest.raises(danube3.DanubeError, match="b-train-00001.bin is damaged"):
        staged(folder)
    monkeypatch.setattr(danube3, "SMALL_FILE", shard.stat().st_size - 1)
    staged(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(danube3.DanubeError, match="no meta.json"):
        staged(folder)


def test_source_shorter_than_a_row(tmp_path, tokenizer):
    folder = write_data(tmp_path / "tiny", tokenizer, {"a": 100, "b": 100, "c": 9})
    with pytest.raises(danube3.DanubeError, match="'c' .* less than one row of 16"):
        staged(folder)


@pytest.mark.parametrize(
    "sources", [None, 5, "web", ["a"], {}, {"a": 5}, {"a": {}}, {"a": {"train": 5}}, {"a": {"train": [-1]}}]
)
def test_meta_of_the_wrong_shape(folder, sources):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "sources": sources}))
    with pytest.raises(danube3.DanubeError, match="source 'a'|names no sources"):
        staged(folder)


def test_shuffled_never_changes():
    """Recorded from our own first version: a run must find its windows again with any later one."""
    assert [danube3.shuffled(i, 10, "0/web/0") for i in range(10)] == [5, 9, 6, 3, 7, 4, 0, 2, 8, 1]
    square = [5, 11, 6, 3, 14, 4, 13, 12, 15, 1, 0, 9, 2, 10, 7, 8]
    assert [danube3.shuffled(i, 16, "0/web/0") for i in range(16)] == square
    assert [danube3.shuffled(i, 10**9, "7/web/3") for i in range(3)] == [459083794, 5971220, 50517585]


def test_how_often_a_source_is_read(folder):
    """The share of a run divided by the rows there are; more than a hundred times is refused, with the numbers."""
    data = danube3.TokenData(folder, TINY, T)
    rows = {name: data.open(name, "train").windows for name in ("a", "b")}
    stage = danube3.Stage("one", 40 * 4 * T, {"a": 3, "b": 1})
    recipe = danube3.Recipe((stage,), T, 4 * T, 4, 1e-3)
    batches = danube3.StagedData(data, recipe)
    assert batches.repeats == {"a": 120 / rows["a"], "b": 40 / rows["b"]}
    longer = dataclasses.replace(recipe, stages=(dataclasses.replace(stage, tokens=400 * rows["b"] * T),))
    assert danube3.StagedData(data, longer).repeats["b"] == 100
    longer = dataclasses.replace(recipe, stages=(dataclasses.replace(stage, tokens=440 * rows["b"] * T),))
    with pytest.raises(danube3.DanubeError, match="source 'a' has 62 rows of 16, and its share is 6,600, 106 times"):
        danube3.StagedData(data, longer)
