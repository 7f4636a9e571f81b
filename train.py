"""Train a Danube3: `python train.py` makes a toy world and a model that speaks of it; --chat teaches it to answer."""

import argparse
import functools
import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

import danube3
import sample
from danube3 import ChatData, Danube3, DanubeConfig, DanubeError, Recipe, StagedData, Tokenizer
from data import toy
from data.read import read_conversations


def remix(recipe: Recipe, order: str) -> Recipe:
    """The same tokens of every source in another order, to put the report's idea to the test: "staged" is as it stands,
    "reversed" begins with the last stage, and "constant" gives every stage the mixture of the whole run."""
    if order == "reversed":
        return replace(recipe, stages=recipe.stages[::-1])
    if order == "constant":
        unit = math.gcd(*(stage.tokens for stage in recipe.stages))  # whole numbers, which nothing rounds
        scale = math.lcm(*(sum(stage.mixture.values()) for stage in recipe.stages))
        # tokens of a source in the whole run, in proportion: sum over stages of tokens times share
        overall = {name: sum(stage.tokens // unit * stage.mixture[name] * (scale // sum(stage.mixture.values()))
                             for stage in recipe.stages) for name in recipe.stages[0].mixture}
        return replace(recipe, stages=tuple(replace(stage, mixture=overall) for stage in recipe.stages))
    return recipe


# ---------------------------------------------------------------------------------------------------- the plan of a run
def memory_bytes(config: DanubeConfig, recipe: Recipe, compute_bytes: int = 2, gpus: int = 1,
                 recompute: bool = False) -> dict[str, int]:
    """Bytes that training takes on each device, by component; `compute_bytes` is 4 in fp32 and 2 in bf16.

    Weights, gradients and the two AdamW moments are exact; several GPUs share them, but a gradient that is summed over
    micro-batches is held whole until it is exchanged. Of other GPUs' weights, two layers are there at a time, and
    embedding and head throughout; gradients of a layer, and of the ends, once more while they are exchanged.
    Activations are an estimate: what autograd keeps of a layer are the stream and its norms, six times in fp32, and the
    inputs of the matrices and of attention in the compute type; with `recompute` that is kept of one layer, and of the
    others the stream once. Logits count three times: themselves, softmax, gradient.
    """
    c, tokens, n = config, recipe.micro_batch_size * recipe.sequence_length, danube3.count_parameters(config)
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim  # q, k, v and attention's output
    per_token = (4 * 6 * c.hidden_size  # fp32: the stream, what the norms keep of it, and the sums, six vectors [D]
                 + compute_bytes * (heads + 4 * c.intermediate_size))  # gate, silu(gate), up, and their product
    if recompute:  # all that of the one layer that is computed again, and of the others only their input
        kept = per_token + c.num_hidden_layers * 4 * c.hidden_size
    else:
        kept = c.num_hidden_layers * per_token
    ends = 2 * c.vocab_size * c.hidden_size  # embedding and head
    one_pass = recipe.rows_per_step == gpus * recipe.micro_batch_size
    weight_copy = 0 if compute_bytes == 4 else compute_bytes * n
    gathered = ((4 + 4) * ends  # fp32 weights and gradients
                + (2 * compute_bytes + 4) * (n - ends) // c.num_hidden_layers)  # two layers' weights, one's gradient
    return {
        "weights (fp32)": 4 * n // gpus,
        "gradients (fp32)": 4 * n // gpus if gpus == 1 or one_pass else 4 * n,
        "AdamW moments (fp32)": 8 * n // gpus,
        "weights (compute copy)" if gpus == 1 else "exchanged parts": weight_copy if gpus == 1 else gathered,
        "activations (estimate)": tokens * kept,
        "logits": 3 * 4 * min(tokens, danube3.LOGIT_TOKENS) * c.vocab_size,
    }


USABLE_MEMORY = 0.92  # of a GPU's memory: the rest goes to the driver, and to gaps between tensors [C]


def choose_recompute(config: DanubeConfig, recipe: Recipe, wish: str, gpu_memory: float, gpus: int = 1) -> bool:
    """Whether layers are to be computed again in the backward pass: as wished ("on", "off"), or if it fits only so
    ("auto"). Training that cannot fit in `gpu_memory` bytes is refused, with what would help."""
    def needs(recipe: Recipe, gpus: int, recompute: bool) -> int:
        return sum(memory_bytes(config, recipe, 2, gpus, recompute).values())

    room, one_row = USABLE_MEMORY * gpu_memory, replace(recipe, micro_batch_size=1)
    for choice in {"auto": (False, True), "on": (True,), "off": (False,)}[wish]:
        if needs(recipe, gpus, choice) <= room:
            return choice
    more = (gpus * 2 ** i for i in range(1, 13))
    enough = next((n for n in more if needs(one_row, n, True) <= room), None)
    if needs(recipe, gpus, True) <= room:
        remedy = "--recompute on"
    elif needs(one_row, gpus, True) <= room:
        remedy = "--micro-batch-size 1"
    elif enough:
        remedy = f"{enough} GPUs (torchrun --nproc-per-node; to plan: --gpus {enough})"
    else:
        remedy = "a shorter --sequence-length, or --chat with --lora"
    raise DanubeError(f"training needs {needs(recipe, gpus, wish != 'off') / 1e9:,.1f} GB on each GPU, and of "
                      f"{gpu_memory / 1e9:,.1f} GB {room / 1e9:,.1f} can be used: take {remedy}")


def set_recompute(model: Danube3, recipe: Recipe, wish: str, device: torch.device) -> None:
    """Have layers computed again in the backward pass if wished, or if this GPU's memory asks for it. On other devices
    "auto" is off. With adapters, what is counted are the stored weights, activations and logits."""
    again = wish == "on"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if all(parameter.requires_grad for parameter in model.parameters()):
            again = choose_recompute(model.config, recipe, wish, memory, danube3.processes()[1])
        elif wish == "auto":
            plan = memory_bytes(model.config, recipe)
            weights = sum(p.nbytes for p in model.parameters()) // danube3.processes()[1]
            weights += sum(codes.nbytes for codes in model.buffers())  # which processes do not share
            again = weights + plan["activations (estimate)"] + plan["logits"] > USABLE_MEMORY * memory
    for module in model.modules():
        if isinstance(module, danube3.DecoderLayer):
            module.recompute = again


def short_count(number: float) -> str:
    """1234567 -> 1.23M"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


GPU_FLOPS = 4e14  # a second, that a run is assumed to reach: about 40 % of an H100's bf16 peak [C]


def describe_run(config: DanubeConfig, recipe: Recipe, gpus: int = 1, recompute: bool = False,
                 repeats: dict[str, float] | None = None) -> str:
    """What a run would be, in one screen: stages, tokens of each source and how often it is repeated, parameters,
    memory, operations, days."""
    sources, parameters = list(recipe.stages[0].mixture), danube3.count_parameters(config)
    tokens = recipe.total_steps * recipe.tokens_per_step
    memory = memory_bytes(config, recipe, 2, gpus, recompute)
    flops = danube3.flops_per_token(config, recipe.sequence_length) * tokens
    days = flops * (4 / 3 if recompute else 1) / gpus / GPU_FLOPS / 86_400
    lines = [
        f"parameters      {parameters:,}",
        f"step            {recipe.tokens_per_step:,} tokens = {recipe.rows_per_step} rows of "
        f"{recipe.sequence_length:,}, on each of {gpus} GPUs {recipe.micro_batch_size} at a time",
        f"run             {recipe.total_steps:,} steps, {tokens:,} tokens, {flops:.3g} floating-point operations",
        f"                {days:,.2f} days on {gpus} GPUs at {GPU_FLOPS / 1e12:.0f} TFLOP/s each, about 40 % of an "
        "H100's bf16 peak",
        f"memory          {sum(memory.values()) / 1e9:,.2f} GB on each bf16 GPU"
        + (", layers computed again in the backward pass" if recompute else ""),
        *(f"                {size / 1e9:10,.2f}  {name}" for name, size in memory.items()),
        f"checkpoint      {14 * parameters / 1e9:,.2f} GB: weights in bf16 and fp32, two moments in fp32; the disk "
        "holds two while one is written",
        "", f"{'':16}{'steps':>12}{'tokens':>22}" + "".join(f"{name:>11}" for name in sources)]
    totals = dict.fromkeys(sources, 0.0)
    for stage, start, end in zip(recipe.stages, [0, *recipe.stage_ends], recipe.stage_ends):
        shares = {name: weight / sum(stage.mixture.values()) for name, weight in stage.mixture.items()}
        for name, share in shares.items():
            totals[name] += share * (end - start) * recipe.tokens_per_step
        lines.append(f"{stage.name:16}{end - start:>12,}{(end - start) * recipe.tokens_per_step:>22,}"
                     + "".join(f"{shares[name]:>10.1%} " for name in sources))
    lines.append(f"{'tokens':16}{recipe.total_steps:>12,}{tokens:>22,}"
                 + "".join(f"{short_count(totals[name]):>11}" for name in sources))
    if repeats:
        lines.append(f"{'times read':50}" + "".join(f"{repeats.get(name, 0):>11.2f}" for name in sources))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- what a run has come to
def plot_curves(out: Path, recipe: Recipe) -> Path | None:
    """Loss over steps, with the stages and their mixtures below, as curves.png; None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if entry.get("loss") is not None]
    checks = [entry for entry in entries if "val_loss" in entry]
    figure = Figure(figsize=(9, 6), layout="constrained")
    loss_axes, mixture_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    loss_axes.plot([e["step"] for e in steps], [e["loss"] for e in steps], color="0.7", linewidth=0.8, label="train")
    for i, name in enumerate(recipe.stages[0].mixture):
        losses = [e["val_loss"][name] for e in checks]
        loss_axes.plot([e["step"] for e in checks], losses, "o-", color=f"C{i}", label=name)
        for stage, start, end in zip(recipe.stages, [0, *recipe.stage_ends], recipe.stage_ends):
            mixture = list(stage.mixture.values())
            below, share = sum(mixture[:i]) / sum(mixture), mixture[i] / sum(mixture)
            mixture_axes.bar(start, share, end - start, below, align="edge", color=f"C{i}", edgecolor="white")
    for end in recipe.stage_ends[:-1]:
        loss_axes.axvline(end, color="0.4", linestyle=":", linewidth=1)
    loss_axes.set(ylabel="loss per token (lines: training; dots: validation)")
    loss_axes.legend(ncols=4, fontsize=8)
    mixture_axes.set(xlabel="step", ylabel="share of source", ylim=(0, 1))
    figure.savefig(out / "curves.png", dpi=120)
    return out / "curves.png"


def report_run(model: Danube3, tokenizer: Tokenizer, data: StagedData | ChatData, out: Path, quiz: Path) -> None:
    """What a run has come to: curves, a few words from a model that continues text, and the quiz where there is one."""
    if curves := plot_curves(out, data.recipe):
        print(f"curves in {curves}")
    for seed in range(2) if isinstance(data, StagedData) else ():
        prompt = torch.tensor([tokenizer.encode_prompt("")], device=model.device)
        ids = danube3.generate(model, prompt, 80, temperature=0.7, top_p=0.9, seed=seed)[0].tolist()
        print(f"--- a sample\n{tokenizer.decode(ids)}")
    if quiz.is_file():
        print(f"--- {quiz}\n{sample.as_table(sample.evaluate(model, tokenizer, quiz))}")


def dense(model: Danube3) -> Danube3:
    """Put ordinary matrices in place of quantized ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, danube3.QuantizedLinear):
            with torch.device("meta"):
                plain = (nn.Embedding(module.out_features, module.in_features)
                         if isinstance(module, danube3.QuantizedEmbedding)
                         else nn.Linear(module.in_features, module.out_features, bias=False))
            plain.weight = nn.Parameter(module.weight.to(model.dtype))
            model.set_submodule(name, plain)
    return model


# ---------------------------------------------------------------------------------------------------------- the program
def arguments() -> argparse.Namespace:
    parser, tokens, count = danube3.Arguments(__doc__), danube3.token_count, danube3.positive
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


def adjusted(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with what the command line says otherwise."""
    names = ("sequence_length", "tokens_per_step", "micro_batch_size", "learning_rate", "save_every", "seed")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return recipe.scaled_to(args.tokens, **changes) if args.tokens else replace(recipe, **changes)


def plan(args: argparse.Namespace, config: DanubeConfig, recipe: Recipe,
         repeats: dict[str, float] | None = None) -> NoReturn:
    """Print what the run would be, and stop; refuse one that cannot fit."""
    gpus, memory = args.gpus or 1, (args.gpu_memory or 80) * 1e9
    recipe = danube3.shared_recipe(recipe, gpus)
    try:
        recompute = choose_recompute(config, recipe, args.recompute, memory, gpus)
    except DanubeError:
        print(describe_run(config, recipe, gpus, args.recompute != "off", repeats))
        raise
    print(describe_run(config, recipe, gpus, recompute, repeats))
    sys.exit()


def pretraining(args: argparse.Namespace, base: Path | None) -> tuple[Danube3, Tokenizer, StagedData]:
    """-> model, tokenizer, data"""
    name = args.config or "toy"
    config, recipe = danube3.CONFIGS[name], remix(danube3.RECIPES[name], args.mixture or "staged")
    config = replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    recipe, folder = adjusted(recipe, args), args.data or Path("data", name)
    if recipe.sequence_length > config.max_position_embeddings:
        raise DanubeError(f"--sequence-length {recipe.sequence_length}: the context of {name} is "
                          f"{config.max_position_embeddings}: use that or less")
    if args.dry_run:
        repeats = None
        if (folder / "meta.json").is_file():
            repeats = StagedData(danube3.TokenData(folder, config, recipe.sequence_length), recipe).repeats
        plan(args, config, recipe, repeats)
    if name == "toy" and not args.data and not folder.exists() and danube3.processes()[0] == 0:
        toy.make(folder)
    danube3.wait_for_all()
    data = danube3.TokenData(folder, config, recipe.sequence_length)
    batches = StagedData(data, danube3.shared_recipe(recipe, danube3.processes()[1]))
    for source, times in batches.repeats.items():
        if times > 1.05:
            danube3.say(f"source {source!r} has less text than its share, and is read {times:.1f} times")
    if not base:
        model = Danube3.new(config, recipe.seed)
    else:
        model, tokenizer = danube3.load_checkpoint(base, dtype=torch.float32)
        model = danube3.merge_lora(model)
        if model.config != config or tokenizer.sha256 != data.tokenizer.sha256:
            raise DanubeError(f"--init {base} is no {name} with the tokenizer of {folder}: choose another")
    return model, data.tokenizer, batches


def chat(args: argparse.Namespace, base: Path, device: torch.device) -> tuple[Danube3, Tokenizer, ChatData]:
    """-> model, tokenizer, data"""
    if args.lora and (base / "adapter_config.json").is_file():
        raise DanubeError(f"{base} is a folder of adapters: --lora needs a whole model (--merge writes one)")
    dtype = danube3.compute_dtype(device) if args.lora else torch.float32
    model, tokenizer = danube3.load_checkpoint(base, dtype=dtype)
    conversations = read_conversations(args.chat, bool(args.system))
    data = ChatData(conversations, tokenizer, model.config, args.epochs or 1, args.batch_size or danube3.CHAT_ROWS,
                    bool(args.lora), bool(args.system), args.chat, danube3.file_sha256(args.chat))
    data.recipe = adjusted(data.recipe, args)
    danube3.say(data.summary)
    if args.dry_run:
        plan(args, model.config, data.recipe)
    data.recipe = danube3.shared_recipe(data.recipe, danube3.processes()[1])
    model = danube3.add_lora(model, args.lora, data.recipe.seed) if args.lora else danube3.merge_lora(model)
    return model, tokenizer, data


def main() -> int:
    args = arguments()
    device = danube3.pick_device(args.device)
    danube3.join_processes(device)
    base = danube3.find_checkpoint(args.init) if args.init else None
    model, tokenizer, data = chat(args, base, device) if args.chat and base else pretraining(args, base)
    if not args.lora and any(isinstance(module, danube3.QuantizedLinear) for module in model.modules()):
        raise DanubeError(f"{base} is quantized, so only adapters can be trained on it: add --lora 16")
    set_recompute(model, data.recipe, args.recompute, device)
    if args.compile:
        danube3.compile_model(model)
    model = danube3.share_model(model, device).train()
    start = base and base.absolute()
    start = start.parent if start and start.name.startswith("step-") else start  # out/toy/step-..: the run's name, toy
    out = args.out or Path("out", f"{start.name}-chat" if args.chat and start else args.config or "toy")
    if args.merge and args.merge.resolve() == out.resolve():
        raise DanubeError(f"--merge {args.merge} is where the run itself is written: choose another folder")
    write = functools.partial(danube3.save_adapter, base=base) if args.lora and base else danube3.save_checkpoint
    torch.backends.cuda.enable_cudnn_sdp(not args.chat)  # see pick_device
    finished = danube3.train(danube3.Run(out, model, tokenizer, data, args.resume, base, write))
    torch.backends.cuda.enable_cudnn_sdp(False)
    together, rank = danube3.processes()[1] > 1, danube3.leave_processes()
    if not finished and rank == 0:
        again = "the same torchrun command," if together else f"python train.py {shlex.join(sys.argv[1:])}"
        print(f"interrupted, and saved; go on with: {again}{'' if args.resume else ' --resume'}")
    if rank or not finished:
        return 0 if finished else 130  # the rest is the first process's work
    if args.merge:
        whole = dense(danube3.merge_lora(danube3.load_checkpoint(out)[0]))  # in the base's own precision
        danube3.save_checkpoint(args.merge, whole, tokenizer, dtype=whole.dtype)
    quiz = (data.data.folder / "quiz.jsonl" if isinstance(data, StagedData)
            else args.chat.with_name(f"{args.chat.stem}-quiz.jsonl"))
    report_run(danube3.load_checkpoint(out, device)[0], tokenizer, data, out, quiz)
    print(f"try: python sample.py {args.merge or out} " + ("--chat" if args.chat else '"Once upon a time"'))
    return 0


if __name__ == "__main__":
    danube3.run_command(main)
