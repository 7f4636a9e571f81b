"""From text to a quantized chat model in small: what the README's tour does, with a few steps of each."""

import json

import pytest
from conftest import call


@pytest.fixture(scope="module")
def toured(toy_data, tmp_path_factory):
    """Every program once, each on what the one before it wrote. -> folder, and what each printed"""
    folder, said = tmp_path_factory.mktemp("tour"), {}
    talks = (toy_data / "chat.jsonl").read_text().splitlines()[:40]
    (folder / "chat.jsonl").write_text("\n".join(talks) + "\n")
    quiz = (toy_data / "quiz.jsonl").read_text().splitlines()[:8]
    (folder / "quiz.jsonl").write_text("\n".join(quiz) + "\n")
    commands = {
        "plan": ("train.py", "--config", "500m", "--dry-run"),
        "train": ("train.py", "--data", toy_data, "--tokens", "40k", "--device", "cpu", "--out", folder / "toy"),
        "chat": ("train.py", "--chat", folder / "chat.jsonl", "--init", folder / "toy", "--device", "cpu",
                 "--out", folder / "toy-chat"),
        "quantize": ("quantize.py", folder / "toy-chat", "--bits", 4, "--out", folder / "int4"),
        "gguf": ("quantize.py", folder / "int4", "--gguf", folder / "int4.gguf"),
        "complete": ("sample.py", folder / "int4", "The town of", "--max-new-tokens", 12, "--device", "cpu"),
        "evaluate": ("sample.py", folder / "int4", "--eval", folder / "quiz.jsonl", "--device", "cpu"),
    }
    for name, command in commands.items():
        result = call(*command)
        assert result.returncode == 0, (name, result.stderr)
        said[name] = result.stdout
    return folder, said


def test_each_step_says_what_comes_next(toured):
    folder, said = toured
    assert f"try: python sample.py {folder / 'toy'}" in said["train"] and "a sample" in said["train"]
    assert f"try: python sample.py {folder / 'toy-chat'} --chat" in said["chat"]
    assert f"try: python sample.py {folder / 'int4'}" in said["quantize"]
    assert "513,590,784" in said["plan"] and "90.6%" in said["plan"]


def test_losses_fall(toured):
    folder, _ = toured
    for name in ("toy", "toy-chat"):
        entries = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        losses = [sum(entry["val_loss"].values()) for entry in entries if "val_loss" in entry]
        assert losses[-1] < 0.99 * losses[0]


def test_the_quantized_model_works(toured):
    folder, said = toured
    assert (folder / "int4.gguf").stat().st_size < (folder / "toy-chat").stat().st_size + 2e6
    assert said["complete"].startswith("The town of") and len(said["complete"]) > 15
    assert "questions" in said["evaluate"] and "acc" in said["evaluate"]
