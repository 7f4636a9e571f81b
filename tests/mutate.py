"""Do the tests notice? `python tests/mutate.py` changes our files by one token at a time, and tests the result.

A mutant is one small change of the syntax tree inside the functions in TARGETS: another operator, sign, comparison or
constant, an index off by one, a flipped flag, a dropped call, two swapped arguments. A mutant that passes all the fast
tests has survived: either the tests are blind there, or it changes nothing. Not part of CI.
"""

import argparse
import ast
import copy
import hashlib
import importlib
import json
import os
import random
import sys
import time
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TARGETS = """rms_norm rotary_table rotary_embedding grouped_query_attention swiglu cross_entropy KVCache RMSNorm
    Attention MLP DecoderLayer Decoder Danube3 next_token_probabilities generate_tokens generate
    TokenData.block TokenData.count_blocks TokenData.read TokenData.evenly_spread mixture_pattern permuted_index
    StagedData use_activation_checkpointing Trainer.is_milestone
    TrainConfig.stage_ends TrainConfig.with_tokens make_optimizer learning_rate sequence_lengths micro_batches
    train_step evaluate_loss first_difference render_chat StreamingDetokenizer count_parameters flops_per_token
    sft_config pad_sequences ChatData LoRALinear add_lora merge_lora
    stored_scales quantize_int8 nearest_codes quantize_int4 pack unpack dequantize DequantizedMatmul
    int8_matvec QuantizedLinear use_quantized_modules search_scales round_to_nearest calibrate
    remix memory_bytes choose_checkpointing adjust dequantize_model
    ChatSession sliding_windows text_perplexity continuation_log_likelihoods encode_choice choice_log_likelihoods
    multiple_choice classification answer_all generative_evaluation
    sample_sequences linears_and_inputs calibrate_model layout quantization_config
    interleave_heads gguf_blocks gguf_tensors
    token_count positive json_rows csv_rows table_suffix read_rows sharegpt alpaca completion messages_of check_turns
    read_conversations shorten label_text Task softmax area_under_curve label_metrics labelled_conversations
    read_examples is_labelled task_of write_probabilities adapter_base find_checkpoint
    sync locked verify_checksums read_config read_stop_ids read_tokenizer require_weights read_weights load_adapters
    load_checkpoint cut text_rows documents_of Source encode encode_all spool select write_shards
    tokens_needed pick_device GraphedStep VectorProduct compile_decoding prepare_decoding measure_decoding
    fit rate play""".split()
MODULES = "danube3 train sample quantize data.read data.cli data.classify data.prepare data.arena".split()
FILES = """building_blocks twins model data config tokenizer training checkpoint field chat quantize prepare
    classify arena""".split()
FAST_TESTS = [f"tests/test_{name}.py" for name in FILES]
SLOW = """published 4b twenty fifty command kill interrupt resum overwritten flags finite compiled validation
    micro_batch_size_may sample plan pipe ctrl fp16 half_precision peft warm cannot help scores cache_of_one
    long_conversations peak""".split()
FAST = " and ".join(f"not {word}" for word in SLOW)

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
             ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
               ast.Is: ast.IsNot, ast.IsNot: ast.Is}


def changes(node):
    """All one-token changes of one node, as functions that change a copy of it in place or return its replacement."""
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield "operator", lambda n: setattr(n, "op", OPERATORS[type(n.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Sub, ast.Div, ast.FloorDiv)):
        yield "swapped operands", lambda n: ast.BinOp(n.right, n.op, n.left)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield "comparison", lambda n: n.ops.__setitem__(0, COMPARISONS[type(n.ops[0])]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "dropped minus", lambda n: n.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "flipped flag", lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "constant", lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.Call) and len(node.args) >= 2 and not isinstance(node.args[0], ast.Starred):
        yield "swapped arguments", lambda n: n.args.__setitem__(slice(0, 2), n.args[1::-1])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if not isinstance(node.func.value, ast.Name):
            yield "dropped call", lambda n: n.func.value  # x[0].float() -> x[0]
        elif node.args:
            yield "dropped call", lambda n: n.args[0]  # F.silu(gate) -> gate
    if isinstance(node, ast.IfExp):
        yield "swapped branches", lambda n: ast.IfExp(n.test, n.orelse, n.body)
    if isinstance(node, ast.BoolOp):
        yield "and/or", lambda n: setattr(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())
    if isinstance(node, ast.keyword) and node.arg in ("enable_gqa", "dim", "dtype"):
        yield "dropped keyword", None


def functions(tree):
    """The function definitions in TARGETS; a class stands for all its methods."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                names = {node.name, f"{node.name}.{getattr(method, 'name', '')}"}
                if isinstance(method, ast.FunctionDef) and names & set(TARGETS):
                    yield f"{node.name}.{method.name}", method
        elif isinstance(node, ast.FunctionDef) and node.name in TARGETS:
            yield node.name, node


def inside_error(function):
    """Nodes that only word an error, a docstring or a type: not worth a mutant."""
    skipped = set()
    for node in ast.walk(function):
        parts = [node] if isinstance(node, (ast.Raise, ast.JoinedStr)) else []
        parts += [node.returns] if isinstance(node, ast.FunctionDef) and node.returns else []
        parts += [node.annotation] if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation else []
        skipped.update(id(part) for whole in parts for part in ast.walk(whole))
    return skipped


def mutants(source, only=""):
    """(name, line, kind, mutated source) of every mutant, of functions whose name contains `only`."""
    tree = ast.parse(source)
    for name, function in functions(tree):
        if only not in name:
            continue
        skipped = inside_error(function)
        for index, node in enumerate(ast.walk(function)):
            if id(node) in skipped:
                continue
            for number, (kind, change) in enumerate(changes(node)):
                mutated = copy.deepcopy(tree)
                target = dict(functions(mutated))[name]
                twin = list(ast.walk(target))[index]
                if change is None:
                    owner = next(n for n in ast.walk(target) if isinstance(n, ast.Call) and twin in n.keywords)
                    owner.keywords.remove(twin)
                else:
                    replacement = list(changes(twin))[number][1](twin)
                    if replacement is not None:
                        replace_node(target, twin, replacement)
                line = getattr(node, "lineno", function.lineno)
                yield name, line, kind, ast.unparse(ast.fix_missing_locations(mutated))


def replace_node(tree, old, new):
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
            elif isinstance(value, list) and any(item is old for item in value):
                value[:] = [new if item is old else item for item in value]


def survives(module_name, source, seconds, name=""):
    """Run the fast tests on a mutant of a module in a forked process, which has everything but our modules imported
    already; first the files that speak of what was changed."""
    tests = sorted(FAST_TESTS, key=lambda path: name.split(".")[0] not in Path(path).read_text())
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        code = 1
        try:
            import pytest
            module = types.ModuleType(module_name)
            sys.modules[module_name] = module
            exec(compile(source, f"{module_name}.py", "exec"), module.__dict__)
            if "." in module_name:  # `from data import read` asks the package
                setattr(importlib.import_module(module_name.split(".")[0]), module_name.split(".")[1], module)
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", FAST, *tests]))
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False  # a mutant that never ends has been noticed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="only so many, drawn at random (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="2/3: the second third, to share the work among processes")
    parser.add_argument("--only", default="", help="only functions whose name contains this")
    parser.add_argument("--state", type=Path, default=ROOT / "out" / "mutants.jsonl",
                        help="results so far; the same command goes on behind them")
    parser.add_argument("--list", action="store_true", help="count them, run nothing")
    args = parser.parse_args()
    os.chdir(ROOT)
    sources = {module: (ROOT / f"{module.replace('.', '/')}.py").read_text() for module in MODULES}
    known = {name for source in sources.values() for name, _ in functions(ast.parse(source))}
    gone = [name for name in TARGETS if name not in known | {each.partition(".")[0] for each in known}]
    assert not gone, f"TARGETS names what is gone: {gone}"
    found = [(module, *mutant) for module, source in sources.items() for mutant in mutants(source, args.only)]
    if args.sample:
        found = random.Random(args.seed).sample(found, min(args.sample, len(found)))
    part, parts = map(int, args.part.split("/"))
    found = found[part - 1::parts]
    if args.list:
        print(f"{len(found)} mutants")
        return
    import gguf  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    torch.set_num_threads(1)
    start, survivors = time.monotonic(), []
    original = ast.unparse(ast.parse(sources["danube3"]))
    assert survives("danube3", original, 600), "the unchanged file fails its own tests"
    limit = 3 * (time.monotonic() - start) + 20
    args.state.parent.mkdir(parents=True, exist_ok=True)
    args.state.touch()
    results = dict(map(json.loads, args.state.read_text().splitlines()))
    for number, (module, name, line, kind, mutated) in enumerate(found, start=1):
        key = hashlib.sha256(mutated.encode()).hexdigest()
        if key not in results:
            results[key] = survives(module, mutated, limit, name)
            with open(args.state, "a") as file:
                file.write(json.dumps([key, results[key]]) + "\n")
        if results[key]:
            survivors.append((name, line, kind))
            text = sources[module].splitlines()[line - 1].strip()[:100]
            print(f"survived: {module}.{name}:{line} {kind}: {text}", flush=True)
        if number % 20 == 0:
            seconds = time.monotonic() - start
            print(f"  {number} of {len(found)}, {len(survivors)} survived, {seconds:.0f} s", flush=True)
    print(f"{len(found)} mutants, {len(found) - len(survivors)} noticed, {len(survivors)} survived")


if __name__ == "__main__":
    main()
