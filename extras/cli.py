"""What all programs share: flags, devices, several processes, and errors in one line."""

import argparse
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from fractions import Fraction
from typing import NoReturn

import torch
import torch.distributed as dist

from danube3 import Danube3, DanubeError, processes, say


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
