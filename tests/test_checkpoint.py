"""Checkpoints: opened by transformers, opened from transformers, whole or absent, and damage named."""

import json
import math
import os
import re
import shutil

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import SENTENCES, TINY, NoData, call, digest, one_line_error, random_model, transformers_model

import danube3
import sample
from data.cli import run_command


@pytest.fixture
def saved(tmp_path, tokenizer):
    model = random_model(TINY)
    danube3.save_checkpoint(tmp_path / "run" / "step-0000007", model, tokenizer)
    return tmp_path / "run" / "step-0000007", model


def test_round_trip(saved):
    folder, model = saved
    for path in (folder, folder.parent, str(folder)):
        loaded, tokenizer = danube3.load_checkpoint(path)
        assert loaded.config == TINY and not loaded.training and tokenizer.add_bos
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
        assert all(p.requires_grad and p.data_ptr() % 64 == 0 for p in loaded.parameters())
    half, _ = danube3.load_checkpoint(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_transformers_opens_ours(saved):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = saved
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("Ada lives", return_tensors="pt").input_ids
    assert ids[0].tolist() == danube3.load_checkpoint(folder)[1].encode_prompt("Ada lives")
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    assert theirs.config.rope_parameters["rope_theta"] == TINY.rope_theta and theirs.config.head_dim == TINY.head_dim
    assert theirs.generation_config.eos_token_id == 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_we_open_theirs(dtype, shard, tmp_path, tokenizer):
    model = random_model(TINY)
    theirs = transformers_model(TINY, model.state_dict()).to(danube3.DTYPES[dtype])
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    shutil.copy(tokenizer.model_file, tmp_path / "tokenizer.model")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    loaded, _ = danube3.load_checkpoint(tmp_path)
    assert loaded.config == TINY and loaded.lm_head.weight.dtype == danube3.DTYPES[dtype]
    ids = torch.randint(3, TINY.vocab_size, (2, 9))
    with torch.no_grad():
        expected = theirs(ids).logits
        if dtype == "float32":
            assert (loaded(ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    for ours, original in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, original.to(danube3.DTYPES[dtype]))


def test_a_tensor_in_two_files(saved):
    """As transformers, which takes either: overlapping files of one index are read."""
    folder, model = saved
    weights = list(safetensors.torch.load_file(folder / "model.safetensors").items())
    parts = {"a.safetensors": dict(weights[:8]), "b.safetensors": dict(weights[7:])}
    for name, part in parts.items():
        safetensors.torch.save_file(part, folder / name)
    names = {key: name for name, part in parts.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "model.safetensors").unlink(), (folder / "SHA256SUMS").unlink()
    loaded, _ = danube3.load_checkpoint(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_published_names_and_fields(saved):
    folder, model = saved
    names = set(transformers_model(TINY, model.state_dict()).state_dict())
    assert set(safetensors.torch.load_file(folder / "model.safetensors")) == names
    config = danube3.read_json(folder / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["rope_theta"] == 100_000.0
    assert config["head_dim"] == 6


def change_json(path, **changes):
    """Change entries of a JSON file (None removes one), and forget the checksums of its folder."""
    values = {**danube3.read_json(path), **changes}
    danube3.write_json(path, {name: value for name, value in values.items() if value is not None})
    (path.parent / "SHA256SUMS").unlink(missing_ok=True)


def test_older_and_newer_rope_fields(saved):
    folder, _ = saved
    raw = json.loads((folder / "config.json").read_text())
    theta = raw.pop("rope_theta")
    for change in (
        {"rope_theta": theta},
        {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}},
        {"rope_theta": theta, "rope_scaling": None},
    ):
        (folder / "config.json").write_text(json.dumps({**raw, **change}))
        assert danube3.read_config(folder) == TINY


def test_defaults_of_older_folders(saved):
    """What config.json leaves out, or sets to null, has the defaults of transformers."""
    from transformers import LlamaConfig

    path = saved[0] / "config.json"
    for entries in ({}, dict.fromkeys(("head_dim", "num_key_value_heads"))):
        change_json(path, head_dim=None, num_key_value_heads=None, initializer_range=None, rope_theta=None,
                    rms_norm_eps=None, max_position_embeddings=None)  # fmt: skip
        path.write_text(json.dumps({**danube3.read_json(path), **entries}))
        ours, theirs = danube3.read_config(saved[0]), LlamaConfig.from_pretrained(saved[0])
        for name in ("head_dim", "num_key_value_heads", "initializer_range", "rms_norm_eps", "max_position_embeddings"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 10_000.0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2': Danube3 needs 'llama'"),
        ({"attention_bias": True}, "attention_bias is True: Danube3 needs False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type is 'llama3'"),
        ({"hidden_size": None}, "config.json .*hidden_size"),
        ({"intermediate_size": None}, "config.json .*intermediate_size"),
        ({"hidden_size": "large"}, "config.json is missing or damaged"),
        ({"hidden_size": 48}, "step-0000007.*size mismatch"),
        ({"num_hidden_layers": 3}, "step-0000007.*Missing key.*model.layers.2"),
        ({"num_hidden_layers": 1}, "step-0000007.*Unexpected key.*model.layers.1"),
        ({"vocab_size": 320}, "step-0000007.*size mismatch"),
    ],
)
def test_configurations_refused(saved, change, words):
    folder, _ = saved
    change_json(folder / "config.json", **change)
    with pytest.raises(danube3.DanubeError, match=words) as caught:
        danube3.load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_several_stop_ids(saved):
    """Published chat models list several. The first ends training documents, each of them ends generation."""
    folder, _ = saved
    change_json(folder / "config.json", eos_token_id=[2, 7])
    (folder / "generation_config.json").unlink()
    model, tokenizer = danube3.load_checkpoint(folder)
    assert model.config == TINY and model.stop_ids == [2, 7]
    danube3.save_checkpoint(folder.parent / "again", model, tokenizer)
    assert danube3.load_checkpoint(folder.parent / "again")[0].stop_ids == [2, 7]
    change_json(folder / "generation_config.json", eos_token_id=[2, 9])  # has the last word, as in transformers
    assert danube3.load_checkpoint(folder)[0].stop_ids == [2, 9]


def test_no_padding_id(saved):
    change_json(saved[0] / "config.json", pad_token_id=-1)
    assert danube3.load_checkpoint(saved[0])[0].config == TINY


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings(stored, saved):
    """A folder may store one matrix for embedding and head: here each gets a copy, as transformers reads it."""
    from transformers import AutoModelForCausalLM

    folder, _ = saved
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["lm_head.weight" if stored != "lm_head.weight" else "model.embed_tokens.weight"]
    danube3.write_tensors(folder / "model.safetensors", weights)
    change_json(folder / "config.json")
    with pytest.raises(danube3.DanubeError, match="Missing key"):
        danube3.load_checkpoint(folder)
    change_json(folder / "config.json", tie_word_embeddings=True)
    model, _ = danube3.load_checkpoint(folder)
    assert torch.equal(model.lm_head.weight, weights[stored])
    assert torch.equal(model.model.embed_tokens.weight, weights[stored])
    if stored == "model.embed_tokens.weight":
        theirs, ids = AutoModelForCausalLM.from_pretrained(folder), torch.arange(3, 12)[None]
        with torch.no_grad():
            assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


def test_tied_in_name_only(saved):
    """Where both matrices are stored, both are used."""
    folder, model = saved
    change_json(folder / "config.json", tie_word_embeddings=True)
    assert torch.equal(danube3.load_checkpoint(folder)[0].lm_head.weight, model.lm_head.weight)


def test_prefixes_of_torch(saved):
    """The names that torch.compile and DistributedDataParallel make, and a constant that old exports store."""
    folder, model = saved
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    renamed = {"module." + name.replace("layers.1.", "layers.1._orig_mod."): w for name, w in weights.items()}
    renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    danube3.write_tensors(folder / "model.safetensors", renamed)
    change_json(folder / "config.json")
    loaded, _ = danube3.load_checkpoint(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_dtype_of_mixed_folders(saved):
    """What config.json says; where it says nothing, the widest stored type."""
    folder, model = saved
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    mixed = {name: w.bfloat16() if "norm" not in name else w for name, w in weights.items()}
    danube3.write_tensors(folder / "model.safetensors", mixed)
    for change, dtype in (
        ({"torch_dtype": None, "dtype": "float16"}, torch.float16),
        ({"torch_dtype": "bfloat16", "dtype": None}, torch.bfloat16),
        ({"torch_dtype": None, "dtype": None}, torch.float32),
        ({"torch_dtype": "int3", "dtype": None}, torch.float32),
    ):
        change_json(folder / "config.json", **change)
        loaded, _ = danube3.load_checkpoint(folder)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16().to(dtype))
    danube3.write_tensors(folder / "model.safetensors", {name: w.bfloat16() for name, w in weights.items()})
    assert danube3.load_checkpoint(folder)[0].dtype == torch.bfloat16


def test_finite_in_the_type_that_is_used(saved):
    """70,000 is no fp16 number; a weight that is not finite as stored is refused too."""
    folder, model = saved
    weights = dict(model.state_dict())
    weights["lm_head.weight"][2, 3] = 70_000.0
    danube3.write_tensors(folder / "model.safetensors", weights)
    change_json(folder / "config.json")
    danube3.load_checkpoint(folder), danube3.load_checkpoint(folder, dtype=torch.bfloat16)
    with pytest.raises(danube3.DanubeError, match="lm_head.weight is not finite as torch.float16: .*another type"):
        danube3.load_checkpoint(folder, dtype=torch.float16)
    for bad in (math.nan, math.inf):
        weights["lm_head.weight"][2, 3] = bad
        danube3.write_tensors(folder / "model.safetensors", weights)
        with pytest.raises(danube3.DanubeError, match="lm_head.weight is not finite as torch.float32"):
            danube3.load_checkpoint(folder)


def test_a_single_file_beside_an_index(saved, capsys):
    """The single file is taken, as transformers does, and that is said."""
    folder, model = saved
    names = dict.fromkeys(model.state_dict(), "a.safetensors")
    change_json(folder / "model.safetensors.index.json", weight_map=names)
    danube3.write_tensors(folder / "a.safetensors", {name: w + 1 for name, w in model.state_dict().items()})
    loaded, _ = danube3.load_checkpoint(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert "model.safetensors.index.json is ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "index, words",
    [
        ({"weight_map": {"lm_head.weight": "../other/model.safetensors"}}, "outside its folder"),
        ({"weight_map": {"lm_head.weight": "absent.safetensors"}}, "absent.safetensors is missing"),
        ({"weight_map": 5}, "index.json is missing or damaged"),
        ({}, "index.json is missing or damaged"),
    ],
)
def test_bad_indexes(index, words, saved):
    (saved[0] / "model.safetensors").unlink()
    change_json(saved[0] / "model.safetensors.index.json", **index)
    with pytest.raises(danube3.DanubeError, match=words):
        danube3.load_checkpoint(saved[0])


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens(file, saved):
    """Tokens that tokenizer.model lacks would be encoded as ordinary text: refused by name."""
    folder, _ = saved

    def add(text, token_id):
        listed = {str(token_id): {"content": text}}
        change_json(folder / file, **({text: token_id} if file[0] == "a" else {"added_tokens_decoder": listed}))

    add("</s>", 2)
    danube3.load_checkpoint(folder)
    add("<|image|>", 330)
    with pytest.raises(danube3.DanubeError, match="tokenizer.model lacks '<.image.>': use the model's"):
        danube3.load_checkpoint(folder)


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a byte flipped": flip_byte,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:200]),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model", "tokenizer_config.json"])
def test_damaged_files(saved, name, how):
    """With checksums, every change is noticed; without (a downloaded folder), all that cannot be read."""
    folder, _ = saved
    DAMAGES[how](folder / name)
    with pytest.raises(
        danube3.DanubeError, match=name if name != "config.json" or how != "removed" else "step-0000007"
    ):
        danube3.load_checkpoint(folder)
    (folder / "SHA256SUMS").unlink()
    readable = (
        how == "a byte flipped"
        or (name, how) == ("tokenizer_config.json", "removed")
        or name == "tokenizer.model"
        and how != "removed"
    )
    try:
        danube3.load_checkpoint(folder)
    except danube3.DanubeError:
        return
    assert readable


def test_git_lfs_pointers_are_named(saved):
    folder, _ = saved
    (folder / "SHA256SUMS").unlink()
    for name in ("tokenizer.model", "model.safetensors"):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 12345\n"
        (folder / name).write_text(pointer)
        with pytest.raises(danube3.DanubeError, match=f"{name} is a Git-LFS pointer.*git lfs pull"):
            danube3.load_checkpoint(folder)


def test_other_special_tokens_are_refused(saved):
    """A tokenizer without </s>, or with another id for it: the model would never stop, or meet the id -1."""
    folder, _ = saved
    change_json(folder / "config.json", eos_token_id=3)
    with pytest.raises(danube3.DanubeError, match="has more tokens, or other ids of <s>, </s>: use the model's"):
        danube3.load_checkpoint(folder)


def test_a_second_run_is_refused(tmp_path, tokenizer):
    """While the first is there. When it is closed, or its process gone, the output directory is free."""
    first = danube3.Trainer(tmp_path, random_model(TINY), tokenizer, NoData())
    first.step = 1
    first.save()
    print(json.dumps({"step": 1, "loss": 2.0}), file=first.log, flush=True)
    before = {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(danube3.DanubeError, match="is in use by another program"):
        danube3.Trainer(tmp_path, random_model(TINY), tokenizer, NoData(), resume=True)
    assert before == {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    first.resources.close()
    danube3.Trainer(tmp_path, random_model(TINY), tokenizer, NoData(), resume=True).resources.close()


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path, tokenizer):
    run = danube3.Trainer(tmp_path, random_model(TINY), tokenizer, NoData())
    run.step = 1
    run.save()
    run.model.lm_head.weight.data[3, 4] = math.inf
    run.step = 2
    with pytest.raises(danube3.DanubeError, match="not finite after step 2.*: lower the learning rate"):
        run.save()
    assert [path.name for path in danube3.checkpoints_in(tmp_path)] == ["step-0000001"]


@pytest.mark.parametrize("error", [OSError("disk full"), safetensors.SafetensorError("disk full")])
def test_a_failed_write_leaves_nothing(error, tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match="disk full"):
        danube3.save_checkpoint(tmp_path / "run" / "step-0000001", random_model(TINY), tokenizer)
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(SystemExit, match="^2$"):
        run_command(lambda: danube3.save_checkpoint(tmp_path / "run" / "step-0000001", random_model(TINY), tokenizer))
    assert capsys.readouterr().err == "error: disk full\n"
    with pytest.raises(danube3.DanubeError, match="is no checkpoint"):
        danube3.find_checkpoint(tmp_path / "run")


def test_written_whole_before_it_is_named(tmp_path, tokenizer, monkeypatch):
    """At the moment of renaming, all files are there, are synced, and the old checkpoint still exists."""
    run, renamed = danube3.Trainer(tmp_path, random_model(TINY), tokenizer, NoData()), []
    run.step = 1
    run.save()
    synced, rename = [], danube3.Path.rename
    monkeypatch.setattr(danube3, "sync", lambda path: synced.append(path.name))

    def check(self, target):
        if target.name == "step-0000002":
            assert {p.name for p in self.iterdir()} <= set(synced) and self.name in synced
            state = {"training_state.json", "training_state.safetensors"}
            assert {"model.safetensors", "config.json", "SHA256SUMS", "metrics.jsonl", *state} <= set(synced)
            assert not target.exists() and danube3.find_checkpoint(tmp_path).name == "step-0000001"
            renamed.append(target)
        return rename(self, target)

    monkeypatch.setattr(danube3.Path, "rename", check)
    run.step = 2
    run.save()
    assert synced[-1] == tmp_path.name and renamed == danube3.checkpoints_in(tmp_path)


def test_checkpoints_run_no_code(tmp_path, tokenizer):
    """A hostile pickle in place of any file is refused without being run."""

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    def resume():
        again = danube3.Trainer(tmp_path / "run", danube3.Danube3(TINY), tokenizer, NoData(), resume=True)
        again.resources.close()

    run = danube3.Trainer(tmp_path / "run", random_model(TINY), tokenizer, NoData())
    run.save()
    run.resources.close()
    folder = danube3.find_checkpoint(tmp_path / "run")
    (folder / "SHA256SUMS").unlink()
    opened = {
        resume: ("training_state.safetensors", "training_state.json"),
        lambda: danube3.load_checkpoint(folder): ("model.safetensors", "config.json", "tokenizer.model"),
    }
    for open_, names in opened.items():
        for name in names:
            content = (folder / name).read_bytes()
            torch.save({"step": Hostile()}, folder / name)
            with pytest.raises(danube3.DanubeError, match=f"{name} is missing or damaged"):
                open_()
            (folder / name).write_bytes(content)
        open_()
    torch.save({"lm_head.weight": Hostile()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(danube3.DanubeError, match=r"model.safetensors is missing. Found: pytorch_model.bin"):
        danube3.load_checkpoint(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("path, words", [("nowhere", "nowhere does not exist"), ("", "is no checkpoint")])
def test_sample_without_a_checkpoint(tmp_path, path, words):
    assert words in one_line_error(call("sample.py", tmp_path / path, "Once"))


def test_sample_speaks_from_a_folder_by_transformers(tmp_path, tokenizer):
    """sample.py on a folder that transformers wrote, in bf16 and shards: it says what transformers says."""

    theirs = transformers_model(TINY, random_model(TINY).state_dict()).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    shutil.copy(tokenizer.model_file, tmp_path / "tokenizer.model")
    result = call("sample.py", tmp_path, "Ada lives", "--temperature", 0, "--max-new-tokens", 12, "--dtype", "float32")
    ids = torch.tensor([tokenizer.encode_prompt("Ada lives")])
    expected = (
        theirs.float()
        .generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        .tolist()
    )
    expected = expected[: expected.index(2)] if 2 in expected else expected
    assert result.returncode == 0 and result.stdout == tokenizer.decode(expected) + "\n", result.stderr


def test_sample_says_when_the_context_is_full(saved):
    folder, _ = saved
    result = call("sample.py", folder, "Ada lives", "--max-new-tokens", 500, "--seed", 4, "--temperature", 5)
    assert result.returncode == 0 and "context of 64 tokens is full" in result.stderr
    assert danube3.read_json(folder / "config.json")["max_position_embeddings"] == 64
    long = one_line_error(call("sample.py", folder, "geese " * 200))
    assert "does not fit: use 1 to 64" in long


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--dtype", "int3"], "--dtype"),
        (["--eval", "x.jsonl"], "cannot go together"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_sample_flags_refused(saved, flags, words):
    assert words in one_line_error(call("sample.py", saved[0], "Once", *flags))


def test_the_prompt_may_come_after_a_flag(saved):
    """And before one: the same text."""
    sampling = ["--max-new-tokens", 5, "--temperature", 0]
    before, after = (call("sample.py", saved[0], *each) for each in (["Ada", *sampling], [*sampling, "Ada"]))
    assert before.returncode == 0 and before.stdout == after.stdout and before.stdout.startswith("Ada")


def test_multiple_choice_by_hand(saved):
    """Scores against the definition, computed one choice at a time without a batch."""
    folder, model = saved
    _, tokenizer = danube3.load_checkpoint(folder)
    questions = [
        {"prompt": "Ada", "choices": [" lives", " keeps geese", "m"], "answer": 0},
        {"prompt": "She has", "choices": [" 2", " none \U0001f600 at all", " geese"], "answer": 1},
    ]
    expected = []
    for question in questions:
        prompt, scores = tokenizer.encode_prompt(question["prompt"]), []
        for choice in question["choices"]:
            ids = tokenizer.encode_prompt(question["prompt"] + choice)
            start = next(i for i in range(len(ids)) if ids[: i + 1] != prompt[: i + 1])
            log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
            scores.append(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))))
        expected.append(scores.index(max(scores)))
    scores = sample.choice_log_likelihoods(model, tokenizer, questions)
    assert [each.index(max(each)) for each in scores] == expected
    asked = []
    with pytest.MonkeyPatch.context() as patch:  # only the choice is scored, not the prompt
        record = lambda model, sequences: asked.extend(sequences) or [0.0] * len(sequences)
        patch.setattr(sample, "continuation_log_likelihoods", record)
        sample.choice_log_likelihoods(model, tokenizer, questions[:1])
    assert [tokenizer.decode(ids[start:]) for ids, start in asked[:2]] == ["lives", "keeps geese"]
    for ids, start in asked:
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
        by_hand = sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))
        assert sample.continuation_log_likelihoods(model, [(ids, start)]) == pytest.approx([by_hand], abs=1e-4)
    texts = ("Ada lives in Marrow.", "She", "He keeps 2 geese")
    sequences = [(tokenizer.encode_prompt(text), 1) for text in texts]
    alone = [sample.continuation_log_likelihoods(model, [each])[0] for each in sequences]
    assert sample.continuation_log_likelihoods(model, sequences) == pytest.approx(alone, abs=1e-4)
    with pytest.raises(danube3.DanubeError, match="question 1: it lacks"):
        sample.choice_log_likelihoods(model, tokenizer, [{"prompt": "x"}])
    with pytest.raises(danube3.DanubeError, match="question 2: it has a choice that adds nothing"):
        sample.choice_log_likelihoods(model, tokenizer, [questions[0], {"prompt": "Ada", "choices": [" lives", ""]}])
    user = [{"role": "user", "content": "Where?"}]
    for question, words in (
        ({"messages": user, "choices": ["", "y"]}, "question 1: it has a choice that adds nothing"),
        ({"messages": 5, "choices": ["x"]}, 'question 1: "messages" must be a list'),
        ({"messages": ["x"], "choices": ["x"]}, 'question 1: "messages" must be a list'),
        ({"messages": [], "choices": ["x"]}, 'question 1: "messages" must be a list'),
        ({"messages": [*user, {"role": "assistant", "content": "y"}], "choices": ["x"]}, "must end with the user"),
        ({"prompt": "x", "choices": ["x"], "answer": True}, 'True is no "answer"'),
    ):
        with pytest.raises(danube3.DanubeError, match=words):
            sample.multiple_choice(model, tokenizer, [{"answer": 0, **question}])
    with pytest.raises(danube3.DanubeError, match='question 2: .* is no "answer"'):
        sample.multiple_choice(model, tokenizer, [questions[0], {**questions[1], "answer": 3}])
    with pytest.raises(danube3.DanubeError, match='question 1: .* is no "answer"'):
        sample.multiple_choice(model, tokenizer, [{**questions[0], "choices": 5}])


@pytest.mark.parametrize("line", ["5\n", "{}\n", '{"step": "3"}\n', "\udcff\n", '{"step": 1, "lo', '{"step": 2}'])
def test_metrics_that_were_damaged(line, tmp_path, tokenizer):
    """What cannot be read, or lacks its end of line, is forgotten on resume, and all after it."""
    model, out = random_model(TINY), tmp_path
    run = danube3.Trainer(out, model, tokenizer, NoData())
    print(json.dumps({"step": 1, "loss": 2.0}), file=run.log, flush=True)
    run.step = 2
    run.save()
    run.resources.close()
    with open(out / "metrics.jsonl", "a", errors="surrogateescape") as file:
        file.write(line)
    again = danube3.Trainer(out, model, tokenizer, NoData(), resume=True)
    print(json.dumps({"step": 3, "loss": 1.0}), file=again.log, flush=True)
    assert [json.loads(text)["step"] for text in (out / "metrics.jsonl").read_text().splitlines()] == [1, 3]


@pytest.fixture
def trained(tmp_path, tokenizer):
    """An output directory after one step that changed weights and moments. -> folder, what was saved"""
    run = danube3.Trainer(tmp_path / "run", random_model(TINY), tokenizer, NoData())
    ids = torch.randint(3, 330, (8, 16))
    danube3.train_step(run.model, run.optimizer, ids, ids, run.config, 1e-3)
    run.step, run.tokens, run.skipped = 1, 128, 3
    run.save()
    run.resources.close()
    return danube3.find_checkpoint(tmp_path / "run"), training_tensors(run)


def training_tensors(run):
    return dict(run.tensors())


def resume(folder, tokenizer):
    run = danube3.Trainer(folder.parent, danube3.Danube3(TINY), tokenizer, NoData(), resume=True)
    run.resources.close()
    return run


def test_training_state_comes_back(trained, tokenizer):
    """All weights and moments bit for bit, and how far the run has come, from the training state alone."""
    folder, before = trained
    stored = danube3.read_tensors(folder / "training_state.safetensors")
    assert {name.split(".")[0] for name in stored} == {"weights", "exp_avg", "exp_avg_sq", "step"}
    assert stored.keys() == before.keys() and {tensor.dtype for tensor in stored.values()} == {torch.float32}
    published = danube3.read_tensors(folder / "model.safetensors")
    assert all(torch.equal(weight, stored[f"weights.{name}"]) for name, weight in published.items())
    for each in {*folder.iterdir()} - {folder / "training_state.safetensors", folder / "training_state.json"}:
        each.unlink()
    run = resume(folder, tokenizer)
    after = training_tensors(run)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (run.step, run.tokens, run.skipped) == (1, 128, 3)
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {1}


@pytest.mark.parametrize(
    "change",
    [
        {"step": "x"},
        {"step": None},
        {"tokens": "many"},
        {"run_config": 5},
        {"run_config": {"model": 5}},
        {"run_config": {}},
        {"skipped": [3]},
        {"log_lines": "all"},
    ],
    ids=str,
)
def test_training_states_of_another_kind(change, trained, tokenizer):
    """One line, and the log is as it was."""
    log = trained[0].parent / "metrics.jsonl"
    log.write_text('{"step": 1}\n')
    change_json(trained[0] / "training_state.json", **change)
    words = "step-0000001.training_state.json is missing or damaged .*: copy it again"
    if isinstance(change.get("run_config"), dict):
        words = "step-0000001 was made with another hidden_size .None.: use the same flags and data, or another --out"
    with pytest.raises(danube3.DanubeError, match=words):
        resume(trained[0], tokenizer)
    assert log.read_text() == '{"step": 1}\n'


def test_moments_of_another_kind(trained, tokenizer):
    """One is absent, or has another shape, or is not finite. A refused resume forgets nothing that was logged."""
    log = trained[0].parent / "metrics.jsonl"
    log.write_text('{"step": 2}\n')
    folder, name = trained[0], "exp_avg.model.layers.0.mlp.up_proj.weight"
    (folder / "SHA256SUMS").unlink()
    tensors = danube3.read_tensors(folder / "training_state.safetensors")
    assert tensors[name].shape == (56, 40)
    for change in ({}, {name: torch.zeros(3, 4)}, {name: torch.full((56, 40), math.nan)}):
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        danube3.write_tensors(folder / "training_state.safetensors", {**others, **change})
        words = f"step-0000001: {name} does not fit this run$"
        if not change:
            words = "step-0000001 holds other tensors than this run: use another --out"
        with pytest.raises(danube3.DanubeError, match=words):
            resume(folder, tokenizer)
        assert log.read_text() == '{"step": 2}\n'


@pytest.mark.parametrize("ranks", [(1, 4), (4, 2)], ids=str)
def test_resume_with_another_lora_rank(ranks, saved, tmp_path, tokenizer):
    """Adapters of rank 1 would broadcast to those of rank 4."""
    for rank in ranks:
        model = danube3.add_lora(danube3.load_checkpoint(saved[0])[0], rank, seed=0)
        if rank == ranks[0]:
            run = danube3.Trainer(tmp_path / "lora", model, tokenizer, NoData(), base=saved[0])
            run.save()
            run.resources.close()
    with pytest.raises(danube3.DanubeError, match="step-0000000: .*lora_.* does not fit this run"):
        danube3.Trainer(tmp_path / "lora", model, tokenizer, NoData(), resume=True, base=saved[0])


def test_a_refused_resume_removes_nothing(trained, tokenizer):
    """Neither an older checkpoint nor half of one."""
    for name in ("step-0000000", "step-0000002.partial"):
        shutil.copytree(trained[0], trained[0].with_name(name))
    state = danube3.read_json(trained[0] / "training_state.json")
    change_json(trained[0] / "training_state.json", run_config={**state["run_config"], "seed": 77})
    before = {path: digest(path) for path in trained[0].parent.rglob("*") if path.is_file()}
    with pytest.raises(danube3.DanubeError, match="was made with another seed"):
        resume(trained[0], tokenizer)
    assert before == {path: digest(path) for path in trained[0].parent.rglob("*") if path.is_file()}


def test_no_older_checkpoint_in_place_of_a_damaged_one(trained, tokenizer):
    """Where the newest lacks its config.json, that is said."""
    shutil.copytree(trained[0], newest := trained[0].with_name("step-0000002"))
    (newest / "config.json").unlink()
    assert danube3.find_checkpoint(newest.parent) == newest
    with pytest.raises(danube3.DanubeError, match="step-0000002.config.json is missing or damaged"):
        danube3.load_checkpoint(newest.parent)


def test_leftovers_of_a_kill_are_removed_on_resume(trained, tokenizer):
    """Half a checkpoint, and an older one: a run that is already finished saves nothing that would remove them."""
    shutil.copytree(trained[0], trained[0].with_name("step-0000000"))
    shutil.copytree(trained[0], trained[0].with_name("step-0000002.partial"))
    resume(trained[0], tokenizer)
    assert {path.name for path in trained[0].parent.iterdir()} == {"metrics.jsonl", trained[0].name}


def test_a_checkpoint_without_training_state(trained, tokenizer):
    shutil.rmtree(trained[0])
    danube3.save_checkpoint(trained[0], random_model(TINY), tokenizer)
    with pytest.raises(danube3.DanubeError, match="training_state.json is missing"):
        resume(trained[0], tokenizer)


def test_a_damaged_training_state_is_noticed(trained, tokenizer):
    flip_byte(trained[0] / "training_state.safetensors")
    with pytest.raises(danube3.DanubeError, match="training_state.safetensors is missing or damaged, says SHA"):
        resume(trained[0], tokenizer)


# ---------------------------------------------------------------------------------------------------------- evaluation
def test_windows_of_a_text():
    """The docstring's example, with nine ids: no window more than is needed, and none less."""
    input_ids, labels = sample.sliding_windows(list(range(9)), 4, 2)
    assert input_ids.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 0]]
    assert labels.tolist() == [[-100, 1, 2, 3], [-100, -100, 4, 5], [-100, -100, 6, 7], [-100, -100, 8, -100]]


@pytest.mark.parametrize("length", [2, 7, 64, 65, 150])
def test_perplexity_by_hand(length, saved, monkeypatch):
    """Every token once, from the window that the definition gives it: the first that ends at or behind it."""
    folder, model = saved
    tokenizer, context = danube3.load_checkpoint(folder)[1], TINY.max_position_embeddings
    text, stride = "She keeps 2 geese. " * 40, TINY.max_position_embeddings // 2
    ids = [1, *tokenizer.encode(text)][:length]
    monkeypatch.setattr(tokenizer, "encode", lambda text: ids[1:])
    losses = []
    for position in range(1, length):
        start = next(begin for begin in range(0, length, stride) if position < begin + context)
        log_p = model(torch.tensor([ids[start:position]]))[0, -1].log_softmax(-1)
        losses.append(-log_p[ids[position]].item())
    results = sample.text_perplexity(model, tokenizer, text)
    assert results["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert (results["tokens"], results["context"], results["stride"]) == (length - 1, 64, 32)
    assert results["perplexity"] == pytest.approx(math.exp(results["loss"]))
    assert results["bits per byte"] == pytest.approx(sum(losses) / math.log(2) / len(text.encode()), rel=1e-5)


def test_shares_of_multiple_choice(monkeypatch):
    """acc goes by the sum, acc_norm by the sum over the characters; the standard error is that of a share."""
    questions = [
        {"prompt": "p", "choices": [" a", " long choice"], "answer": answer, "scores": scores}
        for answer, scores in ((0, [-1.0, -3.0]), (1, [-1.0, -3.0]), (1, [-4.0, -3.0]), (0, [-1.0, -20.0]))
    ]
    score = lambda model, tokenizer, asked: [each["scores"] for each in asked]
    monkeypatch.setattr(sample, "choice_log_likelihoods", score)
    results = sample.multiple_choice(None, None, questions)
    assert results["acc"] == 0.75 and results["acc_norm"] == 0.75 and results["questions"] == 4
    assert results["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3)) and results["random baseline"] == 0.5
    assert sample.multiple_choice(None, None, questions[:2])["acc_norm"] == 0.5
    assert sample.multiple_choice(None, None, questions[1:3])["acc"] == 0.5
    assert sample.multiple_choice(None, None, questions[1:3])["acc_norm"] == 1.0


def test_evaluations_from_the_command_line(saved, tmp_path, toy_data):
    """A text, with the results as json too; and what cannot be evaluated."""
    (tmp_path / "text.txt").write_text("Ada lives in Marrow. " * 30)
    result = call("sample.py", saved[0], "--eval", tmp_path / "text.txt", "--json", tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    assert result.returncode == 0 and re.search(rf"^perplexity +{results['perplexity']:.4f}$", result.stdout, re.M)
    assert set(results) == {"tokens", "context", "stride", "loss", "perplexity", "bits per byte"}
    assert f"{results['loss']:.4f}" in result.stdout
    (tmp_path / "empty.txt").write_text("")
    for path, words in (
        (tmp_path / "empty.txt", "no text to measure"),
        (tmp_path / "missing.txt", "missing.txt does not exist, or is no file"),
        (toy_data, "was made with another tokenizer: choose other data"),
    ):
        assert words in one_line_error(call("sample.py", saved[0], "--eval", path))
    assert "--json is for" in one_line_error(call("sample.py", saved[0], "x", "--json", tmp_path / "y"))


def test_classification_by_hand(saved, tmp_path):
    """Labels as answers in the chat format, </s> included; accuracy over all, and the mean over the labels."""
    folder, model = saved
    _, tokenizer = danube3.load_checkpoint(folder)
    names = ["x", "a", "x", "m", "x", "a", "x"] * 9
    items = [
        {"text": text, "label": label} for text, label in zip([sentence[:20] for sentence in SENTENCES] * 3, names)
    ]
    labels, right = sorted({item["label"] for item in items}), {}
    for item in items:
        scores = []
        for label in labels:
            prompt = tokenizer.encode(f"<|prompt|>{item['text']}") + [2] + tokenizer.encode("<|answer|>")
            ids = tokenizer.encode(f"<|prompt|>{item['text']}") + [2] + tokenizer.encode(f"<|answer|>{label}") + [2]
            start = next(i for i in range(len(ids)) if ids[: i + 1] != prompt[: i + 1])
            log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
            scores.append(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))))
        right.setdefault(item["label"], []).append(labels[scores.index(max(scores))] == item["label"])
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    results = sample.evaluate(model, tokenizer, tmp_path / "texts.jsonl")
    assert results["texts"] == len(items) and results["random baseline"] == pytest.approx(1 / 3)
    assert results["accuracy"] == pytest.approx(sum(map(sum, right.values())) / len(items))
    shares = {label: sum(each) / len(each) for label, each in right.items()}
    assert {label: results[f"accuracy on {label}"] for label in labels} == pytest.approx(shares)
    assert results["macro accuracy"] == pytest.approx(sum(shares.values()) / 3)
    assert results["macro accuracy"] != pytest.approx(results["accuracy"])  # or this test could not tell them apart


def test_choices_as_answers_in_a_conversation(saved):
    """A conversation of several turns may be a question with choices; acc is the chat model's own."""
    folder, model = saved
    _, tokenizer = danube3.load_checkpoint(folder)
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "2?"},
    ]
    scores = sample.choice_log_likelihoods(model, tokenizer, [{"messages": talk, "choices": ["3", "three geese"]}])[0]
    for choice, score in zip(["3", "three geese"], scores):
        ids, labels = danube3.render_chat([*talk, {"role": "assistant", "content": choice}], tokenizer)
        first = danube3.render_chat(talk, tokenizer)[0]
        labels = [danube3.IGNORE_INDEX] * len(first) + labels[len(first) :]
        with torch.no_grad():
            assert -model(torch.tensor([ids]), torch.tensor([labels])).item() == pytest.approx(score, abs=1e-4)
