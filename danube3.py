"""Danube3 in one file: H2O-Danube3 (arXiv 2407.09276) from text to a trained, talking model.

H2O-Danube3 is a pair of small language models, 500 million and 4 billion parameters, with the Llama architecture. Its
report trains them in three stages of data, in which noisy web text gives way to cleaner text stage by stage. This file
is all that concerns the model, to be read from top to bottom. A first reading, of some 1,100 lines and what these call,
takes sections 1 to 4 and 8, and of the others what their headings name; the rest is for real use: wrong input, saved
work, several GPUs.

     1  Configurations      the published sizes and the three stages
     2  Tokenizer           text to ids and back; a conversation as ids and labels
     3  Kernels             the five formulas that a Llama is made of
     4  Model               modules named as in the published checkpoints
     5  Generation          from logits to the next token, one token at a time
     6  Checkpoints         a checkpoint is a Hugging Face folder, written whole or not at all
     7  Data                token shards, and the staged mixture as a pure function of the step
     8  Optimizer           AdamW, and the learning rate over the steps
     9  Training            the operations of a run, several GPUs, one loop
    10  Chat fine-tuning    conversations as batches; LoRA
    11  Quantization        int8, int4, GPTQ
    12  Opening a folder    of any of these kinds
    13  Running as a program  flags, devices, errors in one line

The letters in every shape comment:

    B  batch (rows)         D  hidden_size          H  num_attention_heads (queries)
    T  tokens of one row    F  intermediate_size    K  num_key_value_heads (keys and values)
    S  cached and new       V  vocab_size           h  head_dim
       tokens together

[] is a single number; N and n are any number of something; a quantized matrix is [N, K], K numbers in and N out, and
this K is not that of the heads. (F is also the usual name of torch.nn.functional in code; section 10 calls the two
matrices of an adapter A and B.)

A model in short: each token, an id, becomes a vector [D]. Together these vectors, the stream, run through all layers.
In each, tokens first look at each other (attention, H times side by side: in H heads), then each is worked on by itself
(an MLP of width F); both add something to the stream. In the end lm_head, the head (not one of the H), makes of it one
number, a logit, for each possible next token. The README has a drawing.

Facts carry their source: [R] is the report, its model cards or published configuration files; [C] is our own choice,
made because nothing was published.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.torch
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as compute_again  # for a backward pass; writes no file
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


class DanubeError(Exception):
    """A mistake that the person at the keyboard can mend. Its text is one line: the cause, then the remedy."""


# ======================================================================================================================
# 1. Configurations
#
# What a Danube3 is (DanubeConfig), what it is trained on (Stage) and how (Recipe): three frozen tables of numbers, from
# which all that follows reads its sizes, so that no size is written twice and a wrong one is refused in one place.
# The fields of DanubeConfig are those of the published config.json, and head_dim, which is D / H where that lacks it.
# Look at head_dim: it is a number of its own. In all three models H x h happens to equal hidden_size, but nothing in
# the architecture asks for that, and code that computes one from the other breaks on the next model.
# ======================================================================================================================

@dataclass(frozen=True)
class DanubeConfig:
    """The architecture: every number that fixes the shape or the arithmetic of the model. For 500m and 4b all [R]."""

    hidden_size: int                       # D
    intermediate_size: int                 # F
    num_hidden_layers: int
    num_attention_heads: int               # H
    num_key_value_heads: int               # K
    head_dim: int                          # h
    initializer_range: float               # standard deviation of every matrix at the start
    vocab_size: int = 32_000               # V
    max_position_embeddings: int = 8_192   # the context: the longest row it may be given
    rope_theta: float = 100_000.0          # the base of the rotary angles (section 3)
    rms_norm_eps: float = 1e-5
    bos_token_id: int = 1                  # <s>
    eos_token_id: int = 2                  # </s>
    pad_token_id: int = 0                  # <unk>

    def __post_init__(self) -> None:
        for field in fields(self):
            value, integer = getattr(self, field.name), field.type is int
            smallest = 0 if field.name.endswith("_token_id") else 1 if integer else 1e-30
            # generous, but no damaged file shall ask for impossible memory
            limit = 2 ** 62 if not integer else 2 ** 10 if field.name == "num_hidden_layers" else 2 ** 24
            kind, types = ("an integer", int) if integer else ("a number", (int, float))
            if isinstance(value, bool) or not isinstance(value, types) or not smallest <= value < limit:
                raise DanubeError(f"config: {field.name} is {value!r}: give it {kind} from {smallest} to under {limit}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise DanubeError(f"config: {self.num_attention_heads} query heads cannot share {self.num_key_value_heads} "
                              "key/value heads evenly: make num_attention_heads a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise DanubeError(f"config: head_dim is {self.head_dim}: rotary embedding turns pairs, so it must be even")
        if max(self.bos_token_id, self.eos_token_id, self.pad_token_id) >= self.vocab_size:
            raise DanubeError(f"config: a special token id lies outside the vocabulary of {self.vocab_size}")


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one mixture, which gives each source (a kind of text) an integer weight."""

    name: str
    tokens: int
    mixture: dict[str, int]


# A step of training: rows of T tokens go through the model, some at a time (a micro-batch), and their gradients are
# added up; then every weight moves once, so as to lower the loss. A stage is many steps with one mixture of sources.

@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Of the stages, the shares of web text and the sums of the tokens are [R]. The optimizer's
    settings (section 8) are [C], since Danube3's own are not published; betas and cosine schedule are those of the
    first Danube report (arXiv 2401.16818)."""

    stages: tuple[Stage, ...]
    sequence_length: int           # T
    tokens_per_step: int           # tokens of one optimizer step, over all micro-batches
    micro_batch_size: int          # B, rows that go through the model at once; a question of memory
    learning_rate: float           # the peak
    final_fraction: float = 0.0    # the last step's rate, as a fraction of the peak
    warmup_fraction: float = 0.01  # of all steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 1.0         # the largest norm a gradient keeps; a longer one is shortened to it
    save_every: int = 1_000        # steps between checkpoints; the end of a stage always makes one
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.sequence_length, self.tokens_per_step, self.micro_batch_size, self.save_every) < 1:
            raise DanubeError("sequence length, tokens per step, micro-batch size and save interval must be at least 1")
        micro_batch = self.micro_batch_size * self.sequence_length
        if self.tokens_per_step % micro_batch:
            rows = f"a --micro-batch-size that divides {self.rows_per_step}, or (without --chat) "
            raise DanubeError(f"a step of {self.tokens_per_step:,} tokens is not a whole number of micro-batches of "
                              f"{self.micro_batch_size} x {self.sequence_length} = {micro_batch:,}: use "
                              f"{rows if self.tokens_per_step % self.sequence_length == 0 else ''}"
                              f"--tokens-per-step {max(1, self.tokens_per_step // micro_batch) * micro_batch}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise DanubeError(f"the learning rate is {self.learning_rate}: it must be a positive number")
        if not 0 <= self.seed < 2 ** 63:
            raise DanubeError(f"the seed is {self.seed}: use one from 0 to 2^63 - 1")
        for stage in self.stages:
            if stage.mixture.keys() != self.stages[0].mixture.keys() or sum(stage.mixture.values()) < 1:
                raise DanubeError(f"{stage.name}: every stage must name the same sources, and give one of them weight")
        if self.total_steps < 1:
            raise DanubeError(f"{sum(stage.tokens for stage in self.stages):,} tokens are less than one step of "
                              f"{self.tokens_per_step:,}: raise --tokens")

    @property
    def rows_per_step(self) -> int:
        return self.tokens_per_step // self.sequence_length

    @property
    def stage_ends(self) -> list[int]:
        """The number of steps after which each stage is over. A stage begins with a step, never inside one; rounding
        the running total, not each stage, keeps every boundary within half a step of its token count."""
        tokens = np.cumsum([stage.tokens for stage in self.stages])
        return [int((2 * int(t) + self.tokens_per_step) // (2 * self.tokens_per_step)) for t in tokens]  # nearest

    @property
    def total_steps(self) -> int:
        return self.stage_ends[-1]

    def stage_at(self, step: int) -> int:
        """The index of the stage that step `step` (from 0) belongs to."""
        return sum(step >= end for end in self.stage_ends[:-1])

    def scaled_to(self, tokens: int, **changes: Any) -> "Recipe":
        """The same recipe with `tokens` in all, the stages in proportion, and other changes."""
        total = sum(stage.tokens for stage in self.stages)
        stages = tuple(replace(stage, tokens=stage.tokens * tokens // total) for stage in self.stages)
        return replace(self, stages=stages, **changes)


SOURCES = ("web", "wikipedia", "academic", "synthetic", "instruct", "other")  # the six kinds the report names [R]

# Thousandths of each stage. The web column is [R]: 90.6, 81.7 and 51.6 %. How the rest is split among the other five
# is only a chart in the report, so the other columns are [C].
MIXTURES = tuple(dict(zip(SOURCES, shares)) for shares in (  # in the order of SOURCES
    (906, 18, 18, 18, 30, 10),
    (817, 35, 35, 38, 55, 20),
    (516, 80, 80, 94, 190, 40)))


def danube_stages(*tokens: int) -> tuple[Stage, ...]:
    """The three stages, given the tokens of each."""
    return tuple(Stage(f"stage {i + 1}", n, mixture) for i, (n, mixture) in enumerate(zip(tokens, MIXTURES)))


CONFIGS = {
    # [C] A toy that two laptop cores train in minutes. Few heads: many small products are slower than few large ones.
    "toy": DanubeConfig(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=2,
                        num_key_value_heads=1, head_dim=64, initializer_range=0.04, vocab_size=1_024,
                        max_position_embeddings=256),
    "500m": DanubeConfig(hidden_size=1536, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16,
                         num_key_value_heads=8, head_dim=96, initializer_range=0.02),
    "4b": DanubeConfig(hidden_size=3840, intermediate_size=10240, num_hidden_layers=24, num_attention_heads=32,
                       num_key_value_heads=8, head_dim=120, initializer_range=0.01),
}

# The stage lengths of 500m and 4b were not checked against the report; their sums, 4T and 6T tokens, are [R].
BILLION = 10 ** 9
RECIPES = {
    "toy": Recipe(danube_stages(900_000, 450_000, 450_000), sequence_length=128, tokens_per_step=1_024,
                  micro_batch_size=8, learning_rate=3e-3, warmup_fraction=0.04, beta2=0.99, save_every=400),
    "500m": Recipe(danube_stages(2_800 * BILLION, 1_150 * BILLION, 50 * BILLION), sequence_length=8_192,
                   tokens_per_step=2 ** 21, micro_batch_size=1, learning_rate=4e-4, final_fraction=0.01),
    "4b": Recipe(danube_stages(4_600 * BILLION, 1_350 * BILLION, 50 * BILLION), sequence_length=8_192,
                 tokens_per_step=2 ** 22, micro_batch_size=1, learning_rate=2e-4, final_fraction=0.01),
}


def count_parameters(config: DanubeConfig) -> int:
    """Numbers in the model: 513,590,784 for 500m and 3,961,839,360 for 4b [R]."""
    c = config
    attention = 2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim  # q and o, k and v
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size  # + gate, up, down; two norms
    ends = 2 * c.vocab_size * c.hidden_size  # embedding and head
    return c.num_hidden_layers * layer + c.hidden_size + ends  # + the last norm


# ======================================================================================================================
# 2. Tokenizer and chat format
#
# A model computes with numbers, so text is cut into pieces, each with an id. Danube3 uses the Mistral tokenizer [R]:
# byte-pair encoding by sentencepiece. Its training begins with single characters and joins the most frequent pair of
# neighbours, again and again, until there are 32,000 pieces; a text is cut by doing the same joins in the same order.
# Three pieces are control tokens (<s>, which begins a document [C]; </s>, which ends one, or a turn; <unk>, never
# needed: 256 others are single bytes, so no text is unknown). A control token has an id but no spelling: the text
# "</s>" typed by a user is encoded as ordinary pieces, and only this code, which works with ids, can put the real one
# in. So nobody can type the end of a turn.
# Look at StreamDecoder: why a token cannot be turned into text on its own.
# ======================================================================================================================

class Tokenizer:
    """A sentencepiece model with the one decision that is not in its file: whether a prompt begins with <s>."""

    def __init__(self, model_file: str | Path, add_bos: bool = True) -> None:
        self.model_file, self.add_bos = Path(model_file), add_bos
        if not self.model_file.is_file():
            raise DanubeError(f"no tokenizer at {self.model_file}: copy the model's tokenizer.model there")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError, UnicodeError) as error:
            raise DanubeError(f"{self.model_file} is not a sentencepiece model: copy it again") from error

    @property
    def vocab_size(self) -> int:
        return self.pieces.vocab_size()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.model_file.read_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any control token whatever the text spells."""
        try:
            return self.pieces.encode(text)
        except (RuntimeError, UnicodeError) as error:  # from a file name or a flag that was not UTF-8
            raise DanubeError(f"this text is not valid Unicode: {text[:40]!r}") from error

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued: after <s>, as every document was in training, unless add_bos is off."""
        return ([self.pieces.bos_id()] if self.add_bos else []) + self.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode([i for i in ids if i < self.vocab_size])  # a model may have more ids


class StreamDecoder:
    """Text from ids that come one at a time.

    A token has no text of its own: sentencepiece drops the space in front of the first piece (" world" alone decodes to
    "world"), and a character such as an emoji may be spread over four byte tokens. So each new token is decoded
    together with the tokens before it, and what is new in the result is given out, unless it ends in half a character.
    Only the last piece of text and what follows are decoded: a long answer costs no more per token than a short one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, list(prompt_ids[-8:])  # left context: enough for the space rule
        self.start, self.end = 0, len(self.ids)  # ids[start:end] is text already given out, kept as context

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none yet."""
        self.ids.append(token_id)
        text = self.rest()
        if not text or text.endswith("\ufffd"):  # a control token; the mark of an incomplete character
            return ""
        self.start, self.end = self.end, len(self.ids)
        return text

    def rest(self) -> str:
        """The text of ids[end:] as it reads behind ids[start:end]. After the last token: what none will complete."""
        before = self.tokenizer.decode(self.ids[self.start:self.end])
        return self.tokenizer.decode(self.ids[self.start:])[len(before):]


IGNORE = -100  # a label that carries no loss: PyTorch's and transformers' convention

# The chat format [R]: <|prompt|>question</s><|answer|>answer</s>. The two markers are plain text that a user can type;
# what tells a real turn is the control token that ends the one before. A system message is refused. CHAT_TEMPLATE goes
# into tokenizer_config.json, for other programs; this file uses render_chat.
CHAT_MARKERS = {"user": "<|prompt|>", "assistant": "<|answer|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|prompt|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|answer|>' + message['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|answer|>' }}{% endif %}{% endfor %}")


def first_difference(a: list[int], b: list[int]) -> int:
    """The first index at which two lists of ids differ; the length of the shorter if they do not."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def render_chat(messages: list[dict[str, str]], tokenizer: Tokenizer,
                add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """A conversation as `input_ids` and `labels`, two lists of one length.

    Each turn, marker and text together, is one plain encode; </s> is added by id. The label of an id is the id itself
    in an assistant's text and in the </s> that ends it, so that the model learns to answer and to stop; everywhere else
    it is IGNORE, so that it does not learn to ask. (Danube3.forward shifts labels by one; whether user and assistant
    take turns is for check_turns, data/read.py.) No <s> in front. [R]
    """
    input_ids, labels = [], []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str):
            raise DanubeError(f"a chat message has no text as its content: {message}")
        if role not in CHAT_MARKERS:
            raise DanubeError("System role not supported: put the system text into the first user message"
                              if role == "system" else f"unknown chat role {role!r}: use user or assistant")
        marker, turn = tokenizer.encode(CHAT_MARKERS[role]), tokenizer.encode(CHAT_MARKERS[role] + content)
        turn += [tokenizer.pieces.eos_id()]
        start = first_difference(marker, turn)  # not len(marker): a piece such as ">=" may span both
        input_ids += turn
        labels += [IGNORE] * start + turn[start:] if role == "assistant" else [IGNORE] * len(turn)
    if add_generation_prompt:
        marker = tokenizer.encode(CHAT_MARKERS["assistant"])
        input_ids, labels = input_ids + marker, labels + [IGNORE] * len(marker)
    return input_ids, labels


# ======================================================================================================================
# 3. Kernels
#
# All that a model learns is in its matrices (and in the gains of its norms). Five formulas join them: normalize, so
# that the next matrix reads numbers of one size; turn, so that the order of tokens matters; attend, so that they see
# each other; gate, so that two matrices in a row are more than one; and the loss, the number to be made small. They are
# pure functions: tests/reference.py has each of them again in NumPy, written from the formula, with its derivative.
# ======================================================================================================================

def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dimension. x [.., D], weight (the gain) [D] -> [.., D]

    Computed in fp32 (numbers of 32 bits; fp16 and bf16 have 16) whatever the type of x: a sum of D squares can overflow
    fp16 (which ends at 65,504), and bf16 (with the range of fp32) has 8 bits of precision.
    """
    x32 = x.float() if x.dtype != torch.float64 else x  # fp64 stays: derivatives are tested in it
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)  # [.., 1]
    return weight * (x32 * scale).to(x.dtype)


def rotary_table(start: int, end: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle p * theta^(-2i/h), positions p = start .. end-1, pairs i. -> 2 x [T, h/2], fp32

    Computed anew in each forward pass, which is cheap. Trap: were the frequencies a buffer of the model,
    model.bfloat16() would round them: 0.787 (500m, i = 1) to 0.785, and at position 8,000 the angle is off by two full
    turns.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)  # [h/2]
    angle = torch.arange(start, end, device=device, dtype=torch.float32)[:, None] * frequency              # [T, h/2]
    return angle.cos(), angle.sin()


# On CPUs the math library chooses its routine for a function in that function's first call. Of two threads that make
# this call together one may get a coarse routine, and results that are off by 1e-4 (pytorch issue 188792): then a run
# that is resumed is not the same to the bit. So one thread makes the first calls, now.
torch.zeros(1, device="cpu").cos(), torch.zeros(1, device="cpu").sin()


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features by its position's angle. x [B, n, T, h], cos and sin [T, h/2] -> [B, n, T, h]

        (a, b) -> (a cos - b sin, b cos + a sin)        a = x[i], b = x[i + h/2], the angle is p theta^(-2i/h)

    The product of a query and a key (see below), turned to positions p and s, depends only on p - s: this is how a
    model without any other notion of place knows how far apart two tokens are. Fast pairs (i = 0: a turn in 6 tokens)
    tell neighbours apart, slow ones the near from the far. Trap: which two features form pair i? Here, as in every
    Llama checkpoint on Hugging Face, features i and i + h/2 ("half-split"); in the original paper and in GGUF files,
    2i and 2i + 1. The wrong one runs without complaint, and the model talks nonsense.
    """
    first, second = x.chunk(2, dim=-1)  # 2 x [B, n, T, h/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(h), causal) v, with H query heads on K key/value heads. q [B, H, T, h]; k and v [B, K, S, h]
    -> [B, H, T, h]

    Each token asks with its query q. Of its products with the keys k of the tokens before it, and its own (that is what
    "causal" means), softmax makes shares that add up to 1: so much of each one's value v it gets. A sum of h products
    of independent numbers of typical size 1 has the typical size sqrt(h): undivided, softmax would soon give all to one
    key, and pass on no gradient.

    K < H keeps the cache of keys and values (section 4) small. Trap: query head i reads key/value head i // (H / K),
    neighbours share. With H = 4 and K = 2 query heads 0 and 1 read 0, 2 and 3 read 1: k.repeat_interleave(H // K,
    dim=1), not k.repeat; `enable_gqa` does it without the copy.

    Trap: the queries are the last T of the S positions, so query t sees keys 0 .. S - T + t. Of two new tokens after
    three in a cache (section 4; T = 2, S = 5) the first sees 11110, the second 11111. `is_causal` lines its triangle up
    with the first key, not the last (10000, 11000), which is right only for S = T; so after a cache the mask is written
    out. A single query sees everything and needs none.
    """
    T, S = q.shape[2], k.shape[2]
    mask, causal = None, False
    # (on mps some releases of torch get is_causal wrong in half precision)
    if T == S and (q.device.type != "mps" or q.dtype == torch.float32):
        causal = True  # a branch, not `is_causal=T == S`: where lengths vary, torch.compile has no bool for that
    elif T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)  # [T, S], True = may look
    share = q.device.type != "cuda" or q.dtype == torch.bfloat16 and mask is None
    if not share:  # on a GPU PyTorch takes flash attention, which shares heads, for bf16 without a mask
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [B, H, S, h]
    # the whole formula in one call: products, / sqrt(h), mask, softmax, weighted sum
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=share)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(x) = x * sigmoid(x): for each token and each of F features, `gate` decides how much
    of `up` goes through. 2 x [.., F] -> [.., F]"""
    return F.silu(gate) * up


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of -log softmax(logits)[label] = log(sum of exp(logits)) - logits[label] over labels that are not IGNORE.
    logits [N, V], labels [N] -> []

    The sum, not the mean, which belongs to the whole optimizer step: see the trap in train_step. In fp32, because sums
    over V and N would lose their digits in bf16.
    """
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


# ======================================================================================================================
# 4. Model
#
# The kernels wired together. A module's name is its name in the published checkpoint
# (model.layers.0.self_attn.q_proj), so loading a checkpoint is matching names. Each layer adds two corrections to a
# stream of vectors [B, T, D]: one from attention, where tokens look at each other, one from the MLP, where each token
# thinks by itself. Both, and lm_head at the end, read a normalized copy; the stream stays as it is (pre-norm).
# ======================================================================================================================

class KVCache:
    """Keys and values of all tokens seen, so that the next token need not compute them again.

    kv [layers, 2, B, K, max_length, h]; the first `length` positions are filled. No queries: an old one is never asked
    again. Keys are stored turned, so they hold for their positions only. Trap: `length` is also the position of the
    next token. All layers write to the same positions, so it moves once, in Decoder.forward, when the last has written.
    """

    def __init__(self, config: DanubeConfig, batch_size: int, max_length: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.length, self.max_length = 0, max_length
        self.kv = torch.zeros(config.num_hidden_layers, 2, batch_size, config.num_key_value_heads, max_length,
                              config.head_dim, dtype=dtype, device=device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, K, T, h] of new tokens; return those of all tokens so far, 2 x [B, K, S, h]."""
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise DanubeError(f"{end} tokens do not fit a cache of {self.max_length}: shorten the text")
        self.kv[layer, 0, :, :, self.length:end], self.kv[layer, 1, :, :, self.length:end] = k, v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]


class RMSNorm(nn.Module):
    def __init__(self, config: DanubeConfig) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Three matrices make queries, keys and values of the stream; o_proj makes one vector [D] of all heads' answers."""

    def __init__(self, config: DanubeConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:  # -> [B, T, D]
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, h]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, h]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, h]
        q, k = rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer, k, v)  # [B, K, S, h]
        y = grouped_query_attention(q, k, v)  # [B, H, T, h]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # [B, T, H h] -> [B, T, D]


class MLP(nn.Module):
    def __init__(self, config: DanubeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    recompute = False  # True: only its input is kept, and the layer computed again backward (set by train.py)

    def __init__(self, config: DanubeConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(config), Attention(config, layer)
        self.post_attention_layernorm, self.mlp = RMSNorm(config), MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:  # -> [B, T, D]
        if self.recompute and torch.is_grad_enabled():  # here, not in Decoder's loop: compiled with the layer
            return compute_again(self.with_corrections, x, cos, sin, kv_cache, use_reentrant=False)
        return self.with_corrections(x, cos, sin, kv_cache)

    def with_corrections(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:  # -> [B, T, D]
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The model without its head: ids to the stream after the last layer, normalized."""

    def __init__(self, config: DanubeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)

    def forward(self, input_ids: Tensor, kv_cache: KVCache | None = None) -> Tensor:  # [B, T] -> [B, T, D]
        start = 0 if kv_cache is None else kv_cache.length  # the position of the first of these tokens
        end = start + input_ids.shape[1]
        cos, sin = rotary_table(start, end, self.config.head_dim, self.config.rope_theta, input_ids.device)
        x = self.embed_tokens(input_ids).to(self.norm.weight.dtype)  # [B, T, D]; add_lora makes norms fp32
        for layer in self.layers:
            x = layer(x, cos, sin, kv_cache)
        if kv_cache is not None:
            kv_cache.length = end  # only now: all layers have written to start .. end
        return self.norm(x)


LOGIT_TOKENS = 4_096  # losses need logits of at most this many tokens at once: 0.5 GB at V = 32,000 in fp32 [C]


class Danube3(nn.Module):
    """The language model. model(input_ids) gives logits; model(input_ids, labels) gives the summed loss."""

    def __init__(self, config: DanubeConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # not embed_tokens again [R]

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the stream and of the cache, read from a norm, since matrices may be quantized."""
        return self.model.norm.weight.dtype

    @staticmethod
    def new(config: DanubeConfig, seed: int) -> "Danube3":
        """A model to train from the beginning, without the random numbers that nn.Linear would draw first."""
        with torch.device("meta"):  # shapes without memory
            model = Danube3(config)
        return model.to_empty(device="cpu").init_weights(seed)

    def init_weights(self, seed: int) -> "Danube3":
        """Every matrix normal with the configuration's standard deviation, every norm gain one."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)
            else:
                nn.init.ones_(parameter)
        return self

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """input_ids [B, T] -> logits [B, T, V] in fp32, or with labels [B, T] the sum of the losses [].

        `labels` line up with `input_ids`, as in transformers: labels[t] is what should stand at t, and since position t
        predicts the token after it, the labels are shifted here. labels[:, 0] is never predicted.
        """
        x = self.model(input_ids)  # [B, T, D]
        if labels is None:
            return self.lm_head(x).float()  # [B, T, V]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # [B, T], the last position predicts nothing
        return self.head_loss(x.flatten(0, 1), targets.flatten())

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of x [N, D] against targets [N]. -> []

        At 32,000 entries a token, logits are the largest tensor of all: a row of 8,192 tokens makes 1 GB. So they are
        made in blocks, and each block's are computed again for the backward pass rather than kept.
        """
        def block_loss(x: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(self.lm_head(x), targets)

        if len(x) <= LOGIT_TOKENS:
            return block_loss(x, targets)
        blocks = zip(x.split(LOGIT_TOKENS), targets.split(LOGIT_TOKENS))
        return torch.stack([compute_again(block_loss, *block, use_reentrant=False) for block in blocks]).sum()


# ======================================================================================================================
# 5. Generation
#
# The model gives every possible next token a number, its logit; softmax makes probabilities of them. Generation picks a
# token, appends it, and asks again. With a cache each pass of that loop processes one token instead of the whole text.
# First reading: next_token_probabilities, generate_tokens, generate.
# ======================================================================================================================

def next_token_probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """softmax(logits / temperature), cut to the likely tokens and renormalized. [B, V] -> [B, V]

    A temperature below 1 favours the likely tokens, one above 1 the others. top_k keeps the k likeliest (0: all). top_p
    keeps the fewest likeliest tokens whose probabilities reach p in sum (1.0: all), at least one: few where the model
    is sure, many where it is not. (Of 0.5, 0.3, 0.2 with p = 0.6 the first two: those before the second make up 0.5,
    which is less than p, and those before the third 0.8, which is not.)
    """
    logits = logits.float() - logits.float().amax(-1, keepdim=True)  # no overflow, however small the temperature
    probabilities = (logits / max(temperature, 1e-30)).softmax(-1)
    if top_k == 0 and top_p >= 1.0:  # nothing to sort for
        return probabilities
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    if top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities  # a token stays if those before it do not yet reach p
        probabilities[:, 1:] *= before[:, 1:] < top_p  # the first stays, also where p is less than fp32 can hold
        probabilities /= probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)  # back into the order of the vocabulary


@torch.no_grad()
def generate_tokens(model: Danube3, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0,
                    top_p: float = 1.0, seed: int | None = None, kv_cache: KVCache | None = None) -> Iterator[Tensor]:
    """Continue rows of one length, input_ids [B, T]; yields the next token of each, [B], until all have ended.

    temperature 0 takes the likeliest token. A row ends with </s>, which is yielded, and yields </s> from then on. The
    loop also ends after `max_new_tokens`, or when the context is full. A `kv_cache` that is given may hold the first
    ids of each row already, which are then skipped; not the last one, whose logits are needed.
    """
    B, T = input_ids.shape
    context = model.config.max_position_embeddings
    if not 1 <= T <= context:
        raise DanubeError(f"a prompt of {T} tokens does not fit: use 1 to {context}")
    generator = torch.Generator(device=input_ids.device)
    generator.seed() if seed is None else generator.manual_seed(seed)  # seed() takes a random one
    end = min(T + max_new_tokens, context)
    kv_cache = kv_cache or KVCache(model.config, B, end, model.dtype, input_ids.device)
    if kv_cache.length >= T:
        raise DanubeError(f"a cache of {kv_cache.length} tokens leaves nothing to ask of a prompt of {T}")
    input_ids = input_ids[:, kv_cache.length:]
    ended = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    for _ in range(end - T):
        hidden = model.model(input_ids, kv_cache)  # [B, T, D], less what is cached; then [B, 1, D]
        logits = model.lm_head(hidden[:, -1]).float()  # [B, V], of the last position only
        if temperature == 0:
            next_ids = logits.argmax(-1)  # [B]
        else:
            probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
            next_ids = torch.multinomial(probabilities, 1, generator=generator)[:, 0]  # [B]
        next_ids = next_ids.masked_fill(ended, model.config.eos_token_id)
        yield next_ids  # not in the cache yet: it goes in when it is read, in the next pass of this loop
        ended |= next_ids == model.config.eos_token_id
        if ended.all():
            return
        input_ids = next_ids[:, None]  # [B, 1]


def generate(model: Danube3, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0,
             top_p: float = 1.0, seed: int | None = None) -> Tensor:
    """Prompt and continuation. input_ids [B, T] -> [B, T + n], n at most max_new_tokens; see generate_tokens."""
    new = list(generate_tokens(model, input_ids, max_new_tokens, temperature, top_k, top_p, seed))
    return torch.cat([input_ids] + [next_ids[:, None] for next_ids in new], dim=1)


# ======================================================================================================================
# 6. Checkpoints
#
# A checkpoint is a Hugging Face Llama folder: transformers and everything built on it opens ours, and we open theirs.
# To go on training, it also holds trainer.pt. A folder is written under another name and renamed when it is whole and
# on the disk, so that a folder with the right name is always complete, even if the power fails.
# First reading: none.
# ======================================================================================================================

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIGESTS = "SHA256SUMS"  # one line a file, as `sha256sum -c` reads it


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    try:
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)  # Windows syncs only what it may write,
    except OSError:                                                           # and opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(handle: int, path: Path) -> None:
    """Lock an open file or folder; refuse one that another program has locked. The lock lasts until it is closed, here
    and in processes forked since; they close it when they end, however they end."""
    for _ in range(40 if fcntl else 0):  # two seconds: the workers of a program that was killed take a moment to go
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return
    if fcntl:
        raise DanubeError(f"{path} is in use by another program: wait for its end, or choose another place")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Have a file or folder for oneself."""
    handle = os.open(path if fcntl else os.devnull, os.O_RDONLY)
    try:
        lock(handle, path)
        yield
    finally:
        os.close(handle)


def write_digests(folder: Path) -> None:
    """List the digests of a folder's files, and wait until all of it is on the disk."""
    files = sorted(path for path in folder.iterdir() if path.name != DIGESTS)
    (folder / DIGESTS).write_text("".join(f"{file_sha256(path)}  {path.name}\n" for path in files))
    for path in [*files, folder / DIGESTS, folder]:
        sync(path)


def empty_folder(folder: Path) -> None:
    """Remove what a folder holds; the folder stays, with its lock."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into; on success it gets its digests and becomes `folder`, else it is removed."""
    if folder.exists():
        raise DanubeError(f"{folder} already exists: remove it first, or choose another place")
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        try:
            empty_folder(partial)
            yield partial
            write_digests(partial)
            partial.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def verify_digests(folder: Path, largest: float = math.inf, but: str = "") -> None:
    """Compare a folder's files, those of at most `largest` bytes and not `but`, with its list of digests, where it has
    one (downloaded folders have none). Questions and conversations (.jsonl) may be edited, and are not compared."""
    if not (folder / DIGESTS).is_file():
        return
    for line in (folder / DIGESTS).read_text(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if name.endswith(".jsonl") or name == but:
            continue
        if not (folder / name).is_file():
            raise DanubeError(f"{folder / name} is missing: copy the folder again, or remove it")
        if (folder / name).stat().st_size <= largest and file_sha256(folder / name) != digest:
            raise DanubeError(f"{folder / name} is damaged (its SHA-256 is not the one in {DIGESTS}): copy the folder "
                              "again, or remove it")


def read_json(path: Path) -> dict:
    """The JSON object that a file holds."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DanubeError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DanubeError(f"{path} cannot be read as JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise DanubeError(f"{path} does not hold a JSON object")
    return value


def read_config(folder: Path) -> DanubeConfig:
    """config.json of a published or exported folder -> DanubeConfig. What we do not compute is refused, not ignored."""
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "llama":
        raise DanubeError(f"{folder}: model_type is {raw.get('model_type')!r}: only Llama folders can be read")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # newer and older transformers
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    raw["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    expected = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
                "partial_rotary_factor": 1.0, "rope_type": "default"}
    if unsupported := [f"{name} = {raw[name]!r}" for name, value in expected.items() if raw.get(name, value) != value]:
        raise DanubeError(f"{folder / 'config.json'}: {', '.join(unsupported)} is not part of Danube3")
    names = [field.name for field in fields(DanubeConfig)]
    D, H = raw.get("hidden_size"), raw.get("num_attention_heads")
    values = {  # the defaults of transformers, which older folders leave out, and what the file has
        "rope_theta": rope.get("rope_theta", 10_000.0), "num_key_value_heads": H, "initializer_range": 0.02,
        "head_dim": D // H if isinstance(D, int) and isinstance(H, int) and H else 0,
        **{name: raw[name] for name in names if raw.get(name) is not None}}
    if missing := [name for name in names if values.get(name) is None and not name.endswith("_token_id")]:
        raise DanubeError(f"{folder / 'config.json'} lacks {', '.join(missing)}: copy the published one")
    return DanubeConfig(**values)


def write_config(folder: Path, config: DanubeConfig, tokenizer: Tokenizer, dtype: torch.dtype, **more: object) -> None:
    """The small files of a checkpoint: configuration (with `more` in it), tokenizer with its chat template, generation
    defaults."""
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {
        "config.json": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(config),
                        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
                        "torch_dtype": str(dtype).removeprefix("torch."), **more},
        "generation_config.json": ids,
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": tokenizer.add_bos,
            "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
            "clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer.model_file, folder / "tokenizer.model")


def write_tensors(folder: Path, name: str, weights: dict[str, Tensor], trainer: dict | None) -> None:
    """The large files of a checkpoint."""
    try:
        safetensors.torch.save_file(weights, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # as the files beside it; safetensors lets nobody else read
        if trainer is not None:
            torch.save(trainer, folder / "trainer.pt")
    except (safetensors.SafetensorError, RuntimeError) as error:  # how these two report a full disk
        reason = " ".join(str(error).split())[:200]
        raise DanubeError(f"{folder} could not be written ({reason}): is there room on the disk?") from error


def whole_weights(model: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """The weights of a model, on the CPU. If several processes share it (section 9) all must call this; the first gets
    the weights, the others an empty dict."""
    from torch.distributed.checkpoint import state_dict  # takes two seconds to import
    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    weights: dict[str, Any] = state_dict.get_model_state_dict(model, options=options)
    return weights


def save_checkpoint(folder: Path, model: Danube3, tokenizer: Tokenizer, trainer: dict | None = None,
                    dtype: torch.dtype = torch.float32, weights: dict[str, Tensor] | None = None) -> None:
    """Write a whole checkpoint: `weights`, by default the model's, in `dtype`. `trainer` is what a resumed run needs
    besides them."""
    weights = whole_weights(model) if weights is None else weights
    with atomic_folder(folder) as partial:
        write_config(partial, model.config, tokenizer, dtype)
        weights = {name: weight.to(dtype).contiguous() for name, weight in weights.items()}
        write_tensors(partial, "model.safetensors", weights, trainer)


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder as it is; of a run folder, its newest checkpoint."""
    path = Path(path)
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path
    if not path.exists():
        raise DanubeError(f"{path} does not exist: give a checkpoint folder or a run folder")
    if not (checkpoints := checkpoints_in(path)):
        raise DanubeError(f"{path} is no checkpoint: it holds neither config.json nor a complete step-* folder")
    return checkpoints[-1]


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. The smallest and the largest tell, ten times as fast: with a NaN both are NaN."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one safetensors file, one by one."""
    if not path.is_file():
        raise DanubeError(f"{path} is missing: copy it there")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                if tensor.dtype in DTYPES.values() and not is_finite(tensor):
                    raise DanubeError(f"{path}: {key} holds values that are not finite: take an earlier checkpoint")
                yield key, tensor
    except (safetensors.SafetensorError, OSError) as error:
        raise DanubeError(f"{path} is damaged or cut short ({error}): copy it again") from error


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder one by one, whether in one safetensors file or sharded over several."""
    index = folder / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DanubeError(f"{index} holds no weight_map of file names: copy it again")
    for name in sorted(set(weight_map.values())):
        yield from read_tensors(folder / name)


def weights_sha256(folder: Path) -> str:
    """One digest for the weight files of a folder."""
    return hashlib.sha256("".join(map(file_sha256, sorted(folder.glob("*.safetensors")))).encode()).hexdigest()


def read_tokenizer(folder: Path, config: DanubeConfig) -> Tokenizer:
    """The tokenizer of a checkpoint, which must fit the model's vocabulary."""
    tokenizer_config = folder / "tokenizer_config.json"
    add_bos = read_json(tokenizer_config).get("add_bos_token", True) if tokenizer_config.is_file() else True
    tokenizer = Tokenizer(folder / "tokenizer.model", add_bos=bool(add_bos))
    if tokenizer.vocab_size > config.vocab_size:
        raise DanubeError(f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces, the model only "
                          f"{config.vocab_size}: copy the tokenizer that belongs to it")
    if (tokenizer.pieces.bos_id(), tokenizer.pieces.eos_id()) != (config.bos_token_id, config.eos_token_id):
        raise DanubeError(f"{folder}: tokenizer.model has other ids for <s> and </s> than config.json: copy the "
                          "tokenizer that belongs to it")
    return tokenizer


def checked_weights(folder: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder one by one, if their names, shapes and types are those of `model`."""
    expected = dict(model.state_dict())
    missing = set(expected)
    for name, weight in read_weights(folder):
        if name.endswith("rotary_emb.inv_freq"):  # a constant that old exports store
            continue
        own = expected.get(name)
        if own is None or own.shape != weight.shape:
            raise DanubeError(f"{folder}: {name} {tuple(weight.shape)} is not what config.json makes it, "
                              f"{None if own is None else tuple(own.shape)}: copy both files again")
        types = list(DTYPES.values()) if name.endswith(".weight") else [own.dtype]
        if weight.dtype not in types:
            raise DanubeError(f"{folder}: {name} is stored as {weight.dtype}: only "
                              f"{', '.join(map(str, types))} can be read")
        missing.discard(name)
        yield name, weight
    if missing:
        raise DanubeError(f"{folder} lacks {len(missing)} tensors, {sorted(missing)[0]} among them: copy it again")


# ======================================================================================================================
# 7. Data
#
# Text is stored as token shards: files of uint16 ids, documents one after another as <s> .. </s>, read in windows of T.
# Which windows make up step 1,234,567? If that is the state of a loader that draws them one by one, it must be saved,
# or all the batches before must be drawn again, and with another number of processes it is another answer. Here it is a
# pure function of the step, without state: two small pieces of arithmetic, one that shares rows among sources
# (mixture_pattern), and one that shuffles without storing the order (shuffled).
# First reading: TokenSource, mixture_pattern, shuffled, StagedData.
# ======================================================================================================================

class TokenSource:
    """One source's tokens as windows of T consecutive ids. They run on across documents and shards: a window may hold
    the end of one document and the beginning of the next, and attention is not cut between them [C]. What is left at
    the end, less than a window, is left out."""

    def __init__(self, folder: Path, name: str, split: str, counts: list[int], sequence_length: int,
                 vocab_size: int) -> None:
        self.sequence_length, self.vocab_size = sequence_length, vocab_size
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # of each shard, and the end
        self.files = [folder / f"{name}-{split}-{i:05d}.bin" for i in range(len(counts))]
        for path, count in zip(self.files, counts):
            if not path.is_file():
                raise DanubeError(f"{path} is missing: make the data again")
            if path.stat().st_size != 2 * count:
                raise DanubeError(f"{path} has {path.stat().st_size:,} bytes where meta.json counts {count:,} tokens "
                                  "of 2 bytes: it was cut short or changed; make the data again")
        self.windows = int(self.starts[-1]) // sequence_length
        if not self.windows:
            raise DanubeError(f"source {name!r} ({split}) has {self.starts[-1]} tokens, less than one row of "
                              f"{sequence_length}: give it more text, or its share to another source")

    def window(self, index: int) -> np.ndarray:
        """Window `index` -> ids [T], int64."""
        start, end, parts = index * self.sequence_length, (index + 1) * self.sequence_length, []
        first, last = np.searchsorted(self.starts, [start, end - 1], side="right") - 1  # shards of first and last id
        for shard in range(first, last + 1):
            begin = max(start, self.starts[shard])
            count = min(end, self.starts[shard + 1]) - begin
            # opened for each read: a run of 4e12 tokens has more shards than a process may hold open
            parts.append(np.fromfile(self.files[shard], "<u2", count, offset=2 * (begin - self.starts[shard])))
            if len(parts[-1]) < count:
                raise DanubeError(f"{self.files[shard]} has become shorter, or cannot be read: make the data again")
        ids = np.concatenate(parts).astype(np.int64)
        if ids.max() >= self.vocab_size:
            raise DanubeError(f"{self.files[last]} holds token id {ids.max()}, outside the vocabulary of "
                              f"{self.vocab_size}: it was made with another tokenizer; make the data again")
        return ids


SMALL_FILE = 2 ** 24  # bytes [C]. Larger shards are not read through at every start; `sha256sum -c SHA256SUMS` does it


class TokenData:
    """A data folder: its tokenizer, and the sources it has."""

    def __init__(self, folder: str | Path, config: DanubeConfig, sequence_length: int) -> None:
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            raise DanubeError(f"no data at {self.folder} (no meta.json): make token shards with data/prepare.py, or "
                              "name their folder with --data; --dry-run shows the plan without data")
        verify_digests(self.folder, SMALL_FILE)
        self.meta, self.sequence_length, self.config = read_json(self.folder / "meta.json"), sequence_length, config
        if not isinstance(self.meta.get("sources"), dict) or not self.meta["sources"]:
            raise DanubeError(f"{self.folder / 'meta.json'} names no sources: make the data again")
        self.tokenizer = Tokenizer(self.folder / "tokenizer.model")
        if self.tokenizer.sha256 != self.meta.get("tokenizer_sha256"):
            raise DanubeError(f"{self.folder / 'tokenizer.model'} is not the tokenizer that the shards were made with "
                              "(its SHA-256 differs from meta.json's): put that one back, or make the data again")
        if self.tokenizer.vocab_size > config.vocab_size:
            raise DanubeError(f"the tokenizer in {self.folder} has {self.tokenizer.vocab_size} pieces, the "
                              f"configuration only {config.vocab_size}: use the tokenizer of this configuration")

    def open(self, name: str, split: str) -> TokenSource:
        """The windows of one source; `split` is "train" or "val"."""
        sources = self.meta["sources"]
        if name not in sources:
            raise DanubeError(f"the mixture names source {name!r}, but {self.folder} holds only {', '.join(sources)}: "
                              "make the data again with that source")
        counts = sources[name].get(split) if isinstance(sources[name], dict) else None
        if not isinstance(counts, list) or not all(isinstance(c, int) and 0 < c < 2 ** 60 for c in counts):
            raise DanubeError(f"{self.folder / 'meta.json'} has no list of token counts for source {name!r}, {split}: "
                              "make the data again")
        return TokenSource(self.folder, name, split, counts, self.sequence_length, self.config.vocab_size)


def matching_data(folder: str | Path, tokenizer: Tokenizer, config: DanubeConfig, length: int) -> TokenData:
    """A data folder in rows of `length`, if it was made with this tokenizer."""
    data = TokenData(folder, config, length)
    if data.tokenizer.sha256 != tokenizer.sha256:
        raise DanubeError(f"{folder} was made with another tokenizer than the model's: choose other data")
    return data


def mixture_pattern(weights: dict[str, int], rows: int) -> list[str]:
    """The sources of the first `rows` rows of a mixture: {"a": 3, "b": 2} gives a b a a b.

    Why not draw each row's source at random? Then no formula could tell how many rows of a source came before row
    1,234,567, and so which of its windows is next. With a pattern that repeats it is a division (rows_before).

    Source i has the share w_i / W, with W the sum of the weights: after t rows it should have had t w_i / W. Having had
    n, it may get its next row as soon as n < t w_i / W, and must have it at the latest in row (n + 1) W / w_i, rounded
    up. Of those that may, the one that must soonest goes first; then none is ever a whole row off (Tijdeman 1980, "The
    chairman assignment problem"). After W rows all counts are exact, and the pattern begins again.
    """
    total, given, pattern = sum(weights.values()), dict.fromkeys(weights, 0), []
    for t in range(1, rows + 1):
        due = [name for name, weight in weights.items() if t * weight > given[name] * total]
        name = min(due, key=lambda name: -(-(given[name] + 1) * total // weights[name]))  # -(-a // b) rounds up
        given[name] += 1
        pattern.append(name)
    return pattern


def shuffled(index: int, size: int, key: str) -> int:
    """Where `index` goes in a random order of 0 .. size-1 that `key` names, without storing the order.

    A Feistel network, as in block ciphers: write the index as two digits in base ceil(sqrt(size)), and four times

        (high, low) -> (low, (high + hash(key, round, low)) mod base)

    Each round can be undone by subtracting, so no two of the base^2 numbers come to the same one. A result past size-1
    goes through again, until it is inside: that must come, for the repeated steps lead back to where they began; and no
    two starts end at the same place, for each number is reached from one other only.
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


VALIDATION_ROWS = 32  # of each source [C]
MAX_REPEATS = 100     # times that a run may read a source [C]


def validation_windows(source: TokenSource) -> Tensor:
    """VALIDATION_ROWS windows of a source, spread evenly, or all if it has fewer. -> [N, T]"""
    picks = sorted({i * source.windows // VALIDATION_ROWS for i in range(VALIDATION_ROWS)})
    return torch.from_numpy(np.stack([source.window(i) for i in picks]))


class StagedData:
    """The batches of a run: `batch(step)` depends on the recipe (with its seed), the shards and the step alone.

    Which window is row r of a stage? The pattern, repeated, names its source. How often that source came before, in
    earlier stages (used) and in this one (rows_before), is the number of its window, in an order that `shuffled` makes.
    When all its windows are read, the source begins again in another order.
    """

    def __init__(self, data: TokenData, recipe: Recipe) -> None:
        self.data, self.recipe = data, recipe
        self.used = [dict.fromkeys(recipe.stages[0].mixture, 0)]  # rows used before each stage
        names = dict.fromkeys(name for stage in recipe.stages for name, weight in stage.mixture.items() if weight)
        self.sources = {name: data.open(name, "train") for name in names}
        self.patterns, self.counts = [], []
        for start, end, stage in zip([0, *recipe.stage_ends], recipe.stage_ends, recipe.stages):
            rows = (end - start) * recipe.rows_per_step
            factor = math.gcd(*stage.mixture.values())  # 906, 18, .. is 453, 9, ..: a shorter pattern
            weights = {name: weight // factor for name, weight in stage.mixture.items()}
            pattern = mixture_pattern(weights, min(rows, sum(weights.values())))
            # counts[name][t]: rows of this source among the first t of the pattern
            counts = {name: np.cumsum([0] + [p == name for p in pattern]) for name in weights}
            self.patterns.append(pattern)
            self.counts.append(counts)
            self.used.append({name: used + self.rows_before(counts[name], rows)
                              for name, used in self.used[-1].items()})
        self.repeats = {name: self.used[-1][name] / source.windows for name, source in self.sources.items()}
        for name, times in self.repeats.items():
            if times > MAX_REPEATS:
                raise DanubeError(f"source {name!r} has {self.sources[name].windows:,} rows of {data.sequence_length}, "
                                  f"and its share is {self.used[-1][name]:,}, {times:,.0f} times as many; more than "
                                  f"{MAX_REPEATS} are refused: give it more text, or lower --tokens")

    @staticmethod
    def rows_before(count: np.ndarray, row: int) -> int:
        """Rows of a source among the first `row` of a stage, given its counts over one pattern."""
        periods, rest = divmod(row, max(1, len(count) - 1))  # a stage without steps has an empty pattern
        return int(periods * count[-1] + count[rest])

    def row(self, step: int, index: int) -> tuple[str, int]:
        """Which window row `index` of step `step` is: (source, window)."""
        stage = self.recipe.stage_at(step)
        first_step = [0, *self.recipe.stage_ends][stage]
        row = (step - first_step) * self.recipe.rows_per_step + index  # counted from the beginning of the stage
        name = self.patterns[stage][row % len(self.patterns[stage])]
        use = self.used[stage][name] + self.rows_before(self.counts[stage][name], row)  # from the run's start
        epoch, place = divmod(use, self.sources[name].windows)
        return name, shuffled(place, self.sources[name].windows, f"{self.recipe.seed}/{name}/{epoch}")

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """input_ids and labels of one optimizer step, 2 x [rows, T], the same: each token but a row's first is to be
        predicted."""
        rows = [self.row(step, i) for i in range(self.recipe.rows_per_step)]
        input_ids = torch.from_numpy(np.stack([self.sources[name].window(window) for name, window in rows]))
        return input_ids, input_ids

    def validation_rows(self) -> dict[str, tuple[Tensor, Tensor]]:
        """input_ids and labels of each source's validation text: the same rows, twice."""
        names = self.recipe.stages[0].mixture
        return {name: (validation_windows(self.data.open(name, "val")),) * 2 for name in names}

    @property
    def identity(self) -> dict[str, str]:
        """What must not change when a run is resumed."""
        return {"meta.json": file_sha256(self.data.folder / "meta.json")}


# ======================================================================================================================
# 8. Optimizer
#
# AdamW keeps two running means for each weight, its moments: of the gradient (beta1) and of its square (beta2). It
# steps against the first, divided by the root of the second, so that all weights move at a similar speed, and shrinks
# the weights a little besides. The learning rate rises over the first steps, while those means are still poor, and
# then falls along half a cosine: large steps to get there, small ones to settle.
#
#     m = beta1 m + (1 - beta1) g                      g is the gradient
#     v = beta2 v + (1 - beta2) g^2                    m and v begin at 0, too small:
#     m' = m / (1 - beta1^t), v' = v / (1 - beta2^t)   corrected for that, at step t = 1, 2, ..
#     w = w - rate (m' / (sqrt(v') + eps) + decay w)   decay is weight_decay
# ======================================================================================================================

def make_optimizer(model: Danube3, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, its moments made already, with decay on the matrices only: a norm gain has no reason to be near zero."""
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p.requires_grad]
    gains = [p for p in model.parameters() if p.dim() < 2 and p.requires_grad]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2),
                                  eps=recipe.adam_eps, fused=True)  # one pass over memory, not ten for each parameter
    for p in [*matrices, *gains]:  # what AdamW would make in its first step: a checkpoint of step 0 has it too
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear to the peak, then half a cosine to the final rate, which the last step has, if two steps or more follow
    the warm-up. Step counts from 0.

        peak (step + 1) / warmup, and then
        peak (f + (1 - f) (1 + cos(pi p)) / 2)     p = 0 .. 1 over the other steps, f = final_fraction
    """
    warmup = max(1, round(recipe.warmup_fraction * recipe.total_steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.total_steps - 1 - warmup)  # 0 .. 1
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # 1 .. 0
    return recipe.learning_rate * (recipe.final_fraction + (1 - recipe.final_fraction) * cosine)


# ======================================================================================================================
# 9. Training
#
# One loop: take the batch of this step, sum the loss over its micro-batches, backward, clip, step, write a line.
# Around it stand the things that make a long run bearable: checkpoints, resuming to the bit, a bar that tells when it
# will be over, and how much of the machine's arithmetic the run really uses. In one process `rank` is 0, `ranks` 1.
# First reading: compute_dtype, autocast, flops_per_token, used_lengths, micro_batches, train_step, mean_loss, train.
# ======================================================================================================================

MAX_SKIPPED_STEPS = 5  # in a row, before a run that has stopped making sense is ended [C]


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the GPU computes in it (capability 8 and up; older ones claim it too, and emulate it), fp16 on older
    GPUs, fp32 elsewhere. bf16 has the range of fp32 with 8 bits of precision; fp16 has 11 bits and a small range."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Matrix products in the compute type; weights, gradients and sums stay fp32."""
    dtype = compute_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


# Several GPUs. torchrun starts this program once for each GPU: `ranks` processes, of which this one has the number
# `rank`. All run the same lines, and meet in collective calls (in all_reduce every process gets the sum of what each
# one brings), so that a call which only some of them make waits for ever. A model too large for one GPU is cut: each
# process keeps 1 / ranks of every weight and moment, and a layer's weights are put together from all processes just
# before it computes, and dropped after ("fully sharded data parallel", FSDP). With one process none of this happens.

def processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are: 0 and 1 unless torchrun has started them."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def say(text: str) -> None:
    """Print, in the first process only, and above the bar of a run."""
    if processes()[0] == 0:
        tqdm.write(text)


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if processes()[1] > 1:
        dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a part, in full. Others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def summed(tensor: Tensor) -> Tensor:
    """The sum of what all processes bring, in place, in each of them. All must call this."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def shared_recipe(recipe: Recipe, ranks: int) -> Recipe:
    """The recipe for so many processes or GPUs: each takes an equal share of a step's rows, in micro-batches of at most
    the recipe's size that divide it evenly."""
    rows, rest = divmod(recipe.rows_per_step, ranks)
    if rest:
        raise DanubeError(f"a step of {recipe.rows_per_step} rows cannot be shared evenly by {ranks} processes: make "
                          "it a multiple (--tokens-per-step, or --batch-size), or take another number of them")
    return replace(recipe, micro_batch_size=max(n for n in range(1, recipe.micro_batch_size + 1) if rows % n == 0))


def flops_per_token(config: DanubeConfig, sequence_length: int, frozen: bool = False) -> int:
    """Floating-point operations that training needs for one token: forward, and twice that backward, once for the
    gradient of the inputs and once for that of the weights, which falls away where they are `frozen`. (Attention has no
    weights: its second half is for keys and values.)

    A weight of a matrix costs one multiplication and one addition a token; the input embedding is looked up, not
    multiplied. For every pair of a query and a key the score costs 2 h operations, and so does the weighted sum; a
    causal row has (T + 1) / 2 keys to a query on average, and only pairs that exist are counted."""
    c = config
    norms = (2 * c.num_hidden_layers + 1) * c.hidden_size
    weights = count_parameters(c) - c.vocab_size * c.hidden_size - norms
    attention = c.num_hidden_layers * c.num_attention_heads * (2 + 2) * c.head_dim * (sequence_length + 1) // 2
    return (2 if frozen else 3) * 2 * weights + 3 * attention


def share_model(model: Danube3, device: torch.device) -> Danube3:
    """Put a model on the device; where there are several processes, give each a part of every weight, and so of its
    gradient and moments (FSDP2). A layer is gathered, in the compute type (its norms too, which a single GPU keeps in
    fp32), just before it computes, and dropped after; gradients are summed in fp32. (Not codes and scales: of a
    quantized base each process has all.)"""
    ranks = processes()[1]
    if ranks == 1:
        return model.to(device)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if (dtype := compute_dtype(device)) == torch.float16:
        raise DanubeError("several GPUs need bf16, and these compute in fp16 only: train on one of them")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device.type, (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # what is left: embedding, last norm, head
    return model


def measure_matmul_peak(device: torch.device, seconds: float = 0.3) -> float:
    """The best rate at which this device multiplies two square matrices in its compute type, in operations a second.
    A run's mfu, model FLOPs utilization, is flops_per_token times tokens a second over this; others divide by the data
    sheet's peak.

    The matrices grow while time is left: some CPUs need a minute for one large product of fp16, which they emulate."""
    dtype, size, largest, best = compute_dtype(device), 128, 2_048 if device.type == "cpu" else 8_192, 0.0
    (torch.ones(16, 16, device=device, dtype=dtype) @ torch.ones(16, 16, device=device, dtype=dtype)).sum().item()
    end = time.perf_counter() + seconds  # only now: the first product of all loads a library
    while True:
        a = torch.randn(size, size, device=device).to(dtype)
        elapsed = min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=2))  # .item() waits for the device
        best = max(best, 2 * size ** 3 / elapsed)
        left = end - time.perf_counter()
        if left < 2 * elapsed:
            return best
        if size < largest and left > 2 * 8 * elapsed:  # two products of twice the size
            size *= 2


def used_lengths(labels: Tensor) -> Tensor:
    """How much of each row can matter to the loss: all up to its last label. No earlier token sees what stands after
    it, such as padding, so it can be cut off. labels [B, T] -> [B]"""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != IGNORE) * positions).amax(dim=1)


def micro_batches(input_ids: Tensor, labels: Tensor, size: int,
                  device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut rows [N, T] into pieces of at most `size` rows, each no longer than it must be, on the model's device."""
    for ids, own_labels in zip(input_ids.split(size), labels.split(size)):
        length = max(1, int(used_lengths(own_labels).amax()))
        yield ids[:, :length].to(device), own_labels[:, :length].to(device)


def train_step(model: Danube3, optimizer: torch.optim.Optimizer, input_ids: Tensor, labels: Tensor, recipe: Recipe,
               step: int, scaler: torch.amp.GradScaler | None = None) -> tuple[float, float]:
    """One optimizer step on input_ids and labels [rows, T]. -> loss per labelled token, norm of the whole gradient

        loss = sum over all labels of the step of -log p(label) / number of all labels of the step

    Trap: not the mean of the micro-batches' means. If one has 10 labels and the next 1,000, each label of the first
    would count a hundred times as much. Gradients add up from one backward() to the next, so each micro-batch's sum is
    divided by the number for the whole step; and so it is in each of several processes, which take every n-th row.
    fp16 has no numbers below 6e-8, where many gradients lie: `scaler` multiplies the loss, and so all of them, and
    divides again before they are used.
    """
    device, (rank, ranks) = model.device, processes()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    labelled = (labels[:, 1:] != IGNORE).sum().clamp(min=1).to(device)  # nothing predicts the first token of a row
    loss = torch.zeros((), device=device)
    batches = list(micro_batches(input_ids[rank::ranks], labels[rank::ranks], recipe.micro_batch_size, device))
    for number, (ids, own_labels) in enumerate(batches, start=1):
        if ranks > 1:  # gradients are exchanged once, after the last
            model.set_requires_gradient_sync(number == len(batches))  # type: ignore[operator]  # a method of FSDP2's
        with autocast(device):
            part = model(ids, own_labels) / labelled
        scaler.scale(part * ranks).backward()  # the exchange takes the mean over processes, and we want the sum
        loss += part.detach()
    loss = summed(loss)
    scaler.unscale_(optimizer)
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, recipe)
    if torch.isfinite(loss + grad_norm):  # or the weights are left as they are
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), grad_norm.item()


@torch.no_grad()
def mean_loss(model: Danube3, input_ids: Tensor, labels: Tensor, micro_batch_size: int) -> float:
    """Loss per labelled token of rows [N, T], which processes share if they can do so evenly (FSDP waits for as many
    passes of each)."""
    device, (rank, ranks) = model.device, processes()
    rank, ranks = (rank, ranks) if len(labels) % ranks == 0 else (0, 1)
    total = torch.zeros((), device=device)
    for ids, own_labels in micro_batches(input_ids[rank::ranks], labels[rank::ranks], micro_batch_size, device):
        total += model(ids, own_labels)
    total = summed(total) if ranks > 1 else total
    return total.item() / max(1, int((labels[:, 1:] != IGNORE).sum()))


class Run:
    """A run folder: metrics.jsonl, with a line for every step, and the newest checkpoint, from which the run can go on.

    `data` is StagedData, or anything else with its recipe, batch(step), validation_rows() and identity. What makes a
    run this run (configuration, recipe, data, `base`: the folder that the weights came from) must be the same when it
    is resumed.
    `write_model(folder, model, tokenizer, trainer, dtype, weights)` is save_checkpoint or save_adapter (section 10).
    """

    def __init__(self, out: Path, model: Danube3, tokenizer: Tokenizer, data: "StagedData | ChatData",
                 resume: bool, base: Path | None = None, write_model: Callable = save_checkpoint) -> None:
        self.out, self.model, self.tokenizer, self.data, self.write_model = out, model, tokenizer, data, write_model
        self.optimizer, self.device = make_optimizer(model, data.recipe), model.device
        may_change = ("save_every", "micro_batch_size")  # when a run goes on
        recipe = {name: value for name, value in asdict(data.recipe).items() if name not in may_change}
        self.identity = {"configuration": asdict(model.config), "recipe": recipe, "data": data.identity,
                         "start": {"weights": weights_sha256(base) if base else None}}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=compute_dtype(self.device) == torch.float16)
        self.step, self.tokens, self.skipped = 0, 0, 0  # steps and tokens done; steps skipped in a row
        self.saved: int | None = None  # the step of the newest checkpoint
        self.compare_processes()
        if (out / "config.json").exists():
            raise DanubeError(f"{out} is a checkpoint, not a run folder: choose another --out")
        if resume and not checkpoints_in(out):
            raise DanubeError(f"nothing to resume: {out} holds no complete checkpoint; leave --resume out")
        if not resume and checkpoints_in(out):
            raise DanubeError(f"{out} already holds a run: add --resume to go on with it, or choose another --out")
        first = processes()[0] == 0
        if first:
            out.mkdir(parents=True, exist_ok=True)
        self.log = open(out / "metrics.jsonl" if first else os.devnull, "a")  # only the first process writes
        if first:
            lock(self.log.fileno(), out)  # as long as the log is open, it keeps other runs away
        if resume:
            self.restore()
        if first:
            self.remove_old_checkpoints()
            self.forget_later_steps()

    def compare_processes(self) -> None:
        """All processes must train the same thing, from the same checkpoint."""
        rank, ranks = processes()
        if ranks > 1:
            identities = [None] * ranks
            checkpoints = [path.name for path in checkpoints_in(self.out)]
            dist.all_gather_object(identities, json.dumps([self.identity, checkpoints]))
            if identities[rank] != identities[0]:
                raise DanubeError(f"process {rank} was started with other flags or data than process 0, or sees other "
                                  f"files in {self.out}: start all with the same, on a file system that they share")

    def restore(self) -> None:
        """Put the newest checkpoint into model and optimizer, however many processes wrote it, or read it now."""
        from torch.distributed.checkpoint import state_dict
        folder = checkpoints_in(self.out)[-1]
        if processes()[0] == 0:
            verify_digests(folder)
        wait_for_all()
        try:  # weights_only: a checkpoint from a stranger may hold tensors and numbers, not code
            trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True,
                                 mmap=self.device.type != "cpu")  # or the moments would stay in a file that is removed
            self.check_identity(folder, trainer["identity"])
            weights = trainer.get("master_weights") or dict(read_weights(folder))
            shapes = [{name: tuple(w.shape) for name, w in each.items()} for each in (weights, self.trained_weights())]
            if shapes[0] != shapes[1]:
                raise DanubeError(f"{folder} does not hold the weights that this run trains: choose another --out")
            options = state_dict.StateDictOptions(full_state_dict=True, strict=False)  # what is frozen stays as it is
            state_dict.set_model_state_dict(self.model, weights, options=options)
            state_dict.set_optimizer_state_dict(self.model, self.optimizer, trainer["optimizer"], options=options)
            for group in self.optimizer.param_groups:  # loaded as a list, which is saved as other bytes
                group["betas"] = tuple(group["betas"])
            if trainer["scaler"]:  # nothing, where the checkpoint comes from a machine that needed no loss scale
                self.scaler.load_state_dict(trainer["scaler"])
            self.step, self.tokens, self.skipped = (int(trainer[name]) for name in ("step", "tokens", "skipped"))
            self.saved = self.step
        except FileNotFoundError as error:
            raise DanubeError(f"{folder} has no trainer.pt to go on from: choose another --out") from error
        except (DanubeError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise DanubeError(f"{folder / 'trainer.pt'} is damaged, or from another version of this program: choose "
                              "another --out") from error

    def check_identity(self, folder: Path, made_with: dict) -> None:
        """Refuse to go on from a checkpoint that another run made, and say what was different."""
        for part, values in self.identity.items():
            for name, value in values.items():
                if (saved := made_with.get(part, {}).get(name)) != value:
                    change = f" was {saved}, now it is {value}" if len(f"{saved}{value}") < 60 else ""
                    raise DanubeError(f"{folder} was made with another {part} ({name}{change}): resume with the flags "
                                      "and the data of the first run, or choose another --out")

    def forget_later_steps(self) -> None:
        """Cut off metrics.jsonl before what a resumed run will do again: lines after its step, and the evaluation at
        it. They stand in the order of the steps, so nothing behind the first of them is to be kept."""
        length = 0
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short ends it too
            for line in (self.out / "metrics.jsonl").read_bytes().split(b"\n")[:-1]:
                entry = json.loads(line)
                if not self.step or entry["step"] > self.step or entry["step"] == self.step and "val_loss" in entry:
                    break
                length += len(line) + 1
        self.log.truncate(length)

    def remove_old_checkpoints(self) -> None:
        """All but the newest, and what a kill left of one that was being written or removed."""
        for old in checkpoints_in(self.out)[:-1]:  # renamed first: half of a folder must not look like a whole one
            old.rename(old.with_name(f"{old.name}.partial"))
        for leftover in self.out.glob("step-*.partial"):
            shutil.rmtree(leftover)

    def write(self, **entry: object) -> None:
        self.log.write(json.dumps(entry) + "\n")
        self.log.flush()

    def trained_weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one; only then remove the one before. All processes gather,
        the first one writes, and the others wait: torchrun would take an early end for a failure."""
        from torch.distributed.checkpoint import state_dict
        if self.saved == self.step:
            return
        options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
        trainer = {"step": self.step, "tokens": self.tokens, "skipped": self.skipped, "identity": self.identity,
                   "optimizer": state_dict.get_optimizer_state_dict(self.model, self.optimizer, options=options),
                   "scaler": self.scaler.state_dict()}
        dtype, trained = compute_dtype(self.device), self.trained_weights()  # without a quantized base's codes
        weights = {name: w for name, w in whole_weights(self.model, trained_only=True).items() if name in trained}
        if dtype != torch.float32 or len(trained) < len(self.model.state_dict()):
            trainer["master_weights"] = weights  # those that are trained, in fp32; the folder has bf16, or adapters
        if processes()[0] == 0:
            if not all(map(is_finite, weights.values())):
                raise DanubeError(f"the weights are not finite after step {self.step}; the last checkpoint, if any, is "
                                  f"kept in {self.out}: try a lower --learning-rate and another --out")
            os.fsync(self.log.fileno())
            folder = self.out / f"step-{self.step:07d}"
            self.write_model(folder, self.model, self.tokenizer, trainer, dtype, weights)
            self.remove_old_checkpoints()
        self.saved = self.step
        wait_for_all()


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Turns the first Ctrl-C, or SIGTERM (as batch systems send it), into a request, an entry of the list that is
    yielded; a second one stops at once. With several processes only Ctrl-C is a request, and a second does nothing:
    torchrun stops all when its --shutdown-timeout is over, and sends SIGTERM when a process has failed."""
    requests: list[int] = []
    alone = processes()[1] == 1
    numbers = (signal.SIGINT, signal.SIGTERM)[:1 + alone]
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    def request(number: int, frame: object) -> None:
        requests.append(number)
        if alone:
            for each, handler in previous.items():
                signal.signal(each, handler)

    for number in previous:
        signal.signal(number, request)
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def log_validation(run: Run, validation: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Log and print the loss of each source's validation rows."""
    recipe = run.data.recipe
    stage = recipe.stages[recipe.stage_at(max(0, run.step - 1))].name  # that of the step just done
    with autocast(run.device):
        losses = {name: mean_loss(run.model, *rows, recipe.micro_batch_size) for name, rows in validation.items()}
    if processes()[1] > 1:  # without a backward pass after it, FSDP keeps the root's weights whole, cannot save them
        run.model.reshard()  # type: ignore[operator]
    run.write(step=run.step, stage=stage, tokens=run.tokens, val_loss=losses)
    parts = (f"{name} {loss:.3f} ({math.exp(min(loss, 99)):,.1f})" for name, loss in losses.items())
    say(f"step {run.step}, validation loss (perplexity): {', '.join(parts)}")


def train(run: Run) -> bool:
    """Train to the end of the recipe. A checkpoint, and the loss on validation data, every `save_every` steps and after
    each stage; that loss also before the first step. While a step computes, a thread reads the next batch.

    -> False if Ctrl-C or SIGTERM ended it early; the run is saved then too."""
    recipe, model, validation = run.data.recipe, run.model, run.data.validation_rows()
    rank, ranks = processes()
    peak = ranks * measure_matmul_peak(run.device)
    frozen = len(run.trained_weights()) < len(model.state_dict())
    trained = sum(weight.numel() for weight in run.trained_weights().values())
    say(f"{trained:,} parameters to train, {recipe.total_steps:,} steps of {recipe.rows_per_step} rows on "
        f"{ranks} x {run.device.type} in {str(compute_dtype(run.device)).removeprefix('torch.')}")
    bar = tqdm(total=recipe.total_steps, initial=run.step, unit="step", dynamic_ncols=True, smoothing=0.05,
               mininterval=0.2 if sys.stderr.isatty() else 10, disable=rank > 0)
    with run.log, bar, interruptible() as requests, ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(run.data.batch, run.step)
        while True:
            if run.step % recipe.save_every == 0 or run.step in recipe.stage_ends:
                if run.step:
                    run.save()
                log_validation(run, validation)
            if run.step == recipe.total_steps:
                return True
            if summed(torch.tensor(len(requests), device=run.device)) > 0:  # in any process
                run.save()
                return False
            stage, start = recipe.stages[recipe.stage_at(run.step)].name, time.perf_counter()
            input_ids, labels = upcoming.result()
            upcoming = reader.submit(run.data.batch, min(run.step + 1, recipe.total_steps - 1))  # the last: unused
            tokens = int(used_lengths(labels).sum())
            loss, grad_norm = train_step(model, run.optimizer, input_ids, labels, recipe, run.step, run.scaler)
            rate, finite = tokens / (time.perf_counter() - start), math.isfinite(loss + grad_norm)
            mfu = rate * flops_per_token(model.config, tokens // len(labels), frozen) / peak
            # fp16: a finite loss with a gradient that is not means too large a scale, which the scaler has halved
            failed = not finite and not (math.isfinite(loss) and run.scaler.get_scale() > 1)
            run.step, run.tokens, run.skipped = run.step + 1, run.tokens + tokens, run.skipped + 1 if failed else 0
            run.write(step=run.step, stage=stage, tokens=run.tokens, loss=loss if finite else None,
                      lr=learning_rate(run.step - 1, recipe), grad_norm=grad_norm if finite else None,
                      tokens_per_second=round(rate), mfu=round(mfu, 4))
            if run.skipped == MAX_SKIPPED_STEPS:
                raise DanubeError(f"the loss was not finite in {run.skipped} steps in a row, up to step {run.step}; "
                                  f"the last checkpoint, if any, is kept in {run.out}: try a lower --learning-rate and "
                                  "another --out")
            bar.set_description(stage, refresh=False)
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s, {mfu:.0%} of peak", refresh=False)
            bar.update()


# ======================================================================================================================
# 10. Chat fine-tuning
#
# A base model continues text; after a few thousand conversations it answers. The loop is the same: a conversation
# becomes input_ids and labels (section 2), and section 9 does not ask where its batches come from. What is new is LoRA:
# instead of a matrix W, train a small correction B A beside it, with so few numbers that their gradients and moments
# take hardly any memory, and one base model can carry many such pairs.
# First reading: pad_rows, LoRALinear, add_lora.
# ======================================================================================================================

CHAT_ROWS = 16        # conversations of one optimizer step [C]
CHAT_TOKENS = 8_192   # a micro-batch holds at most so many tokens, if one conversation does not hold more [C]
VALIDATION_CHATS = 0.05  # of the conversations, and at most 256 of them [C]


def render_conversations(conversations: list[list[dict[str, str]]], tokenizer: Tokenizer, context: int,
                         source: str | Path) -> tuple[list[np.ndarray], str]:
    """Conversations, each as one array [2, T] of input_ids and labels, and a line that sums them up. `source`, such as
    the name of their file, stands in messages.

    Each is cut behind its last answer that ends within the context; one that has no such answer is left out.
    """
    rows, answers, cut, dropped = [], 0, 0, 0
    bar = tqdm(conversations, desc="conversations", leave=False, disable=None)
    for number, messages in enumerate(bar, start=1):
        try:
            row = np.array(render_chat(messages, tokenizer), np.int32)  # [2, T]
        except DanubeError as error:
            raise DanubeError(f"{source}, conversation {number}: {error}") from error
        ends = np.flatnonzero(row[1] == tokenizer.pieces.eos_id()) + 1  # a </s> with a label ends an answer
        fitting = ends[ends <= context]
        if len(fitting):
            rows.append(row[:, :fitting[-1]])
        answers, cut, dropped = answers + len(ends), cut + (0 < len(fitting) < len(ends)), dropped + (not len(fitting))
    if not answers:
        raise DanubeError(f"{source}: no conversation has an answer to learn from: give the assistant something to say")
    if not rows:
        raise DanubeError(f"{source}: no answer ends within the context of {context} tokens: shorten the conversations")
    tokens, labelled = sum(row.shape[1] for row in rows), sum(int((row[1] != IGNORE).sum()) for row in rows)
    return rows, (f"{len(rows):,} conversations, {tokens:,} tokens, {labelled:,} of them in answers; {cut:,} cut to "
                  f"{context:,} tokens, {dropped:,} left out for want of an answer within them")


def pad_rows(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Rows [2, T_i] of input_ids and labels as 2 x [N, T], filled up on the right, where no earlier token looks: ids
    with 0, labels with IGNORE. Only the label tells what is padding."""
    input_ids, labels = ([torch.from_numpy(row[i]).long() for row in rows] for i in (0, 1))
    return (nn.utils.rnn.pad_sequence(input_ids, batch_first=True),
            nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE))


def chat_recipe(config: DanubeConfig, rows: list[np.ndarray], epochs: int, batch_size: int, lora: bool) -> Recipe:
    """One stage an epoch. 1e-4 for adapters is the default of H2O LLM Studio, the program that Danube3 was tuned with
    [R]; the rest is [C]: all weights together take a tenth of that, and at other widths than 500m's both are multiplied
    by 1,536 / hidden_size. Tokens are counted as if all rows were as long as the longest; metrics.jsonl has what was
    read. (So a single long row makes all micro-batches small, unless --micro-batch-size says otherwise.)"""
    longest, batch_size = max(row.shape[1] for row in rows), min(batch_size, len(rows))
    sizes = (n for n in range(1, batch_size + 1) if batch_size % n == 0 and n * longest <= CHAT_TOKENS)
    ends = [-(-(i + 1) * len(rows) // batch_size) for i in range(epochs)]  # steps; rounded up, nothing is left out
    stages = tuple(Stage(f"epoch {i + 1}", (end - start) * batch_size * longest, {"chat": 1})
                   for i, (start, end) in enumerate(zip([0, *ends], ends)))
    return Recipe(stages, sequence_length=longest, tokens_per_step=batch_size * longest,
                  micro_batch_size=max(sizes, default=1),
                  learning_rate=(1e-4 if lora else 1e-5) * 1536 / config.hidden_size, weight_decay=0.0,
                  warmup_fraction=0.05, save_every=500)


class ChatData:
    """Conversations, lists of messages, as batches, in the manner of StagedData, and a few of them, drawn at random, to
    measure on. `source` names them in messages; `sha256` and `fold_system` (how they were read) stand for them when a
    run is resumed.

    A step takes the next `rows_per_step` conversations of a shuffled order, which is a new one in each epoch. Within a
    step the longest come first, so that rows of like length share a micro-batch.
    """

    def __init__(self, conversations: list[list[dict[str, str]]], tokenizer: Tokenizer, config: DanubeConfig,
                 epochs: int = 1, batch_size: int = CHAT_ROWS, lora: bool = False, fold_system: bool = False,
                 source: str | Path = "conversations", sha256: str = "") -> None:
        if epochs > MAX_REPEATS:
            raise DanubeError(f"--epochs {epochs:,}: more than {MAX_REPEATS} teach nothing: lower it")
        context = config.max_position_embeddings
        rows, self.summary = render_conversations(conversations, tokenizer, context, source)
        held_out = min(256, math.ceil(VALIDATION_CHATS * len(rows)))
        if len(rows) == held_out:
            raise DanubeError(f"{source}: one usable conversation is too few: one more is needed to measure the loss "
                              "on")
        rows = [rows[shuffled(i, len(rows), "split")] for i in range(len(rows))]
        self.held_out, self.rows = rows[:held_out], rows[held_out:]
        self.identity = {"chat": sha256, "fold_system": fold_system}
        self.recipe = chat_recipe(config, self.rows, epochs, batch_size, lora)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """input_ids and labels of one optimizer step, 2 x [rows, T]."""
        size, first = len(self.rows), step * self.recipe.rows_per_step
        places = [divmod(first + i, size) for i in range(self.recipe.rows_per_step)]  # (epoch, place in it)
        rows = [self.rows[shuffled(place, size, f"{self.recipe.seed}/chat/{epoch}")] for epoch, place in places]
        return pad_rows(sorted(rows, key=lambda row: -row.shape[1]))

    def validation_rows(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"chat": pad_rows(sorted(self.held_out, key=lambda row: -row.shape[1]))}


LORA_ALPHA = 16  # the correction's scale is alpha / rank: H2O LLM Studio's default; Danube3's own is not published [C]


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x, with A [r, in] and B [out, r] trained and W frozen (arXiv 2106.09685).

    add_lora begins with B = 0, so that the model begins as it was. A and B are fp32 whatever W is: an update is often
    smaller than the gap between two bf16 numbers.
    """

    def __init__(self, base_layer: "nn.Linear | QuantizedLinear", rank: int, alpha: float = LORA_ALPHA) -> None:
        super().__init__()
        self.base_layer, self.scale = base_layer, alpha / rank
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        y = self.base_layer(x)
        return y + (self.scale * self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))).to(y.dtype)


def layer_linears(model: Danube3) -> dict[str, Any]:
    """The matrices of all layers, each an nn.Linear, LoRALinear or QuantizedLinear, by name: model.layers.0.mlp.up_proj
    and so on; not embedding and head."""
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def add_lora(model: Danube3, rank: int, seed: int) -> Danube3:
    """Freeze the model and put an adapter beside each matrix of its layers. A is normal, with outputs of the
    magnitude of its inputs; B zero."""
    smallest = min(model.config.hidden_size, model.config.num_key_value_heads * model.config.head_dim)
    if not 1 <= rank <= smallest:
        raise DanubeError(f"--lora {rank}: the rank must be from 1 to {smallest}, the size of the smallest matrix")
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.float()  # and with them the stream, whatever type the matrices have
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, linear in layer_linears(model).items():
        lora = LoRALinear(linear, rank).to(model.device)
        nn.init.normal_(lora.lora_A.weight, std=linear.in_features ** -0.5, generator=generator)
        nn.init.zeros_(lora.lora_B.weight)
        model.set_submodule(name, lora)
    return model


def merge_lora(model: Danube3) -> Danube3:
    """Add every adapter to the matrix it stands beside, in place."""
    for name, lora in layer_linears(model).items():
        if isinstance(lora, LoRALinear):
            weight, change = lora.base_layer.weight, lora.lora_B.weight @ lora.lora_A.weight  # [out, r] [r, in]
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            merged = (weight.to(change.dtype) + lora.scale * change).to(weight.dtype)
            linear.weight = nn.Parameter(merged.detach())
            model.set_submodule(name, linear)
    return model


PEFT_PREFIX = "base_model.model."  # in front of a tensor's name in a file that peft writes


def save_adapter(folder: Path, model: Danube3, tokenizer: Tokenizer, trainer: dict | None = None,
                 dtype: torch.dtype = torch.float32, weights: dict[str, Tensor] | None = None, *, base: Path) -> None:
    """Write the adapters alone, in fp32 and in the layout of the package peft; `base` is the folder they belong to,
    and holds the rest."""
    weights = whole_weights(model) if weights is None else weights
    adapters = {name: weight for name, weight in weights.items() if ".lora_" in name}
    linears = [linear for linear in layer_linears(model).values() if isinstance(linear, LoRALinear)]
    rank, scale = linears[0].lora_A.out_features, linears[0].scale
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.resolve()), "r": rank,
              "lora_alpha": scale * rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
              "target_modules": sorted({name.split(".")[-3] for name in adapters})}
    with atomic_folder(folder) as partial:
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / "base.sha256").write_text(weights_sha256(base) + "\n")  # ours; peft passes it over
        write_tensors(partial, "adapter_model.safetensors",
                      {PEFT_PREFIX + name: weight for name, weight in adapters.items()}, trainer)


def load_adapter(model: Danube3, folder: Path) -> Danube3:
    """Put the adapters of a folder beside the matrices they were made for."""
    config, linears = read_json(folder / "adapter_config.json"), layer_linears(model)
    rank, alpha = config.get("r", 0), config.get("lora_alpha", math.nan)
    names = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "alora_invocation_tokens")
    unsupported = [name for name in names if config.get(name)]
    if config.get("init_lora_weights") not in (True, False, None, "gaussian", "eva", "orthogonal"):
        unsupported.append("init_lora_weights")  # pissa, olora, corda, loftq change the base too
    plain = type(rank) is int and 1 <= rank <= model.config.intermediate_size and type(alpha) in (int, float)
    if config.get("peft_type") != "LORA" or unsupported or not plain or not math.isfinite(alpha):
        reason = ", ".join(unsupported) or "its peft_type, r or lora_alpha"
        raise DanubeError(f"{folder / 'adapter_config.json'} is no plain LoRA, for {reason}: only that can be read")
    weights = {name.removeprefix(PEFT_PREFIX): w for name, w in read_tensors(folder / "adapter_model.safetensors")}
    for name in {name.rpartition(".lora_")[0] for name in weights} & linears.keys():
        model.set_submodule(name, LoRALinear(linears[name], rank, alpha).to(model.device))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if ".lora_" in name}
    if expected != {name: tuple(weight.shape) for name, weight in weights.items()}:
        raise DanubeError(f"{folder / 'adapter_model.safetensors'} does not fit the model it names as its base: copy "
                          "both again")
    model.load_state_dict(weights, strict=False)
    return model


# ======================================================================================================================
# 11. Quantization
#
# A trained weight needs far fewer than 16 bits. int8 gives each row of a matrix one scale and each weight one of 255
# levels; int4 gives every 32 weights a scale and each one of 16 levels. Writing one token means reading every weight
# once, so a quarter of the bytes can be four times the speed. Rounding each weight to its nearest level is simple, and
# at 8 bits enough; at 4 bits GPTQ does better: it rounds column by column, and lets the columns still to come make up
# for the error just made. What both formats can hold, GGUF files can hold too (as Q8_0 and Q4_0), value for value.
# First reading: as_stored, inverse, quantize_int8, quantize_int4, dequantize, gptq. (Its derivation is above
# search_scales.)
# ======================================================================================================================

GROUP = 32  # weights that share a scale in int4 [C], and in GGUF's Q4_0 and Q8_0
# Bits of each part of the model [C]. An int4 model keeps either the head or the embedding, which are equally large, at
# 8 bits. Rounded to nearest: the head, where errors cost more. With GPTQ: the embedding, since GPTQ repairs a head, and
# cannot repair what is looked up and not multiplied. tests/bench_quantize.py measures it.
SCHEMES = {"int8": {"model.embed_tokens": 8, "model.layers": 8, "lm_head": 8},
           "int4": {"model.embed_tokens": 4, "model.layers": 4, "lm_head": 8},
           "int4 GPTQ": {"model.embed_tokens": 8, "model.layers": 4, "lm_head": 4}}


def as_stored(scales: Tensor) -> Tensor:
    """The scales to make codes with: what fp16 holds with less than its full precision, rounded to fp16; others exact.

    Below 2^-14 fp16 has fewer and fewer digits, and what is below 3e-8, half its smallest number, becomes 0. A code
    made for the exact scale would be wrong for the stored one, so such scales are rounded first. Above, rounding
    changes a scale by less than 0.05 %, and llama.cpp makes its codes for the unrounded one: so do we, to get the same
    codes.
    """
    return torch.where(scales.abs() < 2 ** -14, scales.half().float(), scales)


def inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0: a row of zeros."""
    return torch.where(scales == 0, 0.0, 1 / scales)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w is about code * scale, with the scale max|w| / 127 of its row. weight [N, K] -> codes int8 [N, K], scales fp16
    [N]"""
    weight = weight.float()
    scales = as_stored(weight.abs().amax(dim=1) / 127)                    # [N]
    scaled = weight * inverse(scales)[:, None]                            # [N, K], -127 .. 127
    codes = (scaled.abs() + 0.5).floor().clamp(max=127) * scaled.sign()   # halves away from zero, as GGUF does
    return codes.to(torch.int8), scales.half()


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w is about (code - 8) * d, codes 0 .. 15. The scale d of each group of 32 is the weight of largest magnitude,
    with its sign, over -8, so that its code is 0. weight [N, K] -> codes uint8 [N, K], scales fp16 [N, K / 32]"""
    groups = weight.float().unflatten(1, (-1, GROUP))                     # [N, K/32, 32]
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # [N, K/32, 1]
    scales = as_stored(largest / -8)
    codes = (groups * inverse(scales) + 8.5).floor().clamp(0, 15)         # w / d + 8, rounded
    return codes.flatten(1).to(torch.uint8), scales[..., 0].half()


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes to a byte, as in GGUF: byte j of a group holds code j in its lower four bits and code j + 16 in its
    upper four. uint8 [.., K] -> uint8 [.., K / 2]"""
    low, high = codes.unflatten(-1, (-1, 2, GROUP // 2)).unbind(-2)  # 2 x [.., K/32, 16]
    return (low | (high << 4)).flatten(-2)


def unpack_int4(packed: Tensor) -> Tensor:
    """The reverse. uint8 [.., K / 2] -> uint8 [.., K]"""
    pairs = packed.unflatten(-1, (-1, GROUP // 2))  # [.., K/32, 16]
    return torch.cat((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """int8 [.., K] with scales [..], or int4 from pack_int4 [.., K / 2] with scales [.., K / 32] -> fp32 [.., K]"""
    if codes.dtype == torch.int8:
        return codes.float() * scales.float()[..., None]
    levels = unpack_int4(codes).unflatten(-1, (-1, GROUP)).float() - 8  # [.., K/32, 32]
    return (levels * scales.float()[..., None]).flatten(-2)


class DequantizedMatmul(torch.autograd.Function):
    """x W^T for a frozen, quantized W, such as adapters are trained beside. W is dequantized a second time for the
    gradient of x rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:  # x [.., K] -> [.., N]
        ctx.save_for_backward(codes, scales)
        return F.linear(x, dequantize(codes, scales).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return grad @ dequantize(codes, scales).to(grad.dtype), None, None


class QuantizedLinear(nn.Module):
    """y = W x with W as codes and scales, in either format: what a quantized checkpoint holds in place of a matrix.

    Right on every device as it is. `pack()` makes it fast on a CPU, for inference.
    """

    codes: Tensor   # int8 [out, in], or two int4 to a byte, uint8 [out, in / 2]
    scales: Tensor  # fp16 [out], or [out, in / 32]

    def __init__(self, out_features: int, in_features: int, bits: int) -> None:
        super().__init__()
        self.out_features, self.in_features, self.bits = out_features, in_features, bits
        code_type = torch.int8 if bits == 8 else torch.uint8
        scales_shape = (out_features,) if bits == 8 else (out_features, in_features // GROUP)
        self.register_buffer("codes", torch.empty(out_features, in_features * bits // 8, dtype=code_type))
        self.register_buffer("scales", torch.empty(scales_shape, dtype=torch.float16))
        self.packed: tuple[Tensor, ...] | None = None

    @property
    def weight(self) -> Tensor:  # [out, in], fp32
        return dequantize(self.codes, self.scales)

    def pack(self) -> None:
        """Rearrange codes and scales for PyTorch's CPU kernels, whose order differs from machine to machine and so is
        never stored. The kernels are private: where they are missing or do not fit, all stays as it is."""
        if self.codes.device.type != "cpu" or self.out_features % 16:
            return
        if self.bits == 8 and hasattr(torch, "_weight_int8pack_mm"):
            self.packed = self.codes, self.scales.bfloat16()
        elif self.bits == 4 and hasattr(torch, "_weight_int4pack_mm_for_cpu"):
            for rows in self.codes.split(256):  # in place and in parts: as int32 they take eight times the memory
                rows.copy_(torch._convert_weight_to_int4pack_for_cpu(unpack_int4(rows).int(), 1))
            scales = self.scales.T.bfloat16()  # [K/32, N]; beside each a value to add, of which there is none
            self.packed = self.codes, torch.stack((scales, torch.zeros_like(scales)), dim=-1)
            del self.codes, self.scales

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        many = x.numel() > 16 * self.in_features  # vectors: the int8 kernel is made for few, and slow for more
        if self.packed is None or self.bits == 8 and many:
            return DequantizedMatmul.apply(x, self.codes, self.scales)
        rows = x.reshape(-1, self.in_features).bfloat16()
        if self.bits == 8:
            y = torch._weight_int8pack_mm(rows, *self.packed)
        else:
            y = torch._weight_int4pack_mm_for_cpu(rows, self.packed[0], GROUP, self.packed[1])
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class QuantizedEmbedding(QuantizedLinear):
    """The rows of a quantized matrix, by index."""

    def pack(self) -> None:
        pass  # its rows are looked up, not multiplied

    def forward(self, input_ids: Tensor) -> Tensor:  # [B, T] -> [B, T, in]
        return dequantize(self.codes[input_ids], self.scales[input_ids])


def bits_of(name: str, scheme: dict[str, int]) -> int | None:
    """How many bits a scheme gives the matrix `name`; None for what it does not name, such as the norms."""
    matches = (bits for part, bits in scheme.items() if name.startswith(part))
    return None if "norm" in name else next(matches, None)


def use_scheme(model: Danube3, scheme: dict[str, int]) -> Danube3:
    """Put a QuantizedLinear, without its codes yet, in place of each matrix."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)) and (bits := bits_of(name, scheme)):
            kind = QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
            out_features, in_features = module.weight.shape
            model.set_submodule(name, kind(out_features, in_features, bits))
    return model


def read_scheme(folder: Path) -> dict[str, int] | None:
    """The scheme of a quantized folder, from its config.json; None of one that is not quantized."""
    if (config := read_json(folder / "config.json").get("quantization_config")) is None:
        return None
    scheme = config.get("bits") if isinstance(config, dict) and config.get("quant_method") == "danube3" else None
    if not isinstance(scheme, dict) or scheme not in SCHEMES.values():
        raise DanubeError(f"{folder} is quantized in a way that is not ours: only folders of quantize.py can be read")
    return scheme


# GPTQ (arXiv 2210.17323). For y = W x, an error E of W costs the mean of |E x|^2 = trace(E C E^T), with C the mean of
# x x^T over the calibration data. (C is half the second derivative of the cost, and so called the hessian; any multiple
# of it will do.) Each row e of E is a problem of its own:
#
#     1  Rounding weight i fixes e_i. The weights after it are still free: choose each e_j so that e C e^T is smallest.
#        (They are where the weights before i have moved them; e counts from there.)
#     2  There the derivatives by all free e_j, which are the entries of e C but the first, are 0: e is a multiple of
#        P_1, the first row of P, the inverse of what is left of C (rows and columns i, i + 1, ..). So
#        e = e_i P_1 / P_11, and the cost is e_i^2 / P_11.
#     3  One factorization has all these inverses in it: with C^-1 = U^T U, U upper triangular, the same product of the
#        rows and columns from i on is P, so P_1 = U_ii U_i and P_11 = U_ii^2. The weights j > i move by
#        -(w_i - rounded w_i) U_ij / U_ii, and 1 / U_ii^2 is how much the error of column i counts: its importance.

def search_scales(groups: Tensor, importance: Tensor) -> Tensor:
    """The scale of each group that makes its error, weighted by importance, smallest. groups [N, 32], importance [32]
    -> [N]. Tried are 0.6 to 1.2 times quantize_int4's own and -0.7 to -1.3 times it (which puts the largest weight on
    the side of the seven levels) [C], each of them fitted to the codes that it makes."""
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))  # [N, 1]
    best, lowest = largest[:, 0] / -8, torch.full_like(largest[:, 0], math.inf)
    for factor in torch.cat((torch.linspace(0.6, 1.2, 25), torch.linspace(-1.3, -0.7, 25))).tolist():
        scales = as_stored(largest / -8 * factor)
        levels = (groups * inverse(scales) + 0.5).floor().clamp(-8, 7)     # [N, 32], code - 8
        # the s for which the sum of a (w - s level)^2 is smallest is sum(a w level) / sum(a level^2), a = importance
        fitted = (importance * groups * levels).sum(1) * inverse((importance * levels * levels).sum(1))
        fitted = fitted.half().float()
        error = (importance * (groups - fitted[:, None] * levels) ** 2).sum(1)
        best, lowest = torch.where(error < lowest, fitted, best), torch.minimum(error, lowest)
    return best


def gptq(weight: Tensor, hessian: Tensor, damping: float = 0.05) -> tuple[Tensor, Tensor]:
    """weight [N, K], hessian [K, K] (any multiple of it) -> codes uint8 [N, K], scales fp16 [N, K / 32]

    `damping` [C], a share of the mean of the diagonal, is added to it, so that inputs that hardly occurred do not move
    the others far.
    """
    weight, K = weight.float().clone(), weight.shape[1]
    hessian = hessian.float() + torch.eye(K, device=hessian.device) * (damping * hessian.diagonal().mean() + 1e-12)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)  # [K, K]
    codes, scales = torch.empty_like(weight, dtype=torch.uint8), weight.new_empty(len(weight), K // GROUP)
    for start in range(0, K, GROUP):
        end = start + GROUP
        block = weight[:, start:end]  # a view: what changes it changes weight
        moves = torch.empty(len(weight), GROUP, device=weight.device)             # (w_i - rounded w_i) / U_ii
        scale = search_scales(block, upper.diagonal()[start:end] ** -2)
        for i in range(GROUP):
            row = upper[start + i, start:end]                                     # [32]
            code = (block[:, i] * inverse(scale) + 8.5).floor().clamp(0, 15)      # [N]
            moves[:, i] = (block[:, i] - scale * (code - 8)) / row[i]
            block[:, i + 1:] -= moves[:, i, None] * row[i + 1:]
            codes[:, start + i] = code.to(torch.uint8)
        weight[:, end:] -= moves @ upper[start:end, end:]                         # the columns after the group
        scales[:, start // GROUP] = scale
    return codes, scales.half()


def quantize_tensor(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """One matrix, rounded to nearest. -> codes and scales, as QuantizedLinear has them"""
    codes, scales = quantize_int8(weight) if bits == 8 else quantize_int4(weight)
    return (codes, scales) if bits == 8 else (pack_int4(codes), scales)


# ======================================================================================================================
# 12. Opening a folder
#
# A checkpoint of a run, a published folder, a quantized one, adapters beside a base: one function opens them all, and
# so everything above works on each of them.
# First reading: none.
# ======================================================================================================================

def load_checkpoint(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                    pack: bool = False) -> tuple[Danube3, Tokenizer]:
    """Model, in eval mode and in `dtype` (default: as stored), and tokenizer of a checkpoint, run or published folder,
    of a quantized one (`pack` makes it fast on CPUs, and unfit for training), or of adapters, which name their base."""
    folder = find_checkpoint(path)
    verify_digests(folder, but="trainer.pt")  # two to six times as large as the weights, and not needed here
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not isinstance(base, str) or not Path(base).is_dir():
            raise DanubeError(f"{folder} holds adapters to {base}, which is no folder here: put that folder back")
        if (find_checkpoint(base) / "adapter_config.json").is_file():
            raise DanubeError(f"{folder} holds adapters to {base}, which holds adapters itself: merge those first")
        made_for = folder / "base.sha256"
        if made_for.is_file() and made_for.read_text(errors="replace").strip() != weights_sha256(find_checkpoint(base)):
            raise DanubeError(f"{folder} holds adapters to what was once in {base}; other weights are there now: put "
                              "the old ones back")
        model, tokenizer = load_checkpoint(base, device, dtype, pack)
        return load_adapter(model, folder).eval(), tokenizer
    config, scheme = read_config(folder), read_scheme(folder)
    with torch.device("meta"):  # shapes without memory: filled tensor by tensor, it holds the weights only once
        model = use_scheme(Danube3(config), scheme or {})
    if scheme:
        dtype = dtype or compute_dtype(torch.device(device))  # not its norms' own, which is fp32
    for name, weight in checked_weights(folder, model):
        owner, _, own_name = name.rpartition(".")
        if own_name == "weight":  # of matrices and norms; codes and scales stay as they are stored
            dtype = dtype or weight.dtype
        # A copy, aligned in memory of its own: where a matrix lies can change the last bits of its products.
        weight = weight.to(device, dtype if own_name == "weight" else None, copy=True)
        model.get_submodule(owner).load_state_dict({own_name: weight}, strict=False, assign=True)
    for module in model.modules() if pack else ():
        if isinstance(module, QuantizedLinear):
            module.pack()
    return model.eval(), read_tokenizer(folder, config)


# ======================================================================================================================
# 13. Running as a program
#
# What all programs share: flags, devices, several processes, and errors in one line.
# First reading: none.
# ======================================================================================================================

class Arguments(argparse.ArgumentParser):
    """argparse with defaults in --help and errors in one line."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=self.Formatter)

    def error(self, message: str) -> NoReturn:
        raise DanubeError(f"{message} (see {self.prog} --help)")


def token_count(text: str) -> int:
    """'200k', '1.5M', '10B', '4T' -> tokens."""
    units = {"": 1, "k": 10 ** 3, "m": 10 ** 6, "b": 10 ** 9, "t": 10 ** 12}
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,12})?)([kmbt]?)", text.lower(), re.ASCII)
    count = Fraction(match[1]) * units[match[2]] if match else Fraction(0)
    if count.denominator != 1 or not 0 < count < 2 ** 60:
        raise argparse.ArgumentTypeError(f"{text!r} is no token count: write 200k, 1.5M, 10B or 4T")
    return int(count)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"0*[1-9]\d{0,17}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def pick_device(name: str = "auto") -> torch.device:
    """'auto' is the first of cuda, mps and cpu that is there; processes of torchrun take a GPU each."""
    # On Hopper GPUs torch prefers cuDNN's attention, which takes 20 to 900 ms to plan for every new length of text.
    # train.py switches it on where all lengths are the same: there it is the fastest.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if "LOCAL_RANK" in os.environ and ":" in name:
        raise DanubeError("under torchrun each process takes a GPU of its own: leave --device out")
    if name == "auto":
        mps = torch.backends.mps.is_available() and "LOCAL_RANK" not in os.environ  # which gloo does not know
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        (zero := torch.zeros(1, device=name)).item()
        return zero.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise DanubeError(f"device {name!r} is not available here, where {torch.cuda.device_count()} GPUs are: use "
                          "--device auto, and as many processes as GPUs") from error


def join_processes(device: torch.device) -> None:
    """Meet the other processes that torchrun has started, if it has."""
    if "LOCAL_RANK" not in os.environ:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    kind, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    # Others wait while the first process writes a checkpoint, and for a large model that can take long.
    dist.init_process_group(kind, timeout=timedelta(hours=2), device_id=own)


def leave_processes() -> int:
    """Part from the others. -> the number that this process had"""
    rank, _ = processes()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return rank


def compile_model(model: Danube3) -> None:
    """Have torch.compile fuse the small operations of each layer: one is compiled, and serves for all, since they are
    alike. That takes a C++ compiler."""
    if any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        for layer in model.model.layers:
            layer.compile()
    else:
        say("no C++ compiler found: going on without --compile")


def run_command(main: Callable[[], int | None]) -> None:
    """Run a program; what the user can mend ends in one line and exit code 2."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bytes that are no text, characters that the terminal lacks
    try:
        sys.exit(main())
    except DanubeError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:  # PyTorch has an OutOfMemoryError for GPUs only
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not re.search(
                "you tried to allocate|out of memory", str(error)):
            raise
        reason, *_ = str(error).split("\n")
        print(f"error: out of memory ({reason}): train with a smaller "
              "--micro-batch-size or --recompute on, or give a shorter text", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)
