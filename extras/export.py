"""A checkpoint in other forms: as a quantized folder, and as a GGUF file for llama.cpp and the programs built on it.
The arithmetic of both is section 12 of danube3.py; here they are written."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import danube3
from danube3 import Danube3, DanubeConfig, DanubeError, Tokenizer


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
            danube3.check_quantizable(name, weight)
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
        tensor = danube3.rows_for_gguf(name, tensor.half() if matrix else tensor, config)
        if tensor.is_floating_point() and not danube3.is_finite(tensor):
            raise DanubeError(f"{source}: {name} holds values that are not finite, or not in fp16: take an earlier "
                              "checkpoint")
        if kind == "codes":  # stored just before its scales
            codes[module] = tensor
        elif kind == "scales":
            blocks = danube3.gguf_blocks(codes.pop(module), tensor)
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
