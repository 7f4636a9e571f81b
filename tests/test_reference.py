"""Holds reference.py against independent implementations: PyTorch's own operations and autograd, central differences,
torch.optim.AdamW, torch.nn.utils.clip_grad_norm_, and transformers' LlamaForCausalLM, all in float64.
Seeds are new in each run. A failing test prints its own, and SEED=... pytest ... repeats it."""

import ast
import math
import os
import pathlib
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F

SHAPES = [(1, 6, 1), (2, 6, 2), (7, 96, 4), (33, 120, 2)]  # T, h, H/K


@pytest.fixture
def rng(request):
    seed = int(os.environ.get("SEED", np.random.SeedSequence().entropy % 2**32))  # a new one each run, shown on failure
    print(f"{request.node.name}: seed {seed}")
    return np.random.default_rng(seed)


def relative_error(a, b, floor=1e-300):
    """The largest difference over the largest |b|, or over `floor` where that is smaller (rounding noise about 0)."""
    a, b = np.asarray(a), np.asarray(b.detach() if torch.is_tensor(b) else b)
    assert a.shape == b.shape and a.dtype == np.float64, (a.shape, b.shape, a.dtype)
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), floor)) if a.size else 0.0


def assert_close(a, b, tolerance=1e-12, floor=1e-300):
    assert relative_error(a, b, floor) < tolerance, relative_error(a, b, floor)


def tensor(a):
    return torch.tensor(a, requires_grad=np.issubdtype(np.asarray(a).dtype, np.floating))


def assert_gradients(f, gradients, arrays, grad, tolerance=1e-12, floor=1e-300):
    """Compare `gradients`, those of the twin, with autograd's for f, a torch function of the arrays. -> f's value"""
    leaves = [tensor(a) for a in arrays]
    out = f(*leaves)
    expected = torch.autograd.grad(out, leaves, torch.tensor(grad), allow_unused=False)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_close(ours, theirs, tolerance, floor)
    return out


def assert_central_differences(f, gradients, arrays, grad, rng, step=1e-5, tolerance=1e-7):
    """The derivative of sum(grad * f) along a random direction in each array, the others held."""
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(arrays[i].shape)
        moved = [[a + sign * step * direction if j == i else a for j, a in enumerate(arrays)] for sign in (1, -1)]
        slope = float(np.sum(grad * (f(*moved[0]) - f(*moved[1])))) / (2 * step)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction) + 1e-3
        assert abs(slope - np.sum(gradient * direction)) < tolerance * scale


# --------------------------------------------------------------------------------------------------------------------
# Building blocks


@pytest.mark.parametrize("shape", [(1, 1, 6), (2, 7, 96), (3, 33, 120), (5, 17)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])  # 1e-3: eps matters
def test_rms_norm(rng, shape, scale):
    x, weight, grad = scale * rng.standard_normal(shape), rng.normal(1, 0.5, shape[-1]), rng.standard_normal(shape)
    eps = 1e-5
    grads = ref.rms_norm_backward(grad, x, weight, eps)
    out = assert_gradients(lambda x, w: F.rms_norm(x, (shape[-1],), w, eps), grads, (x, weight), grad)
    assert_close(ref.rms_norm(x, weight, eps), out)
    # dx shrinks as 1 / scale, so the difference is taken over a step of the scale of x
    assert_central_differences(lambda x, w: ref.rms_norm(x, w, eps), grads, (x, weight), grad, rng, 1e-5 * scale, 1e-6)


def test_rms_norm_of_zero_is_finite():
    x, weight = np.zeros((2, 6)), np.ones(6)
    assert np.all(ref.rms_norm(x, weight, 1e-5) == 0)
    assert np.all(np.isfinite(ref.rms_norm_backward(np.ones((2, 6)), x, weight, 1e-5)[0]))


@pytest.mark.parametrize("h", [6, 96, 120])
@pytest.mark.parametrize("start", [0, 5, 8000])
def test_rotary_table(h, start):
    """Against the scalar functions of math, angle by angle."""
    theta = 100_000
    cos, sin = ref.rotary_table(np.arange(start, start + 9), h, theta)
    assert cos.shape == sin.shape == (9, h // 2)
    for t in range(9):
        for i in range(h // 2):
            angle = (start + t) / math.pow(theta, 2 * i / h)
            assert abs(cos[t, i] - math.cos(angle)) < 1e-11 and abs(sin[t, i] - math.sin(angle)) < 1e-11


@pytest.mark.parametrize("T,h,groups", SHAPES)
def test_rotary_embedding(rng, T, h, groups):
    x, grad = rng.standard_normal((2, 2 * groups, T, h)), rng.standard_normal((2, 2 * groups, T, h))
    cos, sin = ref.rotary_table(np.arange(11, 11 + T), h, 1e5)

    def rotate(x):  # pairs as complex numbers times e^(i angle)
        rotated = torch.complex(x[..., : h // 2], x[..., h // 2 :]) * torch.complex(tensor(cos), tensor(sin)).detach()
        return torch.cat([rotated.real, rotated.imag], dim=-1)

    grads = [ref.rotary_embedding_backward(grad, cos, sin)]
    assert_close(ref.rotary_embedding(x, cos, sin), assert_gradients(rotate, grads, (x,), grad))
    assert_central_differences(lambda x: ref.rotary_embedding(x, cos, sin), grads, (x,), grad, rng)
    assert_close(ref.rotary_embedding(ref.rotary_embedding(x, cos, sin), cos, -sin), x)
    assert_close(np.linalg.norm(ref.rotary_embedding(x, cos, sin), axis=-1), np.linalg.norm(x, axis=-1))


@pytest.mark.parametrize("h", [6, 96, 120])
def test_rotary_depends_on_the_distance_only(rng, h):
    q, k = rng.standard_normal((1, h)), rng.standard_normal((1, h))

    def score(m, n):
        return float(
            (
                ref.rotary_embedding(q, *ref.rotary_table([m], h, 1e5))
                @ ref.rotary_embedding(k, *ref.rotary_table([n], h, 1e5)).T
            )[0, 0]
        )

    for distance in (0, 1, 7, 100):
        for n in (1, 50, 3000):
            assert abs(score(n + distance, n) - score(distance, 0)) < 1e-9
    assert abs(score(3, 0) - score(0, 3)) > 1e-6  # and on its sign


def test_rotary_is_half_split_not_interleaved():
    x = np.zeros((1, 6))
    x[0, 0] = 1.0
    y = ref.rotary_embedding(x, *ref.rotary_table([1], 6, 1e5))
    assert np.allclose(y, [[math.cos(1), 0, 0, math.sin(1), 0, 0]])


def torch_attention(q, k, v):
    T, S = q.shape[-2], k.shape[-2]
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("T,h,groups", SHAPES)
@pytest.mark.parametrize("cached", [0, 1, 5])
def test_grouped_query_attention(rng, T, h, groups, cached):
    B, K, S = 2, 2, T + cached
    q, grad = rng.standard_normal((2, B, K * groups, T, h))
    k, v = rng.standard_normal((2, B, K, S, h))
    grads = ref.grouped_query_attention_backward(grad, q, k, v)
    out = assert_gradients(torch_attention, grads, (q, k, v), grad, 1e-12, 1e-3)  # T = S = 1: dq = dk = 0
    assert_close(ref.grouped_query_attention(q, k, v), out)
    assert_central_differences(ref.grouped_query_attention, grads, (q, k, v), grad, rng)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_one_head_at_a_time(rng, groups):
    """A loop over every query head and every query, with nothing vectorized."""
    B, K, T, S, h = 2, 3, 4, 7, 6
    q, (k, v) = rng.standard_normal((B, K * groups, T, h)), rng.standard_normal((2, B, K, S, h))
    out = ref.grouped_query_attention(q, k, v)
    for b in range(B):
        for i in range(K * groups):
            for t in range(T):
                end = S - T + t + 1
                exps = [math.exp(sum(q[b, i, t] * k[b, i // groups, s]) / math.sqrt(h)) for s in range(end)]
                value = sum(e / sum(exps) * v[b, i // groups, s] for s, e in enumerate(exps))
                assert np.allclose(out[b, i, t], value, rtol=1e-12, atol=1e-13)


def test_attention_of_huge_scores_is_finite(rng):
    q, k, v = 1e3 * rng.standard_normal((3, 1, 2, 5, 6))
    assert np.all(np.isfinite(ref.grouped_query_attention(q, k, v)))
    assert all(np.all(np.isfinite(g)) for g in ref.grouped_query_attention_backward(v, q, k, v))


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 7, 33)])
def test_swiglu(rng, shape):
    gate, up, grad = 3 * rng.standard_normal(shape), rng.standard_normal(shape), rng.standard_normal(shape)
    grads = ref.swiglu_backward(grad, gate, up)
    assert_close(ref.swiglu(gate, up), assert_gradients(lambda g, u: F.silu(g) * u, grads, (gate, up), grad))
    assert_central_differences(ref.swiglu, grads, (gate, up), grad, rng)


def test_swiglu_far_out():
    gate = np.array([-1e4, -800.0, -40.0, 0.0, 40.0, 800.0, 1e4])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        out, (dgate, _) = ref.swiglu(gate, np.ones(7)), ref.swiglu_backward(np.ones(7), gate, np.ones(7))
    expected = F.silu(torch.tensor(gate)).numpy()
    assert np.allclose(out, expected, rtol=1e-12, atol=1e-300) and np.all(np.isfinite(dgate))


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (2, 1, 4, 5)])
def test_linear(rng, shape):
    x, weight, grad = rng.standard_normal(shape), rng.standard_normal((9, 5)), rng.standard_normal(shape[:-1] + (9,))
    grads = ref.linear_backward(grad, x, weight)
    assert_close(ref.linear(x, weight), assert_gradients(F.linear, grads, (x, weight), grad))
    assert_central_differences(ref.linear, grads, (x, weight), grad, rng)


def test_embedding(rng):
    weight, ids = rng.standard_normal((11, 6)), rng.integers(0, 5, (3, 8))  # few ids: many repeats
    grad = rng.standard_normal((3, 8, 6))
    dweight = ref.embedding_backward(grad, ids, 11)
    out = assert_gradients(lambda w: F.embedding(torch.tensor(ids), w), [dweight], (weight,), grad)
    assert_close(ref.embedding(ids, weight), out)
    assert np.all(dweight[5:] == 0)
    assert_central_differences(lambda w: ref.embedding(ids, w), [dweight], (weight,), grad, rng)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_cross_entropy(rng, scale):
    logits, labels = scale * rng.standard_normal((33, 17)), rng.integers(0, 17, 33)
    labels[rng.permutation(33)[:12]] = -100
    dlogits = ref.cross_entropy_backward(logits, labels)
    out = assert_gradients(
        lambda z: F.cross_entropy(z, torch.tensor(labels), reduction="sum", ignore_index=-100),
        [dlogits],
        (logits,),
        np.array(1.0),
    )
    assert abs(ref.cross_entropy(logits, labels) - out.item()) < 1e-12 * out.item()
    assert np.all(dlogits[labels == -100] == 0)
    if scale == 1.0:
        assert_central_differences(lambda z: ref.cross_entropy(z, labels), [dlogits], (logits,), 1.0, rng)


def test_cross_entropy_without_targets(rng):
    logits, labels = rng.standard_normal((4, 5)), np.full(4, -100)
    assert ref.cross_entropy(logits, labels) == 0.0 and np.all(ref.cross_entropy_backward(logits, labels) == 0)


def test_softmax(rng):
    for scale in (1.0, 1e4):
        x = scale * rng.standard_normal((3, 4, 9))
        assert_close(ref.softmax(x), torch.softmax(torch.tensor(x), -1))


# --------------------------------------------------------------------------------------------------------------------
# The model against transformers


def tiny_config(h=6, K=2, groups=2, layers=2, D=None, I=20, V=37):
    return SimpleNamespace(
        hidden_size=D or K * groups * h,
        intermediate_size=I,
        num_hidden_layers=layers,
        head_dim=h,
        num_attention_heads=K * groups,
        num_key_value_heads=K,
        vocab_size=V,
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        eos_token_id=2,
    )


def random_weights(rng, config, scale=0.3):
    D, h = config.hidden_size, config.head_dim
    H, K, width = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    shapes = {
        "self_attn.q_proj": (H * h, D),
        "self_attn.k_proj": (K * h, D),
        "self_attn.v_proj": (K * h, D),
        "self_attn.o_proj": (D, H * h),
        "mlp.gate_proj": (width, D),
        "mlp.up_proj": (width, D),
        "mlp.down_proj": (D, width),
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
    }
    names = {f"model.layers.{i}.{n}.weight": s for i in range(config.num_hidden_layers) for n, s in shapes.items()}
    names |= {
        "model.embed_tokens.weight": (config.vocab_size, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (config.vocab_size, D),
    }
    return {n: rng.normal(0, scale, s) if len(s) == 2 else rng.normal(1, 0.4, s) for n, s in names.items()}


@pytest.fixture
def float64_transformers(monkeypatch):
    """transformers computes norms, rotary tables, softmax and loss in float32 whatever the model's type. Here its own
    code runs unchanged, but the names it calls float32 by mean float64 (`torch.float32` and `torch.float` as seen from
    its Llama module, and the method `.float()`)."""
    import transformers.models.llama.modeling_llama as llama

    wider = SimpleNamespace(**{**vars(torch), "float32": torch.float64, "float": torch.float64})
    monkeypatch.setattr(llama, "torch", wider)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def llama_model(config, weights, dtype=torch.float64):
    """pad_token_id stays None. With 0, transformers makes row 0 of the embedding a `padding_idx`, which never gets a
    gradient, even where token 0 is an ordinary <unk> in the text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {k: v for k, v in vars(config).items() if k != "rope_theta"}
    hf_config = LlamaConfig(
        **fields,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        bos_token_id=1,
        pad_token_id=None,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(hf_config).to(dtype)
    missing, unexpected = model.load_state_dict({n: torch.tensor(w) for n, w in weights.items()}, strict=False)
    assert not missing and not unexpected
    assert set(n for n, _ in model.named_parameters()) == set(weights)
    return model


def random_batch(rng, config, B, T, masked=0.3):
    input_ids = rng.integers(0, config.vocab_size, (B, T))
    labels = np.where(rng.random((B, T)) < masked, -100, rng.integers(0, config.vocab_size, (B, T)))
    return input_ids, labels


CASES = [(1, 6, 2, 1, None), (2, 6, 1, 4, None), (7, 96, 1, 2, 40), (33, 120, 1, 4, 36), (33, 6, 2, 2, 28)]


@pytest.mark.parametrize("T,h,K,groups,D", CASES)
def test_model_against_transformers(rng, float64_transformers, T, h, K, groups, D):
    config = tiny_config(h, K, groups, D=D)
    weights = random_weights(rng, config)
    model = llama_model(config, weights)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float64
    input_ids, labels = random_batch(rng, config, 3, T)
    labels[:, 0] = 5  # column 0 is never a target
    out = model(input_ids=torch.tensor(input_ids), use_cache=False)
    assert out.logits.dtype == torch.float64
    assert_close(ref.danube3(input_ids, weights, config), out.logits, 1e-10)

    loss, count, grads = ref.danube3_loss_and_gradients(input_ids, labels, weights, config)
    assert count == int((labels[:, 1:] != -100).sum()) and set(grads) == set(weights)
    if count == 0:
        assert loss == 0.0 and all(np.all(g == 0) for g in grads.values())
        return
    theirs = (
        model(
            input_ids=torch.tensor(input_ids), labels=torch.tensor(labels), num_items_in_batch=count, use_cache=False
        ).loss
        * count
    )
    theirs.backward()
    assert theirs.dtype == torch.float64
    assert abs(loss - theirs.item()) < 1e-10 * theirs.item()
    floor = 1e-3 * max(np.max(np.abs(g)) for g in grads.values())  # T = 2: the gradients of q and k are 0
    for name, parameter in model.named_parameters():
        assert_close(grads[name], parameter.grad, 1e-10, floor)
    largest = max(relative_error(grads[n], p.grad, floor) for n, p in model.named_parameters())
    print(f"logits {relative_error(ref.danube3(input_ids, weights, config), out.logits):.1e}, gradients {largest:.1e}")


def test_model_against_unpatched_transformers(rng):
    """The same without any patch, as closely as its float32 parts allow."""
    config = tiny_config(6, 2, 2)
    weights = random_weights(rng, config)
    model = llama_model(config, weights)
    input_ids, labels = random_batch(rng, config, 2, 17)
    out = model(input_ids=torch.tensor(input_ids), labels=torch.tensor(labels))
    out.loss.backward()
    loss, count, grads = ref.danube3_loss_and_gradients(input_ids, labels, weights, config)
    assert_close(ref.danube3(input_ids, weights, config), out.logits, 2e-5)
    assert abs(loss / count - out.loss.item()) < 1e-5
    for name, parameter in model.named_parameters():
        assert_close(grads[name] / count, parameter.grad, 2e-4)


def test_gradients_by_central_differences(rng):
    config = tiny_config(6, 2, 2, D=10)
    weights = random_weights(rng, config)
    input_ids, labels = random_batch(rng, config, 2, 7)
    _, _, grads = ref.danube3_loss_and_gradients(input_ids, labels, weights, config)
    for name in weights:
        direction, step = rng.standard_normal(weights[name].shape), 1e-5
        moved = ({**weights, name: weights[name] + sign * step * direction} for sign in (1, -1))
        plus, minus = (ref.danube3_loss_and_gradients(input_ids, labels, w, config)[0] for w in moved)
        scale = np.linalg.norm(grads[name]) * np.linalg.norm(direction)
        assert abs((plus - minus) / (2 * step) - np.sum(grads[name] * direction)) < 1e-6 * scale, name


def test_causality(rng):
    config = tiny_config(6, 2, 2)
    weights = random_weights(rng, config)
    input_ids = rng.integers(0, 37, (2, 12))
    logits = ref.danube3(input_ids, weights, config)
    for t in range(12):
        changed = input_ids.copy()
        changed[:, t] = (changed[:, t] + 1) % 37
        difference = np.abs(ref.danube3(changed, weights, config) - logits).max(axis=(0, 2))
        assert np.all(difference[:t] == 0) and difference[t] > 1e-6 and np.all(difference[t:] > 0)


@pytest.mark.parametrize("T", [2, 7, 33])
def test_cache_equals_no_cache_for_every_split(rng, T):
    config = tiny_config(6, 2, 2)
    weights = random_weights(rng, config)
    input_ids = rng.integers(0, 37, (2, T))
    whole = ref.danube3(input_ids, weights, config)
    splits = [[t] for t in range(1, T)] + [list(range(1, T)), sorted({1, T // 3 + 1, T - 1} - {T})]
    for empty in ([], [None, None]):
        for split in splits:
            cache = list(empty)
            pieces = [ref.danube3(piece, weights, config, cache) for piece in np.split(input_ids, split, axis=1)]
            assert_close(np.concatenate(pieces, axis=1), whole)
            assert len(cache) == 2 and all(a.shape == (2, 2, T, 6) for pair in cache for a in pair)


def test_decode_against_transformers_with_cache(rng, float64_transformers):
    config = tiny_config(6, 2, 2)
    weights = random_weights(rng, config)
    model, ids = llama_model(config, weights), rng.integers(0, 37, (2, 11))
    cache, past = [], None
    for piece in np.split(ids, [4, 5, 6, 9], axis=1):
        with torch.no_grad():
            out = model(input_ids=torch.tensor(piece), past_key_values=past, use_cache=True)
        past = out.past_key_values
        assert_close(ref.danube3(piece, weights, config, cache), out.logits, 1e-10)


# --------------------------------------------------------------------------------------------------------------------
# Sampling


def test_next_token_probabilities_against_transformers(rng):
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for _ in range(200):
        V = int(rng.integers(1, 60))
        logits, temperature = 3 * rng.standard_normal(V), float(rng.choice([0.3, 0.8, 1.0, 1.7]))
        top_k, top_p = int(rng.choice([0, 1, 5, 20, V])), float(rng.choice([0.01, 0.5, 0.9, 0.999, 1.0]))
        z = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits)[None])
        z = TopKLogitsWarper(top_k)(None, z) if top_k else z
        z = TopPLogitsWarper(top_p)(None, z) if top_p < 1 else z
        ours = ref.next_token_probabilities(logits, temperature, top_k, top_p)
        assert_close(ours, torch.softmax(z[0], -1))
        assert abs(ours.sum() - 1) < 1e-12


def test_next_token_probabilities_by_hand():
    probabilities, logits = ref.next_token_probabilities, np.log([0.1, 0.4, 0.2, 0.3])
    assert np.allclose(probabilities(logits, 1.0, 0, 1.0), [0.1, 0.4, 0.2, 0.3])
    assert np.allclose(probabilities(logits, 1.0, 2, 1.0), [0, 4 / 7, 0, 3 / 7])
    assert np.allclose(probabilities(logits, 1.0, 0, 0.6), [0, 4 / 7, 0, 3 / 7])
    assert np.allclose(probabilities(logits, 1.0, 0, 0.0), [0, 1, 0, 0])  # always at least one
    assert np.allclose(probabilities(logits, 1.0, 9, 1.0), [0.1, 0.4, 0.2, 0.3])  # more than there are
    assert np.allclose(probabilities(logits, 0.5, 0, 1.0), np.array([1, 16, 4, 9]) / 30)
    # p counts what top-k left: 4/7 already reaches 0.5, though 0.4 would not
    assert np.allclose(probabilities(logits, 1.0, 2, 0.5), [0, 1, 0, 0])
    # temperature comes before p: squared and renormalized, 16/30 reaches 0.5
    assert np.allclose(probabilities(logits, 0.5, 0, 0.5), [0, 1, 0, 0])
    # ties: the smaller id
    assert np.allclose(probabilities(np.zeros(4), 1.0, 2, 1.0), [0.5, 0.5, 0, 0])
    assert np.array_equal(np.flatnonzero(probabilities(np.arange(400) // 4 % 2 * 1.0, 1.0, 3, 1.0)), [4, 5, 6])
    assert np.allclose(probabilities(np.zeros(4), 1.0, 0, 0.5), [0.5, 0.5, 0, 0])
    assert np.allclose(probabilities(np.zeros(4), 1.0, 0, 0.51), [1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("T", [1, 2, 7])
def test_generate(rng, float64_transformers, T):
    config = tiny_config(6, 2, 2)
    config.eos_token_id = None  # set below
    weights = random_weights(rng, config)
    model, input_ids = llama_model(config, weights), rng.integers(3, 37, (3, T))
    config.eos_token_id = -1  # never
    free = ref.generate(input_ids, weights, config, 9, use_cache=True)
    assert free.shape == (3, T + 9) and np.array_equal(free[:, :T], input_ids)
    assert np.array_equal(free, ref.generate(input_ids, weights, config, 9, use_cache=False))
    for eos in {int(free[0, T]), int(free[0, T + 3]), int(free[1, T + 8])}:
        config.eos_token_id = eos
        ours = ref.generate(input_ids, weights, config, 9, use_cache=True)
        assert np.array_equal(ours, ref.generate(input_ids, weights, config, 9, use_cache=False))
        theirs = model.generate(
            torch.tensor(input_ids),
            attention_mask=torch.ones(3, T, dtype=torch.long),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        assert np.array_equal(ours, theirs.numpy())
    config.eos_token_id = int(free[0, T])
    assert ref.generate(input_ids[:1], weights, config, 9, True).shape == (1, T + 1)  # stops at once
    assert np.array_equal(ref.generate(input_ids, weights, config, 0, True), input_ids)


# --------------------------------------------------------------------------------------------------------------------
# Optimizer, schedule, mixture, whole steps


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw(rng, weight_decay):
    weight = rng.standard_normal((5, 7))
    parameter = torch.nn.Parameter(torch.tensor(weight))
    options = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW([parameter], **options)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, 21):
        grad, lr = rng.standard_normal((5, 7)) * 10.0 ** rng.integers(-6, 3), 0.01 * step
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.tensor(grad)
        optimizer.step()
        weight, m, v = ref.adamw_step(weight, grad, m, v, step, lr, 0.9, 0.95, 1e-8, weight_decay)
        assert_close(weight, parameter)
    state = optimizer.state[parameter]
    assert_close(m, state["exp_avg"])
    assert_close(v, state["exp_avg_sq"])


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 100.0])
def test_clip_gradients(rng, max_norm, scale):
    grads = {"a": scale * rng.standard_normal((3, 4)), "b": scale * rng.standard_normal(5)}
    parameters = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads.values()]
    for parameter, grad in zip(parameters, grads.values()):
        parameter.grad = torch.tensor(grad)
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clipped, norm = ref.clip_gradients(grads, max_norm)
    assert abs(norm - expected.item()) <= 1e-12 * norm
    for ours, parameter in zip(clipped.values(), parameters):
        assert_close(ours, parameter.grad)


def test_learning_rate():
    total, warmup, peak, minimum = 50, 7, 3e-4, 3e-5
    lrs = [ref.learning_rate(step, total, warmup, peak, minimum) for step in range(total)]
    assert lrs[0] == pytest.approx(peak / 7, rel=1e-14) and lrs[6] == peak and lrs[7] == peak
    assert lrs[-1] == pytest.approx(minimum, rel=1e-12)
    assert all(a > b for a, b in zip(lrs[7:], lrs[8:])) and all(a < b for a, b in zip(lrs[:6], lrs[1:7]))
    assert lrs[28] == pytest.approx((peak + minimum) / 2)  # the middle of 7 .. 49
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - 1 - warmup, eta_min=minimum)
    for step in range(warmup, total):
        assert lrs[step] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-10)
        optimizer.step()
        cosine.step()


def test_learning_rate_edges():
    assert ref.learning_rate(0, 10, 0, 1.0, 0.1) == 1.0  # no warm-up
    assert ref.learning_rate(9, 10, 9, 1.0, 0.1) == 1.0  # one step after warm-up: the peak
    assert ref.learning_rate(0, 1, 0, 1.0, 0.1) == 1.0  # a single step
    assert ref.learning_rate(2, 3, 10, 1.0, 0.1) == pytest.approx(0.3)  # ends inside warm-up
    assert ref.learning_rate(99, 10, 2, 1.0, 0.1) == pytest.approx(0.1)  # beyond the end: the minimum


def random_mixture(rng):
    n = int(rng.integers(2, 9))
    kind = rng.integers(4)
    if kind == 0:
        weights = rng.integers(1, 1000, n)
    elif kind == 1:
        weights = rng.integers(1, 5, n)
    elif kind == 2:
        weights = 10 ** rng.integers(0, 5, n)  # very unequal
    else:
        weights = rng.integers(0, 4, n)  # zeros among them
        weights[0] += 1
    return {f"source{i}": int(w) for i, w in enumerate(weights)}


def test_mixture_prefixes(rng):
    closest = Fraction(0)
    for _ in range(100):
        weights = random_mixture(rng)
        W, had = sum(weights.values()), dict.fromkeys(weights, 0)
        for t, name in enumerate(ref.mixture_pattern(weights, 600), start=1):
            had[name] += 1
            for i, w in weights.items():
                assert abs(had[i] * W - t * w) < W, (weights, t)
                closest = max(closest, abs(had[i] - Fraction(t * w, W)))
            if t % W == 0:
                assert had == {i: w * (t // W) for i, w in weights.items()}
        assert all(had[i] == 0 for i, w in weights.items() if w == 0)
    print("largest |n - t w / W|:", float(closest))


def test_mixture_by_hand():
    assert ref.mixture_pattern({"a": 1, "b": 1}, 4) == ["a", "b", "a", "b"]
    assert ref.mixture_pattern({"b": 1, "a": 1}, 3) == ["b", "a", "b"]
    assert ref.mixture_pattern({"a": 1, "b": 3}, 8) == ["b", "b", "a", "b"] * 2
    assert ref.mixture_pattern({"a": 5}, 3) == ["a"] * 3
    assert ref.mixture_pattern({"a": 5, "b": 1}, 0) == []
    # at sequence 1, a and b have the deadline 3 (12 / 4 = 3, 12 / 5 = 2.4 rounded up): the order of the dict decides
    assert "".join(ref.mixture_pattern({"a": 4, "b": 5, "c": 3}, 12)) == "abcbabcababc"
    pattern = ref.mixture_pattern({"web": 906, "other": 94}, 1000)
    assert pattern.count("web") == 906
    assert ref.mixture_pattern({"web": 906, "other": 94}, 137) == pattern[:137]  # a prefix is a prefix


def test_train_steps_against_transformers(rng, float64_transformers):
    """5 whole steps of 3 micro-batches with very different numbers of targets. Some gradients are clipped."""
    config = tiny_config(6, 2, 2)
    weights = random_weights(rng, config, 0.1)
    steps = [[random_batch(rng, config, 2, 9, masked) for masked in (0.0, 0.5, 0.9)] for _ in range(5)]
    schedule = dict(total_steps=5, warmup_steps=2, peak=0.02, minimum=0.002)
    options = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)

    def theirs(grad_clip):
        model = llama_model(config, weights)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
        losses, norms = [], []
        for lr, step in zip((0.01, 0.02, 0.02, 0.011, 0.002), steps, strict=True):  # 0.011: half-way down the cosine
            count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in step)
            optimizer.zero_grad()
            losses.append(0.0)
            for input_ids, labels in step:
                out = model(torch.tensor(input_ids), labels=torch.tensor(labels), num_items_in_batch=count)
                out.loss.backward()
                losses[-1] += out.loss.item()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item())
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters()}, losses, norms

    free = theirs(1e9)[2]
    for grad_clip in (1e9, sorted(free)[2]):
        expected, expected_losses, expected_norms = theirs(grad_clip)
        before = {n: w.copy() for n, w in weights.items()}
        got, losses, norms = ref.train_steps(weights, steps, config, **schedule, **options, grad_clip=grad_clip)
        assert all(np.array_equal(before[n], weights[n]) for n in weights)  # the caller's weights are left alone
        assert np.allclose(losses, expected_losses, rtol=1e-9) and np.allclose(norms, expected_norms, rtol=1e-9)
        errors = {n: relative_error(got[n], expected[n]) for n in got}
        print("largest error after 5 steps:", max(errors.values()), "loss", losses[0], "->", losses[-1])
        assert max(errors.values()) < 1e-9
        assert all(relative_error(got[n], weights[n]) > 1e-3 for n in got)  # everything moved


# --------------------------------------------------------------------------------------------------------------------
# The file itself


def test_style():
    text = pathlib.Path(ref.__file__).read_text()
    tree = ast.parse(text)
    assert all(len(line) <= 120 for line in text.splitlines())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert all(node.end_lineno - node.lineno < 45 for node in functions)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    imported = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"numpy"} | sys.stdlib_module_names
    seen = set()
    for node in tree.body:  # nothing is used before it is defined
        if isinstance(node, ast.FunctionDef):
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & {f.name for f in functions}
            assert names <= seen | {node.name}, (node.name, names - seen)
            seen.add(node.name)
