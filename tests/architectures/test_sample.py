"""A sample of architectures, one for each kind of blocks, experts or loading; `make test-architectures` tries all."""

from __future__ import annotations

import pytest
from transformers.models.auto import modeling_auto

from tests.architectures.check import TASKS, check

SAMPLE = {
    "causal": "mixtral gpt_oss aria_text nemotron_h llama4_text longcat_flash jetmoe deepseek_v4 qwen2_moe falcon jamba"
    " zaya hrm_text gemma3n_text mamba dbrx inkling2_text hy_v4",
    "image": "llava",
    "seq2seq": "t5 bart switch_transformers",
    "masked": "bert nomic_bert",
    "speech": "whisper",
}
JOBS = [(task, kind) for task, kinds in SAMPLE.items() for kind in kinds.split()]


@pytest.mark.parametrize(("task", "model_type"), JOBS, ids=["-".join(job) for job in JOBS])
def test_everything_works(task, model_type, tmp_path):
    if model_type not in getattr(modeling_auto, TASKS[task][0]):
        pytest.skip(f"this Transformers has no {model_type}")
    result = check(task, model_type, tmp_path)
    if result.untestable:
        pytest.skip(result.untestable)
    assert not result.failed, result.errors
    low = [key for key, share in result.share.items() if share < 0.9]
    for key in low:
        assert any("stay dense" in text for text in result.warned.get(key, [])), f"{key}: {result.left}"
