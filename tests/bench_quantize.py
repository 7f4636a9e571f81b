"""What 8 and 4 bits cost: `python tests/bench_quantize.py` trains on real text and compares with llama.cpp.

The text is the Python sources of this machine's own standard library. The model's sizes are multiples of 256, as
llama.cpp's Q4_K requires. Everything is measured on the same held-out sequences: our folders by our own evaluation,
GGUF files by llama.cpp (`pip install llama-cpp-python`), which also makes Q4_0 and Q4_K_M from our F16 file. Training
takes about five minutes on two cores; the folder --out is used again.
"""

import argparse
import ctypes
import dataclasses
import json
import math
import random
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import danube3  # noqa: E402
import quantize  # noqa: E402
import train  # noqa: E402
from data import toy  # noqa: E402
from data.read import TokenData, token_count  # noqa: E402

CONFIG = danube3.DanubeConfig(
    hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
    head_dim=32, initializer_range=0.03, vocab_size=1024, max_position_embeddings=512,
)  # fmt: skip


def trained(out, tokens):
    """-> the checkpoint of a finished run, and the data folder beside it"""
    data_folder = out / "data"
    if not data_folder.exists():
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
        random.Random(0).shuffle(texts)
        with danube3.atomic_folder(data_folder) as folder:
            tokenizer = toy.train_tokenizer(texts, CONFIG.vocab_size, folder / "tokenizer.model")
            ids = [tokenizer.encode(text) for text in texts]
            parts = {"train": ids[len(ids) // 10 :], "val": ids[: len(ids) // 10]}
            counts = {"web": {split: toy.write_shards(folder, "web", split, part) for split, part in parts.items()}}
            meta = {"sources": counts, "vocab_size": CONFIG.vocab_size, "tokenizer_sha256": tokenizer.sha256}
            (folder / "meta.json").write_text(json.dumps(meta))
    stages = (danube3.Stage("all", tokens, {"web": 1}),)
    training = dataclasses.replace(
        danube3.TRAIN_CONFIGS["toy"], stages=stages, sequence_length=256, batch_size=8, micro_batch_size=8,
        learning_rate=2e-3,
    )  # fmt: skip
    if not danube3.checkpoints_in(out / "run"):
        data = danube3.StagedData(TokenData(data_folder, CONFIG, 256), training)
        run = danube3.Trainer(out / "run", danube3.Danube3.new(CONFIG, seed=0), data.data.tokenizer, data)
        danube3.train(run, train.measure_matmul_peak(run.device))
    return danube3.find_checkpoint(out / "run"), data_folder


def llama_cpp_perplexity(path, sequences):
    """exp of the mean loss over all but the first token of each sequence, as ours."""
    import llama_cpp

    llama = llama_cpp.Llama(str(path), n_ctx=sequences.shape[1], logits_all=True, verbose=False, n_threads=2)
    total = count = 0
    for ids in sequences.tolist():
        llama.reset()
        llama.eval(ids)
        logits = torch.from_numpy(np.array(llama.scores[: len(ids)]))
        total += danube3.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()
        count += len(ids) - 1
    return math.exp(total / count)


def llama_cpp_greedy(path, ids, count):
    import llama_cpp

    llama = llama_cpp.Llama(str(path), n_ctx=512, verbose=False, n_threads=2)
    tokens = []
    for token in llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == count:
            return tokens


def llama_cpp_quantize(source, out, file_type):
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench-quantize"))
    parser.add_argument("--tokens", type=token_count, default=2_500_000)
    parser.add_argument("--samples", type=int, default=1024, help="sequences to calibrate GPTQ with")
    parser.add_argument("--sequences", type=int, default=200, help="sequences to measure with")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source, data = trained(args.out, args.tokens)
    model, tokenizer = danube3.load_checkpoint(source)
    calibration = quantize.sample_sequences(data, tokenizer, CONFIG, "train", args.samples)
    sequences = quantize.sample_sequences(data, tokenizer, CONFIG, "val", args.sequences)
    base = math.exp(danube3.evaluate_loss(model, sequences, sequences, 8))
    print(f"{danube3.count_parameters(CONFIG):,} parameters, {sequences.numel():,} tokens; fp32 perplexity {base:.4f}")

    done = quantize.gptq_model(danube3.load_checkpoint(source)[0], calibration)
    for name, (bits, found) in {"int8": (8, {}), "int4": (4, {}), "int4 GPTQ": (4, done)}.items():
        folder = args.out / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        quantize.quantize_folder(source, folder, bits, found)
        quantized, _ = danube3.load_checkpoint(folder)
        size = sum(tensor.nbytes for _, tensor in quantize.stored_tensors(quantized))
        perplexity = math.exp(danube3.evaluate_loss(quantized, sequences, sequences, 8))
        print(f"ours       {name:28}{size:>12,} bytes  perplexity {perplexity:9.4f}  {perplexity / base - 1:+.3%}")
    for embedding, head in ((8, 8), (8, "GPTQ"), (4, 8), (4, "GPTQ"), (8, 4), (4, 4)):
        mixed, _ = danube3.load_checkpoint(source)
        how = {"model.embed_tokens": embedding, "lm_head": head}
        for name, module in mixed.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                bits = how.get(name, "GPTQ")
                if bits == "GPTQ":
                    codes, scales = done[name]
                elif bits == 8:
                    codes, scales = danube3.quantize_int8(module.weight)
                else:
                    codes, scales = danube3.quantize_int4(module.weight)
                    codes = danube3.pack_int4(codes)
                module.weight.data.copy_(danube3.dequantize(codes, scales))
        change = math.exp(danube3.evaluate_loss(mixed, sequences, sequences, 8)) / base - 1
        print(f"layers by GPTQ; embedding rounded to {embedding} bits, head {head}: {change:+.3%}")
    prompt = sequences[0, :16].tolist()
    for name, folder in (("f16", source), ("q8_0", args.out / "int8"), ("q4_0", args.out / "int4-GPTQ")):
        path = args.out / f"ours-{name}.gguf"
        quantize.write_gguf(folder, path)
        perplexity = llama_cpp_perplexity(path, sequences)
        ours, _ = danube3.load_checkpoint(folder, dtype=torch.float32)
        mine = math.exp(danube3.evaluate_loss(ours, sequences, sequences, 8))
        greedy = danube3.generate(ours, torch.tensor([prompt]), 32)[0, 16:].tolist()
        same = sum(a == b for a, b in zip(greedy, llama_cpp_greedy(path, prompt, 32), strict=False))
        print(
            f"llama.cpp  our {name:24}{path.stat().st_size:>12,} bytes  perplexity {perplexity:9.4f}  "
            f"{perplexity / base - 1:+.3%}; ours of the same folder {mine:.4f}; {same} of 32 greedy tokens the same"
        )
    for name, file_type in (("Q8_0", 7), ("Q4_0", 2), ("Q4_K_M", 15)):
        path = args.out / f"theirs-{name}.gguf"
        llama_cpp_quantize(args.out / "ours-f16.gguf", path, file_type)
        perplexity = llama_cpp_perplexity(path, sequences)
        print(
            f"llama.cpp  its own {name:20}{path.stat().st_size:>12,} bytes  perplexity {perplexity:9.4f}  "
            f"{perplexity / base - 1:+.3%}"
        )


if __name__ == "__main__":
    main()
