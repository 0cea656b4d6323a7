"""A process that runs vLLM's engine for the tests: python -m tests.vllm.engine FOLDER PROMPTS OUT [key=value …]

PROMPTS is a JSON list of lists of token ids. OUT gets the greedy tokens that follow each, and the seconds.
"""

from __future__ import annotations

import ast
import json
import sys
import time
from pathlib import Path

TOKENS = 12


def main(folder: str, prompts: str, out: str, *options: str) -> None:
    """Generate, and write the result."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    given = {key: ast.literal_eval(value) for key, value in (option.split("=", 1) for option in options)}
    adapter = given.pop("adapter", None)
    again = given.pop("reload", None)
    begin = time.perf_counter()
    llm = LLM(
        folder,
        **{
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "max_model_len": 64,
            "max_num_seqs": 4,
            "kv_cache_memory_bytes": 64 << 20,
            "enforce_eager": True,
            **given,
        },
    )
    loaded = time.perf_counter()
    if again:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": again})
    params = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, detokenize=False)
    request = None if adapter is None else LoRARequest("adapter", 1, adapter)
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in json.loads(prompts)], params, lora_request=request, use_tqdm=False
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    seconds = {"load": loaded - begin, "generate": time.perf_counter() - loaded}
    Path(out).write_text(json.dumps({"tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
