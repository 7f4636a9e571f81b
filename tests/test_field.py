"""Files and folders as people have them, after public bug reports of similar programs: what each program makes of
them. The first eighteen are numbered; the reports of the others are named in their tests."""

import dataclasses
import io
import json
import shutil

import gguf
import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch
from conftest import SENTENCES, TINY, call, conversations_in, one_line_error, random_model

import danube3
import quantize
import sample
from data import cli

EVEN = dataclasses.replace(TINY, hidden_size=64, intermediate_size=96, head_dim=16)  # can be quantized
TALKS = [
    {"messages": [{"role": "user", "content": f"Where is {n}?"}, {"role": "assistant", "content": f"In {n}."}]}
    for n in range(8)
]
QUESTIONS = [{"prompt": "Ada lives in", "choices": [" Marrow", " Ferrin"], "answer": n % 2} for n in range(4)]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"


def write_jsonl(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A checkpoint that all programs can read, without checksums."""
    danube3.save_checkpoint(tmp_path / "model", random_model(EVEN), tokenizer)
    (tmp_path / "model" / "SHA256SUMS").unlink()
    write_jsonl(tmp_path / "chat.jsonl", TALKS)
    write_jsonl(tmp_path / "quiz.jsonl", QUESTIONS)
    return tmp_path / "model"


def change_json(path, **changes):
    """Change entries of a JSON file; None removes one."""
    values = {**danube3.read_json(path), **changes}
    danube3.write_json(path, {name: value for name, value in values.items() if value is not None})


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


# Every program that opens a checkpoint.
PROGRAMS = {
    "complete": lambda folder: call("sample.py", folder, "Ada", "--max-new-tokens", 4, "--temperature", 0),
    "evaluate": lambda folder: call("sample.py", folder, "--eval", folder.parent / "quiz.jsonl"),
    "fine-tune": lambda folder: call(
        "train.py", "--chat", folder.parent / "chat.jsonl", "--init", folder, "--out", folder.parent / "tuned"
    ),
    "quantize": lambda folder: call("quantize.py", folder, "--bits", 8, "--out", folder.parent / "int8"),
    "gguf": lambda folder: call("quantize.py", folder, "--gguf", folder.parent / "model.gguf"),
}
each_program = pytest.mark.parametrize("program", PROGRAMS)


def refused_by(program, folder, words):
    """The program ends in one line with these words, and leaves nothing behind."""
    before = sorted(folder.parent.iterdir())
    line = one_line_error(PROGRAMS[program](folder))
    assert words in line, line
    shutil.rmtree(folder.parent / "tuned", ignore_errors=True)
    assert sorted(folder.parent.iterdir()) == before


# ---- The published folders, as transformers 4.41, 4.57 and 5 write their configurations

SIZES = {
    "500m": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16},
    "4b": {"hidden_size": 3840, "intermediate_size": 10240, "num_hidden_layers": 24, "num_attention_heads": 32},
}
RANGES = {"500m": 0.02, "4b": 0.01}
HEADS = {"500m": 96, "4b": 120}
COUNTS = {"500m": 513_590_784, "4b": 3_961_839_360}
MODELS = ("500m-base", "500m-chat", "4b-base", "4b-chat")


def published_config(model, version):
    """config.json of h2oai/h2o-danube3-`model`, in the form of a version of transformers."""
    size = model.split("-")[0]
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", **SIZES[size], "initializer_range": RANGES[size],
        "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_key_value_heads": 8,
        "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 32000, "transformers_version": version,
    }  # fmt: skip
    if version < "5":
        config |= {"rope_theta": 100000, "rope_scaling": None}
    else:
        config |= {"rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}}
    config["torch_dtype" if version < "4.5" else "dtype"] = "bfloat16"
    return config if version < "4.5" else {**config, "head_dim": HEADS[size]}


@pytest.mark.parametrize("version", ["4.41.2", "4.57.1", "5.23.0"])
@pytest.mark.parametrize("model", MODELS)
def test_published_configurations(model, version, tmp_path):
    """Read as the built-in configuration, and transformers makes tensors of the same names and shapes of them."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    danube3.write_json(tmp_path / "config.json", published_config(model, version))
    size = model.split("-")[0]
    config = danube3.read_config(tmp_path)
    assert config == danube3.CONFIGS[size] and danube3.count_parameters(config) == COUNTS[size]
    with torch.device("meta"):
        ours = danube3.Danube3(config)
        theirs = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(tmp_path))
    shapes = {name: tuple(weight.shape) for name, weight in theirs.state_dict().items()}
    assert {name: tuple(weight.shape) for name, weight in ours.state_dict().items()} == shapes


def as_written_by(version, folder):
    """Give a tiny folder the forms of a version: config, generation config, tokenizer settings, template."""
    config, forms = danube3.read_json(folder / "config.json"), published_config("500m-chat", version)
    kept = {name: value for name, value in config.items() if name in forms and name != "rope_theta"}
    theta = {"rope_theta": 1e5} if version < "5" else {}
    dtype = {"torch_dtype" if version < "4.5" else "dtype": "float32"}
    head_dim = {"head_dim": EVEN.head_dim}
    danube3.write_json(folder / "config.json", {**forms, **kept, **theta, **dtype, **head_dim})
    danube3.write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": version},
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    if version < "5":
        tokens = {str(i): {"content": text, "special": True} for i, text in enumerate(("<unk>", "<s>", "</s>"))}
        settings |= {"add_bos_token": True, "added_tokens_decoder": tokens, "legacy": True}
    if version < "4.5":
        settings["chat_template"] = danube3.CHAT_TEMPLATE
    else:
        (folder / "chat_template.jinja").write_text(danube3.CHAT_TEMPLATE)
    danube3.write_json(folder / "tokenizer_config.json", settings)


@pytest.mark.parametrize("version", ["4.41.2", "4.57.1", "5.23.0"])
@each_program
def test_the_forms_of_transformers(program, version, folder):
    as_written_by(version, folder)
    model, tokenizer = danube3.load_checkpoint(folder)
    assert model.config == EVEN and tokenizer.add_bos and tokenizer.chat_template == danube3.CHAT_TEMPLATE
    result = PROGRAMS[program](folder)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr


def test_transformers_and_back(folder):
    """A folder that transformers saves again: tokenizer.model is missing from version 5 on, and has to be copied."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = folder.parent / "again"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
    AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    if not (again / "tokenizer.model").exists():
        with pytest.raises(danube3.DanubeError, match="tokenizer.model is missing .transformers 5 saves"):
            danube3.load_checkpoint(again)
        shutil.copy(folder / "tokenizer.model", again)
    model, tokenizer = danube3.load_checkpoint(again)
    assert tokenizer.chat_template == danube3.CHAT_TEMPLATE and tokenizer.add_bos
    for ours, theirs in zip(model.parameters(), danube3.load_checkpoint(folder)[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ---- Rows 1 to 3: types, shards, indexes


def shard(folder, big=1e5):
    """Two shards, the first fp16, the second bf16 with one weight beyond fp16."""
    weights = {name: w.half() for name, w in weights_of(folder).items()}
    second = {name: w.bfloat16() for name, w in weights.items() if "layers.1" in name or name == "model.norm.weight"}
    second["model.norm.weight"][3] = big
    first = {name: w for name, w in weights.items() if name not in second}
    parts = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    for name, part in parts.items():
        danube3.write_tensors(folder / name, part)
    names = {weight: name for name, part in parts.items() for weight in part}
    danube3.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("stated, dtype", [("bfloat16", torch.bfloat16), (None, torch.float32)])
def test_row_1_the_first_tensor_does_not_rule(stated, dtype, folder):
    shard(folder)
    change_json(folder / "config.json", torch_dtype=stated)
    model, _ = danube3.load_checkpoint(folder)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.model.norm.weight[3] == torch.tensor(1e5).bfloat16()
    if stated:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert theirs.dtype == dtype
        for name, weight in theirs.state_dict().items():
            assert torch.equal(model.get_parameter(name), weight)


@each_program
def test_row_1_a_weight_beyond_fp16(program, folder):
    """Used as bf16 or fp32 everywhere; where fp16 is demanded, the weight is named."""
    shard(folder)
    change_json(folder / "config.json", torch_dtype="bfloat16")
    assert PROGRAMS[program](folder).returncode == 0
    if program == "complete":
        line = one_line_error(call("sample.py", folder, "Ada", "--dtype", "float16"))
        assert "model.norm.weight is not finite as torch.float16" in line


def test_row_1_logits_that_are_not_finite(folder):
    """Finite weights whose products overflow: one line, greedy or sampled."""
    weights = weights_of(folder)
    weights["lm_head.weight"].fill_(1e38)
    weights["model.norm.weight"].fill_(1e6)
    danube3.write_tensors(folder / "model.safetensors", weights)
    for temperature in (0, 0.7):
        line = one_line_error(call("sample.py", folder, "Ada", "--temperature", temperature))
        assert "the logits are not finite" in line


@pytest.mark.parametrize("wide", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("reverse", [False, True])
def test_row_2_two_types_in_one_file(wide, reverse, folder):
    weights = weights_of(folder)
    mixed = {name: w if (name == wide) != reverse else w.bfloat16() for name, w in weights.items()}
    danube3.write_tensors(folder / "model.safetensors", mixed)
    change_json(folder / "config.json", torch_dtype=None)
    model, _ = danube3.load_checkpoint(folder)
    for name, weight in mixed.items():
        assert torch.equal(model.get_parameter(name), weight.float())


@each_program
def test_row_3_a_stale_index(program, folder):
    """The single file is used, and a line says so. Names that lead out of the folder are refused."""
    stale = {name: torch.zeros_like(w) for name, w in weights_of(folder).items()}
    danube3.write_tensors(folder / "old.safetensors", stale)
    index = folder / "model.safetensors.index.json"
    danube3.write_json(index, {"weight_map": dict.fromkeys(stale, "old.safetensors")})
    result = PROGRAMS[program](folder)
    assert result.returncode == 0 and "index.json is ignored: model.safetensors is there" in result.stderr
    assert danube3.load_checkpoint(folder)[0].lm_head.weight.any()
    (folder / "model.safetensors").unlink()
    danube3.write_json(index, {"weight_map": dict.fromkeys(stale, "../model/old.safetensors")})
    shutil.rmtree(folder.parent / "tuned", ignore_errors=True), shutil.rmtree(folder.parent / "int8", True)
    refused_by(program, folder, "names files outside its folder")


# ---- Rows 4 to 8: tokens, templates, stop ids


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
@each_program
def test_row_4_added_tokens(program, file, folder):
    """Tokens that tokenizer.model lacks would be split into pieces, and vanish when generated."""
    entry = {"id": 330, "content": "<|im_start|>", "special": True}
    known = {"id": 2, "content": "</s>", "special": True}
    contents = {
        "added_tokens.json": {"</s>": 2, "<|im_start|>": 330},
        "tokenizer_config.json": {"added_tokens_decoder": {"2": known, "330": entry}},
        "tokenizer.json": {"added_tokens": [known, entry]},
    }
    danube3.write_json(folder / file, contents[file])
    refused_by(program, folder, "tokenizer.model lacks '<|im_start|>': use the model's")


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "a list"])
def test_row_5_another_chat_template(where, folder):
    """Chat and evaluation say so in one line. Export keeps the template; fine-tuning replaces it by the one used."""
    settings = folder / "tokenizer_config.json"
    if where == "chat_template.jinja":  # it counts for more than tokenizer_config.json
        (folder / where).write_text(CHATML)
    elif where == "a list":
        change_json(settings, chat_template=[{"name": "default", "template": CHATML}])
    else:
        change_json(settings, chat_template=CHATML)
    words = "warning: the model has another chat template"
    assert words not in PROGRAMS["complete"](folder).stderr
    assert PROGRAMS["evaluate"](folder).stderr.count(words) == 1
    assert PROGRAMS["gguf"](folder).returncode == 0
    fields = gguf.GGUFReader(folder.parent / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == CHATML
    assert PROGRAMS["fine-tune"](folder).returncode == 0
    tuned = danube3.find_checkpoint(folder.parent / "tuned")
    assert danube3.load_checkpoint(tuned)[1].chat_template == danube3.CHAT_TEMPLATE
    assert words not in PROGRAMS["evaluate"](tuned).stderr


def trained_tokenizer(path, **changes):
    """A sentencepiece model with the Mistral tokenizer's settings, but for `changes`."""
    model = io.BytesIO()
    settings = {
        "vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "num_threads": 1,
        "allow_whitespace_only_pieces": True, "character_coverage": 0.99995, "minloglevel": 2,
        "hard_vocab_limit": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3), model_writer=model, **{**settings, **changes}
    )
    path.write_bytes(model.getvalue())
    return danube3.Tokenizer(path)


@pytest.mark.parametrize("prefix", [True, False])
def test_row_6_a_tokenizer_without_dummy_prefix(prefix, folder):
    """GGUF and Hugging Face folder say what the tokenizer does; transformers makes the same ids."""
    from transformers import AutoTokenizer

    tokenizer = trained_tokenizer(folder.parent / "own.model", add_dummy_prefix=prefix)
    out = folder.parent / "own"
    danube3.save_checkpoint(out, random_model(EVEN), tokenizer)
    theirs = AutoTokenizer.from_pretrained(out)
    for text in ("Ada lives in Marrow", "<|prompt|>Ada", "\u00e9t\u00e9 \U0001f600\nShe"):
        assert theirs(text).input_ids == tokenizer.encode_prompt(text)
    quantize.write_gguf(out, folder.parent / "own.gguf")
    fields = gguf.GGUFReader(folder.parent / "own.gguf").fields
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is prefix


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"model_type": "char"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nfkc_cf"},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["<|prompt|>"]},
    ],
)
def test_row_6_tokenizers_that_gguf_cannot_hold(changes, folder):
    tokenizer = trained_tokenizer(folder.parent / "own.model", **changes)
    config = dataclasses.replace(EVEN, vocab_size=max(330, tokenizer.vocab_size))
    danube3.save_checkpoint(folder.parent / "own", random_model(config), tokenizer)
    with pytest.raises(danube3.DanubeError, match="GGUF cannot hold this tokenizer"):
        quantize.write_gguf(folder.parent / "own", folder.parent / "own.gguf")
    assert not list(folder.parent.glob("own.gguf*"))


def test_row_6_the_mistral_tokenizer_is_held():
    from importlib.resources import files

    tokenizer = danube3.Tokenizer(files("mistral_common") / "data" / "tokenizer.model.v1")
    writer = gguf.GGUFWriter(None, "llama")
    config = dataclasses.replace(EVEN, vocab_size=32_000)
    with torch.device("meta"):
        quantize.describe_for_gguf(writer, danube3.Danube3(config), tokenizer)
    assert writer.kv_data[0]["tokenizer.ggml.add_space_prefix"].value is True


def bos_settings(folder):
    """What a folder and its GGUF file say about <s>."""
    path = folder.parent / f"{folder.name}.gguf"
    quantize.write_gguf(folder, path)
    in_gguf = gguf.GGUFReader(path).fields["tokenizer.ggml.add_bos_token"].contents()
    return danube3.read_json(folder / "tokenizer_config.json")["add_bos_token"], in_gguf


def test_row_7_chat_models_say_that_prompts_have_no_bos(folder):
    """Documents are trained with <s>, conversations without: folders, quantized or merged, and GGUF say so."""
    assert bos_settings(folder) == (True, True)
    place, chat = folder.parent, folder.parent / "chat.jsonl"
    assert PROGRAMS["fine-tune"](folder).returncode == 0
    tuned = danube3.find_checkpoint(place / "tuned")
    assert bos_settings(tuned) == (False, False)
    assert not danube3.load_checkpoint(tuned)[1].add_bos
    assert call("quantize.py", tuned, "--bits", 4, "--out", place / "int4").returncode == 0
    assert bos_settings(place / "int4") == (False, False)
    flags = ("--lora", 4, "--merge", place / "merged", "--out", place / "lora")
    assert call("train.py", "--chat", chat, "--init", folder, *flags).returncode == 0
    assert bos_settings(place / "merged") == (False, False)
    change_json(folder / "tokenizer_config.json", add_bos_token=False)
    assert bos_settings(folder) == (False, False)
    path = folder / "tokenizer_config.json"  # null: the default
    path.write_text(json.dumps({**danube3.read_json(path), "add_bos_token": None}))
    assert danube3.load_checkpoint(folder)[1].add_bos


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@each_program
def test_row_8_several_stop_ids(program, file, folder):
    """Generation ends at any of them; what is written keeps them."""
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    change_json(folder / file, eos_token_id=[2, 9])
    assert PROGRAMS[program](folder).returncode == 0
    model, tokenizer = danube3.load_checkpoint(folder)
    assert model.stop_ids == [2, 9]
    if program == "complete":
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(1.0)  # one hidden state for all tokens
            model.lm_head.weight.zero_()
            model.lm_head.weight[9] = model.model(torch.tensor([[1]]))[0, 0]
        assert danube3.generate(model, torch.tensor([[1, 5]]), 20).tolist() == [[1, 5, 9]]
    for out in ("tuned", "int8"):
        if (folder.parent / out).exists():
            assert danube3.load_checkpoint(folder.parent / out)[0].stop_ids == [2, 9]
    if program == "gguf":
        fields = gguf.GGUFReader(folder.parent / "model.gguf").fields
        assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
        assert fields["tokenizer.ggml.eot_token_id"].contents() == 9
        change_json(folder / file, eos_token_id=[2, 9, 10])
        (folder.parent / "model.gguf").unlink()
        refused_by(program, folder, "GGUF cannot hold three stop tokens")


# ---- Rows 9 to 13: what people write


@pytest.mark.parametrize("content", [SENTENCES[0], QUESTIONS, TALKS], ids=["text", "questions", "conversations"])
def test_row_9_byte_order_marks(content, folder, tokenizer):
    """A mark at the head of a file is no part of it."""
    plain, marked = folder.parent / "plain.jsonl", folder.parent / "marked.jsonl"
    if isinstance(content, str):
        plain, marked = plain.with_suffix(".txt"), marked.with_suffix(".txt")
        plain.write_text(content, encoding="utf-8")
    else:
        write_jsonl(plain, content)
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    if content == TALKS:
        assert conversations_in(marked) == conversations_in(plain)
        return
    results = [call("sample.py", folder, "--eval", path).stdout for path in (plain, marked)]
    assert results[0] == results[1] != ""


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_row_9_byte_order_marks_in_folders(file, folder):
    (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())
    assert danube3.load_checkpoint(folder)[0].config == EVEN


@pytest.mark.parametrize("layout", ["lines", "array", "pretty"])
@pytest.mark.parametrize("name", ["q.json", "Q.JSON", "q.jsonl", "Q.JSONL"])
def test_row_11_arrays_of_questions(name, layout, folder):
    path = write_jsonl(folder.parent / name, QUESTIONS)
    if layout != "lines":
        path.write_text(json.dumps(QUESTIONS, indent=4 if layout == "pretty" else None))
    result = call("sample.py", folder, "--eval", path)
    assert result.stdout == PROGRAMS["evaluate"](folder).stdout != ""


def test_row_11_arrays_of_conversations(folder):
    path = folder.parent / "chat.json"
    path.write_text(json.dumps(TALKS, indent=2))
    assert conversations_in(path) == [talk["messages"] for talk in TALKS]
    path.write_text(json.dumps([*TALKS, "text"]))
    with pytest.raises(danube3.DanubeError, match="chat.json, line 1, is not a JSON object"):
        conversations_in(path)


def test_row_12_empty_columns(folder):
    """Tables turned into JSON lines have all columns in each line: what is null is not there."""
    full = [{"text": None, "label": None, "choices": None, **talk} for talk in TALKS]
    assert conversations_in(write_jsonl(folder.parent / "t.jsonl", full)) == [t["messages"] for t in TALKS]
    also = [{"text": "", **talk} for talk in TALKS]
    assert conversations_in(write_jsonl(folder.parent / "t.jsonl", also)) == [t["messages"] for t in TALKS]
    questions = [{"messages": None, "label": None, **question} for question in QUESTIONS]
    path = write_jsonl(folder.parent / "q.jsonl", questions)
    assert call("sample.py", folder, "--eval", path).stdout == PROGRAMS["evaluate"](folder).stdout


# ---- Rows 14 to 17: files that are not what their names say

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 12345\n"


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.model", "config.json"])
@each_program
def test_row_14_git_lfs_pointers(program, file, checksums, folder):
    """Named as what they are, also where the folder has checksums."""
    if checksums:
        danube3.write_checksums(folder)
    (folder / file).write_text(POINTER)
    refused_by(program, folder, f"{file} is a Git-LFS pointer: run `git lfs pull`, or download the file")


def test_row_14_pointers_in_place_of_texts(folder):
    for name in ("text.txt", "quiz.jsonl", "chat.jsonl"):
        (folder.parent / name).write_text(POINTER)
        flags = ("--eval", folder.parent / name)
        result = call("sample.py", folder, *flags) if name != "chat.jsonl" else PROGRAMS["fine-tune"](folder)
        assert f"{name} is a Git-LFS pointer" in one_line_error(result)


@pytest.mark.parametrize("found", ["pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", None])
@each_program
def test_row_15_weights_under_other_names(program, found, folder):
    (folder / "model.safetensors").unlink()
    if found:
        (folder / found).write_bytes(b"weights")
    refused_by(program, folder, f"model.safetensors is missing. Found: {found or 'nothing else'}. Pickle files")


def test_row_15_adapters_under_another_name(folder):
    adapters = folder.parent / "adapters"
    adapters.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 4, "lora_alpha": 4}
    danube3.write_json(adapters / "adapter_config.json", settings)
    (adapters / "adapter_model.bin").write_bytes(b"weights")
    line = one_line_error(PROGRAMS["complete"](adapters))
    assert "adapter_model.safetensors is missing. Found: adapter_model.bin. Pickle files" in line


@pytest.mark.parametrize("stored", ["both", "lm_head.weight", "model.embed_tokens.weight"])
@each_program
def test_row_16_tied_embeddings(program, stored, folder):
    weights = weights_of(folder)
    if stored != "both":
        weights.pop(({"lm_head.weight", "model.embed_tokens.weight"} - {stored}).pop())
        danube3.write_tensors(folder / "model.safetensors", weights)
    change_json(folder / "config.json", tie_word_embeddings=True, pad_token_id=-1)
    assert PROGRAMS[program](folder).returncode == 0
    model, _ = danube3.load_checkpoint(folder)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(model.get_parameter(name), weights[name if stored == "both" else stored])
    assert model.config.pad_token_id == 0
    if program == "gguf":
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder.parent / "model.gguf").tensors}
        expected = model.lm_head.weight.detach().half().numpy()
        assert np.array_equal(tensors["output.weight"], expected)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@each_program
def test_row_17_names_from_compiled_and_wrapped_models(program, prefix, folder):
    weights = weights_of(folder)
    danube3.write_tensors(folder / "model.safetensors", {prefix + name: w for name, w in weights.items()})
    assert PROGRAMS[program](folder).returncode == 0
    model, _ = danube3.load_checkpoint(folder)
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())


# ---- More inputs, each after a public report


def logits_of(folder):
    with torch.no_grad():
        return danube3.load_checkpoint(folder, dtype=torch.float32)[0](torch.arange(3, 12)[None])


@pytest.mark.parametrize("inner", ["rope_parameters", "rope_scaling"])
def test_two_different_rope_thetas(inner, folder):
    """DeepSpeed 8345: a configuration of an older form beside one of transformers 5. The inner value counts."""
    from transformers import AutoModelForCausalLM

    rope = {"rope_theta": 1e5, "rope_type": "default"}
    change_json(folder / "config.json", rope_theta=1e4, **{inner: rope})
    assert danube3.read_config(folder).rope_theta == 1e5
    if inner == "rope_parameters":
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 12)[None]).logits
        assert (logits_of(folder) - theirs).abs().max() < 1e-4


def test_the_index_says_which_copy_counts(folder):
    """vllm 54230: a tensor in two shards is read from the one that the index names."""
    weights = weights_of(folder)
    old = {"lm_head.weight": weights["lm_head.weight"] + 1, "model.norm.weight": weights["model.norm.weight"]}
    first = {name: weight for name, weight in weights.items() if name != "model.norm.weight"}
    for name, part in (("a", first), ("b", old)):
        danube3.write_tensors(folder / f"{name}.safetensors", part)
    names = {**dict.fromkeys(weights, "a.safetensors"), "model.norm.weight": "b.safetensors"}
    danube3.write_json(folder / "model.safetensors.index.json", {"weight_map": names})
    (folder / "model.safetensors").unlink()
    model, _ = danube3.load_checkpoint(folder)
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())


@pytest.fixture
def adapters(folder):
    out = folder.parent / "adapters"
    flags = ("--chat", folder.parent / "chat.jsonl", "--init", folder, "--lora", 4, "--learning-rate", 0.1)
    assert call("train.py", *flags, "--out", out).returncode == 0
    adapters = danube3.find_checkpoint(out)
    (adapters / "SHA256SUMS").unlink()
    return adapters


def test_adapters_without_tensors(adapters):
    """alpaca-lora 446: an adapter file of 443 bytes. It would answer as its base does."""
    danube3.write_tensors(adapters / "adapter_model.safetensors", {})
    assert "does not fit the base it names" in one_line_error(PROGRAMS["complete"](adapters))


def test_adapters_beside_a_whole_model(adapters, folder):
    """peft 1381, trl 2707: a merged model saved where its adapters are. It is not applied twice."""
    for path in folder.iterdir():
        shutil.copy(path, adapters)
    assert "holds adapters and a whole model" in one_line_error(PROGRAMS["complete"](adapters))


def test_adapters_with_the_name_that_peft_gives_in_memory(adapters):
    """peft 2699: `lora_A.default.weight`."""
    path = adapters / "adapter_model.safetensors"
    expected = logits_of(adapters)
    renamed = {name.replace(".weight", ".default.weight"): w for name, w in safetensors.torch.load_file(path).items()}
    danube3.write_tensors(path, renamed)
    assert torch.equal(logits_of(adapters), expected)


@pytest.mark.parametrize("field", ["trainable_token_indices", "layer_replication", "lora_bias"])
def test_adapters_of_another_kind(field, adapters):
    """vllm 36501: peft computes something else where these are set."""
    change_json(adapters / "adapter_config.json", **{field: [1, 2]})
    assert "is not plain LoRA: merge those adapters" in one_line_error(PROGRAMS["complete"](adapters))


def test_a_copy_beside_the_weights_of_a_base(adapters, folder):
    """unsloth 8566: a file that is not read does not change which base adapters belong to."""
    expected = logits_of(adapters)
    (folder / "._model.safetensors").write_bytes(b"macOS")
    assert torch.equal(logits_of(adapters), expected)


@pytest.mark.parametrize("place", ["weights", "adapters"])
def test_float8(place, adapters, folder):
    """safetensors 404: a model that was stored in 8-bit floats."""
    path = folder / "model.safetensors" if place == "weights" else adapters / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(path)
    stored = {name: w.to(torch.float8_e4m3fn) if w.dim() == 2 else w for name, w in weights.items()}
    danube3.write_tensors(path, stored)
    if place == "adapters":  # small: read as any other type
        assert PROGRAMS["complete"](adapters).returncode == 0
        return
    for name in PROGRAMS:
        refused_by(name, folder, "is torch.float8_e4m3fn, which is not read here: quantize the original model anew")


def test_a_piece_that_was_renamed(folder, tokenizer):
    """InternLM2: `added_tokens_decoder` gives an id that tokenizer.model has another name."""
    renamed = {str(i): {"content": tokenizer.sp.id_to_piece(i), "special": True} for i in (0, 1, 2, 300)}
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=renamed)
    danube3.load_checkpoint(folder)
    change_json(folder / "tokenizer_config.json", added_tokens_decoder={"300": {"content": "<|im_end|>"}})
    assert "tokenizer.model lacks '<|im_end|>'" in one_line_error(PROGRAMS["complete"](folder))


@pytest.mark.parametrize("processor, add_bos", [(None, False), ({"single": [{"SpecialToken": {"id": "<s>"}}]}, True)])
def test_bos_of_transformers_5(processor, add_bos, folder):
    """transformers 30947: where tokenizer_config.json is silent, tokenizer.json says whether prompts begin with <s>."""
    change_json(folder / "tokenizer_config.json", add_bos_token=None)
    (folder / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    assert danube3.load_checkpoint(folder)[1].add_bos is add_bos


@pytest.mark.parametrize("ids", [[7, 2], [2, 7]])
def test_stop_ids_in_any_order(ids, folder):
    """optimum-neuron 580: </s> is not always the first of them."""
    change_json(folder / "config.json", eos_token_id=ids)
    (folder / "generation_config.json").unlink()
    model, _ = danube3.load_checkpoint(folder)
    assert model.config.eos_token_id == 2 and model.stop_ids == ids


def test_a_setting_that_a_merge_left_over(folder):
    """unsloth 1601: `quantization_config` of bitsandbytes, with 16-bit weights. The tensors decide."""
    expected = logits_of(folder)
    change_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert torch.equal(logits_of(folder), expected)
    assert PROGRAMS["quantize"](folder).returncode == 0


def test_checksums_of_other_programs(folder):
    """sha256sum on Windows writes `*name`. A file that was edited is named, with the way out."""
    danube3.write_checksums(folder)
    sums = folder / "SHA256SUMS"
    sums.write_text("\n" + sums.read_text().replace("  ", " *").replace("\n", "\n\n"))
    danube3.load_checkpoint(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    line = one_line_error(PROGRAMS["complete"](folder))
    assert "config.json is missing or damaged, says SHA256SUMS" in line and "remove the line there if you" in line


@pytest.mark.parametrize("call_that_fails", ["flock", "fsync", "chmod"])
def test_network_disks(call_that_fails, folder, monkeypatch):
    """tensorstore 183, borg 1287, datasets 8125: no locks, no sync of folders, no permissions. The run goes on."""
    import os
    import stat

    fsync = os.fsync

    def fail(handle, *_, **__):
        if call_that_fails == "fsync" and not stat.S_ISDIR(os.fstat(handle).st_mode):
            return fsync(handle)
        raise PermissionError(1, "not here") if call_that_fails == "chmod" else OSError(38, "not implemented")

    if call_that_fails == "flock":
        monkeypatch.setattr(danube3.fcntl, "flock", fail)
    elif call_that_fails == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(danube3.Path, "chmod", fail)
    assert PROGRAMS["fine-tune"](folder).returncode == 0
    danube3.load_checkpoint(folder.parent / "tuned")


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(danube3.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    opened = len(list(danube3.Path("/proc/self/fd").glob("*")))  # 0 where there is no /proc
    danube3.sync(tmp_path)
    with pytest.raises(OSError, match="Input/output error"):
        danube3.sync(tmp_path / "file")
    with danube3.locked(tmp_path):
        for _ in range(3):
            with pytest.raises(danube3.DanubeError, match="in use by another program"), danube3.locked(tmp_path):
                pass
    assert len(list(danube3.Path("/proc/self/fd").glob("*"))) == opened


@pytest.mark.parametrize("content", ["Caf\u00e9".encode("utf-16"), "Caf\u00e9".encode("latin-1"), b"\x1f\x8b\x08"])
def test_text_in_another_encoding(content, folder):
    """minimind 551: UTF-16 of PowerShell, Latin-1, a gzip file without its suffix."""
    (folder.parent / "text.txt").write_bytes(content)
    line = one_line_error(call("sample.py", folder, "--eval", folder.parent / "text.txt"))
    assert "text.txt is not UTF-8 text" in line and "convert or unpack it" in line


@pytest.mark.parametrize("extra", [{"weight": 0}, {"train": False}, {"tool_calls": [{"id": 1}]},
                                   {"reasoning_content": "Hm."}])  # fmt: skip
def test_messages_that_are_more_than_text(extra, folder):
    """axolotl 1703, minimind 737: an answer that is not to be learnt, or only a part of what was said."""
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here.", **extra}]
    path = write_jsonl(folder.parent / "chat.jsonl", [*TALKS, {"messages": talk}])
    with pytest.raises(danube3.DanubeError, match="chat.jsonl, line 9: message 2 is not to be learnt"):
        conversations_in(path)
    harmless = {"weight": None, "train": None, "tool_calls": None, "reasoning_content": "", "name": "Ada"}
    talk[1] = {"role": "assistant", "content": "Here.", **harmless}
    write_jsonl(path, [*TALKS, {"messages": talk}])
    assert PROGRAMS["fine-tune"](folder).returncode == 0


@pytest.mark.parametrize("system", ["", " \n"])
def test_an_empty_system_message(system, tmp_path):
    """pydantic-ai 2678: nothing is put in front of the question."""
    messages = [{"role": "system", "content": system}, *TALKS[0]["messages"]]
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": messages}])
    assert conversations_in(path, fold_system=True) == [TALKS[0]["messages"]]


def test_conversations_with_a_label(tmp_path):
    """Scored conversations: the messages are the conversation."""
    path = write_jsonl(tmp_path / "t.jsonl", [{**TALKS[0], "label": True}])
    assert conversations_in(path) == [TALKS[0]["messages"]]


@pytest.mark.parametrize("answer, text, right", [
    ("\u5317\u4eac", "\u4ed6\u5728\u5317\u4eac\u5de5\u4f5c\u3002", 1.0), ("Caf\u00e9", "Cafe\u0301.", 1.0),
    ("\u6771\u4eac", "\u6771\u4eac\u30bf\u30ef\u30fc", 1.0), ("3", "In 1913.", 0.0),
    ("Caf", "Caf\u00e9.", 0.0), ("Marrow", "Marrows", 0.0)])  # fmt: skip
def test_answers_of_other_scripts(answer, text, right, folder, monkeypatch):
    """litellm 35984: Chinese and Japanese have no spaces between words. OCR-D 225: accents in two forms."""
    model, tokenizer = danube3.load_checkpoint(folder)
    monkeypatch.setattr(sample, "answer_all", lambda *args, **_: [(text, True)])
    question = {"messages": TALKS[0]["messages"][:1], "answer": answer}
    assert sample.generative_evaluation(model, tokenizer, [question])["right in turn 1"] == right


@pytest.mark.parametrize("question, words", [
    ({"prompt": "x", "choices": [" a", " a"], "answer": 0}, "two of its choices are the same"),
    ({"prompt": "x", "choices": [" a", " b"], "answer": "B"}, "'B' is no \"answer\", the index of one of its"),
    ({"messages": TALKS[0]["messages"][:1], "answer": " "}, 'its "answer" must be text')])  # fmt: skip
def test_questions_without_a_right_answer(question, words, folder):
    """lm-evaluation-harness 1447: letters as answers; choices that cannot be told apart."""
    path = write_jsonl(folder.parent / "q.jsonl", [question])
    assert words in one_line_error(call("sample.py", folder, "--eval", path))


def test_prompts_from_windows(folder, monkeypatch):
    """llama.cpp 1444: a mark, Windows line ends and the last newline of a piped text are no part of the prompt."""
    answers = []
    for piped in (b"Ada\nlives", b"\xef\xbb\xbfAda\r\nlives\r\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped)))
        answers.append(call("sample.py", folder, "-", "--temperature", 0, "--max-new-tokens", 5).stdout)
    assert answers[0] == answers[1]


def test_an_added_padding_token(folder):
    """The commonest change to a tokenizer. No text holds it, and it is never a target."""
    change_json(folder / "tokenizer_config.json", pad_token="<pad>", added_tokens_decoder={"330": {"content": "<pad>"}})
    assert PROGRAMS["complete"](folder).returncode == 0
    pad = {"content": "<pad>", "special": True}
    change_json(folder / "tokenizer_config.json", pad_token=pad)
    assert PROGRAMS["complete"](folder).returncode == 0
    end = {"330": {"content": "<|im_end|>"}}
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=end)
    assert "lacks '<|im_end|>'" in one_line_error(PROGRAMS["complete"](folder))
    change_json(folder / "tokenizer_config.json", pad_token=None)
    assert "lacks '<|im_end|>'" in one_line_error(PROGRAMS["complete"](folder))


@pytest.mark.parametrize("use", [{"chat_template": CHATML}, {"eos_token": "<|im_end|>"}])
@pytest.mark.parametrize("pad", ["<|im_end|>", {"content": "<|im_end|>"}])
def test_a_padding_token_that_also_ends_messages(pad, use, folder):
    """ChatML models pad with the token that ends a message: it is used, so it cannot be ignored."""
    changes = {"added_tokens_decoder": {"330": {"content": "<|im_end|>"}}, "pad_token": pad, **use}
    change_json(folder / "tokenizer_config.json", **changes)
    assert "lacks '<|im_end|>'" in one_line_error(PROGRAMS["complete"](folder))


def test_adapters_on_the_head(adapters):
    """llama.cpp 3651: more than the linear layers of decoder layers was trained."""
    path = adapters / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights |= {f"base_model.model.lm_head.lora_{letter}.weight": torch.ones(4, 64) for letter in "AB"}
    danube3.write_tensors(path, weights)
    assert "changes lm_head too: merge those adapters" in one_line_error(PROGRAMS["complete"](adapters))


@pytest.mark.parametrize("number, text", [(999_499, "999k"), (999_999, "1M"), (999_600_000, "1B"), (999, "999")])
def test_counts_that_round_up(number, text):
    """They are read again: data/prepare.py prints a command with such a count."""
    assert cli.short_count(number) == text and cli.token_count(text)
