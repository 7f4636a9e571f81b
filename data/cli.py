"""What the programs share: their command lines, devices and processes, errors in one line."""

import argparse
import copy
import io
import os
import re
import signal
import sys
import time
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NoReturn

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor, nn

import danube3
from danube3 import DanubeError


class Arguments(argparse.ArgumentParser):
    """argparse that shows defaults in --help and raises DanubeError."""
    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self, description: str | None):
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
    if zero.is_cuda:
        torch.cuda.set_device(zero.device)  # CUDA graphs are recorded on the current device
    return zero.device

def pick_dtype(wish: str, device: torch.device, config: danube3.DanubeConfig, plan: bool = False) -> str:
    """"auto" is bf16 on CPUs that compute in it too, but for the toy, so that its figures are everyone's. A
    plan is made for GPUs."""
    if plan and wish == "auto":
        return "bfloat16"
    known: dict = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch know nothing
    fast = device.type == "cpu" and (known.get("avx512_bf16") or known.get("amx_bf16"))
    wide = config.hidden_size > danube3.CONFIGS["toy"].hidden_size
    return "bfloat16" if wish == "auto" and fast and wide else wish

def shall_compile(wish: bool | None, device: torch.device, config: danube3.DanubeConfig) -> bool:
    if wish is None:  # then large models on GPUs [ours]
        return device.type == "cuda" and danube3.count_parameters(config) > 10**8 and danube3.has_compiler()
    return wish

class GraphedStep:
    """The pass of one token as a **CUDA graph**, which starts all kernels at once. It reads and writes the
    memory with which it was recorded. So each cache needs its own, and so does each number of positions."""
    def __init__(self, model: danube3.Danube3):
        self.model = model
        self.graphs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # as long as their caches live

    def record(self, input_ids: Tensor, kv_cache: danube3.KVCache) -> tuple[Tensor, Tensor, Tensor, Any]:
        # The graph will read these memories, whatever is in them then. The user's ids stay as they are.
        input_ids, positions = input_ids.clone(), kv_cache.positions
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and loads libraries: not possible while recording
            self.model.last_logits(input_ids, kv_cache)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            logits = self.model.last_logits(input_ids, kv_cache)
        return input_ids, positions, logits, graph

    def __call__(self, input_ids: Tensor, kv_cache: danube3.KVCache) -> Tensor:  # [1, 1] -> [1, V]
        graphs = self.graphs.setdefault(kv_cache, {})
        if kv_cache.size not in graphs:
            graphs[kv_cache.size] = self.record(input_ids, kv_cache)
        its_ids, its_positions, logits, graph = graphs[kv_cache.size]
        its_ids.copy_(input_ids)
        its_positions.copy_(kv_cache.positions)
        graph.replay()
        return logits.clone()  # the next replay overwrites them

class VectorProduct(nn.Module):
    """A linear layer for one token. Compiled, such a loop reads the weights faster than kernels for products
    of matrices do, and stores no dequantized weights."""
    def __init__(self, linear: Any):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:  # [.., in] -> [.., out]
        if isinstance(self.linear, danube3.QuantizedLinear) and self.linear.bits == 8:
            y = danube3.int8_matvec(x.flatten(), self.linear.weight_packed, self.linear.weight_scale)
        else:
            y = (x.flatten().float() * self.linear.weight).sum(-1)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

def compile_decoding(model: danube3.Danube3) -> None:
    """Compile the pass of one token. All layers share the result. What is compiled is a copy of the modules,
    with the same weights: prompts, which have any length, go through `model` as it is. Call this last: later
    adapters, or tensors put in place of others, are not seen."""
    model.compiled_step = None  # not to be copied
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name, module in list(twin.named_modules()):
        loop = isinstance(module, nn.Linear) and "lora_" not in name
        if isinstance(module, danube3.QuantizedLinear):
            loop = module.bits == 8 or not module.fast  # at 4 bits PyTorch's kernel is as fast
        if loop:
            twin.set_submodule(name, VectorProduct(module))
    torch._dynamo.config.recompile_limit = 64  # for each power of two, kind of layer and length of a cache
    for module in (*twin.model.layers, twin.model.norm, twin.lm_head):
        module.compile(fullgraph=True, dynamic=False)
    model.compiled_step = GraphedStep(twin) if model.device.type == "cuda" else twin.last_logits

def can_compile() -> bool:
    if not danube3.has_compiler():
        print("no C++ compiler found (or Triton, for GPUs): going on without --compile", file=sys.stderr)
    return danube3.has_compiler()

def prepare_decoding(model: danube3.Danube3, wish: bool | None) -> None:
    """Compile the pass of one token, if that is wished, or likely to pay."""
    if shall_compile(wish, model.device, model.config) and can_compile():
        print("compilation delays the first token, and tokens 257, 513, 1,025, ..; --no-compile starts "
              "at once", file=sys.stderr)
        compile_decoding(model)

def join_processes(device: torch.device) -> None:
    """Meet the other processes that torchrun has started, if it has."""
    if "LOCAL_RANK" not in os.environ:
        return
    backend, own = "gloo", None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, own = "nccl", device
    dist.init_process_group(backend, device_id=own)

def measure_matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The best rate of a square matrix product, in operations per second. MFU is measured against it (papers
    take the data sheet's). Matrices grow while time is left: a large one in emulated fp16 takes a minute."""
    size, best = 128, 0.0
    largest = 2_048 if device.type == "cpu" else 8_192

    def time_product(size: int) -> float:
        a = torch.randn(size, size, device=device).to(dtype)
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        return time.perf_counter() - start

    time_product(size)  # the very first product loads a library
    end = time.perf_counter() + seconds
    while True:
        elapsed = min(time_product(size), time_product(size))
        best = max(best, 2 * size**3 / elapsed)
        left = end - time.perf_counter()
        if left < 2 * elapsed:
            return best
        if size < largest and left > 2 * 8 * elapsed:  # two products of twice the size
            size *= 2

def catch_interrupts(world_size: int) -> list[int]:
    """From now on the first Ctrl-C or SIGTERM is put into the returned list; a second one ends the program.
    Not under torchrun: it passes Ctrl-C on several times, and sends SIGTERM if another process has failed."""
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught and world_size == 1:
            raise KeyboardInterrupt
        caught.append(number)

    signal.signal(signal.SIGINT, catch)
    if world_size == 1:
        signal.signal(signal.SIGTERM, catch)
    return caught

def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a program. What the user can fix ends in one line on stderr, exit code 2."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bytes that are no text, characters it cannot show
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of our output has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DanubeError, OSError, safetensors.SafetensorError) as error:
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

def token_count(text: str) -> int:
    """'200k', '1.5M', '10B', '4T' -> tokens."""
    units = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,12})?)([kmbt]?)", text.lower(), re.ASCII)
    count = Fraction(match[1]) * units[match[2]] if match else Fraction(0)
    if count.denominator != 1 or not 0 < count < 2**60:
        raise argparse.ArgumentTypeError(f"{text!r} is no token count: write 200k, 1.5M, 10B or 4T")
    return int(count)

def short_count(number: float) -> str:
    """1234567 -> 1.23M"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # 999,999 is 1M, not 1000k
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"

def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"0*[1-9]\d{0,17}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)
