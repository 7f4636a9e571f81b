"""See inside a model: `python tests/look.py out/toy "Orsa Tarbeck keeps a tame crow."` writes out/look.html.

The page opens in any browser, without a server or a network. All its numbers come from danube3.py's own
functions, or from hooks in its forward pass. tests/look.html is its template."""

import argparse
import base64
import json
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python tests/look.py` finds it
import danube3  # noqa: E402
import sample  # noqa: E402
from danube3 import Danube3, Tokenizer, reading, require  # noqa: E402
from data.cli import Arguments, run_command  # noqa: E402
from data.read import check_turns, read_jsonl  # noqa: E402

MAX_TOKENS = 512  # a page with more would be too large
ALTERNATIVES = 5  # of each token
DISTANCES = 129  # of the rotary curves
MAX_STEPS = 2_000  # of a run: longer runs are thinned out

# ---- One forward pass

def attention_weights(attention: danube3.Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The weights of each query head on all tokens: with an identity matrix as values, attention returns
    them. x [1, T, D], cos and sin [T, h/2] -> [H, T, T]"""
    q, k, _ = attention.heads(x, cos, sin)  # [1, H, T, h], [1, K, T, h]
    identity = torch.eye(x.shape[1]).expand(1, k.shape[1], -1, -1)  # [1, K, T, T]
    return danube3.grouped_query_attention(q, k, identity)[0]

def rotary_scores(attention: danube3.Attention, x: Tensor, theta: float) -> Tensor:
    """The score of the text's mean query and mean key at each distance. It is linear in both, so it is also
    the mean over all pairs of tokens, if all stood at that distance. x [1, T, D] -> [H, DISTANCES]"""
    h = attention.head_dim
    unrotated = danube3.rotary_table(torch.zeros(x.shape[1]), h, theta)  # all at position 0
    q, k, _ = attention.heads(x, *unrotated)
    q, k = q.mean(2, keepdim=True), k.mean(2, keepdim=True)  # [1, H, 1, h], [1, K, 1, h]
    table = danube3.rotary_table(torch.arange(DISTANCES), h, theta)  # of the query; the key stays at 0
    q = danube3.rotary_embedding(q.expand(-1, -1, DISTANCES, -1), *table)  # [1, H, DISTANCES, h]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [1, H, 1, h]
    return (q * k).sum(-1)[0] / math.sqrt(h)

@torch.no_grad()
def record(model: Danube3, ids: list[int]) -> dict[str, Tensor]:
    """One forward pass, and what hooks saw of it (n layers):
    logits [T, V]; stream [n + 1, T, D], the residual stream after the embedding and after each layer;
    attention and mlp [n, T, D], what the branches added; weights [n, H, T, T]; rotary [n, H, DISTANCES]"""
    decoder: Any = model.model
    seen: dict[str, list[Tensor]] = {"stream": [], "attention": [], "mlp": [], "weights": [], "rotary": []}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen[name].append(output[0])

    def look_at_heads(attention: danube3.Attention, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, cos, sin = args[:3]
        seen["weights"].append(attention_weights(attention, x, cos, sin))
        seen["rotary"].append(rotary_scores(attention, x, model.config.rope_theta))

    handles = [decoder.embed_tokens.register_forward_hook(keep("stream"))]
    for layer in decoder.layers:
        handles.append(layer.self_attn.register_forward_hook(keep("attention")))
        handles.append(layer.self_attn.register_forward_hook(look_at_heads))
        handles.append(layer.mlp.register_forward_hook(keep("mlp")))
        handles.append(layer.register_forward_hook(keep("stream")))
    logits = model(torch.tensor([ids]))[0]
    for handle in handles:
        handle.remove()
    require(logits.isfinite().all(), "the logits are not finite: try another checkpoint")
    return {"logits": logits, **{name: torch.stack(tensors) for name, tensors in seen.items()}}

@torch.no_grad()
def lens(model: Danube3, x: Tensor) -> Tensor:
    """The **logit lens**: the prediction that the model would make if it ended here. The last norm and the
    head read the residual stream of an earlier layer. [T, D] -> probabilities [T, V]"""
    return danube3.next_token_probabilities(model.lm_head(model.model.norm(x)), 1.0)

def token_losses(logits: Tensor, ids: list[int]) -> list[float]:
    """The loss of each token but the first, which nothing predicts. [T, V] -> T - 1 numbers"""
    losses, labels = [], torch.tensor(ids)
    for t in range(1, len(ids)):
        losses.append(danube3.cross_entropy(logits[t - 1:t], labels[t:t + 1]).item())
    return losses

# ---- What the page gets of it

def rounded(tensor: Tensor, digits: int = 4) -> Any:
    """Nested lists. In double precision, 0.1 stays short."""
    return tensor.double().round(decimals=digits).tolist()

def pack_weights(weights: Tensor) -> str:
    """Lower triangles of [n, H, T, T], row by row: thousandths as 16-bit integers, compressed, in base64."""
    rows, columns = torch.tril_indices(weights.shape[2], weights.shape[3])
    thousandths = (weights[:, :, rows, columns] * 1_000).round().to(torch.int16)  # [n, H, T (T + 1) / 2]
    return base64.b64encode(zlib.compress(thousandths.numpy().astype("<i2").tobytes())).decode()

def label(tokenizer: Tokenizer, token_id: int) -> list[str]:
    """-> what to show of a token, and its kind"""
    sp = tokenizer.sp
    if token_id >= tokenizer.vocab_size:  # a model may have more ids
        return [f"id {token_id}", "special"]
    kind = "special" if sp.is_control(token_id) or sp.is_unknown(token_id) else "text"
    return [sp.id_to_piece(token_id), "byte" if sp.is_byte(token_id) else kind]

def describe_tokens(logits: Tensor, ids: list[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Each token: id, label, its loss, the likeliest tokens in its place, and the text that it completes
    (a character may have four bytes, and each byte is a token)."""
    probabilities = danube3.next_token_probabilities(logits, 1.0)  # [T, V]
    likeliest = probabilities.topk(min(ALTERNATIVES, logits.shape[1]))
    losses = [None, *token_losses(logits, ids)]
    detokenizer, tokens = danube3.StreamingDetokenizer(tokenizer, []), []
    for t, token_id in enumerate(ids):
        best = []
        if t > 0:  # the logits before a token predict it
            for value, other in zip(rounded(likeliest.values[t - 1]), likeliest.indices[t - 1].tolist()):
                best.append([label(tokenizer, other), value])
        tokens.append({"id": token_id, "label": label(tokenizer, token_id), "loss": losses[t], "best": best,
                       "completes": detokenizer.push(token_id)})
    return tokens

def describe_lens(model: Danube3, stream: Tensor, ids: list[int], tokenizer: Tokenizer) -> list[Any]:
    """For each layer and token: label and probability of the layer's best guess for the next token, and the
    probability of the token that does come next, if there is one. [n + 1, T, D] -> [n + 1][T]"""
    layers = []
    for x in stream:
        probabilities = lens(model, x)  # [T, V]
        best = probabilities.max(-1)
        follows = probabilities[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]  # [T - 1]
        guesses = [label(tokenizer, token_id) for token_id in best.indices.tolist()]
        layers.append(list(zip(guesses, rounded(best.values), [*rounded(follows), None])))
    return layers

def look(model: Danube3, tokenizer: Tokenizer, ids: list[int], labels: list[int]) -> dict[str, Any]:
    """Everything about one model and one text. `labels` are as in training."""
    seen, config = record(model, ids), model.config
    tokens = describe_tokens(seen["logits"], ids, tokenizer)
    for token, own_label in zip(tokens, labels):
        token["target"] = own_label != danube3.IGNORE_INDEX
    batch = torch.tensor([ids]), torch.tensor([labels])
    cos, sin = danube3.rotary_table(torch.ones(1), config.head_dim, config.rope_theta)  # angles per token
    return {
        **asdict(config), "tokens": tokens, "weights": pack_weights(seen["weights"]),
        "mean_loss": danube3.evaluate_loss(model, batch[0], batch[0], 1),
        "target_loss": danube3.evaluate_loss(model, *batch, 1),
        **{name: rounded(seen[name].norm(dim=-1), 3) for name in ("stream", "attention", "mlp")},
        "lens": describe_lens(model, seen["stream"], ids, tokenizer),
        "rotary": rounded(seen["rotary"], 3), "turns": rounded(2 * math.pi / torch.atan2(sin, cos)[0], 1)}

def compare(tokens: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, float]:
    """The sums of two models' losses on the same tokens, and the share whose loss is higher in the second."""
    first, second = [token["loss"] for token in tokens], [token["loss"] for token in others]
    worse = sum(b > a for a, b in zip(first, second))
    return {"count": len(first), "first": sum(first), "second": sum(second), "worse": worse / len(first)}

def look_beside(path: str, tokenizer: Tokenizer, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """What a second model makes of the same tokens: of all, and of those that carry loss in fine-tuning."""
    model, other_tokenizer = danube3.load_checkpoint(path, dtype=torch.float32)
    require(other_tokenizer.sha256 == tokenizer.sha256, f"{path} has another tokenizer than the first model, "
            "so its losses are of other tokens: choose a model with the same")
    ids = [token["id"] for token in tokens]
    others = describe_tokens(record(model, ids)["logits"], ids, tokenizer)
    pairs = [(token, other) for token, other in zip(tokens, others) if other["loss"] is not None]
    targets = [pair for pair in pairs if pair[0]["target"]]
    return {"name": path, "tokens": others, "all": compare(*zip(*pairs)), "targets": compare(*zip(*targets))}

def read_run(out: Path) -> dict[str, Any]:
    """The curves of a training run, from metrics.jsonl. Mixtures are in the newest checkpoint, if any."""
    steps, checks, stages, mixtures = [], [], dict[str, int](), dict[str, Any]()
    entries = read_jsonl(out / "metrics.jsonl")
    with reading(out / "metrics.jsonl"):
        for entry in entries:
            stages[entry["stage"]] = entry["tokens"]  # in the end, where the stage ends
            if "val_loss" in entry:
                checks.append([entry["tokens"], entry["val_loss"]])
            else:
                steps.append([entry["tokens"], entry.get("loss"), entry["lr"], entry.get("grad_norm")])
    for folder in danube3.checkpoints_in(out)[-1:]:
        state = danube3.read_json(folder / "training_state.json")
        for stage in state.get("run_config", {}).get("stages", []):
            mixtures[stage["name"]] = stage["mixture"]
    require(steps, f"{out} has no training steps yet: look again when it has")
    steps = steps[::math.ceil(len(steps) / MAX_STEPS)]
    return {"name": str(out), "steps": steps, "checks": checks, "stages": stages, "mixtures": mixtures}

# ---- The program

def write_page(path: Path, data: dict[str, Any]) -> None:
    """Put data into the template. As JSON all is ASCII; without <, > and & no text ends its element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    template = Path(__file__).with_name("look.html").read_text(encoding="utf-8")
    path.write_text(template.replace("DATA", text, 1), encoding="utf-8")

def encode(args: argparse.Namespace, model: Danube3, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """-> ids and labels of the text or of the conversation. A last question is answered by the model."""
    if args.chat:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(args.chat)]
        if len(check_turns(messages)) % 2:
            answer, _ = sample.answer_all(model, tokenizer, [messages])[0]  # greedy
            messages.append({"role": "assistant", "content": answer})
        return danube3.render_chat(messages, tokenizer)
    ids = tokenizer.encode_prompt(args.text)
    return ids, ids

def arguments() -> argparse.Namespace:
    parser = Arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint, or an output directory")
    parser.add_argument("text", nargs="?", help="the text to show, of at most 512 tokens")
    parser.add_argument("--chat", nargs="+", metavar="TURN", help="show a conversation instead of a text: "
                        "question, answer, question, ..; the model answers a last question itself")
    parser.add_argument("--beside", metavar="OTHER", help="a second checkpoint: compare its losses")
    parser.add_argument("--run", type=Path, help="an output directory: show its training curves too")
    parser.add_argument("--out", type=Path, default=Path("out/look.html"), help="the page to write")
    args = parser.parse_intermixed_args()
    if args.checkpoint is None and (args.run is None or args.beside or args.chat):
        parser.error("give a checkpoint and a text, or only --run and an output directory")
    if args.checkpoint and (args.text is None) == (args.chat is None):
        parser.error("give a checkpoint either a text, or --chat and a question")
    require(args.out.parent.is_dir() and not args.out.is_dir(),
            f"{args.out} is a folder, or lies in none that exists: name a file with --out")
    return args

def main() -> None:
    args = arguments()
    data: dict[str, Any] = {"name": args.checkpoint, "chat": bool(args.chat)}
    if args.run:
        data["run"] = read_run(args.run)
    if args.checkpoint:  # in fp32: two models then differ by their weights, not by rounding
        model, tokenizer = danube3.load_checkpoint(args.checkpoint, dtype=torch.float32)
        ids, labels = encode(args, model, tokenizer)
        limit = min(MAX_TOKENS, model.config.max_position_embeddings)
        require(2 <= len(ids) <= limit, f"the text has {len(ids)} tokens: use 2 to {limit}")
        data["look"] = look(model, tokenizer, ids, labels)
    if args.beside:
        data["beside"] = look_beside(args.beside, tokenizer, data["look"]["tokens"])
    write_page(args.out, data)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes; open it in a browser")

if __name__ == "__main__":
    run_command(main)
