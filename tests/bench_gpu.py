"""What only a GPU can tell: `python tests/bench_gpu.py --json gpu.json`, on one GPU, in under ten minutes.

Needs numpy, torch, safetensors, sentencepiece and tqdm, and no network. The parts run in the order of their
worth. Each part is a process of its own. It is killed at its limit; the rows that it has written are kept.
A part that fails does not stop the others. The outcome is one table, and one JSON file with the same rows.
`--only PART` (again for more) runs some of them. `--tiny` runs all of them on a CPU with small models: that
tests this file, and its numbers mean nothing. The exit code is 0 if all parts ended and all checks passed.
"""

import argparse
import copy
import dataclasses
import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import timeit
import traceback
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

# --------------------------------------------- The project's names: nothing below this block uses any other.
import danube3  # noqa: E402
import quantize  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import cli, toy  # noqa: E402

CONFIGS, DanubeError, Tokenizer = danube3.CONFIGS, danube3.DanubeError, danube3.Tokenizer
flops_per_token = danube3.flops_per_token
load_checkpoint, save_checkpoint = danube3.load_checkpoint, danube3.save_checkpoint
make_optimizer, evaluate_loss = danube3.make_optimizer, danube3.evaluate_loss
generate, measure_decoding = danube3.generate, sample.measure_decoding
measure_peak, pick_device, compile_model = cli.measure_matmul_peak, cli.pick_device, train.compile_model
has_compiler, compute_dtype, QuantizedLinear = danube3.has_compiler, danube3.compute_dtype, danube3.QuantizedLinear
TRAIN_CONFIGS, read_config = danube3.TRAIN_CONFIGS, danube3.read_config
make_toy_data, quantize_folder = toy.make, quantize.quantize_folder
choose_checkpointing, memory_bytes = train.choose_checkpointing, train.memory_bytes


def train_config(name, length, batch_size, micro=1, **changes):
    """How `name` is trained: steps of `batch_size` sequences of `length` tokens, `micro` of them at a time."""
    sizes = {"sequence_length": length, "batch_size": batch_size, "micro_batch_size": micro}
    return dataclasses.replace(danube3.TRAIN_CONFIGS[name], **sizes, **changes)


def train_step(model, optimizer, input_ids, labels, settings, step, scaler=None):
    """Step number `step` of a whole run. -> loss, gradient norm"""
    rate = danube3.learning_rate(step, settings.stage_ends[-1], settings)
    return danube3.train_step(model, optimizer, input_ids, labels, settings, rate, scaler)


def run_tokens(name):
    """Tokens of a whole run of `name`."""
    return sum(stage.tokens for stage in danube3.TRAIN_CONFIGS[name].stages)


def new_model(config, device, checkpointing=False):
    """A model to train, with random weights that are made on its device."""
    model = danube3.Danube3.new(config, seed=0, device=device)
    if checkpointing:
        danube3.use_activation_checkpointing(model)
    return model


def random_model(config, kind, device):
    """A model to decode with, in bf16, int8 or int4. The weights, or the codes, are random."""
    with torch.device("meta"):
        model, packed = danube3.Danube3(config).bfloat16(), {}
        for name, bits in quantize.layout(config, int(kind[3:])).items() if kind != "bf16" else ():
            out_features, in_features = model.get_submodule(name).weight.shape
            packed[f"{name}.weight_packed"] = torch.empty(out_features, in_features * bits // 8)
        danube3.use_quantized_modules(model, packed)
    model = model.to_empty(device=device).eval()
    for weight in model.parameters():
        weight.data.normal_(mean=2 - weight.dim(), std=0.02)  # norm weights near 1, all others near 0
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(0.07 / 2 ** int(kind[3:]))  # scales, for weights of about 0.02
        else:
            buffer.random_()
    for module in model.modules():
        if hasattr(module, "make_fast"):
            module.make_fast()
    return model


def new_cache(model, length):
    return danube3.KVCache(model.config, 1, length, model.dtype, model.device)


@torch.no_grad()
def next_logits(model, ids, cache):
    """Logits of the last of `ids` [1, T], which the cache then holds. -> [1, V]"""
    return model.next_logits(ids, cache)


def train_command(data, out, device, steps, tiny):
    """A run of train.py on toy data that saves four times."""
    length, tokens, layers = (32, 256, 1) if tiny else (128, 1024, 4)
    flags = f"--tokens {steps * tokens} --tokens-per-step {tokens} --sequence-length {length}"
    flags += f" --layers {layers} --save-every {steps // 4} --learning-rate 1e-3 --device {device}"
    return [sys.executable, "train.py", "--data", str(data), "--out", str(out), *flags.split()]


# ----------------------------------------------------------------------------------------- What parts share
KINDS = ("bf16", "int8", "int4")
DATA_SHEETS = {  # part of the name: dense FLOP/s in bf16 with fp32 sums (T4: fp16), bytes/s
    "H100 80GB": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "RTX 3090": (71e12, 936e9),
    "RTX 4090": (165e12, 1008e9), "Tesla T4": (65e12, 320e9),
}  # fmt: skip


class Bench:
    """What a measurement is given: the device, a folder that all parts share, and a place for its rows."""

    def __init__(self, name, tiny, work):
        self.tiny, self.work, self.file = tiny, work, open(work / f"{name}.rows", "a")
        self.device = pick_device("cpu" if tiny else "cuda")
        self.cuda = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.memory = torch.cuda.get_device_properties(self.device).total_memory if self.cuda else 0
        self.sheet = next((figures for part, figures in DATA_SHEETS.items() if part in self.name), None)

    def write(self, **line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def row(self, what, value=None, unit="", limit=None, ok=None, note=""):
        """One row. It is a check if it has a limit, which the value must not exceed, or an `ok`."""
        if limit is not None:
            ok, note = bool(value <= limit), f"at most {limit:.3g} {note}"
        self.write(what=what, value=value, unit=unit, ok=ok, note=note)

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()


def relative_error(found, expected):
    """|found - expected| / |expected|, over all entries; very large where it is no number."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    error = ((found - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else 1e99


def best_time(bench, function):
    """Seconds of one call: the best of ten rounds of ten calls."""

    def ten_calls():
        for _ in range(10):
            function()
        bench.wait()

    ten_calls()
    return min(timeit.repeat(ten_calls, number=1, repeat=10)) / 10


def ceilings(bench):
    """Matmul peak (FLOP/s) and copy bandwidth (bytes/s, read and written), measured by the first who asks."""
    kept = bench.work / "ceilings.json"
    if not kept.exists():
        size, dtype = 8_192 if bench.cuda else 256, compute_dtype(bench.device)
        a = torch.randn(size, size, device=bench.device, dtype=dtype)
        flops = 2 * size**3 / best_time(bench, lambda: torch.mm(a, a))
        source = torch.ones(2**32 if bench.cuda else 2**24, dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / best_time(bench, lambda: target.copy_(source))
        kept.write_text(json.dumps([flops, copied]))
    return json.loads(kept.read_text())


def toy_tokens(bench, split):
    """Token ids of the toy world, which is made if it is not there yet. -> int64 [n]"""
    data = bench.work / "toy"
    if not data.exists():
        make_toy_data(data)
        quiz = (data / "quiz.jsonl").read_text().splitlines(keepends=True)
        (data / "quiz.jsonl").write_text("".join(quiz[:8]))  # train.py ends with it
    shards = [np.fromfile(path, "<u2") for path in sorted(data.glob(f"*-{split}-*.bin"))]
    return torch.from_numpy(np.concatenate(shards).astype(np.int64))


def open_both(bench, kind):
    """The reference, on the CPU in fp32, and the fast path on the device, from one folder of stored weights.

    The folders hold one model in bf16, int8 and int4: 500m's widths, four layers, a short training on toy
    data. After that its best token is often far ahead of the next, as in a real model."""
    folder, unquantized = bench.work / kind, bench.work / "bf16"
    if not unquantized.exists():
        name, steps, batch_size, rate = ("toy", 30, 8, 3e-3) if bench.tiny else ("500m", 150, 32, 6e-4)
        model = new_model(dataclasses.replace(CONFIGS[name], num_hidden_layers=4), bench.device)
        settings = train_config("toy", 128, batch_size, batch_size, learning_rate=rate)
        optimizer, ids = make_optimizer(model, settings), toy_tokens(bench, "train")
        for step in range(steps):
            batch = ids[torch.randint(len(ids) - 128, (batch_size, 1)) + torch.arange(128)]
            train_step(model, optimizer, batch, batch, settings, step)
        tokenizer = Tokenizer(bench.work / "toy" / "tokenizer.model")
        save_checkpoint(unquantized, model, tokenizer, dtype=torch.bfloat16)
    if not folder.exists():
        quantize_folder(unquantized, folder, quantize.layout(read_config(unquantized), int(kind[3:])), {})
    reference, tokenizer = load_checkpoint(folder, "cpu", torch.float32)
    return reference, load_checkpoint(folder, bench.device, fast=True)[0], tokenizer.vocab_size


# --------------------------------------------------------------------------------------------- Measurements
def show_ceilings(bench):
    dtype = compute_dtype(bench.device)
    what_and_unit = ((f"matmul, {str(dtype).removeprefix('torch.')}", "TFLOP/s"), ("copy", "TB/s"))
    for i, (what, unit) in enumerate(what_and_unit):
        value = ceilings(bench)[i]
        note = f"{value / bench.sheet[i]:.0%} of the data sheet" if bench.sheet else "no data sheet"
        bench.row(what, value / 1e12, unit, note=note)
    bench.row("matmul, as train.py measures it", measure_peak(bench.device, dtype) / 1e12, "TFLOP/s")


def one_step(model, ids, labels, settings):
    """A forward, a backward and an optimizer step in fp32. -> logits, loss, gradients, changes of weights"""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        logits = model(ids)
    optimizer, loss = make_optimizer(model, settings), model(ids, labels) / (labels[:, 1:] >= 0).sum()
    loss.backward()
    gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters()}
    optimizer.step()
    changes = [(weight.detach() - before[name]).flatten().cpu() for name, weight in model.named_parameters()]
    return logits, loss.item(), gradients, torch.cat(changes)


def compare_step(bench, name, heads, batch_size):
    """Relative errors of the device against the CPU, both in fp32 (no TF32). Then train.py's own step."""
    torch.set_float32_matmul_precision("highest")
    heads = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads))
    config = dataclasses.replace(CONFIGS[name], num_hidden_layers=2, **heads)
    length, what = 32 if bench.tiny else 1_400, f"heads of {config.head_dim}"
    settings, cpu = train_config("toy", length, batch_size), new_model(config, "cpu")
    for weight in cpu.parameters():
        if weight.dim() == 1:
            weight.data.uniform_(0.5, 1.5)  # norm weights of 1 would hide a norm that ignores them
    ids = torch.randint(3, config.vocab_size, (batch_size, length))
    labels = ids.clone()
    for i in range(batch_size):
        labels[i, : (i + 1) * length // 8] = -100
    gpu, mixed = copy.deepcopy(cpu).to(bench.device), copy.deepcopy(cpu).to(bench.device)
    found = one_step(gpu, ids.to(bench.device), labels.to(bench.device), settings)
    logits, loss, gradients, changes = one_step(cpu, ids, labels, settings)
    worst, name = max((relative_error(found[2][name], own), name) for name, own in gradients.items())
    bench.row(f"{what}: logits", relative_error(found[0], logits), limit=1e-4)
    bench.row(f"{what}: loss", abs(found[1] / loss - 1), limit=1e-5)
    bench.row(f"{what}: gradients, worst tensor", worst, limit=1e-3, note=name)
    note = "(AdamW's first step is about the sign of the gradient: rounding turns a few)"
    bench.row(f"{what}: optimizer step", relative_error(found[3], changes), limit=0.02, note=note)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    own_loss, own_norm = train_step(mixed, make_optimizer(mixed, settings), ids, labels, settings, 0)
    bench.row(f"{what}: loss, mixed precision", abs(own_loss / loss - 1), limit=2e-3)
    bench.row(f"{what}: gradient norm, mixed", abs(own_norm / norm - 1), limit=0.02)


def compare_logits(bench, kind):
    """A greedy token must be the CPU's best after the same tokens, or as close to it as errors explain."""
    (cpu, model, size), sequences = open_both(bench, kind), toy_tokens(bench, "val")[:512].view(4, 128)

    def centred(logits):  # softmax does not see the mean; ids without a token are left out
        return (logits[..., :size] - logits[..., :size].mean(-1, keepdim=True)).float().cpu()

    with torch.no_grad():
        expected, whole = centred(cpu(sequences)), centred(model(sequences.to(bench.device)))
    cache, one = new_cache(model, 128), sequences[:1].to(bench.device)
    single = centred(torch.stack([next_logits(model, one[:, t : t + 1], cache) for t in range(128)], 1))
    bench.row(f"{kind}: logits of whole sequences", relative_error(whole, expected), limit=0.03)
    bench.row(f"{kind}: logits token by token", relative_error(single, expected[:1]), limit=0.03)
    largest = max((whole - expected).abs().amax().item(), (single - expected[:1]).abs().amax().item())
    gaps = []
    for prompt in sequences[:, :32]:
        ids = generate(model, prompt[None].to(bench.device), 32).cpu()
        with torch.no_grad():
            logits = centred(cpu(ids))[0, 31:-1]  # [n, V], for the n new tokens
        gaps += (logits.amax(-1) - logits.gather(-1, ids[0, 32:, None])[:, 0]).tolist()
    note = f"(twice the largest error); {gaps.count(0)} of {len(gaps)} are the best"
    bench.row(f"{kind}: greedy token below the best", max(gaps), "logits", limit=2 * largest, note=note)


def compare_perplexity(bench, kind):
    (cpu, model, _), ids = open_both(bench, kind), toy_tokens(bench, "val")
    starts = torch.linspace(0, len(ids) - 128, 8 if bench.tiny else 48).long()[:, None]  # from all sources
    sequences = ids[starts + torch.arange(128)]
    expected, found = (math.exp(evaluate_loss(each, sequences, sequences, 8)) for each in (cpu, model))
    bench.row(f"{kind}: perplexity", found, note=f"CPU in fp32, same weights: {expected:.4f}")
    bench.row(f"{kind}: its difference", abs(found / expected - 1), limit=0.005)


def training_speed(bench, name, mode, batch_size):
    """Tokens a second, MFU and memory of training on random tokens, as train.py trains. -> tokens a second"""
    config, length, what = CONFIGS[name], CONFIGS[name].max_position_embeddings, f"{name} {mode}"
    micro = TRAIN_CONFIGS[name].micro_batch_size
    settings, checkpointing, seconds = train_config(name, length, batch_size, micro), "checkpointing" in mode, []
    if bench.cuda:
        try:
            planned = choose_checkpointing(config, settings, "auto", bench.memory)
        except DanubeError as error:
            return bench.row(what, note=f"skipped: {error}")
        if planned and checkpointing:
            return bench.row(what, note="skipped: the plan has it on, see the rows of eager")
        checkpointing = checkpointing or planned
    torch.backends.cuda.enable_cudnn_sdp("cuDNN off" not in mode)
    model = new_model(config, bench.device, checkpointing)
    if "compiled" in mode:
        compile_model(model)
        if not any(module._compiled_call_impl for module in model.modules()):
            return bench.row(what, note="not measured: there is no compiler")
    ids = torch.randint(3, config.vocab_size, (batch_size, length))
    optimizer, dtype = make_optimizer(model, settings), compute_dtype(bench.device, settings.dtype)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=dtype == torch.float16)
    for step in range(5):
        if step == 2 and bench.cuda:
            torch.cuda.reset_peak_memory_stats()  # the first two warm up, and compile
        start = time.perf_counter()
        train_step(model, optimizer, ids, ids, settings, step, scaler)
        bench.wait()
        seconds.append(time.perf_counter() - start)
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()  # 0 without CUDA
    rate = batch_size * length / sorted(seconds[2:])[1]
    note = f"{batch_size} x {length:,} a step in {dtype}, the first {seconds[0]:.0f} s"
    note += f", checkpointing {checkpointing}"
    bench.row(f"{what}: speed", rate, "tokens/s", note=note)
    flops = rate * flops_per_token(config, length)
    bench.row(f"{what}: MFU", 100 * flops / ceilings(bench)[0], "%", note="measured peak")
    share = 100 * flops / bench.sheet[0] if bench.sheet else None
    bench.row(f"{what}: MFU", share, "%", note="data sheet's peak")
    if not bench.cuda:
        bench.row(f"{what}: memory", note="not measured on a CPU")
        return rate
    planned = sum(memory_bytes(config, settings, 1, checkpointing).values())
    note = f"planned {planned / 1e9:.1f}, reserved {reserved / 1e9:.1f}"
    bench.row(f"{what}: memory", peak / 1e9, "GB", note=note)
    bench.row(f"{what}: memory over plan", peak / planned, limit=1.08, note="(the plan leaves 8 % free)")
    return rate


def training_in_full(bench, name):
    """A size that one GPU trains in an evening, compiled, with the steps of its whole run. How long is that?"""
    mode = "eager" if bench.tiny else "compiled"  # the part before it compiles the toy
    rate = training_speed(bench, name, mode, TRAIN_CONFIGS[name].batch_size)
    if rate:
        note = f"for {run_tokens(name):,} tokens, without validation and checkpoints"
        bench.row(f"{name}: the whole run", run_tokens(name) / rate / 3_600, "hours", note=note)


def decoding_speed(bench, name, kind):
    """Batch 1, as it is and compiled, on a GPU as a CUDA graph, which must give the same logits."""
    model, prompt = random_model(CONFIGS[name], kind, bench.device), torch.arange(3, 11, device=bench.device)[None]
    logits = []
    for mode in ("eager", "compiled"):
        what, note, start = f"{name} {kind} {mode}", "", time.perf_counter()
        if mode == "compiled":
            if not has_compiler():
                return bench.row(what, note="not measured: there is no compiler")
            cli.compile_decoding(model)
        cache = new_cache(model, CONFIGS[name].max_position_embeddings)
        next_logits(model, prompt, cache)
        logits.append(torch.stack([next_logits(model, prompt[:, t : t + 1], cache) for t in range(3)]))
        speed, read = measure_decoding(model)
        if mode == "compiled":
            note = f", {time.perf_counter() - start:.0f} s with compilation"
        bench.row(f"{what}: speed", speed, "tokens/s", note=f"{read / 1e9:,.1f} GB/s of weights{note}")
        note = f"{read / bench.sheet[1]:.0%} of the data sheet's" if bench.sheet else "no data sheet"
        bench.row(f"{what}: share of copy", 100 * read / ceilings(bench)[1], "%", note=note)
    cache.length = CONFIGS[name].max_position_embeddings - 40
    next_logits(model, prompt[:, :1], cache)
    start = time.perf_counter()
    for _ in range(32):
        next_logits(model, prompt[:, :1], cache)
    bench.wait()
    bench.row(f"{what}: speed, full context", 32 / (time.perf_counter() - start), "tokens/s")
    bench.row(f"{what}: logits", relative_error(logits[1], logits[0]), limit=0.03)


def int4_products(bench, name):
    """One token through PyTorch's int4 kernel, and through the loop of other layers: which is the better way?"""
    config = CONFIGS[name]
    linear = QuantizedLinear(config.intermediate_size, config.hidden_size, 4).to(bench.device)
    linear.weight_packed.random_()
    linear.weight_scale.fill_(0.005)
    x = torch.randn(1, config.hidden_size, device=bench.device, dtype=torch.bfloat16)
    compiled = torch.compile(cli.VectorProduct(linear), fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected = linear(x)
        bytes_read, error = 0.5625 * linear.out_features * linear.in_features, relative_error(compiled(x), expected)
        bench.row("a compiled loop", bytes_read / best_time(bench, lambda: compiled(x)) / 1e9, "GB/s")
        bench.row("its difference to eager", error, limit=0.02)
        linear.make_fast()
        bench.row("PyTorch's kernel", bytes_read / best_time(bench, lambda: linear(x)) / 1e9, "GB/s")
        bench.row("its difference to eager", relative_error(linear(x), expected), limit=0.02)


def attention_used(bench, name, phase):
    """The attention operations of a phase, and its kernels on a GPU. cuDNN's is for pre-training only. On a
    GPU none may be "math", which stores all attention scores."""
    config, length = dataclasses.replace(CONFIGS[name], num_hidden_layers=2), 64 if bench.tiny else 8_192
    end = length if phase == "pre-train" else length * 3 // 4 + 1
    start = {"prefill": 0, "8 after a cache": end - 8, "decode": end - 1}.get(phase)
    ids = torch.randint(3, config.vocab_size, (1, end))
    wrong = phase == "pre-train" and torch.backends.cuda.cudnn_sdp_enabled()  # pick_device switches it off
    if start is None:
        model, settings = new_model(config, bench.device), train_config(name, end, 1)
        optimizer = make_optimizer(model, settings)
    else:
        model = random_model(config, "bf16", bench.device)
        cache = new_cache(model, end)

    def run():
        if start is None:
            return train_step(model, optimizer, ids, ids, settings, 0)
        cache.length = start
        return next_logits(model, ids[:, start:].to(bench.device), cache)

    torch.backends.cuda.enable_cudnn_sdp(phase == "pre-train")  # as train.py does
    run()
    with torch.profiler.profile() as profiler:  # all that it knows: CPU, and CUDA where it is
        run()
        bench.wait()
    names, prefix = [event.key for event in profiler.key_averages()], "aten::_scaled_dot_product_"
    used = " + ".join(sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix)))
    kernels = [name for name in names if "fmha" in name or "flash_" in name or "sdpa" in name]
    kernels = sorted(name[:70] for name in kernels if "aten::" not in name)
    wrong = wrong or ("cudnn" in used and phase != "pre-train") or ("math" in used and bench.cuda)
    bench.row(f"{phase}, {end:,} tokens", ok=bool(used) and not wrong, note="; ".join([used, *kernels[:3]]))


def json_lines(path):
    """The objects of a file, one a line, as far as it is written."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses_of(out):
    return {line["step"]: line["loss"] for line in json_lines(out / "metrics.jsonl") if "loss" in line}


def kill_and_resume(bench):
    """Runs of the real train.py: one undisturbed, one killed between two checkpoints and resumed."""
    toy_tokens(bench, "train")  # makes the data
    steps, outs = 40 if bench.tiny else 80, (bench.work / "whole", bench.work / "killed")
    commands = [train_command(bench.work / "toy", out, bench.device, steps, bench.tiny) for out in outs]
    subprocess.run(commands[0], cwd=ROOT, check=True)
    process = subprocess.Popen(commands[1], cwd=ROOT)  # in the part's process group: its limit holds here too
    while process.poll() is None and max(losses_of(outs[1]), default=0) < steps * 3 // 8:
        time.sleep(0.005)
    process.kill()
    ended, reached = process.wait(), max(losses_of(outs[1]), default=0)
    killed = ended == -signal.SIGKILL and reached < steps
    bench.row("killed after step", reached, ok=killed, note=f"of {steps}")
    saved = max(int(path.name[5:]) for path in outs[1].glob("step-*[0-9]"))
    subprocess.run([*commands[1], "--resume"], cwd=ROOT, check=True)
    losses, again = losses_of(outs[0]), losses_of(outs[1])
    complete = list(losses) == list(again) == list(range(1, steps + 1))
    bench.row("resumed from step", saved, ok=complete and saved <= reached, note="each step is logged once")
    difference = [abs(again[step] / losses[step] - 1) for step in range(saved + 1, steps + 1)]
    bench.row("loss of the next step", difference[0], limit=1e-3, note="(difference to the undisturbed run)")
    bench.row("loss of the last ten steps", max(difference[-10:]), limit=0.02, note="(largest difference)")


def fail(bench, seconds):
    bench.row("before the fault", 1)
    time.sleep(seconds)
    raise ValueError("as the test asks")


def all_parts(tiny):
    """{part: (seconds that it may take, function, the arguments of each of its measurements)}"""
    name, large, batch_size = ("toy", "toy", 2) if tiny else ("500m", "4b", 8)
    heads = ((2, 1, 64), (4, 2, 30)) if tiny else ((16, 8, 96), (32, 8, 120))  # those of 500m and 4b
    modes = ("eager", "compiled", "eager, cuDNN off")
    modes_4b = ("eager", "eager, checkpointing") if tiny else ("eager", "eager, checkpointing", "compiled")
    phases = ("pre-train", "fine-tune", "prefill", "8 after a cache", "decode")
    kinds, sizes = [(kind,) for kind in KINDS], dict.fromkeys((name, large))
    parts = {
        "ceilings": (60, show_ceilings, [()]),
        "fp32": (80, compare_step, [(name, heads[0], 3), (name, heads[1], 1)]),  # 3 x 1,400: loss in blocks
        "logits": (100, compare_logits, kinds),
        "perplexity": (80, compare_perplexity, kinds),
        "training": (180, training_speed, [(name, mode, batch_size) for mode in modes]),
        "training-60m": (120, training_in_full, [("toy" if tiny else "60m",)]),
        "decoding": (150, decoding_speed, [(name, kind) for kind in KINDS]),
        "int4": (60, int4_products, [(size,) for size in sizes]),
        "attention": (60, attention_used, [(name, phase) for phase in phases]),
        "resume": (120, kill_and_resume, [()]),
        "training-4b": (150, training_speed, [(large, mode, batch_size // 2) for mode in modes_4b]),
        "decoding-4b": (250, decoding_speed, [(large, kind) for kind in KINDS]),
    }
    faults = {"raises": (60, fail, [(0,)]), "sleeps": (15, fail, [(600,)])}
    return {**faults, **parts} if os.environ.get("BENCH_GPU_FAULTS") else parts  # for the test


# ----------------------------------------------------------------------------------- Parent and child process
TOTAL = 570  # seconds of all parts together
STOPPED = "stopped by a signal"


def run_child(name, tiny, work):
    """One part, in a process of its own. A measurement that fails does not stop those after it."""
    bench, (_, function, calls) = Bench(name, tiny, work), all_parts(tiny)[name]
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    bench.write(machine=f"{bench.name}, {bench.memory / 1e9:.0f} GB, {versions}, {os.cpu_count()} CPU cores")
    for arguments in calls:
        torch.manual_seed(0)
        try:
            function(bench, *arguments)
        except Exception as error:
            traceback.print_exc()
            what, note = " ".join(map(str, arguments)), f"{type(error).__name__}: {error}".splitlines()[0]
            bench.row(what, ok=False, note=note[:300])
        gc.collect()
        torch.cuda.empty_cache()


def run_part(name, limit, tiny, work):
    """Run a part and kill it at its limit. -> what became of it, with its rows"""
    start, log = time.monotonic(), work / f"{name}.log"
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--work", str(work)]
    environment = dict(os.environ)
    if tiny:
        command.append("--tiny")
        environment["OMP_NUM_THREADS"] = "1"  # small operations, on machines that others use too
    files = {"stdout": open(log, "w"), "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **files)
    try:
        code = process.wait(limit)
        error = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        error = f"killed at its limit of {limit:.0f} s"
    except KeyboardInterrupt:
        error = STOPPED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
    lines, text = json_lines(work / f"{name}.rows"), log.read_text(errors="replace")[-4_000:]
    rows = [line for line in lines if "what" in line]
    if error:
        last = text.strip().splitlines()[-1:] if "exit" in error else []
        note = ": ".join([error, *last])[:300]
        rows.append({"what": "the part", "value": None, "unit": "", "ok": False, "note": note})
    machine = next((line["machine"] for line in lines if "machine" in line), "machine unknown")
    seconds = round(time.monotonic() - start, 1)
    return {"part": name, "seconds": seconds, "error": error, "rows": rows, "machine": machine, "log": text}


def print_rows(result):
    for row in result["rows"]:
        value, verdict = row["value"], {True: "ok", False: "FAIL", None: ""}[row["ok"]]
        if isinstance(value, float):
            value = f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"
        line = f"{result['part']:13}{row['what']:34}{'-' if value is None else value:>9} {row['unit']:9}"
        print(f"{line}{verdict:5}{row['note']}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    parser.add_argument("--only", action="append", choices=all_parts(False), help="one part; again for more")
    parser.add_argument("--tiny", action="store_true", help="every part on the CPU, with small models")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(args.child, args.tiny, args.work)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device here: --tiny runs every part on the CPU")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the rows so far are kept
    start, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as work:
        for name, (seconds, *_) in all_parts(args.tiny).items():
            if args.only and name not in args.only:
                continue
            limit = max(1, min(seconds, start + TOTAL - time.monotonic()))
            results.append(run_part(name, limit, args.tiny, Path(work)))
            print_rows(results[-1])
            if args.json:  # after every part: a run that is stopped leaves what it has
                args.json.write_text(json.dumps({"tiny": args.tiny, "parts": results}, indent=1))
            if results[-1]["error"] == STOPPED:
                break
    print(results[0]["machine"])
    print("seconds:", ", ".join(f"{result['part']} {result['seconds']:.0f}" for result in results))
    wrong = sum(row["ok"] is False for result in results for row in result["rows"])
    print(f"failed: {wrong} of {sum(len(result['rows']) for result in results)} rows")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
