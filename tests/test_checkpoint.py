"""Checkpoints: opened by transformers, opened from transformers, whole or absent, and damage named."""

import json
import math
import os
import re
import shutil

import pytest
import safetensors.torch
import torch
from conftest import SENTENCES, TINY, NoData, call, digest, one_line_error, random_model, transformers_model

import danube3
import sample


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
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["architectures"] == ["LlamaForCausalLM"]
        and config["rope_theta"] == 100_000.0
        and config["head_dim"] == 6
    )


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


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gpt2"}, "only Llama"),
        ({"attention_bias": True}, "attention_bias = True is not part"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type = 'llama3'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "large"}, "hidden_size is 'large'"),
        ({"hidden_size": 48}, "is not what config.json makes it"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
        ({"num_hidden_layers": 1}, "is not what config.json makes it"),
        ({"eos_token_id": [2, 3]}, "eos_token_id"),
        ({"vocab_size": 320}, "is not what config.json makes it"),
    ],
)
def test_configurations_refused(saved, change, words):
    folder, _ = saved
    raw = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / danube3.DIGESTS).unlink()
    with pytest.raises(danube3.DanubeError, match=words):
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
    """With digests, every change is noticed; without (a downloaded folder), all that cannot be read."""
    folder, _ = saved
    DAMAGES[how](folder / name)
    with pytest.raises(
        danube3.DanubeError, match=name if name != "config.json" or how != "removed" else "step-0000007"
    ):
        danube3.load_checkpoint(folder)
    (folder / danube3.DIGESTS).unlink()
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


def test_other_control_tokens_are_refused(saved):
    """A tokenizer without </s>, or with another id for it: the model would never stop, or meet the id -1."""
    folder, _ = saved
    raw = json.loads((folder / "config.json").read_text())
    (folder / danube3.DIGESTS).unlink()
    (folder / "config.json").write_text(json.dumps({**raw, "eos_token_id": 3}))
    with pytest.raises(danube3.DanubeError, match="other ids for <s> and </s>"):
        danube3.load_checkpoint(folder)


def test_a_second_run_is_refused(tmp_path, tokenizer):
    """While the first is there; its log closed, or its process gone, the folder is free."""
    first = danube3.Run(tmp_path, random_model(TINY), tokenizer, NoData(), resume=False)
    first.step = 1
    first.save()
    first.write(step=1, loss=2.0)
    before = {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(danube3.DanubeError, match="is in use by another program"):
        danube3.Run(tmp_path, random_model(TINY), tokenizer, NoData(), resume=True)
    assert before == {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    first.log.close()
    danube3.Run(tmp_path, random_model(TINY), tokenizer, NoData(), resume=True)


def test_weights_that_are_no_numbers_replace_no_checkpoint(tmp_path, tokenizer):
    run = danube3.Run(tmp_path, random_model(TINY), tokenizer, NoData(), resume=False)
    run.step = 1
    run.save()
    run.model.lm_head.weight.data[3, 4] = math.inf
    run.step = 2
    with pytest.raises(danube3.DanubeError, match="not finite after step 2; the last checkpoint, if any, is kept"):
        run.save()
    assert [path.name for path in danube3.checkpoints_in(tmp_path)] == ["step-0000001"]


def test_a_failed_write_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(
        safetensors.torch, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError):
        danube3.save_checkpoint(tmp_path / "run" / "step-0000001", random_model(TINY), tokenizer)
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(danube3.DanubeError, match="is no checkpoint"):
        danube3.find_checkpoint(tmp_path / "run")


def test_written_whole_before_it_is_named(tmp_path, tokenizer, monkeypatch):
    """At the moment of renaming, all files are there, are synced, and the old checkpoint still exists."""
    synced, rename = [], danube3.Path.rename
    monkeypatch.setattr(danube3, "sync", lambda path: synced.append(path.name))

    def check(self, target):
        if target.name == "step-0000002":
            assert {p.name for p in self.iterdir()} <= set(synced) and self.name in synced
            assert {"model.safetensors", "config.json", "trainer.pt", danube3.DIGESTS} <= set(synced)
            assert not target.exists()
        return rename(self, target)

    monkeypatch.setattr(danube3.Path, "rename", check)
    danube3.save_checkpoint(tmp_path / "step-0000002", random_model(TINY), tokenizer, {"step": 2})
    assert synced[-1] == tmp_path.name


def test_trainer_state_runs_no_code(tmp_path, tokenizer):
    """A trainer.pt that is a hostile pickle is refused without being run."""

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    folder = tmp_path / "run" / "step-0000003"
    danube3.save_checkpoint(folder, random_model(TINY), tokenizer)
    torch.save({"step": Hostile()}, folder / "trainer.pt")
    with pytest.raises(danube3.DanubeError, match="trainer.pt is damaged"):
        danube3.Run(tmp_path / "run", danube3.Danube3(TINY), tokenizer, NoData(), resume=True)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("path, words", [("nowhere", "does not exist"), ("", "is no checkpoint")])
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
    config = json.loads((folder / "config.json").read_text())
    result = call("sample.py", folder, "Ada lives", "--max-new-tokens", 500, "--seed", 4, "--temperature", 5)
    assert result.returncode == 0 and (
        config["max_position_embeddings"],
        "context of 64 tokens is full" in result.stderr,
    ) == (64, True)
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
    scores = sample.choice_scores(model, tokenizer, questions)
    assert [each.index(max(each)) for each in scores] == expected
    asked = []
    with pytest.MonkeyPatch.context() as patch:  # only the choice is scored, not the prompt
        patch.setattr(
            sample, "continuation_log_likelihood", lambda model, rows: asked.extend(rows) or [0.0] * len(rows)
        )
        sample.choice_scores(model, tokenizer, questions[:1])
    assert [tokenizer.decode(ids[start:]) for ids, start in asked[:2]] == ["lives", "keeps geese"]
    for ids, start in asked:
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
        by_hand = sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))
        assert sample.continuation_log_likelihood(model, [(ids, start)]) == pytest.approx([by_hand], abs=1e-4)
    rows = [(tokenizer.encode_prompt(text), 1) for text in ("Ada lives in Marrow.", "She", "He keeps 2 geese")]
    alone = [sample.continuation_log_likelihood(model, [row])[0] for row in rows]
    assert sample.continuation_log_likelihood(model, rows) == pytest.approx(alone, abs=1e-4)
    with pytest.raises(danube3.DanubeError, match="question 1 lacks"):
        sample.choice_scores(model, tokenizer, [{"prompt": "x"}])
    with pytest.raises(danube3.DanubeError, match="question 2 has a choice that adds nothing"):
        sample.choice_scores(model, tokenizer, [questions[0], {"prompt": "Ada", "choices": [" lives", ""]}])
    user = [{"role": "user", "content": "Where?"}]
    for question, words in (
        ({"messages": user, "choices": ["", "y"]}, "question 1 has a choice that adds nothing"),
        ({"messages": 5, "choices": ["x"]}, 'question 1: "messages" must be a list'),
        ({"messages": ["x"], "choices": ["x"]}, 'question 1: "messages" must be a list'),
        ({"messages": [], "choices": ["x"]}, 'question 1: "messages" must be a list'),
        ({"messages": [*user, {"role": "assistant", "content": "y"}], "choices": ["x"]}, "must end with the user"),
        ({"prompt": "x", "choices": ["x"], "answer": True}, 'lacks an "answer"'),
    ):
        with pytest.raises(danube3.DanubeError, match=words):
            sample.multiple_choice(model, tokenizer, [{"answer": 0, **question}])
    with pytest.raises(danube3.DanubeError, match='question 2 lacks an "answer"'):
        sample.multiple_choice(model, tokenizer, [questions[0], {**questions[1], "answer": 3}])
    with pytest.raises(danube3.DanubeError, match='question 1 lacks an "answer"'):
        sample.multiple_choice(model, tokenizer, [{**questions[0], "choices": 5}])


@pytest.mark.parametrize("line", ["5", "{}", '{"step": "3"}', "\udcff", '{"step": 1, "lo'])
def test_metrics_that_were_damaged(line, tmp_path, tokenizer):
    """What cannot be read, and all after it, is forgotten on resume."""
    model, out = random_model(TINY), tmp_path
    run = danube3.Run(out, model, tokenizer, NoData(), resume=False)
    run.write(step=1, loss=2.0)
    run.step = 2
    run.save()
    run.log.close()
    with open(out / "metrics.jsonl", "a", errors="surrogateescape") as file:
        file.write(f"{line}\n" if line != '{"step": 1, "lo' else line)
    danube3.Run(out, model, tokenizer, NoData(), resume=True).write(step=3, loss=1.0)
    assert [json.loads(text)["step"] for text in (out / "metrics.jsonl").read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize("change", [{"optimizer": 5}, {"step": "x"}, {"identity": 5}, {"master_weights": 5}])
def test_trainer_states_of_another_kind(change, tmp_path, tokenizer):
    run = danube3.Run(tmp_path / "whole", random_model(TINY), tokenizer, NoData(), resume=False)
    run.step = 1
    run.save()
    run.log.close()
    danube3.Run(tmp_path / "whole", random_model(TINY), tokenizer, NoData(), resume=True)
    state = torch.load(tmp_path / "whole" / "step-0000001" / "trainer.pt", weights_only=True)
    danube3.save_checkpoint(tmp_path / "run" / "step-0000001", run.model, tokenizer, {**state, **change})
    with pytest.raises(danube3.DanubeError, match="trainer.pt is damaged"):
        danube3.Run(tmp_path / "run", run.model, tokenizer, NoData(), resume=True)


# ---------------------------------------------------------------------------------------------------------- evaluation
def test_windows_of_a_text():
    """The docstring's example, with nine ids: no window more than is needed, and none less."""
    input_ids, labels = sample.windows_of(list(range(9)), 4, 2)
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
    monkeypatch.setattr(sample, "choice_scores", lambda model, tokenizer, asked: [each["scores"] for each in asked])
    results = sample.multiple_choice(None, None, questions)
    assert results["acc"] == 0.75 and results["acc_norm"] == 0.75 and results["questions"] == 4
    assert results["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3)) and results["guessing"] == 0.5
    assert sample.multiple_choice(None, None, questions[:2])["acc_norm"] == 0.5
    assert sample.multiple_choice(None, None, questions[1:3])["acc"] == 0.5
    assert sample.multiple_choice(None, None, questions[1:3])["acc_norm"] == 1.0


def test_examinations_from_the_command_line(saved, tmp_path, toy_data):
    """A text, with the results as json too; and what cannot be examined."""
    (tmp_path / "text.txt").write_text("Ada lives in Marrow. " * 30)
    result = call("sample.py", saved[0], "--eval", tmp_path / "text.txt", "--json", tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    assert result.returncode == 0 and re.search(rf"^perplexity +{results['perplexity']:,.4f}$", result.stdout, re.M)
    assert set(results) == {"tokens", "context", "stride", "loss", "perplexity", "bits per byte"}
    assert f"{results['loss']:.4f}" in result.stdout
    (tmp_path / "empty.txt").write_text("")
    for path, words in (
        (tmp_path / "empty.txt", "no text to measure"),
        (tmp_path / "missing.txt", "neither a folder of token shards nor a text file"),
        (toy_data, "has 1024 pieces, the configuration only 330"),
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
    assert results["texts"] == len(items) and results["guessing"] == pytest.approx(1 / 3)
    assert results["accuracy"] == pytest.approx(sum(map(sum, right.values())) / len(items))
    shares = {label: sum(each) / len(each) for label, each in right.items()}
    assert {label: results[f"accuracy on {label}"] for label in labels} == pytest.approx(shares)
    assert results["macro accuracy"] == pytest.approx(sum(shares.values()) / 3)
    assert results["macro accuracy"] != pytest.approx(results["accuracy"])  # or this test could not tell them apart
    for bad in ({"text": 5, "label": "x"}, {"text": "x", "label": ""}, {"label": "x"}):
        (tmp_path / "texts.jsonl").write_text(json.dumps(items[0]) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(danube3.DanubeError, match="question 2 lacks"):
            sample.evaluate(model, tokenizer, tmp_path / "texts.jsonl")


def test_choices_as_answers_in_a_conversation(saved):
    """A conversation of several turns may be a question with choices; acc is the chat model's own."""
    folder, model = saved
    _, tokenizer = danube3.load_checkpoint(folder)
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "2?"},
    ]
    scores = sample.choice_scores(model, tokenizer, [{"messages": talk, "choices": ["3", "three geese"]}])[0]
    for choice, score in zip(["3", "three geese"], scores):
        ids, labels = danube3.render_chat([*talk, {"role": "assistant", "content": choice}], tokenizer)
        first = danube3.render_chat(talk, tokenizer)[0]
        labels = [danube3.IGNORE] * len(first) + labels[len(first) :]
        with torch.no_grad():
            assert -model(torch.tensor([ids]), torch.tensor([labels])).item() == pytest.approx(score, abs=1e-4)
