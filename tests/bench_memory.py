"""Does the plan tell the truth about memory? `python tests/bench_memory.py` trains a full 500m for three steps.

On a CPU, in fp32, from random tokens; it takes 12 GB and a few minutes. Printed are the plan's estimate for fp32, the
largest resident memory during the steps (the interpreter's own taken off), and that after a checkpoint was written.
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


class RandomRows:
    """Batches of random tokens, and no validation."""

    def __init__(self, recipe, vocab_size):
        self.recipe, self.vocab_size, self.identity = recipe, vocab_size, {}

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        shape = (self.recipe.rows_per_step, self.recipe.sequence_length)
        rows = torch.randint(3, self.vocab_size, shape, generator=generator)
        return rows, rows

    def validation_rows(self):
        return {}


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the largest so far


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="500m")
    parser.add_argument("--sequence-length", type=int, default=1_024)
    parser.add_argument("--rows", type=int, default=1, help="of a step, and at once")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    torch.ones(64, 64) @ torch.ones(64, 64)
    interpreter = peak_bytes()
    config = danube3.CONFIGS[args.config]
    tokens = args.rows * args.sequence_length
    recipe = dataclasses.replace(
        danube3.RECIPES[args.config],
        sequence_length=args.sequence_length,
        tokens_per_step=tokens,
        micro_batch_size=args.rows,
        stages=danube3.danube_stages(args.steps * tokens, 0, 0),
    )
    estimate = train.memory_bytes(config, recipe, 4, 1, args.recompute)
    tokenizer = danube3.Tokenizer(ROOT / "data" / "toy" / "tokenizer.model")  # only copied into the checkpoint
    model = danube3.Danube3(config).init_weights(0).train()
    for layer in model.model.layers:
        layer.recompute = args.recompute
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        run = danube3.Run(Path(folder, "run"), model, tokenizer, RandomRows(recipe, config.vocab_size), resume=False)
        save, during = run.save, []
        run.save = lambda: (during.append(peak_bytes()), save())
        danube3.train(run)
    measured, total = during[-1] - interpreter, sum(estimate.values())
    print(", ".join(f"{name} {size / 1e9:.2f}" for name, size in estimate.items()))
    print(
        f"{args.config}, {args.steps} steps of {args.rows} x {args.sequence_length} in fp32: planned {total / 1e9:.2f} "
        f"GB, measured {measured / 1e9:.2f} GB ({measured / total - 1:+.1%}), with a checkpoint written "
        f"{(peak_bytes() - interpreter) / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
