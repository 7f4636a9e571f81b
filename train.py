"""Train a Danube3: `python train.py` makes a toy world and a model that speaks of it; --chat teaches it to answer."""

import argparse
import functools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

import danube3
from data import toy
from extras import cli, planning, report


def arguments() -> argparse.Namespace:
    parser, tokens, count = cli.Arguments(__doc__), cli.token_count, cli.positive
    parser.add_argument("--init", help="start from the weights of this checkpoint, run or published folder")
    parser.add_argument("--out", type=Path, help="run folder [out/<config>; with --chat out/<init>-chat]")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would be, and stop")
    parser.add_argument("--micro-batch-size", type=count, help="rows at once: memory, not the result [the recipe's]")
    parser.add_argument("--learning-rate", type=float, help="its peak [the recipe's]")
    parser.add_argument("--save-every", type=count, help="steps between checkpoints [the recipe's]")
    parser.add_argument("--seed", type=int, help="of the initial weights and the order of the data [the recipe's]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--compile", action="store_true", help="compile the model first (a CPU needs a C++ compiler)")
    parser.add_argument("--recompute", choices=["auto", "on", "off"], default="auto",
                        help="keep little of each layer, and compute it again in the backward pass: memory for time")
    parser.add_argument("--gpus", type=count, help="with --dry-run: plan for so many [1]")
    parser.add_argument("--gpu-memory", type=count, metavar="GB", help="with --dry-run: of each [80]")
    stages = parser.add_argument_group("pre-training")
    stages.add_argument("--config", choices=list(danube3.CONFIGS), help="which model [toy]")
    stages.add_argument("--data", type=Path, help="folder of token shards [data/<config>; the toy makes its own]")
    stages.add_argument("--tokens", type=tokens, help="200k, 10B: training tokens, stages in proportion [the recipe's]")
    stages.add_argument("--tokens-per-step", type=tokens, help="tokens of one optimizer step [the recipe's]")
    stages.add_argument("--mixture", choices=["staged", "constant", "reversed"],
                        help="the report's stages; the same tokens mixed evenly; or the stages backwards [staged]")
    stages.add_argument("--sequence-length", type=count, help="tokens of a row [the recipe's]")
    stages.add_argument("--layers", type=count, help="fewer layers than the configuration's: to try out")
    chat = parser.add_argument_group("chat fine-tuning")
    chat.add_argument("--chat", type=Path, metavar="JSONL", help='a conversation, or a text with its label, a line')
    chat.add_argument("--epochs", type=count, help="how often each conversation is read [1]")
    chat.add_argument("--batch-size", type=count, help=f"conversations of one optimizer step [{danube3.CHAT_ROWS}]")
    chat.add_argument("--lora", type=count, metavar="RANK", help="train adapters of this rank instead of all weights")
    chat.add_argument("--merge", type=Path, metavar="FOLDER", help="at the end, write base and adapters as one model")
    chat.add_argument("--system", choices=["fold"], help="put system messages in front of the first user message")
    args = parser.parse_args()
    for action in (stages if args.chat else chat)._group_actions:  # flags of the other kind of training
        if getattr(args, action.dest) is not None:
            parser.error(f"{action.option_strings[0]} {'cannot go together with' if args.chat else 'needs'} --chat")
    if args.chat and not args.init or args.merge and not args.lora:
        parser.error("--merge needs --lora" if args.init else "--chat needs --init, the model to start from")
    if (args.gpus or args.gpu_memory) and not args.dry_run:
        parser.error("--gpus and --gpu-memory are for --dry-run: to train on several, start train.py with torchrun")
    if args.merge and args.merge.exists():
        parser.error(f"{args.merge} already exists")
    if args.lora and args.dry_run:
        parser.error("--dry-run plans a training without --lora only")
    return args


def adjusted(recipe: danube3.Recipe, args: argparse.Namespace) -> danube3.Recipe:
    """The recipe with what the command line says otherwise."""
    names = ("sequence_length", "tokens_per_step", "micro_batch_size", "learning_rate", "save_every", "seed")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return recipe.scaled_to(args.tokens, **changes) if args.tokens else replace(recipe, **changes)


def plan(args: argparse.Namespace, config: danube3.DanubeConfig, recipe: danube3.Recipe,
         repeats: dict[str, float] | None = None) -> NoReturn:
    """Print what the run would be, and stop; refuse one that cannot fit."""
    gpus, memory = args.gpus or 1, (args.gpu_memory or 80) * 1e9
    recipe = danube3.shared_recipe(recipe, gpus)
    try:
        recompute = planning.choose_recompute(config, recipe, args.recompute, memory, gpus)
    except danube3.DanubeError:
        print(planning.describe_run(config, recipe, gpus, args.recompute != "off", repeats))
        raise
    print(planning.describe_run(config, recipe, gpus, recompute, repeats))
    sys.exit()


def pretraining(args: argparse.Namespace,
                base: Path | None) -> tuple[danube3.Danube3, danube3.Tokenizer, danube3.StagedData]:
    """-> model, tokenizer, data"""
    name = args.config or "toy"
    config, recipe = danube3.CONFIGS[name], danube3.remix(danube3.RECIPES[name], args.mixture or "staged")
    config = replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    recipe, folder = adjusted(recipe, args), args.data or Path("data", name)
    if recipe.sequence_length > config.max_position_embeddings:
        raise danube3.DanubeError(f"--sequence-length {recipe.sequence_length}: the context of {name} is "
                                  f"{config.max_position_embeddings}: use that or less")
    if args.dry_run:
        repeats = None
        if (folder / "meta.json").is_file():
            repeats = danube3.StagedData(danube3.TokenData(folder, config, recipe.sequence_length), recipe).repeats
        plan(args, config, recipe, repeats)
    if name == "toy" and not args.data and not folder.exists() and danube3.processes()[0] == 0:
        toy.make(folder)
    danube3.wait_for_all()
    data = danube3.TokenData(folder, config, recipe.sequence_length)
    batches = danube3.StagedData(data, danube3.shared_recipe(recipe, danube3.processes()[1]))
    for source, times in batches.repeats.items():
        if times > 1.05:
            danube3.say(f"source {source!r} has less text than its share, and is read {times:.1f} times")
    if not base:
        model = danube3.Danube3.new(config, recipe.seed)
    else:
        model, tokenizer = danube3.load_checkpoint(base, dtype=torch.float32)
        model = danube3.merge_lora(model)
        if model.config != config or tokenizer.sha256 != data.tokenizer.sha256:
            raise danube3.DanubeError(f"--init {base} is no {name} with the tokenizer of {folder}: choose another")
    return model, data.tokenizer, batches


def chat(args: argparse.Namespace, base: Path,
         device: torch.device) -> tuple[danube3.Danube3, danube3.Tokenizer, danube3.ChatData]:
    """-> model, tokenizer, data"""
    if args.lora and (base / "adapter_config.json").is_file():
        raise danube3.DanubeError(f"{base} is a folder of adapters: --lora needs a whole model (--merge writes one)")
    dtype = danube3.compute_dtype(device) if args.lora else torch.float32
    model, tokenizer = danube3.load_checkpoint(base, dtype=dtype)
    data = danube3.ChatData(args.chat, tokenizer, model.config, args.epochs or 1, args.batch_size or danube3.CHAT_ROWS,
                            bool(args.lora), bool(args.system))
    data.recipe = adjusted(data.recipe, args)
    danube3.say(data.summary)
    if args.dry_run:
        plan(args, model.config, data.recipe)
    data.recipe = danube3.shared_recipe(data.recipe, danube3.processes()[1])
    model = danube3.add_lora(model, args.lora, data.recipe.seed) if args.lora else danube3.merge_lora(model)
    return model, tokenizer, data


def main() -> int:
    args = arguments()
    device = cli.pick_device(args.device)
    cli.join_processes(device)
    base = danube3.find_checkpoint(args.init) if args.init else None
    model, tokenizer, data = chat(args, base, device) if args.chat and base else pretraining(args, base)
    if not args.lora and any(isinstance(module, danube3.QuantizedLinear) for module in model.modules()):
        raise danube3.DanubeError(f"{base} is quantized, so only adapters can be trained on it: add --lora 16")
    planning.set_recompute(model, data.recipe, args.recompute, device)
    if args.compile:
        cli.compile_model(model)
    model = danube3.share_model(model, device).train()
    start = base and base.absolute()
    start = start.parent if start and start.name.startswith("step-") else start  # out/toy/step-..: the run's name, toy
    out = args.out or Path("out", f"{start.name}-chat" if args.chat and start else args.config or "toy")
    if args.merge and args.merge.resolve() == out.resolve():
        raise danube3.DanubeError(f"--merge {args.merge} is where the run itself is written: choose another folder")
    write = functools.partial(danube3.save_adapter, base=base) if args.lora and base else danube3.save_checkpoint
    torch.backends.cuda.enable_cudnn_sdp(not args.chat)  # see pick_device
    finished = danube3.train(danube3.Run(out, model, tokenizer, data, args.resume, base, write))
    torch.backends.cuda.enable_cudnn_sdp(False)
    together, rank = danube3.processes()[1] > 1, cli.leave_processes()
    if not finished and rank == 0:
        again = "the same torchrun command," if together else f"python train.py {shlex.join(sys.argv[1:])}"
        print(f"interrupted, and saved; go on with: {again}{'' if args.resume else ' --resume'}")
    if rank or not finished:
        return 0 if finished else 130  # the rest is the first process's work
    if args.merge:
        whole = danube3.dense(danube3.merge_lora(danube3.load_checkpoint(out)[0]))  # in the base's own precision
        danube3.save_checkpoint(args.merge, whole, tokenizer, dtype=whole.dtype)
    quiz = (data.data.folder / "quiz.jsonl" if isinstance(data, danube3.StagedData)
            else args.chat.with_name(f"{args.chat.stem}-quiz.jsonl"))
    report.report_run(danube3.load_checkpoint(out, device)[0], tokenizer, data, out, quiz)
    print(f"try: python sample.py {args.merge or out} " + ("--chat" if args.chat else '"Once upon a time"'))
    return 0


if __name__ == "__main__":
    cli.run_command(main)
