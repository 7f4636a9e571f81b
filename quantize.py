"""Quantize a Danube3: `python quantize.py out/toy-chat --bits 4 --calibrate data/toy --out out/toy-chat-int4`."""

import argparse
import math
import tempfile
from pathlib import Path

import torch

import danube3


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
        raise danube3.DanubeError(f"{source} holds adapters: make one model of them and their base, with train.py "
                                  "--merge, and take that")
    if args.out and args.out.exists():
        raise danube3.DanubeError(f"{args.out} already exists: remove it first, or choose another --out")
    if args.out and danube3.read_scheme(source):
        raise danube3.DanubeError(f"{source} is quantized already: quantize the folder that it was made from")
    if args.report:
        config = danube3.read_config(source)
        danube3.sample_rows(args.report, danube3.read_tokenizer(source, config), config, "val", 1)


def quantize(source: Path, out: Path, bits: int,
             args: argparse.Namespace) -> list[tuple[str, int, int, float, float]]:
    """-> the lines of the table of errors"""
    done = {}
    if args.calibrate and bits == 4:
        model, tokenizer = danube3.load_checkpoint(source, danube3.pick_device(args.device or "auto"), torch.float32)
        rows = danube3.sample_rows(args.calibrate, tokenizer, model.config, "train", args.samples or 512)
        done = danube3.gptq_model(model, rows)
    return danube3.quantize_folder(source, out, bits, done)


def report(source: Path, folders: dict[str, Path], data: str) -> None:
    """The report's table of quantization (its figures for Q8_0 and Q4_K_M), for this model and this text; `change` is
    against the first row."""
    print(f"\n{'':8}{'bytes':>16}{'bits/weight':>13}{'perplexity':>12}{'change':>9}{'tokens/s':>10}{'GB/s':>7}  quiz")
    first = None
    for name, folder in folders.items():
        model, tokenizer = danube3.load_checkpoint(folder, dtype=torch.bfloat16 if name == "bf16" else None)
        size = sum(tensor.nbytes for _, tensor in danube3.stored_tensors(model))
        rows = danube3.sample_rows(data, tokenizer, model.config, "val", 256)
        quiz = Path(data, "quiz.jsonl")
        fast = model if name == "bf16" else danube3.load_checkpoint(folder, pack=True)[0]
        speed, bandwidth = danube3.measure_decoding(fast)
        perplexity = math.exp(danube3.mean_loss(model.float(), rows, rows, 8))
        first = first or perplexity
        score = f"{danube3.evaluate(model, tokenizer, quiz)['acc']:.1%}" if quiz.is_file() else "-"
        print(f"{name:8}{size:>16,}{8 * size / danube3.count_parameters(model.config):>13.2f}{perplexity:>12.4f}"
              f"{perplexity / first - 1:>9.2%}{speed:>10.1f}{bandwidth / 1e9:>7.2f}  {score}")


def main() -> None:
    args = arguments()
    source = danube3.find_checkpoint(args.checkpoint)
    check(source, args)
    if args.gguf:
        danube3.write_gguf(source, args.gguf)
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
            report(source, folders, args.report)
    print(f"try: python sample.py {args.out}")


if __name__ == "__main__":
    danube3.run_command(main)
