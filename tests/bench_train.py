"""Training speed against transformers: `python tests/bench_train.py [--config 500m --layers 2]`, some minutes.

The same configuration, batch, loss and type: our train_step and a plain loop of LlamaForCausalLM with
torch.optim.AdamW, each as it is and compiled. They alternate within one run, since a shared machine's speed changes
from minute to minute. The median of the ratios of neighbours counts. `--dtype float32 bfloat16` measures both.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from conftest import transformers_model  # noqa: E402

import danube3  # noqa: E402
import train  # noqa: E402
from data import cli  # noqa: E402


def our_step(config, training, ids, compiled):
    model = danube3.Danube3.new(config, seed=0)
    optimizer = danube3.make_optimizer(model, training)
    if compiled:
        train.compile_model(model)
    return lambda: danube3.train_step(model, optimizer, ids, ids, training, training.learning_rate)


def their_step(config, training, ids, compiled):
    model = transformers_model(config, danube3.Danube3.new(config, seed=0).state_dict()).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
        fused=True,
    )
    if compiled:
        model.compile()

    def step():
        batches = ids.split(training.micro_batch_size)
        for batch in batches:
            with danube3.autocast(model.device, training):
                loss = model(input_ids=batch, labels=batch).loss / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="of each loop in a round")
    parser.add_argument("--config", default="toy")
    parser.add_argument("--layers", type=int, help="fewer than the configuration has")
    parser.add_argument("--dtype", nargs="*", default=["float32"], choices=list(danube3.DTYPES))
    args = parser.parse_args()
    config, training = danube3.CONFIGS[args.config], danube3.TRAIN_CONFIGS["toy"]
    config = dataclasses.replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    ids = torch.randint(3, config.vocab_size, (training.batch_size, training.sequence_length))
    loops = {}
    for dtype in args.dtype:
        typed = dataclasses.replace(training, dtype=dtype)
        for compiled, kind in ((False, dtype), (True, f"{dtype} compiled")):
            loops[f"transformers {kind}"] = their_step(config, typed, ids, compiled)
            loops[f"danube3 {kind}"] = our_step(config, typed, ids, compiled)
    seconds, peaks = {name: [] for name in loops}, {name: [] for name in args.dtype}
    for loop in loops.values():
        for _ in range(3):
            loop()
    for _ in range(args.rounds):
        for dtype in args.dtype:
            peaks[dtype].append(cli.measure_matmul_peak(torch.device("cpu"), danube3.DTYPES[dtype]))
        for name, loop in loops.items():
            start = time.perf_counter()
            for _ in range(args.steps):
                loop()
            seconds[name].append((time.perf_counter() - start) / args.steps)
    flops = danube3.flops_per_token(config, training.sequence_length) * training.tokens_per_step
    print(
        f"{danube3.count_parameters(config):,} parameters, {training.tokens_per_step} tokens a step, "
        f"{args.rounds} rounds, {torch.get_num_threads()} threads; matmul peaks (medians): "
        + ", ".join(f"{statistics.median(each) / 1e9:.0f} GFLOP/s in {dtype}" for dtype, each in peaks.items())
    )
    for name, times in seconds.items():
        _, dtype, *_ = name.split()
        utilization = statistics.median(flops / t / peak for t, peak in zip(times, peaks[dtype]))
        line = f"{name:31} {training.tokens_per_step / statistics.median(times):8,.0f} tokens/s   "
        line += f"{utilization:4.0%} of matmul peak   "
        others = [name.replace("danube3", "transformers"), name.replace(dtype, "float32")]
        for other in others:
            if other != name and other in seconds:
                ratios = sorted(theirs / ours for theirs, ours in zip(seconds[other], times))
                middle = f"{ratios[len(ratios) // 4]:.2f}-{ratios[-1 - len(ratios) // 4]:.2f}"
                line += f"{statistics.median(ratios):.2f}x {other} (middle half {middle})  "
        print(line)


if __name__ == "__main__":
    main()
