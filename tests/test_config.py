"""Configurations: published counts, costs against independent counts, and numbers that make no sense."""

import argparse
import dataclasses
import math
import re
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, call, one_line_error, random_model
from torch.utils.flop_counter import FlopCounterMode

import danube3
import train


@pytest.mark.parametrize("name, parameters", [("500m", 513_590_784), ("4b", 3_961_839_360)])
def test_published_sizes(name, parameters):
    config = danube3.CONFIGS[name]
    with torch.device("meta"):
        model = danube3.Danube3(config)
    assert sum(p.numel() for p in model.parameters()) == parameters == danube3.count_parameters(config)


@pytest.mark.parametrize("config", [TINY, danube3.CONFIGS["toy"]])
def test_parameters_counted(config):
    assert sum(p.numel() for p in danube3.Danube3(config).parameters()) == danube3.count_parameters(config)


def test_published_constants(tmp_path):
    """A config.json with the published fields, among which head_dim is missing, is read as our configuration."""
    both = """"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "max_position_embeddings": 8192,
        "model_type": "llama", "num_key_value_heads": 8, "pad_token_id": 0, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_cache": false, "vocab_size": 32000"""
    for name, expected, published in (
        ("500m", (1536, 4096, 16, 16, 8, 96, 0.02), """"hidden_size": 1536, "initializer_range": 0.02,
            "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 16"""),
        ("4b", (3840, 10240, 24, 32, 8, 120, 0.01), """"hidden_size": 3840, "initializer_range": 0.01,
            "intermediate_size": 10240, "num_attention_heads": 32, "num_hidden_layers": 24"""),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(f"{{{both}, {published}}}")
        config = danube3.read_config(tmp_path)
        assert config == danube3.CONFIGS[name] and dataclasses.astuple(config)[:7] == expected
        assert dataclasses.astuple(config)[7:] == (32_000, 8_192, 100_000.0, 1e-5, 1, 2, 0)


def test_stages_of_every_recipe():
    for recipe in danube3.RECIPES.values():
        assert [stage.mixture["web"] for stage in recipe.stages] == [906, 817, 516]
        assert all(sum(stage.mixture.values()) == 1000 for stage in recipe.stages)
    tokens = {name: [stage.tokens / 1e12 for stage in danube3.RECIPES[name].stages] for name in ("500m", "4b")}
    assert tokens == {"500m": [2.8, 1.15, 0.05], "4b": [4.6, 1.35, 0.05]}


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_against_a_counter(frozen):
    """PyTorch counts the multiplications of a real forward and backward; of attention it counts the whole square. With
    frozen matrices and trained norms all gradients of inputs are needed, as with adapters."""
    B, T = 2, 33
    model, ids = random_model(TINY), torch.randint(0, TINY.vocab_size, (2, 33))
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen or parameter.dim() == 1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    square = 3 * 2 * 2 * TINY.num_hidden_layers * TINY.num_attention_heads * TINY.head_dim * T
    causal = 3 * 2 * TINY.num_hidden_layers * TINY.num_attention_heads * TINY.head_dim * (T + 1)
    assert counter.get_total_flops() / (B * T) - square + causal == danube3.flops_per_token(TINY, T, frozen)


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
    estimate = train.memory_bytes(config, recipe, compute_bytes=4)
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
        ("hidden_size", 2**61),
        ("num_hidden_layers", 10**12),
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
    with pytest.raises(argparse.ArgumentTypeError):
        danube3.token_count(text)


# ------------------------------------------------------------------------------------------------------------- the plan
def test_memory_of_several_gpus():
    """By hand, for 4b on 8 GPUs: everything shared, but gradients that wait for the last micro-batch held whole."""
    config, recipe = danube3.CONFIGS["4b"], danube3.RECIPES["4b"]
    n, ends, D = danube3.count_parameters(config), 2 * 32_000 * 3840, 3840
    shared = train.memory_bytes(config, recipe, gpus=8)
    assert shared["weights (fp32)"] == 4 * n // 8 and shared["AdamW moments (fp32)"] == n
    assert shared["gradients (fp32)"] == 4 * n
    assert train.memory_bytes(config, recipe, gpus=512)["gradients (fp32)"] == 4 * n // 512  # a row each: one pass
    layer = (n - ends) / 24
    assert shared["exchanged parts"] == pytest.approx(4 * ends + 2 * 2 * layer + 4 * (ends + layer), rel=1e-6)
    alone, again = (train.memory_bytes(config, recipe, recompute=again) for again in (False, True))
    layer = alone["activations (estimate)"] / 24
    assert again["activations (estimate)"] == layer + 24 * 8192 * 4 * D
    assert alone["weights (compute copy)"] == 2 * n
    assert {name: size for name, size in alone.items() if "act" not in name} == {
        name: size for name, size in again.items() if "act" not in name
    }


def test_what_fits():
    """4b on a GPU of 141 GB, 500m on one of 24 GB; layers are computed again only where that is needed."""
    four, half = ((danube3.CONFIGS[name], danube3.RECIPES[name]) for name in ("4b", "500m"))
    assert train.choose_recompute(*four, "auto", 141e9) is False
    assert train.choose_recompute(*four, "on", 141e9) is True
    assert train.choose_recompute(*four, "auto", 100e9) is True
    assert train.choose_recompute(*half, "auto", 24e9) is False
    assert train.choose_recompute(*half, "auto", 16e9) is True
    with pytest.raises(danube3.DanubeError, match="take --recompute on"):
        train.choose_recompute(*four, "off", 100e9)
    with pytest.raises(danube3.DanubeError, match=r"of 80.0 GB 73.6 can be used: take 2 GPUs .*--gpus 2"):
        train.choose_recompute(*four, "auto", 80e9)
    with pytest.raises(danube3.DanubeError, match="take --micro-batch-size 1"):
        train.choose_recompute(half[0], dataclasses.replace(half[1], micro_batch_size=64), "auto", 16e9)
    with pytest.raises(danube3.DanubeError, match="--chat with --lora"):
        train.choose_recompute(*four, "auto", 8e9)


@pytest.mark.parametrize("gigabytes, again", [(24, True), (80, False)])
def test_adapters_ask_for_what_they_need(gigabytes, again, monkeypatch):
    """4b as int4, one conversation of 8,192 tokens: 38 GB of activations, if layers keep them."""
    properties = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with torch.device("meta"):
        model = danube3.use_scheme(danube3.Danube3(danube3.CONFIGS["4b"]), danube3.SCHEMES["int4"])
        model.requires_grad_(False)
        linear = model.model.layers[0].mlp.up_proj
        model.model.layers[0].mlp.up_proj = danube3.LoRALinear(linear, 16)
    recipe = danube3.RECIPES["4b"]
    assert (recipe.sequence_length, recipe.micro_batch_size) == (8192, 1)
    train.set_recompute(model, recipe, "auto", torch.device("cuda"))
    assert {layer.recompute for layer in model.model.layers} == {again}


def test_rows_shared_by_processes():
    """In micro-batches of at most the recipe's size; what cannot be shared evenly is refused."""
    recipe = danube3.RECIPES["toy"]  # 8 rows, 8 at a time
    sizes = [danube3.shared_recipe(recipe, ranks).micro_batch_size for ranks in (1, 2, 4, 8)]
    assert sizes == [8, 4, 2, 1]
    smaller = dataclasses.replace(recipe, tokens_per_step=24 * 128, micro_batch_size=8)
    assert [danube3.shared_recipe(smaller, ranks).micro_batch_size for ranks in (1, 2, 4)] == [8, 6, 6]
    for ranks in (3, 16):
        with pytest.raises(danube3.DanubeError, match=f"a step of 8 rows cannot be shared evenly by {ranks}"):
            danube3.shared_recipe(recipe, ranks)


def test_new_models_are_initialised_as_any():
    new, old = danube3.Danube3.new(TINY, 5).state_dict(), danube3.Danube3(TINY).init_weights(5).state_dict()
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in new)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpus", "2"], "are for --dry-run"),
        (["--dry-run", "--config", "4b", "--gpus", "48"], "a step of 512 rows cannot be shared evenly by 48"),
        (["--dry-run", "--config", "4b"], "take 2 GPUs"),
        (["--dry-run", "--config", "4b", "--gpus", "64", "--gpu-memory", "24"], "can be used: take 512 GPUs"),
    ],
)
def test_plans_that_cannot_be(flags, words):
    assert words in one_line_error(call("train.py", *flags))


def test_a_plan_for_64_gpus():
    result = call("train.py", "--config", "4b", "--dry-run", "--gpus", 64, "--tokens", "600B")
    assert result.returncode == 0, result.stderr
    assert "143,051 steps, 599,999,381,504 tokens" in result.stdout and "on 64 GPUs at 400 TFLOP/s" in result.stdout
    days = float(re.search(r"([\d.]+) days on 64 GPUs", result.stdout)[1])
    flops = danube3.flops_per_token(danube3.CONFIGS["4b"], 8_192) * 599_999_381_504
    assert days == pytest.approx(flops / 64 / 4e14 / 86_400, abs=0.01)
    assert re.search(r"^tokens +143,051 +599,999,381,504 +530B", result.stdout, re.M)


def test_short_counts():
    assert [train.short_count(n) for n in (7, 1500, 1_234_567, 2e9, 5.3e12)] == ["7", "1.5k", "1.23M", "2B", "5.3T"]


@pytest.mark.parametrize("name", ["toy", "500m", "4b"])
@pytest.mark.parametrize("order", ["staged", "constant", "reversed"])
def test_every_order_has_the_same_tokens_of_each_source(name, order):
    recipe = danube3.RECIPES[name]
    other = train.remix(recipe, order)

    def tokens(recipe):
        shares = [(stage, Fraction(stage.tokens, sum(stage.mixture.values()))) for stage in recipe.stages]
        return {source: sum(unit * stage.mixture[source] for stage, unit in shares) for source in danube3.SOURCES}

    assert tokens(other) == tokens(recipe) and other.total_steps == recipe.total_steps
    web = [Fraction(stage.mixture["web"], sum(stage.mixture.values())) for stage in other.stages]
    expected = [Fraction(906, 1000), Fraction(817, 1000), Fraction(516, 1000)]
    if order == "constant":
        assert len(set(web)) == 1 and expected[2] < web[0] < expected[0]
    else:
        assert web == (expected if order == "staged" else expected[::-1])
    scaled = other.scaled_to(recipe.tokens_per_step * 1_000)
    assert [stage.mixture for stage in scaled.stages] == [stage.mixture for stage in other.stages]


def test_scaled_and_changed_at_once():
    """A step longer than the recipe's own tokens is no mistake where there are more of them."""
    recipe = danube3.RECIPES["toy"].scaled_to(2**24, tokens_per_step=2**22)
    assert recipe.total_steps == 4 and [stage.tokens for stage in recipe.stages] == [2**23, 2**22, 2**22]
    with pytest.raises(danube3.DanubeError, match="raise --tokens"):
        danube3.RECIPES["toy"].scaled_to(2**20, tokens_per_step=2**22)
