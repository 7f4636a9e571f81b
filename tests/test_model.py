"""Model and generation against transformers, and the properties that no rewrite may break."""

import dataclasses

import pytest
import torch
from conftest import TINY, random_model, transformers_model

import danube3
import sample

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


@pytest.mark.parametrize("T", [1, 2, 7, 33])
def test_cache_equals_no_cache(T):
    """A prompt read in any two parts, then token by token, gives the hidden states of the whole."""
    model, ids = random_model(TINY, dtype=torch.float64), torch.randint(0, TINY.vocab_size, (2, T + 3))
    whole = model.model(ids)
    for split in range(1, T + 1):
        cache = danube3.KVCache(TINY, 2, T + 3, torch.float64, ids.device)
        parts = [ids[:, :split], ids[:, split:T], *ids[:, T:].split(1, dim=1)]
        hidden = torch.cat([model.model(part, cache) for part in parts if part.shape[1]], dim=1)
        torch.testing.assert_close(hidden, whole, atol=1e-10, rtol=1e-6)
        assert cache.length == T + 3
    for count in (1, 2):  # a single token would fit any slice, even an empty one, and be lost without a word
        with pytest.raises(RuntimeError, match=f"length .{T + 3 + count}. exceeds dimension size .{T + 3}."):
            model.model(ids[:, :count], cache)
    assert cache.length == T + 3
    short = danube3.KVCache(TINY, 2, T + 1, torch.float64, ids.device)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
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
    assert cache.kv.shape == (2, 2, 3, 2, 20, 6) and cache.length == 0
    assert {name for name, value in vars(cache).items() if torch.is_tensor(value)} == {"kv"}


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
    model.model(torch.cat([prompts[:, :kept], torch.randint(3, 330, (2, 3))], dim=1), cache)  # and something else
    cache.length = kept
    monkeypatch.setattr(danube3.Decoder, "forward", lambda *args: lengths.append(args[1].shape[1]) or forward(*args))
    assert torch.equal(danube3.generate(model, prompts, 9, kv_cache=cache), expected)
    count = expected.shape[1] - 12
    assert lengths == [12 - kept] + [1] * (count - 1) and cache.length == 12 + count - 1
    monkeypatch.undo()
    whole = danube3.KVCache(TINY, 2, 24, torch.float32, prompts.device)
    model.model(expected[:, :-1], whole)
    torch.testing.assert_close(cache.kv[..., : cache.length, :], whole.kv[..., : cache.length, :])


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
    model.model(read, session.kv_cache)
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
