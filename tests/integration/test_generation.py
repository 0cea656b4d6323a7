"""Generation: static cache, compiled forward, pipeline."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, pipeline

from tests.models import LAYERS, tiny_tokenizer
from transformers_quip import QuipConfig, set_backend


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_static_cache_generates_the_same(arch, quantized, ids):
    model = AutoModelForCausalLM.from_pretrained(quantized(arch))
    assert model.hf_quantizer.is_compileable
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert expected.shape == (2, 22)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_compiled_generation_with_a_static_cache_gives_the_same_tokens(arch, quantized, ids):
    model = AutoModelForCausalLM.from_pretrained(quantized(arch))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    torch._dynamo.reset()
    graphs = []
    config = CompileConfig(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph, mode=None)
    config._compile_all_devices = True  # generate() compiles for accelerators alone otherwise
    compiled = model.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert any(node.target is torch.ops.quip.linear for graph in graphs for node in graph.graph.nodes)
    assert torch.equal(compiled, expected)


def compiled_generation(model, ids, **options):
    """Tokens of generate() with a static cache and a compiled forward, and how often each of our ops is in its graphs."""
    torch._dynamo.reset()
    graphs = []
    config = CompileConfig(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph, mode=None)
    config._compile_all_devices = True
    tokens = model.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert graphs
    return tokens, [Counter(node.target for node in graph.graph.nodes) for graph in graphs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_generation_in_16_bits(dtype, quantized, ids):
    model = AutoModelForCausalLM.from_pretrained(quantized("llama"), dtype=dtype)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, cache_implementation="static", **options)
    compiled, graphs = compiled_generation(model, ids, **options)
    assert torch.equal(compiled, expected)
    assert all(graph[torch.ops.quip.linear] == 7 * LAYERS for graph in graphs)


@pytest.mark.gpu
def test_compiled_generation_on_a_gpu(dense, ids):
    device = next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), None)
    if device is None:
        pytest.skip("PyTorch cannot use a GPU here")
    set_backend("triton")
    try:
        model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=QuipConfig(dataset=None)).to(
            device
        )
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(ids.to(device), **options)
        for _ in range(3):  # compiles, records, replays
            assert torch.equal(model.generate(ids.to(device), cache_implementation="static", **options), expected)
        assert model.model.layers[0].self_attn.q_proj.is_packed
    finally:
        set_backend("auto")


@torch.no_grad()
def test_compile_of_a_whole_model_without_graph_break(quantized, ids):
    model = AutoModelForCausalLM.from_pretrained(quantized("llama"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_pipeline(quantized):
    generate = pipeline("text-generation", model=quantized("llama"), tokenizer=tiny_tokenizer())
    (result,) = generate("abc", max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert result["generated_text"].startswith("abc")
    assert len(result["generated_text"]) == 7
