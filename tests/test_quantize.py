"""Quantization: codes against NumPy and the gguf package, calibration and its definition, folders, GGUF files."""

import dataclasses
import json
import math
import re
import shutil
import time

import gguf
import numpy as np
import pytest
import reference
import safetensors.torch
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from conftest import TINY, call, one_line_error, random_model
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import danube3
import quantize
import sample
import train
from data.read import TokenData

EVEN = dataclasses.replace(  # sizes that groups of 32 divide, with more query heads than key heads
    TINY, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)


def some_weight(rows=7, columns=96, seed=0):
    """Random, with a row of zeros, rows too small for fp16's normal numbers, exact halves, and one outlier."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.03
    weight[1], weight[2], weight[3, 5] = 0, weight[2] * 1e-5, 2.0
    weight[4] = torch.arange(columns) % 17 / 2 - 4.0
    weight[5] *= 1e-9
    return weight


def quantize_weight(weight, bits):
    """Round to nearest. -> packed codes, scales"""
    codes, scales = quantize_plain(weight, bits)
    return danube3.pack(codes, bits), scales


def quantize_plain(weight, bits):
    return danube3.quantize_int8(weight) if bits == 8 else danube3.quantize_int4(weight)


@pytest.fixture
def even(tmp_path, tokenizer):
    danube3.save_checkpoint(tmp_path / "even", random_model(EVEN), tokenizer)
    return tmp_path / "even"


# ----------------------------------------------------------------------------------------------------- codes and scales
@pytest.mark.parametrize("seed, columns", [(0, 32), (1, 96), (2, 160)])
def test_round_to_nearest_is_its_twin(seed, columns):
    weight = some_weight(columns=columns, seed=seed)
    for ours, twin, bits in (
        (danube3.quantize_int8, reference.quantize_int8, 8),
        (danube3.quantize_int4, reference.quantize_int4, 4),
    ):
        codes, scales = ours(weight)
        twin_codes, twin_scales = twin(weight.numpy())
        np.testing.assert_array_equal(scales.numpy(), twin_scales)
        np.testing.assert_array_equal(codes.numpy(), twin_codes)
        assert codes.dtype == torch.uint8 and scales.dtype == torch.float16 and (scales != 0).all()
        values = reference.dequantize(reference.pack(twin_codes, bits), twin_scales)
        np.testing.assert_array_equal(danube3.dequantize(danube3.pack(codes, bits), scales).numpy(), values)
        assert (values[1] == 0).all() and np.isfinite(values).all()


def test_codes_never_wrap_around():
    """A scale that fp16 rounds down would ask for larger codes than there are: 127, or 15, is the largest."""
    row = torch.full((1, 32), 1.4 * 2.0**-24)
    assert (danube3.quantize_int8(127 * row)[0] == 255).all() and (danube3.quantize_int8(-127 * row)[0] == 1).all()
    weight = -8 * row
    weight[0, 1:] *= -1
    codes, scales = danube3.quantize_int4(weight)
    assert codes[0].tolist() == [0] + [15] * 31 and scales.item() == 2.0**-24


@pytest.mark.parametrize("bits", [8, 4])
def test_the_error_is_at_most_half_a_scale(bits):
    """Also in rows whose scale fp16 can hardly hold. int4 clips what lies beyond 7 of the values -8 .. 7."""
    weight = some_weight()
    packed, scales = quantize_weight(weight, bits)
    error = (danube3.dequantize(packed, scales) - weight).abs()
    scales = scales.float().repeat_interleave(32, dim=1)
    slack = 2.0**-24 * (127 if bits == 8 else 8)  # of scales that are rounded to whole multiples of 2^-24
    clipped = (bits == 4) & (weight * scales.sign() > 7.4 * scales.abs())
    assert (error <= scales.abs() * torch.where(clipped, 1.01, 0.51) + slack).all()
    assert clipped.float().mean() < 0.05


def codes_of_blocks(blocks, bits):
    """The codes in GGUF's blocks of 32, each after the two bytes of its scale."""
    if bits == 8:
        return blocks[:, 2:].view(np.int8).astype(int)
    return np.concatenate([blocks[:, 2:] % 16, blocks[:, 2:] // 16], axis=1).astype(int)


@pytest.mark.parametrize("bits, kind", [(8, gguf.GGMLQuantizationType.Q8_0), (4, gguf.GGMLQuantizationType.Q4_0)])
def test_blocks_are_those_of_gguf(bits, kind):
    """The same bytes as the gguf package makes of rows of 32, where scales are numbers of fp16, and the same values
    back. Elsewhere the scales are the same and few codes differ, by one, and never for a larger error: ours are made
    for the scale as it is stored."""
    weight = some_weight(1024, 32)
    weight[2], weight[5] = weight[6], weight[0]  # whose scales would be subnormal: see below
    exact, columns = weight.clone(), torch.arange(32)
    largest = exact.abs().argmax(dim=1)
    at_largest, sign = columns == largest[:, None], exact.gather(1, largest[:, None]).sign()
    steps = 127 * sign if bits == 8 else -8 * torch.where(torch.rand(1024, 1) < 0.5, 1.0, -1.0)
    scales = (exact.abs().amax(1, keepdim=True) / steps.abs().clamp(min=1)).half().float()
    exact = torch.where(at_largest, steps * scales, exact.clamp(-scales * steps.abs(), scales * steps.abs()))
    exact[1] = 0
    ours, theirs = quantize.gguf_blocks(*quantize_weight(exact, bits)), gguf.quants.quantize(exact.numpy(), kind)
    theirs[1, 1] &= 127  # the scale of the row of zeros: 0 / -8 is -0 there, and 0 here
    np.testing.assert_array_equal(ours, theirs)

    ours, theirs = quantize.gguf_blocks(*quantize_weight(weight, bits)), gguf.quants.quantize(weight.numpy(), kind)
    theirs[1, 1] &= 127
    np.testing.assert_array_equal(ours[:, :2], theirs[:, :2])
    off = np.abs(codes_of_blocks(ours, bits) - codes_of_blocks(theirs, bits))
    assert off.max() == 1 and off.mean() < 0.01
    own, other = (gguf.quants.dequantize(blocks, kind) - weight.numpy() for blocks in (ours, theirs))
    assert ((own**2).sum(axis=1) <= (other**2).sum(axis=1) * 1.000001).all() and (own**2).sum() < (other**2).sum()

    small = torch.randn(64, 32) * 10.0 ** -torch.linspace(3, 8, 64)[:, None]  # scales down to subnormal ones and 0
    values = (quantize.gguf_blocks(*quantize_weight(small, bits)), gguf.quants.quantize(small.numpy(), kind))
    own, other = (((gguf.quants.dequantize(blocks, kind) - small.numpy()) ** 2).sum(axis=1) for blocks in values)
    assert (own <= other * 1.000001).all() and own.sum() < other.sum()

    codes, scales = quantize_weight(some_weight(16, 160), bits)
    values = gguf.quants.dequantize(quantize.gguf_blocks(codes, scales), kind)
    np.testing.assert_array_equal(values, danube3.dequantize(codes, scales).numpy())


@pytest.mark.parametrize("bits", [8, 4])
def test_packing(bits):
    """As the twin, and as the package compressed-tensors, whose 32-bit integers are the same bytes."""
    codes = torch.randint(0, 2**bits, (5, 96), dtype=torch.uint8)
    packed = danube3.pack(codes, bits)
    np.testing.assert_array_equal(packed.numpy(), reference.pack(codes.numpy(), bits))
    np.testing.assert_array_equal(reference.unpack(packed.numpy(), bits), codes.numpy())
    assert torch.equal(danube3.unpack(packed, bits), codes) and packed.shape == (5, 12 * bits)
    assert torch.equal(danube3.unpack(packed.view(1, 5, -1), bits), codes[None])
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_to_int32(signed, bits), packed.view(torch.int32))


# ------------------------------------------------------------------------------------------------------- calibration
def calibration(columns, rows=300, seed=0):
    """Correlated inputs, as real ones are. -> x [rows, columns]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator).mul(0.4)


def cost_of(codes, scales, weight, hessian, bits):
    """The sum of e C e^T over all rows, in float64"""
    values = reference.dequantize(reference.pack(np.asarray(codes), bits), np.asarray(scales))
    error = values.astype(np.float64) - weight.double().numpy()
    return ((error @ hessian.double().numpy()) * error).sum()


@pytest.mark.parametrize("columns, bits", [(32, 4), (96, 4), (96, 8)])
def test_calibration_is_its_definition(columns, bits):
    """The twin takes each slope anew from the whole Hessian. Nearly all codes are equal, and so is the cost."""
    weight, x = torch.randn(6, columns) * 0.03, calibration(columns)
    weight[1], hessian = 0, x.T @ x
    codes, scales = danube3.calibrate(weight, hessian, bits)
    twin_codes, twin_scales = reference.calibrate(weight.numpy(), hessian.double().numpy(), bits)
    assert (codes.numpy() == twin_codes).mean() > 0.97
    np.testing.assert_allclose(scales.float().numpy(), twin_scales.astype(np.float32), rtol=0.02, atol=1e-6)
    rounded = danube3.round_to_nearest(weight, bits)
    ours, twin, plain = (
        cost_of(*each, weight, hessian, bits) for each in ((codes, scales), (twin_codes, twin_scales), rounded)
    )
    assert ours == pytest.approx(twin, rel=0.02) and ours < 0.6 * plain


@pytest.mark.parametrize("bits", [8, 4])
def test_no_single_step_improves_a_calibrated_matrix(bits):
    """After many sweeps, every change of one code by one costs more."""
    weight, x = torch.randn(4, 64) * 0.03, calibration(64)
    hessian = x.T @ x
    codes, scales = danube3.calibrate(weight, hessian, bits, sweeps=40, damping=0.0)
    lowest, highest = (1, 255) if bits == 8 else (0, 15)
    for row in range(4):
        one = (weight[row : row + 1], hessian, bits)
        best = cost_of(codes[row : row + 1], scales[row : row + 1], *one)
        for i in range(64):
            for step in (-1, 1):
                if lowest <= int(codes[row, i]) + step <= highest:
                    other = codes[row : row + 1].clone()
                    other[0, i] += step
                    assert cost_of(other, scales[row : row + 1], *one) > best * (1 - 1e-6)


@pytest.mark.parametrize("tiny", [1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("bits", [8, 4])
def test_calibration_never_ruins_a_matrix(bits, tiny):
    """A group far smaller than the rest of its row: its scale may be pulled to 0, which is no scale."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(64, 64, generator=generator) * 0.02
        weight[:, :32] *= tiny / 0.02
        x = calibration(64, 4096, seed)
        hessian = x.T @ x
        ours = cost_of(*danube3.calibrate(weight, hessian, bits), weight, hessian, bits)
        assert ours < cost_of(*danube3.round_to_nearest(weight, bits), weight, hessian, bits)


def test_calibration_beats_gptq():
    """GPTQ by its definition (arXiv 2210.17323): round column i, move the columns after it to where the error that
    remains is smallest, take column i out of the inverse Hessian. With the same scales as round-to-nearest."""
    weight, x = torch.randn(8, 64) * 0.03, calibration(64)
    hessian = x.T @ x + torch.eye(64) * 0.05 * (x.T @ x).diagonal().mean()
    _, scales = danube3.round_to_nearest(weight, 4, hessian.diagonal().view(-1, 32))
    W, A = weight.double().numpy().copy(), np.linalg.inv(hessian.double().numpy())
    codes = np.zeros(W.shape, np.uint8)
    for i in range(64):
        scale = scales[:, i // 32].double().numpy()
        codes[:, i] = np.clip(np.floor(W[:, i] / scale + 8.5), 0, 15)
        error = W[:, i] - scale * (codes[:, i].astype(np.float64) - 8)
        W[:, i + 1 :] -= np.outer(error, A[i, i + 1 :]) / A[i, i]
        A = A - np.outer(A[:, i], A[i]) / A[i, i]
    gptq = cost_of(codes, scales, weight, hessian, 4)
    ours = cost_of(*danube3.calibrate(weight, x.T @ x, 4), weight, hessian, 4)
    assert ours < 1.05 * gptq, (ours, gptq)


def test_calibration_with_independent_inputs_rounds_to_nearest():
    """With the Hessian of white noise no column can make up for another: the codes are round-to-nearest."""
    weight = some_weight(8, 64)
    codes, scales = danube3.calibrate(weight, torch.eye(64) * 5, 4)
    groups = weight.unflatten(1, (-1, 32)) / scales.float()[..., None]
    assert torch.equal(codes, (groups + 8.5).floor().clamp(0, 15).flatten(1).to(torch.uint8))


def test_scale_search_beats_the_plain_scale():
    groups, importance = torch.randn(50, 32), torch.rand(32) + 0.1
    scales = danube3.search_scales(groups, importance)
    twins = [reference.group_scale(group, importance.double().numpy()) for group in groups.double().numpy()]
    np.testing.assert_allclose(scales.float().numpy(), twins, rtol=2e-3)

    def error(scales):
        values = (groups / scales.float()[:, None] + 0.5).floor().clamp(-8, 7)
        return (importance * (groups - scales.float()[:, None] * values) ** 2).sum(1)

    plain = danube3.quantize_int4(groups)[1][:, 0]
    assert (error(scales) <= error(plain) * 1.0001).all() and error(scales).sum() < 0.9 * error(plain).sum()
    assert torch.equal(danube3.search_scales(torch.zeros(2, 32), importance), torch.ones(2).half())


def inputs_of(model, name, sequences):
    """What the linear layer `name` multiplies, by a hook. Keys and values count as much as their tokens are attended
    to: the sum of the attention weights, from the formula. -> [.., in]"""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(sequences)
    hook.remove()
    x = seen[0]  # [B, T, in]
    if "k_proj" not in name and "v_proj" not in name:
        return x
    attention, c = model.get_submodule(name.rpartition(".")[0]), model.config
    cos, sin = reference.rotary_table(np.arange(x.shape[1]), c.head_dim, c.rope_theta)
    q, k = (
        reference.rotary_embedding(y.unflatten(-1, (-1, c.head_dim)).transpose(1, 2).double().numpy(), cos, sin)
        for y in (attention.q_proj(x), attention.k_proj(x))
    )
    scores = q @ np.repeat(k, c.num_attention_heads // c.num_key_value_heads, axis=1).swapaxes(2, 3)
    scores = np.where(np.tri(x.shape[1]), scores / math.sqrt(c.head_dim), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)  # [B, H, T, T]
    received = weights.sum((1, 2))  # [B, T]
    return x * torch.from_numpy(received).float().sqrt()[..., None]


@torch.no_grad()
def test_calibration_of_a_model_takes_inputs_from_quantized_layers():
    """Each weight matrix by hand, from the inputs that reach it when all layers before it are quantized."""
    model, sequences = random_model(EVEN), torch.randint(3, 330, (6, 20))
    expected = random_model(EVEN)
    order = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    order += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    bits = quantize.layout(EVEN, 4) | {"model.layers.1.self_attn.k_proj": 8, "model.layers.1.mlp.up_proj": 4}
    done = quantize.calibrate_model(model, sequences, bits)
    embedding = expected.model.embed_tokens.weight
    embedding.copy_(embedding.bfloat16())
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert list(done) == [f"model.layers.{i}.{name}" for i in range(2) for name in order] + ["lm_head"]
    for name, (codes, scales) in done.items():
        if "v_proj" not in name:  # which shares k_proj's
            x = inputs_of(expected, name, sequences).flatten(0, -2)
        linear = expected.get_submodule(name)
        twin_codes, twin_scales = danube3.calibrate(linear.weight, x.T @ x, bits[name])
        assert (codes == twin_codes).float().mean() > 0.98, name
        torch.testing.assert_close(scales, twin_scales, rtol=0.02, atol=1e-4)
        linear.weight.copy_(danube3.dequantize(danube3.pack(codes, bits[name]), scales))
        assert torch.equal(model.get_submodule(name).weight, linear.weight)
    assert set(bits.values()) == {4, 8}


# --------------------------------------------------------------------------------------------- the quantized modules
def quantized_linear(packed, scales):
    bits = 8 * packed.shape[1] // (32 * scales.shape[1])
    linear = danube3.QuantizedLinear(len(packed), 32 * scales.shape[1], bits)
    linear.load_state_dict({"weight_packed": packed, "weight_scale": scales})
    return linear


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_linear_is_its_twin(bits):
    """The product with the dequantized weight matrix."""
    packed, scales = quantize_weight(some_weight(48, 96), bits)
    check_product(quantized_linear(packed, scales), packed, scales, 1e-5)


def check_product(linear, packed, scales, tolerance):
    for shape in ((1, 1, linear.in_features), (2, 3, linear.in_features), (40, linear.in_features)):
        x = torch.randn(shape)
        y = linear(x)
        expected = reference.quantized_matmul(x.numpy(), packed.numpy(), scales.numpy())
        assert y.dtype == x.dtype and y.shape == expected.shape
        assert np.abs(y.numpy() - expected).max() < tolerance * np.abs(expected).max()
        half = linear(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert np.abs(half.float().numpy() - expected).max() < 2e-2 * np.abs(expected).max()


def test_the_fast_product_of_4_bits():
    """PyTorch's kernel agrees to the precision of bf16."""
    packed, scales = quantize_weight(some_weight(48, 96), 4)
    linear = quantized_linear(packed.clone(), scales)
    linear.make_fast()
    assert linear.fast
    check_product(linear, packed, scales, 2e-2)


def test_the_fast_product_of_4_bits_on_a_gpu(monkeypatch):
    """A GPU is simulated: PyTorch's functions get what they document (the first of two codes in the high half of a
    byte, w = (code - 8) * scale + zero), for a few rows. More rows are dequantized, and `weight` stays."""

    class OnGpu(torch.Tensor):
        device = property(lambda self: torch.device("cuda"))

    def kernel(x, packed, group, scales_and_zeros):
        assert x.dtype == scales_and_zeros.dtype == torch.bfloat16 and x.is_contiguous() and group == 32
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1).float() - 8  # [out, in]
        scales, zeros = scales_and_zeros.float().repeat_interleave(group, dim=0).unbind(-1)  # 2 x [in, out]
        calls.append(len(x))
        return x @ (codes * scales.T + zeros.T).bfloat16().T

    calls = []
    packed, scales = quantize_weight(some_weight(48, 256), 4)
    linear = quantized_linear(packed.clone(), scales)
    for name, buffer in list(linear.named_buffers()):
        setattr(linear, name, torch.nn.Buffer(buffer.as_subclass(OnGpu)))
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda codes, tiles: codes)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    linear.make_fast()
    assert not linear.fast
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    linear.make_fast()
    assert linear.fast
    for rows in (1, 16):
        x = torch.randn(rows, 256)
        y = linear(x.as_subclass(OnGpu)).as_subclass(torch.Tensor)
        expected = reference.quantized_matmul(x.numpy(), packed.numpy(), scales.numpy())
        assert np.abs(y.numpy() - expected).max() < 2e-2 * np.abs(expected).max()
    assert calls == [1, 16]
    monkeypatch.setattr(danube3.DequantizedMatmul, "apply", lambda x, packed, scales: (len(x), packed, scales))
    assert linear(torch.randn(17, 256).as_subclass(OnGpu)) == (17, linear.weight_packed, linear.weight_scale)
    assert torch.equal(linear.weight_packed.as_subclass(torch.Tensor), packed)
    narrow = quantized_linear(*quantize_weight(some_weight(48, 96), 4))  # the kernel takes multiples of 128
    narrow.weight_packed = torch.nn.Buffer(narrow.weight_packed.as_subclass(OnGpu))
    narrow.make_fast()
    assert not narrow.fast


def test_the_fast_product_of_4_bits_fits_pytorchs_shapes(monkeypatch):
    """PyTorch checks shapes and types of its own functions on GPUs that are not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode(), torch.device("cuda"):
        linear = danube3.QuantizedLinear(1536, 4096, 4)
        linear.make_fast()
        assert linear.fast and set(linear.state_dict()) == {"weight_packed", "weight_scale"}
        for rows in (1, 16):
            y = linear(torch.empty(1, rows, 4096, dtype=torch.bfloat16, device="cuda"))
            assert y.shape == (1, rows, 1536) and y.dtype == torch.bfloat16 and y.device.type == "cuda"


def test_the_fast_product_of_8_bits():
    """Compiled, it is exact. Small matrices, and machines without a compiler, do without."""
    packed, scales = quantize_weight(some_weight(1024, 256), 8)
    linear, small = quantized_linear(packed, scales), quantized_linear(packed[:64], scales[:64])
    linear.make_fast()
    small.make_fast()
    assert linear.fast == danube3.has_compiler() and not small.fast
    check_product(linear, packed, scales, 1e-5)
    y = danube3.int8_matvec(x := torch.randn(256), packed, scales)
    torch.testing.assert_close(y, torch.from_numpy(reference.dequantize(packed.numpy(), scales.numpy())) @ x)


def test_the_gradient_goes_through_a_quantized_linear_layer():
    linear = quantized_linear(*quantize_weight(some_weight(48, 96), 4))
    x, grad = torch.randn(5, 96, dtype=torch.float64, requires_grad=True), torch.randn(5, 48, dtype=torch.float64)
    linear(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ linear.weight.double(), rtol=1e-9, atol=1e-12)
    assert not list(linear.parameters())


def quantize_even(even, out, bits, **more):
    return quantize.quantize_folder(even, out, quantize.layout(EVEN, bits), {}, **more)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder(bits, even, tmp_path):
    """It opens without a flag. Its logits are those of the dequantized weights."""
    lines = quantize_even(even, tmp_path / "q", bits, part_bytes=5_000)
    model, _ = danube3.load_checkpoint(tmp_path / "q")
    assert {line[0]: line[1] for line in lines} == quantize.layout(EVEN, bits)
    assert len(list((tmp_path / "q").glob("model-*.safetensors"))) > 3
    weights = safetensors.torch.load_file(even / "model.safetensors")
    for name, tensor_bits, size, largest, mean in lines:
        module = model.get_submodule(name)
        error = (module.weight - weights[f"{name}.weight"]).abs()
        assert (largest, mean) == (error.amax().item(), error.mean().item()) and module.bits == tensor_bits
        assert size == module.weight_packed.nbytes + module.weight_scale.nbytes
        weights[f"{name}.weight"] = module.weight
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].bfloat16()
    plain, ids = random_model(EVEN), torch.randint(3, 330, (2, 9))
    plain.load_state_dict(weights)
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-4, atol=1e-4)
    dequantized = train.dequantize_model(danube3.load_checkpoint(tmp_path / "q")[0])
    assert set(dequantized.state_dict()) == set(plain.state_dict()) and torch.equal(dequantized(ids), plain(ids))
    fast, _ = danube3.load_checkpoint(tmp_path / "q", fast=True)
    assert (fast(ids) - plain(ids)).abs().max() < 0.05 * plain(ids).abs().max()
    assert danube3.generate(fast, ids, 5).shape == (2, 14)
    danube3.verify_checksums(tmp_path / "q")
    half, _ = danube3.load_checkpoint(tmp_path / "q", dtype=torch.bfloat16)
    assert half(ids).dtype == torch.float32 and half.model(ids).dtype == torch.bfloat16
    assert (half(ids) - plain(ids)).abs().max() < 0.1 * plain(ids).abs().max()


def test_memory_of_a_fast_model(even, tmp_path):
    """PyTorch's kernel replaces the stored codes: the model does not keep both."""
    quantize_even(even, tmp_path / "q", 4)
    stored, fast = (danube3.load_checkpoint(tmp_path / "q", fast=fast)[0] for fast in (False, True))
    assert sample.stored_bytes(fast) < 1.15 * sample.stored_bytes(stored)
    total = sum(len(bytes_) for bytes_ in map(lambda p: p.read_bytes(), (tmp_path / "q").glob("*.safetensors")))
    embedding = 2 * EVEN.vocab_size * EVEN.hidden_size  # half of its bytes: bf16 on disk, fp32 here
    assert sample.stored_bytes(stored) - embedding == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize("how", ["8 bits", "4 bits", "4 bits, calibrated", "mixed"])
@pytest.mark.parametrize("part_bytes", [2**29, 5_000])
def test_transformers_opens_quantized_folders(how, part_bytes, even, tmp_path, tokenizer):
    """Every weight bit for bit, and the logits, of two forward passes. One row is zeros."""
    model = random_model(EVEN)
    model.model.layers[1].mlp.up_proj.weight.data[5] = 0
    danube3.save_checkpoint(tmp_path / "zeros", model, tokenizer)
    layout, done = quantize.layout(EVEN, 8 if how == "8 bits" else 4), {}
    if how == "mixed":  # as the first and the last layer of larger models
        layout |= {name: 8 for name in layout if ".layers.1." in name}
    if "calibrated" in how:
        done = quantize.calibrate_model(random_model(EVEN), torch.randint(3, 330, (6, 20)), layout)
    quantize.quantize_folder(tmp_path / "zeros", tmp_path / "q", layout, done, part_bytes)
    ours, _ = danube3.load_checkpoint(tmp_path / "q", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ids = torch.randint(3, 330, (2, 9))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=2e-5)
    for name, weight in train.dequantize_model(ours).state_dict().items():
        assert torch.equal(theirs.get_parameter(name).float(), weight), name
    assert AutoConfig.from_pretrained(tmp_path / "q").dtype == torch.float16


@pytest.mark.slow
def test_qlora_over_a_quantized_base(even, tmp_path, tokenizer):
    """Adapters train over frozen codes, are saved alone, load again, and are merged into an ordinary checkpoint."""
    quantize_even(even, tmp_path / "q", 4)
    talks = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}]}
        for n in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    flags = ("--chat", tmp_path / "chat.jsonl", "--init", tmp_path / "q")
    result = call(
        "train.py", *flags, "--out", tmp_path / "run", "--lora", 2, "--epochs", 10, "--merge", tmp_path / "merged"
    )
    assert result.returncode == 0, result.stderr
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss]
    assert losses[-1] < 0.8 * losses[0]
    ids = torch.randint(3, 330, (2, 9))
    adapted, merged = (danube3.load_checkpoint(tmp_path / name)[0] for name in ("run", "merged"))
    assert isinstance(adapted.model.layers[0].mlp.up_proj.base_layer, danube3.QuantizedLinear)
    assert not any(isinstance(module, danube3.QuantizedLinear) for module in merged.modules())
    torch.testing.assert_close(adapted(ids), merged(ids), rtol=1e-3, atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    with torch.no_grad():
        base(ids)  # transformers dequantizes at the first call, and peft asks for weights
        theirs = PeftModel.from_pretrained(base, danube3.find_checkpoint(tmp_path / "run")).eval()
        torch.testing.assert_close(theirs(ids).logits, adapted(ids), rtol=1e-4, atol=1e-4)
    fast = danube3.load_checkpoint(tmp_path / "run", fast=True)[0]  # as sample.py opens it
    assert fast.model.layers[0].mlp.up_proj.base_layer.fast
    with torch.no_grad():
        torch.testing.assert_close(fast(ids), adapted(ids), rtol=0.1, atol=0.1 * adapted(ids).std().item())
    assert "quantized" in one_line_error(call("train.py", *flags, "--out", tmp_path / "full"))


@pytest.mark.parametrize("bits, dtype", [(4, torch.bfloat16), (8, torch.float16)])
def test_the_residual_stream_over_a_quantized_base_is_fp32(bits, dtype, even, tmp_path):
    """Also where a GPU would open the folder in half precision: a residual stream in fp16 could overflow."""
    quantize_even(even, tmp_path / "q", bits)
    model = danube3.add_lora(danube3.load_checkpoint(tmp_path / "q", dtype=dtype)[0], 2, 0)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randint(3, 330, (1, 5)))
    assert seen == [torch.float32] * len(model.model.layers)


# -------------------------------------------------------------------------------------------------------------- GGUF
def fields_of(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_gguf_files_hold_the_model(bits, even, tmp_path, tokenizer):
    """Read by the gguf package: names, sizes, pieces, and every value. The rows of q and k are interleaved."""
    folder = even
    if bits != 16:
        quantize_even(even, folder := tmp_path / "q", bits, part_bytes=5_000)
    quantize.write_gguf(folder, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    names = {
        name.removesuffix(".weight"): gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).get_name(name, (".weight",))
        for name in random_model(EVEN).state_dict()
    }
    model = train.dequantize_model(danube3.load_checkpoint(folder)[0])
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == set(names.values())
    for name, weight in model.state_dict().items():
        tensor = tensors[names[name.removesuffix(".weight")]]
        heads = EVEN.num_attention_heads if "q_proj" in name else EVEN.num_key_value_heads
        expected = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            expected = expected.reshape(heads, 2, -1, expected.shape[1]).swapaxes(1, 2).reshape(expected.shape)
        if name == "model.embed_tokens.weight" and bits < 16:  # rounded for the file
            codes, scales = quantize_plain(weight, bits)
            expected = danube3.dequantize(danube3.pack(codes, bits), scales).numpy()
            assert tensor.tensor_type.name == f"Q{bits}_0" and np.abs(expected - weight.numpy()).max() < 0.2
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        np.testing.assert_allclose(values, expected, rtol=1e-3 if bits == 16 else 0, atol=1e-7 if bits == 16 else 0)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {16: {"F16", "F32"}, 8: {"Q8_0", "F32"}, 4: {"Q4_0", "Q8_0", "F32"}}[bits]
    fields = fields_of(reader)
    expected = {
        "general.architecture": "llama", "general.quantization_version": 2, "llama.context_length": 64,
        "llama.embedding_length": 64, "llama.block_count": 2, "llama.feed_forward_length": 96,
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 1e5, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16, "llama.attention.value_length": 16,
        "llama.vocab_size": 330, "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": danube3.CHAT_TEMPLATE,
    }  # fmt: skip
    assert {name: fields.get(name) for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    sp = tokenizer.sp
    assert fields["tokenizer.ggml.tokens"] == [sp.id_to_piece(i) for i in range(330)]
    assert fields["tokenizer.ggml.scores"] == pytest.approx([sp.get_score(i) for i in range(330)])
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and fields["tokenizer.ggml.token_type"][-1] == 1
    assert not list(tmp_path.glob("*.partial"))


# ------------------------------------------------------------------------------------------------------ command line
@pytest.mark.slow
def test_quantize_from_the_command_line(toy_data, tmp_path):
    """Quantize, calibrate, report, complete, evaluate, export: the README's commands on a hardly trained toy."""
    assert call("train.py", "--data", toy_data, "--tokens", "4096", "--out", tmp_path / "toy").returncode == 0
    result = call(
        "quantize.py", tmp_path / "toy", "--bits", 4, "--out", tmp_path / "q", "--calibrate", toy_data, "--samples", 4,
        "--report", toy_data,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^model\.layers\.\d\.\S+ +4 +[\d,]+ +\d\.\d\de-\d\d", result.stdout, re.M)) == 28
    rows = re.findall(
        r"^(bf16|int8|int4) +([\d,]+) +([\d.]+) +([\d.]+) +(-?[\d.]+)% +[\d.]+ +[\d.]+  [\d.]+%", result.stdout, re.M
    )
    assert [row[0] for row in rows] == ["bf16", "int8", "int4"], result.stdout
    assert [float(row[2]) for row in rows] == pytest.approx([16, 9.54, 6.55], abs=0.1)
    assert abs(float(rows[1][4])) < 0.1 and all(1 < float(row[3]) < 1100 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"toy", "q"}
    assert call("sample.py", tmp_path / "q", "Nolva", "--max-new-tokens", 5).returncode == 0
    result = call("sample.py", tmp_path / "q", "--eval", toy_data / "quiz.jsonl")
    assert re.search(r"questions +216\nacc +0\.\d+", result.stdout)
    assert call("quantize.py", tmp_path / "q", "--gguf", tmp_path / "q.gguf").returncode == 0
    assert (tmp_path / "q.gguf").stat().st_size > 500_000


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--bits", "5", "--out", "x"], "invalid choice: 5"),
        (["--bits", "4"], "give --bits and --out"),
        ([], "give --bits and --out"),
        (["--bits", "4", "--out", "x", "--gguf", "y"], "give --bits and --out"),
        (["--gguf", "x", "--calibrate", "y"], "--calibrate and --report go with --bits"),
        (["--gguf", "x", "--report", "y"], "--calibrate and --report go with --bits"),
        (["--bits", "4", "--out", "x", "--samples", "3"], "--samples and --device are for --calibrate"),
        (["--bits", "4", "--out", "{q}", "--calibrate", "{even}"], "no data at"),
        (
            ["--bits", "4", "--out", "{q}", "--calibrate", "/nowhere"],
            "/nowhere does not exist",
        ),
        (["--bits", "4", "--out", "{even}"], "already exists"),
    ],
)
def test_flags_that_quantize_refuses(flags, words, even, tmp_path):
    flags = [flag.format(q=tmp_path / "q", even=even) for flag in flags]
    assert re.search(words, one_line_error(call("quantize.py", even, *flags)))
    assert {path.name for path in tmp_path.iterdir()} == {"even"}


def test_what_cannot_be_quantized(tokenizer, even, tmp_path, monkeypatch):
    danube3.save_checkpoint(tmp_path / "odd", random_model(TINY), tokenizer)
    line = one_line_error(call("quantize.py", tmp_path / "odd", "--bits", 4, "--out", tmp_path / "q"))
    assert re.search(r"(lm_head|model\.\S+)\.weight has 40 inputs, no multiple of 32", line)
    model = random_model(EVEN)
    for value, words in ((math.nan, "is not finite"), (3e6, "too large for fp16")):
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
        danube3.save_checkpoint(folder := tmp_path / f"bad{value}", model, tokenizer)
        line = one_line_error(call("quantize.py", folder, "--bits", 8, "--out", tmp_path / "q"))
        assert "model.layers.1.mlp.up_proj.weight" in line and words in line
    line = one_line_error(
        call("quantize.py", folder, "--bits", 4, "--out", tmp_path / "q", "--calibrate", tmp_path / "text.txt")
    )
    assert "text.txt does not exist" in line
    with pytest.raises(danube3.DanubeError, match=r"up_proj\.weight holds 3e\+06, too large"):
        quantize.calibrate_model(model, torch.randint(3, 330, (2, 8)), quantize.layout(EVEN, 4))
    with pytest.raises(danube3.DanubeError, match="up_proj.weight is not finite in fp16"):
        quantize.write_gguf(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))
    quantize_even(even, tmp_path / "done", 8)
    line = one_line_error(call("quantize.py", tmp_path / "done", "--bits", 4, "--out", tmp_path / "q"))
    assert "quantized already" in line
    line = one_line_error(call("quantize.py", even, "--gguf", tmp_path / "done"))
    assert "is a folder" in line
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    line = one_line_error(call("quantize.py", even, "--bits", 8, "--out", tmp_path / "q"))
    assert "are free: make room" in line and not (tmp_path / "q").exists()


UP, WHOLE = "model.layers.0.mlp.up_proj", torch.ones(96, 64)
PACKED, SCALE = {"weight_packed": torch.ones(96, 8, dtype=torch.int32)}, torch.ones(96, 2).half()


@pytest.mark.parametrize(
    "method, tensors",
    [
        ("gptq", {"qweight": torch.zeros(8, 96, dtype=torch.int32), "scales": torch.ones(1, 96).half()}),
        ("bitsandbytes", {"weight": WHOLE.char(), "SCB": torch.ones(96)}),
        ("bitsandbytes", {"weight": torch.zeros(3072, 1, dtype=torch.uint8)}),
        ("fp8", {"weight": WHOLE.to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}),
        ("fp8", {"weight": WHOLE.to(torch.float8_e4m3fn)}),
        ("aqlm", {"codes": torch.zeros(96, 8, 1).char(), "codebooks": torch.ones(1, 256, 1, 8)}),
        ("danube3", {"codes": WHOLE.char(), "scales": torch.ones(96).half()}),  # of our first edition
        ("danube3", {"codes": WHOLE[:, :32].byte(), "scales": torch.ones(96, 2).half()}),
        ("compressed-tensors", PACKED),
        ("compressed-tensors", {**PACKED, "weight_scale": torch.ones(96, 1).half()}),  # groups of 64
        ("compressed-tensors", {**PACKED, "weight_scale": torch.ones(96, 2).bfloat16()}),
        ("compressed-tensors", {**PACKED, "weight_scale": SCALE, "weight_zero_point": torch.ones(12, 2).int()}),
        ("compressed-tensors", {**PACKED, "weight_scale": SCALE, "weight_g_idx": torch.ones(64).int()}),
        ("compressed-tensors", {"weight_packed": torch.ones(96, 4).int(), "weight_scale": SCALE}),  # 2 bits
        ("compressed-tensors", {"weight_packed": torch.ones(96, 8).byte(), "weight_scale": SCALE}),
    ],
)
def test_foreign_quantization_is_refused(method, tensors, even):
    """A model is quantized if its tensors say so, and these are not as quantize.py writes them."""
    path, weights = even / "config.json", safetensors.torch.load_file(even / "model.safetensors")
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}))
    (even / "SHA256SUMS").unlink()
    del weights[f"{UP}.weight"]
    weights |= {f"{UP}.{kind}": tensor for kind, tensor in tensors.items()}
    safetensors.torch.save_file(weights, even / "model.safetensors")
    place = rf"^{re.escape(str(even))}( is missing or damaged \(|: {UP}\.)"
    for dtype in (None, torch.float32):
        with pytest.raises(danube3.DanubeError, match=rf"{place}|^{UP}.weight_packed has 2 bits"):
            danube3.load_checkpoint(even, dtype=dtype)


def test_a_folder_that_only_calls_itself_quantized(even):
    """Its weights are there, whole (merged, with a setting left over): it opens as what it is, and is quantized."""
    path, ids = even / "config.json", torch.randint(3, 330, (2, 9))
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "danube3"}}))
    (even / "SHA256SUMS").unlink()
    model, _ = danube3.load_checkpoint(even)
    assert torch.equal(model(ids), random_model(EVEN)(ids))
    assert call("quantize.py", even, "--bits", 4, "--out", even.with_name("q")).returncode == 0
    assert danube3.load_checkpoint(even.with_name("q"))[0].lm_head.bits == 8


def test_calibration_of_a_group_without_weights():
    """A group of zeros and one number that is nearly zero: its scale is 1, and the rest of the row is unchanged."""
    weight, inputs = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)), torch.randn(200, 96)
    weight[1, :32] = 0
    hessian = inputs.T @ inputs
    plain = danube3.calibrate(weight, hessian, 4)
    weight[1, 3] = 1e-40
    codes, scales = danube3.calibrate(weight, hessian, 4)
    assert (codes[1, :32] == 8).all() and scales[1, 0] == 1 and torch.equal(scales, plain[1])


def test_norms_are_checked_too(even, tmp_path, tokenizer):
    model = random_model(EVEN)
    model.model.norm.weight.data[2] = math.nan
    danube3.save_checkpoint(tmp_path / "nan", model, tokenizer)
    for write in (
        lambda: quantize_even(tmp_path / "nan", tmp_path / "q", 4),
        lambda: quantize.write_gguf(tmp_path / "nan", tmp_path / "m.gguf"),
    ):
        with pytest.raises(danube3.DanubeError, match=r"model\.norm\.weight is not finite"):
            write()
    assert {path.name for path in tmp_path.iterdir()} == {"even", "nan"}


def test_a_folder_that_is_not_whole(even, tmp_path):
    """--bits and --gguf refuse it and leave no file. The constant inv_freq of old exports is skipped."""
    weights = safetensors.torch.load_file(even / "model.safetensors")
    (even / "SHA256SUMS").unlink()
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    safetensors.torch.save_file(weights | inv_freq, even / "model.safetensors")
    quantize_even(even, tmp_path / "old", 4)
    quantize.write_gguf(even, tmp_path / "old.gguf")
    assert len(gguf.GGUFReader(tmp_path / "old.gguf").tensors) == len(weights)
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, even / "model.safetensors")
    for write in (
        lambda: quantize_even(even, tmp_path / "q", 4),
        lambda: quantize.write_gguf(even, tmp_path / "m.gguf"),
    ):
        with pytest.raises(danube3.DanubeError, match=r"lacks \[.*lm_head\.weight.*\]: copy it again"):
            write()
    assert {path.name for path in tmp_path.iterdir()} == {"even", "old", "old.gguf"}


def test_adapters_are_not_quantized(even, tmp_path):
    model = danube3.add_lora(danube3.load_checkpoint(even)[0], 2, 0)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    (tmp_path / "lora").mkdir()
    danube3.write_adapters(tmp_path / "lora", model, weights, even, danube3.weights_sha256(even))
    for flags in (["--bits", "4", "--out", tmp_path / "q"], ["--gguf", tmp_path / "m.gguf"]):
        assert "--merge" in one_line_error(call("quantize.py", tmp_path / "lora", *flags))


def test_speed_is_counted_in_tokens_that_were_made(even):
    """A model that would generate </s> at once is measured all the same."""
    model, _ = danube3.load_checkpoint(even)
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[2] = 1.0
    start = time.perf_counter()
    speed, bandwidth = sample.measure_decoding(model, tokens=16)
    assert 3 * 16 / speed <= 1.5 * (time.perf_counter() - start)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed" not in name)
    assert bandwidth == pytest.approx(speed * weights, rel=1e-6)


def test_sequences_to_calibrate_and_to_measure_with(toy_data, tmp_path):
    """Evenly from all sources of a data folder, of one split; of a text the first nine tenths, or the last."""
    config, tokenizer = danube3.CONFIGS["toy"], danube3.Tokenizer(toy_data / "tokenizer.model")
    data = TokenData(toy_data, config, 128)
    for split in ("train", "val"):
        expected = torch.cat([data.evenly_spread(name, split, 3)[0] for name in danube3.SOURCES])
        assert torch.equal(quantize.sample_sequences(toy_data, tokenizer, config, split, 13), expected)
    (tmp_path / "a.txt").write_text("She keeps 2 geese in Marrow. " * 500)
    ids = tokenizer.encode("She keeps 2 geese in Marrow. " * 500)
    border = len(ids) * 9 // 10
    for split, part in (("train", ids[:border]), ("val", ids[border:])):
        whole = len(part) // 128
        found = quantize.sample_sequences(tmp_path / "a.txt", tokenizer, config, split, 1000)
        assert found.flatten().tolist() == part[: whole * 128] and found.shape == (whole, 128) and whole >= 2
        assert torch.equal(quantize.sample_sequences(tmp_path / "a.txt", tokenizer, config, split, 2), found[:2])
    (tmp_path / "a.txt").write_text("She keeps 2 geese.")
    with pytest.raises(danube3.DanubeError, match="less than one sequence of 128: use more text"):
        quantize.sample_sequences(tmp_path / "a.txt", tokenizer, config, "train", 2)


def test_inputs_that_are_always_zero():
    """A Hessian of zeros, as where calibration never reaches a layer, still gives a quantized matrix."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    codes, scales = danube3.calibrate(weight, torch.zeros(64, 64), 4)
    error = danube3.dequantize(danube3.pack(codes, 4), scales) - weight
    assert error.square().mean() < 0.02 and scales.isfinite().all()
