"""A small world to disturb, and the programs that run in it: for tests/campaign.py. The model is tiny: the
code that reads and writes files is the same for all sizes."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import gguf  # noqa: F401  (loaded here, once for all children, like torch._dynamo)
import torch._dynamo  # noqa: F401

import danube3
import quantize
import sample
import train
from data import cli, prepare


# ---- What programs leave
def problem(end, *names, may_succeed=True):
    """What is wrong with an end that is neither success nor one line of error that has one of `names`."""
    errors = re.findall("^error: .*", end.stdout, re.MULTILINE)
    clean = end.returncode == 0 or (end.returncode == 2 and len(errors) == 1)
    if "Traceback" in end.stdout or not clean:
        return f"ended with code {end.returncode}: {end.stdout.strip()[-600:]}"
    if end.returncode == 0:
        return "" if may_succeed else "nothing was noticed"
    named = not names or any(name in errors[0] for name in names)
    return "" if named else f"does not name {names}: {errors[0]}"

def contents(*paths):
    """All files of folders (or files): their bytes, by their names below the folder around."""
    files = [(path.parent, file) for path in paths for file in [path, *path.rglob("*")]]
    return {str(file.relative_to(around)): file.read_bytes() for around, file in files if file.is_file()}

def difference(got, expected):
    if names := sorted(set(got) ^ set(expected)):
        return f"files that only one of them has: {names}"
    return ", ".join(f"{name} differs" for name in expected if got[name] != expected[name])

def find(folder, name):
    """A file of a folder, or of the checkpoint in it."""
    return next(path for path in (*folder.glob(name), *folder.glob(f"step-*/{name}")))

# ---- A small world
MAIN = {"prepare": prepare.main, "train": train.main, "quantize": quantize.main, "sample": sample.main}
RUN = ("train --data DATA --out OUT --seed SEED --tokens 960 --tokens-per-step 48 --sequence-length 16 "
       "--micro-batch-size 3 --save-every 3 --device cpu")
CHAT = "train --chat LINES --init BASE --batch-size 4 --save-every 2 --out OUT"
SHARDS = "prepare --out OUT --val 0.2 --shard-tokens 700 --workers 2"
COMMANDS = {  # they write OUT, and read the rest
    "data": " ".join([SHARDS, "--tokenizer train:320", *(f"{source}=LINES" for source in danube3.SOURCES)]),
    "prepare": f"{SHARDS} --tokenizer DATA web=LINES other=LINES",
    "train": RUN, "resume": f"{RUN} --resume", "init": f"{RUN} --init BASE",
    "chat": CHAT, "adapters": f"{CHAT} --lora 2 --merge OUT-merged",
    "quantize": "quantize BASE --bits 4 --out OUT", "int8": "quantize BASE --bits 8 --out OUT",
    "gptq": "quantize BASE --bits 4 --out OUT --calibrate DATA", "gguf": "quantize BASE --gguf OUT",
    "sample": "sample BASE Ada --max-new-tokens 4", "talk": "sample BASE --chat --max-new-tokens 2",
    "greedy": "sample BASE Ada --max-new-tokens 12 --temperature 0", "eval": "sample BASE --eval LINES"}
RESUME = {"train": ["--resume"], "chat": ["--resume"], "adapters": ["--resume"]}  # goes on after a kill
WORDS = "Ada lives in Marrow. Brook has 9 geese;  he keeps none: \u00e9t\u00e9 \U0001f600 <s> </s>.".split()

def write_lines(path, seed):
    """A file whose lines are texts, conversations and questions."""
    rng, lines = random.Random(seed), []
    for i in range(40):  # with the padding data/prepare.py reads it in two parts
        text, question, answer = (" ".join(rng.choices(WORDS, k=k)) for k in (8, 4, 1))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append({"text": f"{i} {text}", "padding": " " * 120_000, "messages": messages,
                      "prompt": "Ada", "choices": [" lives", " has"], "answer": i % 2})
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

class World:
    """Data and finished runs of two seeds, and a run killed in its middle."""
    def __init__(self, folder):
        self.folder, self.scratch, self.disk = folder, folder / "scratch", folder / "disk"
        for path in (folder, self.scratch, self.disk, folder / "nothing"):
            path.mkdir()
        danube3.CONFIGS["toy"] = replace(
            danube3.CONFIGS["toy"], hidden_size=64, intermediate_size=96, num_hidden_layers=1, head_dim=32,
            vocab_size=320, max_position_embeddings=128)
        danube3.round = lambda *number: 0  # speeds are not compared
        cli.measure_matmul_peak = lambda device, dtype: 1.0
        train.plot_curves = lambda out, config: None  # half a second
        for self.seed in (1, 0):  # stays 0
            write_lines(folder / f"texts{self.seed}/lines.jsonl", self.seed)
            for name in ("data", "train", "adapters", "quantize"):
                end = self.run(name, folder / f"{name}{self.seed}")
                assert end.returncode == 0, end.stdout
        die = lambda run: os.kill(os.getpid(), signal.SIGKILL) if run.step == 10 else None
        self.run("train", folder / "half", before=partial(in_each_step, die))
        assert danube3.find_checkpoint(folder / "half").name == "step-0000010"

    def start(self, name, out, *more, before=None):
        """Start a command in a child, which calls `before` first. The name may go on with the folder BASE."""
        name, _, base = name.partition(" ")
        folder, n = self.folder, self.seed
        names = {"OUT": out, "BASE": folder / (base or f"train{n}"), "SEED": n, "DATA": folder / f"data{n}",
                 "LINES": folder / f"texts{n}/lines.jsonl"}
        command = re.sub("|".join(names), lambda match: str(names[match[0]]), COMMANDS[name]).split()
        def child():
            os.setsid()
            signal.alarm(120)  # what takes so long hangs
            resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))  # what takes so much is greedy
            os.dup2(process.printed.fileno(), 1)
            os.dup2(process.printed.fileno(), 2)
            os.chdir(out.parent)  # what is written under odd names belongs to the trial
            sys.argv = [*command, *map(str, more)]
            if before:
                before()
            cli.run_command(MAIN[command[0]])
        process = multiprocessing.get_context("fork").Process(target=child)
        process.printed = tempfile.TemporaryFile()
        process.start()
        return process

    def wait(self, process):
        """Wait for the end of a program, and up to five seconds more for that of its own processes."""
        process.join()
        code, end = process.exitcode, time.monotonic() + 5
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(process.pid, 0)
                time.sleep(0.02)
            code = f"{code}, while a process of it goes on"
        process.printed.seek(0)
        return subprocess.CompletedProcess("", code, process.printed.read().decode(errors="replace"))

    def run(self, name, out, *more, before=None):
        return self.wait(self.start(name, out, *more, before=before))

    def place(self, around=None):
        """An empty folder for one trial."""
        folder = (around or self.scratch) / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def attempt(self, name, *more, source="nothing", harm=None, before=None):
        """Run a command after `harm` has changed a folder, and mend that. -> its end, what it made"""
        folder, kept, place = self.folder / source, self.folder / "kept", self.place()
        shutil.copytree(folder, kept)
        if harm:
            harm(folder)
        made = folder if name == "resume" else place / "made"
        end = self.run(name, made, *more, before=before)
        found = contents(made) or {"printed": end.stdout}
        shutil.rmtree(folder)
        kept.rename(folder)
        return end, found

    def fault(self, name, *more, words=(), may_succeed=True, **how):
        return problem(self.attempt(name, *more, **how)[0], *words, may_succeed=may_succeed)

    def disturb(self, what, name, count, how):
        """Disturb a command `count` times, at moments that spread over its whole run."""
        place, start = self.place(), time.monotonic()
        end = self.run(name, place / "out", before=partial(at_operation, 0, place, 0))
        assert end.returncode == 0, end.stdout
        expected, seconds = contents(*place.iterdir()), time.monotonic() - start
        operations = len(place.with_name("operations").read_text().splitlines())
        for i in range(count):
            part = (i + self.rng.random()) / count
            yield what, f"{name} at {part:.4f}", how(self, name, part, expected, operations, seconds)

# ---- What a child does first
EVENTS = "open os.rename os.mkdir os.remove os.rmdir os.truncate shutil.rmtree shutil.copyfile".split()

def at_operation(number, folder, action):
    """Send oneself the signal `action` just before file operation `number` below `folder` (0: never)."""
    file, done, pid = open(folder.with_name("operations"), "w"), [], os.getpid()
    def hook(event, args):
        ours = str(folder) in str(args) or event in ("os.remove", "os.rmdir")  # rmtree names no folder
        if event in EVENTS and ours and os.getpid() == pid:
            done.append(event)
            print(event, repr(args), file=file, flush=True)
            if len(done) == number:
                os.kill(pid, action)
    sys.addaudithook(hook)

def in_each_step(action, **constants):
    """Call `action` before each training step, and change constants of danube3.py."""
    take_step = danube3.Trainer.take_step
    danube3.Trainer.take_step = lambda run, peak: (action(run), take_step(run, peak))[1]
    vars(danube3).update(constants)
