"""Is anything ever lost? `python tests/campaign.py` kills, damages, starves and confuses our programs.

    python tests/campaign.py [kills corruption fuzz resources numbers endurance] [--quick] [--seed N] [--out]

Each trial runs a program in a child, forked from this process, which has loaded torch once. Kills, full disks
and damage that checksums cover must leave the bytes of an undisturbed run, or one line of error. All others
must end in success or one line of error. What does not is lost: it is printed with what repeats it (the seed
fixes all but the moments of the clock), and a table counts it. Linux only (fork, /proc).
"""
# ruff: noqa: E402

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from itertools import product
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from small_world import RESUME, World, at_operation, contents, difference, find, in_each_step, problem

import danube3


# ---- Kills
def half_written(place, name, expected):
    """What has the name of something whole and is not: a folder must agree with its SHA256SUMS."""
    for path in (*place.glob("out/step-*[0-9]"), *place.glob("out-merged"), *place.glob("out")):
        whole = contents(path) == expected or (path.name == "out" and name in RESUME)
        if path.is_dir() and not whole:
            command = ["sha256sum", "--check", "SHA256SUMS"]
            whole = subprocess.run(command, cwd=path, capture_output=True).returncode == 0
        if not whole:
            return f"{path.name} is there, and not whole"
    log = place / "out/metrics.jsonl"
    if log.exists() and b'"step": 5' in log.read_bytes() and not danube3.checkpoints_in(place / "out"):
        return "a run that saved every third step has no checkpoint after the fifth"

def interrupt(world, name, place, expected, before, code, seconds=0, again=None):
    """Start a command that `before` ends with `code`, or a kill after some seconds. Look at what it left,
    make room, go on as the README says (with `again` twice), and compare. -> what was lost"""
    process = world.start(name, place / "out", before=before)
    if seconds:
        time.sleep(seconds)
        process.kill()
    end = world.wait(process)
    mount(world.disk, "remount,size=256m")
    if end.returncode not in (0, code) or (end.returncode == 2 and problem(end)):
        return f"{end}"
    for kill in [again, None] if again else [None]:
        if lost := half_written(place, name, expected):
            return lost
        end = world.run(name, place / "out", *RESUME.get(name, []), before=kill)
        if "nothing to resume" in end.stdout:
            end = world.run(name, place / "out", before=kill)
    if end.returncode and "already exists" not in end.stdout:
        return f"going on: {end}"
    return difference(contents(*place.iterdir()), expected)

def kill(world, name, part, expected, operations, seconds):
    """Half of the moments are file operations, most of which belong to checkpoints, half are times. A third
    of the runs is killed again while it goes on."""
    place, again, number, delay = world.place(), None, 1 + int(part * operations), 0
    if world.rng.random() < 1 / 2:
        number, delay = 0, part * seconds
    if world.rng.random() < 1 / 3:
        again = partial(at_operation, world.rng.randint(1, 40), place, signal.SIGKILL)
    first = partial(at_operation, number, place, signal.SIGKILL)
    return interrupt(world, name, place, expected, first, -signal.SIGKILL, delay, again)

KILLED = {"train": "toy training", "prepare": "data/prepare.py", "quantize": "quantize.py",
          "gguf quantize0": "GGUF export", "chat": "chat fine-tuning",
          "adapters": "chat with adapters, and merging them"}

def kills(world, count, only=()):
    for name in only or list(KILLED)[:6 if count > 1 else 3]:
        what = f"{KILLED[name]}: SIGKILL at a random moment, then the same again"
        yield from world.disturb(what, name, count, kill)

# ---- Damaged files
HOW = ("truncated", "flipped", "emptied", "swapped", "removed")
CHECKPOINT = "model.safetensors config.json generation_config.json tokenizer.model tokenizer_config.json"
STATE = "training_state.safetensors training_state.json"
INT4 = "model-00001.safetensors model.safetensors.index.json config.json"
ADAPTERS = "adapter_model.safetensors adapter_config.json base.sha256"
SHARDED = "meta.json tokenizer.model web-train-00000.bin web-train-00001.bin other-val-00000.bin"
TARGETS = (  # a folder, the same of another run, the command that reads it, files in it or in its checkpoint
    ("train0", "train1", "greedy", CHECKPOINT), ("train0", "train1", "quantize", CHECKPOINT),
    ("half", "train1", "resume", f"{CHECKPOINT} {STATE} metrics.jsonl"), ("data0", "data1", "train", SHARDED),
    ("texts0", "texts1", "chat", "lines.jsonl"), ("texts0", "texts1", "eval", "lines.jsonl"),
    ("adapters0", "adapters1", "greedy adapters0", ADAPTERS),
    ("quantize0", "quantize1", "greedy quantize0", INT4), ("quantize0", "quantize1", "gguf quantize0", INT4))

def damage(world, other, name, how, checksums, folder):
    for sums in [] if checksums else folder.rglob("SHA256SUMS"):
        sums.unlink()
    path, twin = find(folder, name), find(world.folder / other, name)
    data = path.read_bytes()
    flipped, at = bytearray(data), world.rng.randrange(1, len(data))
    flipped[at] ^= 1 << world.rng.randrange(8)
    changed = {"truncated": data[:at], "flipped": flipped, "emptied": b"", "swapped": twin.read_bytes()}
    path.unlink()
    if how in changed:
        path.write_bytes(changed[how])

class Hostile:
    def __reduce__(self):
        return os.abort, ()  # what unpickling would call

def plant(name, folder):
    torch.save(Hostile(), find(folder, name))
    danube3.write_checksums(find(folder, name).parent)

def corruption(world, count):
    """With checksums, whatever is noticed is named, and whatever is not leaves the result as it is. Without
    (as in a folder from the Hub) only a clean end can be asked for. People may change their .jsonl."""
    pristine = cache(lambda source, reader: world.attempt(reader, source=source)[1])
    trials = [(checksums, how, *target, name) for checksums, how in product((True, False), HOW)
              for *target, names in TARGETS for name in names.split()]
    for i in sorted(world.rng.sample(range(len(trials)), min(count, len(trials)))):
        checksums, how, source, other, reader, name = trials[i]
        harm = partial(damage, world, other, name, how, checksums)
        end, made = world.attempt(reader, source=source, harm=harm)
        what, lost = "the same in folders without SHA256SUMS: no traceback", problem(end)
        if checksums:
            what = f"a file {how}: of checkpoint, run, data, adapters, int4 folder, jsonl"
            lost = problem(end, name, str(find(world.folder / source, name).parent))
            if end.returncode == 0 and not name.endswith(".jsonl"):
                lost = lost or difference(made, pristine(source, reader))
        yield what, f"{reader} reads {source}/{name}, {how}, {checksums=}", lost
    for reader, name in zip(("sample half", "resume", "resume"), ("model.safetensors", *STATE.split())):
        harm, words = partial(plant, name), [name.partition(".")[0]]
        lost = world.fault(reader, source="half", harm=harm, words=words, may_succeed=False)
        yield "a hostile pickle in place of a file, with the right checksum: nothing runs", name, lost

# ---- Fuzzing
KEPT = "help out merge gguf compile workers".split()  # flags that would write elsewhere, or take minutes
VALUES = ("0 1 2 3 -1 16 48 4k 4T nan inf -inf 1e400 1e-320 1.5 x 0x10 \u0663 \udcff auto on cpu meta cuda:7 "
          "vulkan staged toy /dev/null / int8 float16 999999999999999999 9999999999999999999999  ").split(" ")
VALUE = (st.sampled_from(VALUES) | st.integers(-3, 64).map(str)
         | st.text(max_size=8).filter(lambda text: "\0" not in text))
SPEECH = st.text(max_size=12) | st.sampled_from("</s> <|answer|> \ud83d \u2028 /save /reset Ada".split(" "))
ODD = st.sampled_from(
    [2**31, 2**61, 2**63, 10**12, 10**5, -1, 0, 1, 64, 96, None, [], {}, "x", 1e300, [64], [4, 0], [0, 256]])
KEYS = st.sampled_from("role content messages text prompt choices answer rope_type".split()) | SPEECH
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-2, 3) | st.floats() | ODD | SPEECH,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=5)
TURNS = st.lists(SPEECH, min_size=1, max_size=6).map(lambda texts: [
    {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)])
LINE = ANYTHING | st.fixed_dictionaries({}, optional={
    "messages": TURNS | ANYTHING, "text": SPEECH | ANYTHING, "prompt": SPEECH | ANYTHING,
    "choices": st.lists(SPEECH, max_size=3) | ANYTHING, "answer": st.integers(-1, 3) | ANYTHING})
TYPES = st.sampled_from(["F32", "F64", "F16", "BF16", "I8", "U64", "F8_E4M3"])
TENSOR = ANYTHING | st.dictionaries(
    st.sampled_from(["dtype", "shape", "data_offsets"]), TYPES | ANYTHING, min_size=1, max_size=2)

def examples(world, count, *strategies):
    """What hypothesis draws."""
    drawn = []
    @seed(world.rng.randrange(2**32))
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(st.tuples(*strategies))
    def collect(values):
        drawn.append(values)
    collect()
    return drawn

def change(name, changes, length, folder):
    """Change config.json, or the header of a safetensors file and perhaps its length. Checksums go."""
    find(folder, "SHA256SUMS").unlink()
    path, start = find(folder, name), 8 * name.endswith(".safetensors")
    data = path.read_bytes()
    end = start + int.from_bytes(data[:8], "little") if start else len(data)
    values = json.loads(data[start:end])
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both else value
    text = json.dumps(values).encode()
    size = (len(text) if length is None else length).to_bytes(8, "little")
    path.write_bytes(size[:start] + text + data[end:])

def fuzz(world, count):
    for name in ("train", "sample", "chat", "prepare", "quantize")[:5 if count > 3 else 2]:
        known = re.findall(r"^  --([\w-]+)( \S+)?", world.attempt(name, "--help")[0].stdout, re.MULTILINE)
        flag = st.tuples(st.sampled_from([flag for flag in known if flag[0] not in KEPT]), VALUE)
        for drawn, in examples(world, count, st.lists(flag, min_size=1, max_size=3)):
            flags = [f"--{flag}={value}" if takes_one else f"--{flag}" for (flag, takes_one), value in drawn]
            yield f"flags of {name}: any value for one to three", f"{flags}", world.fault(name, *flags)
    folder, path = danube3.find_checkpoint(world.folder / "train0"), world.scratch / "lines.jsonl"
    names = [*danube3.read_json(folder / "config.json"), "rope_scaling", "quantization_config"]
    config = st.dictionaries(st.sampled_from(names), ODD | ANYTHING, min_size=1, max_size=3)
    for drawn in examples(world, 2 * count, config, st.none()):
        lost = world.fault("sample", source="train0", harm=partial(change, "config.json", *drawn))
        yield "config.json: any values", f"{drawn}", lost
    names = st.sampled_from([*danube3.read_tensors(folder / "model.safetensors"), "__metadata__", "x"])
    header = st.dictionaries(names, TENSOR, min_size=1, max_size=2)
    for drawn in examples(world, count, header, st.none() | st.integers(0, 2**64 - 1)):
        lost = world.fault("sample", source="train0", harm=partial(change, "model.safetensors", *drawn))
        yield "safetensors: any header", f"{drawn}", lost
    for drawn, in examples(world, count, st.lists(LINE.map(json.dumps) | SPEECH, max_size=4)):
        path.write_text("\n".join(drawn), errors="surrogatepass")
        commands = ("eval", "--eval", path), ("chat", "--dry-run", "--chat", path), ("prepare", f"web={path}")
        lost = "".join(world.fault(*command) for command in commands)
        yield "jsonl of any lines, read as chat, quiz and text", f"{drawn}", lost
    for drawn, in examples(world, count, st.lists(SPEECH, max_size=5)):
        path.write_text("\n".join(drawn), errors="surrogatepass")
        lost = world.fault("talk", before=lambda: setattr(sys, "stdin", open(path)))
        yield "chat: any lines typed", f"{drawn}", lost
    for _ in range(max(1, count // 10)):
        yield "resume with changed flags: refused, or the same bits", *resume_with(world)

FREE = ("--save-every 5", "--recompute on", "--save-every 1", "")  # may change
FIXED = ("--seed 3", "--tokens 1008", "--learning-rate 0.1", "--mixture constant", "--layers 2",
         "--sequence-length 24", "--tokens-per-step 96", "--data data1", "--init train0")

def resume_with(world):
    drawn = world.rng.sample(FREE + FIXED, world.rng.randint(1, 3))
    flags = re.sub(r"\b(data1|train0)\b", rf"{world.folder}/\1", " ".join(drawn)).split()
    end, made = world.attempt("resume", *flags, source="half")
    words = "was made with another", "is no toy", "is no whole number"
    lost = problem(end, *words, may_succeed=set(drawn) <= set(FREE))
    weights = find(world.folder / "train0", "model.safetensors")
    same = made.get(f"half/{weights.parent.name}/{weights.name}") == weights.read_bytes()
    return f"{drawn}", lost or "other weights" * (end.returncode == 0 and not same)

# ---- Full disks, little memory, two at once
def mount(folder, options):
    command = f"mount -t tmpfs -o {options} tmpfs {folder}"
    return subprocess.run(command, shell=True, capture_output=True).returncode == 0

def fill(world, name, part, expected, operations, seconds):
    """With more room the same command ends in the same bytes. Where nothing could be mounted, the size of a
    file is limited, which ends a write in the same place."""
    size = 4096 + int(part * sum(map(len, expected.values())) * (2 if name in RESUME else 1))
    place, limit = world.place(world.disk), None
    if not mount(world.disk, f"remount,size={size}"):
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size // 4, size // 4))
    return interrupt(world, name, place, expected, limit, 2)

def meet(world, name, part, expected, operations, seconds):
    """The first is stopped at a file operation, the second refused, and the first goes on to its end. Not at
    the first two operations, which make and open what is locked: until then nobody has it."""
    place, number = world.place(), max(3, int((0.2 + 0.6 * part) * operations))
    first = world.start(name, place / "out", before=partial(at_operation, number, place, signal.SIGSTOP))
    os.waitpid(first.pid, os.WUNTRACED)
    begun, second = any(place.iterdir()), world.run(name, place / "out", *RESUME.get(name, []))
    os.kill(first.pid, signal.SIGCONT)
    end = world.wait(first)
    lost = f"{end}" if end.returncode else difference(contents(*place.iterdir()), expected)
    refused = problem(second, "in use", "already exists", "nothing to resume", may_succeed=False)
    return lost or (begun and refused)

def resources(world, count):
    mounted, few = mount(world.disk, "size=1m"), count == 1
    how = "the disk full (tmpfs)" if mounted else "a file too large (RLIMIT_FSIZE; no tmpfs could be mounted)"
    try:
        for name in ("train", "gguf quantize0", "chat", "adapters", "prepare", "quantize")[:2 if few else 6]:
            what = f"{name.split()[0]}: {how}, then room made and the same again"
            yield from world.disturb(what, name, count, fill)
        for name in ["gptq", *KILLED][:(2 if few else 7) * mounted]:
            out = world.place(world.disk) / "out"
            mount(world.disk, "remount,ro")
            lost = problem(world.run(name, out), str(out), may_succeed=False)
            mount(world.disk, "remount,rw")
            yield "a read-only folder for the output", name, lost
    finally:
        if mounted:
            subprocess.run(["umount", world.disk], check=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    def before():  # little more address space than this process has, while sequences want gigabytes
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
        danube3.MAX_EPOCHS = float("inf")
    for n in [2**16, 2**17, 2**18, 2**19][:count]:
        flags = ["--tokens-per-step", 16 * n, "--micro-batch-size", n, "--tokens", 64 * n]
        lost = world.fault("train", *flags, before=before, words=["--micro-batch-size"], may_succeed=False)
        yield "out of memory: one line that names the flag that helps", f"{n} sequences", lost
    for name in ("train", "prepare", "chat", "quantize", "gguf quantize0")[:2 if few else 5]:
        what = "two at once with one --out: the second refused, the first unharmed"
        yield from world.disturb(what, name, min(4, count), meet)

# ---- Numbers that are not finite
READERS = ("resume", *(f"{name} half" for name in "sample greedy eval int8 gptq gguf chat init".split()))
TENSORS = ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")

def not_finite(made):
    """Checkpoints of a run that do not hold numbers only."""
    names = [name for name in made if name.endswith("/model.safetensors")]
    loaded = [(name, weight) for name in names for weight in safetensors.torch.load(made[name]).values()]
    return ", ".join(name for name, weight in loaded if not weight.isfinite().all())

def poison(value, tensor, folder):
    """Put a number into a checkpoint and its training state, and make their checksums anew."""
    for file, name in (("model.safetensors", tensor), ("training_state.safetensors", f"weights.{tensor}")):
        tensors = safetensors.torch.load_file(find(folder, file))
        tensors[name].view(-1)[7] = value
        safetensors.torch.save_file(tensors, find(folder, file), metadata={"format": "pt"})
    danube3.write_checksums(danube3.find_checkpoint(folder))

def poisoned_steps(world, steps, value, where, first):
    """A gradient, or what flows through the layers (as from a bad batch), is not finite in some steps. Up to
    four in a row are left out. The fifth ends the run, and the checkpoint before stays."""
    def action(run):
        factor = lambda x: x * (value if first <= run.step < first + steps else 1)
        if run.step == 0 and where == "gradient":
            run.model.lm_head.weight.register_hook(factor)
        elif run.step == 0:
            run.model.model.norm.register_forward_hook(lambda module, args, x: factor(x))
    end, made = world.attempt("train", before=partial(in_each_step, action, MAX_SKIPPED_STEPS=5))
    skipped = made.get("made/metrics.jsonl", b"").count(b'"grad_norm": null')
    lost = problem(end, "no finite gradient in 5 steps in a row", may_succeed=steps < 5) or not_finite(made)
    return lost or f"{skipped} steps were left out" * (skipped != steps)

def numbers(world, count):
    few, values = count == 1, (float("nan"), float("inf"))
    for value, tensor, name in product(values[:2 - few], TENSORS[:3 - 2 * few], READERS[:9 - 7 * few]):
        words = [f"weights.{tensor} does not fit this run" if name == "resume" else "not finite"]
        harm = partial(poison, value, tensor)
        lost = world.fault(name, source="half", harm=harm, words=words, may_succeed=False)
        yield f"{value} among the weights of a checkpoint", f"{tensor}, {name}", lost
    places = (("gradient", 6), ("batch", 7), ("batch", 0))
    for steps, value, (where, first) in product((1, 4, 5)[2 * few:], values[few:], places):
        what = f"{value} in a gradient, and in a batch, {steps} steps in a row"
        yield what, f"{where} from step {first}", poisoned_steps(world, steps, value, where, first)
    for _ in range(count):
        flags = f"--learning-rate 1e{world.rng.randint(0, 40)} --save-every {world.rng.randint(1, 3)}"
        end, made = world.attempt("train", *flags.split())
        lost = problem(end, "finite") or not_finite(made)
        yield "learning rates that explode: no checkpoint that is not finite", flags, lost

# ---- Endurance, and the whole
def endurance(world, steps):
    """Memory after a tenth of the steps against that at the end: under 2 % more. Steps a second, medians of
    the first and the last third: within a factor of 1.5, since other programs use this machine too."""
    path, third = world.scratch / "steps", steps // 3
    def action(run):
        with open(path, "a") as file:
            print(time.monotonic(), Path("/proc/self/statm").read_text().split()[1], file=file)
    end, _ = world.attempt("train", "--tokens", 48 * steps, "--save-every", max(1, steps // 4),
                           before=partial(in_each_step, action, MAX_EPOCHS=float("inf")))
    rows = [[float(number) for number in line.split()] for line in path.read_text().splitlines()]
    times, pages = torch.tensor(rows, dtype=torch.float64).T
    growth, seconds = float(pages[-1] / pages[steps // 10]) - 1, times.diff()
    speed = float(seconds[:third].median() / seconds[-third:].median())
    size = f"{growth:+.2%} of {pages[-1] * resource.getpagesize() / 2**20:.0f} MB"
    lost = problem(end) or end.stdout * end.returncode or f"{growth:+.1%}" * (growth >= 0.02)
    yield f"{steps:,} steps: growth of memory ({size})", "memory", lost
    lost = f"{speed:.2f} times as fast at the end" * (speed < 2 / 3)
    yield f"{steps:,} steps: tokens a second (last third {speed:.2f}x the first)", "speed", lost

ALL = {  # the function, how often in full, and with --quick
    "kills": (kills, 40, 1), "corruption": (corruption, 10**6, 8), "fuzz": (fuzz, 150, 3),
    "resources": (resources, 8, 1), "numbers": (numbers, 20, 1), "endurance": (endurance, 2_000, 200)}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(ALL)} [all]")
    parser.add_argument("--quick", action="store_true", help="a few trials of each, in a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table here too")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(ALL):
        parser.error(f"there is no section {', '.join(unknown)}")
    rows, begun = {}, time.monotonic()  # times and losses of each row
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        world = World(Path(folder, "world"))
        for section in args.sections or ALL:
            function, full, quick = ALL[section]
            world.rng, start = random.Random(f"{args.seed}/{section}"), time.monotonic()
            for what, label, lost in function(world, quick if args.quick else full):
                times, losses = rows.get((section, what), (0, 0))
                rows[section, what] = times + 1, losses + bool(lost)
                if lost:
                    print(f"LOST  {section}, {what}, {label}: {lost}", flush=True)
            print(f"{section}: {time.monotonic() - start:.0f} s", flush=True)
    table = ["| section | what was tried | times | ended right | lost |", "|---|---|---|---|---|"]
    for (section, what), (times, lost) in rows.items():
        table.append(f"| {section} | {what} | {times:,} | {times - lost:,} | {lost or 'nothing'} |")
    table.append(f"\n(seed {args.seed}, {sum(times for times, _ in rows.values()):,} trials)\n")
    report = "\n".join(table)
    print(f"\n{report}\n{time.monotonic() - begun:.0f} s in all")
    if args.out:
        args.out.write_text(report)
    return 1 if any(lost for _, lost in rows.values()) else 0

if __name__ == "__main__":
    sys.exit(main())
