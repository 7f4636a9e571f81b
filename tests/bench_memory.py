"""Does the plan tell the truth about memory? `python tests/bench_memory.py` trains a full 500m for three steps.

On a CPU, in fp32, from random tokens; it takes 12 GB and a few minutes. It prints the plan's estimate for fp32, the
largest resident memory during the steps (without the interpreter's own), and that after a checkpoint was written.
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


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the largest so far


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="500m")
    parser.add_argument("--sequence-length", type=int, default=1_024)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of a step, in one micro-batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--activation-checkpointing", action="store_true")
    args = parser.parse_args()
    torch.ones(64, 64) @ torch.ones(64, 64)
    interpreter = peak_bytes()
    config = danube3.CONFIGS[args.config]
    training = dataclasses.replace(
        danube3.TRAIN_CONFIGS[args.config],
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        micro_batch_size=args.batch_size,
    )
    training = dataclasses.replace(training, dtype="float32")
    estimate = train.memory_bytes(config, training, 1, args.activation_checkpointing)
    tokenizer = danube3.Tokenizer(ROOT / "data" / "toy" / "tokenizer.model")  # only copied into the checkpoint
    model = danube3.Danube3.new(config, seed=0)
    if args.activation_checkpointing:
        danube3.use_activation_checkpointing(model)
    data, save, during = RandomData(training, args.steps, config.vocab_size), danube3.Trainer.save, []
    danube3.Trainer.save = lambda run: (during.append(peak_bytes()), save(run))  # before a checkpoint is written
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        danube3.train(danube3.Trainer(Path(folder, "run"), model, tokenizer, data), peak_flops=1e12)
    measured, total = during[-1] - interpreter, sum(estimate.values())
    print(", ".join(f"{name} {size / 1e9:.2f}" for name, size in estimate.items()))
    print(
        f"{args.config}, {args.steps} steps of {args.batch_size} x {args.sequence_length} in fp32: planned "
        f"{total / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB ({measured / total - 1:+.1%}), with a checkpoint "
        f"written {(peak_bytes() - interpreter) / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
