"""How fast is one token? `python tests/bench_decode.py` compares decoding with llama.cpp, with a random 500m.

Batch 1, alternating rounds of 32 tokens after a prompt of 8: our bf16, int8 and int4 folders, as they are and with
--compile, the GGUF files exported from them in llama.cpp (`pip install llama-cpp-python`), and transformers' `generate`
in bf16. Ratios are what counts.
The folders (2 GB) are made once, in --out.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

import danube3  # noqa: E402
import quantize  # noqa: E402
from data import cli  # noqa: E402

PROMPT, TOKENS = [1, 50, 60, 70, 80, 90, 100, 110], 32


def prepare(out, name):
    """Folders and files: bf16, int8, int4, q8_0.gguf, q4_0.gguf."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "bf16").exists():
        tokenizer = danube3.Tokenizer(ROOT / "data" / "toy" / "tokenizer.model")  # the other ids are unused
        model = danube3.Danube3.new(danube3.CONFIGS[name], seed=0)
        danube3.save_checkpoint(out / "bf16", model, tokenizer, dtype=torch.bfloat16)
    for bits in (8, 4):
        if not (out / f"int{bits}").exists():
            layout = dict.fromkeys(quantize.layout(danube3.CONFIGS[name], bits), bits)  # one type, as Q8_0 and Q4_0
            quantize.quantize_folder(out / "bf16", out / f"int{bits}", layout, {})
        if not (out / f"int{bits}.gguf").exists():
            quantize.write_gguf(out / f"int{bits}", out / f"int{bits}.gguf")


def ours(path, compiled):
    model, _ = danube3.load_checkpoint(path, fast=True)
    if compiled:
        cli.compile_decoding(model)

    def decode():
        steps = danube3.generate_tokens(model, torch.tensor([PROMPT]), TOKENS + 1, temperature=1.0, seed=0)
        next(steps)
        start = time.perf_counter()
        count = sum(1 for _ in steps)
        return count / (time.perf_counter() - start)

    return decode


def llama_cpp_decoder(path, threads):
    import llama_cpp

    llama = llama_cpp.Llama(str(path), n_ctx=256, n_threads=threads, verbose=False)

    def decode():
        llama.reset()
        steps = llama.generate(PROMPT, temp=1.0, top_k=0, top_p=1.0, repeat_penalty=1.0)
        next(steps)
        start = time.perf_counter()
        for _ in range(TOKENS):
            next(steps)
        return TOKENS / (time.perf_counter() - start)

    return decode


def transformers_decoder(path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

    def decode():
        times = []
        for tokens in (1, TOKENS + 1):
            start = time.perf_counter()
            model.generate(torch.tensor([PROMPT]), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
            times.append(time.perf_counter() - start)
        return TOKENS / (times[1] - times[0])

    return decode


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench-decode"))
    parser.add_argument("--config", default="500m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip", nargs="*", default=[], help="names not to run, such as transformers")
    args = parser.parse_args()
    prepare(args.out, args.config)
    threads = torch.get_num_threads()
    loops = {
        "llama.cpp Q8_0": lambda: llama_cpp_decoder(args.out / "int8.gguf", threads),
        "llama.cpp Q4_0": lambda: llama_cpp_decoder(args.out / "int4.gguf", threads),
        "transformers": lambda: transformers_decoder(args.out / "bf16"),
    }
    for kind in ("bf16", "int8", "int4"):
        loops[f"danube3 {kind}"] = lambda kind=kind: ours(args.out / kind, False)
        loops[f"danube3 {kind}, compiled"] = lambda kind=kind: ours(args.out / kind, True)
    loops = {name: make() for name, make in loops.items() if name.split()[0] not in args.skip}
    speeds = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for _ in range(args.rounds):
        for name, loop in loops.items():
            speeds[name].append(loop())
    print(f"{args.config}, batch 1, {threads} threads, {args.rounds} rounds: median tokens/s, and the median ratio")
    for name, values in speeds.items():
        rivals = ["transformers"] if name.startswith("danube3") else []
        rivals += ["llama.cpp Q8_0"] if name.startswith("danube3 int8") else []
        rivals += ["llama.cpp Q4_0"] if name.startswith("danube3 int4") else []
        ratios = ", ".join(
            f"{statistics.median(a / b for a, b in zip(values, speeds[other], strict=True)):.2f}x {other}"
            for other in rivals
            if other in speeds
        )
        print(f"{name:34}{statistics.median(values):8.1f}   {ratios}")


if __name__ == "__main__":
    main()
