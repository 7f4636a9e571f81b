"""The loop: against transformers with torch's AdamW, against itself after kills, and with bad input at the door."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import timeit
from types import SimpleNamespace

import pytest
import reference
import safetensors.torch
import torch
from conftest import ROOT, TINY, NoData, call, digest, one_line_error, random_model, run, transformers_model

import danube3
import train
from data import cli
from data.cli import pick_dtype
from data.read import TokenData

SMALL = ("--tokens", "20480", "--device", "cpu")  # 20 steps of 1,024 tokens: 10, 5 and 5 in the three stages


def toy_config(**changes):
    return dataclasses.replace(danube3.TRAIN_CONFIGS["toy"].with_tokens(20_480), **changes)


def test_fifty_steps_equal_transformers(toy_data):
    """Our loop and a plain one of transformers and torch.optim.AdamW: the same weights and batches, the same losses."""
    config, training = danube3.CONFIGS["toy"], toy_config(micro_batch_size=4, adam_eps=1e-6)  # 1e-8 follows rounding
    training = training.with_tokens(50 * training.tokens_per_step)
    data = TokenData(toy_data, config, training.sequence_length)
    batches, model = danube3.StagedData(data, training), random_model(config).train()
    theirs = transformers_model(config, model.state_dict(), pad_token_id=None).train()
    ours, plain = (
        danube3.make_optimizer(model, training),
        torch.optim.AdamW(
            [
                {
                    "params": [p for name, p in theirs.named_parameters() if "norm" not in name],
                    "weight_decay": training.weight_decay,
                },
                {"params": [p for name, p in theirs.named_parameters() if "norm" in name], "weight_decay": 0.0},
            ],
            lr=1.0,
            betas=(training.beta1, training.beta2),
            eps=training.adam_eps,
        ),
    )
    for step in range(batches.total_steps):
        input_ids, labels = batches.batch(step)
        lr = danube3.learning_rate(step, batches.total_steps, training)
        loss, norm = danube3.train_step(model, ours, input_ids, labels, training, lr)
        final = training.final_lr_fraction * training.learning_rate
        for group in plain.param_groups:
            group["lr"] = reference.learning_rate(step, batches.total_steps, 2, training.learning_rate, final)
        expected = theirs(input_ids=input_ids, labels=labels).loss
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), training.grad_clip)
        plain.step()
        plain.zero_grad()
        assert abs(loss - expected.item()) < 1e-4 and abs(norm - expected_norm.item()) < 1e-3 * expected_norm, step
    assert batches.total_steps == 50


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8, 99])
def test_gradient_accumulation_changes_nothing(micro_batch_size):
    """Sequences with different numbers of targets: one micro-batch and several make the same step. (The last
    micro-batch may be smaller.)"""
    ids = torch.randint(3, TINY.vocab_size, (8, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(12) < torch.arange(8)[:, None], danube3.IGNORE_INDEX)  # 11 .. 4 targets
    training = dataclasses.replace(danube3.TRAIN_CONFIGS["toy"], sequence_length=12, batch_size=8)
    results = []
    for size in (8, micro_batch_size):
        model = random_model(TINY, dtype=torch.float64)
        optimizer = danube3.make_optimizer(model, training)
        changed = dataclasses.replace(training, micro_batch_size=size)
        loss, norm = danube3.train_step(model, optimizer, ids, labels, changed, 2e-3)
        results.append((norm, *model.parameters()))
        assert loss == pytest.approx(reference_loss(ids, labels), rel=1e-6)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6 if isinstance(a, float) else 1e-9, atol=1e-12)


def reference_loss(ids, labels):
    """The mean over the targets of all sequences, by the NumPy twin."""
    weights = {name: p.detach().numpy() for name, p in random_model(TINY, dtype=torch.float64).named_parameters()}
    loss, count, _ = reference.danube3_loss_and_gradients(ids.numpy(), labels.numpy(), weights, TINY)
    return loss / count


def test_a_step_without_targets_does_nothing_wrong():
    """Nothing to divide by: the loss is 0 and the weights stay finite."""
    training = dataclasses.replace(danube3.TRAIN_CONFIGS["toy"], sequence_length=8, batch_size=2, micro_batch_size=2)
    model, ids = random_model(TINY), torch.randint(0, 330, (2, 8))
    labels = torch.full_like(ids, danube3.IGNORE_INDEX)
    optimizer = danube3.make_optimizer(model, training)
    assert danube3.train_step(model, optimizer, ids, labels, training, 1e-3) == (0.0, 0.0)
    assert all(p.isfinite().all() for p in model.parameters())
    labels[1, 5] = 7  # one target: the loss is its own
    expected = model(ids, labels).item()
    loss, _ = danube3.train_step(model, danube3.make_optimizer(model, training), ids, labels, training, 1e-3)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_decay_on_weight_matrices_only():
    """With a gradient of zero, a step shrinks weight matrices by lr x decay and leaves norm weights alone."""
    training, model = danube3.TRAIN_CONFIGS["toy"], random_model(TINY)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = danube3.make_optimizer(model, training)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        shrink = 1 - training.learning_rate * training.weight_decay * ("norm" not in name)
        torch.testing.assert_close(p.data, before[name] * shrink)


def test_learning_rate_is_the_reference():
    toy = danube3.TRAIN_CONFIGS["toy"]
    for training in (toy, toy_config(), toy_config(final_lr_fraction=0.2, warmup_fraction=0.4)):
        total, peak = training.stage_ends[-1], training.learning_rate
        warmup, final = max(1, round(training.warmup_fraction * total)), training.final_lr_fraction * peak
        rates = [danube3.learning_rate(step, total, training) for step in range(total)]
        assert rates == pytest.approx([reference.learning_rate(s, total, warmup, peak, final) for s in range(total)])
        assert rates[-1] == pytest.approx(final, abs=1e-15) and max(rates) == pytest.approx(peak)
    short = dataclasses.replace(toy, final_lr_fraction=0.5)
    assert [danube3.learning_rate(s, 3, short) for s in range(3)] == pytest.approx([3e-3, 3e-3, 1.5e-3])


# ------------------------------------------------------------------------------------------------ whole runs, by kill


def command(data, out, *flags):
    return [sys.executable, "train.py", "--data", str(data), "--out", str(out), *SMALL, "--save-every", "4", *flags]


def final_weights(out):
    return digest(danube3.find_checkpoint(out) / "model.safetensors")


def losses(out):
    """metrics.jsonl without what time it was: [(step, loss or validation losses)]"""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(e["step"], e["stage"], e["tokens"], e.get("loss"), e.get("val_loss")) for e in entries]


@pytest.fixture(scope="module")
def undisturbed(toy_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    result = subprocess.run(command(toy_data, out), cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return out, result


def test_a_run_from_the_command_line(undisturbed, toy_data):
    out, result = undisturbed
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "metrics.jsonl", "step-0000020"]
    assert re.search(r"quiz\.jsonl\nquestions +216\nacc +0\.\d{4}\n", result.stdout)
    assert re.search(r"\nrandom baseline +0\.1000\n", result.stdout)
    assert result.stdout.count("--- a sample") == 2 and "python sample.py" in result.stdout
    assert "1,049,728 trainable parameters" in result.stdout
    bar = result.stderr.replace("\r", "\n")
    assert re.search(r"20/20 .*[\d.]+(step/s|s/step), loss=\d+\.\d+, mfu=\d*\.\d+, stage=stage 3\]", bar)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [e for e in entries if "loss" in e]
    assert [e["step"] for e in steps] == list(range(1, 21)) and [e["tokens"] for e in steps] == [
        1024 * i for i in range(1, 21)
    ]
    assert [e["stage"][-1] for e in steps] == ["1"] * 10 + ["2"] * 5 + ["3"] * 5
    assert all(
        set(e) == {"step", "stage", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"} for e in steps
    )
    checks = [e for e in entries if "val_loss" in e]
    assert [(e["step"], e["stage"][-1]) for e in checks] == [
        (0, "1"),
        (4, "1"),
        (8, "1"),
        (10, "1"),
        (12, "2"),
        (15, "2"),
        (16, "3"),
        (20, "3"),
    ]
    assert all(set(e["val_loss"]) == set(danube3.SOURCES) for e in checks)
    assert steps[-1]["loss"] < 6.3 < steps[0]["loss"] and all(0 < e["mfu"] < 10 for e in steps)
    model, tokenizer = danube3.load_checkpoint(out)
    validation = danube3.StagedData(TokenData(toy_data, model.config, 128), toy_config()).validation()
    again = {name: danube3.evaluate_loss(model, *each, 8) for name, each in validation.items()}
    assert again == pytest.approx(checks[-1]["val_loss"], rel=1e-5)


def test_validation_loss_is_the_mean_over_tokens(toy_data):
    config, data = danube3.CONFIGS["toy"], TokenData(toy_data, danube3.CONFIGS["toy"], 128)
    model, count, blocks = random_model(config), danube3.VALIDATION_SEQUENCES, data.blocks["other", "val"]
    picks = sorted({i * blocks // count for i in range(count)})
    ids = torch.stack([torch.from_numpy(data.block("other", "val", i)) for i in picks])
    logits = model(ids)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, config.vocab_size), ids[:, 1:].reshape(-1))
    validation = danube3.StagedData(data, toy_config()).validation()
    assert danube3.evaluate_loss(model, *validation["other"], 8) == pytest.approx(expected.item(), rel=1e-5)


def kill_when(process, out, step):
    """SIGKILL as soon as metrics.jsonl has a line of this step."""
    while process.poll() is None:
        if (out / "metrics.jsonl").exists() and f'"step": {step}, ' in (out / "metrics.jsonl").read_text():
            process.kill()
        time.sleep(0.005)
    process.wait()


def test_killed_twice_ends_the_same_bit_for_bit(undisturbed, toy_data, tmp_path):
    """Killed in stage 1, and again after crossing into stage 2: weights and metrics as if nothing had been."""
    out = tmp_path / "killed"
    for flags, step in (([], 7), (["--resume"], 13)):
        process = subprocess.Popen(
            command(toy_data, out, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        kill_when(process, out, step)
        assert process.returncode == -signal.SIGKILL
        assert danube3.checkpoints_in(out)
    (out / "step-0000099.partial").mkdir()  # as a kill in the middle of writing leaves it
    shutil.copytree(danube3.find_checkpoint(out), out / "step-0000001")  # as one before an old one is removed
    assert danube3.find_checkpoint(out).name in ("step-0000010", "step-0000012")
    result = subprocess.run(command(toy_data, out, "--resume"), cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert final_weights(out) == final_weights(undisturbed[0])
    assert losses(out) == losses(undisturbed[0])
    assert [path.name for path in out.glob("step-*")] == ["step-0000020"]


@pytest.mark.slow
@pytest.mark.parametrize("request_", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_finishes_its_step(request_, undisturbed, toy_data, tmp_path):
    """Ctrl-C, or a batch system's SIGTERM: the step is finished, saved, the way to go on is said, and it works."""
    out = tmp_path / "interrupted"
    process = subprocess.Popen(
        command(toy_data, out), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not ((out / "metrics.jsonl").exists() and '"step": 5, ' in (out / "metrics.jsonl").read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(request_)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    step = int(danube3.find_checkpoint(out).name[-7:])
    assert 5 <= step < 20 and losses(out)[-1][0] == step
    again = re.search(r"go on with: python (.*)", stdout).group(1).split()
    assert again[0] == "train.py" and again[-1] == "--resume"
    assert run(*again).returncode == 0
    assert final_weights(out) == final_weights(undisturbed[0])


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(undisturbed, toy_data, tmp_path):
    out = shutil.copytree(undisturbed[0], tmp_path / "copy")
    assert call(*command(toy_data, out, "--resume")[1:]).returncode == 0
    assert final_weights(out) == final_weights(undisturbed[0]) and losses(out) == losses(undisturbed[0])


@pytest.mark.slow
def test_micro_batch_size_may_change_on_resume(undisturbed, toy_data, tmp_path, monkeypatch):
    """A run that dies after step 10 and goes on with smaller micro-batches has the same losses, but for rounding."""
    out, save, saved = tmp_path / "broken", danube3.Trainer.save, []

    def save_once(run_):
        saved.append(run_.step)
        save(run_)
        if run_.step >= 10:
            raise danube3.DanubeError("the power fails")

    monkeypatch.setattr(danube3.Trainer, "save", save_once)
    assert "the power fails" in call(*command(toy_data, out)[1:]).stderr
    monkeypatch.undo()
    assert saved[-1] == 10 and danube3.find_checkpoint(out).name == "step-0000010"
    assert call(*command(toy_data, out, "--resume", "--micro-batch-size", 4)[1:]).returncode == 0
    after, before = losses(out), losses(undisturbed[0])
    assert [step for step, *_ in after] == [step for step, *_ in before]
    numbers = [[each[3] for each in entries if each[3]] for entries in (after, before)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4) and numbers[0][:10] == numbers[1][:10]
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tokens", "41k", "--resume"], "another stages .*: use the same flags and data, or another --out"),
        (
            ["--learning-rate", "0.1", "--resume"],
            "another learning_rate .0.003.: use the same flags and data, or another --out",
        ),
        ([], "already holds a run: add --resume, or use another --out"),
    ],
)
def test_a_run_is_not_overwritten(undisturbed, toy_data, flags, words):
    out, _ = undisturbed
    before = final_weights(out), losses(out)
    assert re.search(words, one_line_error(call(*command(toy_data, out, *flags)[1:])))
    assert (final_weights(out), losses(out)) == before


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config", "9b"], "invalid choice: '9b'"),
        (["--tokens", "many"], "no token count"),
        (["--tokens", "5"], "less than one step"),
        (["--resume"], "nothing to resume"),
        (["--micro-batch-size", "0"], "at least 1"),
        (["--learning-rate", "-1"], "learning rate"),
        (["--device", "abacus"], "abacus"),
        (["--config", "500m", "--data", "nowhere"], "no data at nowhere"),
        (["--data", "nowhere"], "no data at nowhere"),
        (["--config", "500m", "--tokens", "10G"], "no token count"),
        (["--frobnicate"], "--frobnicate"),
        (["--sequence-length", "512", "--micro-batch-size", "1"], "--sequence-length 512: the context of the model is"),
        (["--tokens-per-step", "1000"], "no whole number of sequences of 128: use --tokens-per-step 896"),
    ],
)
def test_bad_flags_get_one_line(flags, words, tmp_path, toy_data):
    out, data = tmp_path / "run", [] if "--data" in flags else ["--data", toy_data]
    assert re.search(words, one_line_error(call("train.py", "--out", out, *data, *flags)))
    assert not out.exists()


def test_the_plan_of_500m():
    """The real run is described in one screen; without its data, how to get that is said."""
    assert "make it with data/prepare.py" in one_line_error(call("train.py", "--config", "500m"))
    result = call("train.py", "--config", "500m", "--dry-run")
    assert result.returncode == 0 and len(result.stdout.splitlines()) < 24
    for fact in ("513,590,784", "2,799,999,909,888", "90.6%", "81.7%", "51.6%", "memory", "2.08e+22 "):  # FLOPs
        assert fact in result.stdout


@pytest.mark.slow
def test_bf16_runs_keep_fp32_masters(toy_data, tmp_path, monkeypatch):
    """As on a GPU, with this CPU computing in bf16: published in bf16, and a resumed run goes on from fp32."""
    monkeypatch.setattr(danube3, "compute_dtype", lambda device, name="auto": torch.bfloat16)
    config, training, save = danube3.CONFIGS["toy"], toy_config(save_every=4), danube3.Trainer.save
    data = TokenData(toy_data, config, training.sequence_length)
    batches = danube3.StagedData(data, training)

    def start(out, resume=False):
        return danube3.Trainer(out, danube3.Danube3.new(config, 0), data.tokenizer, batches, resume)

    whole = start(tmp_path / "whole")
    assert danube3.train(whole, 1e12)
    broken = start(tmp_path / "broken")
    monkeypatch.setattr(danube3.Trainer, "save", lambda run_: run_.step < 13 and save(run_))  # dies after step 12
    assert danube3.train(broken, 1e12)
    monkeypatch.setattr(danube3.Trainer, "save", save)
    resumed = start(tmp_path / "broken", resume=True)
    assert resumed.step == 12 and danube3.train(resumed, 1e12)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters()))
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    published, _ = danube3.load_checkpoint(tmp_path / "whole")
    assert torch.equal(published.lm_head.weight, whole.model.lm_head.weight.bfloat16())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_is_plain(toy_data):
    """--compile: the same losses to rounding, the same names in the checkpoint, no break where lengths vary."""
    config, training = danube3.CONFIGS["toy"], toy_config()
    batches = danube3.StagedData(TokenData(toy_data, config, training.sequence_length), training)
    losses = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        model = danube3.Danube3.new(config, 0)
        optimizer = danube3.make_optimizer(model, training)
        if compiled:
            train.compile_model(model)
        losses.append([])
        for step, length in enumerate((128, 96, 57)):  # the second length makes lengths symbols
            ids = batches.batch(step)[0][:, :length]
            lr = danube3.learning_rate(step, batches.total_steps, training)
            losses[-1].append(danube3.train_step(model, optimizer, ids, ids, training, lr)[0])
        assert set(model.state_dict()) == set(random_model(config).state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_resumed_before_the_first_step(tmp_path, tokenizer):
    """A checkpoint of step 0, which no run of ours writes, counts no step."""
    first = danube3.Trainer(tmp_path, random_model(TINY), tokenizer, NoData())
    first.save()
    first.resources.close()  # and with it the lock
    again = danube3.Trainer(tmp_path, random_model(TINY, seed=1), tokenizer, NoData(), resume=True)
    ids = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(0))
    for lr in (1e-3, 3e-3, 2e-3):
        losses = [danube3.train_step(run.model, run.optimizer, ids, ids, run.config, lr) for run in (first, again)]
        assert losses[0] == losses[1]
    fresh = random_model(TINY)
    optimizer = danube3.make_optimizer(fresh, first.config)
    for lr in (1e-3, 3e-3, 2e-3):
        danube3.train_step(fresh, optimizer, ids, ids, first.config, lr)
    for mine, theirs in zip(fresh.parameters(), again.model.parameters()):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_nothing_is_logged_twice(step, toy_data, tmp_path):
    """Interrupted before the first step (which is finished), after one, and at a milestone: then the resumed run makes
    up for the validation. After the last step nothing is left to interrupt."""
    config, training = danube3.CONFIGS["toy"], toy_config(save_every=3).with_tokens(5 * 1_024)
    data = danube3.StagedData(TokenData(toy_data, config, training.sequence_length), training)
    run_ = danube3.Trainer(tmp_path, danube3.Danube3.new(config, 0), data.data.tokenizer, data)

    class Interrupts:
        def __len__(self):
            return run_.step >= step

    step_done = max(1, step)
    assert danube3.train(run_, 1e12, Interrupts()) == (step == 5)
    assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{step_done:07d}"]
    assert losses(tmp_path)[-1][0] == step_done and (losses(tmp_path)[-1][-1] is None) == (step < 5)
    again = danube3.Trainer(tmp_path, danube3.Danube3.new(config, 0), data.data.tokenizer, data, resume=True)
    assert again.step == step_done and danube3.train(again, 1e12)
    checks = [each[0] for each in losses(tmp_path) if each[-1]]
    assert [each[0] for each in losses(tmp_path) if each[-2]] == [1, 2, 3, 4, 5]
    assert checks == sorted(set(checks)) and {0, 3, 5} <= set(checks)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing(compiled):
    """The same gradients bit for bit (compiled: nearly), from little more than each layer's input."""
    config, ids = dataclasses.replace(danube3.CONFIGS["toy"], num_hidden_layers=3), torch.randint(0, 1_024, (4, 64))
    gradients, kept = [], []
    for checkpointing in (False, True):
        model, saved = random_model(config).train(), {}
        if checkpointing:
            danube3.use_activation_checkpointing(model)
        torch._dynamo.utils.counters.clear()
        if compiled:
            train.compile_model(model)

        weights = {p.data_ptr() for p in model.parameters()}

        def pack(tensor, saved=saved, weights=weights):
            if tensor.data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids, ids)
        loss.backward()
        assert bool(torch._dynamo.utils.counters["frames"]) == compiled  # the layers are not left out in silence
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(saved.values()))
    for first, second in zip(*gradients):
        torch.testing.assert_close(
            first, second, **({"rtol": 1e-4, "atol": 1e-5} if compiled else {"rtol": 0, "atol": 0})
        )
    logits = 2 * 4 * ids.numel() * config.vocab_size
    assert compiled or kept[1] - logits < 0.3 * (kept[0] - logits)


# ------------------------------------------------------------------------------------------------ numbers that are none


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 19, 20])
def test_losses_that_are_not_finite(count, toy_data, tmp_path, monkeypatch):
    """Up to 19 bad steps in a row are skipped, with the weights as they were; the 20th ends the run."""
    assert danube3.MAX_SKIPPED_STEPS == 20
    config = danube3.CONFIGS["toy"]
    training = dataclasses.replace(danube3.TRAIN_CONFIGS["toy"].with_tokens(30 * 1_024), save_every=4)
    data = TokenData(toy_data, config, training.sequence_length)
    model = danube3.Danube3.new(config, 0)
    take_step, calls, weights = danube3.train_step, itertools.count(), []

    def poisoned(*args):
        bad = 5 <= next(calls) < 5 + count
        model.model.norm.eps = math.nan if bad else config.rms_norm_eps
        if bad:
            weights.append([p.clone() for p in model.parameters()])
        return take_step(*args)

    monkeypatch.setattr(danube3, "train_step", poisoned)
    run_ = danube3.Trainer(tmp_path, model, data.tokenizer, danube3.StagedData(data, training))
    if count < 20:
        assert danube3.train(run_, 1e12)
        assert all(p.isfinite().all() for p in model.parameters())
    else:
        with pytest.raises(danube3.DanubeError, match="no finite gradient in 20 steps in a row: lower the"):
            danube3.train(run_, 1e12)
        kept = safetensors.torch.load_file(danube3.find_checkpoint(tmp_path) / "model.safetensors")
        assert all(w.isfinite().all() for w in kept.values())
        assert danube3.find_checkpoint(tmp_path).name == "step-0000024"
    assert len(weights) == count
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[-1]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines if "lr" in e and e["loss"] is None] == list(range(6, 6 + count))


def test_skipped_steps_are_counted_over_a_resume(toy_data, tmp_path):
    """A run that is interrupted again and again must not skip steps for ever."""
    config, training = danube3.CONFIGS["toy"], toy_config()
    data = danube3.StagedData(TokenData(toy_data, config, training.sequence_length), training)
    first = danube3.Trainer(tmp_path, danube3.Danube3.new(config, 0), data.data.tokenizer, data)
    first.step, first.skipped = 3, 19
    first.save()
    first.resources.close()
    again = danube3.Trainer(tmp_path, danube3.Danube3.new(config, 0), data.data.tokenizer, data, resume=True)
    again.model.model.norm.eps = math.nan
    with pytest.raises(danube3.DanubeError, match="20 steps in a row"):
        danube3.train(again, 1e12)


def test_a_skipped_step_leaves_weights_and_moments():
    training = dataclasses.replace(danube3.TRAIN_CONFIGS["toy"], sequence_length=8, batch_size=2, micro_batch_size=2)
    model, ids = random_model(TINY), torch.randint(0, 330, (2, 8))
    optimizer = danube3.make_optimizer(model, training)
    danube3.train_step(model, optimizer, ids, ids, training, 1e-3)
    before = [p.clone() for p in model.parameters()], [s["exp_avg"].clone() for s in optimizer.state.values()]
    model.model.norm.eps = math.inf * 0
    loss, _ = danube3.train_step(model, optimizer, ids, ids, training, 1e-3)
    assert math.isnan(loss)
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters()))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(before[1], optimizer.state.values()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", danube3.DTYPES.values(), ids=str)
def test_the_peak_is_measured_in_bounded_time(dtype):
    """In every type: a CPU without fp16 needs 42 s for one product of 2,048 x 2,048."""
    start = time.monotonic()
    peak = cli.measure_matmul_peak(torch.device("cpu"), dtype)
    assert time.monotonic() - start < 3
    a = torch.ones(128, 128, dtype=dtype)
    small = min(timeit.repeat(lambda: a @ a, number=1, repeat=20))
    assert 2 * 128**3 / small / 4 < peak < 1e14  # more than small products reach, but for noise


def test_cudnn_attention_is_for_fixed_lengths(toy_data, tmp_path, monkeypatch):
    """On in pre-training, and only while it trains."""
    seen = []

    def interrupted(run_, peak_flops, interrupts):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        run_.resources.close()
        return False

    monkeypatch.setattr(danube3, "train", interrupted)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert call(*command(toy_data, tmp_path / "run")[1:]).returncode == 130
        assert seen == [True] and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture
def handlers():
    """The signal handlers of the tests, put back afterwards."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield before
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def test_two_interrupts_end_the_program(handlers):
    interrupts = cli.catch_interrupts(1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
    assert interrupts == [signal.SIGINT]
    for second in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
            time.sleep(0.01)


def test_interrupt_handlers_are_put_back(handlers, toy_data, tmp_path, monkeypatch):
    """After the training the first Ctrl-C ends the program, as everywhere else."""
    seen = []

    def interrupted(run_, peak_flops, interrupts):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        seen.extend(interrupts)
        run_.resources.close()
        return False

    monkeypatch.setattr(danube3, "train", interrupted)
    assert call(*command(toy_data, tmp_path / "run")[1:]).returncode == 130 and seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_interrupts_under_torchrun(handlers):
    """Torchrun passes one Ctrl-C on several times, and sends SIGTERM when another process has failed."""
    interrupts = cli.catch_interrupts(2)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    assert set(interrupts) == {signal.SIGINT}
    assert signal.getsignal(signal.SIGTERM) == handlers[1]


def test_curves_of_a_damaged_log(tmp_path):
    """Damage in the lines that a resume keeps is named, in one line."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with pytest.raises(danube3.DanubeError, match="metrics.jsonl, line 2, is not JSON"):
        train.plot_curves(tmp_path, danube3.TRAIN_CONFIGS["toy"])


def test_milestones():
    """Every fourth step, the first of the second stage, and the last."""
    data = SimpleNamespace(total_steps=11, stage=lambda step: "one" if step < 6 else "two")
    runs = [SimpleNamespace(step=step, data=data, config=SimpleNamespace(save_every=4)) for step in range(12)]
    assert [run.step for run in runs if danube3.Trainer.is_milestone(run)] == [0, 4, 6, 8, 11]


# -------------------------------------------------------------------------------------- types, time, compiled functions


def test_a_save_by_time_changes_nothing(undisturbed, toy_data, tmp_path, monkeypatch):
    """A checkpoint after each step, because time is up: the same weights and metrics, and the last one is kept."""
    saved, save = [], danube3.Trainer.save
    monkeypatch.setattr(danube3, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(danube3.Trainer, "save", lambda run_: saved.append(run_.step) or save(run_))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "danube3", danube3)
        assert call(*command(toy_data, tmp_path / "run")[1:]).returncode == 0
    assert saved == list(range(1, 21))
    assert losses(tmp_path / "run") == losses(undisturbed[0])
    assert final_weights(tmp_path / "run") == final_weights(undisturbed[0])


def test_time_is_counted_from_the_last_save(tmp_path, tokenizer, monkeypatch):
    run_ = danube3.Trainer(tmp_path, random_model(TINY), tokenizer, NoData())
    clock = iter(range(100, 200))
    monkeypatch.setattr(danube3.time, "monotonic", lambda: next(clock))
    run_.save()
    assert run_.saved_at == 100
    run_.resources.close()


@pytest.mark.parametrize(
    "wish, capabilities, config, expected",
    [
        ("auto", {"avx512_bf16": True}, "500m", "bfloat16"),
        ("auto", {"amx_bf16": True, "avx512_bf16": False}, "4b", "bfloat16"),
        ("auto", {"avx512_f": True}, "500m", "float32"),
        ("auto", {"avx512_bf16": True}, "toy", "float32"),  # its figures are everyone's
        ("float32", {"avx512_bf16": True}, "500m", "float32"),
        ("float16", {}, "toy", "float16"),
        ("bfloat16", {}, "toy", "bfloat16"),
        ("auto", None, "500m", "float32"),  # a torch that does not know
    ],
)
def test_the_type_of_products(wish, capabilities, config, expected, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if capabilities is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    name = pick_dtype(wish, cpu, danube3.CONFIGS[config])
    assert danube3.compute_dtype(cpu, name) == danube3.DTYPES[expected]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    name = pick_dtype(wish, gpu, danube3.CONFIGS[config])  # what CPUs can do does not count
    assert danube3.compute_dtype(gpu, name) == danube3.DTYPES["float16" if wish == "auto" else wish]


def test_the_type_is_part_of_the_run(toy_data, tmp_path):
    """--dtype bfloat16: other losses than in fp32, a checkpoint in bf16, and no going on in another type."""
    out = tmp_path / "run"
    flags = ("--tokens", "4096", "--dtype", "bfloat16")
    result = call(*command(toy_data, out, *flags)[1:])
    assert result.returncode == 0 and "1 x cpu in bfloat16" in result.stdout
    assert danube3.read_json(danube3.find_checkpoint(out) / "config.json")["torch_dtype"] == "bfloat16"
    line = one_line_error(call(*command(toy_data, out, "--tokens", "4096", "--resume")[1:]))
    assert "was made with another dtype (torch.bfloat16)" in line
    assert call(*command(toy_data, out, *flags, "--resume")[1:]).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_the_loss_is_compiled_too(monkeypatch):
    """Also in blocks, which the backward pass computes again: the same gradients, and no logits in fp32 are kept."""
    config, ids = dataclasses.replace(TINY, vocab_size=1_000), torch.randint(0, 1_000, (4, 16))
    for tokens in (4_096, 24):
        monkeypatch.setattr(danube3, "LOGIT_TOKENS", tokens)
        gradients = []
        for compiled in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model = random_model(config)
            for layer in model.model.layers if compiled else ():
                layer.compile = lambda: None  # only the loss
            if compiled:
                train.compile_model(model)
            model(ids, ids).backward()
            assert bool(torch._dynamo.utils.counters["frames"]) == compiled
            assert not torch._dynamo.utils.counters["graph_break"]
            gradients.append([p.grad for p in model.parameters()])
        for first, second in zip(*gradients):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_nothing_is_compiled_where_there_is_no_compiler(monkeypatch, capsys):
    monkeypatch.setattr(danube3, "has_compiler", lambda: False)
    model = random_model(TINY)
    train.compile_model(model)
    assert "no C++ compiler found" in capsys.readouterr().err
    assert model.block_loss.__func__ is danube3.Danube3.block_loss
    cli.prepare_decoding(model, True)
    assert "no C++ compiler found" in capsys.readouterr().err and model.compiled_step is None


def test_lengths_on_a_gpu_are_multiples_of_64(monkeypatch):
    """There each length costs: kernels are chosen, and code is compiled. The width of the batch is the limit."""
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    for width, expected in ((200, [128, 64, 192]), (150, [128, 64, 150])):
        ids = torch.zeros(3, width, dtype=torch.long)
        labels = torch.full_like(ids, danube3.IGNORE_INDEX)
        for row, last in zip(labels, (64, 63, 130)):  # lengths 65, 64, 131
            row[last] = 5
        parts = list(danube3.micro_batches(ids, labels, 1, torch.device("cuda")))
        assert [part.shape[1] for pair in parts for part in pair] == [n for n in expected for _ in "ab"]
