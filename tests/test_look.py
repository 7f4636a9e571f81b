"""tests/look.py: its numbers against the NumPy twins, and its page in a real browser."""

import ast
import base64
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import zlib

import look
import numpy as np
import pytest
import reference
import torch
from conftest import ROOT, TINY, call, one_line_error, random_model

import danube3
import quantize

WIDE = dataclasses.replace(TINY, num_attention_heads=6, num_key_value_heads=2, head_dim=8)  # H h is not D
SHAPES = [
    pytest.param(TINY, id="tiny"),
    pytest.param(WIDE, id="wide"),
    pytest.param(danube3.CONFIGS["toy"], id="toy"),
    pytest.param(  # 500m with 2 layers
        dataclasses.replace(danube3.CONFIGS["500m"], num_hidden_layers=2, vocab_size=1_000),
        id="500m",
        marks=pytest.mark.slow,
    ),
]


def sharp_model(config, factor=4):
    """A random model whose attention is not nearly even."""
    model = random_model(config)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= factor
    return model


def draw_ids(config, count=23):
    return torch.randint(3, config.vocab_size, (count,)).tolist()


def twin_of(model, ids):
    """What look.record sees, in NumPy and float64. -> the same names"""
    config = model.config
    weights = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    H, K, h, theta = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rope_theta
    cos, sin = reference.rotary_table(np.arange(len(ids)), h, theta)
    x = reference.embedding(np.array([ids]), weights["model.embed_tokens.weight"])
    seen = {"stream": [x[0]], "attention": [], "mlp": [], "weights": [], "rotary": []}
    for number in range(config.num_hidden_layers):
        own = reference.layer_weights(weights, number)
        x, saved = reference.decoder_layer(x, own, config, cos, sin)
        seen["stream"].append(x[0])
        seen["attention"].append((saved["middle"] - saved["x"])[0])
        seen["mlp"].append((x - saved["middle"])[0])
        q = saved["q"].reshape(1, K, H // K, len(ids), h)
        seen["weights"].append(reference.attention_weights(q, saved["k"][:, :, None]).reshape(H, len(ids), len(ids)))
        q, k = (reference.split_heads(reference.linear(saved["x_norm"], own[name]), h) for name in ("q_proj", "k_proj"))
        q, k = q.mean(2, keepdims=True), k.mean(2)[0]  # [1, H, 1, h], [K, h]
        table = reference.rotary_table(np.arange(look.DISTANCES), h, theta)
        q = reference.rotary_embedding(q.repeat(look.DISTANCES, axis=2), *table)[0]  # [H, DISTANCES, h]
        seen["rotary"].append(np.stack([q[i] @ k[i // (H // K)] for i in range(H)]) / math.sqrt(h))
    x = reference.rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    seen["logits"] = reference.linear(x, weights["lm_head.weight"])[0]
    return {name: np.stack(arrays) for name, arrays in seen.items()}, weights


# ---- Numbers
@pytest.mark.parametrize("config", SHAPES)
def test_a_pass_against_the_twin(config):
    """Attention weights to 1e-5; what branches add, the residual stream, and rotary scores."""
    model, ids = sharp_model(config), draw_ids(config)
    seen, (twin, weights) = look.record(model, ids), twin_of(model, ids)
    assert seen.keys() == twin.keys()
    for name, tensor in seen.items():
        scale = 1.0 if name == "weights" else max(1.0, np.abs(twin[name]).max())
        assert tensor.shape == twin[name].shape, name
        assert np.abs(tensor.double().numpy() - twin[name]).max() < 1e-5 * scale, name
    assert (seen["weights"].sum(-1) - 1).abs().max() < 1e-5
    assert seen["weights"].max() > 0.5 and seen["weights"].triu(1).max() == 0
    for x, own in zip(seen["stream"], twin["stream"]):  # the logit lens of each layer
        logits = reference.linear(
            reference.rms_norm(own, weights["model.norm.weight"], config.rms_norm_eps), weights["lm_head.weight"]
        )
        assert np.abs(look.lens(model, x).double().numpy() - reference.softmax(logits)).max() < 1e-5
    assert torch.equal(look.lens(model, seen["stream"][-1]), seen["logits"].softmax(-1))  # the model's own
    assert not any(module._forward_hooks for module in model.modules())


def test_rotary_scores_agree_with_attention():
    """With one token for all, queries and keys are their own mean, and only the distance matters. So the logarithms
    of the attention weights differ as the scores do."""
    model, T = sharp_model(WIDE), 30
    seen = look.record(model, [7] * T)
    weights, scores = seen["weights"][0, :, -1].log(), seen["rotary"][0]  # [H, T], [H, DISTANCES]
    differences = weights - weights[:, -1:]  # from the weight on itself
    torch.testing.assert_close(differences, (scores[:, :T] - scores[:, :1]).flip(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", SHAPES)
def test_losses_are_those_of_evaluation(config):
    model, ids = sharp_model(config), draw_ids(config)
    losses, batch = look.token_losses(look.record(model, ids)["logits"], ids), torch.tensor([ids])
    assert len(losses) == len(ids) - 1
    assert sum(losses) / len(losses) == pytest.approx(danube3.evaluate_loss(model, batch, batch, 1), rel=1e-5)
    log_p = model(batch)[0].double().log_softmax(-1)
    assert losses == pytest.approx([-log_p[t - 1, ids[t]].item() for t in range(1, len(ids))], abs=1e-5)


def test_everything_about_a_conversation(tokenizer):
    """The dictionary that the page gets, against plain torch."""
    model = sharp_model(WIDE)
    messages = [{"role": "user", "content": "Ada?"}, {"role": "assistant", "content": "She has \U0001f600."}]
    ids, labels = danube3.render_chat(messages, tokenizer)
    data, seen, batch = look.look(model, tokenizer, ids, labels), look.record(model, ids), torch.tensor([ids])
    losses = [token["loss"] for token in data["tokens"]]
    targets = [t for t, own in enumerate(labels) if own != danube3.IGNORE_INDEX]
    assert [t for t, token in enumerate(data["tokens"]) if token["target"]] == targets
    assert [token["id"] for token in data["tokens"]] == ids and losses[0] is None
    assert data["mean_loss"] == pytest.approx(sum(losses[1:]) / (len(ids) - 1), rel=1e-5)
    assert data["target_loss"] == pytest.approx(sum(losses[t] for t in targets) / len(targets), rel=1e-5)
    probabilities = model(batch)[0].softmax(-1)
    for t, token in enumerate(data["tokens"]):
        assert len(token["best"]) == (5 if t else 0)
        for place, (label, p) in enumerate(token["best"]):
            values, indices = probabilities[t - 1].sort(descending=True)
            assert p == round(values[place].item(), 4)
            assert label[0] == tokenizer.sp.id_to_piece(int(indices[place]))
    assert "".join(token["completes"] for token in data["tokens"]) == tokenizer.decode(ids)
    for n, layer in enumerate(data["lens"]):
        own = look.lens(model, seen["stream"][n])
        for t, (label, p, follows) in enumerate(layer):
            assert label[0] == tokenizer.sp.id_to_piece(int(own[t].argmax())) and p == round(own[t].max().item(), 4)
            assert follows == (round(own[t, ids[t + 1]].item(), 4) if t + 1 < len(ids) else None)
    for name in ("stream", "attention", "mlp"):
        assert np.abs(np.array(data[name]) - seen[name].square().sum(-1).sqrt().numpy()).max() < 6e-4
    assert np.abs(np.array(data["rotary"]) - seen["rotary"].numpy()).max() < 6e-4
    turns = [2 * math.pi * WIDE.rope_theta ** (2 * i / WIDE.head_dim) for i in range(WIDE.head_dim // 2)]
    assert data["turns"] == pytest.approx(turns, abs=0.1, rel=1e-4)
    assert (data["num_hidden_layers"], data["num_attention_heads"], data["num_key_value_heads"]) == (2, 6, 2)


def test_packed_weights():
    """In the order in which the page reads them, as thousandths."""
    weights = torch.rand(2, 3, 5, 5).tril()
    values = np.frombuffer(zlib.decompress(base64.b64decode(look.pack_weights(weights))), "<u2")
    assert len(values) == 2 * 3 * 15
    for layer, head, query in itertools.product(range(2), range(3), range(5)):
        for key in range(query + 1):
            place = (layer * 3 + head) * 15 + query * (query + 1) // 2 + key
            assert abs(values[place] / 1_000 - weights[layer, head, query, key]) <= 0.0005001


def test_kinds_of_tokens(tokenizer):
    """A typed <s> is text, whatever it looks like."""
    assert look.label(tokenizer, 0) == ["<unk>", "special"] and look.label(tokenizer, 1) == ["<s>", "special"]
    kinds = {look.label(tokenizer, token_id)[1] for token_id in tokenizer.encode("Ada <s> lives")}
    assert "text" in kinds and "special" not in kinds
    assert [look.label(tokenizer, token_id)[1] for token_id in tokenizer.encode("\u05d0")[1:]] == ["byte"] * 2
    assert look.label(tokenizer, tokenizer.vocab_size) == [f"id {tokenizer.vocab_size}", "special"]


def test_sums_of_two_models():
    first, second = [{"loss": loss} for loss in (1.0, 2.0, 3.0)], [{"loss": loss} for loss in (1.0, 2.5, 1.0)]
    assert look.compare(first, second) == {"count": 3, "first": 6.0, "second": 4.5, "worse": pytest.approx(1 / 3)}


def metrics(folder, lines):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run_lines(count):
    """Metrics of two stages, with losses before them and after each."""
    lines = [{"step": 0, "stage": "one", "tokens": 0, "val_loss": {"web": 7.0}}]
    for step in range(1, count + 1):
        line = {"step": step, "stage": "one" if step <= count // 2 else "two", "tokens": 10 * step}
        lines.append({**line, "loss": None if step == 2 else 1 / step, "lr": step / 100, "grad_norm": 2})
    return [*lines, {"step": count, "stage": "two", "tokens": 10 * count, "val_loss": {"web": 1.0}}]


def test_a_run(tmp_path, monkeypatch):
    folder = metrics(tmp_path / "run", run_lines(6))
    run = look.read_run(folder)
    assert run["name"] == str(folder) and run["mixtures"] == {} and run["stages"] == {"one": 30, "two": 60}
    assert run["checks"] == [[0, {"web": 7.0}], [60, {"web": 1.0}]]
    assert run["steps"] == [[10 * n, None if n == 2 else 1 / n, n / 100, 2] for n in range(1, 7)]
    for number, stage in ((5, "two"), (6, "one")):  # only the newest checkpoint counts
        (folder / f"step-{number}").mkdir()
        stages = [{"name": stage, "mixture": {"web": 3}}]
        danube3.write_json(folder / f"step-{number}" / "training_state.json", {"run_config": {"stages": stages}})
    assert look.read_run(folder)["mixtures"] == {"one": {"web": 3}}
    for most, kept in ((6, [10, 20, 30, 40, 50, 60]), (5, [10, 30, 50]), (2, [10, 40])):
        monkeypatch.setattr(look, "MAX_STEPS", most)
        assert [step[0] for step in look.read_run(folder)["steps"]] == kept


# ---- The program
@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A model, its int8 and int4, adapters to it, two other models, and one with another tokenizer."""
    from data import toy

    folder = tmp_path_factory.mktemp("look")
    config = dataclasses.replace(
        danube3.CONFIGS["toy"], hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, vocab_size=330, max_position_embeddings=600)  # fmt: skip
    danube3.save_checkpoint(folder / "model", sharp_model(config, 40), tokenizer)
    danube3.save_checkpoint(folder / "other", random_model(config, seed=5), tokenizer)
    danube3.save_checkpoint(folder / "small", random_model(TINY), tokenizer)
    foreign = toy.train_tokenizer(["another text, other pieces"] * 9, 330 - 50, folder / "foreign.model")
    danube3.save_checkpoint(folder / "foreign", random_model(config), foreign)
    for bits in (8, 4):
        quantize.quantize_folder(folder / "model", folder / f"int{bits}", quantize.layout(config, bits), {})
    model = danube3.add_lora(danube3.load_checkpoint(folder / "model")[0], 2, seed=0)
    adapters = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            adapters[name] = torch.randn_like(parameter) / 9
    (folder / "adapters").mkdir()
    checksum = danube3.weights_sha256(folder / "model")
    danube3.write_adapters(folder / "adapters", model, adapters, folder / "model", checksum)
    return folder


def page_data(path):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*)</script>', path.read_text())[1])


TEXT = "Ada lives in Marrow."
HOSTILE = """</script><script>window.hacked = 1</script> "it's" <!-- &lt; <img src=x onerror="hacked = 2"> \u2028
\U0001f600 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 </s> <0x41> DATA"""


@pytest.mark.parametrize("name", ["model", "int8", "int4", "adapters"])
def test_any_folder(name, folders, tmp_path):
    """The page has the numbers of the model that the folder holds. int4 has no bf16 kernels here."""
    result = call("tests/look.py", folders / name, TEXT, "--out", tmp_path / "a.html")
    assert result.returncode == 0 and result.stdout.startswith(f"{tmp_path / 'a.html'}: "), result.stderr
    data = page_data(tmp_path / "a.html")
    model, tokenizer = danube3.load_checkpoint(folders / name, dtype=torch.float32)
    batch = torch.tensor([tokenizer.encode_prompt(TEXT)])
    assert data["look"]["mean_loss"] == pytest.approx(danube3.evaluate_loss(model, batch, batch, 1), rel=1e-6)
    assert [token["id"] for token in data["look"]["tokens"]] == batch[0].tolist()
    assert data["name"] == str(folders / name) and data["chat"] is False and "beside" not in data


def test_two_models_beside_each_other(folders, tmp_path):
    turns = ("Where is Ada?", "In Marrow.")
    command = ("--chat", *turns, "--beside", folders / "other", "--out", tmp_path / "a.html")
    assert call("tests/look.py", folders / "model", *command).returncode == 0
    data = page_data(tmp_path / "a.html")
    first, second = data["look"]["tokens"], data["beside"]["tokens"]
    model, tokenizer = danube3.load_checkpoint(folders / "other")
    messages = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant"), turns)]
    ids, labels = danube3.render_chat(messages, tokenizer)
    own = danube3.evaluate_loss(model, torch.tensor([ids]), torch.tensor([labels]), 1)
    sums = data["beside"]["targets"]
    assert sums["count"] == sum(label != danube3.IGNORE_INDEX for label in labels) < data["beside"]["all"]["count"]
    assert sums["second"] / sums["count"] == pytest.approx(own, rel=1e-5)
    assert sums["first"] / sums["count"] == pytest.approx(data["look"]["target_loss"], rel=1e-5)
    assert data["beside"]["all"]["count"] == len(ids) - 1 and data["chat"] is True
    assert data["beside"]["all"]["second"] == pytest.approx(sum(token["loss"] for token in second[1:]))
    worse = sum(b["loss"] > a["loss"] for a, b in zip(first[1:], second[1:]))
    assert data["beside"]["all"]["worse"] == pytest.approx(worse / (len(ids) - 1))
    assert data["beside"]["name"] == str(folders / "other")


def test_the_model_answers_a_last_question(folders, tmp_path):
    import sample

    assert call("tests/look.py", folders / "model", "--chat", "Ada?", "--out", tmp_path / "a.html").returncode == 0
    model, tokenizer = danube3.load_checkpoint(folders / "model")
    messages = [{"role": "user", "content": "Ada?"}]
    answer, _ = sample.answer_all(model, tokenizer, [messages])[0]
    assert answer
    ids, _ = danube3.render_chat([*messages, {"role": "assistant", "content": answer}], tokenizer)
    assert [token["id"] for token in page_data(tmp_path / "a.html")["look"]["tokens"]] == ids


def test_a_page_of_a_run_only(tmp_path):
    folder = metrics(tmp_path / "run", run_lines(4))
    assert call("tests/look.py", "--run", folder, "--out", tmp_path / "a.html").returncode == 0
    data = page_data(tmp_path / "a.html")
    assert data == {"name": None, "chat": False, "run": json.loads(json.dumps(look.read_run(folder)))}


def test_text_cannot_leave_its_element(folders, tmp_path):
    assert call("tests/look.py", folders / "model", HOSTILE, "--out", tmp_path / "a.html").returncode == 0
    page, template = (tmp_path / "a.html").read_text(), (ROOT / "tests" / "look.html").read_text()
    head, tail = template.split("DATA", 1)
    assert page.startswith(head) and page.endswith(tail)  # and between them, one string of plain characters
    assert not re.search("[<>&\u2028\u2029]", page[len(head) : -len(tail)])
    _, tokenizer = danube3.load_checkpoint(folders / "model")
    pieces = [token["label"][0] for token in page_data(tmp_path / "a.html")["look"]["tokens"]]
    assert pieces == [tokenizer.sp.id_to_piece(token_id) for token_id in tokenizer.encode_prompt(HOSTILE)]


ERRORS = {
    "long": ("MODEL LONG", "use 2 to 512"),
    "long for the model": ("SMALL LONG", "use 2 to 64"),
    "short": ("MODEL EMPTY", "has 1 tokens: use 2 to 512"),
    "missing": ("nosuch Ada", "nosuch does not exist"),
    "no folder": ("MODEL Ada --out nosuch/a.html", "nosuch/a.html is a folder, or lies in none"),
    "a folder": ("MODEL Ada --out tests", "tests is a folder"),
    "another tokenizer": ("MODEL Ada --beside FOREIGN", "another tokenizer"),
    "missing beside": ("MODEL Ada --beside nosuch", "nosuch does not exist"),
    "nothing": ("", "give a checkpoint and a text"),
    "no text": ("MODEL", "either a text, or --chat"),
    "two texts": ("MODEL Ada --chat Ada", "either a text, or --chat"),
    "beside a run": ("--run RUN --beside MODEL", "give a checkpoint and a text"),
    "chat with nobody": ("--run RUN --chat Ada", "give a checkpoint and a text"),
    "no run": ("--run nosuch", "nosuch/metrics.jsonl does not exist"),
    "damaged run": ("--run DAMAGED", "metrics.jsonl is missing or damaged"),
    "run without steps": ("--run EARLY", "EARLY has no training steps yet"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_have_one_line(name, folders, tmp_path):
    for run, lines in (
        ("RUN", run_lines(2)),
        ("DAMAGED", [{"step": 1, "stage": "one", "loss": 2}]),
        ("EARLY", run_lines(0)[:1]),
    ):
        metrics(tmp_path / run, lines)
    names = {"MODEL": folders / "model", "SMALL": folders / "small", "FOREIGN": folders / "foreign"}
    names |= {run: tmp_path / run for run in ("RUN", "DAMAGED", "EARLY")}
    names |= {"LONG": "Ada has geese. " * 200, "EMPTY": ""}
    command, message = ERRORS[name]
    parts = [names.get(part, part) for part in ["--out", tmp_path / "a.html", *command.split()]]
    assert message in one_line_error(call("tests/look.py", *parts))
    assert not (tmp_path / "a.html").exists()


def test_no_logits_that_are_not_finite(tokenizer):
    model = sharp_model(TINY)
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(danube3.DanubeError, match="not finite"):
        look.record(model, [3, 4])


def test_both_files_stay_short():
    """At most 250 lines of at most 110 columns, few dense expressions, nothing from elsewhere."""
    program, template = ((ROOT / "tests" / name).read_text() for name in ("look.py", "look.html"))
    for text in (program, template):
        assert len(text.splitlines()) <= 250 and max(map(len, text.splitlines())) <= 110
    dense = (ast.IfExp, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp, ast.NamedExpr, ast.Lambda)
    count = sum(isinstance(node, dense) for node in ast.walk(ast.parse(program)))
    assert 100 * count / len([line for line in program.splitlines() if line.strip()]) <= 6
    assert not re.search(r"\bsrc=|\bhref=|@import|url\(|fetch\(|innerHTML|eval\(", template)
    assert re.findall(r"https?://[^`$ ]*", template) == ["http://www.w3.org/"]  # a name, not an address


# ---- The page, in a browser
class Browser:
    """A headless Chromium, told what to do through a pipe, in the Chrome DevTools protocol."""

    FLAGS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe --no-first-run".split()

    def __init__(self, path, profile):
        script = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'  # it reads from 3 and writes to 4
        command = ["sh", "-c", script, path, *self.FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.watchdog = threading.Timer(240, self.close)
        self.watchdog.start()
        self.count, self.session, self.events = 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        self.watchdog.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def receive(self):
        text = bytearray()
        while not text.endswith(b"\0"):
            byte = self.process.stdout.read(1)
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text[:-1])

    def call(self, method, **params):
        """Call a method of the protocol, and keep events that arrive meanwhile. -> its result"""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, code):
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path, width, theme):
        """Show a page on a screen of this width, in a theme, until it has chosen a token."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events = []
        self.call("Page.navigate", url="about:blank")  # a page that differs by its #part only is not loaded again
        self.call("Page.navigate", url=path.as_uri())
        for _ in range(100):
            ready = "document.readyState === 'complete' && (!look || document.querySelector('.current') !== null)"
            if self.evaluate(ready):
                return
            time.sleep(0.1)
        raise AssertionError(f"the page was not ready: {self.problems()}")

    def problems(self):
        """What was written to the console, thrown, or asked from the network."""
        found = []
        for event in self.events:
            kind, params = event["method"], event.get("params", {})
            if kind in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                found.append(params)
            elif kind == "Network.requestWillBeSent" and not re.match("file:|about:", params["request"]["url"]):
                found.append(params["request"]["url"])
        return found

    def point(self, selector, number, tap=False):
        """Move the mouse to the element, or tap it."""
        place = f"document.querySelectorAll('{selector}')[{number}]"
        self.evaluate(f"{place}.scrollIntoView({{block: 'center'}})")
        box = f"{place}.getBoundingClientRect()"
        x, y, width, height = self.evaluate(f"(({{x, y, width, height}}) => [x, y, width, height])({box})")
        x, y = x + width / 2, y + height / 2
        if tap:
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def texts(self, selector):
        return self.evaluate(f"[...document.querySelectorAll('{selector}')].map(each => each.textContent)")

    def notes(self, selector):
        return self.evaluate(f"[...document.querySelectorAll('{selector}')].map(each => each.dataset.note)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no browser to look at the page with: install chromium (Debian: apt-get install chromium)")
    browser = Browser(path, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def hostile_page(folders, tmp_path_factory):
    """All six sections, with a text that wants to be code. -> the page, its attention weights"""
    folder = tmp_path_factory.mktemp("page")
    run = metrics(folder / "run <b>", run_lines(9))
    command = ("--chat", HOSTILE, "Yes.\nNo.", "--beside", folders / "int4", "--run", run, "--out", folder / "a.html")
    assert call("tests/look.py", folders / "model", *command).returncode == 0
    data = page_data(folder / "a.html")
    model, _ = danube3.load_checkpoint(folders / "model")
    seen = look.record(model, [token["id"] for token in data["look"]["tokens"]])
    return folder / "a.html", data, seen["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1_400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_in_a_browser(width, theme, browser, hostile_page):
    path, data, weights = hostile_page
    tokens = data["look"]["tokens"]
    browser.open(path, width, theme)
    assert browser.evaluate("innerWidth") == width and browser.evaluate("document.documentElement.scrollWidth") <= width
    shown = [token["label"][0].replace("\n", "\u23ce") for token in tokens]
    for strip in ("losses", "weights", "changes"):
        assert browser.texts(f"#{strip} .token") == shown
    for kind in ("byte", "special"):
        assert len(browser.texts(f"#losses .{kind}")) == sum(token["label"][1] == kind for token in tokens) > 1
    assert len(browser.texts("#losses .target")) == sum(token["target"] for token in tokens) > 1
    # Text stays text.
    assert browser.evaluate("typeof hacked") == "undefined"
    assert browser.evaluate("document.querySelectorAll('img, #title b').length") == 0
    assert browser.evaluate("document.scripts.length") == 2
    assert browser.texts("#title") == [f"Inside {data['name']}"]
    assert browser.evaluate("[...document.querySelectorAll('section')].every(each => each.checkVisibility())")

    def attention(layer, head, token):
        """The numbers below the tokens, against Python's."""
        notes = browser.notes("#weights .token")
        assert notes[token + 1 :] == ["\u2013"] * (len(tokens) - token - 1)
        own = weights[layer, head, token, : token + 1].tolist()
        assert [float(note) for note in notes[: token + 1]] == pytest.approx(own, abs=0.00551)
        return notes

    browser.point("#losses .token", 20)  # the mouse over a token
    assert browser.evaluate("[state.token, state.pinned]") == [20, False]
    token = tokens[20]
    assert f"Loss {token['loss']:.3f}, probability {math.exp(-token['loss']):.3f}" in browser.texts("#likeliest p")[0]
    best = [f"{label[0]}{p:.3f}".replace("\n", "\u23ce") for label, p in token["best"]]
    assert browser.texts("#likeliest tr") == best
    first = attention(0, 0, 20)
    assert browser.texts("#expected p")[0].startswith(f"Loss {data['beside']['tokens'][20]['loss']:.3f}")
    change = data["beside"]["tokens"][20]["loss"] - token["loss"]
    assert float(browser.notes("#changes .token")[20]) == pytest.approx(change, abs=0.0051)
    browser.evaluate("find('head').focus()")  # the keyboard chooses a head
    for key in ("ArrowDown", "ArrowDown", "ArrowDown"):
        for kind in ("rawKeyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=40)
    assert browser.evaluate("[state.head, state.token]") == [3, 20]
    assert attention(0, 3, 20) != first
    assert browser.texts("#head option")[3] == "3 (key/value head 1)"
    browser.point("#losses .token", 5)  # it is kept now
    assert browser.evaluate("state.token") == 20
    browser.point("#heads td", 7, tap=True)  # the table of heads: second row, second column
    assert browser.evaluate("[state.layer, state.head, state.token]") == [1, 1, 20]
    attention(1, 1, 20)
    browser.point("#weights .token", 30, tap=True)
    assert browser.evaluate("[state.token, state.pinned]") == [30, True]
    attention(1, 1, 30)
    cell = browser.texts("#heads td")[7]
    row = np.round(1_000 * weights[1, 1, 30, :31].numpy()).astype(int)  # of equal ones it is the first
    assert cell == f"{shown[row.argmax()]}{row.max() / 1_000:.2f}" and row.max() > 100
    assert len(browser.texts("#lens td")) == 4 * len(tokens) and len(browser.texts("#curves svg")) == 3
    lens = [guesses[30] for guesses in data["look"]["lens"]]
    assert browser.texts("#lens tr:first-child td")[30] == lens[2][0][0].replace("\n", "\u23ce")
    norms = [f"{float(text):.2g}" for text in browser.texts("#stream tr:nth-child(n + 2) td:nth-of-type(1)")[1:]]
    assert norms == [f"{data['look']['attention'][n][30]:.2g}" for n in range(2)]
    assert browser.texts("#stream td:last-child") == [str(follows) for _, _, follows in lens]
    points = browser.evaluate("document.querySelector('#curve polyline').getAttribute('points').split(' ').length")
    assert points == look.DISTANCES
    browser.point("#weights .token", 30, tap=True)  # a second tap lets the token go
    assert browser.evaluate("state.pinned") is False
    # Both themes can be read.
    ink, page = (browser.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    bright = [sum(map(int, re.findall(r"\d+", colour))) > 384 for colour in (ink, page)]
    assert bright == [theme == "dark", theme == "light"]
    assert browser.problems() == []


@pytest.mark.slow
def test_the_page_of_a_run_in_a_browser(browser, tmp_path):
    """With the mixtures of its newest checkpoint; without a model the other sections are hidden."""
    run = metrics(tmp_path / "run", run_lines(9))
    (run / "step-9").mkdir()
    stages = [{"name": "one", "mixture": {"web": 3, "books": 1}}, {"name": "two", "mixture": {"web": 1, "books": 1}}]
    danube3.write_json(run / "step-9" / "training_state.json", {"run_config": {"stages": stages}})
    assert call("tests/look.py", "--run", run, "--out", tmp_path / "a.html").returncode == 0
    browser.open(tmp_path / "a.html", 390, "light")
    assert browser.texts("h1, section:not([hidden]) h2") == [f"Inside {run}", "6. A training run"]
    assert browser.texts("#curves figcaption") == [f"Loss of {run}", "Learning rate", "Norm of the gradient"]
    assert browser.texts("#mixtures tr") == ["webbooks", "one75 %25 %", "two50 %50 %"]
    points = "each => each.getAttribute('points').split(' ').length"
    counts = browser.evaluate(f"[...document.querySelectorAll('#curves polyline')].map({points})")
    assert counts == [8, 2, 9, 9] and len(browser.texts("#curves circle")) == 2
    assert browser.problems() == []


@pytest.mark.slow
def test_a_link_to_a_choice(browser, hostile_page):
    """look.html#token=12&layer=1&head=4 opens with this choice; what does not exist is ignored."""
    path, _, _ = hostile_page
    for part, choice in (("token=12&layer=1&head=4", [12, 1, 4]), ("token=-7&layer=x&head=99", [0, 0, 5])):
        browser.open(type("Link", (), {"as_uri": lambda self, part=part: f"{path.as_uri()}#{part}"})(), 1_400, "light")
        assert browser.evaluate("[state.token, state.layer, state.head]") == choice and browser.problems() == []


@pytest.mark.slow
def test_the_browser_reports_errors(browser, tmp_path):
    """Otherwise the tests above would prove nothing."""
    (tmp_path / "a.html").write_text("<script>const look = null; console.error(1); nothing();</script>")
    browser.open(tmp_path / "a.html", 390, "light")
    assert len(browser.problems()) == 2
