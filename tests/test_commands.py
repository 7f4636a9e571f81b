"""Every command in the three READMEs, each once, in a folder of its own beside the programs, with small budgets: code
blocks first, then those in text and tables. Real sizes are only planned (--dry-run).

What cannot be run here is listed in ELSEWHERE with the reason, and checked as far as that goes: benchmarks run for
minutes or need other packages, so only their flags are looked up; torchrun's own runs are in test_distributed.py.
"""

import gzip
import importlib.metadata
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import bench_classify
import pytest
from conftest import ROOT, call

import danube3
from data.read import check_turns

pytestmark = pytest.mark.slow

READMES = [(ROOT / name).read_text() for name in ("README.md", "data/README.md", "tests/README.md")]
# What stands in the READMEs for a name of the reader's own.
NAMES = {
    "FOLDER": "out/model",
    "FILE": "out/model.gguf",
    "SHARDS": "data/mine",
    "conversations.jsonl": "data/toy/chat.jsonl",
    "4b-int4": "out/toy-chat-int4",
    "MERGED": "out/merged",
    "[": "",
    "]": "",
}
# A pattern of commands, and what makes such a command short.
BUDGETS = (
    (r"^python train.py( --seed|$)", "--tokens 4k"),
    (r"--epochs [238]", "--epochs 1"),
    (r"--config (60m|500m|4b)(?!.*--layers)(?!.*--dry-run)", "--dry-run"),
    (r"--layers 2 --sequence-length", "--layers 1 --tokens 256 --tokens-per-step 128"),
    (r"--calibrate", "--samples 8"),
)
ELSEWHERE = {
    r"--open": "streams from the internet: test_prepare.py runs it with data sets of its own",
    r"^python -m pytest": "this is it",
    r"--csv out/": "trains for 40 minutes: test_experiment.py does one short run",
    r"out/experiment-toy": "needs those runs: test_arena.py compares small models",
    r"^python tests/(bench_\w+|mutate|campaign|exercises).py": "takes minutes, or other packages",
}


def commands():
    """Those in code blocks, and those inside the text and the tables."""
    text = re.sub(r"^```.*?^```$", "", "\n".join(READMES), flags=re.M | re.S)  # diagrams
    blocks = "".join(re.findall(r"^ {4}.*\n", text, re.M))
    lines = re.sub(r"\\\n\s*", "", blocks).splitlines()
    lines += re.findall(r"`([^`]+)`", text.replace("\n", " "))
    starts = re.compile(r"(?:/usr/bin/time -v )?((?:python|torchrun|pip|echo|hf|llama-server|curl) .*)")
    parts = [" ".join(part.split()) for line in lines for part in line.split(" && ")]
    found = [starts.fullmatch(part) for part in parts]
    return list(dict.fromkeys(match[1].replace(" \\|", " |") for match in found if match))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, toy_data):
    """The programs, a short toy world, and the files that the READMEs take as the reader's."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("danube3.py", "train.py", "sample.py", "quantize.py", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    for path in (ROOT / "data").iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / "data" / path.name)
    shutil.copytree(toy_data, folder / "data" / "toy", ignore=shutil.ignore_patterns("SHA256SUMS"))
    for path in (folder / "data" / "toy").glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:24]))
    bench_classify.write_preferences(folder / "out/preferences", 0)
    for path in (folder / "out" / "preferences").glob("*.csv"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:25]))
    words = [
        f"The {a} {b} of the {c}."
        for a in "old new red".split()
        for b in "mill well".split()
        for c in "hill dale".split()
    ]
    for place in ("texts/web", "papers", "stories"):
        (folder / place).mkdir(parents=True)
        for n, word in enumerate(words * 3):
            (folder / place / f"{n}.txt").write_text(f"{word} In the {place} it is told {n} times. " * 20)
    (folder / "wiki.test.raw").write_text(" ".join(words) * 20)
    with gzip.open(folder / "wiki.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"{word} {n} " * 40}) + "\n" for n, word in enumerate(words * 20))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho " * 60}]
    (folder / "chats.jsonl").write_text(
        "".join(
            json.dumps({"messages": [*talk, {"role": "user", "content": str(n)}, talk[1]]}) + "\n" for n in range(200)
        )
    )
    talk = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    rows = [talk, {"instruction": "Hi", "output": "Ho"}, {"prompt": "Hi", "completion": "Ho"}, {"messages": None}]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    for name in ("reviews.csv", "more.csv"):
        lines = [f"The mill was {word},{stars}\n" for word, stars in (("old", 2), ("new", 5)) for _ in range(9)]
        (folder / name).write_text("".join(["review,stars\n", *lines]))
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (folder / "books").mkdir()
    pq.write_table(
        pyarrow.table({"text": [f"Book {n}: {words[n % 8]} " * 40 for n in range(99)]}), folder / "books/c.parquet"
    )
    return folder


def check_elsewhere(command):
    """The files and flags that a command names exist."""
    _, *parts = shlex.split(command)
    source = (ROOT / "tests" / "conftest.py").read_text() if "pytest" in parts else ""
    for part in parts:
        if part.endswith(".py"):
            source += (ROOT / part).read_text()
        elif part.startswith("--"):
            assert f'"{part}"' in source, f"{command}: no flag {part}"


def check_packages(command):
    """Requirements exist, and what is not in them is a package that this project names elsewhere too."""
    named = {re.split(r"[=<>\[;]", line)[0] for name in ("requirements.txt", "tests/requirements.txt")
             for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")}  # fmt: skip
    for flag, part in zip(["", *shlex.split(command)], shlex.split(command)):
        if flag == "-r":
            assert (ROOT / part).is_file()
        elif part not in ("pip", "install", "-r"):
            package = part.split("[")[0]
            known = package in {*named, "huggingface_hub"} and importlib.metadata.version(package)
            assert known or any(f"pip install {package}" in path.read_text().replace('"', "")
                                for path in (ROOT / "tests").glob("bench_*.py")), part  # fmt: skip


def check_download(command, workspace):
    """As after a download: with the files in place, `hf` finds nothing to do. Later commands open the folder."""
    shutil.copytree(danube3.find_checkpoint(workspace / "out/toy-chat"), workspace / "out/500m-chat")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(shlex.split(command), cwd=workspace, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "out/500m-chat" in result.stdout, result.stderr


def check_server(command, workspace):
    """The file is there, or the request is a conversation. (tests/bench_server.py asks a server.)"""
    program, *parts = shlex.split(command)
    if program == "llama-server":
        assert parts[0] == "-m" and (workspace / parts[1]).read_bytes().startswith(b"GGUF")
        return
    address, *rest = parts
    flags = dict(zip(rest[::2], rest[1::2], strict=True))
    assert address.endswith("/v1/chat/completions") and flags["-H"] == "Content-Type: application/json"
    assert len(check_turns(json.loads(flags["-d"])["messages"])) == 1


@pytest.mark.parametrize("command", commands())
def test_command(command, workspace, monkeypatch):
    if command.startswith("pip "):
        return check_packages(command)
    if command.startswith(("llama-server ", "curl ")):
        return check_server(command, workspace)
    if command.startswith("hf "):
        return check_download(command, workspace)
    if any(re.search(pattern, command) for pattern in ELSEWHERE):
        return check_elsewhere(command)
    for name, value in NAMES.items():
        command = command.replace(name, value)
    command = re.sub(r"\bN\b", "1", command)
    said, _, command = command.rpartition(" | ")
    torchrun = re.match(r"torchrun .*?(?=train.py)", command)
    if torchrun:  # the plan for so many GPUs
        gpus = math.prod(map(int, re.findall(r"--n(?:nodes|proc-per-node) (\d+)", torchrun[0])))
        command = f"{command.replace(torchrun[0], 'python ')} --gpus {gpus}"
    budget = " ".join(flags for pattern, flags in BUDGETS if re.search(pattern, command))
    _, program, *flags = shlex.split(f"{command} {budget}")
    if not (workspace / "out/model").exists() and re.search("out/model|h2oai/", command):
        shutil.copytree(workspace / "out/toy-chat", workspace / "out/model")
    monkeypatch.setattr(danube3, "download", lambda name: workspace / "out/model")  # a published model
    monkeypatch.setattr(sys, "stdin", io.StringIO(said.removeprefix("echo ") or "Where does Ada live?\n"))
    result = call(program, *flags, folder=workspace)
    assert result.returncode == 0, f"{command}\n{result.stderr}"
    answered = result.stdout if "--chat" in flags else result.stdout.strip()  # a hardly trained model may say "\n"
    assert answered


def test_the_example_from_python(workspace, monkeypatch, capsys):
    """The block of Python in README.md, after the tour."""
    blocks = re.findall(r"^```python\n(.*?)^```$", READMES[0], re.M | re.S)
    assert len(blocks) == 1
    monkeypatch.chdir(workspace)
    exec(blocks[0], {})
    assert "Where does Orsa Tarbeck live?" in capsys.readouterr().out


def test_commands_were_found():
    found = commands()
    assert len(found) > 40 and "python train.py" in found
    assert any("prepare.py --out data/mine" in command and "'books/*.parquet'" in command for command in found)
