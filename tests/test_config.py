"""Configurations: published counts, costs against independent counts, and numbers that make no sense."""

import dataclasses
import math

import pytest
import torch
from conftest import TINY, random_model
from torch.utils.flop_counter import FlopCounterMode

import danube3


@pytest.mark.parametrize("name, parameters", [("500m", 513_590_784), ("4b", 3_961_839_360)])
def test_published_sizes(name, parameters):
    config = danube3.CONFIGS[name]
    with torch.device("meta"):
        model = danube3.Danube3(config)
    assert sum(p.numel() for p in model.parameters()) == parameters == danube3.count_parameters(config)


@pytest.mark.parametrize("config", [TINY, danube3.CONFIGS["toy"]])
def test_parameters_counted(config):
    assert sum(p.numel() for p in danube3.Danube3(config).parameters()) == danube3.count_parameters(config)


def test_published_constants():
    for name, expected in {
        "500m": (1536, 4096, 16, 16, 8, 96, 0.02),
        "4b": (3840, 10240, 24, 32, 8, 120, 0.01),
    }.items():
        config = danube3.CONFIGS[name]
        assert dataclasses.astuple(config)[:7] == expected
        assert dataclasses.astuple(config)[7:] == (32_000, 8_192, 100_000.0, 1e-5, 1, 2, 0)


def test_stages_of_every_recipe():
    for recipe in danube3.RECIPES.values():
        assert [stage.mixture["web"] for stage in recipe.stages] == [906, 817, 516]
        assert all(sum(stage.mixture.values()) == 1000 for stage in recipe.stages)
    tokens = {name: [stage.tokens / 1e12 for stage in danube3.RECIPES[name].stages] for name in ("500m", "4b")}
    assert tokens == {"500m": [2.8, 1.15, 0.05], "4b": [4.6, 1.35, 0.05]}


def test_flops_against_a_counter():
    """PyTorch counts the multiplications of a real forward and backward; of attention it counts the whole square."""
    B, T = 2, 33
    model, ids = random_model(TINY), torch.randint(0, TINY.vocab_size, (2, 33))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    square = 3 * 2 * 2 * TINY.num_hidden_layers * TINY.num_attention_heads * TINY.head_dim * T
    causal = 3 * 2 * TINY.num_hidden_layers * TINY.num_attention_heads * TINY.head_dim * (T + 1)
    assert counter.get_total_flops() / (B * T) - square + causal == danube3.flops_per_token(TINY, T)


def test_memory_against_what_autograd_keeps():
    """Activations are an estimate: within a quarter of the bytes that a fp32 training forward really saves."""
    config = dataclasses.replace(danube3.CONFIGS["toy"], num_hidden_layers=8, vocab_size=64)
    recipe = dataclasses.replace(danube3.RECIPES["toy"], micro_batch_size=4, tokens_per_step=512)
    model, saved = random_model(config), {}

    def pack(tensor):
        if tensor.requires_grad is False or tensor.grad_fn is not None:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 64, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, ids)
    estimate = danube3.memory_bytes(config, recipe, compute_bytes=4)
    assert loss.requires_grad
    measured = sum(saved.values())
    assert 0.75 < estimate["activations (estimate)"] / measured < 1.25
    assert estimate["weights (fp32)"] == 4 * danube3.count_parameters(config) == estimate["AdamW moments (fp32)"] / 2


def test_stage_boundaries():
    recipe = danube3.RECIPES["toy"]
    per_step = recipe.tokens_per_step
    tokens = 0
    for stage, end in zip(recipe.stages, recipe.stage_ends):
        tokens += stage.tokens
        assert abs(end * per_step - tokens) <= per_step / 2
    first, second, _ = recipe.stage_ends
    assert [recipe.stage_at(s) for s in (0, first - 1, first, second - 1, second, recipe.total_steps)] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    scaled = recipe.scaled_to(200_000)
    assert abs(scaled.total_steps * per_step - 200_000) <= per_step
    assert scaled.stages[0].tokens == recipe.stages[0].tokens * 200_000 // sum(s.tokens for s in recipe.stages)


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", 0),
        ("hidden_size", -8),
        ("hidden_size", 40.0),
        ("hidden_size", True),
        ("hidden_size", "40"),
        ("head_dim", 7),
        ("num_key_value_heads", 3),
        ("rms_norm_eps", 0.0),
        ("rope_theta", math.nan),
        ("eos_token_id", 330),
    ],
)
def test_nonsense_configuration(field, value):
    with pytest.raises(danube3.DanubeError, match=field.split("_")[0] if field != "eos_token_id" else "vocabulary"):
        dataclasses.replace(TINY, **{field: value})


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"tokens_per_step": 1000}, "micro-batches"),
        ({"micro_batch_size": 3}, "1,024"),
        ({"micro_batch_size": 0}, "at least 1"),
        ({"learning_rate": math.inf}, "learning rate"),
    ],
)
def test_nonsense_recipe(changes, word):
    with pytest.raises(danube3.DanubeError, match=word):
        dataclasses.replace(danube3.RECIPES["toy"], **changes)


def test_too_few_tokens():
    with pytest.raises(danube3.DanubeError, match="less than one step"):
        danube3.RECIPES["toy"].scaled_to(100)


@pytest.mark.parametrize(
    "text, tokens", [("7", 7), ("200k", 200_000), ("1.5M", 1_500_000), ("10B", 10**10), ("4T", 4 * 10**12)]
)
def test_token_count(text, tokens):
    assert danube3.token_count(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "k", "-5", "0", "1.5", "ten", "1e", "5x", "nan", "inf", "1e99999999", "10000000T", "\u00b2"]
)
def test_no_token_count(text):
    with pytest.raises(danube3.argparse.ArgumentTypeError):
        danube3.token_count(text)
