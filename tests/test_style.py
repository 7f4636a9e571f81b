"""The rules that make danube3.py a text to read: types everywhere, lines and functions of a size that fits a screen,
and a word on what a function does or on the shapes that it takes."""

import ast
import io
import math
import tokenize

import pytest
from conftest import ROOT, run

PROGRAMS = [ROOT / name for name in ("danube3.py", "train.py", "sample.py", "quantize.py")]
PROGRAMS += sorted((ROOT / "data").glob("*.py"))
TEXT = (ROOT / "danube3.py").read_text()
TREE = ast.parse(TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["mypy", "ruff check ."])
def test_tools_find_nothing(tool):
    """With the settings of pyproject.toml, and in the versions of tests/requirements.txt. (mypy takes a minute the
    first time, since it reads torch too.)"""
    result = run("-m", *tool.split(), timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy_is_given_every_program():
    """mypy reads the files that pyproject.toml lists: a new one must be listed too."""
    settings = (ROOT / "pyproject.toml").read_text()
    for path in PROGRAMS:
        assert f'"{path.relative_to(ROOT).as_posix()}"' in settings, path


# Lines of each file, at most. data/toy.py and data/experiment.py may be of any length.
LINES = {"danube3.py": 1_750, "train.py": 480, "sample.py": 450, "quantize.py": 450, "read.py": 250,
         "prepare.py": 400, "arena.py": 120}
# Dense expressions per 100 lines, at most; 6 in the other files.
DENSITY = {"danube3.py": 4, "toy.py": 12, "experiment.py": 12}
DENSE = (ast.IfExp, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp, ast.NamedExpr, ast.Lambda)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_width_of_lines(path):
    long = [number for number, line in enumerate(path.read_text().splitlines(), start=1) if len(line) > 110]
    assert not long, f"{path.name}: lines {long}"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_length_and_density(path):
    """Dense are comprehensions, generator and conditional expressions, lambdas and :=. No ; joins statements."""
    text = path.read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(text.splitlines()) <= LINES.get(path.name, math.inf)
    dense = sum(isinstance(node, DENSE) for node in ast.walk(ast.parse(text)))
    assert 100 * dense / len(lines) <= DENSITY.get(path.name, 6)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    assert not [token.start for token in tokens if token.type == tokenize.OP and token.string == ";"]


def test_danube3_is_narrow():
    lines = [line for line in TEXT.splitlines() if line.strip()]
    assert sum(map(len, lines)) / len(lines) <= 62 and len(TEXT.encode()) <= 95_000


def body_lines(node):
    """Lines of a definition without its signature."""
    return node.end_lineno - node.body[0].lineno + 1


def explained(node):
    """A docstring, or a comment in the signature: most often the shapes."""
    signature = TEXT.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    return ast.get_docstring(node) is not None or any("  # " in line for line in signature)


def test_functions_of_danube3_fit_a_screen():
    """Nested ones too: 50 lines."""
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 100
    assert not [f"{node.name}: {body_lines(node)}" for node in functions if body_lines(node) > 50]


def test_functions_and_classes_of_danube3_are_explained():
    """Left out are private ones, those of at most three lines, whose name says it all, and those within functions. A
    class may instead say the shapes of its forward."""
    silent = []
    for owner in (TREE, *(node for node in TREE.body if isinstance(node, ast.ClassDef))):
        for node in owner.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            forward = [each for each in node.body if getattr(each, "name", "") == "forward"]
            if body_lines(node) > 3 and not any(map(explained, [node, *forward])):
                silent.append(node.name)
    assert not silent
