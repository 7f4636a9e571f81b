"""Danube3 in one file: H2O-Danube3 (arXiv 2407.09276) from text to a quantized chat model.

H2O-Danube3 is a pair of small language models of 500 million and 4 billion parameters, with the
Llama architecture. They are pre-trained in three stages: noisy web text gives way to cleaner text
from stage to stage. This file is the library of train.py, sample.py and quantize.py. Its sections,
to be read from top to bottom:

    1 Configuration    4 Model       7 Optimizer      10 Fine-tuning
    2 Tokenizer        5 Sampling    8 Training       11 Quantization
    3 Building blocks  6 Data        9 Checkpoints    12 Programs

Letters in shape comments; "[B, T, D]" is a shape, "[]" a single number:

    B  batch                     D  hidden_size         H  query heads
    T  sequence length           I  intermediate_size   K  key/value heads
    S  keys: cached and new      V  vocab_size          h  head_dim

[paper] marks facts from the report, its model cards or published configuration files, [ours] our
own choices where nothing was published.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

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

# A process's first cosine picks the CPU's routine. Two threads that compute it together may get a
# coarser one (pytorch issue 188792), which changes the last bits. So one thread does it here.
torch.zeros(1).cos().sin()

class DanubeError(Exception):
    """A mistake that the user can fix. Its text is one line: what is wrong, then the remedy."""

def require(condition: object, message: str) -> None:
    """Check input from outside (flags, files): raise DanubeError unless the condition holds."""
    if not condition:
        raise DanubeError(message)

@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while `path` is read into one line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DanubeError(f"{error.filename or path} is missing: copy it there") from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            safetensors.SafetensorError) as error:
        if path.is_file() and path.open("rb").read(15) == b"version https:/":
            raise DanubeError(f"{path} is a Git-LFS pointer, not the file: run `git lfs pull`") from error
        reason = " ".join(str(error).split())[:200]
        raise DanubeError(f"{path} cannot be read, it is damaged ({reason}): copy it again") from error

# ==== 1. Configuration ==================================================================

@dataclass(frozen=True)
class DanubeConfig:
    """The architecture, with the field names of Hugging Face's config.json. Trap: H * h happens to equal
    D in all three models, but the architecture does not require it."""
    hidden_size: int                       # D
    intermediate_size: int                 # I
    num_hidden_layers: int
    num_attention_heads: int               # H
    num_key_value_heads: int               # K
    head_dim: int                          # h
    initializer_range: float               # standard deviation of the initial weights
    vocab_size: int = 32_000               # V
    max_position_embeddings: int = 8_192   # the context: the longest sequence
    rope_theta: float = 100_000.0          # base of the rotary frequencies (section 3)
    rms_norm_eps: float = 1e-5
    bos_token_id: int = 1                  # <s> begins a document
    eos_token_id: int = 2                  # </s> ends one
    pad_token_id: int = 0                  # <unk>

    def __post_init__(self) -> None:
        for field in fields(self):
            value, smallest, limit = getattr(self, field.name), 1e-30, 2**24
            if field.name.endswith("_token_id"):
                smallest, limit = 0, self.vocab_size
            number = type(value) in (int, field.type)
            require(number and smallest <= value < limit,
                    f"config: {field.name} is {value!r}: use a positive number below {limit:,}")
        require(self.num_hidden_layers < 1_024, "config: num_hidden_layers must be below 1,024")
        require(self.head_dim % 2 == 0, "config: head_dim must be even")
        require(self.num_attention_heads % self.num_key_value_heads == 0,
                "config: num_attention_heads must be a multiple of num_key_value_heads")

@dataclass(frozen=True)
class Stage:
    """One stage of pre-training. The mixture gives each **source** (a dataset, or domain) a weight."""
    name: str
    tokens: int
    mixture: dict[str, int]

@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Danube3's settings are not published: these are [ours]. Betas and the cosine
    are those of the first Danube report (arXiv 2401.16818), except the toy's.

    An **optimizer step** reads a **global batch** of `batch_size` sequences, in **micro-batches** that
    fit into memory. Their gradients are summed (**gradient accumulation**)."""
    batch_size: int                  # sequences per optimizer step, over all GPUs
    micro_batch_size: int            # B: sequences per forward pass on one GPU
    learning_rate: float             # the peak
    stages: tuple[Stage, ...] = ()   # pre-training only
    sequence_length: int = 1         # T; for conversations the longest
    final_lr_fraction: float = 0.0   # of the peak, in the last step
    warmup_fraction: float = 0.01    # of all steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 1.0           # a gradient with a larger norm is scaled down
    save_every: int = 1_000          # steps between checkpoints
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "sequence_length", "save_every"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        require(0 < self.learning_rate < math.inf, f"learning rate {self.learning_rate}: it must be positive")
        require(0 <= self.seed < 2**63, f"seed {self.seed}: use one from 0 to 2^63 - 1")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def stage_ends(self) -> list[int]:
        """The step at which each stage ends: running totals of tokens, rounded to whole steps."""
        ends, tokens, per_step = [], 0, self.tokens_per_step
        for stage in self.stages:
            tokens += stage.tokens
            ends.append((tokens + per_step // 2) // per_step)
        return ends

    def with_tokens(self, total: int) -> "TrainConfig":
        """The same training with `total` tokens, in the same proportions."""
        old_total = sum(stage.tokens for stage in self.stages)
        stages = [replace(stage, tokens=stage.tokens * total // old_total) for stage in self.stages]
        return replace(self, stages=tuple(stages))

# The report's six sources and their weights in stages 1, 2, 3, in thousandths. The shares of web are
# [paper]. The rest is [ours]: the report shows its split in a figure only.
SOURCES = ("web", "wikipedia", "academic", "synthetic", "instruct", "other")
MIXTURES = ((906, 18, 18, 18, 30, 10), (817, 35, 35, 38, 55, 20), (516, 80, 80, 94, 190, 40))

def three_stages(*tokens: float) -> tuple[Stage, ...]:  # tokens of each
    stages: list[Stage] = []
    for count, weights in zip(tokens, MIXTURES):
        stages.append(Stage(f"stage {len(stages) + 1}", int(count), dict(zip(SOURCES, weights))))
    return tuple(stages)

CONFIGS = {
    "toy": DanubeConfig(  # [ours] few heads, because many small matrix products are slow on a CPU
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, initializer_range=0.04, vocab_size=1_024,
        max_position_embeddings=256),
    "500m": DanubeConfig(  # [paper]
        hidden_size=1536, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=8, head_dim=96, initializer_range=0.02),
    "4b": DanubeConfig(  # [paper]
        hidden_size=3840, intermediate_size=10240, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=8, head_dim=120, initializer_range=0.01),
}
# The totals 4T and 6T are [paper]. The lengths of the stages are from memory of the report.
TRAIN_CONFIGS = {
    "toy": TrainConfig(
        stages=three_stages(0.9e6, 0.45e6, 0.45e6), sequence_length=128, batch_size=8, micro_batch_size=8,
        learning_rate=3e-3, warmup_fraction=0.04, beta2=0.99, save_every=400),
    "500m": TrainConfig(
        stages=three_stages(2.8e12, 1.15e12, 0.05e12), sequence_length=8_192, batch_size=256,
        micro_batch_size=1, learning_rate=4e-4, final_lr_fraction=0.01),
    "4b": TrainConfig(
        stages=three_stages(4.6e12, 1.35e12, 0.05e12), sequence_length=8_192, batch_size=512,
        micro_batch_size=1, learning_rate=2e-4, final_lr_fraction=0.01),
}

def count_parameters(config: DanubeConfig) -> int:
    """513,590,784 for 500m and 3,961,839,360 for 4b [paper]."""
    D, h = config.hidden_size, config.head_dim
    attention = 2 * D * (config.num_attention_heads + config.num_key_value_heads) * h  # q, o; k, v
    mlp = 3 * D * config.intermediate_size  # gate, up, down
    layers = config.num_hidden_layers * (attention + mlp + 2 * D)  # two norms
    return layers + D + 2 * config.vocab_size * D  # last norm; embedding, head

def flops_per_token(config: DanubeConfig, sequence_length: int, frozen: bool = False) -> int:
    """Floating-point operations of training, per token.

    A weight costs a multiplication and an addition forward, and twice that backward: for the gradient
    of the inputs, and for its own unless it is **frozen** (section 10). Attention costs 4 h per head,
    query and key (score, weighted sum). A query has (T + 1) / 2 keys on average."""
    layers, D = config.num_hidden_layers, config.hidden_size
    weights = count_parameters(config) - config.vocab_size * D - (2 * layers + 1) * D  # no embedding, norms
    attention = layers * config.num_attention_heads * 4 * config.head_dim * (sequence_length + 1) // 2
    return (2 if frozen else 3) * 2 * weights + 3 * attention

# ==== 2. Tokenizer and chat template ====================================================
#
# The Mistral tokenizer [paper] is a **byte-pair encoding** (BPE) by sentencepiece. Its training starts
# from characters and merges the most frequent pair of neighbours until there are 32,000 tokens
# ("pieces"). Encoding makes the same merges. Every byte is a piece, so all text can be encoded.
#
# **Special tokens** have no spelling: <s> begins and </s> ends a document [ours], </s> also ends a chat
# message. A typed "</s>" is encoded as ordinary pieces, so nobody can type the end of a message.

class Tokenizer:
    """A sentencepiece model. With `add_bos`, prompts begin with <s>, as all training documents do."""
    def __init__(self, model_file: str | Path, add_bos: bool = True) -> None:
        self.model_file, self.add_bos, self.chat_template = Path(model_file), add_bos, CHAT_TEMPLATE
        with reading(self.model_file):
            self.content = self.model_file.read_bytes()
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.content)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.vocab_size: int = self.sp.vocab_size()

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of `text`. No text spells a special token."""
        try:
            return self.sp.encode(text, add_bos=add_bos)
        except (RuntimeError, UnicodeError) as error:  # half a surrogate pair
            raise DanubeError(f"not valid Unicode: {text[:40]!r}") from error

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to continue."""
        return self.encode(text, self.add_bos)

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode([i for i in ids if i < self.vocab_size])  # a model may have more ids

class StreamingDetokenizer:
    """Turns ids into text one id at a time. The text of a token depends on its neighbours: " world" alone
    decodes to "world", and an emoji may be four byte tokens. So each token is decoded with a few before
    it, and the difference is emitted, unless it ends in half a character."""
    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, list(prompt_ids[-8:])
        self.start, self.end = 0, len(self.ids)  # the text of ids[start:end] was emitted already

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly none."""
        self.ids.append(token_id)
        text = self.flush()
        if not text or text.endswith("\ufffd"):  # a special token, or half a character
            return ""
        self.start, self.end = self.end, len(self.ids)
        return text

    def flush(self) -> str:
        """The text not yet emitted, after the last token."""
        emitted = self.tokenizer.decode(self.ids[self.start:self.end])
        return self.tokenizer.decode(self.ids[self.start:])[len(emitted):]

IGNORE_INDEX = -100  # label of a token that is not to be predicted, as in PyTorch and transformers

# The chat format [paper]: <|prompt|>question</s><|answer|>answer</s>. The markers are plain text, which a
# user can type; only the special token </s> ends a message. The template is for other programs.
CHAT_MARKERS = {"user": "<|prompt|>", "assistant": "<|answer|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|prompt|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|answer|>' + message['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|answer|>' }}{% endif %}{% endfor %}")

def first_difference(a: list[int], b: list[int]) -> int:
    """The first index at which two lists differ, or the length of the shorter one."""
    for index, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return index
    return min(len(a), len(b))

def render_chat(messages: list[dict[str, str]], tokenizer: Tokenizer,
                add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """A conversation as `input_ids` and `labels`, of equal length, without <s> [paper].

    Each message is encoded with its marker as one text; </s> is appended as an id. Tokens of an answer
    and its </s> are their own labels [ours]: the model learns to answer and to stop. Others have
    IGNORE_INDEX."""
    input_ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        role, content = str(message.get("role")), message.get("content")
        require(role != "system", "System role not supported: put the text into a user message")
        require(role in CHAT_MARKERS, f"unknown chat role {role!r}: use user or assistant")
        require(isinstance(content, str), f"this message has no text as its content: {message}")
        ids = tokenizer.encode(f"{CHAT_MARKERS[role]}{content}") + [tokenizer.sp.eos_id()]
        start = len(ids)
        if role == "assistant":  # not the marker's length: a piece such as ">=" may span both
            start = first_difference(tokenizer.encode(CHAT_MARKERS[role]), ids)
        input_ids += ids
        labels += [IGNORE_INDEX] * start + ids[start:]
    if add_generation_prompt:
        input_ids += tokenizer.encode(CHAT_MARKERS["assistant"])
        labels += [IGNORE_INDEX] * (len(input_ids) - len(labels))
    return input_ids, labels

# ==== 3. Building blocks ================================================================
#
# RMSNorm gives linear layers inputs of similar magnitude. Rotary embedding makes the order of tokens matter.
# Attention lets tokens read from each other. SwiGLU is the nonlinearity: without one, two linear layers
# in a row collapse into one. Cross-entropy is the loss. tests/reference.py has all five in NumPy.

def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), over the last dimension. [.., D], [D] -> [.., D]

    Trap: compute in fp32 whatever the type of x. The square of 256 overflows fp16 (largest number
    65,504), and bf16 has only 8 bits of precision."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))  # fp64 stays, for tests
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)  # [.., 1]
    return weight * (x32 * scale).to(x.dtype)

def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles p * theta^(-2i/h). positions p [T] -> 2 x [T, h/2], fp32

    Trap: if the frequencies were a buffer of the model, model.bfloat16() would round them. 0.787 (500m,
    i = 1) becomes 0.785, and at position 2,000 the angle is off by half a turn."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * theta ** -exponents  # [T, h/2]
    return angles.cos(), angles.sin()

def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of features by its angle. x [B, n, T, h], cos and sin [T, h/2] -> [B, n, T, h]

        (a, b) -> (a cos - b sin, b cos + a sin)        a = x[i], b = x[i + h/2]

    The dot product of a query at position p and a key at position s then depends only on the distance
    p - s. Fast pairs (i = 0 completes a turn in 6 tokens) separate neighbours, slow pairs near from far.

    Trap: which features form pair i? Here, as in every Llama checkpoint on Hugging Face, i and i + h/2
    ("half-split"). In the original paper and in GGUF files, 2i and 2i + 1 ("interleaved"). The wrong
    choice runs without complaint, and the model talks nonsense."""
    first, second = x.chunk(2, dim=-1)  # 2 x [B, n, T, h/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(h)) v, causal. q [B, H, T, h], k and v [B, K, S, h] -> [B, H, T, h]

    The **attention scores** q k^T say how well each query matches each key. Softmax turns them into
    **attention weights**, which sum to 1. The output is the weighted sum of the values. Without sqrt(h),
    large scores would put all weight on one key and pass no gradient.

    **Grouped-query attention**: H / K query heads share one key/value head, for a smaller cache. Trap:
    query head i reads key/value head i // (H / K). With H = 4 and K = 2, heads 0 and 1 read 0, heads 2
    and 3 read 1: k.repeat_interleave, not k.repeat. `enable_gqa` does it without a copy.

    Trap: the queries are the last T of the S positions, so query t attends to keys 0 .. S - T + t. Two
    new tokens after three cached ones (T = 2, S = 5) attend to 11110 and 11111. `is_causal` aligns with
    the first key instead (10000, 11000), which is right only for S = T."""
    (H, T), (K, S), mask, causal = q.shape[1:3], k.shape[1:3], None, False
    if T == S and q.device.type != "mps":  # some versions of torch compute is_causal wrong on MPS
        causal = True  # in a branch: under torch.compile T == S may be no plain bool
    elif T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)  # True: attends
    # On CUDA flash attention shares heads without a copy. It takes bf16 and no mask.
    share = q.device.type != "cuda" or (q.dtype == torch.bfloat16 and mask is None)
    if not share:
        k = k.repeat_interleave(H // K, dim=1)  # [B, H, S, h]
        v = v.repeat_interleave(H // K, dim=1)  # [B, H, S, h]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=share)

def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(x) = x * sigmoid(x). 2 x [.., I] -> [.., I]"""
    return F.silu(gate) * up

def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of -log softmax(logits)[label] over all labels but IGNORE_INDEX. [N, V], [N] -> []
    Not the mean: train_step (section 8) divides once, by the number of labels of the whole step."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 is too coarse
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

# ==== 4. Model ==========================================================================
#
# Modules have the names of the published checkpoint. The **hidden states** [B, T, D], one vector per
# token, form the **residual stream**. Each layer adds two **residual branches** to it: attention, and the
# MLP, which processes each token alone. A branch normalizes the copy that it reads ("pre-norm").
# At the end the head turns each hidden state into V **logits**, a score for each possible next token.

class KVCache:
    """Keys (rotated) and values of all tokens seen, so that they need not be computed again.

    Trap: `length`, the number of filled positions, is also the position of the next token. All layers
    write to the same positions, so it moves once, in Decoder.forward, after the last layer has written."""
    def __init__(self, config: DanubeConfig, batch_size: int, max_length: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.length, self.max_length = 0, max_length
        self.input_ids = torch.zeros(batch_size, max_length, dtype=torch.long, device=device)
        kv_shape = batch_size, config.num_key_value_heads, max_length, config.head_dim
        self.kv = torch.zeros(config.num_hidden_layers, 2, *kv_shape, dtype=dtype, device=device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, K, T, h] of new tokens. Return those of all tokens, 2 x [B, K, S, h]."""
        end = self.length + k.shape[2]
        require(end <= self.max_length, f"{end} tokens do not fit a cache of {self.max_length}")
        keys, values = self.kv[layer, 0], self.kv[layer, 1]  # 2 x [B, K, max_length, h]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def keep_common_prefix(self, input_ids: Tensor) -> None:
        """Forget all tokens from the first that differs from input_ids [B, T]."""
        length = min(self.length, input_ids.shape[1] - 1)  # the logits of the last one are needed
        same = (self.input_ids[:, :length] == input_ids[:, :length]).all(dim=0)  # [length]
        self.length = int(same.long().cumprod(dim=0).sum())

class RMSNorm(nn.Module):
    def __init__(self, config: DanubeConfig) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        return rms_norm(x, self.weight, self.eps)

class Attention(nn.Module):
    """Four linear layers around grouped_query_attention."""
    def __init__(self, config: DanubeConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, H * self.head_dim, bias=False)
        self.k_proj = nn.Linear(D, K * self.head_dim, bias=False)
        self.v_proj = nn.Linear(D, K * self.head_dim, bias=False)
        self.o_proj = nn.Linear(H * self.head_dim, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:  # [B, T, D]
        heads = (*x.shape[:2], -1, self.head_dim)  # x [B, T, D]
        q = self.q_proj(x).view(heads).transpose(1, 2)  # [B, H, T, h]
        k = self.k_proj(x).view(heads).transpose(1, 2)  # [B, K, T, h]
        v = self.v_proj(x).view(heads).transpose(1, 2)  # [B, K, T, h]
        q, k = rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer, k, v)  # [B, K, S, h]
        y = grouped_query_attention(q, k, v)  # [B, H, T, h]
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, T, H h] -> [B, T, D]

class MLP(nn.Module):
    def __init__(self, config: DanubeConfig) -> None:
        super().__init__()
        D, I = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, I, bias=False)
        self.up_proj = nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

class DecoderLayer(nn.Module):
    """Two residual branches. **Activation checkpointing** keeps only the layer's input and computes the
    layer again in the backward pass."""
    activation_checkpointing = False

    def __init__(self, config: DanubeConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:  # [B, T, D]
        if self.activation_checkpointing and torch.is_grad_enabled():
            return activation_checkpoint(self.add_branches, x, cos, sin, kv_cache, use_reentrant=False)
        return self.add_branches(x, cos, sin, kv_cache)

    def add_branches(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, kv_cache)  # [B, T, D]
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, T, D]

class Decoder(nn.Module):
    """The model without its head."""
    def __init__(self, config: DanubeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)

    def forward(self, input_ids: Tensor, kv_cache: KVCache | None = None) -> Tensor:  # [B, T] -> [B, T, D]
        start = 0 if kv_cache is None else kv_cache.length
        end = start + input_ids.shape[1]
        positions = torch.arange(start, end, device=input_ids.device)  # [T]
        cos, sin = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(input_ids).to(self.norm.weight.dtype)  # [B, T, D], in the type of norms
        for layer in self.layers:
            x = layer(x, cos, sin, kv_cache)
        if kv_cache is not None:
            kv_cache.input_ids[:, start:end] = input_ids
            kv_cache.length = end
        return self.norm(x)

# Logits are the largest tensor. The loss computes them for this many tokens at a time [ours] (0.5 GB in
# fp32), and again in the backward pass.
LOGIT_TOKENS = 4_096

class Danube3(nn.Module):
    """The language model: the decoder and its head."""
    def __init__(self, config: DanubeConfig) -> None:
        super().__init__()
        self.config, self.stop_ids = config, [config.eos_token_id]  # generation ends at any stop id
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # untied [paper]

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:  # of the hidden states; other weights than norms may be quantized
        return self.model.norm.weight.dtype

    @staticmethod
    def new(config: DanubeConfig, seed: int, device: str = "cpu") -> "Danube3":
        """A model to pre-train. On device "meta" it has shapes but no memory."""
        with torch.device("meta"):
            model = Danube3(config)
        return model if device == "meta" else model.to_empty(device=device).init_weights(seed)

    def init_weights(self, seed: int) -> "Danube3":
        """Norm weights are 1, all others normal [ours]."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)
        return self

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """input_ids [B, T] -> logits [B, T, V] in fp32; with labels [B, T], the sum of the losses [].

        Labels line up with input_ids: position t - 1 predicts labels[:, t], and labels[:, 0] is unused."""
        x = self.model(input_ids)  # [B, T, D]
        if labels is None:
            return self.lm_head(x).float()  # [B, T, V]
        x = x.flatten(0, 1)  # [B T, D]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # [B T]
        if len(x) <= LOGIT_TOKENS:
            return self.block_loss(x, targets)
        loss = torch.zeros((), device=x.device)
        for block in zip(x.split(LOGIT_TOKENS), targets.split(LOGIT_TOKENS)):
            loss = loss + activation_checkpoint(self.block_loss, *block, use_reentrant=False)
        return loss

    def block_loss(self, x: Tensor, targets: Tensor) -> Tensor:  # [N, D], [N] -> []
        return cross_entropy(self.lm_head(x), targets)

# ==== 5. Sampling =======================================================================
#
# Generation picks a next token, appends it, and asks again. The first pass reads the whole prompt into
# the cache (**prefill**), each later pass reads one new token (**decode**).

def next_token_probabilities(logits: Tensor, temperature: float, top_k: int = 0,
                             top_p: float = 1.0) -> Tensor:
    """softmax(logits / temperature), restricted to likely tokens. [B, V] -> [B, V]

    A temperature below 1 favours likely tokens. top_k keeps the k likeliest (0: all), top_p the fewest
    likeliest that reach p together (1.0: all). With p = 0.6, the first two of 0.5, 0.3, 0.2 stay: before
    the second there is 0.5, less than p, before the third 0.8."""
    logits = logits.float() - logits.float().amax(-1, keepdim=True)  # no overflow at small temperatures
    probabilities = (logits / max(temperature, 1e-30)).softmax(-1)
    if top_k == 0 and top_p >= 1.0:
        return probabilities
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    if top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities  # the sum of likelier tokens
        probabilities[:, 1:] *= before[:, 1:] < top_p  # the first token always stays
        probabilities /= probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)  # back to vocabulary order

@torch.no_grad()
def generate_tokens(model: Danube3, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0,
                    top_k: int = 0, top_p: float = 1.0, seed: int | None = None,
                    kv_cache: KVCache | None = None) -> Iterator[Tensor]:
    """Continue prompts of equal length, input_ids [B, T]. Yields the next token of each, [B].

    Temperature 0 is **greedy**: it takes the likeliest token. After a stop token a sequence repeats
    </s>. The loop ends when all have stopped, after max_new_tokens, or when the context is full. A
    prefix shared with the `kv_cache` of an earlier call is not computed again."""
    (B, T), context, device = input_ids.shape, model.config.max_position_embeddings, input_ids.device
    require(1 <= T <= context, f"a prompt of {T} tokens does not fit: use 1 to {context}")
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)  # seed(): a random one
    end = min(T + max_new_tokens, context)
    kv_cache = kv_cache or KVCache(model.config, B, end, model.dtype, device)
    kv_cache.keep_common_prefix(input_ids)
    input_ids = input_ids[:, kv_cache.length:]
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    stop_ids = torch.tensor(model.stop_ids, device=device)
    for _ in range(end - T):
        hidden = model.model(input_ids, kv_cache)  # prefill [B, T, D], then decode [B, 1, D]
        logits = model.lm_head(hidden[:, -1]).float()  # [B, V]
        require(logits.isfinite().all(), "the logits are not finite: try another --dtype or checkpoint")
        if temperature == 0:
            next_ids = logits.argmax(-1)  # [B]
        else:
            probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
            next_ids = torch.multinomial(probabilities, 1, generator=generator)[:, 0]  # [B]
        next_ids = next_ids.masked_fill(ended, model.config.eos_token_id)
        yield next_ids
        ended |= torch.isin(next_ids, stop_ids)
        if ended.all():
            return
        input_ids = next_ids[:, None]  # [B, 1]

def generate(model: Danube3, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0,
             top_k: int = 0, top_p: float = 1.0, seed: int | None = None) -> Tensor:
    """Prompts and their continuations. [B, T] -> [B, T + n], n at most max_new_tokens."""
    ids = [input_ids]
    for next_ids in generate_tokens(model, input_ids, max_new_tokens, temperature, top_k, top_p, seed):
        ids.append(next_ids[:, None])
    return torch.cat(ids, dim=1)

# ==== 6. Data ===========================================================================
#
# Text is stored as **token shards**: files of uint16 ids, documents one after another as <s> .. </s>.
#
# Which sequences make up step 1,234,567? A loader that draws one by one must save its state, which
# depends on the number of GPUs. Here the batch is a **pure function of the step**: mixture_pattern
# distributes sequences among sources, permuted_index shuffles them.

SMALL_FILE = 2**24  # [ours] bytes; check larger shards with `sha256sum -c`
VALIDATION_SEQUENCES = 32  # [ours] of each source
MAX_EPOCHS = 100  # [ours] over the data of a source

class TokenData:
    """A folder of token shards, read in **blocks** of T consecutive ids of one source.

    A block may reach into the next document, and attention crosses that border [ours].
    """
    def __init__(self, folder: str | Path, config: DanubeConfig, sequence_length: int,
                 tokenizer: Tokenizer | None = None) -> None:
        self.folder, self.sequence_length = Path(folder), sequence_length
        self.vocab_size, path = config.vocab_size, self.folder / "meta.json"
        require(path.is_file(), f"no data at {folder} (no meta.json): make it with data/prepare.py")
        verify_checksums(self.folder, largest=SMALL_FILE)  # section 9
        self.tokenizer = Tokenizer(self.folder / "tokenizer.model")
        self.starts, self.blocks = {}, {}  # by (source, split): first id of each shard, number of blocks
        with reading(path):
            meta = read_json(path)
            same = meta["tokenizer_sha256"] == self.tokenizer.sha256 == (tokenizer or self.tokenizer).sha256
            require(same and self.tokenizer.vocab_size <= self.vocab_size,
                    f"{folder} was made with another tokenizer: choose other data")
            require(meta["sources"], f"{path} names no sources: make the data again")
            for name in meta["sources"]:
                for split in ("train", "val"):
                    counts = meta["sources"][name][split]
                    self.starts[name, split] = np.cumsum([0, *counts])
                    self.blocks[name, split] = sum(counts) // sequence_length
                    for number, count in enumerate(counts):
                        path = self.shard(name, split, number)
                        require(path.stat().st_size == 2 * count, f"{path} was cut short: make it again")

    def shard(self, name: str, split: str, number: int) -> Path:
        return self.folder / f"{name}-{split}-{number:05d}.bin"

    def block(self, name: str, split: str, index: int) -> np.ndarray:
        """Block `index` of a source, from one shard or several. -> ids [T], int64"""
        T, starts, ids = self.sequence_length, self.starts[name, split], np.empty(0, np.int64)
        while len(ids) < T:  # shards are opened for each read: there may be too many to keep open
            position = index * T + len(ids)
            number = int(np.searchsorted(starts, position, side="right")) - 1
            path, count = self.shard(name, split, number), min(T - len(ids), starts[number + 1] - position)
            part = np.fromfile(path, "<u2", count, offset=2 * (position - starts[number]))
            intact = len(part) == count and part.max() < self.vocab_size
            require(intact, f"{path} is damaged: make the data again")
            ids = np.append(ids, part)
        return ids

    def evenly_spread(self, name: str, split: str, count: int) -> Tensor:
        """`count` blocks of a source, or all if there are fewer. -> [N, T]"""
        total = self.blocks[name, split]
        require(total, f"source {name!r} ({split}) of {self.folder} is too short: add text")
        count = min(total, count)
        blocks = [self.block(name, split, i * total // count) for i in range(count)]
        return torch.from_numpy(np.stack(blocks))

def mixture_pattern(weights: dict[str, int], length: int) -> list[str]:
    """The sources of the first `length` sequences: {"a": 3, "b": 2} gives a b a a b.

    Let W be the sum of the weights. Sequence t goes to a source that is behind its share: it has had
    n < t w_i / W. Of several, to the one whose next is due first, at sequence (n + 1) W / w_i, rounded
    up (earliest deadline first). Then no count is ever off by a whole sequence (the bound of Tijdeman
    1980, "The chairman assignment problem"). After W sequences all counts are exact, and the pattern repeats.
    """
    total, given, pattern = sum(weights.values()), dict.fromkeys(weights, 0), []
    for t in range(1, length + 1):
        deadlines = {}
        for name, weight in weights.items():
            if t * weight > given[name] * total:
                deadlines[name] = -(-(given[name] + 1) * total // weight)  # -(-a // b) rounds up
        earliest = min(deadlines, key=deadlines.__getitem__)
        given[earliest] += 1
        pattern.append(earliest)
    return pattern

def count_before(pattern: list[str], name: str, position: int) -> int:
    """How many of the first `position` sequences come from source `name`."""
    periods, rest = divmod(position, len(pattern))
    return periods * pattern.count(name) + pattern[:rest].count(name)

def permuted_index(index: int, size: int, key: str) -> int:
    """The place of `index` in a random permutation of 0 .. size-1, chosen by `key`. Nothing is stored.

    A Feistel network, as in block ciphers: write the index as two digits in base ceil(sqrt(size)), and
    four times

        (high, low) -> (low, (high + hash(key, round, low)) mod base)

    A subtraction undoes a round, so this permutes all base^2 numbers. A result of size or more is
    permuted again ("cycle walking"). The walk ends, because a repeated permutation returns to its
    start. No two walks end at the same place, because walking back is unique too.
    """
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
    """The batches of pre-training: a function of the training config, the shards and the step alone.

    A stage's pattern names the source of each sequence. The number of earlier sequences of this source
    is the number of its block, in an order that each **epoch** (once through all blocks) permutes anew.
    """
    def __init__(self, data: TokenData, config: TrainConfig) -> None:
        self.data, self.config, self.total_steps = data, config, config.stage_ends[-1]
        self.fingerprint = {"meta.json": file_sha256(data.folder / "meta.json")}
        self.patterns = []  # of each stage
        self.starts = [0, *config.stage_ends]  # the first step of each stage
        self.used = [dict.fromkeys(config.stages[0].mixture, 0)]  # sequences of each source before each stage
        for stage, start, end in zip(config.stages, self.starts, config.stage_ends):
            sequences, used = (end - start) * config.batch_size, dict(self.used[-1])
            pattern = mixture_pattern(stage.mixture, max(1, min(sequences, sum(stage.mixture.values()))))
            for name in used:
                used[name] += count_before(pattern, name, sequences)
            self.patterns.append(pattern)
            self.used.append(used)
        self.epochs = {}  # how often the whole run reads each source
        for name, count in self.used[-1].items():
            for split in ("train", "val"):
                found = data.blocks.get((name, split))
                require(found, f"{data.folder}: source {name!r} ({split}) is missing or too short: add text")
            self.epochs[name] = count / data.blocks[name, "train"]
            require(self.epochs[name] <= MAX_EPOCHS, f"source {name!r} would be read {self.epochs[name]:.0f} "
                    "times: add text, or train on fewer tokens")

    def stage_index(self, step: int) -> int:
        return sum(step >= end for end in self.config.stage_ends[:-1])

    def stage(self, step: int) -> str:
        """The name of the stage of step `step`, counted from 0."""
        return self.config.stages[self.stage_index(step)].name

    def locate(self, step: int, index: int) -> tuple[str, int]:
        """Sequence `index` of step `step` -> its source and the number of its block."""
        stage = self.stage_index(step)
        pattern = self.patterns[stage]
        position = (step - self.starts[stage]) * self.config.batch_size + index  # in the stage
        name = pattern[position % len(pattern)]
        blocks = self.data.blocks[name, "train"]
        epoch, place = divmod(self.used[stage][name] + count_before(pattern, name, position), blocks)
        return name, permuted_index(place, blocks, f"{self.config.seed}/{name}/{epoch}")

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """input_ids and labels, 2 x [batch_size / world_size, T]."""
        blocks = []
        for index in range(rank, self.config.batch_size, world_size):
            name, block = self.locate(step, index)
            blocks.append(self.data.block(name, "train", block))
        input_ids = torch.from_numpy(np.stack(blocks))
        return input_ids, input_ids  # every token but the first is a target

    def validation(self) -> dict[str, tuple[Tensor, Tensor]]:  # of each source
        validation = {}
        for name in self.used[0]:
            input_ids = self.data.evenly_spread(name, "val", VALIDATION_SEQUENCES)
            validation[name] = (input_ids, input_ids)
        return validation

# ==== 7. Optimizer ======================================================================
#
# AdamW keeps two running means per weight, its **moments**: of the gradient, and of its square. It
# steps against the first, divided by the root of the second, so all weights move at a similar
# speed. **Weight decay** also shrinks them a little. The learning rate rises during **warm-up**,
# while the means are rough, and then falls along half a cosine.
#
#     m = beta1 m + (1 - beta1) g                     g is the gradient
#     v = beta2 v + (1 - beta2) g^2                   m and v start at 0, so they are too small:
#     m' = m / (1 - beta1^t), v' = v / (1 - beta2^t)  corrected for that, at step t = 1, 2, ..
#     w = w - lr (m' / (sqrt(v') + eps) + weight_decay w)

def make_optimizer(model: Danube3, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: a norm weight has no reason to be near zero."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    norms = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), config.adam_eps,
                                  config.weight_decay, fused=True)  # fused: one pass over memory
    for p in matrices + norms:  # made before the first step, so that a checkpoint can fill them
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer

def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0.

        peak * (step + 1) / warmup                    during warm-up
        peak * (f + (1 - f) * (1 + cos(pi * p)) / 2)  p = 0 .. 1, f = final_lr_fraction
    """
    warmup, final = max(1, round(config.warmup_fraction * total_steps)), config.final_lr_fraction
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)  # 0 .. 1
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # 1 .. 0
    return config.learning_rate * (final + (1 - final) * cosine)

# ==== 8. Training =======================================================================
#
# **Mixed precision**: linear layers compute in bf16 or fp16; weights, gradients and the residual
# stream stay in fp32. bf16 has the range of fp32 and 8 bits of precision. fp16 has 11 bits, but no
# number below 6e-8, where many gradients lie. So with fp16 a **gradient scaler** multiplies the
# loss, and with it all gradients, and divides again before the step.

def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on GPUs of capability 8 or newer (older ones only emulate it), fp16 on older, else fp32."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16

def autocast(device: torch.device) -> torch.autocast:
    dtype = compute_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

# Several GPUs: torchrun starts `world_size` processes, one per GPU, numbered by `rank`. All run the
# same lines and meet in **collective calls** such as all_reduce, which finish when all have made them.
# **Fully sharded data parallel** (FSDP): each process stores 1 / world_size of every weight, gradient
# and moment. Before a layer computes, its weights are collected (all-gather), and afterwards freed
# (reshard). Gradients are averaged, and each process keeps its part (reduce-scatter).

def rank_and_world_size() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def shard_model(model: Danube3, device: torch.device) -> Danube3:
    """Put a model on its device. With several ranks FSDP allocates each rank's part, and rank 0, which
    alone needs the weights, sends them."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return model.to(device)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    dtype, mesh = compute_dtype(device), dist.init_device_mesh(device.type, (world_size,))
    require(dtype != torch.float16, "several GPUs need bf16, and these have fp16 only: train on one")
    weights = model.state_dict() if rank == 0 else {}
    model.to("meta")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # the rest: embedding, last norm, head
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    return model

def sequence_lengths(labels: Tensor) -> Tensor:
    """The length of each sequence up to its last target: no target needs the rest. [B, T] -> [B]"""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != IGNORE_INDEX) * positions).amax(dim=1)

def micro_batches(input_ids: Tensor, labels: Tensor, size: int,
                  device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Split sequences [N, T] into micro-batches of at most `size`, each as short as possible."""
    for ids, own_labels in zip(input_ids.split(size), labels.split(size)):
        length = max(1, int(sequence_lengths(own_labels).amax()))
        yield ids[:, :length].to(device), own_labels[:, :length].to(device)

def train_step(model: Danube3, optimizer: torch.optim.Optimizer, input_ids: Tensor, labels: Tensor,
               config: TrainConfig, lr: float,
               scaler: torch.amp.GradScaler | None = None) -> tuple[float, float]:
    """One optimizer step on this rank's input_ids and labels [N, T]. -> loss, gradient norm

        loss = sum of -log p(target) / number of targets, both over the whole step and all ranks

    Trap: not the mean of the micro-batches' means. If one has 10 targets and the next 1,000, each
    target of the first would count a hundred times as much. backward() adds the gradients up.
    """
    device, world_size = model.device, rank_and_world_size()[1]
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    count = all_reduce((labels[:, 1:] != IGNORE_INDEX).sum().to(device)).clamp(min=1)  # of targets
    loss = torch.zeros((), device=device)
    batches = list(micro_batches(input_ids, labels, config.micro_batch_size, device))
    for number, (ids, own_labels) in enumerate(batches, start=1):
        if world_size > 1:  # reduce-scatter once, after the last micro-batch
            model.set_requires_gradient_sync(number == len(batches))  # type: ignore[operator]
        with autocast(device):
            micro_loss = model(ids, own_labels) / count
        scaler.scale(micro_loss * world_size).backward()  # FSDP averages over ranks, and we need the sum
        loss += micro_loss.detach()
    all_reduce(loss)
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if torch.isfinite(loss + grad_norm):  # otherwise the weights stay as they are
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss.item(), grad_norm.item()

@torch.no_grad()
def evaluate_loss(model: Danube3, input_ids: Tensor, labels: Tensor, micro_batch_size: int) -> float:
    """Mean loss per target of sequences [N, T]. Ranks divide them if all get equally many: FSDP needs
    equally many forward passes. Otherwise each rank computes all, with the same mean."""
    rank, world_size = rank_and_world_size()
    if len(labels) % world_size == 0:
        input_ids, labels = input_ids[rank::world_size], labels[rank::world_size]
    loss = torch.zeros((), device=model.device)
    count = (labels[:, 1:] != IGNORE_INDEX).sum().to(model.device)  # of targets
    for ids, own_labels in micro_batches(input_ids, labels, micro_batch_size, model.device):
        loss += model(ids, own_labels)
    return all_reduce(loss).item() / max(1, int(all_reduce(count)))

MAX_SKIPPED_STEPS = 20  # [ours] in a row; fp16's scaler needs up to 16 to find its scale

class Trainer:
    """A training run: model, optimizer, output directory, and how far it has come.

    `data` has total_steps, stage(step), batch(step, rank, world_size), validation() and a fingerprint,
    which must be equal on resume. `base` is the folder that the weights came from.
    """
    def __init__(self, out: Path, model: Danube3, tokenizer: Tokenizer, data: "StagedData | ChatData",
                 resume: bool = False, base: Path | None = None, device: torch.device | None = None) -> None:
        self.out, self.model, self.tokenizer, self.data, self.base = out, model, tokenizer, data, base
        self.config, self.device = data.config, device or model.device
        self.rank, self.world_size = rank_and_world_size()
        self.step, self.tokens, self.skipped = 0, 0, 0  # steps and tokens done; steps skipped in a row
        self.saved_step = -1  # of the newest checkpoint
        self.resources = contextlib.ExitStack()  # open files and locks
        require(self.config.batch_size % self.world_size == 0, f"{self.config.batch_size} sequences per step "
                f"cannot be divided evenly among {self.world_size} processes: change one")
        self.run_config = describe_run(self)  # this, the next, and resume_training: section 9
        self.log = open_output_directory(self, resume)
        self.model = shard_model(model, self.device).train()
        self.optimizer = make_optimizer(self.model, self.config)
        fp16 = compute_dtype(self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        if resume:
            resume_training(self)

    def take_step(self, peak_flops: float) -> dict[str, Any]:
        """One optimizer step. -> its metrics. **MFU** (model FLOPs utilization) is the model's operations
        per second over `peak_flops`, those that the devices can do."""
        start, lr = time.perf_counter(), learning_rate(self.step, self.data.total_steps, self.config)
        input_ids, labels = self.data.batch(self.step, self.rank, self.world_size)
        loss, grad_norm = train_step(self.model, self.optimizer, input_ids, labels, self.config, lr,
                                     self.scaler)
        tokens = int(all_reduce(sequence_lengths(labels).sum().to(self.device)))
        rate = tokens / (time.perf_counter() - start)
        frozen = not self.model.model.norm.weight.requires_grad  # LoRA
        flops = rate * flops_per_token(self.model.config, tokens // self.config.batch_size, frozen)
        finite = math.isfinite(loss + grad_norm)
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.skipped = 0 if finite else self.skipped + 1
        metrics = {"step": self.step, "stage": self.data.stage(self.step - 1), "tokens": self.tokens,
                   "loss": loss if finite else None, "lr": lr,  # JSON has no NaN
                   "grad_norm": grad_norm if finite else None, "tokens_per_second": round(rate),
                   "mfu": round(flops / peak_flops, 4)}
        print(json.dumps(metrics), file=self.log, flush=True)
        require(self.skipped < MAX_SKIPPED_STEPS, "the loss was not finite in "
                f"{self.skipped} steps in a row: lower the learning rate")
        return metrics

    def validate(self) -> None:
        """Log and print the validation loss of each source."""
        losses, text = {}, f"step {self.step}, validation loss (perplexity):"
        with autocast(self.device):
            for name, batch in self.data.validation().items():
                losses[name] = evaluate_loss(self.model, *batch, self.config.micro_batch_size)
                text += f" {name} {losses[name]:.3f} ({math.exp(min(losses[name], 99)):,.1f})"
        if self.world_size > 1:  # FSDP leaves the root unsharded when no backward pass follows
            self.model.reshard()  # type: ignore[operator]
        metrics = {"step": self.step, "stage": self.data.stage(max(0, self.step - 1)),  # of the last step
                   "tokens": self.tokens, "val_loss": losses}
        print(json.dumps(metrics), file=self.log, flush=True)
        if self.rank == 0:
            tqdm.write(text)  # above the progress bar

def train(run: Trainer, peak_flops: float, interrupts: Sized = ()) -> bool:
    """Train to the last step. -> False if something in `interrupts` ended it earlier.

    It saves and validates every `save_every` steps and after each stage, and validates before step 0.
    """
    data = run.data
    bar = tqdm(total=data.total_steps, initial=run.step, unit="step",
               mininterval=1 if sys.stderr.isatty() else 10, disable=run.rank > 0)
    with run.resources, bar:
        for step in range(run.step, data.total_steps):
            new_stage = data.stage(step) != data.stage(max(0, step - 1))
            if new_stage or step % run.config.save_every == 0:
                if step > 0:
                    save_training(run)  # section 9
                run.validate()
            if all_reduce(torch.tensor(len(interrupts), device=run.device)) > 0:  # on any rank
                save_training(run)
                return False
            metrics = run.take_step(peak_flops)
            shown = ("stage", "loss", "tokens_per_second", "mfu")
            bar.set_postfix({name: metrics[name] for name in shown}, refresh=False)
            bar.update()
        save_training(run)
        run.validate()
    return True

# ==== 9. Checkpoints ====================================================================
#
# A checkpoint is a Hugging Face Llama folder, which transformers opens (if it is not quantized). It is
# written as NAME.partial and renamed once all of it is on disk. So a folder with the right name is
# whole, even after a power failure.

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other programs away from a file or folder. The lock of a killed program ends too."""
    handle = os.open(path if fcntl else os.devnull, os.O_RDONLY)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DanubeError(f"{path} is in use by another program: wait, or choose another") from error
    finally:
        os.close(handle)

def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS, as `sha256sum -c` reads it, and wait until the whole folder is on disk."""
    sums = folder / "SHA256SUMS"
    files = sorted(set(folder.iterdir()) - {sums})
    sums.write_text("".join(f"{file_sha256(path)}  {path.name}\n" for path in files))
    for path in [*files, sums, folder]:
        sync(path)

def verify_checksums(folder: Path, largest: float = math.inf, skip: str = ".jsonl") -> None:
    """Compare the files of at most `largest` bytes with SHA256SUMS. Downloaded folders have none.

    Names that contain `skip` are not compared. Users may edit .jsonl files.
    """
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        return
    for line in sums.read_text(errors="replace").splitlines():
        checksum, _, name = line.partition("  ")
        path = folder / name
        if skip not in name:
            intact = path.is_file() and (path.stat().st_size > largest or file_sha256(path) == checksum)
            require(intact, f"{path} is missing or damaged: copy the folder again")

@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into. On success it becomes `folder`, otherwise it is removed."""
    require(not folder.exists(), f"{folder} already exists: remove it, or choose another")
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        try:
            for leftover in partial.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield partial
            write_checksums(partial)
            partial.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file."""
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise DanubeError(f"{path} cannot be written ({error}): is the disk full?") from error
    path.chmod(0o644)  # safetensors lets nobody else read

def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with reading(path), safetensors.safe_open(path, framework="pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)

def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file. Without the file: `default`, if that is given."""
    if default is not None and not path.exists():
        return default
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))

def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

def read_config(folder: Path) -> DanubeConfig:
    """config.json of a Hugging Face folder. What Danube3 does not compute is refused, not ignored."""
    path = folder / "config.json"
    with reading(path):
        raw = read_json(path)
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})  # transformers 5, and 4
        raw["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        for name, value in {**FIXED, "partial_rotary_factor": 1.0, "rope_type": "default"}.items():
            found = raw.get(name, value)
            require(found == value, f"{path}: {name} is {found!r}, and Danube3 has {value!r}")
        heads = raw["num_attention_heads"]
        values = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // max(1, heads),
                  "rope_theta": rope.get("rope_theta", 1e4), "initializer_range": 0.02,
                  "rms_norm_eps": 1e-6, "max_position_embeddings": 2_048}  # transformers' defaults
        for field in fields(DanubeConfig):
            value = raw.get(field.name)
            if isinstance(value, list):  # several end tokens: see read_stop_ids
                value = value[0]
            if value not in (None, -1):  # -1: none
                values[field.name] = value
        return DanubeConfig(**values)

def read_stop_ids(folder: Path, config: DanubeConfig) -> list[int]:
    """The ids that end a text. A folder may list several."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name, {}).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if ids and all(type(i) is int for i in ids):
            return ids
    return [config.eos_token_id]

def read_tokenizer(folder: Path, config: DanubeConfig) -> Tokenizer:
    """The tokenizer of a checkpoint. One that does not fit the model is refused."""
    settings = read_json(folder / "tokenizer_config.json", {})
    tokenizer = Tokenizer(folder / "tokenizer.model", bool(settings.get("add_bos_token", True)))
    tokenizer.chat_template = settings.get("chat_template") or CHAT_TEMPLATE
    special = (tokenizer.sp.bos_id(), tokenizer.sp.eos_id())
    fits = special == (config.bos_token_id, config.eos_token_id) and tokenizer.vocab_size <= config.vocab_size
    require(fits, f"{folder}/tokenizer.model has more pieces, or other ids of <s> and </s>: use its own")
    added = read_json(folder / "added_tokens.json", {})
    with reading(folder / "tokenizer_config.json"):
        for token_id, token in dict(settings.get("added_tokens_decoder", {})).items():
            added[token["content"]] = int(token_id)
        for token, token_id in added.items():
            require(token_id < tokenizer.vocab_size, f"{folder}/tokenizer.model lacks {token!r}: use its own")
    return tokenizer

def write_settings(folder: Path, model: Danube3, tokenizer: Tokenizer, dtype: torch.dtype,
                   **more: object) -> None:
    """The small files of a checkpoint: config.json (with `more`), generation defaults, the tokenizer."""
    config = model.config
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], **asdict(config), **FIXED, "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."), **more})
    write_json(folder / "generation_config.json", {
        "bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id,
        "eos_token_id": model.stop_ids if len(model.stop_ids) > 1 else config.eos_token_id})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>", "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings, "chat_template": tokenizer.chat_template})
    (folder / "tokenizer.model").write_bytes(tokenizer.content)

def write_model(folder: Path, model: Danube3, tokenizer: Tokenizer, dtype: torch.dtype,
                weights: dict[str, Tensor]) -> None:
    write_settings(folder, model, tokenizer, dtype)
    converted = {name: weight.to("cpu", dtype).contiguous() for name, weight in weights.items()}
    write_tensors(folder / "model.safetensors", converted)

def save_checkpoint(folder: Path, model: Danube3, tokenizer: Tokenizer,
                    dtype: torch.dtype = torch.float32) -> None:
    """Write a complete checkpoint, its weights in `dtype`."""
    with atomic_folder(folder) as partial:
        write_model(partial, model, tokenizer, dtype, model.state_dict())

def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: a single one, or those that an index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        if index.is_file():  # from an older export; transformers ignores it too
            print(f"{index} is ignored: {single.name} is there", file=sys.stderr)
        return [single]
    require(index.is_file(), f"{single} is missing; pickle files (.bin, .pt) are not read: convert them")
    with reading(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
        require(all(Path(name).name == name for name in names), f"{index} names files outside its folder")
    return [folder / name for name in names]

def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights. One matrix stored for both embedding and head ("tied") is yielded twice."""
    tied = read_json(folder / "config.json", {}).get("tie_word_embeddings")
    twin = {"model.embed_tokens.weight": "lm_head.weight", "lm_head.weight": "model.embed_tokens.weight"}
    found = {}
    for path in weight_files(folder):
        for name, weight in read_tensors(path):
            name = name.replace("_orig_mod.", "").removeprefix("module.")  # from torch.compile, from DDP
            if name in twin:
                found[name] = weight
            if not name.endswith("rotary_emb.inv_freq"):  # a constant that old exports store
                yield name, weight
    if tied and len(found) == 1:
        for name, weight in found.items():
            yield twin[name], weight

def weights_sha256(folder: Path) -> str:
    checksums = "".join(file_sha256(path) for path in sorted(folder.glob("*model*.safetensors")))
    return hashlib.sha256(checksums.encode()).hexdigest()

def is_finite(tensor: Tensor) -> bool:
    """Smallest and largest suffice: with a NaN, both are NaN."""
    return tensor.numel() == 0 or tensor.is_meta or bool(torch.stack(tensor.aminmax()).isfinite().all())

def checkpoints_in(out: Path) -> list[Path]:
    """The complete checkpoints of an output directory, oldest first."""
    found = [path for path in out.glob("step-*") if path.name[5:].isdecimal()]  # no .partial
    return sorted(found, key=lambda path: int(path.name[5:]))

def find_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest checkpoint inside an output directory."""
    path = Path(path)
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path
    checkpoints = checkpoints_in(path)
    require(checkpoints, f"{path} does not exist, or is no checkpoint and holds none: give another")
    return checkpoints[-1]

# A run also saves its **training state**: the optimizer's moments, the step, and the fp32 **master
# weights** if model.safetensors has a smaller type.

def describe_run(run: Trainer) -> dict[str, Any]:
    """The run config as JSON stores it. It must be equal on all ranks, and when the run is resumed."""
    training = asdict(run.config)
    del training["save_every"], training["micro_batch_size"]  # these may change
    trainable = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    described = {"model": asdict(run.model.config), "training": training, "data": run.data.fingerprint,
                 "start": {"trainable": trainable, "weights": weights_sha256(run.base) if run.base else None}}
    text = json.dumps([described, str(checkpoints_in(run.out))])
    texts = [text] * run.world_size
    if run.world_size > 1:
        dist.all_gather_object(texts, text)
    require(text == texts[0], f"rank {run.rank} has other flags, data or files than rank 0: start all alike")
    return json.loads(text)[0]

def open_output_directory(run: Trainer, resume: bool) -> Any:
    """Check and lock the output directory. -> metrics.jsonl, open; only rank 0 writes to it"""
    out, found = run.out, checkpoints_in(run.out)
    require(not (out / "config.json").exists(), f"{out} is a checkpoint: choose another --out")
    require(found or not resume, f"nothing to resume: {out} holds no checkpoint; leave --resume out")
    require(resume or not found, f"{out} already holds a run: add --resume, or choose another --out")
    if run.rank > 0:
        return run.resources.enter_context(open(os.devnull, "a"))
    out.mkdir(parents=True, exist_ok=True)
    run.resources.enter_context(locked(out))
    return run.resources.enter_context(open(out / "metrics.jsonl", "a" if resume else "w"))

def training_tensors(run: Trainer) -> Iterator[tuple[str, Tensor]]:
    """All trainable weights and AdamW's state of each. With several ranks they are sharded."""
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            yield f"weights.{name}", parameter.detach()
            for key, tensor in run.optimizer.state[parameter].items():  # step, exp_avg, exp_avg_sq
                yield f"{key}.{name}", tensor

def save_training(run: Trainer) -> None:
    """Save this step and remove older checkpoints. All ranks must call this."""
    if run.saved_step < run.step:
        write_training_checkpoint(run)
        run.saved_step = run.step
    if run.rank == 0:
        for old in checkpoints_in(run.out)[:-1]:  # renamed first: half of a folder must not look whole
            old.rename(old.with_name(f"{old.name}.partial"))
        for leftover in run.out.glob("step-*.partial"):
            shutil.rmtree(leftover)
    if run.world_size > 1:
        dist.barrier()  # torchrun kills the others when one rank ends with exit code 130

def write_training_checkpoint(run: Trainer) -> None:
    """Gather all tensors on rank 0, which writes them."""
    dtype, lora = compute_dtype(run.device), not run.model.model.norm.weight.requires_grad
    weights, state = {}, {}
    for name, tensor in training_tensors(run):
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()  # a collective call
        if run.rank == 0:
            state[name] = tensor.cpu()
        if run.rank == 0 and name.startswith("weights."):
            weights[name.removeprefix("weights.")] = state[name]
            if dtype == torch.float32 and not lora:
                del state[name]  # model.safetensors has it
    if run.rank > 0:
        return
    finite = all(map(is_finite, weights.values()))
    require(finite, f"the weights are not finite after step {run.step}: lower the learning rate")
    sync(run.out / "metrics.jsonl")
    with atomic_folder(run.out / f"step-{run.step:07d}") as partial:
        if lora:
            start = run.run_config["start"]["weights"]  # the base may have changed since
            write_adapters(partial, run.model, weights, run.base, start)  # section 10
        else:
            write_model(partial, run.model, run.tokenizer, dtype, weights)
        write_tensors(partial / "training_state.safetensors", state)
        write_json(partial / "training_state.json", {
            "step": run.step, "tokens": run.tokens, "skipped": run.skipped,
            "log_lines": (run.out / "metrics.jsonl").read_bytes().count(b"\n") if run.step else 0,
            "scaler": run.scaler.state_dict(), "run_config": run.run_config})

def fill_tensor(target: Tensor | None, full: Tensor, name: str) -> None:
    """Copy a full tensor into one that may be sharded. All ranks must call this."""
    require(is_finite(full), f"{name} is not finite: choose another --out")
    if target is None or full.shape != target.shape:
        raise DanubeError(f"{name} is not part of this run, or has another shape: choose another --out")
    full = full.to(target.device)
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements)
    target.copy_(full)

def resume_training(run: Trainer) -> None:
    """Continue from the newest checkpoint, whatever number of processes wrote it."""
    folder = checkpoints_in(run.out)[-1]
    if run.rank == 0:
        verify_checksums(folder)
    state = read_json(folder / "training_state.json")
    with reading(folder / "training_state.json"):
        for part, values in run.run_config.items():
            for name, value in values.items():
                saved = state["run_config"][part].get(name)
                require(saved == value, f"{folder} was made with another {part} ({name} was {saved!s:.60}): "
                        "resume with that run's flags and data, or choose another --out")
    targets = dict(training_tensors(run))
    for name, full in read_tensors(folder / "training_state.safetensors"):
        fill_tensor(targets.pop(name, None), full, f"{folder}: {name}")
    if targets:  # then model.safetensors has the weights
        for name, full in read_weights(folder):
            fill_tensor(targets.pop(f"weights.{name}", None), full, f"{folder}: {name}")
    require(not targets, f"{folder} lacks {len(targets)} tensors of this run: choose another --out")
    with reading(folder / "training_state.json"):
        if state["scaler"]:  # empty if no scaler was needed
            run.scaler.load_state_dict(state["scaler"])
        run.step, run.tokens, run.skipped = (int(state[name]) for name in ("step", "tokens", "skipped"))
        run.saved_step = run.step
        if run.rank == 0:  # what was logged later will be logged again
            lines = (run.out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            run.log.truncate(sum(map(len, lines[:state["log_lines"]])))

# ==== 10. Fine-tuning ===================================================================
#
# **Supervised fine-tuning** (SFT) on conversations teaches a base model to answer. Only the batches
# are new. **LoRA** (arXiv 2106.09685) freezes all weights and trains a **low-rank update** of each
# linear layer in the decoder layers [ours], whose gradients and moments need hardly any memory. On a
# quantized base this is **QLoRA** (arXiv 2305.14314).

SFT_TOKENS = 8_192  # [ours] tokens of a micro-batch, unless one conversation is longer
VALIDATION_SHARE = 0.05  # [ours] of the conversations, at most 256

def sft_config(config: DanubeConfig, lora: bool = False) -> TrainConfig:
    """1e-4 for LoRA is H2O LLM Studio's default. The rest is [ours]: a tenth for full fine-tuning, both
    times 1536 / width."""
    lr = (1e-4 if lora else 1e-5) * 1536 / config.hidden_size
    return TrainConfig(batch_size=16, micro_batch_size=16, learning_rate=lr, weight_decay=0.0,
                       warmup_fraction=0.05, save_every=500)

def pad_sequences(sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Sequences [2, T_i] of input_ids and labels -> 2 x [N, T], the longest first. Padding has id 0 and
    IGNORE_INDEX. It is on the right, where no other token attends to it."""
    longest_first = sorted(sequences, key=np.size, reverse=True)
    padded = torch.zeros(2, len(sequences), longest_first[0].shape[1], dtype=torch.long)
    padded[1] = IGNORE_INDEX
    for i, sequence in enumerate(longest_first):
        padded[:, i, :sequence.shape[1]] = torch.from_numpy(sequence)
    return padded[0], padded[1]

class ChatData:
    """Conversations as batches. Each is cut after its last answer that ends within the context. The order
    is new in each epoch. In a batch the longest come first: similar lengths share a micro-batch."""
    def __init__(self, conversations: list[list[dict[str, str]]], tokenizer: Tokenizer, context: int,
                 config: TrainConfig, epochs: int = 1, fingerprint: dict[str, Any] | None = None) -> None:
        require(epochs <= MAX_EPOCHS, f"{epochs:,} epochs: more than {MAX_EPOCHS} teach nothing")
        self.summary = ""
        encoded = self.encode(conversations, tokenizer, context)
        total = len(encoded)
        require(total > 1, f"{self.summary}: add some, training and validation need one each")
        shuffled = [encoded[permuted_index(i, total, "split")] for i in range(total)]
        held_out = min(256, math.ceil(VALIDATION_SHARE * total))
        self.held_out, self.sequences = shuffled[:held_out], shuffled[held_out:]
        longest = max(sequence.shape[1] for sequence in encoded)
        batch_size = min(config.batch_size, len(self.sequences))
        micro_batch_size = min(config.micro_batch_size, batch_size, max(1, SFT_TOKENS // longest))
        self.config = replace(config, batch_size=batch_size, micro_batch_size=micro_batch_size,
                              sequence_length=longest)
        self.total_steps = math.ceil(epochs * len(self.sequences) / batch_size)
        self.fingerprint = {**(fingerprint or {}), "epochs": epochs}

    def encode(self, conversations: list[list[dict[str, str]]], tokenizer: Tokenizer,
               context: int) -> list[np.ndarray]:  # [2, T] each: input_ids and labels
        encoded, lost = [], 0
        for messages in tqdm(conversations, "encode", leave=False, disable=None):
            sequence = np.array(render_chat(messages, tokenizer), np.int32)  # [2, T]
            ends = np.flatnonzero(sequence[1] == tokenizer.sp.eos_id()) + 1  # of the answers
            fitting = ends[ends <= context]
            lost += len(ends) - len(fitting)
            if len(fitting):
                encoded.append(sequence[:, :fitting[-1]])
        self.summary = (f"{len(encoded):,} conversations have an answer within {context:,} tokens; "
                        f"{lost:,} answers end later")
        return encoded

    def stage(self, step: int) -> str:
        return f"epoch {step * self.config.batch_size // len(self.sequences) + 1}"

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """input_ids and labels, 2 x [batch_size / world_size, T]"""
        chosen, total = [], len(self.sequences)
        first = step * self.config.batch_size
        for i in range(first, first + self.config.batch_size):
            epoch, place = divmod(i, total)
            index = permuted_index(place, total, f"{self.config.seed}/chat/{epoch}")
            chosen.append(self.sequences[index])
        input_ids, labels = pad_sequences(chosen)
        return input_ids[rank::world_size], labels[rank::world_size]

    def validation(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"chat": pad_sequences(self.held_out)}

LORA_ALPHA = 16  # H2O LLM Studio's default, with rank 4

class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) lora_B lora_A x, with W frozen, lora_A [rank, in], lora_B [out, rank]. Both
    are fp32, because steps are often smaller than the distance between two bf16 numbers."""
    def __init__(self, base_layer: "nn.Linear | QuantizedLinear", rank: int,
                 alpha: float = LORA_ALPHA) -> None:
        super().__init__()
        self.base_layer, self.scale = base_layer, alpha / rank
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        y = self.base_layer(x)
        update = self.scale * self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))
        return y + update.to(y.dtype)

def decoder_linears(model: Danube3) -> dict[str, Any]:
    """The linear layers of all decoder layers, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}

def add_lora(model: Danube3, rank: int, seed: int) -> Danube3:
    """Freeze the model and put an adapter on each linear layer of its decoder layers. Outputs of lora_A
    start with the size of its inputs. lora_B starts at 0, so at first nothing changes. Norms become
    fp32, and with them the residual stream."""
    smallest = min(model.config.hidden_size, model.config.num_key_value_heads * model.config.head_dim)
    require(1 <= rank <= smallest, f"LoRA rank {rank}: use 1 to {smallest}, the smallest layer's size")
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

def merge_lora(model: Danube3) -> Danube3:
    """Add every low-rank update to its weight, in place."""
    for name, lora in decoder_linears(model).items():
        if isinstance(lora, LoRALinear):
            weight = lora.base_layer.weight  # [out, in]
            update = lora.scale * (lora.lora_B.weight @ lora.lora_A.weight)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter((weight.to(update.dtype) + update).to(weight.dtype).detach())
            model.set_submodule(name, linear)
    return model

PEFT_PREFIX = "base_model.model."  # of tensor names in peft's files
PLAIN_LORA: dict[str, list] = {  # what adapter_config.json may say; else peft computes something else
    "peft_type": ["LORA"], "use_dora": [None, False], "use_rslora": [None, False],
    "rank_pattern": [None, {}], "alpha_pattern": [None, {}], "modules_to_save": [None],
    "alora_invocation_tokens": [None], "init_lora_weights": [None, True, False, "gaussian", "eva"]}

def write_adapters(folder: Path, model: Danube3, weights: dict[str, Tensor], base: Path | None,
                   sha256: str | None = None) -> None:
    """Write the adapters alone, in peft's layout. `base` has the other weights, `sha256` is theirs."""
    assert base is not None
    lora = next(module for module in model.modules() if isinstance(module, LoRALinear))
    rank = lora.lora_A.out_features
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.resolve()),
        "r": rank, "lora_alpha": lora.scale * rank, "lora_dropout": 0.0, "bias": "none",
        "inference_mode": True, "target_modules": sorted({name.split(".")[-3] for name in weights})})
    (folder / "base.sha256").write_text((sha256 or weights_sha256(base)) + "\n")  # ours; peft ignores it
    tensors = {PEFT_PREFIX + name: weight.contiguous() for name, weight in weights.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors)

def load_adapters(model: Danube3, folder: Path) -> Danube3:
    """Put a folder's adapters on the linear layers they were trained for."""
    config, linears, weights = read_json(folder / "adapter_config.json"), decoder_linears(model), {}
    for field, plain in PLAIN_LORA.items():
        require(config.get(field) in plain, f"{folder}/adapter_config.json is not plain LoRA ({field})")
    for name, weight in read_tensors(folder / "adapter_model.safetensors"):
        require(is_finite(weight), f"{folder}: {name} is not finite: take an earlier checkpoint")
        weights[name.removeprefix(PEFT_PREFIX)] = weight
    with reading(folder):
        rank, alpha = config["r"], config["lora_alpha"]
        valid = type(rank) is int and 0 < rank < 2**16 and type(alpha) in (int, float)
        require(valid and math.isfinite(alpha), f"{folder}/adapter_config.json: r or lora_alpha is wrong")
        for name in {name.partition(".lora_")[0] for name in weights}:
            model.set_submodule(name, LoRALinear(linears[name], rank, alpha).to(model.device))
        adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
        require(weights.keys() == adapters, f"{folder} does not fit the base it names: copy both again")
        model.load_state_dict(weights, strict=False)
    return model

# ==== 11. Quantization ==================================================================
#
# int8 has one scale per row of a weight matrix and one of 255 values per weight, int4 one scale per
# group of 32 weights and one of 16 values. Decoding reads every weight once per token, so a quarter
# of the bytes can mean four times the speed. **Round-to-nearest** (RTN) is enough at 8 bits. At 4
# bits **GPTQ** is better: later columns make up for the errors of earlier ones. GGUF files hold
# both formats, value for value, as Q8_0 and Q4_0.

GROUP = 32  # weights per scale in int4 [ours], and in GGUF
# Bits of each part of the model [ours]. In int4, embedding and head are equally large, and one keeps 8
# bits: with RTN the head, where errors cost more; with GPTQ, which repairs a head but not a lookup
# table, the embedding (tests/bench_quantize.py).
SCHEMES = {"int8": {"model.embed_tokens": 8, "model.layers": 8, "lm_head": 8},
           "int4": {"model.embed_tokens": 4, "model.layers": 4, "lm_head": 8},
           "int4 GPTQ": {"model.embed_tokens": 8, "model.layers": 4, "lm_head": 4}}

def flush_subnormal(scales: Tensor) -> Tensor:
    """Round scales below 2^-14 as fp16 stores such numbers ("subnormal"), coarsely or as 0: codes must fit
    the stored scale. Larger scales change by less than 0.05 %, and their codes use the exact scale, as in
    llama.cpp."""
    return torch.where(scales.abs() < 2**-14, scales.half().float(), scales)

def reciprocal(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0."""
    return torch.where(scales == 0, 0.0, 1 / scales)

def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w = code * scale, with scale = max|w| / 127 of the row. [out, in] -> int8 [out, in], fp16 [out]"""
    weight = weight.float()
    scales = flush_subnormal(weight.abs().amax(dim=1) / 127)  # [out]
    scaled = weight * reciprocal(scales)[:, None]  # [out, in], -127 .. 127
    codes = (scaled.abs() + 0.5).floor().clamp(max=127) * scaled.sign()  # half away from zero, like GGUF
    return codes.to(torch.int8), scales.half()

def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w = (code - 8) * scale. [out, in] -> codes 0 .. 15 as uint8 [out, in], scales fp16 [out, in/32]

    scale = w / -8, with w the weight of largest magnitude in the group: its code is 0.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))  # [out, in/32, 32]
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # [out, in/32, 1]
    scales = flush_subnormal(largest / -8)
    codes = (groups * reciprocal(scales) + 8.5).floor().clamp(0, 15)
    return codes.flatten(1).to(torch.uint8), scales[..., 0].half()

def pack_int4(codes: Tensor) -> Tensor:
    """Byte j of a group has code j in its low half, code j + 16 in its high half, as in GGUF.
    uint8 [.., in] -> [.., in/2]"""
    low, high = codes.unflatten(-1, (-1, 2, GROUP // 2)).unbind(-2)  # 2 x [.., in/32, 16]
    return (low | (high << 4)).flatten(-2)

def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of pack_int4. uint8 [.., in/2] -> [.., in]"""
    pairs = packed.unflatten(-1, (-1, GROUP // 2))  # [.., in/32, 16]
    return torch.cat((pairs & 15, pairs >> 4), dim=-1).flatten(-2)

def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """int8 [.., in] and scales [..], or packed int4 [.., in/2] and scales [.., in/32] -> fp32 [.., in]"""
    if codes.dtype == torch.int8:
        return codes.float() * scales.float()[..., None]
    values = unpack_int4(codes).unflatten(-1, (-1, GROUP)).float() - 8  # [.., in/32, 32]
    return (values * scales.float()[..., None]).flatten(-2)

class DequantizedMatmul(torch.autograd.Function):
    """x W^T for a frozen, quantized W. The backward pass dequantizes again instead of storing W."""
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:  # [.., in] -> [.., out]
        ctx.save_for_backward(codes, scales)
        return F.linear(x, dequantize(codes, scales).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return grad @ dequantize(codes, scales).to(grad.dtype), None, None

class QuantizedLinear(nn.Module):
    """A linear layer stored as codes, int8 [out, in] or packed int4 [out, in/2], and scales."""
    def __init__(self, out_features: int, in_features: int, bits: int) -> None:
        super().__init__()
        self.out_features, self.in_features, self.bits = out_features, in_features, bits
        dtype = torch.int8 if bits == 8 else torch.uint8
        shape = [out_features] if bits == 8 else [out_features, in_features // GROUP]
        self.codes = nn.Buffer(torch.empty(out_features, in_features * bits // 8, dtype=dtype))
        self.scales = nn.Buffer(torch.empty(shape, dtype=torch.float16))
        self.packed: tuple[Tensor, ...] | None = None

    @property
    def weight(self) -> Tensor:  # [out, in], fp32
        return dequantize(self.codes, self.scales)

    def pack(self) -> None:
        """Switch to PyTorch's fast CPU kernels, which round inputs and scales to bf16. They are private:
        where one is missing, nothing changes. For inference only: int4 loses its codes and scales."""
        kernel = "_weight_int8pack_mm" if self.bits == 8 else "_weight_int4pack_mm_for_cpu"
        if self.codes.device.type != "cpu" or self.out_features % 16 or not hasattr(torch, kernel):
            return
        if self.bits == 8:
            self.packed = self.codes, self.scales.bfloat16()
            return
        for rows in self.codes.split(256):  # in place, in parts: as int32 they need 8 times the memory
            rows.copy_(torch._convert_weight_to_int4pack_for_cpu(unpack_int4(rows).int(), 1))
        scales = self.scales.T.bfloat16()  # [in/32, out]
        self.packed = self.codes, torch.stack((scales, torch.zeros_like(scales)), dim=-1)  # zero points: 0
        del self.codes, self.scales

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        many = x.numel() > 16 * self.in_features  # the int8 kernel is slow for many rows
        if self.packed is None or (self.bits == 8 and many):
            return DequantizedMatmul.apply(x, self.codes, self.scales)
        rows = x.reshape(-1, self.in_features).bfloat16()
        if self.bits == 8:
            y = torch._weight_int8pack_mm(rows, *self.packed)
        else:
            y = torch._weight_int4pack_mm_for_cpu(rows, self.packed[0], GROUP, self.packed[1])
        return y.to(x.dtype).view(*x.shape[:-1], -1)

class QuantizedEmbedding(QuantizedLinear):
    """Rows of a quantized matrix, by index: [B, T] -> [B, T, D]."""
    def pack(self) -> None:
        pass  # rows are looked up, not multiplied

    def forward(self, input_ids: Tensor) -> Tensor:
        return dequantize(self.codes[input_ids], self.scales[input_ids])

def bits_for(name: str, scheme: dict[str, int]) -> int | None:
    """The bits of the weight matrix `name`, None for other modules."""
    for part, bits in scheme.items():
        if name.startswith(part) and "norm" not in name:
            return bits
    return None

def use_quantized_modules(model: Danube3, scheme: dict[str, int]) -> Danube3:
    """Replace every linear layer and embedding by a quantized one, whose codes are to be loaded."""
    for name, module in list(model.named_modules()):
        bits = bits_for(name, scheme)
        if bits and isinstance(module, (nn.Linear, nn.Embedding)):
            quantized = QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
            out_features, in_features = module.weight.shape
            model.set_submodule(name, quantized(out_features, in_features, bits))
    return model

# **GPTQ** (arXiv 2210.17323). For y = W x, an error E of W costs the mean of |E x|^2, which is
# trace(E C E^T), with C the mean of x x^T over calibration data. (C is half the second derivative
# of the cost, so the code calls it the Hessian. Any multiple will do.) Each row e of E is a
# problem of its own:
#
#  1. Rounding weight i fixes e_i. Choose the later e_j, j > i, so that e C e^T is smallest. (e
#     counts from where earlier steps have moved the weights.)
#  2. At the minimum the derivatives by these e_j are 0. They are the entries of e C after the
#     first, so e is a multiple of P_1, the first row of P, the inverse of what is left of C (rows
#     and columns i, i + 1, ..). Hence e = e_i P_1 / P_11, at the cost e_i^2 / P_11.
#  3. One factorization holds all inverses. With C^-1 = U^T U, U upper triangular, P is the same
#     product of U's rows and columns from i on. So P_1 = U_ii U_i and P_11 = U_ii^2: weights j > i
#     move by -(w_i - rounded w_i) U_ij / U_ii, and the error of column i has weight 1 / U_ii^2.

def search_scales(groups: Tensor, error_weight: Tensor) -> Tensor:
    """The best of 50 scales for each group, by weighted error. [out, 32], [32] -> [out]

    Candidates [ours] are 0.6 to 1.2 and -0.7 to -1.3 times quantize_int4's scale (minus: the largest
    weight is on the other side of 0). Each is then fitted to the codes it makes.
    """
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))  # [out, 1]
    best, lowest = largest[:, 0] / -8, torch.full_like(largest[:, 0], math.inf)
    for factor in torch.cat((torch.linspace(0.6, 1.2, 25), torch.linspace(-1.3, -0.7, 25))).tolist():
        scales = flush_subnormal(largest / -8 * factor)
        values = (groups * reciprocal(scales) + 0.5).floor().clamp(-8, 7)  # [out, 32], code - 8
        # The s with the smallest sum of a (w - s v)^2 is sum(a w v) / sum(a v^2).
        fitted = (error_weight * groups * values).sum(1) * reciprocal((error_weight * values * values).sum(1))
        fitted = fitted.half().float()
        error = (error_weight * (groups - fitted[:, None] * values) ** 2).sum(1)
        best = torch.where(error < lowest, fitted, best)
        lowest = torch.minimum(error, lowest)
    return best

def gptq(weight: Tensor, hessian: Tensor, percdamp: float = 0.05) -> tuple[Tensor, Tensor]:
    """weight [out, in], hessian [in, in] -> codes uint8 [out, in], scales fp16 [out, in/32]

    The diagonal grows by `percdamp` [ours] times its mean: it can be inverted, and the weights of rare
    inputs move little.
    """
    weight, size = weight.float().clone(), weight.shape[1]
    damping = percdamp * hessian.diagonal().mean() + 1e-12
    hessian = hessian.float() + torch.eye(size, device=hessian.device) * damping
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)  # U [in, in]
    codes, scales = [], []
    for start in range(0, size, GROUP):
        end = start + GROUP
        group = weight[:, start:end]  # [out, 32], a view: changing it changes `weight`
        scaled_errors = torch.empty_like(group)  # (w_i - rounded w_i) / U_ii
        scale = search_scales(group, factor.diagonal()[start:end] ** -2)  # [out]
        for i in range(GROUP):
            row = factor[start + i, start:end]  # [32]
            code = (group[:, i] * reciprocal(scale) + 8.5).floor().clamp(0, 15)  # [out]
            scaled_errors[:, i] = (group[:, i] - scale * (code - 8)) / row[i]
            group[:, i + 1:] -= scaled_errors[:, i, None] * row[i + 1:]
            codes.append(code.to(torch.uint8))
        weight[:, end:] -= scaled_errors @ factor[start:end, end:]  # the columns after the group
        scales.append(scale)
    return torch.stack(codes, dim=1), torch.stack(scales, dim=1).half()

# ==== 12. Programs ======================================================================
#
# One function opens every kind of folder. The rest is what train.py, sample.py and quantize.py share.

def read_scheme(folder: Path) -> dict[str, int]:
    """The bits of a quantized folder; {} if it is not quantized."""
    config = read_json(folder / "config.json").get("quantization_config") or {"bits": {}}
    known = isinstance(config, dict) and config.get("bits") in [{}, *SCHEMES.values()]
    require(known, f"{folder} was not quantized by quantize.py: use the folder it was made from")
    return config["bits"]

def stored_dtype(folder: Path) -> torch.dtype:
    """What config.json says, otherwise a type that holds all stored ones."""
    config = read_json(folder / "config.json")
    named = str(config.get("dtype") or config.get("torch_dtype"))
    if named in DTYPES:
        return DTYPES[named]
    return functools.reduce(torch.promote_types, {weight.dtype for _, weight in read_weights(folder)})

def adapter_base(folder: Path) -> Path:
    """The checkpoint that adapters were trained on."""
    base = Path(str(read_json(folder / "adapter_config.json").get("base_model_name_or_path")))
    require((base / "config.json").is_file(), f"{folder} holds adapters to {base}: put that checkpoint there")
    if (folder / "base.sha256").is_file():
        same = (folder / "base.sha256").read_text(errors="replace").strip() == weights_sha256(base)
        require(same, f"{folder} holds adapters to other weights than those in {base}: put the old ones back")
    return base

def load_checkpoint(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                    pack: bool = False) -> tuple[Danube3, Tokenizer]:
    """Open any folder. -> the model in eval mode, in `dtype` (default: as stored), and the tokenizer

    `pack` makes a quantized model fast on CPUs, for inference only.
    """
    folder = find_checkpoint(path)
    verify_checksums(folder, skip="training_state")
    if not (folder / "config.json").is_file():
        model, tokenizer = load_checkpoint(adapter_base(folder), device, dtype, pack)
        return load_adapters(model, folder).eval(), tokenizer
    config, scheme = read_config(folder), read_scheme(folder)
    with torch.device("meta"):  # shapes without memory
        model = use_quantized_modules(Danube3(config), scheme)
    if dtype is None:
        dtype = compute_dtype(torch.device(device)) if scheme else stored_dtype(folder)
    weights = {}
    for name, weight in read_weights(folder):
        # A copy in memory of its own: alignment can change the last bits of a product.
        require(weight.is_floating_point() or name.endswith("codes"), f"{folder}: {name} is {weight.dtype}")
        weights[name] = weight.to(device, dtype if name.endswith("weight") else None, copy=True)
        require(is_finite(weights[name]), f"{folder}: {name} is not finite as {dtype}: use another type")
    with reading(folder):
        model.load_state_dict(weights, assign=True)
    model.stop_ids = read_stop_ids(folder, config)
    for module in model.modules():
        if pack and isinstance(module, QuantizedLinear):
            module.pack()
    return model.eval(), read_tokenizer(folder, config)

class Arguments(argparse.ArgumentParser):
    """argparse that shows defaults in --help and raises DanubeError."""
    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=self.Formatter)

    def error(self, message: str) -> NoReturn:
        raise DanubeError(f"{message} (see {self.prog} --help)")

def pick_device(name: str = "auto") -> torch.device:
    """"auto" is the first available of cuda, mps and cpu. Under torchrun process i takes GPU i."""
    # On Hopper GPUs cuDNN attention takes 20 to 900 ms per new length: only train.py switches it on.
    torch.backends.cuda.enable_cudnn_sdp(False)
    rank = os.environ.get("LOCAL_RANK")
    if name == "auto":
        mps = torch.backends.mps.is_available() and rank is None  # gloo does not know MPS
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.startswith("cuda") and rank is not None:
        name = f"cuda:{rank}"
    try:
        zero = torch.zeros(1, device=name)
        zero.item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise DanubeError(f"device {name!r} is not available ({torch.cuda.device_count()} GPUs are): use "
                          "--device auto, and one process per GPU") from error
    return zero.device

def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a program. What the user can fix ends in one line on stderr, exit code 2."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bytes that are no text, characters it cannot show
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of our output has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DanubeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not re.search("tried to allocate|out of memory|MemoryError", repr(error)):
            raise
        print("error: out of memory: shorten the text, use a smaller --micro-batch-size, or "
              "--activation-checkpointing on", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)
