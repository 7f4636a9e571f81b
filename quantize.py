"""Quantize a Danube3: `python quantize.py out/toy-chat --bits 4 --calibrate data/toy --out out/toy-chat-int4`."""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import danube3
import sample
from danube3 import Danube3, DanubeConfig, DanubeError, Tokenizer
from data.read import read_text


def sample_rows(data: str | Path, tokenizer: Tokenizer, config: DanubeConfig, split: str, count: int) -> Tensor:
    """About `count` rows [N, T] of ids to calibrate ("train") or measure ("val") with: as many from each source of a
    data folder, or from a text file, whose last tenth is "val". T is half of the context, at most 2,048 [C]."""
    length = min(config.max_position_embeddings // 2, 2_048)
    if Path(data).is_dir():
        folder = danube3.matching_data(data, tokenizer, config, length)
        sources = [folder.open(name, split) for name in folder.meta["sources"]]
        share = -(-count // len(sources))  # of each source
        windows = [source.window(i * source.windows // min(share, source.windows))
                   for source in sources for i in range(min(share, source.windows))]
        return torch.from_numpy(np.stack(windows))
    ids = torch.tensor(tokenizer.encode(read_text(data)))
    ids = ids[:len(ids) * 9 // 10] if split == "train" else ids[len(ids) * 9 // 10:]
    if len(ids) < length:
        raise DanubeError(f"{data} has {len(ids)} tokens to {split} with, less than a row of {length}: use more text")
    return ids[:len(ids) // length * length].view(-1, length)[:count]


# ----------------------------------------------------------------------------------------------------------------- GPTQ
def check_quantizable(name: str, weight: Tensor) -> None:
    """Refuse what codes and scales cannot hold."""
    if not danube3.is_finite(weight):
        raise DanubeError(f"{name} holds values that are not finite: take an earlier checkpoint")
    if weight.dim() == 2 and weight.shape[1] % danube3.GROUP:
        raise DanubeError(f"{name} has rows of {weight.shape[1]}, which is no multiple of {danube3.GROUP}: only models "
                          "whose sizes are can be quantized")
    if (largest := weight.abs().amax().item()) > 2 ** 18:  # / 8 or / 127 must be a number of fp16
        raise DanubeError(f"{name} holds {largest:.3g}, too large for a scale in fp16: take an earlier checkpoint")


def gram(x: Tensor) -> Tensor:
    """Sum of x x^T over all vectors of x [.., K] -> [K, K], fp32"""
    x = x.flatten(0, -2).float()
    return x.T @ x


@torch.no_grad()
def gptq_model(model: Danube3, rows: Tensor, batch_size: int = 8) -> dict[str, tuple[Tensor, Tensor]]:
    """Quantize layers and head with calibration rows [N, T], in place (as quantized and dequantized again).
    -> name: (codes, scales)

    The inputs that a matrix is calibrated on come from the already quantized ones before it: later layers make up for
    the errors of earlier ones. Matrices that read the same input share its hessian. The embedding stays at int8.
    """
    decoder, done = model.model, {}

    def quantize(name: str, hessian: Tensor) -> None:
        if not hessian.isfinite().all():
            raise DanubeError(f"the inputs of {name} grow beyond fp32 on the calibration data: leave --calibrate out")
        weight = model.get_parameter(f"{name}.weight")
        codes, scales = danube3.gptq(weight, hessian)
        weight.copy_(danube3.dequantize(danube3.pack_int4(codes), scales))
        done[name] = danube3.pack_int4(codes).cpu(), scales.cpu()

    for name, weight in model.named_parameters():
        check_quantizable(name, weight)
    decoder.embed_tokens.weight.copy_(danube3.dequantize(*danube3.quantize_int8(decoder.embed_tokens.weight)))
    cos, sin = danube3.rotary_table(0, rows.shape[1], model.config.head_dim, model.config.rope_theta, model.device)
    streams = [decoder.embed_tokens(part.to(model.device)) for part in rows.split(batch_size)]  # each [B, T, D]
    inputs = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    for number, layer in enumerate(tqdm(decoder.layers, desc="GPTQ", unit="layer")):
        for names in inputs:
            first = layer.get_submodule(names[0])
            hessian = torch.zeros(first.in_features, first.in_features, device=model.device)

            def add(_: nn.Module, args: tuple[Tensor], hessian: Tensor = hessian) -> None:
                hessian.add_(gram(args[0]))

            handle = first.register_forward_pre_hook(add)
            for stream in streams:
                layer(stream, cos, sin, None)
            handle.remove()
            for name in names:
                quantize(f"model.layers.{number}.{name}", hessian)
        for i, stream in enumerate(streams):
            streams[i] = layer(stream, cos, sin, None)
    quantize("lm_head", sum((gram(decoder.norm(stream)) for stream in streams), torch.zeros(())))
    return done


# -------------------------------------------------------------------------------------------------------------- folders
def write_in_parts(folder: Path, tensors: Iterable[tuple[str, Tensor]], part_bytes: int) -> None:
    """Write safetensors files of about `part_bytes` and the index that names them, so that memory need not hold all."""
    part: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        danube3.write_tensors(folder, name, part, None)
        weight_map.update(dict.fromkeys(part, name))
        part.clear()

    for name, tensor in tensors:
        part[name], total = tensor.contiguous(), total + tensor.nbytes
        if sum(each.nbytes for each in part.values()) >= part_bytes:
            flush()
    if part:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def quantize_folder(source: Path, out: Path, bits: int, done: dict[str, tuple[Tensor, Tensor]],
                    part_bytes: int = 2 ** 29) -> list[tuple[str, int, int, float, float]]:
    """Quantize a checkpoint into the folder `out`, tensor by tensor, so that memory never holds the whole: `done` are
    those that gptq_model has quantized, the others are rounded to nearest. -> for each: name, bits, bytes, largest and
    mean error"""
    scheme = danube3.SCHEMES["int4 GPTQ" if done else f"int{bits}"]
    danube3.verify_digests(source)
    config, report = danube3.read_config(source), []
    if danube3.read_scheme(source):
        raise DanubeError(f"{source} is quantized already: quantize the folder that it was made from")
    if source.resolve() == out.with_name(f"{out.name}.partial").resolve():
        raise DanubeError(f"{out} would be written in {source} first: choose another place")
    tokenizer, needed = danube3.read_tokenizer(source, config), danube3.count_parameters(config) * (bits + 1) / 8
    existing = next(parent for parent in [*out.absolute().parents, Path()] if parent.exists())
    with torch.device("meta"):
        model = Danube3(config)
    if (space := shutil.disk_usage(existing).free) < needed:
        raise DanubeError(f"{out} needs {needed / 1e9:.2f} GB, and {space / 1e9:.2f} are free: make room on the disk")

    def quantized() -> Iterator[tuple[str, Tensor]]:
        for name, weight in danube3.checked_weights(source, model):
            check_quantizable(name, weight)
            module = name.removesuffix(".weight")
            if not (tensor_bits := danube3.bits_of(module, scheme)):
                yield name, weight.float()
                continue
            codes, scales = done.get(module) or danube3.quantize_tensor(weight, tensor_bits)
            error = (danube3.dequantize(codes, scales) - weight.float()).abs()
            report.append((module, tensor_bits, codes.nbytes + scales.nbytes, error.amax().item(), error.mean().item()))
            yield f"{module}.codes", codes
            yield f"{module}.scales", scales

    with danube3.atomic_folder(out) as partial:
        how = {"quant_method": "danube3", "bits": scheme, "group_size": danube3.GROUP}
        danube3.write_config(partial, config, tokenizer, torch.float32, quantization_config=how)
        write_in_parts(partial, quantized(), part_bytes)
    return report


# ----------------------------------------------------------------------------------------------------------- GGUF files
# A GGUF file holds the same model for llama.cpp and the programs built on it, on phones too. What differs: the names;
# the rows of q and k, in the order of a rotary embedding that pairs neighbours (2i, 2i+1) where ours pairs halves; and
# that Q8_0 stores a scale for every 32 weights: here its row's scale, repeated.

def rows_for_gguf(name: str, tensor: Tensor, config: DanubeConfig) -> Tensor:
    """The rows of q_proj and k_proj as GGUF orders them: of each head 0, h/2, 1, h/2 + 1, ... Others as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.unflatten(0, (heads, 2, config.head_dim // 2))  # [heads, 2, h/2, ..]
    return halves.transpose(1, 2).flatten(0, 2)                     # [heads h, ..]


def gguf_blocks(codes: Tensor, scales: Tensor) -> np.ndarray:
    """Codes and scales of a matrix as blocks of 32 weights, each a scale in fp16 and its codes -> bytes [N, ..]"""
    size = danube3.GROUP if codes.dtype == torch.int8 else danube3.GROUP // 2  # bytes of its codes
    blocks = codes.view(torch.uint8).unflatten(1, (-1, size))
    scales = scales[:, None].expand(blocks.shape[:2]) if codes.dtype == torch.int8 else scales  # [N, K/32]
    return torch.cat((scales.contiguous().view(torch.uint8).unflatten(1, (-1, 2)), blocks), dim=2).flatten(1).numpy()


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
                         ("model.layers", "blk"), ("self_attn.o_proj", "attn_output"), ("self_attn", "attn"),
                         ("mlp", "ffn"), ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
                         ("attn.", "attn_"), ("ffn.", "ffn_"), ("_proj", "")):
        name = name.replace(ours, theirs)
    return name


def gguf_tensors(source: Path, config: DanubeConfig) -> Iterator[tuple[str, np.ndarray, str]]:
    """The tensors of a checkpoint one by one, as a GGUF file holds them: name, values or blocks, type"""
    codes, scheme = {}, danube3.read_scheme(source)
    with torch.device("meta"):
        model = danube3.use_scheme(Danube3(config), scheme or {})
    for name, tensor in danube3.checked_weights(source, model):
        module, _, kind = name.rpartition(".")
        matrix = kind == "weight" and tensor.dim() == 2
        tensor = rows_for_gguf(name, tensor.half() if matrix else tensor, config)
        if tensor.is_floating_point() and not danube3.is_finite(tensor):
            raise DanubeError(f"{source}: {name} holds values that are not finite, or not in fp16: take an earlier "
                              "checkpoint")
        if kind == "codes":  # stored just before its scales
            codes[module] = tensor
        elif kind == "scales":
            blocks = gguf_blocks(codes.pop(module), tensor)
            yield gguf_name(f"{module}.weight"), blocks, "Q8_0" if tensor.dim() == 1 else "Q4_0"
        elif tensor.dim() == 1:
            yield gguf_name(name), tensor.float().numpy(), "F32"
        else:
            yield gguf_name(name), tensor.numpy(), "F16"


def describe_for_gguf(writer: Any, config: DanubeConfig, tokenizer: Tokenizer, scheme: dict[str, int] | None) -> None:
    """The sizes of the model and the pieces of its tokenizer, under GGUF's keys. `writer` is a gguf.GGUFWriter."""
    c, pieces = config, tokenizer.pieces
    writer.add_quantization_version(2)
    writer.add_file_type(1 if scheme is None else 7 if scheme["model.layers"] == 8 else 2)  # F16, Q8_0, Q4_0
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
    unused = range(pieces.vocab_size(), c.vocab_size)  # a model's vocabulary may be padded
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
             for i in range(pieces.vocab_size())]  # unknown, control, byte, normal
    writer.add_tokenizer_model("llama")
    ids = range(pieces.vocab_size())
    writer.add_token_list([pieces.id_to_piece(i) for i in ids] + [f"<unused{i}>" for i in unused])
    writer.add_token_scores([pieces.get_score(i) for i in ids] + [0.0 for _ in unused])
    writer.add_token_types(kinds + [5 for _ in unused])
    writer.add_bos_token_id(c.bos_token_id)
    writer.add_eos_token_id(c.eos_token_id)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(c.pad_token_id)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(danube3.CHAT_TEMPLATE)


def write_gguf(source: Path, path: Path) -> None:
    """Write a checkpoint as a GGUF file: Q8_0 and Q4_0 as it is quantized, F16 if it is not. Tensors are read twice,
    since the file begins with the list of them, and memory never holds the whole."""
    try:
        import gguf
    except ImportError as error:
        raise DanubeError("writing GGUF takes the package gguf: pip install gguf") from error
    if path.is_dir() or not path.parent.is_dir():
        raise DanubeError(f"{path} is a folder, or lies in none that exists: name a file")
    danube3.verify_digests(source)
    config, partial = danube3.read_config(source), path.with_name(f"{path.name}.partial")
    writer: Any = gguf.GGUFWriter(partial, "llama")
    describe_for_gguf(writer, config, danube3.read_tokenizer(source, config), danube3.read_scheme(source))
    for name, values, kind in gguf_tensors(source, config):
        raw_dtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, raw_dtype=raw_dtype)
    partial.touch()
    with danube3.locked(partial):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            tensors = tqdm(gguf_tensors(source, config), "GGUF", len(writer.tensors[0]), unit="tensor")
            for _, values, _ in tensors:  # not by write_tensor_data: numpy's tofile says nothing when the disk is full
                file = writer.fout[0]
                writer.write_padding(file, file.tell())
                file.write(values.tobytes())
                writer.write_padding(file, values.nbytes)
            writer.close()
            danube3.sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- the report
def stored_tensors(model: Danube3) -> Iterator[tuple[str, Tensor]]:
    """All that a model holds, packed or not."""
    for name, module in model.named_modules():
        own = getattr(module, "packed", None) or [*module.parameters(False), *module.buffers(False)]
        yield from ((name, tensor) for tensor in own)


@torch.no_grad()
def measure_decoding(model: Danube3, tokens: int = 64) -> tuple[float, float]:
    """Tokens a second, one at a time after a prompt of 8, and the bytes of weights read for them a second; the best of
    three times."""
    next_ids, best = torch.full((1, 8), model.config.bos_token_id, device=model.device), math.inf
    for _ in range(3):
        kv_cache = danube3.KVCache(model.config, 1, 8 + tokens, model.dtype, model.device)
        model.model(next_ids.expand(1, 8), kv_cache)
        start = time.perf_counter()
        for _ in range(tokens):
            next_ids = model.lm_head(model.model(next_ids[:, -1:], kv_cache)[:, -1]).argmax(-1, keepdim=True)  # [1, 1]
        next_ids.item()  # waits for the device
        best = min(best, (time.perf_counter() - start) / tokens)
    return 1 / best, sum(t.nbytes for name, t in stored_tensors(model) if "embed_tokens" not in name) / best


def compare(folders: dict[str, Path], data: str) -> None:
    """A table like the model cards' for Q8_0 and Q4_K_M, of this model and this text; `change` is against the first
    row."""
    print(f"\n{'':8}{'bytes':>16}{'bits/weight':>13}{'perplexity':>12}{'change':>9}{'tokens/s':>10}{'GB/s':>7}  quiz")
    first = None
    for name, folder in folders.items():
        model, tokenizer = danube3.load_checkpoint(folder, dtype=torch.bfloat16 if name == "bf16" else None)
        size = sum(tensor.nbytes for _, tensor in stored_tensors(model))
        rows = sample_rows(data, tokenizer, model.config, "val", 256)
        quiz = Path(data, "quiz.jsonl")
        fast = model if name == "bf16" else danube3.load_checkpoint(folder, pack=True)[0]
        speed, bandwidth = measure_decoding(fast)
        perplexity = math.exp(danube3.mean_loss(model.float(), rows, rows, 8))
        first = first or perplexity
        score = f"{sample.evaluate(model, tokenizer, quiz)['acc']:.1%}" if quiz.is_file() else "-"
        print(f"{name:8}{size:>16,}{8 * size / danube3.count_parameters(model.config):>13.2f}{perplexity:>12.4f}"
              f"{perplexity / first - 1:>9.2%}{speed:>10.1f}{bandwidth / 1e9:>7.2f}  {score}")


# ---------------------------------------------------------------------------------------------------------- the program
def arguments() -> argparse.Namespace:
    parser = danube3.Arguments(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint folder, a run folder, or a published Danube3 folder")
    parser.add_argument("--bits", type=int, choices=[8, 4], help="8: a scale for each row; 4: one for every 32 weights")
    parser.add_argument("--out", type=Path, help="the folder to write")
    parser.add_argument("--calibrate", metavar="DATA", help="token shards or a text file: use GPTQ (with --bits 4)")
    parser.add_argument("--samples", type=danube3.positive, help="about so many rows of DATA to calibrate with [512]")
    parser.add_argument("--report", metavar="DATA", help="compare bf16, int8 and int4 on the validation part of DATA")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="write the checkpoint as a GGUF file for llama.cpp")
    parser.add_argument("--device", help="where GPTQ runs: auto, cpu, cuda, cuda:1, mps [auto]")
    args = parser.parse_args()
    if bool(args.gguf) == bool(args.bits) or bool(args.bits) != bool(args.out):
        parser.error("give --bits and --out to quantize, or --gguf to write a GGUF file")
    if (args.calibrate or args.report) and args.gguf or args.calibrate and args.bits == 8:
        parser.error("--calibrate goes with --bits 4, and --report with --bits")
    if (args.samples or args.device) and not args.calibrate:
        parser.error("--samples and --device are for --calibrate")
    return args


def check(source: Path, args: argparse.Namespace) -> None:
    """Refuse what could not end well, before hours of work."""
    if (source / "adapter_config.json").is_file():
        raise DanubeError(f"{source} holds adapters: make one model of them and their base, with train.py "
                          "--merge, and take that")
    if args.out and args.out.exists():
        raise DanubeError(f"{args.out} already exists: remove it first, or choose another --out")
    if args.out and danube3.read_scheme(source):
        raise DanubeError(f"{source} is quantized already: quantize the folder that it was made from")
    if args.report:
        config = danube3.read_config(source)
        sample_rows(args.report, danube3.read_tokenizer(source, config), config, "val", 1)  # can it be read?


def quantize(source: Path, out: Path, bits: int,
             args: argparse.Namespace) -> list[tuple[str, int, int, float, float]]:
    """-> the lines of the table of errors"""
    done = {}
    if args.calibrate and bits == 4:
        model, tokenizer = danube3.load_checkpoint(source, danube3.pick_device(args.device or "auto"), torch.float32)
        rows = sample_rows(args.calibrate, tokenizer, model.config, "train", args.samples or 512)
        done = gptq_model(model, rows)
    return quantize_folder(source, out, bits, done)


def main() -> None:
    args = arguments()
    source = danube3.find_checkpoint(args.checkpoint)
    check(source, args)
    if args.gguf:
        write_gguf(source, args.gguf)
        print(f"{args.gguf}: {args.gguf.stat().st_size:,} bytes")
        return
    lines = quantize(source, args.out, args.bits, args)
    # Errors of the weights. GPTQ makes those larger, to make the errors of the outputs smaller.
    print(f"{'tensor':40}{'bits':>5}{'bytes':>14}{'largest error':>15}{'mean error':>12}")
    for name, bits, size, largest, mean in lines:
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
    danube3.run_command(main)
