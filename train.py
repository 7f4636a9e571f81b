"""Train a Danube3: `python train.py` makes a toy world and a model of it; --chat teaches it to answer."""

import argparse
import math
import os
import shlex
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import danube3
import sample
from danube3 import ChatData, Danube3, DanubeConfig, DanubeError, StagedData, Tokenizer, TrainConfig, require
from data import classify, cli, read, toy
from data.cli import positive, token_count

# ---- The plan of a run: does it fit into memory, how long does it take, what does it read?

def remix(config: TrainConfig, order: str) -> TrainConfig:
    """To test the idea of the stages: "reversed", or "constant", which gives each the whole run's mixture."""
    if order == "reversed":
        return replace(config, stages=config.stages[::-1])
    if order == "staged":
        return config
    unit = math.gcd(*(stage.tokens for stage in config.stages))  # whole numbers: nothing is rounded
    scale = math.lcm(*(sum(stage.mixture.values()) for stage in config.stages))
    overall = dict.fromkeys(config.stages[0].mixture, 0)  # tokens of each source in the whole run, to scale
    for stage in config.stages:
        factor = stage.tokens // unit * (scale // sum(stage.mixture.values()))
        for name, weight in stage.mixture.items():
            overall[name] += factor * weight
    return replace(config, stages=tuple(replace(stage, mixture=overall) for stage in config.stages))

@dataclass(frozen=True)
class Frozen:
    """The model below LoRA adapters: bytes of all its weights, and of its codes and scales among them."""
    rank: int
    stored_bytes: int
    quantized_bytes: int = 0

def frozen_part(model: Danube3, rank: int | None) -> Frozen | None:
    """What LoRA of this rank freezes of a model, before or after add_lora. None without LoRA."""
    weights = sum(weight.nbytes for name, weight in model.named_parameters() if ".lora_" not in name)
    quantized = sum(buffer.nbytes for buffer in model.buffers())
    return Frozen(rank, weights + quantized, quantized) if rank else None

def memory_bytes(config: DanubeConfig, training: TrainConfig, gpus: int = 1,
                 checkpointing: bool = False, frozen: Frozen | None = None) -> dict[str, int]:
    """Bytes that training needs on each device, by component. Activations are an estimate, a few percent low.

    Weights, gradients and AdamW's moments are exact. FSDP shards them, but not a gradient accumulated over
    micro-batches, nor compute copies: of all weights, or in large models of embedding, head and two layers.
    Autograd keeps of a layer four vectors [D] in fp32 (residual stream, normalized; two if norms are frozen),
    and the inputs of linear layers and attention; with activation checkpointing one [D], and all of one layer
    at a time. Logits thrice, or once beside a quantized head, which is dequantized for its backward pass."""
    c, own_share = config, math.ceil(training.batch_size / gpus)  # sequences of a step on one GPU
    tokens = min(training.micro_batch_size, own_share) * training.sequence_length
    compute_bytes = danube3.DTYPES.get(training.dtype, torch.bfloat16).itemsize  # auto: as on a GPU
    base, ends = danube3.count_parameters(config), c.vocab_size * c.hidden_size  # embedding, head: each
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim  # q, k, v, attention output
    mlp = 4 * c.intermediate_size  # gate, silu(gate), up, and their product
    trained, vectors, saved = base, 4, 2 * c.hidden_size + heads + mlp
    block = min(tokens, danube3.LOGIT_TOKENS) * c.vocab_size
    logits = 3 * 4 * block
    if frozen:
        vectors, saved = 2, saved + 7 * frozen.rank
        trained = c.num_hidden_layers * frozen.rank * (7 * c.hidden_size + heads + 3 * c.intermediate_size)
        if frozen.quantized_bytes:
            logits = max(logits, compute_bytes * block + (4 + 2) * ends)
    one_layer = tokens * (vectors * 4 * c.hidden_size + compute_bytes * saved)
    activations = c.num_hidden_layers * one_layer
    if checkpointing:  # a layer is recomputed when the logits are gone
        activations, logits = c.num_hidden_layers * tokens * 4 * c.hidden_size, max(logits, one_layer)
    one_pass = own_share <= training.micro_batch_size
    memory = {
        "weights (fp32)": 4 * trained // gpus,
        "gradients (fp32)": 4 * trained // (gpus if one_pass else 1),
        "AdamW moments (fp32)": 8 * trained // gpus,
        "activations": activations,
        "logits": logits,
    }
    if frozen:
        sharded = frozen.stored_bytes - frozen.quantized_bytes
        memory["frozen weights"] = frozen.quantized_bytes + sharded // gpus
    if gpus > 1:
        layer = (base - 2 * ends) // c.num_hidden_layers
        copies = base if base <= danube3.FSDP_KEPT else 2 * ends + 2 * layer
        if frozen and frozen.quantized_bytes:
            copies = ends
        gradient = 0 if frozen else max(ends, layer)  # the embedding's, the head's or a layer's, the largest
        memory["unsharded"] = compute_bytes * copies + 4 * gradient
    elif compute_bytes < 4:
        memory["weights (compute copy)"] = compute_bytes * trained
    return memory

USABLE_MEMORY = 0.92      # [ours] of a GPU's memory; the rest goes to the driver and to fragmentation
GPU_FLOPS = 0.4 * 989e12  # [ours] assumed operations per second: 40 % of an H100's dense bf16 peak

def choose_checkpointing(config: DanubeConfig, training: TrainConfig, wish: str, gpu_memory: float,
                         gpus: int = 1, frozen: Frozen | None = None) -> bool:
    """Whether to use activation checkpointing: "on", "off", or "auto", only if it does not fit otherwise.
    Training that cannot fit into `gpu_memory` bytes is refused, with what would help."""
    def needed(micro_batch_size: int, gpus: int, checkpointing: bool) -> int:
        plan = replace(training, micro_batch_size=micro_batch_size)
        return sum(memory_bytes(config, plan, gpus, checkpointing, frozen).values())

    usable, micro = USABLE_MEMORY * gpu_memory, training.micro_batch_size
    for choice in {"auto": (False, True), "on": (True,), "off": (False,)}[wish]:
        if needed(micro, gpus, choice) <= usable:
            return choice
    remedy = "a shorter --sequence-length, or --chat with --lora and --init in 4 bits (quantize.py)"
    for i in range(12, 0, -1):
        if needed(1, gpus * 2**i, True) <= usable:
            remedy = f"{gpus * 2**i} GPUs (torchrun --nproc-per-node; to plan: --gpus {gpus * 2**i})"
    if needed(1, gpus, True) <= usable:
        remedy = "--micro-batch-size 1"
    if needed(micro, gpus, True) <= usable:
        remedy = "--activation-checkpointing on"
    total = needed(micro, gpus, wish != "off") / 1e9
    raise DanubeError(f"training needs {total:,.1f} GB on each GPU, and of {gpu_memory / 1e9:,.1f} GB "
                      f"{usable / 1e9:,.1f} can be used: take {remedy}")

def set_activation_checkpointing(model: Danube3, training: TrainConfig, wish: str, device: torch.device,
                                 lora: int | None = None) -> None:
    """Switch activation checkpointing on if wished, or if the GPU's memory requires it."""
    on = wish == "on"
    if device.type == "cuda":
        memory, gpus = torch.cuda.get_device_properties(device).total_memory, danube3.rank_and_world_size()[1]
        on = choose_checkpointing(model.config, training, wish, memory, gpus, frozen_part(model, lora))
    if on:
        danube3.use_activation_checkpointing(model)

def describe_plan(config: DanubeConfig, training: TrainConfig, total_steps: int, gpus: int = 1,
                  checkpointing: bool = False, epochs: dict[str, float] | None = None,
                  frozen: Frozen | None = None) -> str:
    """A run in one screen: parameters, batches, memory, operations, days, stages and their sources."""
    c, parameters, step = training, danube3.count_parameters(config), training.tokens_per_step
    memory = memory_bytes(config, training, gpus, checkpointing, frozen)
    flops = danube3.flops_per_token(config, c.sequence_length, bool(frozen)) * total_steps * step
    days = flops * (1 + checkpointing * (1 / 2 if frozen else 1 / 3)) / gpus / GPU_FLOPS / 86_400
    note = ", with activation checkpointing" if checkpointing else ""
    passes = math.ceil(c.batch_size / gpus / c.micro_batch_size)
    lines = [
        f"parameters      {parameters:,}",
        f"step            {step:,} tokens: global batch of {c.batch_size} sequences of {c.sequence_length:,}",
        f"{'':16}{gpus} GPUs x {passes} gradient accumulation steps x micro-batch of {c.micro_batch_size}",
        f"run             {total_steps:,} steps, {total_steps * step:,} tokens, {flops:.3g} FLOPs",
        f"{'':16}{days:,.2f} days on {gpus} GPUs at {GPU_FLOPS / 1e12:.1f} TFLOP/s: 40 % of an H100's peak",
        f"memory          {sum(memory.values()) / 1e9:,.2f} GB on each GPU{note}",
    ]
    for name, size in memory.items():
        lines.append(f"{size / 1e9:26,.2f}  {name}")
    if frozen:
        trained = memory["weights (fp32)"] * gpus // 4
        lines.append(f"checkpoint      {16 * trained / 1e9:,.2f} GB: {trained:,} weights of adapters of rank "
                     f"{frozen.rank}, twice, and two moments, in fp32; the disk holds two")
    else:
        lines.append(f"checkpoint      {14 * parameters / 1e9:,.2f} GB: weights in bf16 and fp32, two "
                     "moments in fp32; the disk holds two while one is written")
    if c.stages:
        lines += describe_stages(training, epochs)
    return "\n".join(lines)

def describe_stages(training: TrainConfig, epochs: dict[str, float] | None) -> list[str]:
    """A table: steps, tokens and the share of each source, by stage."""
    sources, step, start = list(training.stages[0].mixture), training.tokens_per_step, 0
    totals = dict.fromkeys(sources, 0.0)
    lines = ["", f"{'':16}{'steps':>12}{'tokens':>22}" + "".join(f"{name:>11}" for name in sources)]
    for stage, end in zip(training.stages, training.stage_ends):
        lines.append(f"{stage.name:16}{end - start:>12,}{(end - start) * step:>22,}")
        for name in sources:
            share = stage.mixture[name] / sum(stage.mixture.values())
            totals[name] += share * (end - start) * step
            lines[-1] += f"{share:>10.1%} "
        start = end
    lines.append(f"{'tokens':16}{start:>12,}{start * step:>22,}"
                 + "".join(f"{cli.short_count(total):>11}" for total in totals.values()))
    if epochs:
        lines.append(f"{'epochs':50}" + "".join(f"{epochs.get(name, 0):>11.2f}" for name in sources))
    return lines

# ---- What a run has come to
def plot_curves(out: Path, training: TrainConfig) -> None:
    """Write curves.png, if matplotlib is installed: loss over steps, the stages' mixtures below."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    steps: list[tuple[int, float]] = []               # step and loss, in training
    checks: dict[str, list[tuple[int, float]]] = {}  # the same in validation, by source
    for entry in read.read_jsonl(out / "metrics.jsonl"):
        if entry.get("loss") is not None:
            steps.append((entry["step"], entry["loss"]))
        for name, loss in entry.get("val_loss", {}).items():
            checks.setdefault(name, []).append((entry["step"], loss))
    figure = Figure(figsize=(9, 6), layout="constrained")
    loss_axes = figure.subplots()
    if training.stages:
        figure.clear()
        loss_axes, mixture_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        mixture_axes.set(xlabel="step", ylabel="share of source", ylim=(0, 1))
    loss_axes.plot(*zip(*steps), color="0.7", linewidth=0.8, label="train")
    for i, (name, curve) in enumerate(checks.items()):
        loss_axes.plot(*zip(*curve), "o-", color=f"C{i}", label=name)
        for stage, start, end in zip(training.stages, [0, *training.stage_ends], training.stage_ends):
            mixture, total = list(stage.mixture.values()), sum(stage.mixture.values())
            below, share = sum(mixture[:i]) / total, mixture[i] / total
            mixture_axes.bar(start, share, end - start, below, align="edge", color=f"C{i}", edgecolor="white")
    for end in training.stage_ends[:-1]:
        loss_axes.axvline(end, color="0.4", linestyle=":", linewidth=1)
    loss_axes.set(ylabel="loss per token (dots: validation)")
    loss_axes.legend(ncols=4, fontsize=8)
    figure.savefig(out / "curves.png", dpi=120)
    print(f"curves in {out / 'curves.png'}")

def report_run(args: argparse.Namespace, run: danube3.Trainer) -> None:
    """Curves, two samples of a model that completes text, and its accuracy on a quiz, where there is one."""
    plot_curves(run.out, run.config)
    model, tokenizer = danube3.load_checkpoint(run.out, run.device, base=run.lora and run.base or None)
    if isinstance(run.data, StagedData):
        quiz = run.data.data.folder / "quiz.jsonl"
        prompt = torch.tensor([tokenizer.encode_prompt("")], device=model.device)
        for seed in range(2):
            ids = danube3.generate(model, prompt, 80, temperature=0.7, top_p=0.9, seed=seed)[0].tolist()
            print(f"--- a sample\n{tokenizer.decode(ids)}")
    else:
        quiz = args.chat[0].with_name(f"{args.chat[0].stem}-quiz.jsonl")
    if quiz.is_file():
        print(f"--- {quiz}\n{sample.as_table(sample.evaluate(model, tokenizer, quiz))}")
    print("try: python sample.py", args.merge or run.out, "--chat" if args.chat else '"Once upon a time"')

def set_weight(model: Danube3, name: str, weight: Tensor) -> None:
    """Replace the linear layer `name` by an ordinary one with this weight [out, in]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    model.set_submodule(name, linear)

def merge_lora(model: Danube3) -> Danube3:
    """Add every low-rank update to its weight, in place."""
    for name, lora in danube3.decoder_linears(model).items():
        if isinstance(lora, danube3.LoRALinear):
            weight = lora.base_layer.weight  # [out, in]
            update = lora.scale * (lora.lora_B.weight @ lora.lora_A.weight)
            set_weight(model, name, (weight.to(update.dtype) + update).to(weight.dtype))
    return model

def dequantize_model(model: Danube3) -> Danube3:
    """Replace quantized linear layers by ordinary ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, danube3.QuantizedLinear):
            set_weight(model, name, module.weight.to(model.dtype))
    return model

def compile_model(model: Danube3) -> None:
    """torch.compile fuses small operations of a decoder layer (all share the result) and of the loss."""
    if not cli.can_compile():
        return
    torch.compiler.assume_constant_result(danube3.is_recent_gpu)  # asked for, not traced
    for layer in model.model.layers:
        layer.compile()
    model.block_loss = torch.compile(model.block_loss)  # type: ignore[method-assign]

# ---- The program
def arguments() -> argparse.Namespace:
    parser = cli.Arguments(__doc__)
    parser.add_argument("--init", help="start from this checkpoint, output directory or published model")
    parser.add_argument("--base", help="where the base of adapters in --init is now")
    parser.add_argument("--out", type=Path, help="output directory [out/<config> or out/<init>-chat]")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of the run, and stop")
    parser.add_argument("--micro-batch-size", type=positive, help="sequences per pass; changes memory only")
    parser.add_argument("--sequence-length", type=positive, help="tokens of a sequence, at most")
    parser.add_argument("--learning-rate", type=float, help="its peak")
    parser.add_argument("--save-every", type=positive, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, help="of the initial weights and the order of the data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=["auto", *danube3.DTYPES], default="auto",
                        help="of products; auto: bfloat16 where it is fast, but float32 for the toy on CPUs")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="fuse operations [on GPUs]")
    parser.add_argument("--activation-checkpointing", "--recompute", choices=["auto", "on", "off"],
                        default="auto", help="recompute in the backward pass: less memory, more time")
    parser.add_argument("--gpus", type=positive, help="with --dry-run: plan for this many [1]")
    parser.add_argument("--gpu-memory", type=positive, metavar="GB", help="with --dry-run: of each GPU [80]")
    stages = parser.add_argument_group("pre-training")
    stages.add_argument("--config", choices=list(danube3.CONFIGS), help="which model [toy]")
    stages.add_argument("--data", type=Path, help="token shards [data/<config>; the toy makes its own]")
    stages.add_argument("--tokens", type=token_count, help="200k, 10B: training tokens, stages in proportion")
    stages.add_argument("--tokens-per-step", type=token_count, help="tokens of one optimizer step")
    stages.add_argument("--mixture", choices=["staged", "constant", "reversed"],
                        help="the report's stages; one mixture throughout; or the stages backwards [staged]")
    stages.add_argument("--layers", type=positive, help="fewer layers than the configuration's: to try out")
    chat = parser.add_argument_group("supervised fine-tuning on conversations")
    chat.add_argument("--chat", type=Path, nargs="+", metavar="TABLE", help="conversations or labelled texts")
    chat.add_argument("--epochs", type=positive, help="how often each conversation is read [1]")
    chat.add_argument("--batch-size", type=positive, help="conversations of one optimizer step [16]")
    chat.add_argument("--lora", type=positive, metavar="RANK", help="train LoRA adapters of this rank")
    chat.add_argument("--merge", type=Path, metavar="FOLDER", help="write base and adapters as one model too")
    chat.add_argument("--strict", action="store_true", default=None, help="stop at an unusable conversation")
    chat.add_argument("--system", choices=["fold"], help="put a system message before the first user message")
    classify.add_arguments(chat)
    args = parser.parse_args()
    other, problem = (stages, "cannot go together with") if args.chat else (chat, "needs")
    for action in other._group_actions:  # flags of the other kind of training
        if getattr(args, action.dest) is not None:
            parser.error(f"{action.option_strings[0]} {problem} --chat")
    require(args.init or not args.chat, "--chat needs --init, the model to start from")
    allowed = (args.lora or not args.merge) and (args.init or not args.base)
    require(allowed, "--merge needs --lora, and --base needs --init")
    require(args.dry_run or not (args.gpus or args.gpu_memory),
            "--gpus and --gpu-memory are for --dry-run: to train on several, start train.py with torchrun")
    require(not (args.merge and args.merge.exists()), f"{args.merge} already exists: choose another --merge")
    return args

def sft_config(config: DanubeConfig, lora: bool = False) -> TrainConfig:
    """1e-4 for LoRA is H2O LLM Studio's default. A tenth for full fine-tuning, and the rest, are [ours]."""
    lr = (1e-4 if lora else 1e-5) * 1536 / config.hidden_size
    return TrainConfig(16, 16, lr, weight_decay=0.0, warmup_fraction=0.05, save_every=500)

def adjust(config: TrainConfig, args: argparse.Namespace, model: DanubeConfig) -> TrainConfig:
    """The training config with what the command line changes."""
    names = ("batch_size", "sequence_length", "micro_batch_size", "learning_rate", "save_every", "seed")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not args.chat:
        length = args.sequence_length or config.sequence_length
        tokens = args.tokens_per_step or config.tokens_per_step
        require(tokens % length == 0, f"a step of {tokens:,} tokens is no whole number of sequences of "
                f"{length:,}: use --tokens-per-step {max(1, tokens // length) * length}")
        changes["batch_size"] = tokens // length
    dtype = cli.pick_dtype(args.dtype, args.device, model)
    config = replace(config, dtype=dtype, **changes)
    return config.with_tokens(args.tokens) if args.tokens else config

def plan(args: argparse.Namespace, config: DanubeConfig, training: TrainConfig, total_steps: int,
         epochs: dict[str, float] | None = None, frozen: Frozen | None = None) -> None:
    """Print what the run would be, and end the program; refuse a run that cannot fit."""
    gpus, memory, wish = args.gpus or 1, (args.gpu_memory or 80) * 1e9, args.activation_checkpointing
    require(training.batch_size % gpus == 0, f"a step of {training.batch_size} sequences cannot be divided "
            f"evenly among {gpus} GPUs: change one")
    training = replace(training, micro_batch_size=min(training.micro_batch_size, training.batch_size // gpus))
    checkpointing = wish != "off"  # described even if it cannot fit
    try:
        checkpointing = choose_checkpointing(config, training, wish, memory, gpus, frozen)
    finally:
        print(describe_plan(config, training, total_steps, gpus, checkpointing, epochs, frozen))
    sys.exit()

def check_length(length: int, config: DanubeConfig) -> None:
    context = config.max_position_embeddings
    require(length <= context, f"--sequence-length {length}: the context of the model is {context}")

def pre_training(args: argparse.Namespace, base: Path | None,
                 start: str) -> tuple[Danube3, Tokenizer, StagedData]:
    """-> model (on the device `start`), tokenizer, data"""
    name, rank = args.config or "toy", danube3.rank_and_world_size()[0]
    config = danube3.CONFIGS[name]
    config = replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    training = adjust(remix(danube3.TRAIN_CONFIGS[name], args.mixture or "staged"), args, config)
    folder, steps = args.data or Path("data", name), training.stage_ends[-1]
    require(steps > 0, f"this is less than one step of {training.tokens_per_step:,} tokens: raise --tokens")
    check_length(training.sequence_length, config)
    if args.dry_run and not (folder / "meta.json").is_file():
        plan(args, config, training, steps)
    if name == "toy" and not args.data and not folder.exists() and rank == 0:
        toy.make(folder)
    if dist.is_initialized():
        dist.barrier()
    data = StagedData(read.TokenData(folder, config, training.sequence_length), training)
    if args.dry_run:
        plan(args, config, training, steps, data.epochs)
    for source, epochs in data.epochs.items():
        if epochs > 1.05 and rank == 0:
            print(f"source {source!r} has less text than its share, and is read {epochs:.1f} times")
    if not base:
        return Danube3.new(config, training.seed, start), data.data.tokenizer, data
    model, tokenizer = danube3.load_checkpoint(base, start, torch.float32, base=args.base)
    require(model.config == config and tokenizer.sha256 == data.data.tokenizer.sha256,
            f"--init {base} is no {name} with the tokenizer of {folder}: choose another")
    return merge_lora(model), tokenizer, data

def fine_tuning(args: argparse.Namespace, base: Path, start: str) -> tuple[Danube3, Tokenizer, ChatData]:
    """-> model (on the device `start`), tokenizer, data"""
    require(not (args.lora and (base / "adapter_config.json").is_file()),
            f"{base} holds adapters: --lora needs a whole model (--merge writes one)")
    dtype = "float32"
    if args.lora:
        dtype = cli.pick_dtype(args.dtype, args.device, danube3.read_config(base), args.dry_run)
    own_dtype = danube3.compute_dtype(args.device, dtype)
    model, tokenizer = danube3.load_checkpoint(base, start, own_dtype, base=args.base)
    tokenizer.add_bos, tokenizer.chat_template = False, danube3.CHAT_TEMPLATE  # as in render_chat
    context, changes = args.sequence_length or model.config.max_position_embeddings, classify.changes(args)
    check_length(context, model.config)
    conversations, notes, task = classify.read_examples(
        args.chat, classify.Task(**{"context": context, **changes}), tokenizer, bool(changes),
        bool(args.system), args.strict)
    if task:
        model.task = asdict(task)
    fingerprint = {"chat": " ".join(map(danube3.file_sha256, args.chat)), "fold_system": args.system,
                   "lora": args.lora, "task": task and model.task}
    training = adjust(sft_config(model.config, bool(args.lora)), args, model.config)
    data = ChatData(conversations, tokenizer, context, training, args.epochs or 1, fingerprint)
    if args.micro_batch_size:
        data.config = replace(data.config, micro_batch_size=args.micro_batch_size)
    if danube3.rank_and_world_size()[0] == 0:
        print(*notes, data.summary, sep="\n")
    if args.dry_run:
        plan(args, model.config, data.config, data.total_steps, None, frozen_part(model, args.lora))
    if args.lora:
        return danube3.add_lora(model, args.lora, training.seed), tokenizer, data
    return merge_lora(model), tokenizer, data

def output_directory(args: argparse.Namespace, base: Path | None) -> Path:
    """--out, or a name made from --init or --config."""
    if not (args.chat and base):
        return args.out or Path("out", args.config or "toy")
    run = Path(args.init).absolute()
    if run.name.startswith("step-"):  # out/toy/step-0001758: the run's name is toy
        run = run.parent
    return args.out or Path("out", f"{run.name}-chat")

def main() -> int:
    args = arguments()
    device = args.device = cli.pick_device(args.device)
    cli.join_processes(device)
    rank, world_size = danube3.rank_and_world_size()
    base = danube3.find_checkpoint(args.init) if args.init else None
    start = "cpu" if rank == 0 and not args.dry_run else "meta"
    data: StagedData | ChatData
    if args.chat and base:
        model, tokenizer, data = fine_tuning(args, base, start)
    else:
        model, tokenizer, data = pre_training(args, base, start)
    quantized = any(isinstance(module, danube3.QuantizedLinear) for module in model.modules())
    require(args.lora or not quantized, f"{base} is quantized: train adapters only, with --chat and --lora")
    out = output_directory(args, base)
    require(not args.merge or args.merge.resolve() != out.resolve(), f"{args.merge} is the run's own --out")
    set_activation_checkpointing(model, data.config, args.activation_checkpointing, device, args.lora)
    if cli.shall_compile(args.compile, device, model.config):
        compile_model(model)
    size = data.config.batch_size
    require(size % world_size == 0, f"{world_size} processes cannot share {size} sequences: change one")
    require(not (out / "config.json").exists(), f"{out} is a checkpoint: choose another --out")
    if world_size > 1:
        facts = (model.config, data.config, data.fingerprint, args.resume, danube3.checkpoints_in(out))
        alike = [repr(facts)] * world_size
        dist.all_gather_object(alike, alike[rank])
        require(len(set(alike)) == 1, "the ranks have different flags, data or files: start all alike")
    torch.backends.cuda.enable_cudnn_sdp(not args.chat)  # see cli.pick_device
    run = danube3.Trainer(out, model, tokenizer, data, args.resume, base, device)
    if rank == 0:
        trainable = sum(weight.numel() for name, weight in run.tensors() if name.startswith("weights."))
        dtype = str(run.dtype).removeprefix("torch.")
        print(f"{trainable:,} trainable parameters, {data.total_steps:,} steps of {size} sequences on "
              f"{world_size} x {device.type} in {dtype}")
    interrupts = cli.catch_interrupts(world_size)
    finished = danube3.train(run, world_size * cli.measure_matmul_peak(device, run.dtype), interrupts)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:  # at once: gloo's threads may abort a process that takes itself down slowly
        os._exit(0 if finished else 130)
    if not finished:
        again = "the same torchrun command" if world_size > 1 else f"python {shlex.join(sys.argv)}"
        print(f"interrupted, and saved; go on with: {again.removesuffix(' --resume')} --resume")
        return 130
    if args.merge:
        merged = dequantize_model(merge_lora(danube3.load_checkpoint(out, base=base)[0]))
        danube3.save_checkpoint(args.merge, merged, tokenizer, merged.dtype)
    report_run(args, run)
    return 0

if __name__ == "__main__":
    cli.run_command(main)
