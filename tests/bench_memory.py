"""Does the plan tell the truth about memory? `python tests/bench_memory.py` trains a full 500m for three steps.

On a CPU, from random tokens; in fp32 it takes 12 GB and a few minutes. It prints the plan's estimate, the largest
resident memory during the steps (without the interpreter's own), and that after a checkpoint was written. `--lora 16`
trains adapters, `--lora 16 --bits 4` on quantized weights. `--table` prints plans for a GPU of 16 GB instead.
"""

import argparse
import dataclasses
import resource
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import danube3  # noqa: E402
import quantize  # noqa: E402
import train  # noqa: E402


class RandomData:
    """Batches of random tokens, and no validation."""

    def __init__(self, config, total_steps, vocab_size):
        self.config, self.total_steps, self.vocab_size, self.fingerprint = config, total_steps, vocab_size, {}

    def stage(self, step):
        return "stage 1"

    def batch(self, step, rank=0, world_size=1):
        generator = torch.Generator().manual_seed(step)
        shape = (self.config.batch_size, self.config.sequence_length)
        input_ids = torch.randint(3, self.vocab_size, shape, generator=generator)
        return input_ids, input_ids

    def validation(self):
        return {}


@torch.no_grad()
def stored_model(config, bits, device="meta"):
    """A model with weights as a folder of so many bits stores them: random ones, or on "meta" none."""
    model = danube3.Danube3.new(config, 0, device)
    if bits == 32:
        return model
    model, packed = model.bfloat16(), {}
    for name, width in quantize.layout(config, bits).items() if bits < 16 else ():
        weight = model.get_submodule(name).weight
        codes, scales = danube3.quantize_int8(weight) if width == 8 else danube3.quantize_int4(weight)
        packed |= {f"{name}.weight_packed": danube3.pack(codes, width), f"{name}.weight_scale": scales}
    danube3.use_quantized_modules(model, packed)
    model.load_state_dict(model.state_dict() | packed, assign=True)
    return model


def print_table(gigabytes=16):
    """Which training fits: GB of the plan for one sequence of T tokens at a time, fp16 or bf16."""
    print("| | T = 512 | 2,048 | 8,192 |\n|---|---|---|---|")
    for name in ("500m", "4b"):
        for kind, bits in (("full", 32), ("LoRA", 16), ("QLoRA", 4)):
            config, cells = danube3.CONFIGS[name], []
            frozen = train.frozen_part(stored_model(config, bits), 16 if bits < 32 else None)
            for length in (512, 2_048, 8_192):
                training, sizes = danube3.TrainConfig(16, 1, 1e-4, sequence_length=length), []
                for checkpointing in (False, True):
                    size = sum(train.memory_bytes(config, training, 1, checkpointing, frozen).values()) / 1e9
                    sizes.append(f"**{size:.1f}**" if size <= train.USABLE_MEMORY * gigabytes else f"{size:.1f}")
                cells.append(", ".join(sizes))
            print(f"| {name}, {kind} | {' | '.join(cells)} |")


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the largest so far


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="500m")
    parser.add_argument("--sequence-length", type=int, default=1_024)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of a step, in one micro-batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--lora", type=int, help="train adapters of this rank")
    parser.add_argument("--bits", type=int, default=16, choices=[16, 8, 4], help="with --lora: of the frozen weights")
    parser.add_argument("--dtype", default="float32", choices=list(danube3.DTYPES))
    parser.add_argument("--table", action="store_true", help="print what fits 16 GB")
    args = parser.parse_args()
    if args.table:
        print_table()
        return
    torch.ones(64, 64) @ torch.ones(64, 64)
    interpreter = peak_bytes()
    config = danube3.CONFIGS[args.config]
    training = dataclasses.replace(
        danube3.TRAIN_CONFIGS[args.config],
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        micro_batch_size=args.batch_size,
    )
    training = dataclasses.replace(training, dtype=args.dtype)
    model = stored_model(config, args.bits if args.lora else 32, "cpu")
    frozen = train.frozen_part(model, args.lora)
    estimate = train.memory_bytes(config, training, 1, args.activation_checkpointing, frozen)
    if args.lora:
        danube3.add_lora(model, args.lora, 0)
    tokenizer = danube3.Tokenizer(ROOT / "data" / "toy" / "tokenizer.model")  # only copied into the checkpoint
    if args.activation_checkpointing:
        danube3.use_activation_checkpointing(model)
    data, save, during = RandomData(training, args.steps, config.vocab_size), danube3.Trainer.save, []
    danube3.Trainer.save = lambda run: (during.append(peak_bytes()), save(run))  # before a checkpoint is written
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        base = Path(folder, "base")
        base.mkdir()  # adapters name their base
        danube3.train(danube3.Trainer(Path(folder, "run"), model, tokenizer, data, base=base), peak_flops=1e12)
    measured, total = during[-1] - interpreter, sum(estimate.values())
    print(", ".join(f"{name} {size / 1e9:.2f}" for name, size in estimate.items()))
    print(
        f"{args.config}, {args.steps} steps of {args.batch_size} x {args.sequence_length} in {args.dtype}: planned "
        f"{total / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB ({measured / total - 1:+.1%}), with a checkpoint "
        f"written {(peak_bytes() - interpreter) / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
