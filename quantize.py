"""Quantize a Danube3: `python quantize.py out/toy-chat --bits 4 --out out/toy-chat-int4`."""

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import danube3
import sample
from danube3 import GROUP, Danube3, DanubeConfig, DanubeError, Tokenizer, reading, require
from data.read import Arguments, TokenData, pick_device, positive, read_text, run_command

# ---- Text to calibrate and to measure with

def sample_sequences(data: str | Path, tokenizer: Tokenizer, config: DanubeConfig, split: str,
                     count: int) -> Tensor:
    """About `count` sequences [N, T] to calibrate ("train") or measure ("val") with.

    They come evenly from all sources of a data folder, or from a text file, whose last tenth is "val". T is
    half of the context, at most 2,048 [ours].
    """
    length = min(config.max_position_embeddings // 2, 2_048)
    if Path(data).is_dir():
        folder = TokenData(data, config, length, tokenizer)
        names = [name for name, own_split in folder.blocks if own_split == split]
        share = math.ceil(count / max(1, len(names)))
        return torch.cat([folder.evenly_spread(name, split, share)[0] for name in names])
    ids = torch.tensor(tokenizer.encode(read_text(data)))
    border = len(ids) * 9 // 10
    ids = ids[:border] if split == "train" else ids[border:]
    require(len(ids) >= length, f"{data} has {len(ids)} tokens to {split} with, less than one sequence of "
            f"{length}: use more text")
    return ids[:len(ids) // length * length].view(-1, length)[:count]

# ---- GPTQ of a whole model

def check_quantizable(name: str, weight: Tensor) -> None:
    """Refuse what codes and scales cannot hold."""
    require(danube3.is_finite(weight), f"{name} is not finite: take an earlier checkpoint")
    require(weight.dim() == 1 or weight.shape[-1] % GROUP == 0,
            f"{name} has {weight.shape[-1]} inputs, no multiple of {GROUP}: such a model cannot be quantized")
    largest = weight.abs().amax().item()  # over 8 or 127 it must be a number of fp16
    require(largest <= 2**18, f"{name} holds {largest:.3g}, too large for fp16: take an earlier checkpoint")

def gram(x: Tensor) -> Tensor:
    """The sum of x x^T over all vectors of x [.., in] -> [in, in], fp32"""
    x = x.flatten(0, -2).float()
    return x.T @ x

@torch.no_grad()
def gptq_model(model: Danube3, sequences: Tensor, batch_size: int = 8) -> dict[str, tuple[Tensor, Tensor]]:
    """Quantize linear layers and head with calibration sequences [N, T]. -> name: (codes, scales)

    The model's weights are replaced by their quantized values. A layer is calibrated on the outputs of the
    quantized layers before it, so later layers make up for the errors of earlier ones. Linear layers with
    the same input share its Hessian. The embedding stays at int8.
    """
    decoder, done = model.model, {}

    def quantize(name: str, hessian: Tensor) -> None:
        require(hessian.isfinite().all(), f"the inputs of {name} overflow on this data: omit --calibrate")
        weight = model.get_parameter(f"{name}.weight")
        codes, scales = danube3.gptq(weight, hessian)
        packed = danube3.pack_int4(codes)
        weight.copy_(danube3.dequantize(packed, scales))
        done[name] = packed.cpu(), scales.cpu()

    for name, weight in model.named_parameters():
        check_quantizable(name, weight)
    decoder.embed_tokens.weight.copy_(danube3.dequantize(*danube3.quantize_int8(decoder.embed_tokens.weight)))
    positions = torch.arange(sequences.shape[1], device=model.device)  # [T]
    cos, sin = danube3.rotary_table(positions, model.config.head_dim, model.config.rope_theta)
    hidden = [decoder.embed_tokens(ids.to(model.device)) for ids in sequences.split(batch_size)]  # [B, T, D]
    inputs = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    for number, layer in enumerate(tqdm(decoder.layers, desc="GPTQ", unit="layer")):
        for names in inputs:
            first = layer.get_submodule(names[0])
            hessian = torch.zeros(first.in_features, first.in_features, device=model.device)

            def add(_: nn.Module, args: tuple[Tensor], hessian: Tensor = hessian) -> None:
                hessian.add_(gram(args[0]))

            handle = first.register_forward_pre_hook(add)
            for x in hidden:
                layer(x, cos, sin, None)
            handle.remove()
            for name in names:
                quantize(f"model.layers.{number}.{name}", hessian)
        for i, x in enumerate(hidden):  # in place: all of them together are large
            hidden[i] = layer(x, cos, sin, None)
    hessian = torch.zeros(model.config.hidden_size, model.config.hidden_size, device=model.device)
    for x in hidden:
        hessian += gram(decoder.norm(x))
    quantize("lm_head", hessian)
    return done

# ---- Quantized folders

# Bits of each part of the model [ours]. In int4, embedding and head are equally large, and one keeps 8 bits:
# with RTN the head, where errors cost more; with GPTQ, which repairs a head but not a lookup table, the
# embedding (tests/bench_quantize.py).
SCHEMES = {"int8": {"model.embed_tokens": 8, "model.layers": 8, "lm_head": 8},
           "int4": {"model.embed_tokens": 4, "model.layers": 4, "lm_head": 8},
           "int4 GPTQ": {"model.embed_tokens": 8, "model.layers": 4, "lm_head": 4}}

def bits_for(name: str, scheme: dict[str, int]) -> int | None:
    """The bits of the weight matrix `name`, None for other modules."""
    for part, bits in scheme.items():
        if name.startswith(part) and "norm" not in name:
            return bits
    return None

class Quantized(NamedTuple):
    """A line of the report: errors are |quantized weight - weight|."""
    name: str
    bits: int
    size: int
    largest_error: float
    mean_error: float

def checked_weights(folder: Path, model: Danube3) -> danube3.Tensors:
    """The weights of a folder, if their names and shapes are the model's."""
    weights, expected = danube3.read_weights(folder), model.state_dict()
    for name, weight in weights.items():
        require(name in expected and expected[name].shape == weight.shape,
                f"{folder}: {name} {tuple(weight.shape)} does not fit config.json: copy both files again")
    missing = sorted(expected.keys() - weights.keys())
    require(not missing, f"{folder} lacks {missing[:1]}: copy it again")
    return weights

def write_in_parts(folder: Path, tensors: Iterable[tuple[str, Tensor]], part_bytes: int) -> None:
    """Write safetensors files of about `part_bytes` and their index. Memory never holds all tensors."""
    part: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    total, written = 0, 0

    def flush() -> None:
        nonlocal written
        written += 1
        name = f"model-{written:05d}.safetensors"
        danube3.write_tensors(folder / name, part)
        weight_map.update(dict.fromkeys(part, name))
        part.clear()

    for name, tensor in tensors:
        part[name] = tensor.contiguous()
        total += tensor.nbytes
        if sum(each.nbytes for each in part.values()) >= part_bytes:
            flush()
    if part:
        flush()
    danube3.write_json(folder / "model.safetensors.index.json",
                       {"metadata": {"total_size": total}, "weight_map": weight_map})

def empty_model(source: Path) -> Danube3:
    """The model of a folder without its weights: shapes on the meta device."""
    config = danube3.read_config(source)
    with torch.device("meta"), reading(source):
        model = danube3.use_quantized_modules(Danube3(config), danube3.read_weights(source))
    model.stop_ids = danube3.read_stop_ids(source, config)
    return model

def quantize_folder(source: Path, out: Path, bits: int, done: dict[str, tuple[Tensor, Tensor]],
                    part_bytes: int = 2**29) -> list[Quantized]:
    """Quantize a checkpoint into the folder `out`, tensor by tensor. -> one line per tensor

    `done` are the tensors that gptq_model has quantized. All others are rounded to nearest.
    """
    scheme = SCHEMES["int4 GPTQ" if done else f"int{bits}"]
    danube3.verify_checksums(source)
    require(source.resolve() != out.with_name(f"{out.name}.partial").resolve(),
            f"{out} would be written in {source} first: choose another place")
    model, report = empty_model(source), []
    tokenizer = danube3.read_tokenizer(source, model.config)
    needed = danube3.count_parameters(model.config) * (bits + 1) / 8

    def quantized() -> Iterator[tuple[str, Tensor]]:
        for name, weight in checked_weights(source, model).items():
            check_quantizable(name, weight)
            module = name.removesuffix(".weight")
            own_bits = bits_for(module, scheme)
            if own_bits is None:
                yield name, weight.float()
                continue
            if module in done:
                codes, scales = done[module]
            elif own_bits == 8:
                codes, scales = danube3.quantize_int8(weight)
            else:
                codes, scales = danube3.quantize_int4(weight)
                codes = danube3.pack_int4(codes)
            error = (danube3.dequantize(codes, scales) - weight.float()).abs()
            size = codes.nbytes + scales.nbytes
            report.append(Quantized(module, own_bits, size, error.amax().item(), error.mean().item()))
            yield f"{module}.codes", codes
            yield f"{module}.scales", scales

    with danube3.atomic_folder(out) as partial:
        free = shutil.disk_usage(partial).free
        require(free >= needed, f"{out} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} are free: make room")
        how = {"quant_method": "danube3", "bits": scheme, "group_size": GROUP}
        danube3.write_settings(partial, model, tokenizer, torch.float32, quantization_config=how)
        write_in_parts(partial, quantized(), part_bytes)
    return report

# ---- GGUF files, for llama.cpp and the programs built on it
#
# GGUF has other names, and the rows of q and k in the order of an interleaved rotary embedding: pairs are
# neighbours (2i, 2i+1) where ours are halves. Q8_0 has a scale per 32 weights: here the row's, repeated.

def interleave_heads(name: str, tensor: Tensor, config: DanubeConfig) -> Tensor:
    """The rows of q_proj and k_proj in GGUF's order: of each head 0, h/2, 1, h/2 + 1, .. Others unchanged."""
    all_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads = all_heads.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.unflatten(0, (heads, 2, config.head_dim // 2))  # [heads, 2, h/2, ..]
    return halves.transpose(1, 2).flatten(0, 2)                     # [heads h, ..]

def gguf_blocks(codes: Tensor, scales: Tensor) -> np.ndarray:
    """A matrix as blocks of 32 weights, each an fp16 scale and its codes. -> bytes [out, ..]"""
    size = GROUP // 2  # bytes of the codes of a block
    if codes.dtype == torch.int8:
        size = GROUP
        scales = scales[:, None].expand(-1, codes.shape[1] // GROUP)  # [out, in/32]
    blocks = codes.view(torch.uint8).unflatten(1, (-1, size))
    scale_bytes = scales.contiguous().view(torch.uint8).unflatten(1, (-1, 2))
    return torch.cat((scale_bytes, blocks), dim=2).flatten(1).numpy()

def gguf_tensors(source: Path, names: Any) -> Iterator[tuple[str, np.ndarray, str]]:
    """Each tensor of a checkpoint: GGUF name, values or blocks, type. `names` is a gguf.TensorNameMap."""
    codes, model = {}, empty_model(source)
    for name, tensor in checked_weights(source, model).items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and tensor.dim() == 2:
            tensor = tensor.half()
        require(not tensor.is_floating_point() or danube3.is_finite(tensor),
                f"{source}: {name} is not finite in fp16: take an earlier checkpoint")
        tensor = interleave_heads(name, tensor, model.config)
        gguf_name = f"{names.get_name(module)}.weight"
        if kind == "codes":  # stored just before its scales
            codes[module] = tensor
        elif kind == "scales":
            yield gguf_name, gguf_blocks(codes.pop(module), tensor), "Q8_0" if tensor.dim() == 1 else "Q4_0"
        elif tensor.dim() == 1:
            yield gguf_name, tensor.float().numpy(), "F32"
        else:
            yield gguf_name, tensor.numpy(), "F16"

def describe_for_gguf(writer: Any, model: Danube3, tokenizer: Tokenizer) -> None:
    """The sizes of the model and the pieces of its tokenizer. `writer` is a gguf.GGUFWriter."""
    require(len({*model.stop_ids, model.config.eos_token_id}) < 3, "GGUF cannot hold three stop tokens")
    c, sp, linear = model.config, tokenizer.sp, model.model.layers[0].get_submodule("mlp.up_proj")
    writer.add_quantization_version(2)
    writer.add_file_type({None: 1, 8: 7, 4: 2}[getattr(linear, "bits", None)])  # F16, Q8_0, Q4_0
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    pieces: list[tuple[str, float, int]] = []
    for i in range(sp.vocab_size()):
        kind = 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
        pieces.append((sp.id_to_piece(i), sp.get_score(i), kind))
    for i in range(sp.vocab_size(), c.vocab_size):  # a model's vocabulary may be padded
        pieces.append((f"<unused{i}>", 0.0, 5))
    tokens, scores, kinds = zip(*pieces)
    # llama.cpp knows BPE only, whose scores are whole numbers, all different, and no normalization.
    probe = "\ufb01  \u00bd\t "
    unchanged = sp.normalize(probe).removeprefix("\u2581") == probe.replace(" ", "\u2581")
    ranks = [score for score, kind in zip(scores, kinds) if kind == 1]
    require(unchanged and np.allclose(ranks, np.round(ranks), 0, 0) and ranks.count(0) < 2, "GGUF cannot "
            "hold this tokenizer: it is unigram, normalizes text, or has user-defined pieces")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(c.bos_token_id)
    writer.add_eos_token_id(c.eos_token_id)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(c.pad_token_id)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_space_prefix(sp.normalize("a") != "a")
    for token_id in set(model.stop_ids) - {c.eos_token_id}:
        writer.add_eot_token_id(token_id)
    writer.add_chat_template(tokenizer.chat_template)

def write_gguf(source: Path, path: Path) -> None:
    """Write a checkpoint as a GGUF file: Q8_0 or Q4_0 as it is quantized, otherwise F16.

    Tensors are read twice: the file begins with their list, and memory never holds all of them.
    """
    try:
        import gguf
    except ImportError as error:
        raise DanubeError("writing GGUF needs the package gguf: pip install gguf") from error
    require(path.parent.is_dir() and not path.is_dir(),
            f"{path} is a folder, or lies in none that exists: name a file")
    danube3.verify_checksums(source)
    model, partial = empty_model(source), path.with_name(f"{path.name}.partial")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer: Any = gguf.GGUFWriter(partial, "llama")
    describe_for_gguf(writer, model, danube3.read_tokenizer(source, model.config))
    for name, values, kind in gguf_tensors(source, names):
        raw_dtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, raw_dtype=raw_dtype)
    partial.touch()
    with danube3.locked(partial):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file = writer.fout[0]
            bar = tqdm(gguf_tensors(source, names), "GGUF", len(writer.tensors[0]), unit="tensor")
            for _, values, _ in bar:
                writer.write_padding(file, file.tell())
                # numpy's tofile, which gguf uses, says nothing when the disk is full
                file.write(values.tobytes())
                writer.write_padding(file, values.nbytes)
            writer.close()
            danube3.sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

# ---- The report

def stored_tensors(model: Danube3) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model, packed or not."""
    for name, module in model.named_modules():
        for tensor in getattr(module, "packed", None) or [*module.parameters(False), *module.buffers(False)]:
            yield name, tensor

@torch.no_grad()
def measure_decoding(model: Danube3, tokens: int = 64) -> tuple[float, float]:
    """Tokens per second after a prompt of 8, and the bytes of weights read per second. Best of three."""
    next_ids, best = torch.full((1, 8), model.config.bos_token_id, device=model.device), math.inf
    for _ in range(3):
        kv_cache = danube3.KVCache(model.config, 1, 8 + tokens, model.dtype, model.device)
        model.model(next_ids.expand(1, 8), kv_cache)
        start = time.perf_counter()
        for _ in range(tokens):
            logits = model.lm_head(model.model(next_ids[:, -1:], kv_cache)[:, -1])  # [1, V]
            next_ids = logits.argmax(-1, keepdim=True)                              # [1, 1]
        next_ids.item()  # waits for the device
        best = min(best, (time.perf_counter() - start) / tokens)
    read = sum(tensor.nbytes for name, tensor in stored_tensors(model) if "embed_tokens" not in name)
    return 1 / best, read / best

def compare(folders: dict[str, Path], data: str) -> None:
    """Print a table like that of the model cards. `change` is against the first line."""
    print(f"\n{'':8}{'bytes':>16}{'bits/weight':>13}{'perplexity':>12}{'change':>9}{'tokens/s':>10}"
          f"{'GB/s':>7}  quiz")
    first, quiz = None, Path(data, "quiz.jsonl")
    for name, folder in folders.items():
        model, tokenizer = danube3.load_checkpoint(folder, dtype=torch.bfloat16 if name == "bf16" else None)
        size = sum(tensor.nbytes for _, tensor in stored_tensors(model))
        sequences = sample_sequences(data, tokenizer, model.config, "val", 256)
        fast = model if name == "bf16" else danube3.load_checkpoint(folder, pack=True)[0]
        speed, bandwidth = measure_decoding(fast)
        perplexity = math.exp(danube3.evaluate_loss(model.float(), sequences, sequences, 8))
        first = first or perplexity
        score = f"{sample.evaluate(model, tokenizer, quiz)['acc']:.1%}" if quiz.is_file() else "-"
        bits = 8 * size / danube3.count_parameters(model.config)
        print(f"{name:8}{size:>16,}{bits:>13.2f}{perplexity:>12.4f}{perplexity / first - 1:>9.2%}"
              f"{speed:>10.1f}{bandwidth / 1e9:>7.2f}  {score}")

# ---- The program

def arguments() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, an output directory, or a published Danube3 folder")
    parser.add_argument("--bits", type=int, choices=[8, 4], help="8: a scale per row; 4: one per 32 weights")
    parser.add_argument("--out", type=Path, help="the folder to write")
    parser.add_argument("--calibrate", metavar="DATA", help="token shards or a text file, for GPTQ at 4 bits")
    parser.add_argument("--samples", type=positive, help="calibrate with about this many sequences [512]")
    parser.add_argument("--report", metavar="DATA", help="compare bf16, int8 and int4 on its validation part")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="write a GGUF file for llama.cpp")
    parser.add_argument("--device", help="where GPTQ runs: auto, cpu, cuda, cuda:1, mps [auto]")
    args = parser.parse_args()
    if bool(args.gguf) == bool(args.bits) or bool(args.bits) != bool(args.out):
        parser.error("give --bits and --out to quantize, or --gguf to write a GGUF file")
    if ((args.calibrate or args.report) and args.gguf) or (args.calibrate and args.bits == 8):
        parser.error("--calibrate goes with --bits 4, and --report with --bits")
    if (args.samples or args.device) and not args.calibrate:
        parser.error("--samples and --device are for --calibrate")
    return args

def check(source: Path, args: argparse.Namespace) -> None:
    """Refuse what could not end well, before hours of work."""
    require(not (source / "adapter_config.json").is_file(),
            f"{source} holds adapters: merge them into their base, with train.py --merge, and quantize that")
    require(not (args.out and args.out.exists()), f"{args.out} already exists: choose another --out")
    quantized = any(name.endswith(".codes") for name in danube3.read_weights(source))
    require(not (args.out and quantized), f"{source} is quantized already: take what it was made from")
    if args.report:
        config = danube3.read_config(source)
        tokenizer = danube3.read_tokenizer(source, config)
        sample_sequences(args.report, tokenizer, config, "val", 1)  # can it be read?

def quantize(source: Path, out: Path, bits: int, args: argparse.Namespace) -> list[Quantized]:
    """-> one line per tensor"""
    done = {}
    if args.calibrate and bits == 4:
        device = pick_device(args.device or "auto")
        model, tokenizer = danube3.load_checkpoint(source, device, torch.float32)
        sequences = sample_sequences(args.calibrate, tokenizer, model.config, "train", args.samples or 512)
        done = gptq_model(model, sequences)
    return quantize_folder(source, out, bits, done)

def main() -> None:
    args = arguments()
    source = danube3.find_checkpoint(args.checkpoint)
    check(source, args)
    if args.gguf:
        write_gguf(source, args.gguf)
        print(f"{args.gguf}: {args.gguf.stat().st_size:,} bytes")
        return
    # Errors of the weights. GPTQ makes these larger, to make the errors of the outputs smaller.
    print(f"{'tensor':40}{'bits':>5}{'bytes':>14}{'largest error':>15}{'mean error':>12}")
    for name, bits, size, largest, mean in quantize(source, args.out, args.bits, args):
        print(f"{name:40}{bits:>5}{size:>14,}{largest:>15.2e}{mean:>12.2e}")
    if args.report:
        with tempfile.TemporaryDirectory(dir=args.out.parent) as scratch:
            folders = {"bf16": source, "int8": Path(scratch, "int8"), "int4": Path(scratch, "int4")}
            folders[f"int{args.bits}"] = args.out
            for bits in {4, 8} - {args.bits}:
                quantize(source, folders[f"int{bits}"], bits, args)
            compare(folders, args.report)
    print(f"try: python sample.py {args.out}")

if __name__ == "__main__":
    run_command(main)
