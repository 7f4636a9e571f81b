"""Configurations, published and refused; the plan of a run: operations, memory, stages."""

import argparse
import dataclasses
import math
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench_memory import stored_model
from conftest import TINY, call, one_line_error, random_model
from torch.utils.flop_counter import FlopCounterMode

import danube3
import quantize
import train
from data.cli import short_count, token_count


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
    """A config.json with the published fields, which lack head_dim, is read as our configuration."""
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


def test_stages_of_every_training_config():
    """The published shares of web text. Every stage names the same sources, and its weights sum to 1,000."""
    for config in danube3.TRAIN_CONFIGS.values():
        assert [stage.mixture["web"] for stage in config.stages] == [906, 817, 516]
        for stage in config.stages:
            assert sum(stage.mixture.values()) == 1000 and tuple(stage.mixture) == danube3.SOURCES
    tokens = {name: [stage.tokens / 1e12 for stage in danube3.TRAIN_CONFIGS[name].stages] for name in ("500m", "4b")}
    assert tokens == {"500m": [2.8, 1.15, 0.05], "4b": [4.6, 1.35, 0.05]}


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_against_a_counter(frozen):
    """PyTorch counts the operations of a real forward and backward pass, for attention those of all pairs of tokens.

    With frozen weight matrices and trained norms all gradients of inputs are needed, as with adapters.
    """
    B, T = 2, 33
    model, ids = random_model(TINY), torch.randint(0, TINY.vocab_size, (2, 33))
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen or parameter.dim() == 1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    assert counter.get_total_flops() / (B * T) == danube3.flops_per_token(TINY, T, frozen)


def test_memory_against_what_autograd_keeps():
    """Activations are an estimate: within a quarter of the bytes that a forward pass in fp32 really saves."""
    config = dataclasses.replace(danube3.CONFIGS["toy"], num_hidden_layers=8, vocab_size=64)
    training = dataclasses.replace(danube3.TRAIN_CONFIGS["toy"], micro_batch_size=4, batch_size=4)
    model, saved = random_model(config), {}

    def pack(tensor):
        if tensor.requires_grad is False or tensor.grad_fn is not None:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 64, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, ids)
    estimate = train.memory_bytes(config, dataclasses.replace(training, dtype="float32"))
    assert loss.requires_grad
    measured = sum(saved.values())
    assert 0.75 < estimate["activations"] / measured < 1.25
    assert estimate["weights (fp32)"] == 4 * danube3.count_parameters(config) == estimate["AdamW moments (fp32)"] / 2


def test_activations_in_bf16_to_the_byte():
    """What autograd keeps of one more layer is what the plan says; more only are two fp32 numbers of norms and one a
    head of attention, and on a CPU a copy of attention's output."""
    config = danube3.DanubeConfig(80, 176, 2, 4, 2, 24, 0.02, vocab_size=300)  # H h is not D
    T, H, h = 32, config.num_attention_heads, config.head_dim
    training = danube3.TrainConfig(batch_size=1, micro_batch_size=1, learning_rate=1.0, sequence_length=T)
    kept, planned = [], []
    for layers in (2, 3):
        config = dataclasses.replace(config, num_hidden_layers=layers)
        model, saved = random_model(config), {}
        shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}

        def pack(tensor, saved=saved, shapes=shapes):
            if tensor.shape not in shapes:  # weights, and their copies in bf16
                saved[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model.model(torch.randint(0, 300, (1, T)))
        kept.append(sum(size for size, _ in saved.values()))
        planned.append(train.memory_bytes(config, training)["activations"])
    assert kept[1] - kept[0] == planned[1] - planned[0] + T * (2 * 4 + 4 * H + 2 * H * h)


def test_stage_boundaries(tmp_path):
    """A stage ends within half a step of its tokens. Fewer tokens are divided in the same proportion."""
    config = danube3.TRAIN_CONFIGS["toy"]
    per_step = config.tokens_per_step
    tokens = 0
    for stage, end in zip(config.stages, config.stage_ends):
        tokens += stage.tokens
        assert abs(end * per_step - tokens) <= per_step / 2
    first, second, last = config.stage_ends
    (tmp_path / "meta.json").write_text("{}")
    blocks = {(name, split): 10_000 for name in danube3.SOURCES for split in ("train", "val")}
    count_blocks = lambda name, split: blocks[name, split]
    data = danube3.StagedData(SimpleNamespace(folder=tmp_path, blocks=blocks, count_blocks=count_blocks), config)
    steps = (0, first - 1, first, second - 1, second, last)
    assert data.total_steps == last
    assert [data.stage_index(step) for step in steps] == [0, 0, 1, 1, 2, 2]
    assert [data.stage(step) for step in steps] == [f"stage {n}" for n in (1, 1, 2, 2, 3, 3)]
    scaled = config.with_tokens(200_000)
    assert abs(scaled.stage_ends[-1] * per_step - 200_000) <= per_step
    assert scaled.stages[0].tokens == config.stages[0].tokens * 200_000 // sum(s.tokens for s in config.stages)


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
    """The message names the field, or the vocabulary that a special token is outside of."""
    with pytest.raises(danube3.DanubeError, match=field.split("_")[0]):
        dataclasses.replace(TINY, **{field: value})


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"batch_size": 0}, "^batch_size must be at least 1"),
        ({"sequence_length": 0}, "^sequence_length must be at least 1"),
        ({"micro_batch_size": 0}, "^micro_batch_size must be at least 1"),
        ({"save_every": 0}, "^save_every must be at least 1"),
        ({"learning_rate": math.inf}, "learning rate"),
        ({"learning_rate": math.nan}, "learning rate"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"seed": -1}, "the seed must be 0 to 2.63 - 1"),
        ({"seed": 2**63}, "the seed must be 0 to 2.63 - 1"),
    ],
)
def test_nonsense_training_config(changes, word):
    """The message names the field."""
    with pytest.raises(danube3.DanubeError, match=word):
        dataclasses.replace(danube3.TRAIN_CONFIGS["toy"], **changes)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tokens", "100"], "less than one step of 1,024 tokens: raise --tokens"),
        (["--tokens-per-step", "1000"], "no whole number of sequences of 128: use --tokens-per-step 896"),
        (["--sequence-length", "100"], "no whole number of sequences of 100: use --tokens-per-step 1000"),
    ],
)
def test_tokens_that_make_no_steps(flags, words):
    """Refused by the plan and by the run, with numbers that would do."""
    for more in (["--dry-run"], []):
        assert words in one_line_error(call("train.py", *flags, *more))


def test_micro_batches_need_not_divide_the_batch():
    """A batch of 8 sequences in micro-batches of 3, 3 and 2."""
    training = dataclasses.replace(danube3.TRAIN_CONFIGS["toy"], micro_batch_size=3)
    ids = torch.zeros(training.batch_size, 4, dtype=torch.long)
    parts = danube3.micro_batches(ids, ids, training.micro_batch_size, torch.device("cpu"))
    assert [len(part) for part, _ in parts] == [3, 3, 2]
    assert "3 gradient accumulation steps x micro-batch of 3" in train.describe_plan(TINY, training, 1)


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("7", 7),
        ("200k", 200_000),
        ("1.5M", 1_500_000),
        ("10B", 10**10),
        ("4T", 4 * 10**12),
        ("1152921T", 1_152_921 * 10**12),  # the last below 2^60
    ],
)
def test_token_count(text, tokens):
    assert token_count(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "k", "-5", "0", "1.5", "ten", "1e", "5x", "nan", "inf", "1e99999999", "1152922T", "\u00b2"]
)
def test_no_token_count(text):
    with pytest.raises(argparse.ArgumentTypeError):
        token_count(text)


# ------------------------------------------------------------------------------------------------------------- the plan
def test_memory_of_several_gpus():
    """By hand, for 4b on 8 GPUs: all is sharded but the gradients, which wait unsharded for the last micro-batch."""
    config, training = danube3.CONFIGS["4b"], danube3.TRAIN_CONFIGS["4b"]
    n, ends, D = danube3.count_parameters(config), 2 * 32_000 * 3840, 3840
    sharded = train.memory_bytes(config, training, gpus=8)
    assert sharded["weights (fp32)"] == 4 * n // 8 and sharded["AdamW moments (fp32)"] == n
    assert sharded["gradients (fp32)"] == 4 * n
    one_pass = train.memory_bytes(config, training, gpus=512)  # one sequence on each GPU
    assert one_pass["gradients (fp32)"] == 4 * n // 512
    layer = (n - ends) / 24
    assert sharded["unsharded"] == pytest.approx(2 * (ends + 2 * layer) + 4 * layer, rel=1e-6)
    half, ends = danube3.CONFIGS["500m"], 32_000 * 1_536  # small enough to keep all of its bf16 weights
    unsharded = train.memory_bytes(half, danube3.TRAIN_CONFIGS["500m"], gpus=8)["unsharded"]
    assert unsharded == 2 * danube3.count_parameters(half) + 4 * ends
    plain, checkpointed = (train.memory_bytes(config, training, checkpointing=on) for on in (False, True))
    layer = plain["activations"] / 24
    assert checkpointed["activations"] == 24 * 8192 * 4 * D
    assert plain["weights (compute copy)"] == 2 * n
    others = [{name: size for name, size in each.items() if "act" not in name} for each in (plain, checkpointed)]
    assert others[0] == others[1] and layer < plain["logits"] == 12 * 4096 * 32_000
    half, one = danube3.CONFIGS["500m"], dataclasses.replace(training, micro_batch_size=8)
    plain, checkpointed = (train.memory_bytes(half, one, checkpointing=on) for on in (False, True))
    assert checkpointed["logits"] == plain["activations"] / 16 > plain["logits"]  # a layer is recomputed without them


def test_what_fits():
    """4b on a GPU of 141 GB, 500m on one of 24 GB. Activation checkpointing only where it is needed."""
    four, half = ((danube3.CONFIGS[name], danube3.TRAIN_CONFIGS[name]) for name in ("4b", "500m"))
    assert train.choose_checkpointing(*four, "auto", 141e9) is False
    assert train.choose_checkpointing(*four, "on", 141e9) is True
    assert train.choose_checkpointing(*four, "auto", 100e9) is True
    assert train.choose_checkpointing(*half, "auto", 80e9) is False
    assert train.choose_checkpointing(*half, "auto", 24e9) is True
    one = half[0], dataclasses.replace(half[1], micro_batch_size=1)
    assert train.choose_checkpointing(*one, "auto", 24e9) is False
    assert train.choose_checkpointing(*one, "auto", 16e9) is True
    with pytest.raises(danube3.DanubeError, match="take --activation-checkpointing on"):
        train.choose_checkpointing(*four, "off", 100e9)
    with pytest.raises(danube3.DanubeError, match=r"of 80.0 GB 73.6 can be used: take 2 GPUs .*--gpus 2"):
        train.choose_checkpointing(*four, "auto", 80e9)
    with pytest.raises(danube3.DanubeError, match="take --micro-batch-size 1"):
        train.choose_checkpointing(half[0], dataclasses.replace(half[1], micro_batch_size=64), "auto", 16e9)
    with pytest.raises(danube3.DanubeError, match="--chat with --lora"):
        train.choose_checkpointing(*four, "auto", 2e9)


def test_activations_and_logits_of_500m():
    """By hand, for 4 sequences of 8,192 tokens in 16 layers: 16 bytes for each of 1,536 features, 2 for each of twice
    1,536, of 48 heads x 96 and of 4 x 4,096; logits thrice."""
    config, training = danube3.CONFIGS["500m"], danube3.TRAIN_CONFIGS["500m"]
    memory = train.memory_bytes(config, training)
    assert memory["activations"] == 4 * 8_192 * 16 * (16 * 1_536 + 2 * (2 * 1_536 + 48 * 96 + 4 * 4_096))
    assert memory["logits"] == 3 * 4 * 4_096 * 32_000
    short = dataclasses.replace(training, sequence_length=100)
    assert train.memory_bytes(config, short)["logits"] == 3 * 4 * 400 * 32_000


def frozen(config, bits, rank=16):
    """What LoRA freezes of a model whose linear layers have so many bits, without its weights."""
    return train.frozen_part(stored_model(config, bits), rank)


def test_memory_of_adapters_by_hand():
    """For 4b: rank 16 on seven linear layers in each of 24; the weights as they are stored; two norms' vectors less."""
    config, training = danube3.CONFIGS["4b"], danube3.TRAIN_CONFIGS["4b"]
    D, I, H, K, n = 3840, 10240, 32 * 120, 8 * 120, danube3.count_parameters(danube3.CONFIGS["4b"])
    adapters = 24 * 16 * ((D + H) + 2 * (D + K) + (H + D) + 3 * (D + I))
    lora, qlora = (train.memory_bytes(config, training, frozen=frozen(config, bits)) for bits in (16, 4))
    for memory in (lora, qlora):
        assert memory["weights (fp32)"] == memory["gradients (fp32)"] == 4 * adapters
        assert memory["AdamW moments (fp32)"] == 8 * adapters and memory["weights (compute copy)"] == 2 * adapters
        per_token = 2 * 4 * D + 2 * (2 * D + 2 * H + 2 * K + 4 * I + 7 * 16)
        assert memory["activations"] == 8192 * 24 * per_token
    ends, block = 32_000 * D, 4096 * 32_000
    norms = 49 * D
    assert lora["frozen weights"] == 2 * n and lora["logits"] == 12 * block
    widths = quantize.layout(config, 4)
    codes = 2 * (ends + norms)
    for name, bits in widths.items():
        size = math.prod(danube3.Danube3.new(config, 0, "meta").get_submodule(name).weight.shape)
        codes += size * bits // 8 + 2 * size // 32
    assert qlora["frozen weights"] == codes and qlora["logits"] == 12 * block
    short = dataclasses.replace(training, sequence_length=512)
    short = train.memory_bytes(config, short, frozen=frozen(config, 4))
    assert short["logits"] == 2 * 512 * 32_000 + 6 * ends > 12 * 512 * 32_000  # the head, dequantized
    two = train.memory_bytes(config, dataclasses.replace(training, batch_size=2), 2, frozen=frozen(config, 16))
    layer = (n - 2 * ends) // 24
    assert two["frozen weights"] == n and two["unsharded"] == 2 * (2 * ends + 2 * layer)
    two = train.memory_bytes(config, dataclasses.replace(training, batch_size=2), 2, frozen=frozen(config, 4))
    assert two["unsharded"] == 2 * ends and two["frozen weights"] == codes - (ends + norms)


def test_what_fits_a_t4():
    """Of 16 GB, one conversation of 2,048 tokens at a time."""
    training = danube3.TrainConfig(16, 1, 1e-4, sequence_length=2048)
    for name, bits, checkpointing in (("500m", 16, False), ("500m", 4, False), ("4b", 16, True), ("4b", 4, False)):
        config = danube3.CONFIGS[name]
        part = frozen(config, bits)
        assert train.choose_checkpointing(config, training, "auto", 16e9, 1, part) is checkpointing
    with pytest.raises(danube3.DanubeError, match="training needs 72.9 GB"):
        train.choose_checkpointing(config, training, "auto", 16e9)
    with pytest.raises(danube3.DanubeError, match="a shorter --sequence-length, or --chat with --lora and"):
        train.choose_checkpointing(config, training, "auto", 2e9, 1, part)


def peak_of(step):
    """The largest sum of bytes that a step has allocated and not freed, as the profiler records it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(allocated.max())


@pytest.mark.parametrize("rank, bits, dtype, checkpointing, length", [
    (0, 16, "float32", False, 512), (0, 16, "float32", True, 512), (0, 16, "bfloat16", False, 512),
    (16, 16, "float32", False, 512), (16, 16, "bfloat16", False, 512), (16, 4, "bfloat16", False, 512),
    (16, 4, "bfloat16", True, 512), (16, 4, "bfloat16", True, 64), (16, 4, "float32", False, 64),
])  # fmt: skip
def test_the_plan_against_measured_peaks(rank, bits, dtype, checkpointing, length):
    """Within 10 %: weights, moments and the peak of a step of two micro-batches, in the proportions of 500m."""
    config = danube3.DanubeConfig(192, 512, 6, 8, 4, 24, 0.02, vocab_size=1_024)
    training = danube3.TrainConfig(2, 1, 1e-4, sequence_length=length, dtype=dtype)
    model = danube3.Danube3.new(config, 0).to(danube3.DTYPES[dtype] if rank else torch.float32)
    if bits < 16:
        packed = {}
        for name, width in quantize.layout(config, bits).items():
            weight = model.get_submodule(name).weight
            codes, scales = danube3.quantize_int8(weight) if width == 8 else danube3.quantize_int4(weight)
            packed |= {f"{name}.weight_packed": danube3.pack(codes, width), f"{name}.weight_scale": scales}
        state = {name: weight for name, weight in model.state_dict().items() if not name.endswith("proj.weight")}
        del state["lm_head.weight"]
        danube3.use_quantized_modules(model, packed).load_state_dict(state | packed)
    plan = train.memory_bytes(config, training, 1, checkpointing, train.frozen_part(model, rank))
    if rank:
        danube3.add_lora(model, rank, 0)
    if checkpointing:
        danube3.use_activation_checkpointing(model)
    optimizer = danube3.make_optimizer(model, training)
    ids = torch.randint(3, config.vocab_size, (2, length))

    def step():
        danube3.train_step(model, optimizer, ids, ids, training, 1e-4)

    step()
    measured = peak_of(step) + sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    measured += sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    print(f"planned {sum(plan.values()):,}, measured {measured:,}: {measured / sum(plan.values()):.3f}")
    assert 0.9 < measured / sum(plan.values()) < 1.1


def test_fp32_takes_twice_the_activations():
    config, training = danube3.CONFIGS["500m"], dataclasses.replace(danube3.TRAIN_CONFIGS["500m"], dtype="float32")
    memory = train.memory_bytes(config, training)
    assert memory["activations"] == 4 * 8_192 * 16 * (16 * 1_536 + 4 * (2 * 1_536 + 48 * 96 + 4 * 4_096))
    assert "weights (compute copy)" not in memory


def test_a_micro_batch_beyond_the_share_of_a_gpu_costs_nothing():
    """16 sequences on 8 GPUs are two on each, in one pass, whatever the micro-batch: the same memory."""
    config, training = danube3.CONFIGS["4b"], dataclasses.replace(danube3.TRAIN_CONFIGS["4b"], batch_size=16)
    two, sixteen = (dataclasses.replace(training, micro_batch_size=size) for size in (2, 16))
    assert train.memory_bytes(config, two, gpus=8) == train.memory_bytes(config, sixteen, gpus=8)
    one = train.memory_bytes(config, dataclasses.replace(training, micro_batch_size=1), gpus=8)
    assert one["gradients (fp32)"] == 8 * train.memory_bytes(config, two, gpus=8)["gradients (fp32)"]


@pytest.mark.parametrize("gigabytes, on", [(24, True), (80, False)])
def test_adapters_ask_for_what_they_need(gigabytes, on, monkeypatch):
    """4b as int4 and one conversation of 8,192 tokens: 38 GB of activations without activation checkpointing."""
    properties = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with torch.device("meta"):
        model = danube3.Danube3(danube3.CONFIGS["4b"])
        packed = {}
        for name, bits in quantize.layout(model.config, 4).items():
            linear = model.get_submodule(name)
            packed[f"{name}.weight_packed"] = torch.empty(linear.out_features, linear.in_features * bits // 8)
        danube3.use_quantized_modules(model, packed).requires_grad_(False)
    assert 2.3e9 < sum(buffer.nbytes for buffer in model.buffers()) < 2.5e9 and model.lm_head.bits == 8
    with torch.device("meta"):
        linear = model.model.layers[0].mlp.up_proj
        model.model.layers[0].mlp.up_proj = danube3.LoRALinear(linear, 16)
    training = danube3.TRAIN_CONFIGS["4b"]
    assert (training.sequence_length, training.micro_batch_size) == (8192, 1)
    train.set_activation_checkpointing(model, training, "auto", torch.device("cuda"), 16)
    assert {"forward" in vars(layer) for layer in model.model.layers} == {on}


def test_both_names_of_activation_checkpointing(monkeypatch):
    """--recompute, the first edition's flag, still works."""
    for flag in ("--activation-checkpointing", "--recompute"):
        monkeypatch.setattr("sys.argv", ["train.py", flag, "on"])
        assert train.arguments().activation_checkpointing == "on"


@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 16])
def test_sequences_divided_among_processes(world_size, monkeypatch, tmp_path, toy_data):
    """The 8 sequences of a toy step are divided evenly, or refused before anything is written."""

    class Reached(Exception):
        pass

    def trainer(*args):
        raise Reached

    monkeypatch.setattr(danube3, "rank_and_world_size", lambda: (0, world_size))
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda gathered, own: None)
    monkeypatch.setattr(danube3, "Trainer", trainer)
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["train.py", "--data", str(toy_data), "--out", str(out), "--device", "cpu"])
    if 8 % world_size == 0:
        with pytest.raises(Reached):
            train.main()
    else:
        words = f"{world_size} processes cannot share 8 sequences: change one"
        with pytest.raises(danube3.DanubeError, match=words):
            train.main()
    assert not out.exists()


def test_micro_batches_of_a_plan():
    """A GPU's micro-batch is never larger than its own sequences."""
    for gpus, accumulation, size in ((1, 1, 8), (2, 1, 4), (4, 1, 2), (8, 1, 1)):
        result = call("train.py", "--dry-run", "--gpus", gpus)
        words = f"{gpus} GPUs x {accumulation} gradient accumulation steps x micro-batch of {size}"
        assert result.returncode == 0 and words in result.stdout, result.stderr


def test_new_models_are_initialised_like_any_other():
    """Made on the meta device first, so that no memory is filled twice. There it can stay."""
    model, generator = danube3.Danube3(TINY), torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=TINY.initializer_range, generator=generator)
    new, plain = danube3.Danube3.new(TINY, 5).state_dict(), model.state_dict()
    assert new.keys() == plain.keys() and all(torch.equal(new[name], plain[name]) for name in new)
    shapes = danube3.Danube3.new(TINY, 5, "meta")
    assert shapes.device.type == "meta" and shapes.state_dict().keys() == plain.keys()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpus", "2"], "are for --dry-run"),
        (["--dry-run", "--config", "4b", "--gpus", "48"], "a step of 512 sequences cannot be divided evenly among 48"),
        (["--dry-run", "--config", "4b"], "take 2 GPUs"),
        (["--dry-run", "--config", "4b", "--gpus", "64", "--gpu-memory", "24"], "can be used: take 512 GPUs"),
    ],
)
def test_impossible_plans(flags, words):
    assert words in one_line_error(call("train.py", *flags))


def test_a_plan_for_64_gpus():
    result = call("train.py", "--config", "4b", "--dry-run", "--gpus", 64, "--tokens", "600B")
    assert result.returncode == 0, result.stderr
    assert "143,051 steps, 599,999,381,504 tokens" in result.stdout and "on 64 GPUs at 395.6 TFLOP/s" in result.stdout
    days = float(re.search(r"([\d.]+) days on 64 GPUs", result.stdout)[1])
    flops = danube3.flops_per_token(danube3.CONFIGS["4b"], 8_192) * 599_999_381_504
    assert days == pytest.approx(flops / 64 / (0.4 * 989e12) / 86_400, abs=0.01)
    assert re.search(r"^tokens +143,051 +599,999,381,504 +530B", result.stdout, re.M)


def test_short_counts():
    assert [short_count(n) for n in (7, 1500, 1_234_567, 2e9, 5.3e12)] == ["7", "1.5k", "1.23M", "2B", "5.3T"]


@pytest.mark.parametrize("name", ["toy", "500m", "4b"])
@pytest.mark.parametrize("order", ["staged", "constant", "reversed"])
def test_every_order_has_the_same_tokens_of_each_source(name, order):
    config = danube3.TRAIN_CONFIGS[name]
    other = train.remix(config, order)

    def tokens(config):
        shares = [(stage, Fraction(stage.tokens, sum(stage.mixture.values()))) for stage in config.stages]
        return {source: sum(unit * stage.mixture[source] for stage, unit in shares) for source in danube3.SOURCES}

    assert tokens(other) == tokens(config) and other.stage_ends[-1] == config.stage_ends[-1]
    web = [Fraction(stage.mixture["web"], sum(stage.mixture.values())) for stage in other.stages]
    expected = [Fraction(906, 1000), Fraction(817, 1000), Fraction(516, 1000)]
    if order == "constant":
        assert len(set(web)) == 1 and expected[2] < web[0] < expected[0]
    else:
        assert web == (expected if order == "staged" else expected[::-1])
    scaled = other.with_tokens(config.tokens_per_step * 1_000)
    assert [stage.mixture for stage in scaled.stages] == [stage.mixture for stage in other.stages]


def test_more_tokens_and_a_larger_batch_at_once():
    """A step larger than the toy's whole run is no mistake when --tokens asks for enough."""
    flags = ("--dry-run", "--sequence-length", 128, "--micro-batch-size", 1, "--tokens-per-step", 2**22)
    result = call("train.py", *flags, "--tokens", 2**24)
    assert result.returncode == 0 and "4 steps, 16,777,216 tokens" in result.stdout, result.stderr
    steps = re.findall(r"^stage \d +([\d,]+) +([\d,]+)", result.stdout, re.M)
    assert steps == [("2", f"{2**23:,}"), ("1", f"{2**22:,}"), ("1", f"{2**22:,}")]
    assert "raise --tokens" in one_line_error(call("train.py", *flags, "--tokens", 2**20))
