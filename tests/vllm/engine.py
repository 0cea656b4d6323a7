"""A process that runs vLLM's engine for the tests: python -m tests.vllm.engine FOLDER PROMPTS OUT [key=value …]

PROMPTS is a JSON list of lists of token ids. OUT gets the greedy tokens that follow each. The keys are those of
`vllm.LLM`, and `adapter`, the folder of a LoRA adapter.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

TOKENS = 12
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
}


def main(folder: str, prompts: str, out: str, *options: str) -> None:
    """Generate, and write the tokens."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    given = {key: ast.literal_eval(value) for key, value in (option.split("=", 1) for option in options)}
    adapter = given.pop("adapter", None)
    llm = LLM(folder, **{**OPTIONS, **given})
    params = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, detokenize=False)
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in json.loads(prompts)],
        params,
        lora_request=None if adapter is None else LoRARequest("adapter", 1, adapter),
        use_tqdm=False,
    )
    Path(out).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
