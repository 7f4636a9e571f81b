"""Speed and memory of data/prepare.py: `python tests/bench_prepare.py [folder of text]`, a few minutes.

The whole program with two threads, from text to the finished folder, against a plain loop of sentencepiece's encode
over the same files on one core. They alternate, since a shared machine's speed changes from minute to minute. The
median of the ratios of neighbours counts; where other programs use the same cores, only that of processor times.
Memory is that of all its processes (PSS: pages that they share are counted once).
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import prepare  # noqa: E402


def family(pid):
    """A process and all below it."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(member for children in lists for child in children.read_text().split() for member in family(child))]


def memory(pid):
    """Bytes that a process and all below it hold (PSS)."""
    total = 0
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def processor_seconds(who):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def copy_texts(folder, scratch):
    """Those .txt, .md, .rst and .py files that are UTF-8, once each; the standard library has some that are not."""
    texts = set()
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in (".txt", ".md", ".rst", ".py") and path.is_file():
            try:
                texts.add(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                pass
    for number, text in enumerate(sorted(texts)):
        (scratch / f"{number:06d}.txt").write_text(text, encoding="utf-8")


def run_prepare(folder, out, tokenizer, workers):
    """-> seconds, seconds of all its processes on the processor, peak bytes"""
    before = processor_seconds(resource.RUSAGE_CHILDREN)
    command = [sys.executable, prepare.__file__, "--out", out, "--tokenizer", tokenizer, f"web={folder}"]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.1)
    assert process.returncode == 0
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds, processor_seconds(resource.RUSAGE_CHILDREN) - before, peak


def run_plain(texts, tokenizer):
    """-> seconds, seconds on the processor"""
    start, before = time.perf_counter(), processor_seconds(resource.RUSAGE_SELF)
    for text in texts:
        tokenizer.encode(text)
    return time.perf_counter() - start, processor_seconds(resource.RUSAGE_SELF) - before


def measure(args, scratch):
    texts, tokenizer = scratch / "texts", prepare.find_tokenizer(args.tokenizer, {}, scratch)
    texts.mkdir()
    copy_texts(args.folder, texts)
    source = prepare.Source("web", "text")
    source.add(str(texts))
    documents = [text.decode() for _, (text,) in source.documents(prepare.DOCUMENT_BYTES)]
    size = sum(len(document.encode()) for document in documents)
    print(f"{size / 1e6:.0f} MB in {len(documents):,} documents from {args.folder}")
    ratios, costs, speeds = [], [], []
    for _ in range(args.rounds):
        plain, plain_cost = run_plain(documents, tokenizer)
        seconds, cost, peak = run_prepare(texts, scratch / "out", args.tokenizer, args.workers)
        ratios.append(plain / seconds)
        costs.append(cost / plain_cost)
        speeds.append(size / seconds / 1e6)
        print(f"plain loop {size / plain / 1e6:.2f} MB/s; prepare.py with {args.workers} threads, start to end, "
              f"{speeds[-1]:.2f} MB/s = {ratios[-1]:.2f}x with {costs[-1]:.2f}x the processor time; "
              f"peak {peak / 1e6:.0f} MB", flush=True)
    print(f"median {statistics.median(speeds):.2f} MB/s, {statistics.median(ratios):.2f}x the plain loop, with "
          f"{statistics.median(costs):.2f}x its processor time")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=sysconfig.get_path("stdlib"))
    parser.add_argument("--tokenizer", default="mistral")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    with tempfile.TemporaryDirectory() as scratch:
        measure(parser.parse_args(), Path(scratch))


if __name__ == "__main__":
    main()
