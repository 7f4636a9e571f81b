"""The crown: whole optimizer steps of a Danube3 in pure NumPy are torch's. And the published widths, one layer each."""

import dataclasses

import numpy as np
import pytest
import reference
import torch
from conftest import TINY, random_model, transformers_model

import danube3


def exact_rotary_table(start, end, head_dim, theta, device):
    """The tables in float64: in fp32, as the model makes them, they are the only thing that is not."""
    return tuple(map(torch.from_numpy, reference.rotary_table(np.arange(start, end), head_dim, theta)))


def ragged_batch(recipe, seed):
    """Rows with very different numbers of labels, so that dividing by each micro-batch's own count would show."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY.vocab_size, (recipe.rows_per_step, recipe.sequence_length), generator=generator)
    unlabelled = torch.randint(0, recipe.sequence_length, (recipe.rows_per_step, 1), generator=generator)
    unlabelled[:2] = recipe.sequence_length - 2  # the first micro-batch has two labels in all
    return ids, ids.masked_fill(torch.arange(recipe.sequence_length) < unlabelled, danube3.IGNORE)


@pytest.mark.parametrize("steps, grad_clip", [(1, 1.0), (5, 1.0), (5, 1e9)])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1, "head_dim": 96}])
def test_optimizer_steps_equal_numpy(steps, grad_clip, changes, monkeypatch):
    """Loss, norm of the gradient and every weight, over 1 and 5 steps of 3 ragged micro-batches."""
    monkeypatch.setattr(danube3, "rotary_table", exact_rotary_table)
    config, stage = dataclasses.replace(TINY, **changes), danube3.Stage("one", 66 * 7, {"a": 1})
    recipe = danube3.Recipe(
        (stage,),
        sequence_length=11,
        tokens_per_step=66,
        micro_batch_size=2,
        learning_rate=1e-2,
        final_fraction=0.1,
        warmup_fraction=0.3,
        grad_clip=grad_clip,
    )
    model = random_model(config, dtype=torch.float64)
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer, batches = danube3.make_optimizer(model, recipe), [ragged_batch(recipe, step) for step in range(steps)]
    ours = [
        danube3.train_step(model, optimizer, ids, labels, recipe, step) for step, (ids, labels) in enumerate(batches)
    ]
    micro = [[(a.numpy(), b.numpy()) for a, b in zip(ids.split(2), labels.split(2))] for ids, labels in batches]
    expected, losses, norms = reference.train_steps(
        weights,
        micro,
        config,
        total_steps=7,
        warmup_steps=2,
        peak=1e-2,
        minimum=1e-3,
        beta1=recipe.beta1,
        beta2=recipe.beta2,
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
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
    """With rotary tables in float64 on both sides, logits agree to 5e-9; and the gradients."""
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
    """Each of the model's 2 x 7 matrix products and norms rounds its result to 8 bits, a relative error of 2^-9 at the
    most and 2^-9 / sqrt(3) on average; independent errors add up as their squares."""
    rounded, ids = random_model(TINY, dtype=torch.bfloat16), torch.randint(0, TINY.vocab_size, (4, T))
    exact = random_model(TINY, dtype=torch.bfloat16).double()(ids)  # not the weights' rounding
    roundings = TINY.num_hidden_layers * 14 + 2
    error = (rounded(ids).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 2**-12 < error < 3 * 2**-9 * (roundings / 3) ** 0.5, error


def test_rows_of_a_batch_do_not_meet():
    model, ids = random_model(TINY), torch.randint(0, TINY.vocab_size, (5, 9))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(ids[order]), model(ids)[order])
