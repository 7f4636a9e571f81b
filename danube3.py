"""H2O-Danube3 (arXiv 2407.09276) in one file, from tokens to a quantized chat model.

The models of 500 million and 4 billion parameters have the Llama architecture. In three stages
of pre-training, noisy web text gives way to cleaner text.

Letters in shape comments; "[B, T, D]" is a shape, "[]" a number, N any number:

    B  batch                     D  hidden_size         H  query heads
    T  sequence length           I  intermediate_size   K  key/value heads
    S  keys: cached and new      V  vocab_size          h  head_dim

[paper] marks facts from the report, its model cards or published configurations, [ours] our choices.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sized
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as activation_checkpoint
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

# Call cos once, in one thread: a first call by several is less exact (pytorch issue 188792).
torch.zeros(1).cos().sin()

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Batch = tuple[Tensor, Tensor]  # input_ids and labels, 2 x [N, T]
Messages = list[dict[str, str]]  # [{"role": "user", "content": ..}, ..]
Tensors = dict[str, Tensor]  # by name

class DanubeError(Exception):
    """A mistake that the user can fix, in one line."""

def require(condition: object, message: str) -> None:
    if not condition:
        raise DanubeError(message)

@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:  # errors become one line with the path
    try:
        pointer = path.is_file() and path.open("rb").read(15) == b"version https:/"
        require(not pointer, f"{path} is a Git-LFS pointer: run `git lfs pull`, or download the file")
        yield
    except (DanubeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DanubeError(f"{path} is missing or damaged ({reason}): copy it again") from error

def is_recent_gpu(device: torch.device) -> bool:
    """NVIDIA's GPUs from capability 8 on compute in bf16 and have FlashAttention."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8

# ==== 1. Configuration ====

@dataclass(frozen=True)
class DanubeConfig:
    """The architecture, in the names of config.json. Trap: H * h equals D in all models, but need not."""
    hidden_size: int  # D
    intermediate_size: int  # I
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # h
    initializer_range: float  # standard deviation of initial weights
    vocab_size: int = 32_000  # V
    max_position_embeddings: int = 8_192  # the context: the longest sequence
    rope_theta: float = 100_000.0  # base of the rotary frequencies
    rms_norm_eps: float = 1e-5
    bos_token_id: int = 1  # <s>
    eos_token_id: int = 2  # </s>
    pad_token_id: int = 0  # <unk>

    def __post_init__(self) -> None:
        for field in fields(self):
            value, is_id = getattr(self, field.name), field.name.endswith("_token_id")
            smallest, limit = (0, self.vocab_size) if is_id else (1e-30, 2**24)
            require(type(value) in (int, field.type) and smallest <= value < limit,
                    f"config: {field.name} is {value!r}: use {smallest:g} to below {limit:,}")
        require(self.num_hidden_layers < 1_024, "config: num_hidden_layers must be below 1,024")
        require(self.head_dim % 2 == 0, "config: head_dim must be even")
        require(self.num_attention_heads % self.num_key_value_heads == 0,
                "config: num_attention_heads must be a multiple of num_key_value_heads")

@dataclass(frozen=True)
class Stage:
    """A stage of pre-training. Its mixture gives each **source** (dataset or domain) a weight."""
    name: str
    tokens: int
    mixture: dict[str, int]

@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained [ours]: Danube3's settings are not published. Betas and cosine
    are from the first Danube report (arXiv 2401.16818), except in the toy.

    An **optimizer step** reads a **global batch** of `batch_size` sequences, in **micro-batches**
    that fit into memory. Their gradients are summed (**gradient accumulation**)."""
    batch_size: int  # over all GPUs
    micro_batch_size: int  # B: sequences per pass on one GPU
    learning_rate: float  # the peak
    stages: tuple[Stage, ...] = ()  # pre-training only
    sequence_length: int = 1  # T; for conversations the longest
    final_lr_fraction: float = 0.0  # of the peak, in the last step
    warmup_fraction: float = 0.01  # of all steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 1.0  # larger gradients are scaled down
    save_every: int = 1_000  # steps between checkpoints, at most
    dtype: str = "auto"  # of products: see compute_dtype
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "sequence_length", "save_every"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1")
        require(0 < self.learning_rate < math.inf, "the learning rate must be positive")
        require(0 <= self.seed < 2**63, "the seed must be 0 to 2^63 - 1")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def stage_ends(self) -> list[int]:  # in steps, rounded
        ends, tokens, per_step = [], 0, self.tokens_per_step
        for stage in self.stages:
            tokens += stage.tokens
            ends.append((tokens + per_step // 2) // per_step)
        return ends

    def with_tokens(self, total: int) -> "TrainConfig":
        old_total = sum(stage.tokens for stage in self.stages)
        stages = [replace(stage, tokens=stage.tokens * total // old_total) for stage in self.stages]
        return replace(self, stages=tuple(stages))

# Weights in stages 1, 2, 3, in thousandths. Web's are [paper], the others (in a figure only) [ours].
SOURCES = ("web", "wikipedia", "academic", "synthetic", "instruct", "other")
MIXTURES = ((906, 18, 18, 18, 30, 10), (817, 35, 35, 38, 55, 20), (516, 80, 80, 94, 190, 40))

def three_stages(*tokens: float) -> tuple[Stage, ...]:  # tokens of each
    stages: list[Stage] = []
    for count, weights in zip(tokens, MIXTURES):
        stages.append(Stage(f"stage {len(stages) + 1}", int(count), dict(zip(SOURCES, weights))))
    return tuple(stages)

CONFIGS = {
    "toy": DanubeConfig(  # [ours] few heads: small products are slow on CPUs
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, initializer_range=0.04, vocab_size=1_024,
        max_position_embeddings=256),
    "60m": DanubeConfig(  # [ours] the proportions of 500m
        hidden_size=512, intermediate_size=1408, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, initializer_range=0.02, max_position_embeddings=2_048),
    "500m": DanubeConfig(  # [paper]
        hidden_size=1536, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=8, head_dim=96, initializer_range=0.02),
    "4b": DanubeConfig(  # [paper]
        hidden_size=3840, intermediate_size=10240, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=8, head_dim=120, initializer_range=0.01),
}
# The totals 4T and 6T are [paper]. The stage lengths are from memory, unchecked.
TRAIN_CONFIGS = {
    "toy": TrainConfig(stages=three_stages(0.9e6, 0.45e6, 0.45e6), sequence_length=128, batch_size=8,
        micro_batch_size=8, learning_rate=3e-3, warmup_fraction=0.04, beta2=0.99, save_every=400),
    "60m": TrainConfig(stages=three_stages(1.05e9, 0.43e9, 0.02e9), sequence_length=2_048, batch_size=64,
        micro_batch_size=8, learning_rate=1e-3, final_lr_fraction=0.01),
    "500m": TrainConfig(stages=three_stages(2.8e12, 1.15e12, 0.05e12), sequence_length=8_192, batch_size=256,
        micro_batch_size=4, learning_rate=4e-4, final_lr_fraction=0.01),
    "4b": TrainConfig(stages=three_stages(4.6e12, 1.35e12, 0.05e12), sequence_length=8_192, batch_size=512,
        micro_batch_size=1, learning_rate=2e-4, final_lr_fraction=0.01),
}

def count_parameters(config: DanubeConfig) -> int:
    """513,590,784 for 500m and 3,961,839,360 for 4b [paper]."""
    D, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    attention = 2 * D * heads * config.head_dim  # q, o; k, v
    mlp = 3 * D * config.intermediate_size  # gate, up, down
    layers = config.num_hidden_layers * (attention + mlp + 2 * D)  # two norms
    return layers + D + 2 * config.vocab_size * D  # last norm; embedding, head

def flops_per_token(config: DanubeConfig, sequence_length: int, frozen: bool = False) -> int:
    """Floating-point operations of training, per token. A weight costs two forward (multiply, add),
    two backward for the gradient of its inputs, and two for its own unless it is **frozen**
    (section 10). Attention costs 4 h per (head, query, key): score and weighted sum. All T keys
    count, as usual, although a query attends to half on average."""
    layers, D = config.num_hidden_layers, config.hidden_size
    weights = count_parameters(config) - config.vocab_size * D - (2 * layers + 1) * D  # no embedding, norms
    attention = layers * config.num_attention_heads * 4 * config.head_dim * sequence_length
    return (2 if frozen else 3) * 2 * weights + 3 * attention

# ==== 2. Tokenizer and chat template ====
#
# The Mistral tokenizer [paper] is a **byte-pair encoding** (BPE) by sentencepiece. Training
# starts from characters and merges the most frequent pair of neighbours until there are 32,000
# tokens. Encoding makes the same merges. Every byte is a token too, so any text can be encoded.
#
# <s> begins and </s> ends a document [ours]. No text is encoded to these **special tokens**: a
# typed "</s>" becomes ordinary tokens, so nobody can type the end of a chat message.

class Tokenizer:
    """A sentencepiece model. With `add_bos`, prompts begin with <s>."""
    def __init__(self, model_file: str | Path, add_bos: bool = True):
        self.model_file, self.add_bos, self.chat_template = Path(model_file), add_bos, CHAT_TEMPLATE
        with reading(self.model_file):
            self.content = self.model_file.read_bytes()
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.content)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.vocab_size: int = self.sp.vocab_size()

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        return self.sp.encode(text.encode("utf-8", "replace"), add_bos=add_bos)  # bad Unicode: "?"

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text, self.add_bos)

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode([i for i in ids if i < self.vocab_size])  # a model may have more ids

class StreamingDetokenizer:
    """Turns ids into text one by one. Alone a token loses its leading space, and an emoji may be
    four byte tokens. So each token is decoded with a few before it. The difference is emitted,
    unless it ends in half a character."""
    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]):
        self.tokenizer, self.ids = tokenizer, list(prompt_ids[-8:])
        self.start, self.end = 0, len(self.ids)  # ids[start:end] were emitted

    def push(self, token_id: int) -> str:  # the text that it completes
        self.ids.append(token_id)
        text = self.flush()
        if not text or text.endswith("\ufffd"):  # a special token, or half a character
            return ""
        self.start, self.end = self.end, len(self.ids)
        return text

    def flush(self) -> str:
        emitted = self.tokenizer.decode(self.ids[self.start:self.end])
        return self.tokenizer.decode(self.ids[self.start:])[len(emitted):]

IGNORE_INDEX = -100  # label of a token not to be predicted

# The chat format [paper]: <|prompt|>question</s><|answer|>answer</s>. The markers are plain
# text, so users can type them. The template is for other programs.
CHAT_MARKERS = {"user": "<|prompt|>", "assistant": "<|answer|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|prompt|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|answer|>' + message['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|answer|>' }}{% endif %}{% endfor %}")

def first_difference(a: list[int], b: list[int]) -> int:  # an index, or the shorter length
    for index, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return index
    return min(len(a), len(b))

def render_chat(messages: Messages, tokenizer: Tokenizer,
                add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """A conversation as `input_ids` and `labels`, without <s> [paper]. An answer and its </s> are
    their own labels [ours]: the model learns to answer and to stop."""
    input_ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        role, content = str(message.get("role")), message.get("content")
        require(role in CHAT_MARKERS and isinstance(content, str),
                f"a message needs a text and the role user or assistant, but this is {message}")
        ids = tokenizer.encode(f"{CHAT_MARKERS[role]}{content}") + [tokenizer.sp.eos_id()]
        start = len(ids)
        if role == "assistant":  # not len(marker): a token ">=" may join it and the text
            start = first_difference(tokenizer.encode(CHAT_MARKERS[role]), ids)
        input_ids += ids
        labels += [IGNORE_INDEX] * start + ids[start:]
    if add_generation_prompt:
        input_ids += tokenizer.encode(CHAT_MARKERS["assistant"])
        labels += [IGNORE_INDEX] * (len(input_ids) - len(labels))
    return input_ids, labels

# ==== 3. Building blocks ====
#
# RMSNorm keeps inputs of branches at similar magnitudes. Rotary embedding makes the order of
# tokens matter. Attention lets tokens read from each other. SwiGLU makes the MLP nonlinear:
# without it, its layers collapse into one. tests/reference.py has this section in NumPy.

def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), over the last dimension. [.., D], [D] -> [.., D]

    Trap: compute in fp32 whatever the type of x. The square of 256 overflows fp16 (above
    65,504), and bf16 has only 8 bits of precision."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))  # fp64 stays
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)  # [.., 1]
    return weight * (x32 * scale).to(x.dtype)

def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles p * theta^(-2i/h). positions p [T] -> 2 x [T, h/2], fp32

    Trap: model.bfloat16() would round frequencies in a buffer: 0.7867 (500m, i = 1) becomes
    0.7852, and at position 2,000 the angle is off by half a turn."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * theta ** -exponents  # [T, h/2]
    return angles.cos(), angles.sin()

def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of features by its angle.
    x [B, n, T, h], cos and sin [T, h/2] -> [B, n, T, h]

        (a, b) -> (a cos - b sin, b cos + a sin)        a = x[i], b = x[i + h/2]

    The dot product of a query at position p and a key at position s then depends only on
    p - s. Fast pairs (i = 0: a turn in 6 tokens) show short distances, slow pairs long ones.

    Trap: which features form pair i? Here, as in Llama checkpoints on Hugging Face, i and i + h/2
    ("half-split"). In the original paper and in Llama's GGUF files, 2i and 2i + 1 ("interleaved").
    The wrong choice runs, and the model talks nonsense."""
    first, second = x.chunk(2, dim=-1)  # 2 x [B, n, T, h/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(h)) v, causal.
    q [B, H, T, h], k and v [B, K, S, h], mask [T, S] -> [B, H, T, h]

    The **attention scores** q k^T say how well queries match keys. Softmax turns them into
    **attention weights**, which sum to 1. The output is the weighted sum of the values.
    Without sqrt(h) most weight would go to one key, and little gradient would pass.

    **Grouped-query attention**: H / K query heads share one key/value head, for a smaller
    cache. Trap: query head i reads key/value head i // (H / K). With H = 4 and K = 2, heads
    0 and 1 read 0, heads 2 and 3 read 1: k.repeat_interleave, not k.repeat.

    Trap: without a mask the queries are the last T of the S positions, so query t attends to keys
    0 .. S - T + t. Two new tokens after three cached ones (T = 2, S = 5) attend to 11110 and 11111.
    `is_causal` aligns with the first key instead (10000, 11000), right only for S = T."""
    T, (K, S), groups = q.shape[2], k.shape[1:3], q.shape[1] // k.shape[1]
    if mask is None and T == S and q.device.type != "mps":  # is_causal can be wrong there
        # enable_gqa copies nothing. On CUDA only FlashAttention can, which has no fp32.
        share = q.device.type != "cuda" or (q.dtype != torch.float32 and is_recent_gpu(q.device))
        if not share:
            k = k.repeat_interleave(groups, dim=1)  # [B, H, S, h]
            v = v.repeat_interleave(groups, dim=1)  # [B, H, S, h]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=share)
    if mask is None and T > 1:
        mask = q.new_ones(T, S, dtype=torch.bool).tril(diagonal=S - T)  # True: attends
    if mask is not None:
        mask = mask.repeat(groups, 1)  # [H/K T, S]
    q = q.unflatten(1, (K, groups)).flatten(2, 3)  # heads that share keys: more queries [B, K, H/K T, h]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.unflatten(2, (groups, T)).flatten(1, 2)  # [B, H, T, h]

def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(x) = x * sigmoid(x). 2 x [.., I] -> [.., I]"""
    return F.silu(gate) * up

def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of -log softmax(logits)[label] over all labels but IGNORE_INDEX. [N, V], [N] -> []"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 is too coarse
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

# ==== 4. Model ====
#
# Modules have the names of the published checkpoint. The **hidden states** [B, T, D] form the
# **residual stream**. Each layer adds two **residual branches** to it: attention, and the MLP,
# which processes each token alone. A branch reads a normalized copy ("pre-norm"). The head turns
# each output vector into V **logits**, a score for each next token.

class LayerCache(NamedTuple):
    """One layer's part of a KVCache."""
    keys: Tensor       # [B, K, S, h]
    values: Tensor     # [B, K, S, h]
    positions: Tensor  # [T], where new ones go
    static: bool       # whether later positions are empty: see next_positions

class KVCache:
    """Keys (rotated) and values of all tokens so far, each computed once.

    Trap: `length`, the number of filled positions, is also the position of the next token.
    All layers write to the same positions, so next_logits moves it once, after the last layer."""
    def __init__(self, config: DanubeConfig, batch_size: int, max_length: int, dtype: torch.dtype,
                 device: torch.device):
        self.length = 0
        shape = batch_size, config.num_key_value_heads, max_length, config.head_dim
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = list(map(torch.zeros_like, self.keys))

    def next_positions(self, count: int, static: bool = False) -> None:
        """Make room for `count` tokens, before each pass. Compiled code fits one shape, so with
        **static shapes** attention reads a power of two of positions, and a mask hides empty ones."""
        end, max_length = self.length + count, self.keys[0].shape[2]
        require(end <= max_length, f"{end:,} tokens do not fit into a cache of {max_length:,}")
        self.positions = torch.arange(self.length, end, device=self.keys[0].device)  # [T]
        self.size, self.static = end, static
        if static:
            self.size = min(max_length, max(256, 1 << (end - 1).bit_length()))  # [ours]

    def layer(self, i: int) -> LayerCache:
        keys, values = self.keys[i][:, :, :self.size], self.values[i][:, :, :self.size]
        return LayerCache(keys, values, self.positions, self.static)

class RMSNorm(nn.Module):
    def __init__(self, config: DanubeConfig):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D]
        x, device = rms_norm(x, self.weight, self.eps), x.device.type
        if torch.is_autocast_enabled(device):  # section 8: cast once, not in each linear layer
            x = x.to(torch.get_autocast_dtype(device))
        return x

class Attention(nn.Module):
    def __init__(self, config: DanubeConfig):
        super().__init__()
        D, h = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = h
        self.q_proj = nn.Linear(D, H * h, bias=False)
        self.k_proj = nn.Linear(D, K * h, bias=False)
        self.v_proj = nn.Linear(D, K * h, bias=False)
        self.o_proj = nn.Linear(H * h, D, bias=False)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, D]
        shape = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(shape).transpose(1, 2)  # [B, H, T, h]
        k = self.k_proj(x).view(shape).transpose(1, 2)  # [B, K, T, h]
        v = self.v_proj(x).view(shape).transpose(1, 2)  # [B, K, T, h]
        return rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor,
                cache: LayerCache | None) -> Tensor:  # [B, T, D]
        (q, k, v), mask = self.heads(x, cos, sin), None
        if cache is not None:
            k = cache.keys.index_copy_(2, cache.positions, k)  # [B, K, S, h]
            v = cache.values.index_copy_(2, cache.positions, v)  # [B, K, S, h]
            if cache.static:
                mask = torch.arange(k.shape[2], device=k.device) <= cache.positions[:, None]  # [T, S]
        y = grouped_query_attention(q, k, v, mask)  # [B, H, T, h]
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, T, H h] -> [B, T, D]

class MLP(nn.Module):
    def __init__(self, config: DanubeConfig):
        super().__init__()
        D, I = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, I, bias=False)
        self.up_proj = nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

class DecoderLayer(nn.Module):
    def __init__(self, config: DanubeConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor,
                cache: LayerCache | None) -> Tensor:  # [B, T, D]
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)  # [B, T, D]
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, T, D]

class Decoder(nn.Module):
    """The model without its head."""
    def __init__(self, config: DanubeConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)

    def forward(self, input_ids: Tensor, kv_cache: KVCache | None = None) -> Tensor:  # [B, T] -> [B, T, D]
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # [T]
        if kv_cache is not None:
            positions = kv_cache.positions
        cos, sin = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(input_ids).to(self.norm.weight.dtype)  # [B, T, D]
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, kv_cache and kv_cache.layer(i))
        return self.norm(x)

# For more tokens than this [ours] (0.5 GB of fp32 logits) the loss computes them in parts, and
# again in the backward pass.
LOGIT_TOKENS = 4_096

class Danube3(nn.Module):
    def __init__(self, config: DanubeConfig):
        super().__init__()
        self.config, self.stop_ids = config, [config.eos_token_id]  # generation ends at any stop id
        self.compiled_step: Any = None  # compiled by data/cli.py
        self.task: dict[str, Any] = {}  # how it classifies texts: data/classify.py
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # untied [paper]

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:  # of hidden states; other weights may be quantized
        return self.model.norm.weight.dtype

    @staticmethod
    def new(config: DanubeConfig, seed: int, device: str = "cpu") -> "Danube3":
        """A model to pre-train: norm weights are 1, others normal [ours]. On "meta": shapes only."""
        with torch.device("meta"):
            model = Danube3(config).to_empty(device=device)
        generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
        return model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """input_ids [B, T] -> logits [B, T, V] in fp32; with labels [B, T], the sum of losses [].

        Labels line up with input_ids: position t - 1 predicts labels[:, t]; labels[:, 0] is unused."""
        x = self.model(input_ids)  # [B, T, D]
        if labels is None:
            return self.lm_head(x).float()  # [B, T, V]
        x = x.flatten(0, 1)  # [B T, D]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # [B T]
        if len(x) <= LOGIT_TOKENS:
            return self.block_loss(x, targets)
        loss = torch.zeros((), device=x.device)
        for block in zip(x.split(LOGIT_TOKENS), targets.split(LOGIT_TOKENS)):
            loss = loss + activation_checkpoint(
                self.block_loss, *block, use_reentrant=False, preserve_rng_state=False)
        return loss

    def block_loss(self, x: Tensor, targets: Tensor) -> Tensor:  # [N, D], [N] -> []
        return cross_entropy(self.lm_head(x), targets)

    def last_logits(self, input_ids: Tensor, kv_cache: KVCache) -> Tensor:  # [B, T] -> [B, V]
        return self.lm_head(self.model(input_ids, kv_cache)[:, -1]).float()

    def next_logits(self, input_ids: Tensor, kv_cache: KVCache) -> Tensor:  # [B, T] -> [B, V]
        static = self.compiled_step is not None and input_ids.shape == (1, 1)
        kv_cache.next_positions(input_ids.shape[1], static)
        if static:
            # A view of other strides would be compiled again.
            logits = self.compiled_step(input_ids.view(1)[:, None], kv_cache)
        else:
            logits = self.last_logits(input_ids, kv_cache)
        kv_cache.length += input_ids.shape[1]
        return logits

# ==== 5. Sampling ====
#
# Generation picks a next token, appends it, and asks again. The first pass reads the prompt
# into the cache (**prefill**), each later pass reads one new token (**decode**).

def next_token_probabilities(logits: Tensor, temperature: float, top_k: int = 0,
                             top_p: float = 1.0) -> Tensor:
    """softmax(logits / temperature), restricted to likely tokens. [B, V] -> [B, V]

    A temperature below 1 favours likely tokens. top_k keeps the k likeliest (0: all), top_p
    the likeliest until they reach p together (1.0: all). With p = 0.6, the first two of 0.5,
    0.3, 0.2 stay: before the second there is 0.5, less than p, before the third 0.8."""
    logits = logits.float() - logits.float().amax(-1, keepdim=True)  # no overflow
    probabilities = (logits / max(temperature, 1e-30)).softmax(-1)
    if top_k == 0 and top_p >= 1.0:
        return probabilities
    probabilities, order = probabilities.sort(descending=True, stable=True)
    if top_k:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    if top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities  # sum of likelier tokens
        probabilities[:, 1:] *= before[:, 1:] < top_p  # the first stays
        probabilities /= probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)  # in vocabulary order

@torch.no_grad()
def generate_tokens(model: Danube3, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0,
                    top_k: int = 0, top_p: float = 1.0, seed: int | None = None,
                    kv_cache: KVCache | None = None) -> Iterator[Tensor]:
    """Continue prompts of equal length, input_ids [B, T]. Yields the next token of each, [B].

    Temperature 0 is **greedy**: it takes the likeliest token. A sequence repeats </s> after
    its stop token. The loop ends when all have stopped, after max_new_tokens, or when the
    context is full. `kv_cache` may hold the first tokens, but not all."""
    (B, T), context, device = input_ids.shape, model.config.max_position_embeddings, input_ids.device
    require(1 <= T <= context, f"a prompt of {T} tokens does not fit: use 1 to {context}")
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    end = min(T + max_new_tokens, context)
    limit = context if model.compiled_step and B == 1 else end
    kv_cache = kv_cache or KVCache(model.config, B, limit, model.dtype, device)
    input_ids = input_ids[:, kv_cache.length:]
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    stop_ids = torch.tensor(model.stop_ids, device=device)
    for _ in range(end - T):
        logits = model.next_logits(input_ids, kv_cache)  # prefill, then decode [B, V]
        if temperature == 0:
            next_ids = logits.argmax(-1)  # [B]
        else:
            probabilities = next_token_probabilities(logits, temperature, top_k, top_p).nan_to_num(1.0)
            next_ids = torch.multinomial(probabilities, 1, generator=generator)[:, 0]  # [B]
        next_ids = next_ids.masked_fill(ended, model.config.eos_token_id)
        ended |= torch.isin(next_ids, stop_ids)
        finite, all_ended = torch.stack((logits.isfinite().all(), ended.all())).tolist()  # wait for the GPU
        require(finite, "the logits are not finite: try another --dtype or checkpoint")
        yield next_ids
        if all_ended:
            return
        input_ids = next_ids[:, None]  # [B, 1]

def generate(model: Danube3, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
    """Prompts and their continuations. [B, T] -> [B, T + n]"""
    for next_ids in generate_tokens(model, input_ids, max_new_tokens, **sampling):
        input_ids = torch.cat((input_ids, next_ids[:, None]), dim=1)
    return input_ids

# ==== 6. Data ====
#
# Text is stored as **token shards**: files of uint16 ids, one document after another. TokenData
# (data/read.py) reads them in **blocks** of T consecutive ids of one source. A block may reach
# into the next document, and so does attention [ours].
#
# Which blocks make up step 1,234,567? A **pure function of the step** says so: no state must
# be saved, and the number of GPUs may change.

VALIDATION_SEQUENCES = 32  # [ours] of each source
MAX_EPOCHS = 100  # [ours] of a source

def mixture_pattern(weights: dict[str, int]) -> list[tuple[str, int]]:
    """The source of each sequence, and how many this source has had before.

    {"a": 3, "b": 2} gives a0 b0 a1 a2 b1, then the same order again. Let W be the sum of the
    weights. Sequence t goes to a source that is behind its share: it has had n < t w_i / W.
    Of several, the earliest **deadline** wins: the t at which t w_i / W reaches n + 1. Then
    no count is ever off by a whole sequence (Tijdeman 1980), and after W sequences all are exact."""
    total, given, pattern = sum(weights.values()), dict.fromkeys(weights, 0), []
    for t in range(1, total + 1):
        deadlines = {}
        for name, weight in weights.items():
            if t * weight > given[name] * total:
                deadlines[name] = -(-(given[name] + 1) * total // weight)  # -(-a // b) rounds up
        earliest = min(deadlines, key=deadlines.__getitem__)
        pattern.append((earliest, given[earliest]))
        given[earliest] += 1
    return pattern

def permuted_index(index: int, size: int, key: str) -> int:
    """The place of `index` in a shuffled order of 0 .. size-1, chosen by `key`.

    A Feistel network: write the index as two digits in base ceil(sqrt(size)), and four times

        (high, low) -> (low, (high + hash(key, round, low)) mod base)

    A subtraction undoes a round, so this permutes all base^2 numbers. A result of size or
    more is permuted again ("cycle walking"). The walk ends: a repeated permutation returns to
    its start. No two walks end at the same place: walking back is unique too."""
    base = math.isqrt(size - 1) + 1
    while True:
        high, low = divmod(index, base)
        for i in range(4):
            digest = hashlib.blake2b(f"{key}/{i}/{low}".encode(), digest_size=8).digest()
            high, low = low, (high + int.from_bytes(digest, "little")) % base
        index = high * base + low
        if index < size:
            return index

class StagedData:
    """The batches of pre-training. The n-th sequence of a source is its n-th block, in an order
    that each **epoch** (once through all blocks) permutes anew."""
    def __init__(self, data: Any, config: TrainConfig):
        self.data, self.config, self.total_steps = data, config, config.stage_ends[-1]
        self.fingerprint = {"meta.json": file_sha256(data.folder / "meta.json")}
        self.starts = [0, *config.stage_ends]
        self.patterns = []
        self.used = [dict.fromkeys(config.stages[0].mixture, 0)]  # sequences of each source before each stage
        for stage, start, end in zip(config.stages, self.starts, config.stage_ends):
            pattern = mixture_pattern(stage.mixture)
            periods, rest = divmod((end - start) * config.batch_size, len(pattern))
            used = {name: count + periods * stage.mixture[name] for name, count in self.used[-1].items()}
            for name, _ in pattern[:rest]:
                used[name] += 1
            self.patterns.append(pattern)
            self.used.append(used)
        self.blocks, self.epochs = {}, {}  # of each source; how often the whole run reads it
        for name, count in self.used[-1].items():
            data.count_blocks(name, "val")  # an error if none
            self.blocks[name] = data.count_blocks(name, "train")
            self.epochs[name] = count / self.blocks[name]
            require(self.epochs[name] <= MAX_EPOCHS, f"source {name!r} would be read "
                    f"{self.epochs[name]:.0f} times: add text, or train on fewer tokens")

    def stage_index(self, step: int) -> int:
        return sum(step >= end for end in self.config.stage_ends[:-1])

    def stage(self, step: int) -> str:
        return self.config.stages[self.stage_index(step)].name

    def locate(self, step: int, index: int) -> tuple[str, str, int]:  # source, split, number of a block
        stage = self.stage_index(step)
        pattern, mixture = self.patterns[stage], self.config.stages[stage].mixture
        position = (step - self.starts[stage]) * self.config.batch_size + index  # in the stage
        name, earlier = pattern[position % len(pattern)]
        earlier += self.used[stage][name] + position // len(pattern) * mixture[name]
        blocks = self.blocks[name]
        epoch, place = divmod(earlier, blocks)
        return name, "train", permuted_index(place, blocks, f"{self.config.seed}/{name}/{epoch}")

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:  # [batch_size / world_size, T]
        indices = range(rank, self.config.batch_size, world_size)
        return self.data.read([self.locate(step, index) for index in indices])

    def validation(self) -> dict[str, Batch]:  # of each source
        return {name: self.data.evenly_spread(name, "val", VALIDATION_SEQUENCES) for name in self.used[0]}

# ==== 7. Optimizer ====
#
# AdamW keeps two running means per weight, its **moments**: of the gradient, and of its
# square. A step is the first, divided by the root of the second, so all weights move at a
# similar speed. **Weight decay** also shrinks them a little. The learning rate rises during
# **warm-up**, while the means are rough, and then falls along half a cosine.
#
#     m = beta1 m + (1 - beta1) g                     g is the gradient
#     v = beta2 v + (1 - beta2) g^2                   m and v start at 0, so they are too small:
#     m' = m / (1 - beta1^t), v' = v / (1 - beta2^t)  corrected for that, at step t = 1, 2, ..
#     w = w - lr (m' / (sqrt(v') + eps) + weight_decay w)

def make_optimizer(model: Danube3, config: TrainConfig) -> torch.optim.AdamW:
    """Only matrices decay: norm weights need not be near zero."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    norms = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), config.adam_eps,
        config.weight_decay, fused=True)  # one pass over memory
    for p in matrices + norms:  # made now, for a checkpoint to fill
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer

def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0.

        peak * (step + 1) / warmup                    during warm-up
        peak * (f + (1 - f) * (1 + cos(pi * p)) / 2)  p = 0 .. 1, f = final_lr_fraction"""
    warmup, final = max(1, round(config.warmup_fraction * total_steps)), config.final_lr_fraction
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    return config.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)

# ==== 8. Training ====
#
# **Mixed precision**: products are computed in bf16 or fp16; trained weights, their
# gradients and the residual stream are fp32. bf16 has the range of fp32 and 8 bits of
# precision. fp16 has 11 bits, but no number below 6e-8, where many gradients lie. So with fp16
# a **gradient scaler** multiplies the loss, and divides the gradients before the step.

def compute_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """"auto" is bf16 on recent GPUs, fp16 on older, else fp32 (train.py: bf16 on some CPUs)."""
    if name != "auto":
        return DTYPES[name]
    if is_recent_gpu(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32

def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    dtype = compute_dtype(device, config.dtype)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

def use_activation_checkpointing(model: Danube3) -> None:
    """**Activation checkpointing**: store only the input of each layer, and compute the layer
    again in the backward pass. This takes less memory, and up to a third more time."""
    for layer in model.model.layers:  # (torch.compile would skip a functools.partial)
        layer.forward = lambda *args, f=layer.forward: activation_checkpoint(
            f, *args, use_reentrant=False, preserve_rng_state=False)

# Several GPUs: torchrun starts `world_size` processes, one per GPU, numbered by `rank`. All
# run the same lines and meet in **collective calls** such as all_reduce, which wait for all.
# **Fully sharded data parallel** (FSDP): each process stores its part of every weight and
# moment. Before a layer computes, its weights are collected (all-gather), and later freed (reshard).
# Gradients are averaged, and each process keeps its part (reduce-scatter).

FSDP_KEPT = 10**9  # [ours] parameters; smaller models keep weights until the backward pass

def rank_and_world_size() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def all_reduce(tensor: Tensor) -> Tensor:  # the sum over all ranks, in place
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def shard_model(model: Danube3, device: torch.device, dtype: torch.dtype) -> Danube3:
    """Put a model on its device. With FSDP, rank 0 sends each rank its part."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return model.to(device)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = dist.init_device_mesh(device.type, (world_size,))
    require(dtype != torch.float16, "several GPUs need bf16, not fp16: train on one")
    weights = model.state_dict() if rank == 0 else {}
    model.to("meta")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    free = count_parameters(model.config) > FSDP_KEPT
    for module in (model.model.embed_tokens, *model.model.layers):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=free)
    fully_shard(model.model.norm, mesh=mesh)  # in fp32: the residual stream has its type
    fully_shard(model, mesh=mesh, mp_policy=policy)  # the rest: the head
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    return model

def sequence_lengths(labels: Tensor) -> Tensor:
    """The length of each sequence up to its last target: no target needs the rest. [B, T] -> [B]"""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != IGNORE_INDEX) * positions).amax(dim=1)

def micro_batches(input_ids: Tensor, labels: Tensor, size: int, device: torch.device) -> Iterator[Batch]:
    """Split sequences [N, T] into micro-batches of at most `size`, each as short as possible. On
    GPUs to a multiple of 64: kernels are chosen, and code is compiled, for each length."""
    multiple = 64 if device.type == "cuda" else 1
    for ids, own_labels in zip(input_ids.split(size), labels.split(size)):
        length = -(-max(1, int(sequence_lengths(own_labels).amax())) // multiple) * multiple
        yield ids[:, :length].to(device), own_labels[:, :length].to(device)

def count_targets(labels: Tensor) -> Tensor:  # [N, T] -> []
    return (labels[:, 1:] != IGNORE_INDEX).sum()

def train_step(model: Danube3, optimizer: torch.optim.Optimizer, input_ids: Tensor, labels: Tensor,
               config: TrainConfig, lr: float,
               scaler: torch.amp.GradScaler | None = None) -> tuple[float, float]:
    """One optimizer step on this rank's input_ids and labels [N, T]. -> loss, gradient norm

        loss = sum of -log p(target) / number of targets, both over the whole step and all ranks

    Trap: not the mean of the micro-batches' means. If one has 10 targets and the next 1,000,
    each target of the first would count a hundred times as much."""
    device, world_size = model.device, rank_and_world_size()[1]
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    count = all_reduce(count_targets(labels).to(device)).clamp(min=1)
    loss = torch.zeros((), device=device)
    batches = list(micro_batches(input_ids, labels, config.micro_batch_size, device))
    for number, (ids, own_labels) in enumerate(batches, start=1):
        if world_size > 1:  # reduce-scatter once, after the last micro-batch
            model.set_requires_gradient_sync(number == len(batches))  # type: ignore[operator]
        with autocast(device, config):
            micro_loss = model(ids, own_labels) / count
        scaler.scale(micro_loss * world_size).backward()  # FSDP averages, we need the sum
        loss += micro_loss.detach()
    all_reduce(loss)
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if torch.isfinite(loss + grad_norm):  # else the weights stay
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss.item(), grad_norm.item()

@torch.no_grad()
def evaluate_loss(model: Danube3, input_ids: Tensor, labels: Tensor, micro_batch_size: int) -> float:
    """Mean loss per target of sequences [N, T]. FSDP needs equally many passes: ranks
    share sequences evenly, or each computes all."""
    rank, world_size = rank_and_world_size()
    if len(labels) % world_size == 0:
        input_ids, labels = input_ids[rank::world_size], labels[rank::world_size]
    loss = torch.zeros((), device=model.device)
    for ids, own_labels in micro_batches(input_ids, labels, micro_batch_size, model.device):
        loss += model(ids, own_labels)
    return all_reduce(loss).item() / max(1, int(all_reduce(count_targets(labels).to(model.device))))

# ==== 9. Checkpoints and runs ====
#
# A checkpoint is a Hugging Face Llama folder. It is written as NAME.partial, and renamed once
# it is on disk. So NAME is whole, even after a power failure.

def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def sync(path: Path) -> None:  # wait until a file or folder is on disk
    try:
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:  # some systems sync no folders
        if path.is_file():
            raise

@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep our other programs off a path. A lock ends with its program."""
    handle = os.open(path if fcntl else os.devnull, os.O_RDONLY)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise DanubeError(f"{path} is in use by another program: wait for it") from error
    except OSError:
        pass  # a network disk without locks
    try:
        yield
    finally:
        os.close(handle)

def write_checksums(folder: Path) -> None:  # for `sha256sum -c`; waits until all is on disk
    sums = folder / "SHA256SUMS"
    files = sorted(set(filter(Path.is_file, folder.iterdir())) - {sums})
    sums.write_text("".join(f"{file_sha256(path)}  {path.name}\n" for path in files))
    for path in [*files, sums, folder]:
        sync(path)

def verify_checksums(folder: Path, largest: float = math.inf, skip: str = ".jsonl") -> None:
    """Compare files of at most `largest` bytes with SHA256SUMS, but no names with `skip`."""
    sums = folder / "SHA256SUMS"
    lines = sums.read_text(errors="replace").splitlines() if sums.is_file() else []
    for line in lines:
        checksum, _, name = line.partition(" ")
        path = folder / name[1:]  # after " ", or "*" for binary
        if skip in name or not line.strip():
            continue
        with reading(path):
            same = path.is_file() and (path.stat().st_size > largest or file_sha256(path) == checksum.lower())
            require(same, f"{path} is missing or damaged, says SHA256SUMS: copy it again (or "
                    "remove the line there if you changed it)")

@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:  # NAME.partial, renamed on success
    require(not folder.exists(), f"{folder} already exists: remove it, or use another")
    partial = Path(f"{folder}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        try:
            for leftover in partial.iterdir():
                leftover.unlink()
            yield partial
            write_checksums(partial)
            partial.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

def write_tensors(path: Path, tensors: Tensors, dtype: torch.dtype | None = None) -> None:  # safetensors
    converted = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(converted, path, metadata={"format": "pt"})
    with contextlib.suppress(PermissionError):
        path.chmod(0o644)  # safetensors lets nobody else read

def read_tensors(path: Path) -> Tensors:  # mapped into memory: only what is used is read
    with reading(path), safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}

def read_json(path: Path) -> dict[str, Any]:  # {} without a file
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8-sig"))) if path.exists() else {}

def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

# config.json may omit these.
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

def read_config(folder: Path) -> DanubeConfig:
    """Danube3 computes FIXED only: other values are refused."""
    path = folder / "config.json"
    with reading(path):
        raw = read_json(path)
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})  # transformers 5, and 4
        raw.update(rope, rope_type=rope.get("rope_type") or rope.get("type") or "default")
        for name, value in {**FIXED, "partial_rotary_factor": 1.0, "rope_type": "default"}.items():
            found = raw.get(name, value)
            require(found == value, f"{path}: {name} is {found!r}: Danube3 needs {value!r}")
        heads = raw["num_attention_heads"]
        values = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // max(1, heads),
                  "rope_theta": 1e4, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
                  "max_position_embeddings": 2_048}  # transformers' defaults
        for field in fields(DanubeConfig):
            value = raw.get(field.name)
            if isinstance(value, list):  # several end tokens: </s> is the lowest
                value = min(value, default=None)
            if value not in (None, -1):  # -1: none
                values[field.name] = value
        return DanubeConfig(**values)

def read_stop_ids(folder: Path, config: DanubeConfig) -> list[int]:  # which end a text
    ids = read_json(folder / "generation_config.json").get("eos_token_id")
    ids = ids or read_json(folder / "config.json").get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return [i for i in ids if type(i) is int] or [config.eos_token_id]

def read_tokenizer(folder: Path, config: DanubeConfig) -> Tokenizer:  # it must fit the model
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    model_file = folder / "tokenizer.model"
    settings, added = read_json(path), read_json(folder / "added_tokens.json")
    fast = read_json(folder / "tokenizer.json")  # transformers' own form
    require(model_file.is_file(), f"{model_file} is missing (transformers 5 saves tokenizer.json only): "
            "copy the original model's")
    tokenizer = Tokenizer(model_file, "<s>" in str(fast.get("post_processor", "<s>")))
    if settings.get("add_bos_token") is not None:
        tokenizer.add_bos = bool(settings["add_bos_token"])
    tokenizer.chat_template = settings.get("chat_template") or CHAT_TEMPLATE
    if template.is_file():
        with reading(template):
            tokenizer.chat_template = template.read_text(encoding="utf-8-sig")
    special = (tokenizer.sp.bos_id(), tokenizer.sp.eos_id())
    fits = special == (config.bos_token_id, config.eos_token_id) and tokenizer.vocab_size <= config.vocab_size
    require(fits, f"{model_file} has more tokens, or other ids of <s>, </s>: use the model's")
    with reading(path):
        pad = settings.get("pad_token")
        if isinstance(pad, dict):
            pad = pad["content"]
        used = f"{tokenizer.chat_template} {settings.get('eos_token')}"
        for token_id, token in settings.get("added_tokens_decoder", {}).items():
            added[token["content"]] = int(token_id)
        for token in fast.get("added_tokens", []):
            added[token["content"]] = token["id"]
        for token, token_id in added.items():
            known = token_id < tokenizer.vocab_size and tokenizer.sp.id_to_piece(token_id) == token
            known |= token == pad and token not in used  # for padding only, in no text
            require(known, f"{model_file} lacks {token!r}: use the model's")
    return tokenizer

def write_settings(folder: Path, model: Danube3, tokenizer: Tokenizer, dtype: torch.dtype,
                   **more: object) -> None:  # the small files of a checkpoint
    config = model.config
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], **asdict(config), **FIXED, "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."), **more})
    write_json(folder / "generation_config.json", {
        "bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id,
        "eos_token_id": model.stop_ids if len(model.stop_ids) > 1 else config.eos_token_id})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": tokenizer.add_bos,
        "add_prefix_space": tokenizer.sp.normalize("a") != "a",
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        "model_max_length": config.max_position_embeddings, "chat_template": tokenizer.chat_template})
    (folder / "tokenizer.model").write_bytes(tokenizer.content)
    if model.task:
        write_json(folder / "task.json", model.task)

def save_checkpoint(folder: Path, model: Danube3, tokenizer: Tokenizer,
                    dtype: torch.dtype = torch.float32) -> None:
    with atomic_folder(folder) as partial:
        write_settings(partial, model, tokenizer, dtype)
        write_tensors(partial / "model.safetensors", model.state_dict(), dtype)

def require_weights(path: Path) -> None:
    """Refuse a folder without this file."""
    found = [*path.parent.glob("*.bin"), *path.parent.glob("*.pt*"), *path.parent.glob("*.safetensors")]
    names = ", ".join(map(os.path.basename, found)) or "nothing else"
    require(path.is_file(), f"{path} is missing. Found: {names:.150}. Pickle files (.bin) can run code: "
            "convert them with transformers or peft (save_pretrained)")

def read_weights(folder: Path) -> Tensors:  # of one file, or all in an index
    files, index, weight_map = ["model.safetensors"], folder / "model.safetensors.index.json", {}
    if not index.is_file():
        require_weights(folder / files[0])
    elif (folder / files[0]).is_file():
        print(f"{index} is ignored: {files[0]} is there", file=sys.stderr)
    else:
        with reading(index):
            weight_map = read_json(index)["weight_map"]
            files = sorted(set(weight_map.values()))
            require(files == [Path(file).name for file in files], f"{index} names files outside its folder")
    weights: Tensors = {}
    for file in files:
        for name, weight in read_tensors(folder / file).items():
            old_copy = weight_map.get(name, file) != file
            name = name.replace("_orig_mod.", "").removeprefix("module.")  # torch.compile, DDP
            if old_copy or name.endswith(("rotary_emb.inv_freq", ".weight_shape")):
                continue
            readable = weight.is_floating_point() and weight.itemsize > 1
            if name.endswith(".weight_packed"):  # int32 on disk: the same bytes
                readable, weight = weight.dtype == torch.int32, weight.view(torch.uint8)
            elif name.endswith(".weight_scale"):
                readable = weight.dtype == torch.float16
            require(readable, f"{folder}: {name} is {weight.dtype}, which is not read here: quantize the "
                    "original model anew")
            weights[name] = weight
    ends = {"lm_head.weight", "model.embed_tokens.weight"}
    stored = ends & weights.keys()
    if read_json(folder / "config.json").get("tie_word_embeddings") and len(stored) == 1:  # one for both
        weights.update(dict.fromkeys(ends, weights[stored.pop()]))
    return weights

def weights_sha256(folder: Path) -> str:
    checksums = "".join(map(file_sha256, sorted(folder.glob("model*.safetensors"))))
    return hashlib.sha256(checksums.encode()).hexdigest()

def is_finite(tensor: Tensor) -> bool:  # smallest and largest suffice: a NaN makes both NaN
    return tensor.numel() == 0 or tensor.is_meta or bool(torch.stack(tensor.aminmax()).isfinite().all())

def checkpoints_in(out: Path) -> list[Path]:  # complete ones, oldest first
    found = [path for path in out.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))

def download(name: str) -> Path:  # from the Hugging Face Hub, or its cache, to a folder
    try:
        from huggingface_hub import snapshot_download
        files = ["*.json", "*.jinja", "tokenizer.model", "*model*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:
        raise DanubeError(f"{name}: no folder, no download (needs huggingface_hub): {error}") from error

def find_checkpoint(path: str | Path) -> Path:
    """`path` if it is a checkpoint, else the newest in it, or a published model of this name."""
    path = Path(path)
    if len(path.parts) == 2 and path.parts[0] != "out" and not path.parent.exists():  # owner/name
        path = download(path.as_posix())
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path
    found = checkpoints_in(path)
    require(found, f"{path} does not exist, or is no checkpoint and holds none")
    return found[-1]

SAVE_SECONDS = 1_800  # [ours] at most, between checkpoints
MAX_SKIPPED_STEPS = 20  # [ours] in a row; fp16's scaler needs up to 16

class Trainer:
    """A training run. `base` is the folder of the first weights."""
    def __init__(self, out: Path, model: Danube3, tokenizer: Tokenizer, data: "StagedData | ChatData",
                 resume: bool = False, base: Path | None = None, device: torch.device | None = None):
        self.out, self.tokenizer, self.data, self.base = out, tokenizer, data, base
        self.config, self.device = data.config, device or model.device
        self.rank, self.world_size = rank_and_world_size()
        self.step, self.tokens, self.skipped = 0, 0, 0
        self.saved_at, self.dtype = time.monotonic(), compute_dtype(self.device, self.config.dtype)
        self.lora = not model.model.norm.weight.requires_grad
        self.run_config = json.loads(json.dumps({
            **asdict(model.config), **asdict(self.config), **data.fingerprint,
            "save_every": 1, "micro_batch_size": 1,  # may change
            "dtype": str(self.dtype), "base": base and weights_sha256(base)}))
        found = checkpoints_in(out)
        require(found or not resume, f"nothing to resume: {out} holds no checkpoint")
        require(resume or not found, f"{out} already holds a run: add --resume, or use another --out")
        self.resources = contextlib.ExitStack()
        if self.world_size > 1:  # a checkpoint may take long
            self.save_group = dist.new_group(timeout=timedelta(hours=2))
        if self.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            self.resources.enter_context(locked(out))
        log = out / "metrics.jsonl" if self.rank == 0 else os.devnull
        self.log = self.resources.enter_context(open(log, "a" if resume else "w"))
        self.model = shard_model(model, self.device, self.dtype).train()
        self.optimizer = make_optimizer(self.model, self.config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if resume:
            self.resume()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:  # trainable weights, AdamW's state of each
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield f"weights.{name}", parameter.detach()
                for key, tensor in self.optimizer.state[parameter].items():
                    yield f"{key}.{name}", tensor

    def save(self) -> None:
        """Gather the tensors on rank 0, which writes them. All ranks call this."""
        tensors: Tensors = {}
        for name, tensor in self.tensors():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # a collective call
            if self.rank == 0:
                tensors[name] = full.cpu()
        if self.rank == 0:
            self.write(tensors)
            self.remove_old()
        self.saved_at = time.monotonic()
        if self.world_size > 1:
            dist.barrier(self.save_group)  # wait: torchrun kills rank 0 when another ends by Ctrl-C

    def remove_old(self) -> None:  # renamed first: half a folder must not look whole
        for old in checkpoints_in(self.out)[:-1]:
            old.rename(Path(f"{old}.partial"))
        for leftover in self.out.glob("step-*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    def write(self, tensors: Tensors) -> None:
        """Write a checkpoint and the **training state**: fp32 **master weights**, moments, step."""
        weights = {name.removeprefix("weights."): tensor for name, tensor in tensors.items()
                   if name.startswith("weights.")}
        require(all(map(is_finite, weights.values())),
                f"the weights are not finite after step {self.step}: lower the learning rate")
        sync(self.out / "metrics.jsonl")
        with atomic_folder(self.out / f"step-{self.step:07d}") as partial:
            if self.lora:
                assert self.base
                write_adapters(partial, self.model, weights, self.base, self.run_config["base"])
            else:
                write_settings(partial, self.model, self.tokenizer, self.dtype)
                write_tensors(partial / "model.safetensors", weights, self.dtype)
            write_tensors(partial / "training_state.safetensors", tensors)
            write_json(partial / "training_state.json", {
                "step": self.step, "tokens": self.tokens, "skipped": self.skipped,
                "log_lines": (self.out / "metrics.jsonl").read_bytes().count(b"\n"),
                "scaler": self.scaler.state_dict(), "run_config": self.run_config})

    def resume(self) -> None:  # from the newest checkpoint
        folder = checkpoints_in(self.out)[-1]
        if self.rank == 0:
            verify_checksums(folder)
        if self.world_size > 1:
            dist.barrier(self.save_group)
        path = folder / "training_state.json"
        with reading(path):
            state = read_json(path)
            for name, value in self.run_config.items():
                saved = state["run_config"].get(name)
                require(saved == value, f"{folder} was made with another {name} ({saved!s:.60}): "
                        "use the same flags and data, or another --out")
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.tokens = int(state["step"]), int(state["tokens"])
            self.skipped, kept = int(state["skipped"]), int(state["log_lines"])
        own, stored = dict(self.tensors()), read_tensors(folder / "training_state.safetensors")
        require(own.keys() == stored.keys(), f"{folder} holds other tensors than this run: use another --out")
        for name, tensor in own.items():
            full = stored[name].to(self.device)
            require(full.shape == tensor.shape and is_finite(full), f"{folder}: {name} does not fit this run")
            if isinstance(tensor, DTensor):
                full = distribute_tensor(full, tensor.device_mesh, tensor.placements)
            tensor.copy_(full)
        if self.rank == 0:  # later lines will be logged again
            lines = (self.out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            self.log.truncate(sum(map(len, lines[:kept])))
            self.remove_old()

    def take_step(self, peak_flops: float) -> dict[str, Any]:
        """One optimizer step. -> its metrics. **MFU** (model FLOPs utilization) is operations per peak."""
        start, lr = time.perf_counter(), learning_rate(self.step, self.data.total_steps, self.config)
        ids, labels = self.data.batch(self.step, self.rank, self.world_size)
        loss, grad_norm = train_step(self.model, self.optimizer, ids, labels, self.config, lr, self.scaler)
        tokens = int(all_reduce(sequence_lengths(labels).sum().to(self.device)))
        rate = tokens / (time.perf_counter() - start)
        flops = rate * flops_per_token(self.model.config, tokens // self.config.batch_size, self.lora)
        finite = math.isfinite(loss + grad_norm)
        self.step += 1
        self.tokens += tokens
        self.skipped = 0 if finite else self.skipped + 1
        metrics = {"step": self.step, "stage": self.data.stage(self.step - 1), "tokens": self.tokens,
                   "loss": loss if math.isfinite(loss) else None, "lr": lr,  # JSON has no NaN
                   "grad_norm": grad_norm if finite else None, "tokens_per_second": round(rate),
                   "mfu": round(flops / peak_flops, 4)}
        print(json.dumps(metrics), file=self.log, flush=True)
        require(self.skipped < MAX_SKIPPED_STEPS,
                f"no finite gradient in {self.skipped} steps in a row: lower the learning rate")
        return metrics

    def validate(self) -> None:  # log and print the losses
        losses, text = {}, f"step {self.step}, validation loss:"
        for name, batch in self.data.validation().items():
            with autocast(self.device, self.config):
                losses[name] = evaluate_loss(self.model, *batch, self.config.micro_batch_size)
            text += f" {name} {losses[name]:.3f}"
        for module in self.model.modules():  # FSDP may keep weights for a backward pass
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]
        stage = self.data.stage(max(0, self.step - 1))
        metrics = {"step": self.step, "stage": stage, "tokens": self.tokens, "val_loss": losses}
        print(json.dumps(metrics), file=self.log, flush=True)
        if self.rank == 0:
            tqdm.write(text)

    def is_milestone(self) -> bool:  # then save and validate
        last, stage = self.step == self.data.total_steps, self.data.stage
        return last or self.step % self.config.save_every == 0 or stage(self.step) != stage(self.step - 1)

def train(run: Trainer, peak_flops: float, interrupts: Sized = ()) -> bool:
    """Train to the last step. -> False if one of `interrupts` ended it."""
    bar = tqdm(total=run.data.total_steps, initial=run.step, unit="step",
               mininterval=1 if sys.stderr.isatty() else 10, disable=run.rank > 0)
    with run.resources, bar:
        if run.is_milestone():
            run.validate()
        while run.step < run.data.total_steps:
            metrics = run.take_step(peak_flops)
            bar.set_postfix(stage=metrics["stage"], loss=metrics["loss"], mfu=metrics["mfu"], refresh=False)
            bar.update()
            late = run.rank == 0 and time.monotonic() > run.saved_at + SAVE_SECONDS
            stopped, late = all_reduce(torch.tensor([len(interrupts), late], device=run.device)).tolist()
            if stopped or late or run.is_milestone():
                run.save()
            if stopped and run.step < run.data.total_steps:
                return False
            if run.is_milestone():
                run.validate()
    return True

# ==== 10. Fine-tuning ====
#
# **Supervised fine-tuning** (SFT) on conversations teaches a base model to answer.
# **LoRA** (arXiv 2106.09685) freezes all weights and trains a **low-rank
# update** of each linear layer in the decoder [ours]. Its gradients and moments are small. On a
# quantized base this is **QLoRA** (arXiv 2305.14314).

SFT_TOKENS = 8_192  # [ours] per micro-batch
VALIDATION_SHARE = 0.05  # [ours] of the conversations, at most 256

def pad_sequences(sequences: list[np.ndarray]) -> Batch:
    """Sequences [2, T_i] of input_ids and labels -> 2 x [N, T], the longest first: similar lengths
    share a micro-batch. Padding is on the right: no other token attends to it."""
    longest_first = sorted(sequences, key=np.size, reverse=True)
    padded = torch.zeros(2, len(sequences), longest_first[0].shape[1], dtype=torch.long)
    padded[1] = IGNORE_INDEX
    for i, sequence in enumerate(longest_first):
        padded[:, i, :sequence.shape[1]] = torch.from_numpy(sequence)
    return padded[0], padded[1]

class ChatData:
    """Conversations as batches, in a new order in each epoch. Each ends with an answer that fits."""
    def __init__(self, conversations: list[Messages], tokenizer: Tokenizer, context: int,
                 config: TrainConfig, epochs: int = 1, fingerprint: dict[str, Any] | None = None):
        encoded, lost = [], 0  # sequences [2, T]; answers that end too late
        for messages in tqdm(conversations, "encode", leave=False, disable=None):
            sequence = np.array(render_chat(messages, tokenizer), np.int32)
            ends = np.flatnonzero(sequence[1] == tokenizer.sp.eos_id()) + 1
            fitting = ends[ends <= context]
            lost += len(ends) - len(fitting)
            if len(fitting):
                encoded.append(sequence[:, :fitting[-1]])
        total = len(encoded)
        self.summary = f"{total:,} conversations for {context:,} tokens; {lost:,} answers cut off"
        require(total > 1, f"{self.summary}: two are needed, so add some")
        shuffled = [encoded[permuted_index(i, total, "split")] for i in range(total)]
        size = min(256, math.ceil(VALIDATION_SHARE * total))
        self.held_out, self.sequences = shuffled[:size], shuffled[size:]
        longest = max(encoded, key=np.size).shape[1]
        batch_size = min(config.batch_size, len(self.sequences))
        micro = min(config.micro_batch_size, batch_size, max(1, SFT_TOKENS // longest))
        self.config = replace(config, batch_size=batch_size, micro_batch_size=micro, sequence_length=longest)
        self.total_steps = math.ceil(epochs * len(self.sequences) / batch_size)
        self.fingerprint = {**(fingerprint or {}), "epochs": epochs}

    def stage(self, step: int) -> str:
        return f"epoch {step * self.config.batch_size // len(self.sequences) + 1}"

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:  # [batch_size / world_size, T]
        chosen, total, size = [], len(self.sequences), self.config.batch_size
        for i in range(step * size, (step + 1) * size):
            epoch, place = divmod(i, total)
            chosen.append(self.sequences[permuted_index(place, total, f"{self.config.seed}/chat/{epoch}")])
        ids, labels = pad_sequences(chosen)
        return ids[rank::world_size], labels[rank::world_size]

    def validation(self) -> dict[str, Batch]:
        return {"chat": pad_sequences(self.held_out)}

LORA_ALPHA = 16  # H2O LLM Studio's default, with rank 4

class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) lora_B lora_A x, with W frozen, lora_A [rank, in], lora_B
    [out, rank]. Both are fp32: many steps are smaller than the gaps of bf16."""
    def __init__(self, base_layer: "nn.Linear | QuantizedLinear", rank: int, alpha: float = LORA_ALPHA):
        super().__init__()
        self.base_layer, self.scale = base_layer, alpha / rank
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        y = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        return y + (self.scale * self.lora_B(self.lora_A(x))).to(y.dtype)

def decoder_linears(model: Danube3) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}

def add_lora(model: Danube3, rank: int, seed: int) -> Danube3:
    """Freeze the model and add adapters. lora_A starts random, lora_B at 0, so nothing changes
    at first. Norms and the residual stream become fp32."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.float()
    generator = torch.Generator().manual_seed(seed)
    for name, linear in decoder_linears(model).items():
        lora = LoRALinear(linear, rank)
        nn.init.normal_(lora.lora_A.weight, std=linear.in_features ** -0.5, generator=generator)
        nn.init.zeros_(lora.lora_B.weight)
        model.set_submodule(name, lora.to(model.device))
    return model

PEFT_PREFIX = "base_model.model."  # of tensor names in peft's files
# With one of these, peft computes otherwise.
NOT_PLAIN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
             "alora_invocation_tokens", "trainable_token_indices", "layer_replication", "lora_bias")

def write_adapters(folder: Path, model: Danube3, weights: Tensors, base: Path, base_sha256: str) -> None:
    """Write the adapters in peft's layout."""
    lora = next(iter(decoder_linears(model).values()))
    rank = lora.lora_A.out_features
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.resolve()),
        "r": rank, "lora_alpha": lora.scale * rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in weights})})
    (folder / "base.sha256").write_text(f"{base_sha256}\n")  # peft ignores it
    tensors = {PEFT_PREFIX + name: weight for name, weight in weights.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors)
    if model.task:
        write_json(folder / "task.json", model.task)

def adapter_base(folder: Path, moved: str | Path | None) -> Path:  # the checkpoint they were trained on
    name = moved or str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    try:
        base = find_checkpoint(name)
    except DanubeError as error:
        raise DanubeError(f"{folder} holds adapters to a base elsewhere (give --base): {error}") from error
    require((base / "config.json").is_file(), f"{folder}: its base {base} holds adapters too: use --merge")
    sha256 = folder / "base.sha256"
    same = not sha256.is_file() or sha256.read_text(errors="replace").strip() == weights_sha256(base)
    require(same, f"{folder} holds adapters to other weights than those in {base}: put the old ones back")
    return base

def load_adapters(model: Danube3, folder: Path) -> Danube3:  # with the folder's adapters
    path, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    linears, weights = decoder_linears(model), {}
    require_weights(file)
    for name, weight in read_tensors(file).items():
        require(is_finite(weight.float()), f"{folder}: {name} is not finite: take an earlier checkpoint")
        weights[name.removeprefix(PEFT_PREFIX).replace(".default.", ".")] = weight
    with reading(path):
        config = read_json(path)
        plain = config["peft_type"] == "LORA" and not any(map(config.get, NOT_PLAIN))
        plain &= config.get("init_lora_weights") in (None, True, False, "gaussian", "eva", "orthogonal")
        require(plain, f"{path} is not plain LoRA: merge those adapters with peft")
        rank, alpha = config["r"], config["lora_alpha"]
        require(type(rank) is int and 0 < rank < 2**16 and math.isfinite(alpha),
                f"{path}: r or lora_alpha is wrong")
        for name in {name.partition(".lora_")[0] for name in weights}:
            require(name in linears, f"{folder} changes {name} too: merge those adapters with peft")
            model.set_submodule(name, LoRALinear(linears[name], rank, alpha).to(model.device))
        adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
        require(weights and weights.keys() == adapters,
                f"{folder} does not fit the base it names: copy both again")
        model.load_state_dict(weights, strict=False)
    return model

# ==== 11. Quantization ====
#
# Each group of 32 weights of a row shares one **scale**, and each weight has a **code** of 8 or 4 bits:
# weight = (code - offset) * scale. Decoding reads all linear layers for each token, so fewer bytes mean
# more speed. **Round-to-nearest** (RTN) is enough at 8 bits. At 4, **calibration** on text is better.

GROUP = 32  # weights per scale [ours], as in GGUF

def stored_scales(scales: Tensor) -> Tensor:  # fp16, and 1 instead of 0: some programs divide by them
    scales = scales.half()
    return torch.where(scales == 0, 1.0, scales)

def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w = (code - 128) * scale, with scale = max|w| / 127 of a group.
    [out, in] -> codes 1 .. 255 as uint8 [out, in], scales fp16 [out, in/32]"""
    groups = weight.float().unflatten(1, (-1, GROUP))  # [out, in/32, 32]
    scales = stored_scales(groups.abs().amax(dim=2) / 127)  # [out, in/32]
    values = groups / scales[..., None].float()
    values = (values.abs() + 0.5).floor().clamp(max=127) * values.sign()  # .5 away from zero, as in GGUF
    return (values + 128).flatten(1).to(torch.uint8), scales

def nearest_codes(weight: Tensor, scales: Tensor, bits: int) -> Tensor:  # uint8, for given scales
    lowest, offset = {8: (1, 128), 4: (0, 8)}[bits]
    return (weight / scales.float() + offset + 0.5).floor().clamp(lowest, 2 * offset - 1).to(torch.uint8)

def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w = (code - 8) * scale. The largest |w| of a group gets code 0, so scale = w / -8.
    [out, in] -> codes 0 .. 15 as uint8 [out, in], scales fp16 [out, in/32]"""
    groups = weight.float().unflatten(1, (-1, GROUP))  # [out, in/32, 32]
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # [out, in/32, 1]
    scales = stored_scales(largest / -8)
    return nearest_codes(groups, scales, 4).flatten(1), scales[..., 0]

def pack(codes: Tensor, bits: int) -> Tensor:
    """A byte holds one code of 8 bits, or codes 2j (its low half) and 2j + 1 of 4 bits, as in
    compressed-tensors. uint8 [.., in] -> [.., in bits/8]"""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)  # [8/bits]
    return (codes.unflatten(-1, (-1, len(shifts))) << shifts).sum(-1, dtype=torch.uint8)

def unpack(packed: Tensor, bits: int) -> Tensor:  # uint8 [.., in bits/8] -> [.., in]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)

def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """uint8 [.., in bits/8] and scales [.., in/32] -> fp32 [.., in]. Their sizes tell the bits."""
    bits = 8 * packed.shape[-1] // (GROUP * scales.shape[-1])
    values = unpack(packed, bits).unflatten(-1, (-1, GROUP)).float()  # [.., in/32, 32]
    values -= 2 ** (bits - 1)  # in place: the head's are large
    values *= scales.float()[..., None]
    return values.flatten(-2)

class DequantizedMatmul(torch.autograd.Function):
    """x W^T for a quantized W. The backward pass dequantizes again instead of storing W."""
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scales)
        return F.linear(x, dequantize(packed, scales).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ dequantize(*ctx.saved_tensors).to(grad.dtype), None, None

def int8_matvec(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """W x for one vector. x [in], uint8 [out, in], [out, in/32] -> [out], in fp32.
    Compiled, this is one loop that never stores W. An AVX-512 instruction handles 16
    numbers, so the halves of a group are added first."""
    halves = codes.unflatten(1, (-1, 2, 16)).float() - 128  # [out, in/32, 2, 16]
    lanes = (halves * x.float().view(-1, 2, 16)).sum(2)  # [out, in/32, 16]
    return (lanes * scales.float()[..., None]).sum((1, 2))

@functools.cache
def compiled_int8_matvec() -> Any:
    return torch.compile(int8_matvec, dynamic=True)  # once for nearly all sizes

def has_compiler() -> bool:  # what torch.compile needs: a C++ compiler, and Triton for GPUs
    from torch.utils._triton import has_triton
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    found = shutil.which(os.environ.get("CXX", usual)) is not None
    return found and (has_triton() or not torch.cuda.is_available())

class QuantizedLinear(nn.Module):
    """A linear layer as packed codes, uint8 [out, in bits/8], and scales, fp16 [out, in/32]."""
    def __init__(self, out_features: int, in_features: int, bits: int):
        super().__init__()
        self.out_features, self.in_features, self.bits = out_features, in_features, bits
        self.weight_packed = nn.Buffer(torch.empty(out_features, in_features * bits // 8, dtype=torch.uint8))
        self.weight_scale = nn.Buffer(torch.empty(out_features, in_features // GROUP, dtype=torch.float16))
        self.fast = False

    @property
    def weight(self) -> Tensor:  # [out, in], fp32
        return dequantize(self.weight_packed, self.weight_scale)

    def make_fast(self) -> None:
        """Prepare for decoding. 8 bits: on CPUs large matrices take the compiled int8_matvec. 4 bits:
        PyTorch's kernels round inputs and scales to bf16, give no gradients, and need codes in other
        orders. So on CPUs `weight` is lost. On GPUs a copy is made, for products of a few tokens."""
        device = self.weight_packed.device
        if self.bits == 8:
            self.fast = device.type == "cpu" and self.weight_packed.numel() >= 2**18 and has_compiler()
            if self.fast:
                self.weight_scale = nn.Buffer(self.weight_scale.float())
        elif device.type == "cpu" and self.out_features % 16 == 0:
            for rows in self.weight_packed.split(256):  # as int32 they need 8 times the memory
                rows.copy_(torch._convert_weight_to_int4pack_for_cpu(unpack(rows, 4).int(), 1))
            self.fast, self.fast_packed = True, self.weight_packed
        elif is_recent_gpu(device) and self.out_features % 8 == 0 and self.in_features % 128 == 0:
            swapped = self.weight_packed << 4 | self.weight_packed >> 4  # there, code 2j is the high half
            self.fast_packed = nn.Buffer(torch._convert_weight_to_int4pack(swapped, 8), persistent=False)
            self.fast = True
        if self.fast and self.bits == 4:
            scales = self.weight_scale.T.bfloat16()  # [in/32, out]
            scales = torch.stack((scales, torch.zeros_like(scales)), dim=-1)  # with zeros [in/32, out, 2]
            self.fast_scale = nn.Buffer(scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        rows = x.reshape(-1, self.in_features)  # [N, in]
        on_cpu = x.device.type == "cpu"
        if self.fast and self.bits == 4 and (on_cpu or len(rows) <= 16):
            kernel = torch._weight_int4pack_mm_for_cpu if on_cpu else torch._weight_int4pack_mm
            y = kernel(rows.bfloat16(), self.fast_packed, GROUP, self.fast_scale)
        elif self.fast and self.bits == 8 and 0 < len(rows) <= 4:  # each row reads all codes again
            product = compiled_int8_matvec()
            y = torch.stack([product(row, self.weight_packed, self.weight_scale) for row in rows])
        else:
            return DequantizedMatmul.apply(x, self.weight_packed, self.weight_scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)  # [N, out] -> [.., out]

def use_quantized_modules(model: Danube3, weights: Tensors) -> Danube3:
    """Put empty quantized layers where `weights` has packed codes."""
    for name, packed in weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            linear: Any = model.get_submodule(module)
            bits = 8 * packed.shape[1] // linear.in_features
            require(bits in (4, 8), f"{name} has {bits} bits, not 4 or 8")
            model.set_submodule(module, QuantizedLinear(linear.out_features, linear.in_features, bits))
    return model

# For y = W x, an error E of W costs the mean of |E x|^2 over calibration data: trace(E C E^T),
# with C the mean of x x^T. (The code calls C, or any multiple, the Hessian: it is half the cost's
# second derivative.) Each row e of E is a problem of its own: make e C e^T small. RTN makes each
# entry of e small, but entries can also make up for others.
#
# **Coordinate descent** (QuantEase, arXiv 2309.01885) changes one number at a time. A step that
# adds t d to e makes the cost a parabola in t,
#
#     (e + t d) C (e + t d)^T = e C e^T + 2 t (e C d^T) + t^2 (d C d^T),
#
# which is lowest at t = -(e C d^T) / (d C d^T). For weight i, d is 1 at i and 0 elsewhere: move
# the weight by -(e C)_i / C_ii, and take the nearest code. For the scale of a group, d has
# the group's values, code - offset, and 0 elsewhere. A few sweeps come near a local minimum.
# (**GPTQ**, arXiv 2210.17323, sweeps once. Meanwhile the weights ahead may take any value.)

def search_scales(groups: Tensor, importance: Tensor | float) -> Tensor:
    """For each group the int4 scale, of 12 [ours], with the smallest weighted squared error: quantize_int4's
    times 0.8 .. 1.1, or -0.9 .. -1.2 (the largest weight is then near code 15), fitted to the codes.
    groups [.., 32], importance broadcast to it -> fp16 [..]"""
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))  # [.., 1]
    best, lowest = stored_scales(largest / -8), torch.full_like(largest, math.inf)
    for factor in torch.cat((torch.linspace(0.8, 1.1, 6), torch.linspace(-1.2, -0.9, 6))).tolist():
        values = nearest_codes(groups, stored_scales(largest / -8 * factor), 4).float() - 8  # [.., 32]
        # The s with the smallest sum of a (w - s v)^2 is sum(a w v) / sum(a v^2).
        weighted = importance * values
        fitted = stored_scales((weighted * groups).sum(-1, True) / (weighted * values).sum(-1, True))
        error = (importance * (groups - fitted.float() * values) ** 2).sum(-1, True)  # [.., 1]
        better = error < lowest  # False for NaN, where all values are 0
        best, lowest = torch.where(better, fitted, best), torch.where(better, error, lowest)
    return best[..., 0]

def round_to_nearest(weight: Tensor, bits: int, importance: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """quantize_int8, or int4 with searched scales, in which `importance` [in/32, 32] counts.
    [out, in] -> codes uint8 [out, in], scales fp16 [out, in/32]"""
    if bits == 8:
        return quantize_int8(weight)
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = torch.cat([search_scales(rows, importance) for rows in groups.split(64)])
    return nearest_codes(groups, scales[..., None], 4).flatten(1), scales

def calibrate(weight: Tensor, hessian: Tensor, bits: int, sweeps: int = 4,
              damping: float = 0.05) -> tuple[Tensor, Tensor]:  # [ours]: sweeps, damping
    """weight [out, in], hessian [in, in] -> codes uint8 [out, in], scales fp16 [out, in/32]
    `damping` times its mean is added to the diagonal: weights whose inputs are nearly 0 move little."""
    weight, size, offset = weight.float(), weight.shape[1], 2 ** (bits - 1)
    added = damping * hessian.diagonal().mean() + 1e-12
    hessian = hessian.float() + added * torch.eye(size, device=hessian.device)
    codes, scales = round_to_nearest(weight, bits, hessian.diagonal().unflatten(0, (-1, GROUP)))
    values, scales = codes.float() - offset, scales.float()
    errors = values * scales.repeat_interleave(GROUP, dim=1) - weight  # e of each row [out, in]
    for start in sweeps * list(range(0, size, GROUP)):
        here = slice(start, start + GROUP)
        v, scale = values[:, here], scales[:, start // GROUP]  # views [out, 32], [out]
        own = hessian[here, here]  # [32, 32]
        slopes = errors @ hessian[:, here]  # e C in this group [out, 32]
        v_slopes = v @ own  # d C in it, d of the scale [out, 32]
        step = -(slopes * v).sum(1) / (v_slopes * v).sum(1)  # [out], NaN where all values are 0
        fitted = (scale + step).half().float()  # 0, inf and NaN are no scales: keep the old one
        change = torch.where((fitted != 0) & fitted.isfinite(), fitted - scale, 0.0)
        scale += change
        slopes += change[:, None] * v_slopes
        for i in range(GROUP):
            target = v[:, i] * scale - slopes[:, i] / own[i, i]  # [out]
            moved = nearest_codes(target, scale, bits).float() - offset - v[:, i]
            v[:, i] += moved
            slopes += (moved * scale)[:, None] * own[i]
        errors[:, here] = v * scale[:, None] - weight[:, here]
    return (values + offset).to(torch.uint8), scales.half()

# ==== 12. Opening any folder ====

def default_dtype(raw: dict[str, Any], widest: torch.dtype, device: torch.device) -> torch.dtype:
    """config.json's, or `widest`, of all weights. For quantized models, and bf16 on GPUs, the device's."""
    dtype = DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch."), widest)
    if raw.get("quantization_config") or (dtype == torch.bfloat16 and device.type == "cuda"):
        return compute_dtype(device)
    return dtype

def load_checkpoint(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                    fast: bool = False, base: str | Path | None = None) -> tuple[Danube3, Tokenizer]:
    """Open a checkpoint. -> model in eval mode, in `dtype` (default: config.json's), and tokenizer.
    `fast` prepares a quantized model for decoding. `base`: where the base of adapters is now."""
    folder = find_checkpoint(path)
    verify_checksums(folder, skip="training_state")
    if (folder / "adapter_config.json").is_file():
        require(not (folder / "model.safetensors").is_file(),
                f"{folder} holds adapters and a whole model: move one away")
        model, tokenizer = load_checkpoint(adapter_base(folder, base), device, dtype, fast)
        model.task = read_json(folder / "task.json")
        return load_adapters(model, folder).eval(), tokenizer
    require(not base, f"--base is for adapters, and {folder} has none")
    config, weights = read_config(folder), read_weights(folder)
    with torch.device("meta"), reading(folder):  # shapes without memory
        model = use_quantized_modules(Danube3(config), weights)
        widest = functools.reduce(torch.promote_types, {weight.dtype for weight in weights.values()})
    dtype = dtype or default_dtype(read_json(folder / "config.json"), widest, torch.device(device))
    for name, weight in weights.items():
        # copy: a mapped file's alignment can change last bits
        weights[name] = weight.to(device, dtype if name.endswith("weight") else None, copy=True)
        require(is_finite(weights[name]),
                f"{folder}: {name} is not finite as {dtype}: use another type, or older weights")
    with reading(folder):
        model.load_state_dict(weights, assign=True)
    model.stop_ids, model.task = read_stop_ids(folder, config), read_json(folder / "task.json")
    for module in model.modules():
        if fast and isinstance(module, QuantizedLinear):
            module.make_fast()
    return model.eval(), read_tokenizer(folder, config)
