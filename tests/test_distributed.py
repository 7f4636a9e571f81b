"""Several processes under torchrun, over gloo: the same run as one process makes, whatever happens to them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, call, digest, one_line_error

import danube3

pytestmark = pytest.mark.slow

FLAGS = ["--tokens", "31k", "--save-every", "30", "--learning-rate", "1e-3"]


def start(processes, *args, program="train.py"):
    """Start a program under torchrun (one process: by itself), in a session of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(program), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, seconds=240):
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def steps_of(out):
    path = Path(out) / "metrics.jsonl"
    return [e for e in map(json.loads, path.read_text().splitlines()) if "lr" in e] if path.exists() else []


def wait_for_step(process, out, step):
    """Until the log has that step; its last line may be half written."""
    while process.poll() is None:
        try:
            if len(steps_of(out)) >= step:
                return
        except ValueError:
            pass
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def workers(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def same_validation(out, expected, entries=2):
    ours, theirs = (
        [e for e in map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines()) if "val_loss" in e]
        for run in (out, expected)
    )
    assert [e["step"] for e in ours] == [e["step"] for e in theirs] and len(ours) >= entries
    for a, b in zip(ours, theirs):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)


def same_curve(steps, expected):
    assert [e["step"] for e in steps] == [e["step"] for e in expected]
    assert [e["lr"] for e in steps] == [e["lr"] for e in expected]
    for ours, theirs in zip(steps, expected):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), ours


@pytest.fixture(scope="module")
def alone(toy_data, tmp_path_factory):
    """Thirty steps in one process, in micro-batches of two; the first gradients are longer than grad_clip."""
    out = tmp_path_factory.mktemp("alone") / "run"
    process = start(1, "--data", toy_data, *FLAGS, "--micro-batch-size", 2, "--out", out)
    assert "try: python" in finish(process)
    assert len(steps_of(out)) == 30 and max(e["grad_norm"] for e in steps_of(out)) > 1.2
    return out


def test_bf16_and_blocks_of_logits(toy_data, tmp_path):
    """As on GPUs: an all-gather of bf16 weights, a reduce-scatter of fp32 gradients, logits in blocks. The losses are
    those of one process, but for the rounding of bf16."""
    program = tmp_path / "as_on_gpus.py"
    program.write_text(
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); import danube3\n"
        "danube3.LOGIT_TOKENS = 100\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    losses = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = ("--data", toy_data, "--tokens", "8k", "--micro-batch-size", 2, "--out", out, "--dtype", "bfloat16")
        output = finish(start(processes, *flags, program=program))
        assert f"{processes} x cpu in bfloat16" in output, output
        losses.append([e["loss"] for e in steps_of(out)])
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=2e-3) and losses[1] != losses[0]


@pytest.mark.parametrize(
    "processes, micro_batch_size, checkpointing, compiled",
    [(2, 3, "off", False), (4, 1, "on", False), (2, 3, "off", True), (2, 2, "on", True)],
)
def test_processes_make_the_same_run(processes, micro_batch_size, checkpointing, compiled, alone, toy_data, tmp_path):
    """With gradient accumulation, clipping and activation checkpointing, also compiled, which is the default on GPUs;
    and the checkpoint is an ordinary one."""
    flags = ("--data", toy_data, *FLAGS, "--micro-batch-size", micro_batch_size, "--out", tmp_path / "run")
    flags += ("--activation-checkpointing", checkpointing, "--compile" if compiled else "--no-compile")
    output = finish(start(processes, *flags))
    assert output.count("trainable parameters") == 1 and f"{processes} x cpu" in output
    same_curve(steps_of(tmp_path / "run"), steps_of(alone))
    same_validation(tmp_path / "run", alone)
    ours, theirs = (danube3.load_checkpoint(folder)[0] for folder in (tmp_path / "run", alone))
    assert max((a - b).abs().max() for a, b in zip(ours.parameters(), theirs.parameters())) < 1e-4
    names = {path.name for path in danube3.find_checkpoint(alone).iterdir()}
    assert {path.name for path in danube3.find_checkpoint(tmp_path / "run").iterdir()} == names


def test_a_process_dies_and_others_go_on(alone, toy_data, tmp_path):
    """One of two is killed after step 17; four go on, all are killed after step 23; one goes on to the end."""
    flags = ("--data", toy_data, *FLAGS, "--save-every", 5, "--micro-batch-size", 2, "--out", tmp_path / "run")
    process = start(2, *flags)
    wait_for_step(process, tmp_path / "run", 17)
    os.kill(workers(process)[1], signal.SIGKILL)
    begin = time.monotonic()
    output = finish(process, 60)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in output and time.monotonic() - begin < 60
    danube3.verify_checksums(checkpoint := danube3.find_checkpoint(tmp_path / "run"))
    assert checkpoint.name == "step-0000015"

    process = start(4, *flags, "--micro-batch-size", 1, "--resume")
    wait_for_step(process, tmp_path / "run", 23)
    children = workers(process)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in children:  # torchrun gives each a session of its own
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert "try: python" in finish(start(1, *flags, "--resume"))
    same_curve(steps_of(tmp_path / "run"), steps_of(alone))


def test_ctrl_c_saves(toy_data, tmp_path):
    process = start(2, "--data", toy_data, *FLAGS, "--tokens", "200k", "--micro-batch-size", 2, "--out", tmp_path)
    wait_for_step(process, tmp_path, 7)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process, 60)
    assert "interrupted, and saved; go on with: the same torchrun command --resume" in output
    step = int(danube3.find_checkpoint(tmp_path).name.removeprefix("step-"))
    assert step >= 7 and len(steps_of(tmp_path)) == step


def test_a_sharded_model_starts_with_the_same_weights(toy_data, tmp_path):
    """Saved right after the first validation, the weights of step 0 are those of one process, bit for bit. (They
    exist on rank 0 only, before they are sharded. FSDP keeps the root unsharded after a validation, and the save that
    follows needs it sharded.)"""
    (tmp_path / "early.py").write_text(
        "import os, runpy, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        "import danube3\n"
        "validate = danube3.Trainer.validate\n"
        "def validate_and_save(run):\n"
        "    validate(run)\n"
        "    run.save()\n"
        "    print('saved early', flush=True)\n"
        "    os._exit(0)\n"
        "danube3.Trainer.validate = validate_and_save\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    for processes in (1, 2):
        flags = ("--data", toy_data, *FLAGS, "--out", tmp_path / str(processes))
        process = start(processes, *flags, program=tmp_path / "early.py")
        output = finish(process, 60)
        assert process.returncode == 0 and output.count("saved early") == processes, output
    first, second = (danube3.find_checkpoint(tmp_path / each) for each in ("1", "2"))
    assert first.name == second.name == "step-0000000"
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for name in ("model.safetensors", "training_state.safetensors"):
        assert digest(first / name) == digest(second / name), name
    same_validation(tmp_path / "2", tmp_path / "1", entries=1)


def test_ctrl_c_during_the_first_validation(toy_data, tmp_path):
    """The first step is made and saved. It is that of one process, and its weights are sharded again."""
    (tmp_path / "early.py").write_text(
        "import os, runpy, signal, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        "import danube3\n"
        "validate = danube3.Trainer.validate\n"
        "danube3.Trainer.validate = lambda run: (validate(run), os.kill(os.getpid(), signal.SIGINT))\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    for processes in (1, 2):
        flags = ("--data", toy_data, *FLAGS, "--out", tmp_path / str(processes))
        output = finish(start(processes, *flags, program=tmp_path / "early.py"), 60)
        assert "interrupted, and saved" in output, output
    first, second = (danube3.find_checkpoint(tmp_path / each) for each in ("1", "2"))
    assert first.name == second.name == "step-0000001"
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    same_curve(steps_of(tmp_path / "2"), steps_of(tmp_path / "1"))
    same_validation(tmp_path / "2", tmp_path / "1", entries=1)
    ours, theirs = (danube3.read_tensors(folder / "training_state.safetensors") for folder in (second, first))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max() for name in ours if name.startswith("weights.")) < 1e-4


def test_nobody_leaves_while_a_checkpoint_is_written(toy_data, tmp_path):
    """Ctrl-C in the second process alone, as on another machine: the first one's slow disk is waited for."""
    (tmp_path / "slow.py").write_text(
        "import runpy, sys, time\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        "import danube3\n"
        "write = danube3.write_tensors\n"
        "danube3.write_tensors = lambda *args: (time.sleep(5), write(*args))\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    flags = ("--data", toy_data, *FLAGS, "--tokens", "200k", "--save-every", 1000, "--out", tmp_path / "run")
    process = start(2, *flags, program=tmp_path / "slow.py")
    wait_for_step(process, tmp_path / "run", 5)
    os.kill(workers(process)[1], signal.SIGINT)
    assert "interrupted, and saved" in finish(process, 60)
    danube3.verify_checksums(danube3.find_checkpoint(tmp_path / "run"))


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_in_two_processes(quantized, alone, toy_data, tmp_path):
    """And three held-out conversations, which two processes cannot divide evenly: then each must take all, because
    FSDP needs the same number of forward passes on every rank."""
    talks = [json.loads(line) for line in (toy_data / "chat.jsonl").read_text().splitlines()[:60]]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    base = alone
    if quantized:
        base = tmp_path / "int4"
        assert call("quantize.py", alone, "--bits", 4, "--out", base).returncode == 0
    flags = ("--chat", tmp_path / "chat.jsonl", "--init", base, "--lora", 4, "--batch-size", 8)
    for processes in (1, 2):
        output = finish(start(processes, *flags, "--micro-batch-size", 1, "--out", tmp_path / f"run{processes}"))
        assert "try: python" in output, output
    same_curve(*(steps_of(tmp_path / f"run{n}") for n in (2, 1)))
    same_validation(tmp_path / "run2", tmp_path / "run1")
    first, second = (danube3.load_checkpoint(tmp_path / f"run{n}")[0].state_dict() for n in (1, 2))
    assert first.keys() == second.keys() and any(".lora_B." in name for name in first)
    assert max((first[name] - second[name]).abs().max() for name in first) < 1e-4


def test_sequences_that_cannot_be_divided(toy_data, tmp_path):
    output = finish(start(3, "--data", toy_data, *FLAGS, "--out", tmp_path / "run"))
    assert "error: 3 processes cannot share 8 sequences: change one" in output
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in output


def test_processes_with_other_flags(toy_data, tmp_path):
    """Two machines started with different learning rates find out before they train."""
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29571", "OMP_NUM_THREADS": "1"}
    flags = ["--data", toy_data, "--tokens", "31k", "--micro-batch-size", "2", "--out", tmp_path / "run"]
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py", *map(str, flags), "--learning-rate", rate],
            cwd=ROOT,
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, rate in enumerate(("1e-3", "2e-3"))
    ]
    outputs = [process.communicate(timeout=120)[1] for process in processes]
    for output in outputs:  # every rank sees it
        assert "the ranks have different flags, data or files: start all alike" in output, outputs
    assert not (tmp_path / "run").exists()


def test_resume_refuses_what_it_refuses_alone(alone, toy_data):
    line = one_line_error(call("train.py", "--data", toy_data, *FLAGS, "--out", alone))
    assert "already holds a run" in line


def test_rank_0_says_when_time_is_up(alone, toy_data, tmp_path):
    """Its clock alone counts. All ranks save after each step, and the run stays the same."""
    program = tmp_path / "timed.py"
    program.write_text(
        f"import os, runpy, sys; sys.path.insert(0, {str(ROOT)!r}); import danube3\n"
        "danube3.SAVE_SECONDS = -1 if os.environ['RANK'] == '0' else 1e9\n"
        "save = danube3.Trainer.save\n"
        "danube3.Trainer.save = lambda run: (save(run), os.write(1, b'saved %d %d\\n' % (run.rank, run.step)))\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    out = tmp_path / "run"
    output = finish(start(2, "--data", toy_data, *FLAGS, "--micro-batch-size", 2, "--out", out, program=program))
    assert all(output.count(f"saved {rank} {step}\n") == 1 for rank in (0, 1) for step in range(1, 31)), output
    same_curve(steps_of(out), steps_of(alone))
    same_validation(out, alone)


def test_each_rank_reads_its_own_sequences(toy_data, tmp_path):
    program = tmp_path / "reads.py"
    program.write_text(
        f"import os, runpy, sys; sys.path.insert(0, {str(ROOT)!r}); import danube3\n"
        "locate = danube3.StagedData.locate\n"
        "def spy(data, step, index):\n"
        f"    print(step, index, file=open({str(tmp_path)!r} + '/read-' + os.environ['RANK'], 'a'))\n"
        "    return locate(data, step, index)\n"
        "danube3.StagedData.locate = spy\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    flags = ("--data", toy_data, "--tokens", "2k", "--out", tmp_path / "run")
    assert "try: python" in finish(start(4, *flags, program=program))
    for rank in range(4):
        assert (tmp_path / f"read-{rank}").read_text() == "".join(
            f"{step} {index}\n" for step in range(2) for index in (rank, rank + 4)
        )


def test_small_models_stay_whole_and_large_ones_are_freed(toy_data, tmp_path):
    """Between forward and backward pass: layers keep their weights below FSDP_KEPT parameters. The norm stays fp32 in
    a bf16 run. Either way the losses are those of one process."""
    losses = []
    for kept in (10**9, 0):
        program = tmp_path / f"kept{kept}.py"
        program.write_text(
            f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); import danube3, os, torch\n"
            f"danube3.FSDP_KEPT = {kept}\n"
            "block_loss = danube3.Danube3.block_loss\n"
            "def spy(model, x, targets):\n"
            "    layer = model.model.layers[0].mlp.up_proj.weight\n"
            "    kept = not isinstance(layer, danube3.DTensor)\n"
            "    if torch.is_grad_enabled():\n"
            "        os.write(1, f'in the loss {kept} {layer.dtype} {model.lm_head.weight.dtype}\\n'.encode())\n"
            "    return block_loss(model, x, targets)\n"
            "danube3.Danube3.block_loss = spy\n"
            "norm = danube3.RMSNorm.forward\n"
            "def spy_norm(module, x):\n"
            "    assert x.dtype == torch.float32, x.dtype  # the residual stream\n"
            "    return norm(module, x)\n"
            "danube3.RMSNorm.forward = spy_norm\n"
            f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        )
        out = tmp_path / str(kept)
        flags = ("--data", toy_data, "--tokens", "4k", "--out", out, "--dtype", "bfloat16")
        output = finish(start(2, *flags, program=program))
        lines = {line for line in output.splitlines() if line.startswith("in the loss")}
        dtype = "torch.bfloat16" if kept else "torch.float32"  # a shard is stored in fp32
        assert lines == {f"in the loss {bool(kept)} {dtype} torch.bfloat16"}, output
        losses.append([e["loss"] for e in steps_of(out)])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
