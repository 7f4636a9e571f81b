"""Model and generation against transformers, and the properties that no rewrite may break."""

import dataclasses
import gc
import math
import types
import unittest.mock

import pytest
import torch
import torch.utils._python_dispatch
from conftest import TINY, random_model, transformers_model

import danube3
import sample
import train
from data import cli

WIDE = dataclasses.replace(danube3.CONFIGS["4b"], num_hidden_layers=2, vocab_size=1_000)  # 0.3 billion parameters


@pytest.mark.parametrize("config", [danube3.CONFIGS["toy"], TINY, WIDE], ids=["toy", "tiny", "2 layers of 4b"])
def test_logits_and_loss_equal_transformers(config):
    ours = random_model(config)
    theirs = transformers_model(config, ours.state_dict())
    ids = torch.randint(0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(7))
    labels = ids.clone()
    labels[0, :9], labels[1, 20:] = danube3.IGNORE_INDEX, danube3.IGNORE_INDEX
    with torch.no_grad():
        expected = theirs(input_ids=ids, labels=labels)
        assert (ours(ids) - expected.logits).abs().max() < 1e-4
        mean = ours(ids, labels) / (labels[:, 1:] != danube3.IGNORE_INDEX).sum()
    torch.testing.assert_close(mean, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [danube3.CONFIGS["toy"], TINY], ids=["toy", "tiny"])
def test_greedy_equals_transformers(config):
    config = dataclasses.replace(config, max_position_embeddings=256)
    ours = random_model(config, seed=3)
    theirs = transformers_model(config, ours.state_dict())
    ids = torch.randint(3, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(8))
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    assert torch.equal(danube3.generate(ours, ids, 64), expected)


def test_gradients_equal_transformers():
    ours = random_model(TINY, dtype=torch.float64)
    theirs = transformers_model(TINY, ours.state_dict(), pad_token_id=None).double()
    # With a pad_token_id, transformers keeps that row of the embedding from learning. Ours has no such row.
    ids = torch.randint(0, TINY.vocab_size, (3, 17))
    (ours(ids, ids) / (3 * 16)).backward()
    theirs(input_ids=ids, labels=ids).loss.backward()
    for name, q in theirs.named_parameters():
        torch.testing.assert_close(
            ours.get_parameter(name).grad, q.grad, atol=1e-6, rtol=1e-5, msg=name
        )  # their rotary table is fp32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_survives_half_precision(dtype):
    """After .half(), distant positions still differ: the tables are exactly those of an fp32 model."""
    model = random_model(TINY, dtype=torch.float32).to(dtype)
    assert not list(model.buffers())
    cos, sin = danube3.rotary_table(torch.arange(8_000, 8_010), TINY.head_dim, TINY.rope_theta)
    assert cos.dtype == sin.dtype == torch.float32
    exact = torch.arange(8_000, 8_010, dtype=torch.float64)[:, None] * TINY.rope_theta ** (
        -torch.arange(0, TINY.head_dim, 2, dtype=torch.float64) / TINY.head_dim
    )
    torch.testing.assert_close(cos.double(), exact.cos(), atol=1e-3, rtol=0)
    x = torch.randn(1, 2, 10, TINY.head_dim).to(dtype)
    rotated = danube3.rotary_embedding(x, cos, sin)
    assert rotated.dtype == dtype
    torch.testing.assert_close(rotated, danube3.rotary_embedding(x.float(), cos, sin).to(dtype))
    assert model(torch.randint(0, 330, (1, 9))).dtype == torch.float32


def hidden_states(model, ids, cache):
    """Of `ids`, which the cache then holds too."""
    cache.next_positions(ids.shape[1])
    hidden = model.model(ids, cache)
    cache.length += ids.shape[1]
    return hidden


@pytest.mark.parametrize("T", [1, 2, 7, 33])
def test_cache_equals_no_cache(T):
    """A prompt read in any two parts, then token by token, gives the hidden states of the whole."""
    model, ids = random_model(TINY, dtype=torch.float64), torch.randint(0, TINY.vocab_size, (2, T + 3))
    whole = model.model(ids)
    for split in range(1, T + 1):
        cache = danube3.KVCache(TINY, 2, T + 3, torch.float64, ids.device)
        parts = [ids[:, :split], ids[:, split:T], *ids[:, T:].split(1, dim=1)]
        hidden = torch.cat([hidden_states(model, part, cache) for part in parts if part.shape[1]], dim=1)
        torch.testing.assert_close(hidden, whole, atol=1e-10, rtol=1e-6)
        assert cache.length == T + 3
    for count in (1, 2):  # a single token would fit any slice, even an empty one, and be lost without a word
        with pytest.raises(danube3.DanubeError, match=f"{T + 3 + count} tokens do not fit into a cache of {T + 3}"):
            model.next_logits(ids[:, :count], cache)
    assert cache.length == T + 3
    short = danube3.KVCache(TINY, 2, T + 1, torch.float64, ids.device)
    with pytest.raises(danube3.DanubeError, match="do not fit into a cache"):
        danube3.generate(model, ids[:, :T], 3, kv_cache=short)


def test_a_later_token_changes_nothing_before_it():
    model, ids = random_model(TINY), torch.randint(0, TINY.vocab_size, (1, 12))
    before = model(ids)
    for t in range(1, 12):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % TINY.vocab_size
        after = model(changed)
        assert (after[:, :t] - before[:, :t]).abs().max() < 1e-6
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def test_loss_in_blocks_is_the_loss(monkeypatch):
    model, ids = random_model(TINY, dtype=torch.float64), torch.randint(0, TINY.vocab_size, (3, 11))
    labels = ids.masked_fill(torch.rand(3, 11) < 0.3, danube3.IGNORE_INDEX)
    whole = model(ids, labels)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    for tokens in (1, 4, 32):
        monkeypatch.setattr(danube3, "LOGIT_TOKENS", tokens)
        loss = model(ids, labels)
        torch.testing.assert_close(loss, whole)
        for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), expected):
            torch.testing.assert_close(a, b)


def test_cache_holds_what_it_must_and_no_more():
    cache = danube3.KVCache(TINY, 3, 20, torch.float32, torch.device("cpu"))
    assert [each.shape for each in (*cache.keys, *cache.values)] == [(3, 2, 20, 6)] * 4 and cache.length == 0
    assert not any(torch.is_tensor(value) for value in vars(cache).values())


def test_initial_weights():
    config = danube3.CONFIGS["toy"]
    model, again = danube3.Danube3.new(config, 5), danube3.Danube3.new(config, 5)
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(p, q)
        if p.dim() == 2:
            assert (
                abs(p.std() / config.initializer_range - 1) < 0.02 and abs(p.mean()) < config.initializer_range / 20
            ), name
        else:
            assert torch.equal(p, torch.ones_like(p))
    assert not torch.equal(model.lm_head.weight, danube3.Danube3.new(config, 6).lm_head.weight)
    loss = model(ids := torch.randint(0, 1024, (4, 64)), ids).item() / (4 * 63)
    assert abs(loss - 6.93) < 0.4  # ln 1024: it knows nothing


def test_a_new_model_on_the_meta_device_has_shapes_only():
    meta, model = danube3.Danube3.new(TINY, 0, "meta"), danube3.Danube3.new(TINY, 0)
    assert all(parameter.is_meta for parameter in meta.parameters())
    shapes = [{name: p.shape for name, p in each.named_parameters()} for each in (meta, model)]
    assert shapes[0] == shapes[1] and not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.5, 9, 0.6), (1.0, 1, 1.0), (1.0, 0, 1e-6), (2.0, 400, 0.95)],
)
def test_sampling_filters_equal_transformers(temperature, top_k, top_p):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 330) * 3
    warpers = (
        [TemperatureLogitsWarper(temperature)]
        + [TopKLogitsWarper(k) for k in [top_k] if k]
        + [TopPLogitsWarper(p) for p in [top_p] if p < 1]
    )
    expected = LogitsProcessorList(warpers)(None, logits).softmax(-1)
    torch.testing.assert_close(danube3.next_token_probabilities(logits, temperature, top_k, top_p), expected)


def test_sampling_follows_the_probabilities():
    """4,000 draws of the first token against the model's own distribution. The seed decides."""
    model, ids = random_model(TINY), torch.tensor([[5, 9, 7]])
    prompts = ids.expand(4000, 3)
    first = danube3.generate(model, prompts, 1, temperature=0.8, top_k=12, seed=1)[:, 3]
    expected = danube3.next_token_probabilities(model(ids)[:, -1], 0.8, 12)[0]
    counts = torch.bincount(first, minlength=330) / 4000
    assert (counts - expected).abs().max() < 0.04 and counts[expected == 0].sum() == 0
    assert torch.equal(first, danube3.generate(model, prompts, 1, temperature=0.8, top_k=12, seed=1)[:, 3])
    assert not torch.equal(first, danube3.generate(model, prompts, 1, temperature=0.8, top_k=12, seed=2)[:, 3])


def test_sampling_at_temperature_one():
    """It samples, and does not take the likeliest token. A prompt of one token is enough."""
    model, ids = random_model(TINY), torch.full((2000, 1), 5)
    first = danube3.generate(model, ids, 1, temperature=1.0, seed=3)[:, 1]
    expected = danube3.next_token_probabilities(model(ids[:1])[:, -1], 1.0)[0]
    counts = torch.bincount(first, minlength=TINY.vocab_size) / 2000
    assert len(first.unique()) > 3 and (counts - expected).abs().max() < 0.05


def test_top_p_keeps_no_more_than_it_must():
    """Of four equal tokens two reach p = 1/2: the first two."""
    halves = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert torch.equal(danube3.next_token_probabilities(torch.zeros(1, 4), 1.0, top_p=0.5), halves)


def test_sampling_defaults_cut_nothing():
    model, ids = random_model(TINY), torch.randint(3, 330, (4, 6))
    plain = danube3.generate(model, ids, 12, temperature=1.0, seed=3)
    assert torch.equal(plain, danube3.generate(model, ids, 12, temperature=1.0, top_k=0, top_p=1.0, seed=3))
    tokens = list(danube3.generate_tokens(model, ids, 12, temperature=1.0, seed=3))
    assert torch.equal(plain[:, 6:], torch.stack(tokens, dim=1))
    assert not torch.equal(plain, danube3.generate(model, ids, 12, temperature=1.0, top_k=1, seed=3))


def test_generation_stops():
    """At </s>, for each sequence; at the number of tokens; at the context."""
    model, ids = random_model(TINY), torch.randint(3, 330, (3, 8))
    free = ids
    for _ in range(20):  # without stopping anywhere
        free = torch.cat([free, model(free)[:, -1:].argmax(-1)], dim=1)
    eos = int(free[0, 8 + 4])
    stopping = random_model(dataclasses.replace(TINY, eos_token_id=eos))
    out = danube3.generate(stopping, ids, 20)
    for new_ids, expected in zip(out[:, 8:].tolist(), free[:, 8:].tolist()):
        end = expected.index(eos) if eos in expected else len(expected)
        assert new_ids[: end + 1] == expected[: end + 1][: len(new_ids)] and set(new_ids[end:]) <= {eos}
    assert danube3.generate(stopping, ids[:1], 20).shape[1] <= 8 + 5
    steps = list(danube3.generate_tokens(stopping, ids, 20))  # its defaults are greedy too
    assert torch.equal(torch.stack(steps, dim=1), out[:, 8:])
    full = danube3.generate(model, ids, 10_000)
    assert full.shape[1] == TINY.max_position_embeddings or (full[:, -1] == 2).all()
    with pytest.raises(danube3.DanubeError, match="does not fit"):
        danube3.generate(model, torch.zeros(1, 65, dtype=torch.long), 1)
    assert torch.equal(danube3.generate(model, torch.full((1, 64), 7), 5), torch.full((1, 64), 7))


def test_generation_stops_at_every_stop_id():
    """Each of stop_ids ends a sequence, which then repeats eos_token_id."""
    model, ids = random_model(TINY), torch.randint(3, 330, (3, 8), generator=torch.Generator().manual_seed(2))
    model.stop_ids = []
    free = danube3.generate(model, ids, 20)[:, 8:].tolist()
    model.stop_ids = [free[0][6], free[1][3], 2]
    out = danube3.generate(model, ids, 20)[:, 8:].tolist()
    for new_ids, expected in zip(out, free):
        ends = [i for i, token_id in enumerate(expected) if token_id in model.stop_ids]
        end = ends[0] + 1 if ends else len(expected)
        assert new_ids[:end] == expected[:end][: len(new_ids)] and set(new_ids[end:]) <= {TINY.eos_token_id}
    assert TINY.eos_token_id in out[0] and TINY.eos_token_id in out[1]  # both ended early


@pytest.mark.parametrize("kept", [0, 3, 8, 11])
def test_generation_goes_on_from_a_cache(kept, monkeypatch):
    """What the cache holds of the prompts' beginning is not computed again, and what is generated is the same."""
    model, prompts = random_model(TINY), torch.randint(3, 330, (2, 12))
    expected, lengths, forward = danube3.generate(model, prompts, 9), [], danube3.Decoder.forward
    cache = danube3.KVCache(TINY, 2, 24, torch.float32, prompts.device)
    model.next_logits(torch.cat([prompts[:, :kept], torch.randint(3, 330, (2, 3))], dim=1), cache)  # and something else
    cache.length = kept
    monkeypatch.setattr(danube3.Decoder, "forward", lambda *args: lengths.append(args[1].shape[1]) or forward(*args))
    assert torch.equal(danube3.generate(model, prompts, 9, kv_cache=cache), expected)
    count = expected.shape[1] - 12
    assert lengths == [12 - kept] + [1] * (count - 1) and cache.length == 12 + count - 1
    monkeypatch.undo()
    whole = danube3.KVCache(TINY, 2, 24, torch.float32, prompts.device)
    model.next_logits(expected[:, :-1], whole)
    for found, right in zip(cache.keys + cache.values, whole.keys + whole.values):
        torch.testing.assert_close(found[:, :, : cache.length], right[:, :, : cache.length])


@pytest.mark.parametrize("kept", [0, 3, 8, 11])
def test_a_conversation_keeps_what_its_cache_has_in_common_with_the_prompt(kept, monkeypatch, tokenizer):
    """The longest common prefix, but never the last token, whose logits are needed: also where the cache holds more
    than the prompt, or all of it. What is generated is the same as without a cache."""
    model = random_model(TINY)
    read, ids = torch.randint(3, 330, (1, 14)), torch.randint(3, 330, (1, 12))
    ids[:, :kept] = read[:, :kept]
    ids[:, kept] = (read[:, kept] - 2) % 327 + 3  # another one
    if kept == 11:
        ids[:, kept] = read[:, kept]  # the cache holds the whole prompt
    session = sample.ChatSession(model, tokenizer, 9, temperature=0.0)
    model.next_logits(read, session.kv_cache)
    session.cached = read[0].tolist()
    expected, lengths, forward = danube3.generate(model, ids, 9)[0].tolist(), [], danube3.Decoder.forward
    monkeypatch.setattr(danube3.Decoder, "forward", lambda *args: lengths.append(args[1].shape[1]) or forward(*args))
    list(session.answer(ids[0].tolist()))
    assert session.exchanges[0][: len(expected)] == expected and set(session.exchanges[0][len(expected) :]) <= {2}
    assert lengths == [12 - kept] + [1] * (len(expected) - 12 - 1)
    assert session.cached == expected[: session.kv_cache.length] and session.kv_cache.length == len(expected) - 1


def test_first_difference():
    assert danube3.first_difference([5, 6, 7, 8, 9], [5, 9, 7, 8, 9]) == 1
    assert danube3.first_difference([5, 6, 7], [5, 6, 7]) == 3 and danube3.first_difference([1], [2]) == 0
    assert danube3.first_difference([5, 6], [5, 6, 7, 8]) == danube3.first_difference([5, 6, 7, 8], [5, 6]) == 2
    assert danube3.first_difference([], [5]) == danube3.first_difference([5], []) == 0


def test_logits_that_are_not_finite_are_refused():
    model = random_model(TINY)
    model.lm_head.weight.data[7] = torch.inf
    with pytest.raises(danube3.DanubeError, match="not finite.*checkpoint"):
        danube3.generate(model, torch.full((1, 3), 5), 2)


def test_a_tiny_temperature_is_the_likeliest_token():
    logits = 50 * torch.randn(4, 9)
    probabilities = danube3.next_token_probabilities(logits, 1e-38)
    assert torch.equal(probabilities, torch.nn.functional.one_hot(logits.argmax(-1), 9).float())


# ------------------------------------------------------------------------------------------------------- static shapes


def test_static_shapes_change_nothing():
    """Attention over a power of two of positions, with a mask, is attention over those that are filled."""
    config = dataclasses.replace(TINY, max_position_embeddings=600)
    model, ids = random_model(config, dtype=torch.float64), torch.randint(0, 330, (2, 262))
    whole = model(ids)
    cache = danube3.KVCache(config, 2, 600, torch.float64, ids.device)
    for each in cache.keys + cache.values:
        each[:, :, 262:] = torch.randn_like(each[:, :, 262:])  # an empty place may hold anything
    model.next_logits(ids[:, :250], cache)
    sizes = []
    for t in range(250, 262):
        cache.next_positions(1, static=True)
        sizes.append(cache.size)
        logits = model.last_logits(ids[:, t : t + 1], cache)
        cache.length += 1
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-5, atol=1e-5)
    assert sizes == [256] * 6 + [512] * 6
    cache.length = 512
    cache.next_positions(1, static=True)
    assert cache.size == 600


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_one_token_as_a_loop_is_the_linear_layer(bits, dtype):
    linear, x = torch.nn.Linear(64, 40, bias=False), torch.randn(1, 1, 64).to(dtype)
    exact = x.double() @ linear.weight.detach().double().T
    if bits < 16:
        codes, scales = danube3.round_to_nearest(linear.weight.detach(), bits)
        linear = danube3.QuantizedLinear(40, 64, bits)
        linear.load_state_dict({"weight_packed": danube3.pack(codes, bits), "weight_scale": scales})
        exact = x.double() @ linear.weight.double().T
    with torch.no_grad():
        for shape in ((1, 1, 64), (1, 64)):
            y = cli.VectorProduct(linear)(x.view(shape))
            assert y.shape == (*shape[:-1], 40) and y.dtype == dtype
            tolerance = {torch.float32: 2e-6, torch.bfloat16: 5e-3}[dtype]
            torch.testing.assert_close(y.double().flatten(), exact.flatten(), rtol=tolerance, atol=tolerance)


def test_the_loop_adds_exact_products():
    """Rounded to bf16, these products would lose what is left when they cancel."""
    linear, x = torch.nn.Linear(64, 40, bias=False).bfloat16(), torch.randn(1, 32).bfloat16()
    linear.weight.data[:, 32:] = -linear.weight.data[:, :32]
    x = torch.cat((x, x * 1.0078125), dim=1)
    exact = x.double() @ linear.weight.detach().double().T
    found = cli.VectorProduct(linear)(x).detach().double()
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_what_becomes_a_loop():
    """All linear layers but the small matrices of adapters, and layers of 4 bits that have PyTorch's kernel."""
    config = dataclasses.replace(TINY, hidden_size=32, intermediate_size=64, head_dim=16)
    model = random_model(config)
    for name, bits, fast in (("q_proj", 8, True), ("k_proj", 4, True), ("v_proj", 4, False)):
        old = model.get_submodule(f"model.layers.0.self_attn.{name}")
        quantized = danube3.QuantizedLinear(old.out_features, old.in_features, bits)
        quantized.fast = fast
        model.set_submodule(f"model.layers.0.self_attn.{name}", quantized)
    danube3.add_lora(model, 2, seed=0)
    before = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    cli.compile_decoding(model)
    step = model.compiled_step
    cli.compile_decoding(model)
    assert model.compiled_step is not step and before == {
        name: weight.data_ptr() for name, weight in model.state_dict().items()
    }
    twin = model.compiled_step.__self__
    assert twin.compiled_step is None
    loops = {name.removesuffix(".base_layer") for name, each in twin.named_modules() if type(each) is cli.VectorProduct}
    layers = {name for name, _ in model.named_modules() if name.endswith("_proj")} | {"lm_head"}
    assert loops == layers - {"model.layers.0.self_attn.k_proj"}
    assert not any(isinstance(each, cli.VectorProduct) for each in model.modules())
    assert {weight.data_ptr() for weight in twin.state_dict().values()} == {*before.values()}


@pytest.mark.slow
@pytest.mark.skipif(not danube3.has_compiler(), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("bits, rank", [((), 0), ((8,), 0), ((4,), 0), ((4, 8), 0), ((), 2), ((8,), 2)])
def test_compiled_decoding_is_plain_decoding(bits, rank):
    """One graph of all layers for each power of two, no break, the same tokens; also for another sequence, quantized,
    and with adapters. Prompts are not compiled."""
    config = dataclasses.replace(TINY, hidden_size=32, intermediate_size=64, head_dim=16, max_position_embeddings=600)
    model, prompts = random_model(config), torch.randint(3, 330, (2, 250))
    for name, linear in list(model.named_modules()):
        if bits and isinstance(linear, torch.nn.Linear):
            width = bits["layers.0" in name] if len(bits) > 1 else bits[0]
            codes, scales = danube3.round_to_nearest(linear.weight.detach(), width)
            quantized = danube3.QuantizedLinear(linear.out_features, linear.in_features, width)
            quantized.load_state_dict({"weight_packed": danube3.pack(codes, width), "weight_scale": scales})
            model.set_submodule(name, quantized)
            if len(bits) > 1:  # the head has a number of rows that PyTorch's int4 kernel does not know
                quantized.make_fast()
    if rank:
        danube3.add_lora(model, rank, seed=0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.1)
    model.stop_ids = []
    expected = danube3.generate(model, prompts[:1], 15), danube3.generate(model, prompts[1:], 3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    addresses = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    cli.compile_decoding(model)
    cli.compile_decoding(model)  # again: nothing changes
    assert torch.equal(danube3.generate(model, prompts[:1], 15), expected[0])
    assert torch.equal(danube3.generate(model, prompts[1:], 3), expected[1])
    for length in (3, 9, 14):  # one token of a prompt is left, in another memory layout each time
        cache = danube3.KVCache(config, 1, 600, torch.float32, prompts.device)
        with torch.no_grad():
            model.next_logits(prompts[:1, : length - 1], cache)
        danube3.generate(model, prompts[:1, :length], 2, kv_cache=cache)
    counters = torch._dynamo.utils.counters
    graphs = 2 + 2 * max(1, len(bits))  # norm, head, and for each kind of layer two
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert danube3.generate(model, prompts, 3).shape == (2, 253)  # several sequences: not compiled
    assert counters["stats"]["unique_graphs"] == graphs
    cache.length = 520
    with torch.no_grad():
        model.next_logits(prompts[:1, :1], cache)
    assert counters["stats"]["unique_graphs"] == graphs + max(1, len(bits))  # shapes stay constants
    assert addresses == {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    twin = model.compiled_step.__self__
    assert twin is not model and {weight.data_ptr() for weight in twin.state_dict().values()} == {*addresses.values()}


class RecordedOperations(torch.utils._python_dispatch.TorchDispatchMode):
    """What a CUDA graph is, for a CPU: the operations between __enter__ and __exit__, on the memory that they had."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for function, args, _, result in self.operations:  # a recording computes nothing
            for tensor in torch.utils._pytree.tree_leaves(result):
                if not function.is_view and getattr(tensor, "is_floating_point", bool)() and tensor is not args[0]:
                    tensor.fill_(math.nan)

    def replay(self):
        for function, args, kwargs, result in self.operations:
            if not function.is_view:
                again = function(*args, **kwargs)
                for old, new in zip(*map(torch.utils._pytree.tree_leaves, (result, again))):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


def test_decoding_is_timed_after_what_is_done_once(monkeypatch):
    """The first round may compile. A model may know fewer positions than are timed."""
    model, clock = random_model(TINY), iter([0.0, 640.0, 0.0, 64.0, 0.0, 32.0, 0.0, 128.0])
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(clock))
    speed, read = sample.measure_decoding(model)
    weights = sum(weight.nbytes for weight in model.parameters()) - model.model.embed_tokens.weight.nbytes
    assert TINY.max_position_embeddings < 72 and speed == 2 and read == 2 * weights


def test_a_cuda_graph_is_recorded_for_each_cache_and_size(monkeypatch):
    for name, fake in (("CUDAGraph", RecordedOperations), ("graph", lambda graph: graph)):
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, unittest.mock.MagicMock())
    config = dataclasses.replace(TINY, max_position_embeddings=600)
    model, prompts = random_model(config), torch.randint(3, 330, (3, 253))
    model.stop_ids = []
    expected = [danube3.generate(model, prompt[None], 8) for prompt in prompts]
    model.compiled_step = step = cli.GraphedStep(random_model(config))
    passes, last_logits = [], step.model.last_logits
    monkeypatch.setattr(step.model, "last_logits", lambda *args: passes.append(1) or last_logits(*args))
    caches = [danube3.KVCache(config, 1, 600, torch.float32, prompts.device) for _ in prompts]
    started = [danube3.generate_tokens(model, prompt[None], 8, kv_cache=each) for prompt, each in zip(prompts, caches)]
    found = [torch.stack(tokens, 1) for tokens in zip(*zip(*started))]  # in turns
    for prompt, tokens, right in zip(prompts, found, expected):
        assert torch.equal(torch.cat((prompt[None], tokens), 1), right)
    assert [sorted(graphs) for graphs in step.graphs.values()] == [[256, 512]] * 3
    assert len(passes) == 2 * 6  # once before each recording, in which nothing can be compiled
    cache, ids = danube3.KVCache(config, 1, 600, torch.float32, prompts.device), prompts.clone()
    with torch.no_grad():  # neither logits that a user keeps are overwritten, nor the ids
        first = model.next_logits(ids[:1, :1], cache)
        kept = first.clone()
        model.next_logits(ids[:1, 1:2], cache)
    assert torch.equal(first, kept) and torch.equal(ids, prompts) and len(step.graphs) == 4
    del cache, caches[0], started
    gc.collect()
    assert len(step.graphs) == 2


def test_the_chosen_gpu_is_the_current_one(monkeypatch):
    """CUDA graphs are recorded on the current device."""
    chosen, zeros = [], types.SimpleNamespace(item=lambda: 0.0, is_cuda=True, device=torch.device("cuda:1"))
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert cli.pick_device("cuda:1") == zeros.device and chosen == [zeros.device]


def test_the_kind_of_gpu_is_a_constant_of_compiled_code(monkeypatch):
    capability = types.SimpleNamespace(untraceable=iter([(9, 0)]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: next(capability.untraceable))
    device, x = torch.device("cuda"), torch.ones(3)
    train.compile_model(random_model(TINY))  # says so
    compiled = torch.compile(lambda x: x + 1 if danube3.is_recent_gpu(device) else x, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x + 1) and not danube3.is_recent_gpu(torch.device("cpu"))


def test_a_norm_casts_once_under_autocast():
    """The linear layers that read a norm get the same bf16 tensor; without autocast nothing is cast."""
    model, ids, seen = random_model(TINY), torch.randint(3, 330, (1, 8)), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(ids)
        attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
        assert seen[attention + "q_proj"] is seen[attention + "k_proj"] is seen[attention + "v_proj"]
        assert seen[mlp + "gate_proj"] is seen[mlp + "up_proj"]
        assert {seen[name].dtype for name in seen} == {dtype}


@pytest.mark.parametrize(
    "wish, device, config, expected",
    [
        (None, "cuda", "500m", True),
        (None, "cuda", "toy", False),
        (None, "cpu", "500m", False),
        (True, "cpu", "toy", True),
    ],
)
def test_what_is_compiled(wish, device, config, expected, monkeypatch):
    """By default large models on GPUs; where there is no compiler, nothing, unless one asks for it."""
    arguments = torch.device(device), danube3.CONFIGS[config]
    for found in (True, False):
        monkeypatch.setattr(danube3, "has_compiler", lambda found=found: found)
        assert cli.shall_compile(wish, *arguments) == (expected and (found or wish is not None))
        assert cli.shall_compile(False, *arguments) is False


def test_what_torch_compile_needs(monkeypatch):
    for path, gpu, triton, expected in (
        ("/bin/g++", False, False, True),
        ("/bin/g++", True, True, True),
        ("/bin/g++", True, False, False),
        (None, True, True, False),
    ):
        monkeypatch.setattr(danube3.shutil, "which", lambda name, path=path: path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda triton=triton: triton)
        assert danube3.has_compiler() == expected
