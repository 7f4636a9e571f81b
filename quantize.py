"""Quantize a Danube3: `python quantize.py out/toy-chat --bits 4 --out out/toy-chat-int4`."""

import argparse
import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import danube3
import sample
from danube3 import GROUP, Danube3, DanubeConfig, DanubeError, Tokenizer, reading, require
from data import cli
from data.read import TokenData, read_text

Codes = dict[str, tuple[Tensor, Tensor]]  # codes and scales of linear layers, by name
LinearInputs = list[tuple[list[str], Callable[[Tensor], Tensor]]]
Row = tuple[str, int, int, float, float]  # name, bits, bytes, largest and mean |quantized weight - weight|

# ---- Text to calibrate and to measure with

def sample_sequences(data: str | Path, tokenizer: Tokenizer, config: DanubeConfig, split: str,
                     count: int) -> Tensor:
    """About `count` sequences [N, T] to calibrate ("train") or measure ("val") with.

    They come evenly from all sources of a data folder, or from a text file, whose last tenth is "val". T is
    half of the context, at most 2,048 [ours]."""
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

# ---- Calibration of a whole model

def check_quantizable(name: str, weight: Tensor) -> None:
    """Refuse what codes and scales cannot hold."""
    require(danube3.is_finite(weight), f"{name} is not finite: take an earlier checkpoint")
    require(weight.dim() == 1 or weight.shape[-1] % GROUP == 0,
            f"{name} has {weight.shape[-1]} inputs, no multiple of {GROUP}: such a model cannot be quantized")
    largest = weight.abs().amax().item()  # its scale, largest / 8 or / 127, must fit into fp16
    require(largest <= 2**18, f"{name} holds {largest:.3g}, too large for fp16: take an earlier checkpoint")

def linears_and_inputs(layer: danube3.DecoderLayer, table: tuple[Tensor, Tensor]) -> LinearInputs:
    """The linear layers in the order of the forward pass, and what they read, given the layer's x [B, T, D].

    Nearly all queries read the keys and values of a few tokens, above all of the first. Errors there cost
    most, but a plain Hessian counts each token once. So k_proj and v_proj count a token as often as it is
    attended to [ours; arXiv 2406.13474 derives a finer weighting]."""
    attention, mlp = layer.self_attn, layer.mlp

    def weighted_by_attention(x: Tensor) -> Tensor:
        x = layer.input_layernorm(x)
        q, k, _ = attention.heads(x, *table)
        identity = torch.eye(x.shape[1], device=x.device).expand(len(x), k.shape[1], -1, -1)  # [B, K, T, T]
        weights = danube3.grouped_query_attention(q, k, identity)  # the attention weights [B, H, T, T]
        return x * weights.sum((1, 2)).sqrt()[..., None]

    def mixed_values(x: Tensor) -> Tensor:
        q, k, v = attention.heads(layer.input_layernorm(x), *table)
        return danube3.grouped_query_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, T, H h]

    def mlp_inputs(x: Tensor) -> Tensor:
        return layer.post_attention_layernorm(x + attention(layer.input_layernorm(x), *table, None))

    def mlp_features(x: Tensor) -> Tensor:
        x = mlp_inputs(x)
        return danube3.swiglu(mlp.gate_proj(x), mlp.up_proj(x))  # [B, T, I]

    return [(["self_attn.q_proj"], layer.input_layernorm),
            (["self_attn.k_proj", "self_attn.v_proj"], weighted_by_attention),
            (["self_attn.o_proj"], mixed_values),
            (["mlp.gate_proj", "mlp.up_proj"], mlp_inputs),
            (["mlp.down_proj"], mlp_features)]

@torch.no_grad()
def calibrate_model(model: Danube3, sequences: Tensor, bits: dict[str, int],
                    device: str | torch.device = "cpu") -> Codes:
    """Quantize linear layers and head with calibration sequences [N, T]. -> name: (codes, scales)

    `bits` is a layout. The model is overwritten with quantized values. A layer is calibrated on outputs of
    the quantized layers before, so it makes up for their errors too. One layer is on `device` at a time."""
    decoder, done = model.model, Codes()
    for name, weight in model.named_parameters():
        check_quantizable(name, weight)

    def quantize(names: list[str], inputs: Callable[[Tensor], Tensor]) -> None:
        hessian: Any = 0  # the sum of x x^T over all inputs x, fp32 [in, in]
        for x in hidden:
            rows = inputs(x.to(device)).flatten(0, -2)  # [B T, in]
            hessian = hessian + rows.T @ rows
        require(hessian.isfinite().all(), f"the inputs of {names} overflow on this data: omit --calibrate")
        for name in names:
            weight = model.get_parameter(f"{name}.weight")
            codes, scales = danube3.calibrate(weight, hessian, bits[name])
            weight.copy_(danube3.dequantize(danube3.pack(codes, bits[name]), scales))
            done[name] = codes.cpu(), scales.cpu()

    positions = torch.arange(sequences.shape[1], device=device)  # [T]
    table = danube3.rotary_table(positions, model.config.head_dim, model.config.rope_theta)
    decoder.embed_tokens.weight.copy_(decoder.embed_tokens.weight.bfloat16())  # as it will be stored
    hidden = [decoder.embed_tokens(ids).float() for ids in sequences.split(1)]  # [B, T, D]
    for number, layer in enumerate(tqdm(decoder.layers, desc="calibrating", unit="layer")):
        layer.to(device, torch.float32)
        for names, inputs in linears_and_inputs(layer, table):
            quantize([f"model.layers.{number}.{name}" for name in names], inputs)
        for i, x in enumerate(hidden):  # in place: together 16 GB for 4b and 512 sequences
            hidden[i] = layer(x.to(device), *table, None).cpu()
        layer.to("cpu", decoder.embed_tokens.weight.dtype)
    torch.nn.ModuleList((decoder.norm, model.lm_head)).to(device, torch.float32)
    quantize(["lm_head"], decoder.norm)
    model.to("cpu", decoder.embed_tokens.weight.dtype)
    return done

# ---- Quantized folders, in the format "pack-quantized" of the package compressed-tensors

def layout(config: DanubeConfig, bits: int) -> dict[str, int]:
    """The bits of each linear layer and of the head [ours; tests/README.md says what was tried].

    At 4 bits, the first and the last decoder layer (of 8 or more) keep 8 bits: errors cost most there. Layers
    that vLLM fuses (q, k and v; gate and up) have the same bits."""
    last = config.num_hidden_layers - 1
    ends = ("model.layers.0.", f"model.layers.{last}.") if last >= 7 else ()
    table = {**dict.fromkeys(danube3.decoder_linears(Danube3.new(config, 0, "meta")), bits), "lm_head": 8}
    return table | {name: 8 for name in table if name.startswith(ends)}

def quantization_config(bits: dict[str, int]) -> dict[str, object]:
    """What config.json says of the quantized layers: for each width its layers and how to read them."""
    groups = {}
    for width in sorted(set(bits.values())):
        how = {"num_bits": width, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group",
               "group_size": GROUP}
        groups[f"int{width}"] = {"targets": [name for name in bits if bits[name] == width], "weights": how}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [],
            "quantization_status": "compressed", "config_groups": groups}

def checked_weights(folder: Path, model: Danube3) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder one by one, if all names and shapes are the model's. What was read from a
    mapped file counts as memory until the file is closed, so files are opened anew now and then."""
    weights, expected, read = danube3.read_weights(folder), model.state_dict(), 0
    for name, weight in weights.items():
        require(name in expected and expected[name].shape == weight.shape,
                f"{folder}: {name} {tuple(weight.shape)} does not fit config.json: copy both files again")
    missing = sorted(expected.keys() - weights.keys())
    require(not missing, f"{folder} lacks {missing[:1]}: copy it again")
    for name in list(weights):
        if read > 2**30:
            weights, read = danube3.read_weights(folder), 0
        read += weights[name].nbytes
        yield name, weights[name]

def write_in_parts(folder: Path, tensors: Iterable[tuple[str, Tensor]], part_bytes: int) -> None:
    """Write safetensors files of about `part_bytes` and their index. Memory never holds all tensors."""
    part: danube3.Tensors = {}
    weight_map: dict[str, str] = {}
    total, number = 0, 1
    for name, tensor in tensors:
        if sum(each.nbytes for each in part.values()) >= part_bytes:
            danube3.write_tensors(folder / f"model-{number:05d}.safetensors", part)
            part, number = {}, number + 1
        part[name], weight_map[name] = tensor, f"model-{number:05d}.safetensors"
        total += tensor.nbytes
    danube3.write_tensors(folder / f"model-{number:05d}.safetensors", part)
    danube3.write_json(folder / "model.safetensors.index.json",
                       {"metadata": {"total_size": total}, "weight_map": weight_map})

def empty_model(source: Path) -> Danube3:
    """The model of a folder without its weights: shapes on the meta device."""
    config = danube3.read_config(source)
    with torch.device("meta"), reading(source):
        model = danube3.use_quantized_modules(Danube3(config), danube3.read_weights(source))
    model.stop_ids = danube3.read_stop_ids(source, config)
    model.task = danube3.read_json(source / "task.json")
    return model

def quantize_folder(source: Path, out: Path, bits: dict[str, int], done: Codes,
                    part_bytes: int = 2**29) -> list[Row]:
    """Quantize a checkpoint into the folder `out`, tensor by tensor. -> a row for each

    `bits` is a layout. What is not in `done`, from calibrate_model, is rounded to nearest. The embedding
    stays as it is, in bf16, because other programs cannot look up packed rows."""
    danube3.verify_checksums(source)
    require(source.resolve() != out.with_name(f"{out.name}.partial").resolve(),
            f"{out} would be written in {source} first: choose another place")
    model, report = empty_model(source), []
    tokenizer = danube3.read_tokenizer(source, model.config)
    needed = danube3.count_parameters(model.config) * (max(bits.values()) + 1) / 8

    def quantized() -> Iterator[tuple[str, Tensor]]:
        for name, weight in checked_weights(source, model):
            check_quantizable(name, weight)
            module = name.removesuffix(".weight")
            if module not in bits:
                yield name, weight.float() if weight.dim() == 1 else weight.bfloat16()
                continue
            codes, scales = done.get(module) or danube3.round_to_nearest(weight, bits[module])
            packed = danube3.pack(codes, bits[module])
            error = (danube3.dequantize(packed, scales) - weight.float()).abs()
            size = packed.nbytes + scales.nbytes
            report.append((module, bits[module], size, error.amax().item(), error.mean().item()))
            yield f"{module}.weight_packed", packed.view(torch.int32)
            yield f"{module}.weight_scale", scales
            yield f"{module}.weight_shape", torch.tensor(weight.shape)

    with danube3.atomic_folder(out) as partial:
        free = shutil.disk_usage(partial).free
        require(free >= needed, f"{out} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} are free: make room")
        how = quantization_config(bits)
        danube3.write_settings(partial, model, tokenizer, torch.float16, quantization_config=how)
        write_in_parts(partial, quantized(), part_bytes)
    return report

# ---- GGUF files, for llama.cpp and the programs built on it
#
# GGUF has other names, and the rows of q and k in the order of an interleaved rotary embedding: pairs are
# neighbours (2i, 2i+1) where ours are halves. Q8_0 and Q4_0 hold our codes and scales in another order.

def interleave_heads(name: str, tensor: Tensor, config: DanubeConfig) -> Tensor:
    """The rows of q_proj and k_proj in GGUF's order: of each head 0, h/2, 1, h/2 + 1, .. Others unchanged."""
    all_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads = all_heads.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.unflatten(0, (heads, 2, config.head_dim // 2))  # [heads, 2, h/2, ..]
    return halves.transpose(1, 2).flatten(0, 2)                     # [heads h, ..]

def gguf_blocks(packed: Tensor, scales: Tensor) -> np.ndarray:
    """A matrix as blocks of 32 weights: an fp16 scale, and codes as signed bytes or as halves of bytes.
    uint8 [out, in bits/8], fp16 [out, in/32] -> bytes [out, ..]"""
    bits = 8 * packed.shape[1] // (GROUP * scales.shape[1])
    codes = danube3.unpack(packed, bits).unflatten(1, (-1, GROUP))  # [out, in/32, 32]
    scales = torch.where((codes == 2 ** (bits - 1)).all(2), 0.0, scales)  # GGUF's scale of a group of zeros
    if bits == 8:
        codes = codes ^ 128  # code - 128, as a signed byte
    else:  # byte j: code j and code j + 16
        codes = codes[..., :16] | codes[..., 16:] << 4
    scale_bytes = scales[..., None].view(torch.uint8)  # [out, in/32, 2]
    return torch.cat((scale_bytes, codes), dim=2).flatten(1).numpy()

def smallest_bits(model: Danube3) -> int:
    """4 or 8; 16 if nothing is quantized"""
    return min(getattr(linear, "bits", 16) for linear in danube3.decoder_linears(model).values())

def gguf_tensors(source: Path, names: Any) -> Iterator[tuple[str, np.ndarray, str]]:
    """Each tensor of a checkpoint: GGUF name, values or blocks, type. `names` is a gguf.TensorNameMap."""
    model, parts = empty_model(source), defaultdict[str, dict[str, Tensor]](dict)
    bits = smallest_bits(model)
    for name, tensor in checked_weights(source, model):
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            tensor = tensor.float() if tensor.dim() == 1 else tensor.half()
        finite = danube3.is_finite(tensor)
        require(finite, f"{source}: {name} is not finite in fp16: take an earlier checkpoint")
        parts[module][kind] = interleave_heads(name, tensor, model.config)
        if module == "model.embed_tokens" and bits < 16:  # llama.cpp can look up packed rows
            codes, scales = danube3.quantize_int8(tensor) if bits == 8 else danube3.quantize_int4(tensor)
            parts[module] = {"weight_packed": danube3.pack(codes, bits), "weight_scale": scales}
        gguf_name = f"{names.get_name(module)}.weight"
        if len(parts[module]) == 2:  # codes and scales
            packed, scales = parts[module]["weight_packed"], parts.pop(module)["weight_scale"]
            width = 8 * packed.shape[1] // (GROUP * scales.shape[1])
            yield gguf_name, gguf_blocks(packed, scales), f"Q{width}_0"
        elif kind == "weight":
            values = parts.pop(module)["weight"].numpy()
            yield gguf_name, values, "F32" if values.ndim == 1 else "F16"

def describe_for_gguf(writer: Any, model: Danube3, tokenizer: Tokenizer) -> None:
    """The sizes of the model and the pieces of its tokenizer. `writer` is a gguf.GGUFWriter."""
    require(len({*model.stop_ids, model.config.eos_token_id}) < 3, "GGUF cannot hold three stop tokens")
    c, sp = model.config, tokenizer.sp
    writer.add_quantization_version(2)
    writer.add_file_type({16: 1, 8: 7, 4: 2}[smallest_bits(model)])  # F16, Q8_0, Q4_0
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
    # The type "llama" is BPE, whose scores are whole numbers, and has no normalization.
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
    """Write a checkpoint as a GGUF file: Q8_0 or Q4_0 as it is quantized, otherwise F16. Tensors are read
    twice: the file begins with their list, and memory never holds all of them."""
    try:
        import gguf
    except ImportError as error:
        raise DanubeError("writing GGUF needs the package gguf: pip install gguf") from error
    usable = path.parent.is_dir() and not path.is_dir()
    require(usable, f"{path} is a folder, or lies in none that exists: name a file")
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
            for _, values, _ in tqdm(gguf_tensors(source, names), "GGUF", len(writer.tensors[0])):
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

def compare(folders: dict[str, Path], data: str) -> None:
    """Print a table like that of the model cards. `change` is against the first line."""
    print(f"\n{'':8}{'bytes':>16}{'bits/weight':>13}{'perplexity':>12}{'change':>9}{'tokens/s':>10}"
          f"{'GB/s':>7}  quiz")
    first, quiz = None, Path(data, "quiz.jsonl")
    for name, folder in folders.items():
        model, tokenizer = danube3.load_checkpoint(folder, dtype=torch.bfloat16 if name == "bf16" else None)
        size = 2 * danube3.count_parameters(model.config)
        if name != "bf16":
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        sequences = sample_sequences(data, tokenizer, model.config, "val", 256)
        fast = model if name == "bf16" else danube3.load_checkpoint(folder, fast=True)[0]
        speed, bandwidth = sample.measure_decoding(fast)
        perplexity = math.exp(danube3.evaluate_loss(model.float(), sequences, sequences, 8))
        first = first or perplexity
        score = "-"
        if quiz.is_file():
            score = f"{sample.evaluate(model, tokenizer, quiz)['acc']:.1%}"
        bits = 8 * size / danube3.count_parameters(model.config)
        print(f"{name:8}{size:>16,}{bits:>13.2f}{perplexity:>12.4f}{perplexity / first - 1:>9.2%}"
              f"{speed:>10.1f}{bandwidth / 1e9:>7.2f}  {score}")

# ---- The program

def arguments() -> argparse.Namespace:
    parser = cli.Arguments(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, an output directory, or a published model")
    parser.add_argument("--bits", type=int, choices=[8, 4], help="bits of a weight")
    parser.add_argument("--out", type=Path, help="the folder to write")
    parser.add_argument("--calibrate", metavar="DATA", help="quantize with token shards or a text file")
    parser.add_argument("--samples", type=cli.positive, help="calibrate with about this many sequences [512]")
    parser.add_argument("--report", metavar="DATA", help="compare bf16, int8 and int4 on its validation part")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="write a GGUF file for llama.cpp")
    parser.add_argument("--device", help="where to calibrate: auto, cpu, cuda, cuda:1, mps [auto]")
    args = parser.parse_args()
    if bool(args.gguf) == bool(args.bits) or bool(args.bits) != bool(args.out):
        parser.error("give --bits and --out to quantize, or --gguf to write a GGUF file")
    if (args.calibrate or args.report) and args.gguf:
        parser.error("--calibrate and --report go with --bits")
    if (args.samples or args.device) and not args.calibrate:
        parser.error("--samples and --device are for --calibrate")
    return args

def check(source: Path, args: argparse.Namespace) -> None:
    """Refuse what could not end well, before hours of work."""
    require(not (source / "adapter_config.json").is_file(),
            f"{source} holds adapters: merge them into their base, with train.py --merge, and quantize that")
    require(not (args.out and args.out.exists()), f"{args.out} already exists: choose another --out")
    quantized = any(name.endswith(".weight_packed") for name in danube3.read_weights(source))
    require(not (args.out and quantized), f"{source} is quantized already: take what it was made from")
    if args.report:
        config = danube3.read_config(source)  # can the data be read?
        sample_sequences(args.report, danube3.read_tokenizer(source, config), config, "val", 1)

def quantize(source: Path, out: Path, bits: int, args: argparse.Namespace) -> list[Row]:
    done, own_bits = {}, layout(danube3.read_config(source), bits)
    if args.calibrate and bits == args.bits:  # not for the other lines of a report
        model, tokenizer = danube3.load_checkpoint(source)
        sequences = sample_sequences(args.calibrate, tokenizer, model.config, "train", args.samples or 512)
        done = calibrate_model(model, sequences, own_bits, cli.pick_device(args.device or "auto"))
    return quantize_folder(source, out, own_bits, done)

def main() -> None:
    args = arguments()
    source = danube3.find_checkpoint(args.checkpoint)
    check(source, args)
    if args.gguf:
        write_gguf(source, args.gguf)
        print(f"{args.gguf}: {args.gguf.stat().st_size:,} bytes")
        return
    # Calibration makes errors of weights larger, and errors of outputs smaller.
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
    cli.run_command(main)
