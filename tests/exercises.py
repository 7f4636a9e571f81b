"""Exercises for readers of danube3.py.

    python tests/exercises.py                               lists them
    python tests/exercises.py --read sliding-window         the text of one
    python tests/exercises.py sliding-window                is your danube3.py right? (exit code 0: yes, 1: not yet)
    python tests/exercises.py break-norm test_a test_b      the same, with the tests that you expect to fail

"Build it": add to danube3.py, or to the file that the text names, what the text asks for. "Break it" (the names that
begin with break-): first write down which of TESTS will fail after the change, and why. Then make the change and check
the prediction. Begin each exercise from the plain files, on a branch of its own. The checks compute each result again
from its definition, slowly and without a look at your code. (Those of break- look for the changed line.) Each docstring
here is an exercise, and the code after it is its check.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import math
import os
import sys
import tempfile
import traceback
import types
import unittest.mock
from pathlib import Path

import jinja2
import numpy as np
import pytest
import reference
import safetensors.torch
import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "test_rms_norm": "building_blocks",
    "test_rotary_embedding": "building_blocks",
    "test_rotary_depends_on_distance_only": "building_blocks",
    "test_grouped_query_attention": "building_blocks",
    "test_cross_entropy": "building_blocks",
    "test_whole_model_and_its_gradient": "building_blocks",
    "test_generation_against_the_twin": "building_blocks",
    "test_cache_equals_no_cache": "model",
    "test_a_later_token_changes_nothing_before_it": "model",
    "test_gradient_accumulation_changes_nothing": "training",
    "test_a_step_without_targets_does_nothing_wrong": "training",
    "test_sequences_of_a_batch_do_not_meet": "twins",
}
EXERCISES = {}  # name: (function, section, minutes)


class NotYet(Exception):
    """What is not yet right, in one sentence."""


def exercise(section, minutes):
    def register(function):
        EXERCISES[function.__name__.replace("_", "-")] = function, section, minutes
        return function

    return register


def need(condition, sentence):
    if not condition:
        raise NotYet(sentence)


def need_close(got, expected, sentence, tolerance=1e-5):
    got, expected = (np.asarray(x.detach().double() if isinstance(x, torch.Tensor) else x, dtype=np.float64)
                     for x in (got, expected))
    need(got.shape == expected.shape, f"{sentence}: its shape is {got.shape} and should be {expected.shape}")
    need(np.isfinite(got).all(), f"{sentence}: some of it is not finite")
    worst = np.abs(got - expected).max(initial=0)
    need(worst <= tolerance * max(1, np.abs(expected).max(initial=0)), f"{sentence}: it is off by up to {worst:.3g}")


def find(owner, name):
    need(hasattr(owner, name), f"there is no {getattr(owner, '__name__', 'danube3')}.{name} yet")
    return getattr(owner, name)


def small_config(danube3, **changes):
    """Sizes of which no two are alike, and H x h is not D."""
    sizes = dict(hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=6, head_dim=10,
                 num_key_value_heads=2, initializer_range=0.3, vocab_size=37, max_position_embeddings=64)
    return danube3.DanubeConfig(**{**sizes, **changes})


def random_model(danube3, **changes):
    model = danube3.Danube3.new(small_config(danube3, **changes), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.double().eval()


def beside(danube3, name):
    """Another file of danube3's folder, "data.read", "sample" .., as a module that imports this danube3."""
    folder, data = Path(danube3.__file__).parent, types.ModuleType("data")
    data.__path__ = [str(folder / "data"), str(ROOT / "data")]
    with unittest.mock.patch.dict(sys.modules, danube3=danube3, data=data):
        for each in ("data.read", "sample", "quantize", "train"):  # each may import those before it
            spec = importlib.util.spec_from_file_location(each, folder / f"{each.replace('.', '/')}.py")
            module = sys.modules[each] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            data.read = sys.modules["data.read"]  # for `from data import read`
            if each == name:
                return module


def small_tokenizer(danube3, folder):
    with unittest.mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        from data import toy
    texts = ["Ada lives in Marrow.", "Where does Brook keep 12 geese?", "She has none, and he has 7 of them."] * 4
    toy.train_tokenizer(texts, 290, Path(folder) / "tokenizer.model")
    return danube3.Tokenizer(Path(folder) / "tokenizer.model")


def refuses(danube3, call, *arguments):
    try:
        call(*arguments)
    except danube3.DanubeError:
        return True
    return False


# ------------------------------------------------------------------------------------------------------ 1 Configuration

@exercise("1 Configuration", 10)
def cache_bytes(danube3):
    """How large is a KV cache?

    Write kv_cache_bytes(config, batch_size, length, bytes_per_number=2) -> int: the bytes of the keys and values of
    `batch_size` sequences of `length` tokens, over all layers.
    Hint: KVCache says its shape. Which of H and K counts?
    Observe: a 4b with a full context of 8,192 tokens in bf16, and the same with as many key/value heads as query heads.
    """
    kv_cache_bytes = find(danube3, "kv_cache_bytes")
    for layers, H, K, h, B, S, size in ((3, 6, 2, 10, 5, 17, 2), (1, 4, 4, 6, 1, 9, 4), (7, 3, 1, 2, 2, 1, 1)):
        config = small_config(danube3, num_hidden_layers=layers, num_attention_heads=H, num_key_value_heads=K,
                              head_dim=h)
        expected, got = layers * 2 * B * K * S * h * size, kv_cache_bytes(config, B, S, size)
        need(got == expected,
             f"{layers} layers, H={H}, K={K}, h={h}: {B} x {S} tokens take {expected} bytes, not {got}")
    need(kv_cache_bytes(config, 2, 1) == 2 * kv_cache_bytes(config, 2, 1, 1), "bytes_per_number should default to 2")


# ---------------------------------------------------------------------------------------------------------- 2 Tokenizer

@exercise("2 Tokenizer", 45)
def third_role(danube3):
    """A third role: the results of a tool.

    Messages may have the role "tool", with the marker <|tool|>. A tool's message comes after the user or after another
    tool, and in the end the assistant answers. The model reads a tool's text, but it is no target. Change CHAT_MARKERS,
    CHAT_TEMPLATE and check_turns (in data/read.py). Perhaps render_chat is right already. Otherwise the order of roles
    stays as strict as it is.
    Hint: in check_turns, the roles that may come now depend on the message before, not on the number of the message.
    Observe: what would a model do with the marker if it had never met it in training?
    """
    check_turns = beside(danube3, "data.read").check_turns
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = small_tokenizer(danube3, folder)
    roles = ("user", "tool", "tool", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"Brook has {7 * i} geese."} for i, role in enumerate(roles)]
    markers = {"user": "<|prompt|>", "assistant": "<|answer|>", "tool": "<|tool|>"}
    try:
        ids, labels = danube3.render_chat(messages, tokenizer)
        need(check_turns(messages, False) == messages, "check_turns should return the messages as they are")
    except danube3.DanubeError as error:
        raise NotYet(f"user, tool, tool, assistant, user, assistant is refused: {error}") from error
    parts = [tokenizer.encode(markers[m["role"]] + m["content"]) + [2] for m in messages]
    need(ids == sum(parts, []), "the ids are not those of marker and text, </s> after each")
    for m, part, end in zip(messages, parts, itertools.accumulate(map(len, parts))):
        start = len(os.path.commonprefix([tokenizer.encode(markers[m["role"]]), part]))
        expected = [-100] * start + part[start:] if m["role"] == "assistant" else [-100] * len(part)
        need(labels[end - len(part):end] == expected,
             f"the labels of the {m['role']}: only an assistant's text and its </s> are targets")
    for bad in (("tool", "assistant"), ("user", "assistant", "tool", "assistant"), ("user", "tool", "user"),
                ("user", "assistant", "assistant"), ("assistant",), ("user", "user", "assistant")):
        wrong = [{"role": role, "content": "x"} for role in bad]
        need(refuses(danube3, check_turns, wrong, False), f"{', '.join(bad)} should be refused")
    text = jinja2.Template(danube3.CHAT_TEMPLATE).render(messages=messages, eos_token="</s>")
    need(text == "".join(markers[m["role"]] + m["content"] + "</s>" for m in messages),
         "CHAT_TEMPLATE does not write the conversation as render_chat does")


# ---------------------------------------------------------------------------------------------------- 3 Building blocks

@exercise("3 Building blocks", 15)
def break_norm(danube3, *predicted):
    """Break it: a norm without eps.

    In rms_norm leave eps out: scale = torch.rsqrt(x32.square().mean(-1, keepdim=True))
    Which tests fail? For which size of x does eps matter, and what do the tests of whole models compare with?
    """
    compare(danube3, predicted, "scale = torch.rsqrt(x32.square().mean(-1, keepdim=True))")


@exercise("3 Building blocks", 15)
def break_rotary(danube3, *predicted):
    """Break it: rotate neighbours instead of halves.

    In rotary_embedding take the pairs 2i, 2i + 1: first, second = x[..., ::2], x[..., 1::2]
    Which tests fail, and which properties of a rotary embedding survive?
    """
    compare(danube3, predicted, "first, second = x[..., ::2], x[..., 1::2]")


@exercise("3 Building blocks", 15)
def break_heads(danube3, *predicted):
    """Break it: the wrong query heads share a key/value head.

    In grouped_query_attention write, as its first line:
    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))
    Now query head i reads key/value head i % K instead of i // (H / K).
    Which tests fail? Could a model that is trained like this from the beginning be any worse?
    """
    compare(danube3, predicted, "k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))")


@exercise("3 Building blocks", 15)
def break_mask(danube3, *predicted):
    """Break it: the triangle at the wrong end.

    In grouped_query_attention, for several tokens after a cache, make the mask with .tril() instead of
    .tril(diagonal=S - T).
    Which tests fail? Does greedy generation from a prompt change?
    """
    compare(danube3, predicted, "mask = q.new_ones(T, S, dtype=torch.bool).tril()")


@exercise("3 Building blocks", 15)
def interleaved_rotary(danube3):
    """The other rotary embedding.

    Write rotary_embedding_interleaved(x, cos, sin): as rotary_embedding, but pair i is made of the features 2i and
    2i + 1, in the input and in the output.
    Hint: stack, then flatten.
    Observe: with which order of the rows of q_proj and k_proj do both give the same attention (interleave_heads)?
    """
    rotate = find(danube3, "rotary_embedding_interleaved")
    x = torch.randn(2, 3, 7, 10)
    cos, sin = danube3.rotary_table(torch.arange(5, 12), 10, 1e4)
    pairs = x.double().numpy()[..., ::2] + 1j * x.double().numpy()[..., 1::2]  # to rotate is to multiply by e^ia
    rotated = pairs * (cos.double().numpy() + 1j * sin.double().numpy())
    expected = np.stack([rotated.real, rotated.imag], axis=-1).reshape(x.shape)
    need_close(rotate(x, cos, sin), expected, "features 2i and 2i + 1 are not rotated by angle i")
    need(rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16, "the result should have the type of x")


def windowed_attention(q, k, v, window):
    """One query at a time. q [B, H, T, h], k and v [B, K, S, h] -> [B, H, T, h]"""
    (B, H, T, h), (K, S) = q.shape, k.shape[1:3]
    out = torch.zeros_like(q)
    for b, i, t in itertools.product(range(B), range(H), range(T)):
        end = S - T + t + 1
        start = max(0, end - window) if window else 0
        keys, values = k[b, i // (H // K), start:end], v[b, i // (H // K), start:end]
        out[b, i, t] = (keys @ q[b, i, t] / math.sqrt(h)).softmax(0) @ values
    return out


@exercise("3 Building blocks", 60)
def sliding_window(danube3):
    """Attention with a sliding window, as in Mistral 7B.

    Give grouped_query_attention a last argument, window: int = 0. With a window w, the query at position p attends to
    the keys p - w + 1 .. p. With 0 there is no window. Everything else stays as it is, also after a cache.
    Hint: triu and tril take a diagonal. Is it still true that a single query needs no mask?
    Observe: from how many tokens back can information reach the last of 24 layers?
    """
    attention = danube3.grouped_query_attention
    for T, S, window in ((7, 7, 3), (4, 4, 1), (5, 9, 4), (2, 9, 1), (1, 9, 4), (1, 2, 5), (6, 6, 0), (5, 9, 0)):
        q, k, v = (torch.randn(2, heads, length, 10).double() for heads, length in ((6, T), (2, S), (2, S)))
        try:
            y = attention(q, k, v, window=window)
        except TypeError as error:
            raise NotYet("grouped_query_attention does not take the argument window yet") from error
        need_close(y, windowed_attention(q, k, v, window), f"{T} queries, {S} keys, a window of {window}")
    need_close(attention(q, k, v), windowed_attention(q, k, v, 0), "without a window, attention should stay as it was")


@exercise("3 Building blocks", 20)
def z_loss(danube3):
    """Keep the logits from drifting.

    Give cross_entropy a third argument, z: float = 0.0. It adds z times the square of log sum exp(logits), for every
    target (PaLM was trained with 1e-4).
    Hint: torch.logsumexp. Labels of IGNORE_INDEX add nothing.
    Observe: softmax does not change when a constant is added to all logits. Does this loss?
    """
    for ignored in (0, 3, 9):
        logits, labels = torch.randn(9, 31).double() * 3, torch.randint(0, 31, (9,))
        labels[:ignored] = danube3.IGNORE_INDEX
        log_sums = np.log(np.exp(logits[ignored:].numpy()).sum(-1))
        plain = (log_sums - logits[ignored:].numpy()[np.arange(9 - ignored), labels[ignored:].numpy()]).sum()
        need_close(danube3.cross_entropy(logits, labels), plain, "without z the loss should stay as it was")
        try:
            loss = danube3.cross_entropy(logits, labels, 0.3)
        except TypeError as error:
            raise NotYet("cross_entropy does not take a third argument, z, yet") from error
        need_close(loss, plain + 0.3 * (log_sums ** 2).sum(), f"the loss of 9 labels, {ignored} of them IGNORE_INDEX")


# -------------------------------------------------------------------------------------------------------------- 4 Model

@exercise("4 Model", 15)
def break_shift(danube3, *predicted):
    """Break it: predict the token that is there already.

    In Danube3.forward leave the shift out: targets = labels
    Which tests fail? What would the loss of a training run look like?
    """
    compare(danube3, predicted, "targets = labels")


@exercise("4 Model", 20)
def tied_embeddings(danube3):
    """One matrix for both ends.

    Write tie_embeddings(model) -> model: embedding and head become one weight matrix, the embedding's, which learns
    from both uses.
    Hint: two modules may hold the same nn.Parameter. Two parameters that share memory are something else.
    Observe: which share of their parameters do 500m and toy save? Can such a model be saved, and what would its
    config.json have to say (read_weights)?
    """
    tie = find(danube3, "tie_embeddings")
    model, separate = random_model(danube3), random_model(danube3)
    separate.lm_head.weight.data.copy_(separate.model.embed_tokens.weight.data)
    count = sum(p.numel() for p in model.parameters())
    model = tie(model)
    need(model is not None, "tie_embeddings should return the model")
    saved, ids = count - sum(p.numel() for p in model.parameters()), torch.randint(0, 37, (2, 9))
    need(saved == 37 * 20, f"the model should have V x D = 740 parameters fewer, and has {saved} fewer")
    for each in (model, separate):
        each(ids, ids).backward()
    ends = separate.model.embed_tokens.weight.grad, separate.lm_head.weight.grad
    need_close(model(ids), separate(ids), "the shared matrix is not the embedding")
    need_close(model.model.embed_tokens.weight.grad, sum(ends), "its gradient is not the sum of both uses'")


def tensors_in(value):
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors_in(each)]
    return [value] if isinstance(value, torch.Tensor) else []


@exercise("4 Model", 90)
def rolling_cache(danube3):
    """A cache that never grows.

    Write a class RollingCache(config, batch_size, window, dtype, device) that a model can use like KVCache, one token
    at a time. `length` counts all tokens seen (next_logits moves it). `layer` returns a LayerCache with the keys and
    values of the last `window` tokens, or a place for the new one among them (of all tokens, while they are fewer), and
    the cache holds no more than those. More than one token at a time is refused with a DanubeError.
    Hint: token n can overwrite token n - window. Does attention depend on the order of its keys?
    Observe: write a loop that generates with it, past max_position_embeddings. What is lost, and what is not?
    """
    RollingCache, window, torch_cpu = find(danube3, "RollingCache"), 4, torch.device("cpu")
    model, ids = random_model(danube3), torch.randint(0, 37, (2, 13))

    def windowed(q, k, v, mask):
        return windowed_attention(q, k, v, window)

    with torch.no_grad(), unittest.mock.patch.object(danube3, "grouped_query_attention", windowed):
        expected = model.model(ids)
    cache = RollingCache(model.config, 2, window, torch.float64, torch_cpu)
    for t in range(13):
        with torch.no_grad():
            cache.next_positions(1)
            hidden = model.model(ids[:, t:t + 1], cache)[:, 0]
            cache.length += 1
        need_close(hidden, expected[:, t], f"token {t} does not attend to just the last {window} tokens")
    held = sum(x.numel() for x in tensors_in(vars(cache)) if x.is_floating_point())
    need(held <= 3 * 2 * 2 * 2 * window * 10, f"the cache holds {held} numbers, more than those of {window} tokens")
    need(refuses(danube3, cache.next_positions, 3), "three tokens should be refused")


# ----------------------------------------------------------------------------------------------------------- 5 Sampling

@exercise("5 Sampling", 30)
def min_p(danube3):
    """Keep what is not much less likely than the likeliest.

    Give next_token_probabilities a last argument, min_p: float = 0.0. Of the tokens that temperature, top_k and top_p
    have left, keep those with at least min_p times the probability of the likeliest, and renormalize.
    Hint: look where the function returns.
    Observe: at a temperature of 2, compare how many tokens top_p = 0.9 and min_p = 0.1 keep, where the model is sure
    and where it is not.
    """
    logits = torch.randn(4, 53) * 2
    for temperature, top_k, top_p, smallest in ((1.0, 0, 1.0, 0.1), (2.0, 0, 1.0, 0.3), (0.7, 9, 1.0, 0.05),
                                                (1.3, 0, 0.8, 0.2), (1.0, 7, 0.9, 0.0), (1.0, 0, 1.0, 0.0)):
        try:
            got = danube3.next_token_probabilities(logits, temperature, top_k, top_p, min_p=smallest)
        except TypeError as error:
            raise NotYet("next_token_probabilities does not take min_p yet") from error
        expected = np.stack([reference.next_token_probabilities(each, temperature, top_k, top_p)
                             for each in logits.double().numpy()])
        expected[expected < smallest * expected.max(-1, keepdims=True)] = 0
        need_close(got, expected / expected.sum(-1, keepdims=True),
                   f"temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {smallest}")


@exercise("5 Sampling", 20)
def repetition_penalty(danube3):
    """Say it only once.

    Write repetition_penalty(logits, seen_ids, penalty) -> new logits [B, V], for logits [B, V] and seen_ids [B, S]. The
    logit of every id that a sequence has seen is divided by `penalty` if it is positive, and multiplied by it if it is
    negative. How often an id was seen does not matter. (CTRL, arXiv 1909.05858, only divides: why is that not enough?)
    Hint: gather and scatter.
    Observe: call it in generate_tokens. What happens to the </s> of a conversation's earlier messages?
    """
    penalize = find(danube3, "repetition_penalty")
    logits, seen = torch.randn(3, 23).double(), torch.randint(0, 23, (3, 11))
    seen[0, :4] = 5  # several times
    before, expected = logits.clone(), logits.numpy().copy()
    for each, ids in zip(expected, seen.tolist()):
        for i in set(ids):
            each[i] = each[i] / 1.7 if each[i] > 0 else each[i] * 1.7
    need_close(penalize(logits, seen, 1.7), expected, "the logits of 3 sequences with a penalty of 1.7")
    need(torch.equal(logits, before), "the given logits should stay as they are: return new ones")


@exercise("5 Sampling", 180)
def beam_search(danube3):
    """Look for the likeliest text instead of the likeliest token.

    Write beam_search(model, input_ids, beams, max_new_tokens) -> ids [1, T + n] for one prompt [1, T]. Begin with the
    prompt. At each step append every possible next token to each text, and keep the `beams` texts with the largest sums
    of log-probabilities. A text that has ended with </s> stays as it is, and competes with its sum. Return the best.
    Hint: texts of different lengths in a list are enough. Begin without a cache.
    Observe: with one beam this is generate. On a trained toy, compare the sums for 1, 4 and 16 beams, and the texts.
    """
    search = find(danube3, "beam_search")
    for seed in range(6):
        model = random_model(danube3, vocab_size=6, num_hidden_layers=1, initializer_range=0.8)
        model.load_state_dict({name: w + seed / 3 * torch.randn_like(w) for name, w in model.state_dict().items()})
        prompt = torch.randint(0, 6, (1, 5))
        with torch.no_grad():
            for beams in (1, 2, 3, 300):
                texts = [(0.0, prompt[0].tolist())]
                for _ in range(3):
                    longer = [text for text in texts if len(text[1]) > 5 and text[1][-1] == 2]
                    for total, ids in texts:
                        if len(ids) == 5 or ids[-1] != 2:
                            p = reference.softmax(model(torch.tensor([ids]))[0, -1].double().numpy())
                            longer += [(total + math.log(p[i]), [*ids, i]) for i in range(6)]
                    texts = sorted(longer, reverse=True)[:beams]
                got = search(model, prompt, beams, 3).tolist()
                need(got == [texts[0][1]], f"with {beams} beams the best of 3 new tokens after {prompt[0].tolist()} is "
                                           f"{texts[0][1][5:]}, not {got[0][5:]}")


# --------------------------------------------------------------------------------------------------------------- 6 Data

@exercise("6 Data", 15)
def fourth_stage(danube3):
    """A fourth stage.

    Write with_stage(config, name, tokens, mixture) -> TrainConfig: a new last stage of so many tokens. They are taken
    from the stage that was the last, so that the total stays. A stage that has no more tokens than these is refused
    with a DanubeError.
    Hint: the dataclasses are frozen. dataclasses.replace makes a changed copy.
    Observe: put the result into TRAIN_CONFIGS["toy"] and look at python train.py --dry-run. What are the learning rates
    of the new stage?
    """
    with_stage, config = find(danube3, "with_stage"), danube3.TRAIN_CONFIGS["toy"]
    mixture = dict(zip(danube3.SOURCES, (1, 2, 3, 0, 5, 0)))
    got, old = with_stage(config, "cool-down", 70_000, mixture), config.stages
    expected = (*old[:2], dataclasses.replace(old[2], tokens=380_000), danube3.Stage("cool-down", 70_000, mixture))
    need(got.stages == expected, "the stages should be the old ones, the last 70,000 tokens shorter, and the new one")
    need(dataclasses.replace(got, stages=old) == config, "only the stages should change")
    need(danube3.TRAIN_CONFIGS["toy"].stages == old, "the given config should stay as it was")
    for tokens in (450_000, 460_000):
        need(refuses(danube3, with_stage, config, "x", tokens, mixture), f"{tokens:,} of 450,000 should be refused")


@exercise("6 Data", 30)
def tempered_mixture(danube3):
    """A mixture from the sizes of the sources.

    Write tempered(sizes, exponent, total=1000) -> dict of name: integer weight. Shares are in proportion to size to the
    power `exponent` (1: as they are; 0: all equal; between them small sources are read more often). The weights are
    whole numbers whose sum is exactly `total`: round all shares of `total` down, then give the remaining units, one
    each, to the shares with the largest remainders.
    Hint: rounding each to nearest does not always give the sum.
    Observe: with the sizes of data/toy/meta.json, how many epochs of each source at 1, 0.7, 0.3 and 0?
    """
    tempered, draw = find(danube3, "tempered"), np.random.default_rng(0)
    for exponent, total in ((1.0, 1000), (0.7, 1000), (0.3, 97), (0.0, 1000), (0.5, 11)):
        for count in (1, 3, 6, 7):
            sizes = {f"s{i}": int(size) for i, size in enumerate(draw.integers(10, 10 ** 7, count))}
            got = tempered(sizes, exponent, total)
            exact = {name: total * size ** exponent / sum(s ** exponent for s in sizes.values())
                     for name, size in sizes.items()}
            need(list(got) == list(sizes), "the weights should have the names of the sources")
            need(sum(got.values()) == total, f"{count} weights should sum to {total}: {got}")
            up = [exact[n] % 1 for n in got if got[n] == math.floor(exact[n]) + 1]
            down = [exact[n] % 1 for n in got if got[n] == math.floor(exact[n])]
            need(len(up) + len(down) == count, f"the exact shares are {exact}, and rounded up or down never {got}")
            need(min(up, default=1) >= max(down, default=0) - 1e-9,
                 f"the largest remainders should be rounded up: {got}")


# ---------------------------------------------------------------------------------------------------------- 7 Optimizer

@exercise("7 Optimizer", 20)
def warmup_stable_decay(danube3):
    """Another schedule.

    Write warmup_stable_decay(step, total_steps, config, decay_fraction=0.2) -> learning rate. Warm-up is the same as in
    learning_rate, and then the rate stays at the peak. In the last D = round(decay_fraction * total_steps) steps it
    falls along a straight line: the d-th of them (d = 1 .. D) has the peak times 1 - (1 - f) d / D, with
    f = final_lr_fraction.
    Hint: how many steps are left after this one?
    Observe: take it for learning_rate in a toy run. Where does the loss fall? Is the rate of stage 3 higher now?
    """
    schedule = find(danube3, "warmup_stable_decay")
    for final, warmup, fraction in ((0.0, 0.01, 0.2), (0.1, 0.2, 0.5), (0.3, 0.1, 0.0)):
        config = dataclasses.replace(danube3.TRAIN_CONFIGS["toy"], final_lr_fraction=final, warmup_fraction=warmup)
        N, peak = 61, config.learning_rate
        W, D = max(1, round(warmup * N)), round(fraction * N)
        expected = [peak * (s + 1) / W if s < W else peak for s in range(N)]
        for d in range(1, D + 1):
            expected[N - D + d - 1] = peak * (1 - (1 - final) * d / D)
        got = [schedule(step, N, config, fraction) for step in range(N)]
        for s in range(N):
            need(abs(got[s] - expected[s]) < 1e-12,
                 f"with final fraction {final}, warm-up {warmup} and decay {fraction}, step {s} of {N} has "
                 f"{got[s]:.6g} and should have {expected[s]:.6g}")


@exercise("7 Optimizer", 60)
def plain_adamw(danube3):
    """AdamW by hand.

    Write a class PlainAdamW(torch.optim.Optimizer) with __init__(params, lr, betas, eps, weight_decay) and step(), in
    plain tensor operations. It does the same as torch.optim.AdamW. Each parameter counts its own steps. A parameter
    without a gradient is skipped.
    Hint: the formulas are above make_optimizer. self.param_groups and self.state belong to the base class.
    Observe: put it into make_optimizer, in place of AdamW and the moments that are prepared there, and run the tests of
    test_twins.py. How many passes over memory does a step make?
    """
    PlainAdamW = find(danube3, "PlainAdamW")
    start = [torch.randn(4, 3).double(), torch.randn(5).double(), torch.randn(2, 2).double()]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = []
    for kind, parameters in ((PlainAdamW, ours), (torch.optim.AdamW, theirs)):
        groups = [{"params": parameters[:2], "weight_decay": 0.3}, {"params": parameters[2:], "weight_decay": 0.0}]
        optimizers.append(kind(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.1))
    for step in range(7):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            grad = torch.randn_like(p) * 10.0 ** -i
            p.grad, q.grad = (None, None) if i == 1 and step in (0, 3) else (grad, grad.clone())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            optimizer.step()
        for i, (p, q) in enumerate(zip(ours, theirs)):
            need_close(p, q, f"parameter {i} after step {step + 1} is not that of torch.optim.AdamW", 1e-10)


# ----------------------------------------------------------------------------------------------------------- 8 Training

@exercise("8 Training", 20)
def break_mean(danube3, *predicted):
    """Break it: a mean of means.

    In train_step divide each micro-batch by its own targets and by the number of micro-batches:
    micro_loss = model(ids, own_labels) / (own_labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1) / len(batches)
    Which tests fail? In pre-training every token but the first is a target: what changes there?
    """
    compare(danube3, predicted, "micro_loss = model(ids, own_labels) / (own_labels[:, 1:] != IGNORE_INDEX).sum()"
                                ".clamp(min=1) / len(batches)")


# -------------------------------------------------------------------------------------------------------- 9 Checkpoints

@exercise("9 Checkpoints", 20)
def average_checkpoints(danube3):
    """The mean of several checkpoints.

    Write average_weights(folders) -> dict of name: fp32 tensor, the mean of the weights of several checkpoint folders.
    Folders that do not hold the same names are refused with a DanubeError.
    Hint: read_weights. Folders may be stored in fp16, whose largest number is 65,504.
    Observe: copy three checkpoints of a toy run to another place (--save-every 100). Is their mean better than each?
    """
    average = find(danube3, "average_weights")
    stored = [{"a.weight": 3e4 + 1e3 * torch.randn(5, 7), "b.weight": torch.randn(3)} for _ in range(3)]
    stored = [{name: w.half() for name, w in weights.items()} for weights in stored]
    with tempfile.TemporaryDirectory() as parent:
        folders = [Path(parent) / f"step-{i}" for i in range(3)]
        for folder, weights in zip(folders, stored):
            folder.mkdir()
            safetensors.torch.save_file(weights, folder / "model.safetensors")
        mean = average(folders)
        need(set(mean) == {"a.weight", "b.weight"}, "the names should be those of the folders")
        for name, w in mean.items():
            need(w.dtype == torch.float32, f"{name} should be fp32")
            need_close(w, sum(weights[name].double() for weights in stored) / 3, f"the mean of {name}", 1e-6)
        for folder, odd in ((folders[2], {**stored[0], "c.weight": torch.ones(2)}),
                            (folders[1], {"a.weight": stored[0]["a.weight"]})):
            safetensors.torch.save_file(odd, folder / "model.safetensors")
            need(refuses(danube3, average, folders), "folders with different names should be refused")


# ------------------------------------------------------------------------------------------------------- 10 Fine-tuning

@exercise("10 Fine-tuning", 40)
def lora_on_the_head(danube3):
    """An adapter on the head.

    Give add_lora a last argument, head: bool = False. If it is True, lm_head gets an adapter like the other linear
    layers. merge_lora, in train.py, merges it too.
    Hint: decoder_linears is used in more places than these two.
    Observe: how many more parameters are trained, of 500m at rank 16? What would load_adapters need?
    """
    ids, plain, train = torch.randint(0, 37, (2, 9)), random_model(danube3), beside(danube3, "train")
    count, extra, logits = {}, 3 * (20 + 37), plain(ids)
    for head in (False, True):
        model = random_model(danube3)
        model.load_state_dict(plain.state_dict())
        try:
            model = (danube3.add_lora(model, 3, 0, head=head) if head else danube3.add_lora(model, 3, 0)).double()
        except TypeError as error:
            raise NotYet("add_lora does not take `head` yet") from error
        adapted = isinstance(model.lm_head, danube3.LoRALinear)
        need(adapted == head, f"with head={head}, lm_head {'has an' if adapted else 'has no'} adapter")
        count[head] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        need_close(model(ids), logits, "with new adapters the logits should be the same as before", 1e-6)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_()
        changed = model(ids)
        merged = train.merge_lora(model)
        left = [name for name, m in merged.named_modules() if isinstance(m, danube3.LoRALinear)]
        need(not left, f"merge_lora leaves an adapter at {left and left[0]}")
        need_close(merged(ids), changed, "merging changes the logits", 1e-6)
    need(count[True] == count[False] + extra, f"at rank 3 the head should add {extra} trainable parameters")


@exercise("10 Fine-tuning", 30)
def two_adapters(danube3):
    """Two adapters in one.

    Write combine_adapters(first, second, weights=(1.0, 1.0)) -> LoRALinear. The two are adapters on the same
    base_layer, perhaps of different ranks and alphas. The update of the new one is weights[0] times that of the first
    plus weights[1] times that of the second.
    Hint: B1 A1 + B2 A2 is one product of block matrices. What is its rank? Where do the scales go?
    Observe: why is the mean of two lora_A, with the mean of two lora_B, something else?
    """
    combine, base = find(danube3, "combine_adapters"), torch.nn.Linear(13, 9, bias=False)
    adapters = [danube3.LoRALinear(base, rank, alpha) for rank, alpha in ((2, 16), (2, 6), (5, 7))]
    for adapter in adapters:
        for p in (adapter.lora_A.weight, adapter.lora_B.weight):
            p.data.normal_()
    x = torch.randn(3, 4, 13)
    for i, j, weights in ((0, 1, (1.0, 1.0)), (0, 2, (0.3, -1.2)), (2, 1, (0.0, 2.0))):
        pair = [adapters[i], adapters[j]]
        update = sum(w * a.scale * (a.lora_B.weight @ a.lora_A.weight) for w, a in zip(weights, pair))
        both = combine(*pair, weights)
        need(isinstance(both, danube3.LoRALinear), "the result should be a LoRALinear")
        need(both.base_layer is base, "the result should be on the base layer of the two")
        ranks = [len(adapter.lora_A.weight) for adapter in pair]
        need_close(both(x), x @ (base.weight + update).T, f"ranks {ranks}, weights {weights}", 1e-4)


# ------------------------------------------------------------------------------------------------------ 11 Quantization

@exercise("11 Quantization", 60)
def asymmetric_int4(danube3):
    """Four bits from the smallest to the largest weight.

    Write quantize_int4_asymmetric(weight) and dequantize_int4_asymmetric(codes, scales, minima). The first makes of
    weight [out, in] codes uint8 [out, in], scales fp16 [out, in/32] and minima fp16 [out, in/32]. The second makes of
    these minimum + code * scale, fp32 [out, in]. Of each group of 32 the minimum is the smallest weight, and the scale
    is (largest - smallest) / 15, both rounded to fp16. The code, 0 .. 15, is the one whose value is nearest.
    Hint: make the codes for the scales and minima that are stored. A group may hold one value 32 times.
    Observe: bits per weight, and the error of a trained weight matrix, against quantize_int4. When does it pay?
    """
    quantize, restore = find(danube3, "quantize_int4_asymmetric"), find(danube3, "dequantize_int4_asymmetric")
    weight = torch.randn(5, 96) * torch.rand(5, 1) + torch.randn(5, 1)
    weight[1, 32:64], weight[2, :32] = 0.75, 0.0  # groups of one value
    codes, scales, minima = quantize(weight.clone())
    need(codes.dtype == torch.uint8 and codes.shape == (5, 96) and codes.max() < 16, "codes should be 0 .. 15")
    groups = weight.double().numpy().reshape(5, 3, 32)
    for name, got, expected in (("minima", minima, groups.min(-1)),
                                ("scales", scales, (groups.max(-1) - groups.min(-1)) / 15)):
        need(got.dtype == torch.float16, f"{name} should be fp16")
        need_close(got, expected, f"the {name}", 1e-3)
    m, s = (x.double().numpy()[..., None] for x in (minima, scales))
    values = m + codes.double().numpy().reshape(5, 3, 32) * s
    got = restore(codes, scales, minima)
    need_close(got, values.reshape(5, 96), "dequantized weights are not minimum + code * scale")
    nearest = np.abs(groups[..., None] - (m + np.arange(16) * s)[:, :, None]).min(-1)
    need((np.abs(groups - values) <= nearest + 1e-6).all(), "some codes are not those of the nearest value")


# ------------------------------------------------------------------------------------------------------------ sample.py

@exercise("sample.py", 20)
def undo(danube3):
    """Take back the last question.

    Write a method undo() of ChatSession in sample.py. It forgets the last question and its answer, in `exchanges` and
    `messages`, as if they had never been. If there is none, it raises a DanubeError.
    Hint: does the cache need anything? Read how `answer` sets its length.
    Observe: make it a command of chat, /undo. What can it not bring back, when the context was full?
    """
    ChatSession = beside(danube3, "sample").ChatSession
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = small_tokenizer(danube3, folder)
    model = random_model(danube3, vocab_size=290, max_position_embeddings=256)
    find(ChatSession, "undo")

    def said(session, *questions):
        return [list(session.answer(session.ask(question)[0])) for question in questions]

    for temperature in (0.0, 1.0):
        changed, straight = (ChatSession(model, tokenizer, 6, temperature=temperature, seed=3) for _ in "ab")
        need(refuses(danube3, changed.undo), "with nothing to take back, undo should raise a DanubeError")
        said(changed, "Where does Ada live?", "Who has 12 geese, and who has none of them?")
        changed.undo()
        answers = said(changed, "Where?", "And she?"), said(straight, "Where does Ada live?", "Where?", "And she?")
        need(answers[0] == answers[1][1:], "after undo the answers are not those of a dialogue without the question")
        for name in ("exchanges", "messages"):
            need(getattr(changed, name) == getattr(straight, name), f"after undo `{name}` is not what it should be")
        caches = changed.kv_cache, straight.kv_cache
        for a, b in zip(*(cache.keys + cache.values for cache in caches)):
            need_close(a[:, :, :caches[0].length], b[:, :, :caches[1].length], "the cache holds something else")
        for _ in range(3):
            changed.undo()
        need(refuses(danube3, changed.undo), "with everything taken back, undo should raise a DanubeError")
        need(said(changed, "Where does Ada live?") == answers[1][:1], "with everything taken back, answers are others")


@exercise("sample.py", 30)
def calibration(danube3):
    """Does 70 % sure mean right in 70 of 100 cases?

    Write calibration_error(confidence, right, bins=10) -> float, in sample.py: the expected calibration error. The
    lists hold probabilities, and True or False.
    Bin b has the answers with b / bins <= confidence < (b + 1) / bins. The last one has those with confidence 1 too.
    The error is the mean, over all answers, of the distance between the mean confidence and the accuracy in their bin.
    Empty bins count for nothing.
    Hint: a bin with more answers has more weight.
    Observe: on the toy quiz, before and after --chat, with softmax over choice_log_likelihoods as confidence.
    """
    error, draw = find(beside(danube3, "sample"), "calibration_error"), np.random.default_rng(1)
    for bins, count in ((10, 200), (7, 31), (1, 20), (10, 0)):
        confidence = [*(draw.random(count) ** 0.3).tolist(), 0.0, 0.45, 0.5, 0.95, 1.0]
        right = [*(draw.random(count) < 0.6).tolist(), True, False, True, False, True]
        expected = 0.0
        for b in range(bins):
            end = (b + 1) / bins if b < bins - 1 else 1.1
            members = [i for i, c in enumerate(confidence) if b / bins <= c < end]
            if members:
                gap = np.mean([confidence[i] for i in members]) - np.mean([right[i] for i in members])
                expected += abs(gap) * len(members) / len(confidence)
        need_close(error(confidence, right, bins), expected, f"the error of {count + 5} answers in {bins} bins", 1e-9)


@exercise("sample.py", 20)
def paired_difference(danube3):
    """Is one model better than another?

    Write paired_difference(right_a, right_b) -> (difference, standard error), in sample.py, for two lists of True and
    False: whether two models were right, question by question. The difference is that of the two accuracies. Its
    standard error is the standard deviation (with n - 1) of the differences of single answers, over the root of n.
    Hint: what do two models have in common that answer the same questions right?
    Observe: for two toys, compare it with the root of the sum of the two squared standard errors.
    """
    compare_answers, draw = find(beside(danube3, "sample"), "paired_difference"), np.random.default_rng(2)
    for n in (2, 17, 216):
        a = draw.random(n) < 0.7
        b = np.where(draw.random(n) < 0.8, a, ~a)
        differences = [int(x) - int(y) for x, y in zip(a, b)]
        mean = sum(differences) / n
        error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
        difference, stderr = compare_answers(a.tolist(), b.tolist())
        need_close(difference, mean, f"the difference over {n} questions", 1e-9)
        need_close(stderr, error, f"the standard error over {n} questions", 1e-9)


# ---------------------------------------------------------------------------------------------------------- quantize.py

@exercise("quantize.py", 20)
def rows_from_gguf(danube3):
    """The way back from a GGUF file.

    Write rows_from_gguf(name, tensor, config) -> tensor, in quantize.py: the inverse of interleave_heads.
    Hint: is the order 0, h/2, 1, h/2 + 1, .. its own inverse?
    Observe: leave q_proj and k_proj of a trained toy in the order of GGUF, and generate text.
    """
    back = find(beside(danube3, "quantize"), "rows_from_gguf")
    for H, K, h in ((6, 2, 10), (4, 1, 4), (3, 3, 6)):
        config = small_config(danube3, num_attention_heads=H, num_key_value_heads=K, head_dim=h)
        for name, heads in (("q_proj", H), ("k_proj", K), ("v_proj", K)):
            name, rows = f"model.layers.0.self_attn.{name}.weight", torch.randn(heads * h, 20)
            stored = rows.clone()  # as a GGUF file has them, row by row
            for head, i in itertools.product(range(heads), range(h // 2)):
                if "v_proj" not in name:
                    stored[head * h + 2 * i] = rows[head * h + i]
                    stored[head * h + 2 * i + 1] = rows[head * h + h // 2 + i]
            need_close(back(name, stored, config), rows, f"{name} of {heads} heads of {h}", 0)


# ---------------------------------------------------------------------------------------------------------- the program

class Failures:
    """A plugin of pytest that notes which tests fail."""

    def __init__(self):
        self.names, self.count = set(), 0

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "call"
        if report.failed:
            self.names.add(report.nodeid.split("::")[1].split("[")[0])


@functools.cache
def failing(danube3):
    """Which of TESTS fail with this danube3? Run within this process, which saves the seconds of importing torch."""
    for name in [name for name in sys.modules if name == "conftest" or name.startswith("test_")]:
        del sys.modules[name]  # if they are there, they have imported another danube3
    failures, ids = Failures(), [f"{ROOT / 'tests' / f'test_{file}.py'}::{name}" for name, file in TESTS.items()]
    flags = ["-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--rootdir", str(ROOT), "--tb=no"]
    same_draws = unittest.mock.patch("numpy.random.SeedSequence", functools.partial(np.random.SeedSequence, 0))
    with contextlib.redirect_stdout(io.StringIO()), same_draws:
        code = pytest.main([*flags, *ids], plugins=[failures])
    need(code in (0, 1) and failures.count >= len(TESTS), "the tests could not be run: try python -m pytest yourself")
    return failures.names


def compare(danube3, predicted, told):
    """Is the line in place, and are the tests that fail the predicted ones?"""
    source = " ".join(Path(danube3.__file__).read_text(encoding="utf-8").split())
    need(told in source, "the line is not changed as the text says yet")
    need(predicted, "name the tests that you expect to fail after the name of the exercise")
    unknown = [name for name in predicted if name not in TESTS]
    need(not unknown, f"{unknown and unknown[0]} is not in the list of tests to choose from, see --read")
    fails, named = failing(danube3), set(predicted)
    need(named == fails, f"of the {len(fails)} tests that fail you named {len(named & fails)}, and "
                         f"{len(named - fails)} that you named pass")


def load(path):
    """The danube3.py at `path`, as the module danube3."""
    spec = importlib.util.spec_from_file_location("danube3", path)
    module = sys.modules["danube3"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verdict(name, danube3, *predicted):
    """What is not yet right, in a sentence; None if all is."""
    torch.manual_seed(0)
    try:
        EXERCISES[name][0](danube3, *predicted)
    except NotYet as sentence:
        return str(sentence)
    except Exception as error:
        folder = Path(danube3.__file__).parent
        own = [folder / name for name in ("danube3.py", "data/read.py", "sample.py", "quantize.py", "train.py")]
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) in own]
        place = f" in line {frames[-1].lineno} of {Path(frames[-1].filename).relative_to(folder)}" if frames else ""
        return f"your code ended with {type(error).__name__}{place}: {(str(error).splitlines() or [''])[0]}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", help="the exercise; without it, a list")
    parser.add_argument("predicted", nargs="*", help="break it: the tests that you expect to fail")
    parser.add_argument("--read", action="store_true", help="print the text of the exercise, check nothing")
    args = parser.parse_args()
    if args.name is None:
        for number, (name, (function, section, minutes)) in enumerate(EXERCISES.items(), start=1):
            print(f"{number:2}  {name:20}  {section:20} {minutes:4} min  {function.__doc__.splitlines()[0]}")
        return 0
    if args.name not in EXERCISES:
        parser.error(f"there is no exercise {args.name!r}: without a name this program lists them")
    if args.predicted and not args.name.startswith("break-"):
        parser.error(f"{args.name} takes no tests")
    if args.read:
        print("\n".join(line.removeprefix("    ") for line in EXERCISES[args.name][0].__doc__.strip().splitlines()))
        if args.name.startswith("break-"):
            print("The tests to choose from:", *TESTS, sep="\n    ")
        return 0
    try:
        sentence = verdict(args.name, load(ROOT / "danube3.py"), *args.predicted)
    except Exception as error:
        sentence = f"danube3.py cannot be imported: {type(error).__name__}: {error}"
    print(sentence or "right")
    return 1 if sentence else 0


if __name__ == "__main__":
    sys.exit(main())
