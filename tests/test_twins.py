"""Whole optimizer steps of a Danube3 in pure NumPy are torch's. And the published widths, one layer each."""

import ast
import dataclasses

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT, TINY, random_model, transformers_model

import danube3


def functions_of(path, start="", end=None):
    """Names of the functions at the top level of a file, between two lines that begin with `start` and `end`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    last = next(i for i, line in enumerate(lines) if line.startswith(end)) if end else len(lines)
    tree = ast.parse("\n".join(lines[first:last]))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_building_block_has_a_twin():
    """Of the same name, and with a backward function. So have the formulas of the other sections."""
    blocks = functions_of(ROOT / "danube3.py", "# ==== 3. ", "# ==== 4. ")
    twins = functions_of(ROOT / "tests" / "reference.py")
    assert len(blocks) >= 6 and blocks <= twins
    assert {f"{name}_backward" for name in blocks - {"rotary_table"}} <= twins  # nothing is learned in the table
    formulas = {"next_token_probabilities", "generate", "mixture_pattern", "learning_rate", "quantize_int8",
                "quantize_int4", "pack", "unpack", "dequantize", "calibrate"}
    assert formulas <= twins & functions_of(ROOT / "danube3.py")


def exact_rotary_table(positions, head_dim, theta):
    """The tables in float64. The model makes them in fp32, and nothing else."""
    return tuple(map(torch.from_numpy, reference.rotary_table(positions.numpy(), head_dim, theta)))


def ragged_batch(config, seed):
    """Sequences with very different numbers of targets: dividing by each micro-batch's own count would show."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY.vocab_size, (config.batch_size, config.sequence_length), generator=generator)
    masked = torch.randint(0, config.sequence_length, (config.batch_size, 1), generator=generator)
    masked[:2] = config.sequence_length - 2  # the first micro-batch has four targets in all
    return ids, ids.masked_fill(torch.arange(config.sequence_length) < masked, danube3.IGNORE_INDEX)


@pytest.mark.parametrize("steps, grad_clip", [(1, 1.0), (5, 1.0), (5, 1e9)])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1, "head_dim": 96}])
def test_optimizer_steps_equal_numpy(steps, grad_clip, changes, monkeypatch):
    """Loss, gradient norm and every weight, over 1 and 5 steps of 3 ragged micro-batches."""
    monkeypatch.setattr(danube3, "rotary_table", exact_rotary_table)
    config, total_steps = dataclasses.replace(TINY, **changes), 7
    train_config = danube3.TrainConfig(
        sequence_length=11,
        batch_size=6,
        micro_batch_size=2,
        learning_rate=1e-2,
        final_lr_fraction=0.1,
        warmup_fraction=0.3,
        grad_clip=grad_clip,
    )
    model = random_model(config, dtype=torch.float64)
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer = danube3.make_optimizer(model, train_config)
    batches = [ragged_batch(train_config, step) for step in range(steps)]
    ours = []
    for step, (ids, labels) in enumerate(batches):
        lr = danube3.learning_rate(step, total_steps, train_config)
        ours.append(danube3.train_step(model, optimizer, ids, labels, train_config, lr))
    micro = [[(a.numpy(), b.numpy()) for a, b in zip(ids.split(2), labels.split(2))] for ids, labels in batches]
    expected, losses, norms = reference.train_steps(
        weights,
        micro,
        config,
        total_steps=total_steps,
        warmup_steps=2,
        peak=1e-2,
        minimum=1e-3,
        beta1=train_config.beta1,
        beta2=train_config.beta2,
        eps=train_config.adam_eps,
        weight_decay=train_config.weight_decay,
        grad_clip=grad_clip,
    )
    assert [loss for loss, _ in ours] == pytest.approx(losses, rel=1e-6)  # reported in fp32
    assert [norm for _, norm in ours] == pytest.approx(norms, rel=1e-9)
    assert min(norms) > 1.5  # so that clipping at 1 is at work, and at 1e9 is not
    for name, p in model.named_parameters():
        assert np.abs(p.detach().numpy() - expected[name]).max() < 1e-8 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize(
    "changes", [{"num_key_value_heads": 1, "head_dim": 96}, {"num_key_value_heads": 4, "head_dim": 120}, {}]
)
@pytest.mark.parametrize("T", [1, 2, 7, 33])
def test_forward_and_backward_exactly(T, changes, monkeypatch):
    """With rotary tables in float64 on both sides, logits agree to 5e-9, and so do the gradients."""
    monkeypatch.setattr(danube3, "rotary_table", exact_rotary_table)
    config = dataclasses.replace(TINY, **changes)
    model, ids = random_model(config, dtype=torch.float64), torch.randint(0, config.vocab_size, (2, T))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # logits come in fp32 otherwise
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert np.abs(model(ids).detach().numpy() - reference.danube3(ids.numpy(), weights, config)).max() < 1e-10 * 50
    if T > 1:
        loss = model(ids, ids)
        loss.backward()
        expected, _, gradients = reference.danube3_loss_and_gradients(ids.numpy(), ids.numpy(), weights, config)
        assert loss.item() == pytest.approx(float(expected), rel=1e-12)
        scale = max(np.abs(g).max() for g in gradients.values())
        for name, p in model.named_parameters():
            assert np.abs(p.grad.numpy() - gradients[name]).max() < 1e-10 * scale, name


@pytest.mark.parametrize("name", ["500m", "4b"])
def test_one_layer_of_the_published_shapes(name):
    """Logits, loss and the gradient of every parameter against transformers, at the real widths."""
    config = dataclasses.replace(danube3.CONFIGS[name], num_hidden_layers=1, vocab_size=1_000)
    ours = random_model(config)
    theirs = transformers_model(config, ours.state_dict(), pad_token_id=None)
    ids = torch.randint(0, config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(3))
    expected = theirs(input_ids=ids, labels=ids)
    assert (ours(ids) - expected.logits).abs().max() < 1e-4
    loss = ours(ids, ids) / 12
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    loss.backward()
    expected.loss.backward()
    for parameter, q in theirs.named_parameters():
        error = (ours.get_parameter(parameter).grad - q.grad).abs().max()
        assert error < 1e-4 * q.grad.abs().max() + 1e-9, parameter


@pytest.mark.parametrize("T", [1, 7, 33])
def test_bfloat16_within_its_bits(T):
    """Each of the model's 2 x 7 matrix products and norms rounds its result to 8 bits, a relative error of at most 2^-9
    and 2^-9 / sqrt(3) on average. The squares of independent errors add up."""
    rounded, ids = random_model(TINY, dtype=torch.bfloat16), torch.randint(0, TINY.vocab_size, (4, T))
    exact = random_model(TINY, dtype=torch.bfloat16).double()(ids)  # not the weights' rounding
    roundings = TINY.num_hidden_layers * 14 + 2
    error = (rounded(ids).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 2**-12 < error < 3 * 2**-9 * (roundings / 3) ** 0.5, error


def test_sequences_of_a_batch_do_not_meet():
    model, ids = random_model(TINY), torch.randint(0, TINY.vocab_size, (5, 9))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(ids[order]), model(ids)[order])
