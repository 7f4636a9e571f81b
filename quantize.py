"""Quantize a Danube3: `python quantize.py out/toy-chat --bits 4 --calibrate data/toy --out out/toy-chat-int4`."""

import argparse
import tempfile
from pathlib import Path

import torch

import danube3
from extras import cli, export, report


def arguments() -> argparse.Namespace:
    parser = cli.Arguments(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint folder, a run folder, or a published Danube3 folder")
    parser.add_argument("--bits", type=int, choices=[8, 4], help="8: a scale for each row; 4: one for every 32 weights")
    parser.add_argument("--out", type=Path, help="the folder to write")
    parser.add_argument("--calibrate", metavar="DATA", help="token shards or a text file: use GPTQ (with --bits 4)")
    parser.add_argument("--samples", type=cli.positive, help="about so many rows of DATA to calibrate with [512]")
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
        report.sample_rows(args.report, danube3.read_tokenizer(source, config), config, "val", 1)  # can it be read?


def quantize(source: Path, out: Path, bits: int,
             args: argparse.Namespace) -> list[tuple[str, int, int, float, float]]:
    """-> the lines of the table of errors"""
    done = {}
    if args.calibrate and bits == 4:
        model, tokenizer = danube3.load_checkpoint(source, cli.pick_device(args.device or "auto"), torch.float32)
        rows = report.sample_rows(args.calibrate, tokenizer, model.config, "train", args.samples or 512)
        done = danube3.gptq_model(model, rows)
    return export.quantize_folder(source, out, bits, done)


def main() -> None:
    args = arguments()
    source = danube3.find_checkpoint(args.checkpoint)
    check(source, args)
    if args.gguf:
        export.write_gguf(source, args.gguf)
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
            report.compare(folders, args.report)
    print(f"try: python sample.py {args.out}")


if __name__ == "__main__":
    cli.run_command(main)
