"""What a run would be, before it begins: whether it fits a GPU's memory, how many days it takes, what it reads."""

from dataclasses import replace

import torch

import danube3
from danube3 import Danube3, DanubeConfig, DanubeError, Recipe


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
