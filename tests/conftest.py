"""What the tests share: small models with random weights (norm gains too), a small tokenizer, small data."""

import contextlib
import dataclasses
import hashlib
import io
import os
import runpy
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch

import danube3

left_out = 0  # slow tests that were not run


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless --all is given, or files are named")


def pytest_collection_modifyitems(config, items):
    """Without --all and without the name of a file, only the quick tests run."""
    global left_out
    if not config.getoption("--all") and config.args_source != pytest.Config.ArgsSource.ARGS:
        slow = [item for item in items if item.get_closest_marker("slow")]
        left_out = len(slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


def pytest_unconfigure(config):
    if left_out and not config.getoption("--collect-only"):
        print(f"{left_out} slow tests were left out; to run all: python -m pytest --all")


ROOT = Path(__file__).resolve().parent.parent
TINY = danube3.DanubeConfig(
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    initializer_range=0.2,
    vocab_size=330,
    max_position_embeddings=64,
)


def random_model(config, seed=0, dtype=torch.float32):
    """A model whose norm weights are random too: with ones, code that ignores them would pass."""
    model = danube3.Danube3.new(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype).eval()


def transformers_model(config, weights, **changes):
    """The independent implementation, with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    names = dataclasses.asdict(config)
    rope = {"rope_type": "default", "rope_theta": names.pop("rope_theta")}
    their_config = LlamaConfig(**{**names, **changes}, rope_parameters=rope, tie_word_embeddings=False)
    with no_init_weights():
        theirs = LlamaForCausalLM(their_config)
    theirs.load_state_dict(weights)
    return theirs.eval()


class NoData:
    """The data of a run that is not going to train."""

    fingerprint = {}
    total_steps = 20

    def __init__(self, config=danube3.TRAIN_CONFIGS["toy"]):
        self.config = config

    def stage(self, step):
        return "stage 1"


def run(*command, env=None, timeout=300):
    """A program of ours, as a user runs it, in the repository's root. -> CompletedProcess with text"""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )


def call(program, *arguments, folder=ROOT):
    """The same within this process, which saves the seconds of starting Python and torch. -> as run()"""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder):
        with unittest.mock.patch.object(sys, "argv", [program, *map(str, arguments)]):
            try:
                runpy.run_path(program, run_name="__main__")
            except SystemExit as exit:
                code = exit.code or 0
    return subprocess.CompletedProcess([program, *arguments], code, out.getvalue(), err.getvalue())


def digest(path):
    """What files are compared by: pytest needs an hour to show where 4 MB of bytes differ."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_line_error(result):
    """Checks that a run ended as a user's mistake should: code 2, one line on stderr, no traceback. -> that line"""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def conversations_in(path, fold_system=False):
    """The conversations of a file, all of which must be usable."""
    from data import read

    return read.read_conversations(read.read_rows(path), fold_system, strict=True)[0]


SENTENCES = [
    f"{name} lives in {town}.\nShe has {n} geese;  he keeps none: \u00e9t\u00e9 \U0001f600 <s> </s> <|answer|>."
    for n, (name, town) in enumerate([("Ada", "Marrow"), ("Brook", "Ferrin"), ("Celia", "Oxley"), ("Dunn", "Pell")])
]


@pytest.fixture(autouse=True)
def seeded():
    """torch.rand and its kin repeat themselves; tests that want new numbers in each run draw and print a seed."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """330 pieces, the size of TINY's vocabulary."""
    from data import toy

    return toy.train_tokenizer(SENTENCES * 3, 330, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """The toy world as train.py makes it."""
    from data import toy

    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.make(folder)
    return folder
