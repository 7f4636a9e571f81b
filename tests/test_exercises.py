"""The exercises: the plain files are not accepted, the solution is, and a plausible mistake is not."""

import re
import sys

import exercises
import pytest
import solutions
from conftest import ROOT, call

pytestmark = pytest.mark.slow

SOURCES = {file: (ROOT / file).read_text(encoding="utf-8") for file in solutions.FILES}
BREAKS = [name for name in exercises.EXERCISES if name.startswith("break-")]
BUILDS = [name for name in exercises.EXERCISES if name not in BREAKS]

# name: (in the solved files, the mistake, words of the verdict)
MISTAKES = [
    ("cache-bytes", "2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim\n",
     "2 * config.num_hidden_layers * config.hidden_size\n", "take"),
    ("third-role", '("assistant", "tool")', '("assistant", "tool", "user")', "user, tool, user should be refused"),
    ("third-role", """'tool' %}{{ '<|tool|>'""", """'tool' %}{{ '<|answer|>'""", "CHAT_TEMPLATE"),
    ("third-role", 'if role == "assistant":', 'if role != "user":', "labels of the tool"),
    ("interleaved-rotary", "rotated = torch.stack(", "return torch.cat(", "angle"),
    ("sliding-window", "    if window:\n", "    if window and T > 1:\n", "1 queries"),
    ("sliding-window", "S - T - window + 1", "S - T - window", "queries"),
    ("sliding-window", "S - T - window + 1", "1 - window", "5 queries"),
    ("z-loss", "logits[labels != IGNORE_INDEX]", "logits", "3 of them IGNORE_INDEX"),
    ("tied-embeddings", "lm_head.weight = model.model.embed_tokens.weight",
     "lm_head.weight.data = model.model.embed_tokens.weight.data", "0 fewer"),
    ("tied-embeddings", "lm_head.weight = model.model.embed_tokens.weight",
     "model.embed_tokens.weight = model.lm_head.weight", "not the embedding"),
    ("rolling-cache", "self.length % self.window, min", "min(self.length, self.window - 1), min", "token 4"),
    ("rolling-cache", "place, end = self.length % self.window, min(self.length + 1, self.window)",
     "place, end = self.length % self.window, self.window", "token 0"),
    ("min-p", " and min_p == 0:", ":", "top_k 0"),
    ("min-p", "min_p * probabilities[:, :1]", "min_p", "min_p 0.1"),
    ("repetition-penalty", "torch.where(seen > 0, seen / penalty, seen * penalty)", "seen / penalty", "penalty of 1.7"),
    ("repetition-penalty", "logits.scatter(-1, seen_ids,", "logits.scatter_(-1, seen_ids,", "stay as they are"),
    ("beam-search", "ids[-1] == eos:\n                longer", "False:\n                longer", "beams"),
    ("beam-search", "[0, -1].log_softmax(-1)", "[0, -1]", "beams"),
    ("beam-search", "len(ids) > T and ids[-1] == eos", "ids[-1] == eos", "beams"),
    ("average-checkpoints", "+ weight.float() /", "+ weight /", "fp32"),
    ("average-checkpoints", "set(weights) != set(mean)", "set(weights) < set(mean)", "different names"),
    ("fourth-stage", "(*others, shorter, Stage(", "(*others, last, Stage(", "70,000 tokens shorter"),
    ("fourth-stage", "last.tokens <= tokens", "last.tokens < tokens", "450,000 of 450,000"),
    ("tempered-mixture", "math.floor(share)", "round(share)", "weights"),
    ("tempered-mixture", "key=lambda name: weights[name] - exact[name]", "key=sizes.get", "remainders"),
    ("warmup-stable-decay", "d = step + 1 -", "d = step -", "should have"),
    ("plain-adamw", "(v.sqrt() + group[\"eps\"])", "(v + group[\"eps\"]).sqrt()", "after step 1"),
    ("plain-adamw", "if p.grad is None:", "if p.grad is None and not self.state[p].pop(\"step\", 0):", "ended with"),
    ("plain-adamw", "state[\"step\"] = state.get(\"step\", 0) + 1",
     "state[\"step\"] = group[\"count\"] = group.get(\"count\", 0) + 1", "after step"),
    ("lora-on-the-head", "decoder_linears(model) | {\"lm_head\": model.lm_head}", "decoder_linears(model)",
     "at lm_head"),
    ("lora-on-the-head", "({\"lm_head\": model.lm_head} if head else {})", "{\"lm_head\": model.lm_head}",
     "head=False"),
    ("two-adapters", "w * each.scale * each", "w * each", "ranks"),
    ("two-adapters", "alpha=rank)  # a scale of 1", "LORA_ALPHA)", "ranks"),
    ("calibration", "sum(abs(sum(gaps)) for gaps in members.values()) / len(right)",
     "sum(abs(sum(gaps)) / len(gaps) for gaps in members.values()) / bins", "answers in"),
    ("calibration", "for b in range(bins) if c <", "for b in range(bins) if c <=", "answers in"),
    ("paired-difference", "ddof=1", "ddof=0", "standard error"),
    ("paired-difference", "differences.std(ddof=1)", "np.hypot(np.std(right_a, ddof=1), np.std(right_b, ddof=1))",
     "standard error"),
    ("asymmetric-int4", "amin(2)) / 15).half()", "amin(2)) / 16).half()", "scales"),
    ("asymmetric-int4", "values.round()", "values.floor()", "nearest"),
    ("rows-from-gguf", "pairs = tensor.unflatten(0, (heads, config.head_dim // 2, 2))",
     "pairs = tensor.unflatten(0, (heads, 2, config.head_dim // 2))", "off by"),
    ("rows-from-gguf", "if heads is None:\n        return tensor\n    pairs",
     "heads = heads or config.num_key_value_heads\n    pairs", "v_proj"),
    ("undo", "if not self.exchanges:", "if len(self.exchanges) < 2:", "ended with DanubeError"),
    ("undo", "self.exchanges[-1], self.messages[-2:]", "self.exchanges[-1]", "messages"),
]


@pytest.fixture(autouse=True)
def modules_as_before():
    """The checkers load other files as danube3, and import tests that import these."""
    modules, paths = dict(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - set(modules):
        if name == "danube3" or name == "conftest" or name.startswith("test_"):
            del sys.modules[name]
    sys.modules.update(modules)
    sys.path[:] = paths


@pytest.fixture
def load(tmp_path):
    """A function that writes changed files and imports danube3.py."""
    def load(sources):
        for file, text in sources.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(text, encoding="utf-8")
        return exercises.load(tmp_path / "danube3.py")

    return load


@pytest.fixture(scope="module")
def plain():
    before = sys.modules["danube3"]
    module = exercises.load(ROOT / "danube3.py")
    sys.modules["danube3"] = before
    return module


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_the_plain_file_is_not_accepted(name, plain):
    sentence = exercises.verdict(name, plain, *solutions.FAILS.get(name, ()))
    assert sentence and "\n" not in sentence and "ended with" not in sentence


@pytest.mark.parametrize("name", BUILDS)
def test_the_solution_is_accepted(name, load):
    assert exercises.verdict(name, load(solutions.solved(SOURCES, name))) is None


def test_all_solutions_at_once(load):
    """A reader may do one exercise after the other in the same files."""
    sources = SOURCES
    for name in BUILDS:
        sources = solutions.solved(sources, name)
    danube3 = load(sources)
    assert [(name, sentence) for name in BUILDS if (sentence := exercises.verdict(name, danube3))] == []


@pytest.mark.parametrize("name, right, wrong, words", MISTAKES, ids=[f"{i}-{m[0]}" for i, m in enumerate(MISTAKES)])
def test_a_mistake_is_not_accepted(name, right, wrong, words, load):
    sources = solutions.solved(SOURCES, name)
    assert sum(text.count(right) for text in sources.values()) == 1, "the mistake does not fit the solution"
    sentence = exercises.verdict(name, load({file: text.replace(right, wrong) for file, text in sources.items()}))
    assert sentence and "\n" not in sentence and words in sentence, sentence


@pytest.mark.parametrize("name", BREAKS)
def test_predictions(name, load):
    """The tests in the teachers' list fail, and no others. Too many, too few and none are wrong predictions."""
    danube3, fails = load(solutions.solved(SOURCES, name)), solutions.FAILS[name]
    assert exercises.verdict(name, danube3, *fails) is None
    passes = "test_cross_entropy"
    for predicted, words in (([*fails, passes], f"you named {len(fails)}, and 1 "), ([], "name the tests"),
                             ([passes], "you named 0, and 1 "), (["test_all"], "not in the list")):
        assert words in exercises.verdict(name, danube3, *predicted)


def test_every_exercise_is_there():
    assert set(solutions.SOLUTIONS) == set(exercises.EXERCISES) and set(solutions.FAILS) == set(BREAKS)
    assert len({name for name, *_ in MISTAKES}) > len(BUILDS) / 2
    sections = re.findall(r"^# ==== (\d+)\. ", SOURCES["danube3.py"], re.MULTILINE)
    assert len(sections) == 12
    expected = set(sections) - {"12"} | {"sample.py", "quantize.py"}
    assert {section.split()[0] for _, section, _ in exercises.EXERCISES.values()} == expected
    for function, _, _ in exercises.EXERCISES.values():
        assert "\n\n" in function.__doc__ and ("Observe:" in function.__doc__ or "Which tests fail" in function.__doc__)


def test_from_the_command_line():
    listed = call("tests/exercises.py").stdout.splitlines()
    assert [line.split()[1] for line in listed] == list(exercises.EXERCISES) and max(map(len, listed)) <= 120
    text = call("tests/exercises.py", "--read", "break-mask").stdout
    assert text.startswith("Break it") and "test_rms_norm" in text and ".tril()" in text
    result = call("tests/exercises.py", "min-p")
    assert (result.returncode, result.stdout) == (1, "next_token_probabilities does not take min_p yet\n")
    assert call("tests/exercises.py", "no-such").returncode == 2
