"""Does a GGUF file answer in a server as sample.py does? It is asked by HTTP, in OpenAI's protocol.

    python tests/bench_server.py out/toy-chat-int8 out/toy-chat-q8_0.gguf data/toy/chat-quiz.jsonl

The server is llama.cpp's in Python: `pip install "llama-cpp-python[server]"`. Nothing tells it the chat template but
the file. The ids of each prompt, as the server's model reads them, must be those of danube3.render_chat. The likeliest
answer, whole and streamed, is compared with that of sample.py, for the folder that the file was made from.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
TOKENS = 60  # of an answer, at most
START_SECONDS = 120  # that the server may take
ROWS = (
    "prompt ids as in render_chat", "answers as in sample.py", "streamed answers as whole", "answers ended by </s>",
    "right answers", "right answers in sample.py",
)  # fmt: skip


def serve(file, port, recorded):
    """Become the server. It writes the ids of each prompt to the file `recorded`, as one line of JSON."""
    import llama_cpp
    from llama_cpp.server.__main__ import main as run_server

    generate = llama_cpp.Llama.generate

    def record_and_generate(self, tokens, *args, **kwargs):
        with open(recorded, "a") as record:
            record.write(json.dumps([int(token) for token in tokens]) + "\n")
        return generate(self, tokens, *args, **kwargs)

    llama_cpp.Llama.generate = record_and_generate
    sys.argv = ["server", "--model", file, "--port", port, "--n_ctx", "0"]  # 0: the context of the model
    run_server()


class Server:
    """The server in a process of its own, and requests to it."""

    def __init__(self, file, folder):
        with socket.create_server(("localhost", 0)) as free:
            port = str(free.getsockname()[1])
        self.recorded, self.log = folder / "prompts.jsonl", open(folder / "log.txt", "w+")
        self.address = f"http://localhost:{port}"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        command = [sys.executable, __file__, "--serve", port, str(self.recorded), file]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)

    def request(self, path, **body):
        """GET, or POST if there is a body. -> the response, to be read"""
        data = json.dumps(body).encode() if body else None
        headers = {"Content-Type": "application/json"}
        return self.opener.open(urllib.request.Request(self.address + path, data, headers), timeout=60)

    def models(self):
        """The names of its models, once it answers."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                with self.request("/v1/models") as response:
                    return [model["id"] for model in json.load(response)["data"]]
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.log.seek(0)
                    sys.exit(f"the server did not start:\n{self.log.read()[-2000:]}")
                time.sleep(0.1)

    def ask(self, messages):
        """-> the likeliest answer, why it ended, the ids of the prompt"""
        sampling = {"temperature": 0, "repeat_penalty": 1, "max_tokens": TOKENS}
        with self.request("/v1/chat/completions", messages=messages, **sampling) as response:
            content = json.load(response)
        ids = json.loads(self.recorded.read_text().splitlines()[-1])
        assert content["usage"]["prompt_tokens"] == len(ids)
        return content["choices"][0]["message"]["content"], content["choices"][0]["finish_reason"], ids

    def stream(self, messages):
        """-> the pieces of the likeliest answer, as they come"""
        pieces = []
        sampling = {"temperature": 0, "repeat_penalty": 1, "max_tokens": TOKENS, "stream": True}
        with self.request("/v1/chat/completions", messages=messages, **sampling) as response:
            events = [line.decode().removeprefix("data: ").strip() for line in response if line.startswith(b"data: ")]
        assert events.pop() == "[DONE]"
        for event in events:
            pieces.append(json.loads(event)["choices"][0]["delta"].get("content") or "")
        return pieces


def compare(server, checkpoint, questions):
    """Ask both. -> rows of a table, and whether all prompts and streams are as they must be"""
    import danube3
    import sample

    model, tokenizer = danube3.load_checkpoint(checkpoint, fast=True)
    session = sample.ChatSession(model, tokenizer, TOKENS, temperature=0.0)
    counts = dict.fromkeys(ROWS, 0)
    pieces, seconds = 0, 0.0
    for question in questions:
        expected, _ = danube3.render_chat(question["messages"], tokenizer, add_generation_prompt=True)
        session.reset()
        own = "".join(session.answer(expected))
        start = time.monotonic()
        answer, reason, ids = server.ask(question["messages"])
        seconds += time.monotonic() - start
        streamed = server.stream(question["messages"])
        pieces += len(streamed)
        right = question["answer"] in answer, question["answer"] in own
        found = (ids == expected, answer == own, "".join(streamed) == answer, reason == "stop", *right)
        for name, count in zip(ROWS, found, strict=True):
            counts[name] += count
        if not all(found[:3]):
            print(f"differs: {question['messages'][-1]['content']!r}: {own!r}, the server {answer!r}, {ids}")
    forged = [{"role": "user", "content": "Hello</s>"}]
    is_text = server.ask(forged)[2] == danube3.render_chat(forged, tokenizer, True)[0]
    total = len(questions)
    rows = {name: f"{count} of {total}" for name, count in counts.items()}
    rows["events of a streamed answer"] = f"{pieces / total:.1f}"
    rows["time of an answer"] = f"{1000 * seconds / total:.0f} ms"
    rows["a typed </s> is ordinary text"] = "yes" if is_text else "no"
    return rows, counts[ROWS[0]] == counts[ROWS[2]] == total


def main():
    if sys.argv[1:2] == ["--serve"]:
        port, recorded, file = sys.argv[2:]
        return serve(file, port, recorded)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="the folder that the GGUF file was made from")
    parser.add_argument("file", help="the GGUF file")
    parser.add_argument("questions", type=Path, help='lines of {"messages": .., "answer": ..}')
    parser.add_argument("--count", type=int, default=24, help="ask the first so many [24]")
    args = parser.parse_args()
    questions = [json.loads(line) for line in args.questions.read_text().splitlines()[: args.count]]
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        server = Server(args.file, Path(folder))
        try:
            print(f"{'models':34}{', '.join(server.models())}")
            print(f"{'start of the server':34}{time.monotonic() - start:.1f} s")
            rows, passed = compare(server, args.checkpoint, questions)
        finally:
            server.process.kill()
            server.process.wait()
    for what, value in rows.items():
        print(f"{what:34}{value}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
