"""Train a Danube3: `python train.py` makes a toy world and a model that speaks of it; see --help for the rest."""

import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

import danube3
from data import toy


def arguments():
    parser = danube3.Arguments(__doc__)
    parser.add_argument("--config", choices=list(danube3.CONFIGS), default="toy", help="which model")
    parser.add_argument("--data", type=Path, help="folder of token shards [data/toy for the toy, which makes it]")
    parser.add_argument("--out", type=Path, help="run folder [out/<config>]")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would be, and stop")
    tokens = danube3.token_count
    parser.add_argument("--tokens", type=tokens, help="200k, 10B: training tokens, stages in proportion [the recipe's]")
    parser.add_argument("--tokens-per-step", type=tokens, help="tokens of one optimizer step [the recipe's]")
    parser.add_argument("--micro-batch-size", type=int, help="rows at once: memory, not the result [the recipe's]")
    parser.add_argument("--learning-rate", type=float, help="its peak [the recipe's]")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints [the recipe's]")
    parser.add_argument("--seed", type=int, help="of the initial weights and the order of the data [the recipe's]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--compile", action="store_true", help="compile the model first (a CPU needs a C++ compiler)")
    return parser.parse_args()


def main():
    args = arguments()
    config, recipe = danube3.CONFIGS[args.config], danube3.RECIPES[args.config]
    names = ("tokens_per_step", "micro_batch_size", "learning_rate", "save_every", "seed")
    recipe = replace(recipe, **{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    if args.tokens:
        recipe = recipe.scaled_to(args.tokens)
    data_folder, out = args.data or Path("data") / args.config, args.out or Path("out") / args.config
    if args.dry_run:
        print(danube3.describe_run(config, recipe))
        return 0
    device = danube3.pick_device(args.device)
    if args.config == "toy" and not args.data and not data_folder.exists():
        toy.make(data_folder)
    if not (data_folder / "meta.json").is_file():
        print(danube3.describe_run(config, recipe))
    data = danube3.TokenData(data_folder, config, recipe.sequence_length)
    batches = danube3.StagedData(data, recipe)
    model = danube3.Danube3(config).init_weights(recipe.seed).to(device)
    if args.compile and not (shutil.which("c++") or shutil.which("g++") or shutil.which("cl")):
        print("no C++ compiler found: going on without --compile", file=sys.stderr)
    elif args.compile:
        model.compile()
    identity = {"configuration": asdict(config), "recipe": asdict(recipe), "data": {"meta.json": data.sha256}}
    for name in ("save_every", "micro_batch_size"):  # free to change when a run goes on
        del identity["recipe"][name]
    dtype = str(danube3.compute_dtype(device)).removeprefix("torch.")
    print(f"{args.config}: {danube3.count_parameters(config):,} parameters, {recipe.total_steps:,} steps of "
          f"{recipe.tokens_per_step:,} tokens on {device.type} in {dtype}")
    run = danube3.Run(out, model, data.tokenizer, danube3.make_optimizer(model, recipe), identity, args.resume)
    finished = danube3.train(run, batches, lambda: danube3.validation_losses(model, data, recipe))
    if not finished:
        again = [word for word in sys.argv[1:] if word != "--resume"]
        print(f"interrupted, and saved; go on with: python train.py {shlex.join([*again, '--resume'])}")
        return 130
    report(model.eval(), data, recipe, out)


def report(model, data, recipe, out):
    """What the run has come to: curves, a few words from the model, and the quiz where the data has one."""
    if curves := danube3.plot_curves(out, recipe):
        print(f"curves in {curves}")
    prompt = torch.tensor([data.tokenizer.encode_prompt("")], device=model.lm_head.weight.device)
    for seed in range(2):
        ids = danube3.generate(model, prompt, 80, temperature=0.7, top_p=0.9, seed=seed)[0].tolist()
        print(f"--- a sample\n{data.tokenizer.decode(ids)}")
    if (quiz := data.folder / "quiz.jsonl").is_file():
        print(f"--- quiz on facts it was never asked about: {danube3.answer_quiz(model, data.tokenizer, quiz)}")
    print(f"try: python sample.py {out} \"Once upon a time\"")


if __name__ == "__main__":
    danube3.run_command(main)
