"""Is anything ever lost? `python tests/campaign.py` kills the programs, damages their files, starves and confuses them.

    python tests/campaign.py [kills corruption fuzz resources numbers endurance] [--quick] [--seed N] [--out FILE.md]

Every trial runs one of our programs in a child, forked from this process, which has loaded torch once. Kills, full
disks and damage that checksums cover must leave the bytes of an undisturbed run or one line of error, the other trials
must end cleanly; or they are counted as lost, and printed with what repeats them (the seed fixes all but the moments of
the clock). At the end stands a table of all that was tried. The model has one layer and a width of 64: the code that
reads and writes files is the same for all sizes. Linux only (fork, /proc).
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import gguf  # noqa: E402, F401  (loaded here, once for all children)
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch.distributed.checkpoint import state_dict  # noqa: E402, F401
from tqdm import tqdm  # noqa: E402

import danube3  # noqa: E402
import quantize  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import prepare, read, toy  # noqa: E402

TEXT = "Ada lives in Marrow. Brook has 9 geese;  he keeps none: \u00e9t\u00e9 \U0001f600 <s> </s>. Celia plays harp."
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.copyfile")


# ------------------------------------------------------------------------------------------------- children and results
@dataclass
class Row:
    """One line of the table: what was tried, how often, and each trial that went wrong."""
    section: str
    what: str
    times: int = 0
    lost: list[str] = field(default_factory=list)

    def add(self, label: str, problem: str) -> None:
        self.times += 1
        if problem:
            self.lost.append(f"{label}: {problem}")
            tqdm.write(f"LOST  {self.section}, {self.what}, {label}: {problem}")


@dataclass
class Ended:
    """How a child ended: exit code (negative: the signal that killed it) and what it printed."""
    code: int
    out: str
    err: str

    def problem(self, *names: str, may_succeed: bool = True) -> str:
        """What is wrong with this end, if it is neither success nor one line of error with one of `names` in it."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if "Traceback" in self.err or self.code not in (0, 2) or self.code == 2 and len(errors) != 1:
            return f"ended with code {self.code}: {self.err.strip()[-600:]}"
        if self.code == 0:
            return "" if may_succeed else "nothing was noticed"
        return "" if not names or any(name in errors[0] for name in names) else f"does not name {names}: {errors[0]}"


def child(scratch: Path, main, argv: list = (), before=lambda: None, delay: float | None = None, wait: bool = True):
    """Run one of our programs in a forked child; after `delay` seconds kill it. -> Ended, or without `wait` its id"""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            signal.alarm(120)  # what takes so long hangs
            for name, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            torch.set_num_threads(1)
            sys.argv = ["program", *map(str, argv)]
            before()
            read.run_command(main)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if not wait:
        return pid
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return ended(scratch, pid)


def ended(scratch: Path, pid: int) -> Ended:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(code, *((scratch / name).read_text(errors="replace") for name in ("out", "err")))


def at_operation(number: int, folder: Path, action: int, log: Path):
    """-> a function that makes the child send itself the signal `action` just before its `number`-th file operation
    below `folder` (0: never). What that was, or how many there have been, stands in `log`."""
    def start() -> None:
        count, pid = 0, os.getpid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event not in EVENTS or os.getpid() != pid:
                return
            relative = event in ("os.remove", "os.rmdir") and isinstance(args[-1], int) and args[-1] >= 0
            if relative or any(str(folder) in str(arg) for arg in args):
                count += 1
                os.pwrite(handle, f"{count:6d} {event} {args}"[:200].ljust(200).encode(errors="replace"), 0)
                if count == number:
                    os.kill(pid, action)

        sys.addaudithook(hook)
    return start


def without_speed(line: bytes) -> dict | bytes:
    """A line of metrics.jsonl, or what damage has made of it."""
    try:
        return {key: value for key, value in json.loads(line).items() if key not in ("tokens_per_second", "mfu")}
    except (ValueError, AttributeError):
        return line


def contents(*paths: Path) -> dict[str, bytes | list]:
    """All files of these folders (or files) by their names below the folder around, for comparison; of metrics.jsonl
    everything but the speeds."""
    found = {}
    for path in paths:
        for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
            name, data = str(file.relative_to(path.parent)), file.read_bytes()
            if file.name == "metrics.jsonl":
                data = list(map(without_speed, data.splitlines()))
            found[name] = data
    return found


def difference(got: dict, expected: dict) -> str:
    if names := sorted(set(got) ^ set(expected)):
        return f"files that only one of them has: {names}"
    return ", ".join(f"{name} differs" for name in expected if got[name] != expected[name])


# ------------------------------------------------------------------------------------------------------ a small world
@dataclass
class Program:
    """A command line in which OUT stands for what it writes; how to go on after a kill is `again`."""
    name: str
    main: object
    argv: list
    again: tuple = ()

    def command(self, out: Path) -> list:
        return [str(part).replace("OUT", str(out)) for part in self.argv]


def write_data(folder: Path, seed: int) -> None:
    """Two shards of each of the six sources, and conversations."""
    rng = random.Random(seed)
    with danube3.atomic_folder(folder) as partial:
        tokenizer = toy.train_tokenizer([TEXT, f"{seed} {TEXT}"] * 3, 320, partial / "tokenizer.model")
        counts = {name: {} for name in danube3.SOURCES}
        for name in counts:
            for split, documents in (("train", 40), ("val", 8)):
                ids = [[rng.randrange(3, 320) for _ in range(30)] for _ in range(documents)]
                counts[name][split] = toy.write_shards(partial, name, split, ids, shard_tokens=700)
        meta = {"sources": counts, "vocab_size": 320, "tokenizer_sha256": tokenizer.sha256}
        (partial / "meta.json").write_text(json.dumps(meta))
        words = TEXT.split()
        turns = [[("user", " ".join(rng.sample(words, 4))), ("assistant", rng.choice(words))] for _ in range(24)]
        lines = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
        (partial / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        quiz = [{"prompt": "Ada", "choices": [" lives", " has"], "answer": i % 2} for i in range(4)]
        (partial / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in quiz))
        (partial / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(60)))


class World:
    """Data, two finished runs of each kind, a run killed in its middle, and the programs that the trials start."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rng, self.number = folder, random.Random(0), 0
        folder.mkdir()
        tqdm.monitor_interval = 0  # no thread here: a fork would leave its locks as they are
        tqdm.set_lock(threading.RLock())  # its own is shared with children, who take it with them when they are killed
        torch.set_num_threads(1)
        config = replace(danube3.CONFIGS["toy"], hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         head_dim=32, vocab_size=320, max_position_embeddings=128)
        danube3.CONFIGS["toy"] = config
        train.measure_matmul_peak = lambda device: 1e11     # only sets the scale of mfu
        train.plot_curves = lambda out, recipe: None       # half a second, at the end of all
        prepare.BATCH_BYTES = 1_000                         # several spool files
        for seed in (0, 1):
            write_data(folder / f"data{seed}", seed)
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        for seed in (0, 1):
            for name in ("train", "adapters", "quantize"):
                program = self.programs(seed)[name]
                out = folder / f"{name}{seed}"
                end = child(self.scratch, program.main, program.command(out))
                assert end.code == 0, end.err
        training, step = self.programs()["train"], danube3.Trainer.take_step
        poison = lambda run, *args: os.kill(os.getpid(), signal.SIGKILL) if run.step == 10 else step(run, *args)
        child(self.scratch, training.main, training.command(folder / "half"),
              lambda: setattr(danube3.Trainer, "take_step", poison))
        assert danube3.find_checkpoint(folder / "half").name == "step-0000010"

    def programs(self, seed: int = 0) -> dict[str, Program]:
        f, data = self.folder, self.folder / f"data{seed}"
        chat = ["--chat", data / "chat.jsonl", "--init", f / f"train{seed}", "--batch-size", 4, "--save-every", 2]
        every = [
            Program("train", train.main, ["--data", data, "--out", "OUT", "--tokens", 960, "--sequence-length", 16,
                    "--tokens-per-step", 48, "--micro-batch-size", 3, "--save-every", 3, "--seed", seed,
                    "--device", "cpu"], ("--resume",)),
            Program("chat", train.main, [*chat, "--out", "OUT"], ("--resume",)),
            Program("adapters", train.main, [*chat, "--out", "OUT", "--lora", 2, "--merge", "OUT-merged"],
                    ("--resume",)),
            Program("prepare", prepare.main, ["--out", "OUT", "--tokenizer", data / "tokenizer.model", "--val", 0.1,
                    "--shard-tokens", 900, "--workers", 2, f"web={data}/texts.jsonl", f"other={data}/texts.jsonl"]),
            Program("quantize", quantize.main, [f / f"train{seed}", "--bits", 4, "--out", "OUT"]),
            Program("gptq", quantize.main, [f / f"train{seed}", "--bits", 4, "--out", "OUT", "--calibrate", data]),
            Program("gguf", quantize.main, [f / f"quantize{seed}", "--gguf", "OUT"])]
        return {program.name: program for program in every}

    def place(self) -> Path:
        """A new, empty folder for one trial."""
        shutil.rmtree(self.scratch / f"trial{self.number}", ignore_errors=True)
        self.number += 1
        (self.scratch / f"trial{self.number}").mkdir()
        return self.scratch / f"trial{self.number}"

    def finish(self, program: Program, out: Path, before=lambda: None) -> Ended:
        """Go on after a kill as the README says; where there is nothing to go on from, begin again."""
        end = child(self.scratch, program.main, [*program.command(out), *program.again], before)
        if end.code == 2 and "nothing to resume" in end.err:
            end = child(self.scratch, program.main, program.command(out), before)
        return end


# --------------------------------------------------------------------------------------------------------------- kills
def looks_complete(place: Path, program: Program, expected: dict[str, bytes | list]) -> str:
    """What has the name of something whole, and is not: a checkpoint that lacks a file of its own list or has another
    digest than stands there, and whatever else the program makes if it is not what an undisturbed run leaves."""
    for path in [*place.glob("out/step-*"), place / "out-merged", *([] if program.again else [place / "out"])]:
        if path.name.endswith(".partial") or not path.exists():
            continue
        if not path.name.startswith("step-"):
            if lost := difference(contents(path), {n: d for n, d in expected.items() if Path(n).parts[0] == path.name}):
                return f"{path.name} is there, and {lost}"
        elif not (path / "SHA256SUMS").is_file():
            return f"{path.name} is there, and has no SHA256SUMS"
        else:
            try:
                danube3.verify_checksums(path)
            except danube3.DanubeError as error:
                return str(error)
    return ""


def left_over(pid_group: int) -> str:
    """Do processes of a killed child go on? They get five seconds to notice."""
    for _ in range(100):
        try:
            os.killpg(pid_group, 0)
        except ProcessLookupError:
            return ""
        time.sleep(0.05)
    return "a process of it goes on after the kill"


def kill_once(world: World, program: Program, how: tuple[str, float], expected: dict) -> str:
    """Kill a run at one moment, look at what it left, go on, and compare. -> what was lost"""
    kind, moment = how
    place, log = world.place(), world.scratch / "operation"
    hook = at_operation(int(moment) if kind == "operation" else 0, place, signal.SIGKILL, log)
    pid = child(world.scratch, program.main, program.command(place / "out"), hook, wait=False)
    if kind == "second":
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    end = ended(world.scratch, pid)
    at = f" ({log.read_text().strip()})"
    if problem := left_over(pid) or looks_complete(place, program, expected):
        return problem + at
    if end.code not in (0, -signal.SIGKILL):
        return end.problem() + at
    if int(moment * 1000) % 3 == 0:  # a third of them twice: going on is killed too
        world.finish(program, place / "out", at_operation(1 + int(moment * 7) % 40, place, signal.SIGKILL, log))
        if problem := looks_complete(place, program, expected):
            return f"after a second kill: {problem}{at}"
    end = world.finish(program, place / "out")
    if end.code and "already exists" not in end.err:
        return f"going on {end.problem(may_succeed=False) or end.err.strip()}{at}"
    lost = difference(contents(*place.iterdir()), expected)
    return lost and lost + at


def kills(world: World, count: int, only: tuple = ()) -> list[Row]:
    names = {"train": "toy training", "prepare": "data/prepare.py", "quantize": "quantize.py", "gguf": "GGUF export",
             "chat": "chat fine-tuning", "adapters": "chat with adapters, and merging them"}
    rows = []
    for key in only or list(names)[:6 if count > 1 else 3]:
        name = names[key]
        program, row = world.programs()[key], Row("kills", f"{name}: SIGKILL at a random moment, then the same again")
        rows.append(row)
        place, log = world.place(), world.scratch / "operation"
        start = time.monotonic()
        end = child(world.scratch, program.main, program.command(place / "out"), at_operation(0, place, 0, log))
        seconds, operations = time.monotonic() - start, int(log.read_text()[:6])
        assert end.code == 0, end.err
        expected, half = contents(*place.iterdir()), max(1, count // 2)
        # In strata, so that the moments spread over the whole run. Most file operations lie in writing checkpoints.
        moments = [("operation", 1 + int((i + world.rng.random()) * operations / half)) for i in range(half)]
        moments += [("second", round((i + world.rng.random()) * seconds / half, 3)) for i in range(count - half)]
        for how in tqdm(moments, f"kills: {name}", leave=False):
            row.add(f"at {how[0]} {how[1]}", kill_once(world, program, how, expected))
    return rows


# ---------------------------------------------------------------------------------------------------------- corruption
def damage(path: Path, how: str, other: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "truncated":
        data = data[:rng.randrange(1, len(data))]
    elif how == "emptied":
        data = b""
    elif how == "swapped":
        data = other.read_bytes()
    path.unlink()
    if how != "removed":
        path.write_bytes(data)


STATE = ("training_state.safetensors", "training_state.json")


def targets(world: World) -> list[tuple[str, str, str, str]]:
    """Every kind of file: (folder of the world, file below it, the same of another run, program that reads it)"""
    run, other = (danube3.find_checkpoint(world.folder / name).name for name in ("train0", "half"))
    tuned = danube3.find_checkpoint(world.folder / "adapters0").name
    files = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json")
    shards = ("web-train-00000.bin", "web-train-00001.bin", "other-val-00000.bin")
    of_data = ("meta.json", "tokenizer.model", *shards)
    of_adapters = ("adapter_model.safetensors", "adapter_config.json", "base.sha256")
    quantized = ("model-00001.safetensors", "model.safetensors.index.json", "config.json")
    return [*[("train0", f"{run}/{name}", f"train1/{run}/{name}", "sample") for name in files],
            *[("half", f"{other}/{name}", f"train1/{run}/{name}", "resume") for name in (*files, *STATE)],
            ("half", "metrics.jsonl", "train1/metrics.jsonl", "resume"),
            *[("data0", name, f"data1/{name}", "train") for name in of_data],
            ("data0", "chat.jsonl", "data1/chat.jsonl", "chat"),
            ("data0", "questions.jsonl", "data1/chat.jsonl", "eval"),
            *[("adapters0", f"{tuned}/{name}", f"adapters1/{tuned}/{name}", "sample") for name in of_adapters],
            *[("quantize0", name, f"quantize1/{name}", "sample") for name in quantized],
            *[("train0", f"{run}/{name}", f"train1/{run}/{name}", "quantize") for name in files],
            *[("quantize0", name, f"quantize1/{name}", "gguf") for name in quantized]]


def read_with(world: World, reader: str, folder: Path, place: Path) -> tuple[Ended, dict]:
    """Start the program that reads a damaged folder. -> how it ended, and what it made"""
    programs, argv = world.programs(), None
    if reader == "sample":
        program, argv = Program("", sample.main, []), [folder, "Ada", "--temperature", 0, "--max-new-tokens", 12]
    elif reader == "eval":
        program, argv = Program("", sample.main, []), [world.folder / "train0", "--eval", folder / "questions.jsonl"]
    elif reader == "resume":
        program = programs["train"]
        argv = [*program.command(folder), "--resume"]
    else:
        program = programs[reader]
    moved = [str(part).replace(str(world.folder / folder.name), str(folder)) for part in argv or program.argv]
    end = child(world.scratch, program.main, [part.replace("OUT", str(place / "made")) for part in moved])
    made = {} if end.code else contents(folder if reader == "resume" else place / "made")
    return end, {"stdout": end.out if reader in ("sample", "eval") else "", **made}


def corruption(world: World, count: int) -> list[Row]:
    """With checksums whatever is noticed is named, whatever is not leaves the result as it is. Without (as in a folder
    from the Hub) nothing but a clean end can be asked for. What people write (jsonl) is theirs to change."""
    hows = ("truncated", "flipped", "emptied", "swapped", "removed")
    rows = {how: Row("corruption", f"a file {how}: of checkpoint, run, data, adapters, int4 folder, jsonl")
            for how in hows}
    bare = Row("corruption", "the same in folders without SHA256SUMS: no traceback")
    pristine, trials = {}, [(target, how, with_checksums) for target in targets(world) for how in hows
                            for with_checksums in (True, False)]
    if count < len(trials):
        trials = world.rng.sample(trials, count)
    for (source, name, other, reader), how, with_checksums in tqdm(trials, "corruption", leave=False):
        if (source, reader) not in pristine:
            place = world.place()
            end, made = read_with(world, reader, shutil.copytree(world.folder / source, place / source), place)
            assert end.code == 0, (source, reader, end.err)
            pristine[source, reader] = made
        place = world.place()
        folder = shutil.copytree(world.folder / source, place / source)
        if not with_checksums:
            for path in folder.rglob("SHA256SUMS"):
                path.unlink()
        damage(folder / name, how, world.folder / other, world.rng)
        end, made = read_with(world, reader, folder, place)
        problem = end.problem(*[Path(name).name, str((folder / name).parent)] * with_checksums)
        if with_checksums and not problem and not end.code and not name.endswith("l.jsonl") \
                and Path(name).name not in ("chat.jsonl", "questions.jsonl", "metrics.jsonl"):
            problem = difference(made, pristine[source, reader])
        (rows[how] if with_checksums else bare).add(f"{reader} of {source}/{name}, {how}, {with_checksums=}", problem)
    return [*rows.values(), bare, hostile_pickle(world)]


def rewrite_checksums(folder: Path) -> None:
    """As if the damage had been there when the folder was written."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def hostile_pickle(world: World) -> Row:
    row = Row("corruption", "a hostile pickle in place of a file, with the right checksum: nothing runs")
    for name in ("model.safetensors", *STATE):
        place = world.place()
        run = shutil.copytree(world.folder / "half", place / "run")
        folder = danube3.find_checkpoint(run)
        torch.save(Hostile(place / "owned"), folder / name)
        rewrite_checksums(folder)
        program = world.programs()["train"]
        if name not in STATE:  # only the training state is read to resume
            program = Program("sample", sample.main, ["OUT", "Ada"])
        end = child(world.scratch, program.main, [*program.command(run), *program.again])
        owned = "it was run" if (place / "owned").exists() else ""
        row.add(name, owned or end.problem(name.partition(".")[0], may_succeed=False))
    return row


# ---------------------------------------------------------------------------------------------------------------- fuzz
def in_process(main, argv: list) -> str:
    """Run a program within this child. -> what is wrong with its end"""
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["program", *map(str, argv)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            read.run_command(main)
        except SystemExit as end:
            code = end.code or 0
    return Ended(code, out.getvalue(), err.getvalue()).problem()


def explore(world: World, row: Row, strategy, trial, count: int) -> None:
    """Have hypothesis draw `count` inputs, try each, and shrink one that fails. All in one child with 6 GB of memory,
    so that a crash, a hang or greed counts as lost too."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    def tries() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2 ** 30,) * 2)
        @seed(world.rng.randrange(2 ** 32))
        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                  phases=[Phase.generate, Phase.shrink], print_blob=True)
        @given(strategy)
        def every(drawn) -> None:
            signal.alarm(120)
            with open(world.scratch / "drawn", "a") as log:
                log.write(f"{drawn!r}\n")
            assert not (problem := trial(drawn)), problem
        every()

    (world.scratch / "drawn").write_text("")
    end = child(world.scratch, lambda: tries())
    drawn = (world.scratch / "drawn").read_text(errors="replace").splitlines()
    row.times += max(0, len(drawn) - 1)
    problem = f"{drawn[-1][:300]}: code {end.code}, {end.err.strip()[-700:]}" if end.code else ""
    row.add("the last of them", problem)


def flag_values():
    from hypothesis import strategies as st
    edges = ["0", "1", "2", "3", "-1", "16", "48", "4k", "4T", "nan", "inf", "-inf", "1e400", "1e-320", "1.5", "", " ",
             "x", "9" * 18, "9" * 30, "0x10", "\u0663", "\udcff", "auto", "on", "cpu", "meta", "cuda:7", "vulkan",
             "staged", "toy", "/dev/null", "/", "int8", "float16"]
    return st.one_of(st.sampled_from(edges), st.integers(-3, 64).map(str), st.text(max_size=8).filter(
        lambda text: "\0" not in text))


def fuzz_flags(world: World, count: int) -> list[Row]:
    """A good command with one to three flags set to anything; the last of equal flags counts."""
    from hypothesis import strategies as st
    programs, rows = world.programs(), []
    place = world.place()
    sampling = Program("sample", sample.main, [world.folder / "train0", "Ada", "--max-new-tokens", 4])
    flags = {"train": "seed tokens tokens-per-step micro-batch-size sequence-length learning-rate save-every device "
                      "recompute layers mixture data init resume dry-run gpus gpu-memory config",
             "sample": "max-new-tokens temperature top-k top-p seed device dtype eval json chat",
             "chat": "epochs batch-size lora seed learning-rate micro-batch-size system chat init resume dry-run",
             "prepare": "val shard-tokens text-field tokens tokenizer open",
             "quantize": "bits calibrate samples report device gguf"}
    alone = ("resume", "dry-run", "open")
    for name, names in list(flags.items())[:5 if count > 3 else 2]:
        program, row = programs.get(name, sampling), Row("fuzz", f"flags of {name}: any value for one to three")
        pairs = st.lists(st.tuples(st.sampled_from(names.split()), flag_values()), min_size=1, max_size=3)

        def trial(drawn, program=program) -> str:
            shutil.rmtree(place)
            place.mkdir()
            os.chdir(place)  # what is written under odd names goes with it
            extra = [part for flag, value in drawn for part in (
                [f"--{flag}"] if flag in alone or program is sampling and flag == "chat" else [f"--{flag}={value}"])]
            return in_process(program.main, [*program.command(place / "out"), *extra])
        explore(world, row, pairs, trial, count)
        rows.append(row)
    return rows


def fuzz_files(world: World, count: int) -> list[Row]:
    """config.json, safetensors headers, jsonl and chat text made of anything, in folders without checksums."""
    from hypothesis import strategies as st
    place = world.place()
    folder = shutil.copytree(danube3.find_checkpoint(world.folder / "train0"), place / "checkpoint")
    (folder / "SHA256SUMS").unlink()
    config, whole = json.loads((folder / "config.json").read_text()), (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:8 + size])
    edges = st.sampled_from([2 ** 31, 2 ** 61, 2 ** 63, 10 ** 12, 10 ** 5, -1, 0, 1, 64, 96, None, [], {}, "x", 1e300])
    anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
                            | edges,
                            lambda inner: st.lists(inner, max_size=3)
                            | st.dictionaries(st.sampled_from("role content messages rope_type shape".split()), inner),
                            max_leaves=5)
    speak = [folder, "Ada", "--temperature", 0, "--max-new-tokens", 3]

    def change_config(drawn) -> str:
        (folder / "config.json").write_text(json.dumps({**config, **drawn}))
        return in_process(sample.main, speak)

    def change_header(drawn) -> str:
        name, key, value, length = drawn
        changed = {**header, name: value if key is None else {**header.get(name, {}), key: value}}
        text = json.dumps(changed).encode()
        data = (len(text) if length is None else length).to_bytes(8, "little") + text + whole[8 + size:]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(data)
        return in_process(sample.main, speak)

    headers = st.tuples(st.sampled_from([*header, "x"]), st.sampled_from([None, "dtype", "shape", "data_offsets"]),
                        anything | st.sampled_from(["F64", "F16", "BF16", "I8", "F8_E4M3", "U64", [0, 4], [4, 0]]),
                        st.none() | st.integers(0, 2 ** 64 - 1))
    rows = [Row("fuzz", "config.json: any values"), Row("fuzz", "safetensors: any header")]
    explore(world, rows[0], st.dictionaries(st.sampled_from([*config, "rope_scaling", "quantization_config"]),
                                            edges | anything, min_size=1, max_size=3), change_config, 2 * count)
    explore(world, rows[1], headers, change_header, count)
    return rows


def fuzz_lines(world: World, count: int) -> list[Row]:
    """jsonl for chat, quiz and data/prepare.py; questions typed in a chat."""
    from hypothesis import strategies as st
    place, rows, base = world.place(), [], world.folder / "train0"
    text = st.text(max_size=12) | st.sampled_from(["</s>", "<|answer|>", "\ud83d", "\u2028", "/save", "/reset", "Ada"])
    value = st.recursive(st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | text, lambda inner: st.lists(
        inner, max_size=3) | st.dictionaries(text, inner, max_size=2), max_leaves=4)
    message = st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "system"]) | value,
                                                  "content": text | value})
    turns = st.lists(st.tuples(text, text), min_size=1, max_size=3).map(lambda pairs: [
        {"role": role, "content": said} for pair in pairs for role, said in zip(("user", "assistant"), pair)])
    item = st.fixed_dictionaries({}, optional={
        "messages": turns | st.lists(message, max_size=3) | value, "text": text | value, "prompt": text | value,
        "choices": st.lists(text, max_size=3) | value, "answer": st.integers(-1, 3) | text | value})
    line = (item | value).map(json.dumps) | text
    chat, shards = world.programs()["chat"], world.programs()["prepare"]

    def read_lines(drawn) -> str:
        shutil.rmtree(place)
        place.mkdir()
        path = place / "lines.jsonl"
        path.write_text("\n".join(drawn), errors="surrogatepass")
        commands = [(sample.main, [base, "--eval", path]),
                    (chat.main, [*chat.command(place / "out"), "--chat", path, "--dry-run"]),
                    (shards.main, [*shards.command(place / "out")[:-2], "--workers", 1, f"web={path}"])]
        problems = [in_process(main, argv) for main, argv in commands]
        return next((problem for problem in problems if problem), "")

    def speak(drawn) -> str:
        sys.stdin = io.StringIO("\n".join(drawn))
        return in_process(sample.main, [base, "--chat", "--max-new-tokens", 2])

    rows += [Row("fuzz", "jsonl of any lines, read as chat, quiz and text"), Row("fuzz", "chat: any lines typed")]
    explore(world, rows[0], st.lists(line, max_size=4), read_lines, count)
    explore(world, rows[1], st.lists(text, max_size=5), speak, count)
    return rows


def fuzz_resume(world: World, count: int) -> Row:
    """Resumed with other flags: refused, or, for those that may change, the same bits."""
    row, place = Row("fuzz", "resume with changed flags: refused, or the same bits"), world.place()
    program = world.programs()["train"]
    free = [["--save-every", 5], ["--recompute", "on"], ["--save-every", 1], []]
    others = [["--seed", 3], ["--tokens", 1008], ["--learning-rate", 0.1], ["--mixture", "constant"], ["--layers", 2],
              ["--sequence-length", 24], ["--tokens-per-step", 96], ["--data", world.folder / "data1"],
              ["--init", world.folder / "train0"]]
    for _ in range(count):
        flags = sum(world.rng.sample([*free, *others], world.rng.randint(1, 3)), [])
        may = not any(flag in flags for flag, _ in others)
        run = shutil.copytree(world.folder / "half", place / f"run{row.times}")
        end = child(world.scratch, program.main, [*program.command(run), *flags, "--resume"])
        lost = end.problem("was made with another", "is no toy", "is no whole number", may_succeed=may)
        if not lost and not end.code:
            lost = difference(*({name.split("/", 1)[1]: data for name, data in contents(each).items()
                                 if name.endswith("model.safetensors")} for each in (run, world.folder / "train0")))
        row.add(f"{flags}", lost)
        shutil.rmtree(run)
    return row


def fuzz(world: World, count: int) -> list[Row]:
    return [*fuzz_flags(world, count), *fuzz_files(world, count), *fuzz_lines(world, count),
            fuzz_resume(world, max(1, count // 10))]


# ----------------------------------------------------------------------------------------------------------- resources
@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """A file system of `size` bytes. -> None where none may be mounted"""
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def full_disk(world: World, count: int) -> list[Row]:
    """A disk of every size from nothing to nearly enough; with more room the same command ends in the same bytes.
    Where no file system can be mounted: a limit on the size of one file, which ends a write in the same place."""
    rows = []
    for name in ("train", "gguf", "chat", "adapters", "prepare", "quantize")[:6 if count > 1 else 2]:
        program, place = world.programs()[name], world.place()
        end = child(world.scratch, program.main, program.command(place / "out"))
        assert end.code == 0, end.err
        expected = contents(*place.iterdir())
        total = sum(len(data) for data in expected.values() if isinstance(data, bytes)) * (2 if program.again else 1)
        row = Row("resources", f"{name}: the disk full (tmpfs), then room made and the same again")
        for i in tqdm(range(count), f"full disk: {name}", leave=False):
            size = 4096 + int((i + world.rng.random()) / count * total)
            with small_disk(world.place() / "disk", size) as disk:
                if disk is None:
                    row.what = f"{name}: a file too large (RLIMIT_FSIZE; no tmpfs could be mounted), then room made"
                    place = world.place()
                    limit = lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, size // 4))
                else:
                    place, limit = disk, lambda: None
                end = child(world.scratch, program.main, program.command(place / "out"), limit)
                problem = end.problem() or looks_complete(place, program, expected)
                if disk:
                    remount(disk, f"size={2 ** 28}")
                if not problem and end.code:
                    end = world.finish(program, place / "out")
                    problem = f"going on: {end.problem()}{end.err}" if end.code else ""
                row.add(f"{size:,} bytes", problem or difference(contents(*place.iterdir()), expected))
        rows.append(row)
    return rows


def read_only(world: World, count: int) -> Row:
    row = Row("resources", "a read-only folder for the output")
    for name, program in list(world.programs().items())[:7 if count > 1 else 2]:
        with small_disk(world.place() / "disk", 2 ** 20) as disk:
            if disk is None:
                row.what += " (not tried: nothing could be mounted)"
                break
            remount(disk, "ro")
            end = child(world.scratch, program.main, program.command(disk / "out"))
            row.add(name, end.problem(str(disk / "out"), may_succeed=False))
    return row


def out_of_memory(world: World, count: int) -> Row:
    """The address space is limited to what the parent has and a little more, while rows want gigabytes."""
    row, place = Row("resources", "out of memory: one line that names the flag that helps"), world.place()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 29,) * 2)
    program = world.programs()["train"]
    for i in range(count):
        rows = 2 ** (16 + i % 4)
        flags = ["--sequence-length", 16, "--tokens-per-step", 16 * rows, "--micro-batch-size", rows, "--tokens",
                 64 * rows]
        end = child(world.scratch, program.main, [*program.command(place / f"out{i}"), *flags],
                    lambda: (limit(), setattr(danube3, "MAX_EPOCHS", math.inf)))
        row.add(f"{rows} rows", end.problem("--micro-batch-size", may_succeed=False))
    return row


def at_once(world: World, count: int) -> Row:
    """The first is stopped at a file operation, the second started and refused; then the first goes on to its end. Not
    at the first two operations, which make and open what is locked: until then nobody has it."""
    row = Row("resources", "two at once with one --out: the second refused, the first unharmed")
    log = world.scratch / "operation"
    for name in ("train", "prepare", "chat", "quantize", "gguf")[:5 if count > 1 else 2]:
        program, place = world.programs()[name], world.place()
        end = child(world.scratch, program.main, program.command(place / "out"), at_operation(0, place, 0, log))
        assert end.code == 0, end.err
        expected, operations = contents(*place.iterdir()), int(log.read_text()[:6])
        for _ in range(count):
            place, number = world.place(), world.rng.randint(max(3, operations // 5), operations - operations // 5)
            first, second = world.scratch / "first", world.scratch
            first.mkdir(exist_ok=True)
            hook = at_operation(number, place, signal.SIGSTOP, log)
            pid = child(first, program.main, program.command(place / "out"), hook, wait=False)
            os.waitpid(pid, os.WUNTRACED)
            at = log.read_text().strip()
            begun = any(place.iterdir())
            end = child(second, program.main, [*program.command(place / "out"), *program.again])
            problem = end.problem("in use", "already exists", "nothing to resume", may_succeed=False) if begun else ""
            os.kill(pid, signal.SIGCONT)
            end = ended(first, pid)
            problem = problem or (end.err if end.code else difference(contents(*place.iterdir()), expected))
            row.add(f"{name} at {at}", problem)
    return row


def resources(world: World, count: int) -> list[Row]:
    return [*full_disk(world, count), read_only(world, count), out_of_memory(world, min(4, count)),
            at_once(world, min(4, count))]


# ------------------------------------------------------------------------------------------------------------- numbers
def is_finite(run: Path) -> str:
    """Does the newest checkpoint of a run, if it has one, hold numbers only?"""
    for folder in danube3.checkpoints_in(run)[-1:]:
        for name, weight in safetensors.torch.load_file(folder / "model.safetensors").items():
            if not weight.isfinite().all():
                return f"{folder.name} was kept, and {name} in it is not finite"
    return ""


def poisoned_weights(world: World, value: float, tensors: tuple) -> Row:
    """One number of a checkpoint and of its training state replaced, their checksums made anew: every program that
    reads it says so."""
    row, data = Row("numbers", f"{value} among the weights of a checkpoint"), world.folder / "data0"
    program = world.programs()["train"]
    for tensor in tensors:
        place = world.place()
        run = shutil.copytree(world.folder / "half", place / "run")
        folder = danube3.find_checkpoint(run)
        for file, name in (("model", tensor), ("training_state", f"weights.{tensor}")):
            tensors_of = safetensors.torch.load_file(folder / f"{file}.safetensors")
            tensors_of[name].view(-1)[7] = value
            safetensors.torch.save_file(tensors_of, folder / f"{file}.safetensors", metadata={"format": "pt"})
        rewrite_checksums(folder)
        out = place / "out"
        readers = [(train.main, [*program.command(run), "--resume"]), (sample.main, [run, "Ada"]),
                   (sample.main, [run, "Ada", "--temperature", 0]),
                   (sample.main, [run, "--eval", data / "questions.jsonl"]),
                   (quantize.main, [run, "--bits", 8, "--out", out]),
                   (quantize.main, [run, "--bits", 4, "--out", out, "--calibrate", data]),
                   (quantize.main, [run, "--gguf", out]),
                   (train.main, ["--chat", data / "chat.jsonl", "--init", run, "--out", out]),
                   (train.main, [*program.command(out), "--init", run])]
        for main, argv in readers[:9 if len(tensors) > 1 else 2]:
            end = child(world.scratch, main, argv)
            words = f"weights.{tensor} does not fit this run" if "--resume" in argv else "not finite"
            row.add(f"{tensor}, {argv[1:]}", end.problem(words, may_succeed=False))
    return row


def poisoned_steps(world: World, steps: int, value: float) -> Row:
    """A gradient, or what flows through the layers (as from a bad batch), is not finite in some steps. Up to four in a
    row are left out; the fifth ends the run, and the checkpoint before stays."""
    row = Row("numbers", f"{value} in a gradient, and in a batch, {steps} steps in a row")
    program, take_step = world.programs()["train"], danube3.Trainer.take_step
    for where, first in (("gradient", 6), ("batch", 7), ("batch", 0)):
        def poisoned(run, *batch):
            bad, model = first <= run.step < first + steps, run.model
            hook = model.lm_head.weight.register_hook(lambda grad: grad * value) if bad and where == "gradient" else \
                model.model.norm.register_forward_hook(lambda module, args, x: x * value) if bad else None
            try:
                return take_step(run, *batch)
            finally:
                if hook:
                    hook.remove()

        out = world.place() / "out"
        end = child(world.scratch, program.main, program.command(out), lambda: (
            setattr(danube3.Trainer, "take_step", poisoned), setattr(danube3, "MAX_SKIPPED_STEPS", 5)))
        problem = end.problem("no finite gradient in 5 steps in a row", may_succeed=steps < 5) or is_finite(out)
        null = sum(entry.get("grad_norm", 0) is None for entry in contents(out).get("out/metrics.jsonl", []))
        row.add(f"{where} from step {first}", problem or ("" if null == steps else f"{null} steps were left out"))
    return row


def learning_rates(world: World, count: int) -> Row:
    row = Row("numbers", "learning rates that explode: no checkpoint that is not finite")
    program = world.programs()["train"]
    for _ in range(count):
        rate, every = 10.0 ** world.rng.randint(0, 40), world.rng.randint(1, 3)
        out = world.place() / "out"
        flags = ["--learning-rate", rate, "--save-every", every]
        end = child(world.scratch, program.main, [*program.command(out), *flags])
        row.add(f"{rate:g}, --save-every {every}", end.problem("finite") or is_finite(out))
    return row


def numbers(world: World, count: int) -> list[Row]:
    tensors, values = ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"), (
        math.nan, math.inf)
    few = count == 1
    return [*(poisoned_weights(world, value, tensors[:1 if few else 3]) for value in values[:1 if few else 2]),
            *(poisoned_steps(world, steps, value) for steps in (1, 4, 5)[2 * few:] for value in values[few:]),
            learning_rates(world, count)]


# ----------------------------------------------------------------------------------------------------------- endurance
def endurance(world: World, steps: int) -> list[Row]:
    """Memory after a tenth of the steps against that at the end: under 2 % more. Tokens a second, medians of the first
    and the last third: within a factor of 1.5, since other programs use this machine too."""
    program, out, take_step, memory = world.programs()["train"], world.place() / "out", danube3.Trainer.take_step, []

    def measured(run, *batch):
        if run.step in (steps // 10, steps - 1):
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
            (world.scratch / "memory").write_text(" ".join(map(str, memory)))
        return take_step(run, *batch)

    argv = [*program.command(out), "--tokens", 48 * steps, "--save-every", max(1, steps // 4)]
    end = child(world.scratch, program.main, argv, lambda: (
        setattr(danube3.Trainer, "take_step", measured), setattr(danube3, "MAX_EPOCHS", math.inf)))
    rows = [Row("endurance", f"{steps:,} steps: {what}") for what in ("growth of memory", "tokens a second")]
    if problem := end.problem(may_succeed=True) or end.err * bool(end.code):
        rows[0].add("the run", problem)
        return rows
    before, after = map(int, (world.scratch / "memory").read_text().split())
    growth = after / before - 1
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry]
    drift = statistics.median(rates[:steps // 3]) / statistics.median(rates[-steps // 3:])
    rows[0].what += f" ({growth:+.2%} of {before / 2 ** 20:.0f} MB)"
    rows[1].what += f" (last third {1 / drift:.2f}x the first)"
    rows[0].add("memory", "" if growth < 0.02 else f"{growth:+.1%}")
    rows[1].add("speed", "" if drift < 1.5 else f"{drift:.2f} times slower at the end")
    return rows


# ---------------------------------------------------------------------------------------------------------- the whole
ALL = {  # the function, how often in full, and with --quick
    "kills": (kills, 40, 1), "corruption": (corruption, 10 ** 6, 8), "fuzz": (fuzz, 150, 3),
    "resources": (resources, 8, 1), "numbers": (numbers, 20, 1), "endurance": (endurance, 2_000, 50)}


def table(rows: list[Row], seed: int) -> str:
    lines = ["| section | what was tried | times | ended right | lost |", "|---|---|---|---|---|"]
    lines += [f"| {row.section} | {row.what} | {row.times:,} | {row.times - len(row.lost):,} | "
              f"{len(row.lost) or 'nothing'} |" for row in rows]
    return "\n".join([*lines, f"\n(seed {seed}, {sum(row.times for row in rows):,} trials)\n"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(ALL)} [all]")
    parser.add_argument("--quick", action="store_true", help="a few trials of each, in a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table here too")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(ALL):
        parser.error(f"there is no section {', '.join(unknown)}")
    rows, start = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        world = World(Path(folder, "world"))
        for section in args.sections or ALL:
            function, full, quick = ALL[section]
            world.rng, before = random.Random(f"{args.seed}/{section}"), time.monotonic()
            rows += function(world, quick if args.quick else full)
            print(f"{section}: {time.monotonic() - before:.0f} s", flush=True)
    report = table(rows, args.seed)
    print(f"\n{report}\n{time.monotonic() - start:.0f} s in all")
    if args.out:
        args.out.write_text(report)
    return 1 if any(row.lost for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
