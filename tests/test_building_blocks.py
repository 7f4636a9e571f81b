"""Each building block against its NumPy twin, forward and backward, on shapes where H != K and T != S."""

import dataclasses
import importlib.util
import sys

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT, TINY, random_model

import danube3

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.fixture
def draw():
    """Random tensors, new in every run; a failing test shows its seed."""
    seed = int(np.random.SeedSequence().entropy % 2**31)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, dtype: (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    )


def agree(tensor, array, dtype):
    array = torch.from_numpy(np.asarray(array, dtype=np.float64))
    scale = array.abs().max().clamp(min=0.1)  # inputs are near 1: where a gradient is zero, rounding remains
    error = (tensor.detach().double() - array).abs().max() / scale
    assert tensor.shape == array.shape and error < TOLERANCE[dtype], error


def numpy(tensor):
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("shape", [(1, 6), (2, 7, 96), (3, 33, 120)])
@pytest.mark.parametrize("scale", [1e-3, 1.0])  # at 1e-3, eps matters
def test_rms_norm(shape, scale, dtype, draw):
    x, weight, grad = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype), draw(*shape, dtype=dtype)
    x = (x * scale).detach().requires_grad_()
    y = danube3.rms_norm(x, weight, 1e-5)
    agree(y, reference.rms_norm(numpy(x), numpy(weight), 1e-5), dtype)
    y.backward(grad)
    for ours, twin in zip(
        (x.grad, weight.grad), reference.rms_norm_backward(numpy(grad), numpy(x), numpy(weight), 1e-5)
    ):
        agree(ours, twin, dtype)


def test_rms_norm_in_half_precision(draw):
    """A vector whose squares overflow fp16, and one whose sum of squares bf16 cannot hold."""
    for dtype in (torch.float16, torch.bfloat16):
        x, weight = (draw(4, 120, dtype=torch.float64) * 300).to(dtype).detach(), draw(120, dtype=dtype).detach()
        y = danube3.rms_norm(x, weight, 1e-5)
        expected = torch.from_numpy(reference.rms_norm(numpy(x), numpy(weight), 1e-5))
        assert (
            y.dtype == dtype
            and ((y.double() - expected).abs() <= expected.abs() * 3 * torch.finfo(dtype).eps + 1e-6).all()
        )


@pytest.mark.parametrize("h", [6, 96, 120])
@pytest.mark.parametrize("start, T", [(0, 1), (0, 7), (5, 33), (1000, 2)])
def test_rotary_embedding(h, start, T, dtype, draw):
    x, grad = draw(2, 3, T, h, dtype=dtype), draw(2, 3, T, h, dtype=dtype)
    tables = danube3.rotary_table(torch.arange(start, start + T), h, 100_000.0)
    for ours, twin in zip(tables, reference.rotary_table(np.arange(start, start + T), h, 100_000.0)):
        assert ours.shape == twin.shape == (T, h // 2) and np.abs(numpy(ours) - twin).max() < 1e-4  # fp32 angles
    cos, sin = (table.to(dtype) for table in tables)
    y = danube3.rotary_embedding(x, cos, sin)
    agree(y, reference.rotary_embedding(numpy(x), numpy(cos), numpy(sin)), dtype)
    y.backward(grad)
    agree(x.grad, reference.rotary_embedding_backward(numpy(grad), numpy(cos), numpy(sin)), dtype)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_one_thread_makes_the_first_call(name, monkeypatch):
    """The race that this avoids cannot be provoked at will. Before, 17 of 100 new processes had coarse angles."""
    sizes, function = [], getattr(torch.Tensor, name)
    monkeypatch.setattr(torch.Tensor, name, lambda x: sizes.append(x.numel()) or function(x))
    spec = importlib.util.spec_from_file_location("danube3_again", ROOT / "danube3.py")
    monkeypatch.setitem(sys.modules, "danube3_again", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["danube3_again"])
    assert sizes == [1]


def test_rotary_depends_on_distance_only():
    generator = torch.Generator().manual_seed(0)  # in one draw of 300 the two scores below are close by chance
    q, k = torch.randn(2, 1, 1, 1, 120, dtype=torch.float64, generator=generator)

    def score(m, n):
        rotated = [
            danube3.rotary_embedding(x, *danube3.rotary_table(torch.tensor([position]), 120, 1e5))
            for x, position in ((q, m), (k, n))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-4)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-2


@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("T, S", [(1, 1), (2, 2), (7, 7), (33, 33), (1, 9), (5, 9), (2, 33)])
def test_grouped_query_attention(H, K, T, S, dtype, draw):
    h = 6 if S < 33 else 120
    q, k, v = (draw(2, n, length, h, dtype=dtype) for n, length in ((H, T), (K, S), (K, S)))
    grad = draw(2, H, T, h, dtype=dtype)
    y = danube3.grouped_query_attention(q, k, v)
    agree(y, reference.grouped_query_attention(numpy(q), numpy(k), numpy(v)), dtype)
    y.backward(grad)
    twins = reference.grouped_query_attention_backward(numpy(grad), numpy(q), numpy(k), numpy(v))
    for ours, twin in zip((q.grad, k.grad, v.grad), twins):
        agree(ours, twin, dtype)


def test_swiglu(dtype, draw):
    gate, up, grad = (draw(2, 7, 56, dtype=dtype) for _ in range(3))
    y = danube3.swiglu(gate, up)
    agree(y, reference.swiglu(numpy(gate), numpy(up)), dtype)
    y.backward(grad)
    for ours, twin in zip((gate.grad, up.grad), reference.swiglu_backward(numpy(grad), numpy(gate), numpy(up))):
        agree(ours, twin, dtype)


@pytest.mark.parametrize("ignored", [0, 3, 9])
def test_cross_entropy(ignored, dtype, draw):
    logits, labels = draw(9, 330, dtype=dtype), torch.randint(0, 330, (9,))
    labels[:ignored] = danube3.IGNORE_INDEX
    loss = danube3.cross_entropy(logits, labels)
    agree(loss, reference.cross_entropy(numpy(logits), labels.numpy()), dtype)
    loss.backward()
    agree(logits.grad, reference.cross_entropy_backward(numpy(logits), labels.numpy()), dtype)


@pytest.mark.parametrize("T", [2, 7, 33])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1, "head_dim": 96}, {"num_key_value_heads": 4}])
def test_whole_model_and_its_gradient(T, changes):
    """Loss and gradient of every parameter: the derivatives written out by hand against autograd."""
    config = dataclasses.replace(TINY, **changes)
    model = random_model(config, dtype=torch.float64)
    ids = torch.randint(0, config.vocab_size, (2, T))
    labels = ids.masked_fill(torch.arange(T) == T // 2 + 1, danube3.IGNORE_INDEX)
    weights = {name: numpy(p) for name, p in model.named_parameters()}
    loss = model(ids, labels)
    loss.backward()
    expected, count, gradients = reference.danube3_loss_and_gradients(ids.numpy(), labels.numpy(), weights, config)
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)
    assert count == (labels[:, 1:] != danube3.IGNORE_INDEX).sum()
    assert set(gradients) == set(weights)
    scale = max(np.abs(g).max() for g in gradients.values())
    for name, p in model.named_parameters():  # the model's rotary tables are fp32, the twin's float64
        assert np.abs(p.grad.numpy() - gradients[name]).max() < 1e-5 * scale, name


def test_generation_against_the_twin():
    model = random_model(TINY, dtype=torch.float64)
    weights = {name: numpy(p) for name, p in model.named_parameters()}
    ids = torch.randint(3, TINY.vocab_size, (1, 6))
    for use_cache in (True, False):
        expected = reference.generate(ids.numpy(), weights, TINY, 12, use_cache)
        assert np.array_equal(danube3.generate(model, ids, 12).numpy(), expected)


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.5, 9, 0.6), (1.0, 0, 1e-9)]
)
def test_next_token_probabilities_against_the_twin(temperature, top_k, top_p, draw):
    logits = draw(3, 330, dtype=torch.float32).detach() * 3
    ours = danube3.next_token_probabilities(logits, temperature, top_k, top_p)
    for probabilities, own_logits in zip(ours, logits):
        expected = reference.next_token_probabilities(numpy(own_logits), temperature, top_k, top_p)
        assert np.abs(numpy(probabilities) - expected).max() < 1e-5


@pytest.mark.parametrize(
    "dtype, capability, T, heads",
    [
        ("float32", 9, 5, (6, 6)),  # repeated
        ("bfloat16", 8, 5, (6, 3)),  # the kernel shares
        ("float16", 9, 5, (6, 3)),
        ("float16", 7, 5, (6, 6)),
        ("bfloat16", 9, 2, (3, 3)),  # heads that share keys are queries of one head
        ("float16", 7, 1, (3, 3)),
        ("float32", 7, 1, (3, 3)),
    ],
)
def test_heads_that_share_keys_on_a_gpu(dtype, capability, T, heads, monkeypatch):
    """On a GPU, which is simulated here, keys and values are only repeated for a whole sequence, where the kernel
    cannot share. The result is always the same."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))

    class OnGpu(torch.Tensor):
        device = property(lambda self: torch.device("cuda"))

    generator, calls = torch.Generator().manual_seed(0), []
    q, k, v = (
        torch.randn(2, n, t, 8, generator=generator).to(getattr(torch, dtype)) for n, t in ((6, T), (3, 5), (3, 5))
    )
    expected = danube3.grouped_query_attention(q, k, v)
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, enable_gqa=False, **more):
        calls.append((enable_gqa, q.shape[1], k.shape[1], v.shape[1]))
        return attention(q, k, v, enable_gqa=enable_gqa, **more)

    monkeypatch.setattr(danube3.F, "scaled_dot_product_attention", spy)
    result = danube3.grouped_query_attention(*(x.as_subclass(OnGpu) for x in (q, k, v)))
    assert calls == [(heads[0] != heads[1], *heads, heads[1])]
    torch.testing.assert_close(
        result.as_subclass(torch.Tensor), expected, rtol=1e-2, atol=1e-2 if dtype != "float32" else 1e-5
    )
