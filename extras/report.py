"""What a run has come to: its curves, a sample of its words, its scores; sizes and speeds of a quantized model."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import danube3
from danube3 import ChatData, Danube3, DanubeConfig, DanubeError, Recipe, StagedData, Tokenizer


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


def as_table(results: dict[str, float]) -> str:
    """The scores of danube3.evaluate, a line each."""
    return "\n".join(f"{name:24}{value:>12,}" if isinstance(value, int) else f"{name:24}{value:>12.4f}"
                     for name, value in results.items())


def report_run(model: Danube3, tokenizer: Tokenizer, data: StagedData | ChatData, out: Path, quiz: Path) -> None:
    """What a run has come to: curves, a few words from a model that continues text, and the quiz where there is one."""
    if curves := plot_curves(out, data.recipe):
        print(f"curves in {curves}")
    for seed in range(2) if isinstance(data, StagedData) else ():
        prompt = torch.tensor([tokenizer.encode_prompt("")], device=model.device)
        ids = danube3.generate(model, prompt, 80, temperature=0.7, top_p=0.9, seed=seed)[0].tolist()
        print(f"--- a sample\n{tokenizer.decode(ids)}")
    if quiz.is_file():
        print(f"--- {quiz}\n{as_table(danube3.evaluate(model, tokenizer, quiz))}")


def sample_rows(data: str | Path, tokenizer: Tokenizer, config: DanubeConfig, split: str, count: int) -> Tensor:
    """About `count` rows [N, T] of ids to calibrate ("train") or measure ("val") with: as many from each source of a
    data folder, or from a text file, whose last tenth is "val". T is half of the context, at most 2,048 [C]."""
    length = min(config.max_position_embeddings // 2, 2_048)
    if Path(data).is_dir():
        folder = danube3.matching_data(data, tokenizer, config, length)
        sources = [folder.open(name, split) for name in folder.meta["sources"]]
        share = -(-count // len(sources))  # of each source
        windows = [source.window(i * source.windows // min(share, source.windows))
                   for source in sources for i in range(min(share, source.windows))]
        return torch.from_numpy(np.stack(windows))
    ids = torch.tensor(tokenizer.encode(danube3.read_text(data)))
    ids = ids[:len(ids) * 9 // 10] if split == "train" else ids[len(ids) * 9 // 10:]
    if len(ids) < length:
        raise DanubeError(f"{data} has {len(ids)} tokens to {split} with, less than a row of {length}: use more text")
    return ids[:len(ids) // length * length].view(-1, length)[:count]


def stored_tensors(model: Danube3) -> Iterator[tuple[str, Tensor]]:
    """All that a model holds, packed or not."""
    for name, module in model.named_modules():
        own = getattr(module, "packed", None) or [*module.parameters(False), *module.buffers(False)]
        yield from ((name, tensor) for tensor in own)


@torch.no_grad()
def measure_decoding(model: Danube3, tokens: int = 64) -> tuple[float, float]:
    """Tokens a second, one at a time after a prompt of 8, and the bytes of weights read for them a second; the best of
    three times."""
    next_ids, best = torch.full((1, 8), model.config.bos_token_id, device=model.device), math.inf
    for _ in range(3):
        kv_cache = danube3.KVCache(model.config, 1, 8 + tokens, model.dtype, model.device)
        model.model(next_ids.expand(1, 8), kv_cache)
        start = time.perf_counter()
        for _ in range(tokens):
            next_ids = model.lm_head(model.model(next_ids[:, -1:], kv_cache)[:, -1]).argmax(-1, keepdim=True)  # [1, 1]
        next_ids.item()  # waits for the device
        best = min(best, (time.perf_counter() - start) / tokens)
    return 1 / best, sum(t.nbytes for name, t in stored_tensors(model) if "embed_tokens" not in name) / best


def compare(folders: dict[str, Path], data: str) -> None:
    """A table like the model cards' for Q8_0 and Q4_K_M, of this model and this text; `change` is against the first
    row."""
    print(f"\n{'':8}{'bytes':>16}{'bits/weight':>13}{'perplexity':>12}{'change':>9}{'tokens/s':>10}{'GB/s':>7}  quiz")
    first = None
    for name, folder in folders.items():
        model, tokenizer = danube3.load_checkpoint(folder, dtype=torch.bfloat16 if name == "bf16" else None)
        size = sum(tensor.nbytes for _, tensor in stored_tensors(model))
        rows = sample_rows(data, tokenizer, model.config, "val", 256)
        quiz = Path(data, "quiz.jsonl")
        fast = model if name == "bf16" else danube3.load_checkpoint(folder, pack=True)[0]
        speed, bandwidth = measure_decoding(fast)
        perplexity = math.exp(danube3.mean_loss(model.float(), rows, rows, 8))
        first = first or perplexity
        score = f"{danube3.evaluate(model, tokenizer, quiz)['acc']:.1%}" if quiz.is_file() else "-"
        print(f"{name:8}{size:>16,}{8 * size / danube3.count_parameters(model.config):>13.2f}{perplexity:>12.4f}"
              f"{perplexity / first - 1:>9.2%}{speed:>10.1f}{bandwidth / 1e9:>7.2f}  {score}")
