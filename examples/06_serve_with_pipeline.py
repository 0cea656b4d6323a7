"""Serve a quantized model over HTTP with Transformers' text-generation pipeline and nothing else.

    python examples/06_serve_with_pipeline.py FOLDER [--port 8000]
    curl localhost:8000 -d '{"prompt": "Two bits", "max_new_tokens": 20}'

FOLDER is a quantized model or its id on the Hub. This is a program to start from: one request at a time, no passwords. For
more, start Transformers' own server in a process that has imported this package (`pip install 'transformers[serving]'`):

    python -c "import transformers_quip; from transformers.cli.transformers import main; main()" serve FOLDER

Output and answer:

    serving FOLDER on http://127.0.0.1:8000
    {"prompt": "Two bits", "text": "...", "seconds": 0.4}
"""

from __future__ import annotations

import argparse
import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

from transformers import pipeline

import transformers_quip  # noqa: F401 - makes Transformers understand quantized models

LONGEST_REQUEST = 1 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or an id on the Hub")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--requests", type=int, help="stop after this many requests")
    return parser.parse_args()


class Handler(BaseHTTPRequestHandler):
    """POST {"prompt": ..., "max_new_tokens": ...} → {"prompt": ..., "text": ..., "seconds": ...}"""

    generate = None

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if length > LONGEST_REQUEST:
                raise ValueError(f"a request may have {LONGEST_REQUEST} bytes")
            request = json.loads(self.rfile.read(length))
            prompt, tokens = str(request["prompt"]), int(request.get("max_new_tokens", 64))
        except (ValueError, KeyError, TypeError) as error:
            return self.answer(400, {"error": f"{type(error).__name__}: {error}"})
        started = time.perf_counter()
        (result,) = self.generate(prompt, max_new_tokens=tokens, do_sample=False, return_full_text=False)
        seconds = round(time.perf_counter() - started, 3)
        self.answer(200, {"prompt": prompt, "text": result["generated_text"], "seconds": seconds})

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(options: argparse.Namespace) -> None:
    Handler.generate = staticmethod(pipeline("text-generation", model=options.model))
    with HTTPServer(("127.0.0.1", options.port), Handler) as server:
        print(f"serving {options.model} on http://127.0.0.1:{server.server_port}", flush=True)
        if options.requests is None:
            server.serve_forever()
        for _ in range(options.requests or 0):
            server.handle_request()


if __name__ == "__main__":
    main(arguments())
