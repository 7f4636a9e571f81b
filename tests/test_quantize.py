"""Quantization: codes against NumPy and the gguf package, GPTQ against its definition, folders and GGUF files."""

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
from conftest import TINY, call, one_line_error, random_model

import danube3
import quantize
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
    """Round to nearest. -> codes (int4: packed), scales"""
    if bits == 8:
        return danube3.quantize_int8(weight)
    codes, scales = danube3.quantize_int4(weight)
    return danube3.pack_int4(codes), scales


@pytest.fixture
def even(tmp_path, tokenizer):
    danube3.save_checkpoint(tmp_path / "even", random_model(EVEN), tokenizer)
    return tmp_path / "even"


# ----------------------------------------------------------------------------------------------------- codes and scales
@pytest.mark.parametrize("seed, columns", [(0, 32), (1, 96), (2, 160)])
def test_round_to_nearest_is_its_twin(seed, columns):
    weight = some_weight(columns=columns, seed=seed)
    for ours, twin in (
        (danube3.quantize_int8, reference.quantize_int8),
        (danube3.quantize_int4, reference.quantize_int4),
    ):
        codes, scales = ours(weight)
        twin_codes, twin_scales = twin(weight.numpy())
        np.testing.assert_array_equal(scales.numpy(), twin_scales)
        off = codes.numpy().astype(int) - twin_codes
        assert np.abs(off).max() <= 1 and (off != 0).mean() < 2e-3  # a product with 1/s and a quotient may round apart
        packed = codes if codes.dtype == torch.int8 else danube3.pack_int4(codes)
        values = reference.dequantize(codes.numpy(), twin_scales)
        np.testing.assert_array_equal(danube3.dequantize(packed, scales).numpy(), values)
        assert (values[1] == 0).all() and np.isfinite(values).all()


def test_codes_never_wrap_around():
    """A scale that fp16 rounds down would ask for larger codes than there are: 127, or 15, is the largest."""
    row = torch.full((1, 32), 1.4 * 2.0**-24)
    assert (danube3.quantize_int8(127 * row)[0] == 127).all() and (danube3.quantize_int8(-127 * row)[0] == -127).all()
    weight = -8 * row
    weight[0, 1:] *= -1
    codes, scales = danube3.quantize_int4(weight)
    assert codes[0].tolist() == [0] + [15] * 31 and scales.item() == 2.0**-24


@pytest.mark.parametrize("bits", [8, 4])
def test_the_error_is_at_most_half_a_scale(bits):
    """Also in rows whose scale fp16 can hardly hold. int4 clips what lies beyond 7 of the values -8 .. 7."""
    weight = some_weight()
    codes, scales = quantize_weight(weight, bits)
    error = (danube3.dequantize(codes, scales) - weight).abs()
    scales = scales.float()[:, None] if bits == 8 else scales.float().repeat_interleave(32, dim=1)
    slack = 2.0**-24 * (127 if bits == 8 else 8)  # of scales that are rounded to whole multiples of 2^-24
    clipped = (bits == 4) & (weight * scales.sign() > 7.4 * scales.abs())
    assert (error <= scales.abs() * torch.where(clipped, 1.01, 0.51) + slack).all()
    assert clipped.float().mean() < 0.05


def codes_of_blocks(blocks, bits):
    """The codes in GGUF's blocks of 32, each after the two bytes of its scale."""
    if bits == 8:
        return blocks[:, 2:].view(np.int8).astype(int)
    return reference.unpack_int4(blocks[:, 2:]).astype(int)


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
    np.testing.assert_array_equal(ours, theirs)

    ours, theirs = quantize.gguf_blocks(*quantize_weight(weight, bits)), gguf.quants.quantize(weight.numpy(), kind)
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


def test_packing():
    codes = torch.randint(0, 16, (5, 96), dtype=torch.uint8)
    packed = danube3.pack_int4(codes)
    np.testing.assert_array_equal(packed.numpy(), reference.pack_int4(codes.numpy()))
    np.testing.assert_array_equal(reference.unpack_int4(packed.numpy()), codes.numpy())
    assert torch.equal(danube3.unpack_int4(packed), codes) and packed.shape == (5, 48)
    assert torch.equal(danube3.unpack_int4(packed.view(1, 5, 48)), codes[None])


# -------------------------------------------------------------------------------------------------------------- GPTQ
def calibration(columns, rows=300, seed=0):
    """Correlated inputs, as real ones are. -> x [rows, columns]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator).mul(0.4)


@pytest.mark.parametrize("columns", [32, 96])
def test_gptq_is_its_definition(columns):
    """The twin goes column by column with inverse Hessians, as the paper does. Nearly all codes are equal, and so is
    the error."""
    weight, x = torch.randn(6, columns) * 0.03, calibration(columns)
    weight[1], hessian = 0, x.T @ x
    codes, scales = danube3.gptq(weight, hessian)
    twin_codes, twin_scales = reference.gptq(weight.numpy(), hessian.double().numpy())
    assert (codes.numpy() == twin_codes).mean() > 0.97
    np.testing.assert_allclose(scales.float().numpy(), twin_scales.astype(np.float32), rtol=0.02, atol=1e-6)

    def cost(codes, scales):
        error = (reference.dequantize(np.asarray(codes), np.asarray(scales)) - weight.numpy()) @ x.numpy().T
        return (error**2).sum()

    ours, twin, rounded = (
        cost(*each) for each in ((codes, scales), (twin_codes, twin_scales), danube3.quantize_int4(weight))
    )
    assert ours == pytest.approx(twin, rel=0.02) and ours < 0.6 * rounded


def test_gptq_with_independent_inputs_rounds_to_nearest():
    """With the Hessian of white noise no column can make up for another: the codes are round-to-nearest."""
    weight = some_weight(8, 64)
    codes, scales = danube3.gptq(weight, torch.eye(64) * 5)
    groups = weight.unflatten(1, (-1, 32)) * danube3.reciprocal(scales.float())[..., None]
    assert torch.equal(codes, (groups + 8.5).floor().clamp(0, 15).flatten(1).to(torch.uint8))


def test_scale_search_beats_the_plain_scale():
    groups, error_weight = torch.randn(50, 32), torch.rand(32) + 0.1
    scales = danube3.search_scales(groups, error_weight)
    twins = [reference.group_scale(group, error_weight.double().numpy()) for group in groups.double().numpy()]
    np.testing.assert_allclose(scales.numpy(), twins, rtol=2e-3)
    assert torch.equal(scales, scales.half().float())  # rounded to fp16: codes are made for the stored scales

    def error(scales):
        values = (groups / scales[:, None] + 0.5).floor().clamp(-8, 7)
        return (error_weight * (groups - scales[:, None] * values) ** 2).sum(1)

    plain = danube3.quantize_int4(groups)[1][:, 0].float()
    assert (error(scales) <= error(plain) * 1.0001).all() and error(scales).sum() < 0.9 * error(plain).sum()
    assert torch.equal(danube3.search_scales(torch.zeros(2, 32), error_weight), torch.zeros(2))


def test_gptq_of_a_model_takes_its_inputs_from_quantized_layers():
    """Each weight matrix by hand, from the inputs that reach it when all layers before it are quantized."""
    model, sequences = random_model(EVEN), torch.randint(3, 330, (6, 20))
    expected = random_model(EVEN)
    order = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    order += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    same_input = {
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "mlp.up_proj": "mlp.gate_proj",
    }
    done = quantize.gptq_model(model, sequences, batch_size=4)
    embedding = expected.model.embed_tokens.weight.data
    embedding.copy_(danube3.dequantize(*danube3.quantize_int8(embedding)))
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert list(done) == [f"model.layers.{i}.{name}" for i in range(2) for name in order] + ["lm_head"]
    hessians = {}
    for name, (codes, scales) in done.items():
        short = ".".join(name.rsplit(".", 2)[-2:])
        if short not in same_input:
            seen = []
            hook = expected.get_submodule(name).register_forward_pre_hook(
                lambda m, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                expected(sequences)
            hook.remove()
            hessians[short] = seen[0].flatten(0, 1).T @ seen[0].flatten(0, 1)
        linear = expected.get_submodule(name)
        twin_codes, twin_scales = danube3.gptq(linear.weight.detach(), hessians[same_input.get(short, short)])
        assert (danube3.unpack_int4(codes) == twin_codes).float().mean() > 0.98, name
        torch.testing.assert_close(scales, twin_scales, rtol=0.02, atol=1e-4)
        linear.weight.data.copy_(danube3.dequantize(codes, scales))
        assert torch.equal(model.get_submodule(name).weight, linear.weight)


# --------------------------------------------------------------------------------------------- the quantized modules
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_quantized_linear_is_its_twin(bits, packed):
    """Unpacked, it is the product with the dequantized weight matrix. Packed, the same to the precision of bf16."""
    codes, scales = quantize_weight(some_weight(48, 96), bits)
    linear = danube3.QuantizedLinear(48, 96, bits)
    linear.load_state_dict({"codes": codes, "scales": scales})
    unpacked = codes.numpy() if bits == 8 else reference.unpack_int4(codes.numpy())
    if packed:
        linear.pack()
        assert linear.packed is not None
    for shape in ((1, 1, 96), (2, 3, 96), (40, 96)):
        x = torch.randn(shape)
        y = linear(x)
        expected = reference.quantized_matmul(x.numpy(), unpacked, scales.numpy())
        assert y.dtype == x.dtype and y.shape == expected.shape
        assert np.abs(y.numpy() - expected).max() < (2e-2 if packed else 1e-5) * np.abs(expected).max()


def test_the_gradient_goes_through_a_quantized_linear_layer():
    codes, scales = quantize_weight(some_weight(48, 96), 4)
    linear = danube3.QuantizedLinear(48, 96, 4)
    linear.load_state_dict({"codes": codes, "scales": scales})
    x, grad = torch.randn(5, 96, dtype=torch.float64, requires_grad=True), torch.randn(5, 48, dtype=torch.float64)
    linear(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ linear.weight.double(), rtol=1e-9, atol=1e-12)
    assert not list(linear.parameters())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder(bits, even, tmp_path):
    """It opens without a flag. Its logits are those of the dequantized weights, packed or not."""
    lines = quantize.quantize_folder(even, tmp_path / "q", bits, {}, part_bytes=5_000)
    model, _ = danube3.load_checkpoint(tmp_path / "q")
    names = {"model.embed_tokens": bits, "lm_head": 8} | {name: bits for name in danube3.decoder_linears(model)}
    assert {line[0]: line[1] for line in lines} == names
    assert len(list((tmp_path / "q").glob("model-*.safetensors"))) > 3
    weights = safetensors.torch.load_file(even / "model.safetensors")
    for name, tensor_bits, size, largest, mean in lines:
        module = model.get_submodule(name)
        error = (module.weight - weights[f"{name}.weight"]).abs()
        assert (largest, mean) == (error.amax().item(), error.mean().item()) and module.bits == tensor_bits
        assert size == module.codes.nbytes + module.scales.nbytes
        weights[f"{name}.weight"] = module.weight
    plain, ids = random_model(EVEN), torch.randint(3, 330, (2, 9))
    plain.load_state_dict(weights)
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-4, atol=1e-4)
    dequantized = train.dequantize_model(danube3.load_checkpoint(tmp_path / "q")[0])
    assert set(dequantized.state_dict()) == set(plain.state_dict()) and torch.equal(dequantized(ids), plain(ids))
    packed, _ = danube3.load_checkpoint(tmp_path / "q", pack=True)
    assert (packed(ids) - plain(ids)).abs().max() < 0.05 * plain(ids).abs().max()
    assert danube3.generate(packed, ids, 5).shape == (2, 14)
    danube3.verify_checksums(tmp_path / "q")
    half, _ = danube3.load_checkpoint(tmp_path / "q", dtype=torch.bfloat16)
    assert half(ids).dtype == torch.float32 and half.model(ids).dtype == torch.bfloat16
    assert (half(ids) - plain(ids)).abs().max() < 0.1 * plain(ids).abs().max()


def test_memory_of_a_packed_model(even, tmp_path):
    """Packing replaces the stored codes: it does not keep both."""
    quantize.quantize_folder(even, tmp_path / "q", 4, {})
    stored, packed = (danube3.load_checkpoint(tmp_path / "q", pack=pack)[0] for pack in (False, True))
    sizes = [sum(tensor.nbytes for _, tensor in quantize.stored_tensors(model)) for model in (stored, packed)]
    assert sizes[1] < 1.15 * sizes[0]
    total = sum(len(bytes_) for bytes_ in map(lambda p: p.read_bytes(), (tmp_path / "q").glob("*.safetensors")))
    assert sizes[0] == pytest.approx(total, rel=0.1)


@pytest.mark.slow
def test_qlora_over_a_quantized_base(even, tmp_path, tokenizer):
    """Adapters train over frozen codes, are saved alone, load again, and are merged into an ordinary checkpoint."""
    quantize.quantize_folder(even, tmp_path / "q", 4, {})
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
    packed = danube3.load_checkpoint(tmp_path / "run", pack=True)[0]  # as sample.py opens it
    assert packed.model.layers[0].mlp.up_proj.base_layer.packed is not None
    with torch.no_grad():
        torch.testing.assert_close(packed(ids), adapted(ids), rtol=0.1, atol=0.1 * adapted(ids).std().item())
    assert "quantized" in one_line_error(call("train.py", *flags, "--out", tmp_path / "full"))


@pytest.mark.parametrize("bits, dtype", [(4, torch.bfloat16), (8, torch.float16)])
def test_the_residual_stream_over_a_quantized_base_is_fp32(bits, dtype, even, tmp_path):
    """Also where a GPU would open the folder in half precision: a residual stream in fp16 could overflow."""
    quantize.quantize_folder(even, tmp_path / "q", bits, {})
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
        quantize.quantize_folder(even, folder := tmp_path / "q", bits, {}, part_bytes=5_000)
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
    assert [float(row[2]) for row in rows] == pytest.approx([16, 8.14, 4.98], abs=0.03)
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
        (["--bits", "8", "--out", "x", "--calibrate", "y"], "--calibrate goes with --bits 4"),
        (["--gguf", "x", "--report", "y"], "--report with --bits"),
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
        quantize.gptq_model(model, torch.randint(3, 330, (2, 8)))
    with pytest.raises(danube3.DanubeError, match="up_proj.weight is not finite in fp16"):
        quantize.write_gguf(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))
    quantize.quantize_folder(even, tmp_path / "done", 8, {})
    line = one_line_error(call("quantize.py", tmp_path / "done", "--bits", 4, "--out", tmp_path / "q"))
    assert "quantized already" in line
    line = one_line_error(call("quantize.py", even, "--gguf", tmp_path / "done"))
    assert "is a folder" in line
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    line = one_line_error(call("quantize.py", even, "--bits", 8, "--out", tmp_path / "q"))
    assert "are free: make room" in line and not (tmp_path / "q").exists()


UP, WHOLE = "model.layers.0.mlp.up_proj", torch.ones(96, 64)


@pytest.mark.parametrize(
    "method, tensors",
    [
        ("gptq", {"qweight": torch.zeros(8, 96, dtype=torch.int32), "scales": torch.ones(1, 96).half()}),
        ("bitsandbytes", {"weight": WHOLE.char(), "SCB": torch.ones(96)}),
        ("bitsandbytes", {"weight": torch.zeros(3072, 1, dtype=torch.uint8)}),
        ("fp8", {"weight": WHOLE.to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}),
        ("fp8", {"weight": WHOLE.to(torch.float8_e4m3fn)}),
        ("aqlm", {"codes": torch.zeros(96, 8, 1).char(), "codebooks": torch.ones(1, 256, 1, 8)}),
        ("danube3", {"codes": WHOLE.char()}),
        ("danube3", {"codes": WHOLE.byte(), "scales": torch.ones(96).half()}),
        ("danube3", {"codes": WHOLE.int(), "scales": torch.ones(96).half()}),
        ("danube3", {"codes": WHOLE, "scales": torch.ones(96).half()}),
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
    for dtype in (None, torch.float32):
        with pytest.raises(danube3.DanubeError, match=rf"^{re.escape(str(even))}( is missing or damaged \(|: {UP}\.)"):
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


def test_gptq_of_a_group_without_weights():
    """A group of zeros and one number that is nearly zero: its scale is 0, and the rest of the row is unchanged."""
    weight, inputs = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)), torch.randn(200, 96)
    weight[1, :32] = 0
    hessian, plain = quantize.gram(inputs), danube3.gptq(weight, quantize.gram(inputs))
    weight[1, 3] = 1e-40
    codes, scales = danube3.gptq(weight, hessian)
    assert scales.isfinite().all() and (scales[1, 0] == 0) and torch.equal(scales, plain[1])


def test_norms_are_checked_too(even, tmp_path, tokenizer):
    model = random_model(EVEN)
    model.model.norm.weight.data[2] = math.nan
    danube3.save_checkpoint(tmp_path / "nan", model, tokenizer)
    for write in (
        lambda: quantize.quantize_folder(tmp_path / "nan", tmp_path / "q", 4, {}),
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
    quantize.quantize_folder(even, tmp_path / "old", 4, {})
    quantize.write_gguf(even, tmp_path / "old.gguf")
    assert len(gguf.GGUFReader(tmp_path / "old.gguf").tensors) == len(weights)
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, even / "model.safetensors")
    for write in (
        lambda: quantize.quantize_folder(even, tmp_path / "q", 4, {}),
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
    speed, bandwidth = quantize.measure_decoding(model, tokens=16)
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
    codes, scales = danube3.gptq(weight, torch.zeros(64, 64))
    error = danube3.dequantize(danube3.pack_int4(codes), scales) - weight
    assert error.square().mean() < 0.02 and scales.isfinite().all()
