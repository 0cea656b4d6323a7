"""Layers of vLLM without an engine, for 1, 2 and 4 ranks in one process: together they are the dense float64 formula."""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm runs these tests)")

from vllm.config import DeviceConfig, LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocabulary
from vllm.model_executor.layers.quantization import get_quantization_config

from tests import truth
from transformers_quip import QuipConfig, incoherence
from transformers_quip.incoherence import sides
from transformers_quip.vllm import linear as ours
from transformers_quip.vllm import register

HIDDEN, HEADS, KV_HEADS, HEAD, FFN, VOCABULARY = 64, 4, 2, 16, 192, 100
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# vLLM's layer → inputs, and for each part its name, its outputs and its number when vLLM loads it
KINDS = {
    "qkv_proj": (
        HIDDEN,
        [("q_proj", HEADS * HEAD, "q"), ("k_proj", KV_HEADS * HEAD, "k"), ("v_proj", KV_HEADS * HEAD, "v")],
    ),
    "gate_up_proj": (HIDDEN, [("gate_proj", FFN, 0), ("up_proj", FFN, 1)]),
    "down_proj": (FFN, [("down_proj", HIDDEN, None)]),
    "router": (HIDDEN, [("router", 48, None)]),
    "lm_head": (HIDDEN, [("lm_head", VOCABULARY, None)]),
}
DIVIDES_INPUTS = "down_proj"


@pytest.fixture(autouse=True)
def vllm_config():
    register()
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        yield


def config_of(names, **options):
    config = QuipConfig(dataset=None, **options)
    config.quantized_modules = [f"l.{name}" for name in names]
    return config


def quant_config(config):
    quant = get_quantization_config("quip").from_config(config.to_dict())
    quant.packed_modules_mapping = FUSED
    return quant


def make(kind, quant, size, rank, monkeypatch):
    """The layer of one rank."""
    for module in (vllm_linear, vllm_vocabulary):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    options = {"quant_config": quant, "prefix": f"l.{kind}", "params_dtype": torch.float32}
    if kind == "lm_head":
        return vllm_vocabulary.ParallelLMHead(VOCABULARY, HIDDEN, **options)
    options |= {"bias": False, "return_bias": False}
    if kind == "qkv_proj":
        return vllm_linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **options)
    if kind == "gate_up_proj":
        return vllm_linear.MergedColumnParallelLinear(HIDDEN, [FFN, FFN], **options)
    if kind == "router":
        return vllm_linear.ReplicatedLinear(HIDDEN, 48, **options)
    return vllm_linear.RowParallelLinear(FFN, HIDDEN, **options)


def load(layer, tensors):
    """tensors: {number of the part: {name: tensor}}."""
    for number, part in tensors.items():
        for name, tensor in part.items():
            parameter = layer.get_parameter(name)
            parameter.weight_loader(parameter, tensor, *(() if number is None else (number,)))
    layer.quant_method.process_weights_after_loading(layer)


def random_parts(kind, config):
    """The tensors of the checkpoint, and the dense weights in float64."""
    columns, parts = KINDS[kind]
    tensors, weights = {}, []
    for seed, (name, rows, number) in enumerate(parts):
        if f"l.{name}" not in config.quantized_modules:
            weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
            tensors[number] = {"weight": weight}
            weights.append(weight.double())
            continue
        own = config.for_module(f"l.{name}")
        given = truth.random_linear(rows, columns, seed, codebook=own.codebook_spec)
        del given["bias"]
        given["su"] = truth.random_linear(16, columns)["su"]  # one for all, as siblings have
        tensors[number] = given
        matrices = [incoherence.get(s, n).matrix() for s, n in zip(sides(own.incoherence), (columns, rows), strict=True)]
        weights.append(truth.weight_between(given, own.codebook_spec, *matrices))
    return tensors, weights


def together(monkeypatch, layers, inputs):
    """The outputs of all ranks, which run in threads and exchange what they gather."""
    barrier, place, sent = threading.Barrier(len(layers)), threading.local(), {}
    numbers = []

    def gather(x):
        sent[place.rank] = x
        barrier.wait(20)
        result = torch.cat([sent[rank] for rank in range(len(layers))], dim=-1)
        numbers.append(x.numel())
        barrier.wait(20)
        return result

    monkeypatch.setattr(ours, "all_of", gather)
    results = {}

    def run(rank):
        place.rank = rank
        try:
            results[rank] = layers[rank].quant_method.apply(layers[rank], inputs[rank])
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[rank] for rank in range(len(layers))], sum(numbers)


def check(monkeypatch, kind, config, size):
    """Compare the ranks' outputs with the formula. Returns the numbers that they sent besides vLLM's own sums."""
    tensors, weights = random_parts(kind, config)
    quant = quant_config(config)
    layers = [make(kind, quant, size, rank, monkeypatch) for rank in range(size)]
    for layer in layers:
        load(layer, tensors)
    columns, parts = KINDS[kind]
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(7))
    inputs = list(x.chunk(size, dim=-1)) if kind == DIVIDES_INPUTS else [x] * size
    outputs, sent = together(monkeypatch, layers, inputs)
    expected = [x.double() @ weight.T for weight in weights]
    if kind == DIVIDES_INPUTS:
        close(sum(y.double() for y in outputs), expected[0])
        return sent
    for rank, y in enumerate(outputs):
        if kind == "lm_head":
            own = [expected[0].new_zeros(5, 128)]
            own[0][:, :VOCABULARY] = expected[0]
            own = [own[0].chunk(size, dim=-1)[rank]]
        elif kind == "router":
            own = expected
        else:
            groups = [size if name not in ("k_proj", "v_proj") else min(size, KV_HEADS) for name, _, _ in parts]
            own = [whole.chunk(n, dim=-1)[rank * n // size] for whole, n in zip(expected, groups, strict=True)]
        close(y, torch.cat(own, dim=-1))
    return sent


def close(y, expected):
    assert y.shape == expected.shape
    assert (y.double() - expected).norm() < 1e-5 * expected.norm()


NAMES = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "router", "lm_head"]
MIXED = {"q_proj": {"codebook": "e8p-rvq4"}, "v_proj": {"codebook": "scalar3"}, "up_proj": {"codebook": "d4"}}
CASES = {
    "e8p": ({}, NAMES),
    "two stages": ({"bits": 3}, NAMES),
    "trellis": ({"codebook": "trellis:3inst:k2:qtip"}, NAMES[:-1]),  # 100 tokens are not whole tiles
    "parts of different codebooks": ({"modules": MIXED}, NAMES),
    "dense parts": ({}, ["q_proj", "v_proj", "up_proj"]),
    "no transforms": ({"incoherence": "none"}, NAMES),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_together_are_the_linears(case, size, monkeypatch):
    options, names = CASES[case]
    config = config_of(names, **options)
    for kind, (_, parts) in KINDS.items():
        if any(name in names for name, _, _ in parts):
            sent = check(monkeypatch, kind, config, size)
            assert (sent == 0) == (size == 1 or kind == "router" or case == "no transforms")


@pytest.mark.parametrize("size", [2, 4])
def test_transforms_in_blocks_send_nothing(size, monkeypatch):
    for names, out in ((["q_proj", "k_proj", "v_proj"], 16), (["gate_proj", "up_proj"], 48)):
        config = config_of(names, incoherence=["hadamard", f"hadamard-{out}"])
        assert check(monkeypatch, "qkv_proj" if out == 16 else "gate_up_proj", config, size) == 0
    assert (
        check(monkeypatch, "down_proj", config_of(["down_proj"], incoherence=["hadamard-eighths", "hadamard"]), size) == 0
    )


@pytest.mark.parametrize("size", [1, 2])
def test_a_layer_that_is_fused_in_the_checkpoint_too(size, monkeypatch):
    config = config_of(["qkv_proj"])
    given = truth.random_linear(128, HIDDEN)
    del given["bias"]
    weight = truth.weight_between(given, "e8p", truth.hadamard(HIDDEN), truth.hadamard(128))
    layers = [make("qkv_proj", quant_config(config), size, rank, monkeypatch) for rank in range(size)]
    for layer in layers:
        load(layer, {None: given})
    x = torch.randn(3, HIDDEN)
    outputs, _ = together(monkeypatch, layers, [x] * size)
    q, k, v = (x.double() @ weight.T).split([64, 32, 32], dim=-1)
    for rank, y in enumerate(outputs):
        close(y, torch.cat([part.chunk(size, dim=-1)[rank] for part in (q, k, v)], dim=-1))


def test_equal_su_are_one_tensor_and_one_op_computes_the_layer(monkeypatch):
    config = config_of(NAMES)
    layer = make("qkv_proj", quant_config(config), 1, 0, monkeypatch)
    load(layer, random_parts("qkv_proj", config)[0])
    assert layer.quip_0_su.data_ptr() == layer.quip_2_su.data_ptr()
    assert layer.quant_method.runs == [[0, 1, 2]]
    with torch.profiler.profile() as profile:
        layer.quant_method.apply(layer, torch.randn(2, HIDDEN))
    assert [event.count for event in profile.key_averages() if event.key == "quip::bundle"] == [1]


def test_a_bias_is_added(monkeypatch):
    config = config_of(NAMES)
    layer = make("down_proj", quant_config(config), 1, 0, monkeypatch)
    load(layer, random_parts("down_proj", config)[0])
    x, bias = torch.randn(2, FFN), torch.randn(HIDDEN)
    without, given = layer.quant_method.apply(layer, x), layer.quant_method.apply(layer, x, bias)
    torch.testing.assert_close(given - without, bias.expand(2, -1), rtol=1e-4, atol=1e-3)


def test_faults_are_named(monkeypatch):
    config = config_of(NAMES)
    tensors, _ = random_parts("gate_up_proj", config)
    layer = make("gate_up_proj", quant_config(config), 1, 0, monkeypatch)
    with pytest.raises(
        ValueError, match=r"l\.gate_proj\.codes is torch\.int16 \[191, 8\] instead of torch\.int16 \[192, 8\]"
    ):
        layer.codes.weight_loader(layer.codes, tensors[0]["codes"][1:], 0)
    with pytest.raises(ValueError, match=r"l\.gate_proj\.codes is torch\.int32"):
        layer.codes.weight_loader(layer.codes, tensors[0]["codes"].int(), 0)
    with pytest.raises(ValueError, match="has codes for part 2, which needs none"):
        layer.codes.weight_loader(layer.codes, tensors[0]["codes"], 2)
    del tensors[1]["sv"]
    with pytest.raises(ValueError, match=r"l\.up_proj\.sv is not in the checkpoint"):
        load(layer, tensors)


def test_dummy_weights_need_no_file(monkeypatch):
    config = config_of(NAMES)
    given = VllmConfig(device_config=DeviceConfig("cpu"), load_config=LoadConfig(load_format="dummy"))
    with set_current_vllm_config(given):
        layer = make("gate_up_proj", quant_config(config), 1, 0, monkeypatch)
    load(layer, {})
    assert layer.quant_method.apply(layer, torch.randn(2, HIDDEN)).shape == (2, 2 * FFN)


def test_weights_can_be_loaded_again(monkeypatch):
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    config = config_of(NAMES)
    tensors, weights = random_parts("gate_up_proj", config)
    layer = make("gate_up_proj", quant_config(config), 1, 0, monkeypatch)
    record_metadata_for_reloading(layer)
    load(
        layer,
        {number: {name: torch.zeros_like(tensor) for name, tensor in part.items()} for number, part in tensors.items()},
    )
    address = layer.quip_1_codes.data_ptr()
    initialize_layerwise_reload(layer)
    for number, part in tensors.items():
        for name, tensor in part.items():
            parameter = layer.get_parameter(name)
            parameter.weight_loader(parameter, tensor, number)
    finalize_layerwise_reload(layer, None)
    assert layer.quip_1_codes.data_ptr() == address  # graphs that were recorded go on
    x = torch.randn(3, HIDDEN)
    close(layer.quant_method.apply(layer, x), torch.cat([x.double() @ weight.T for weight in weights], dim=-1))


def test_a_linear_with_padding_and_scales_of_rows(monkeypatch):
    config = config_of(["down_proj"])
    config.storage = {"l.down_proj": {"padded": [128, 256], "row_scales": True}}
    given = truth.random_linear(128, 256)
    del given["bias"]
    given["row_scales"] = torch.rand(128) + 0.5
    decoded = given["row_scales"].double()[:, None] * truth.decode(given["codes"], 256)
    weight = given["sv"].double()[:, None] * (truth.hadamard(128) @ decoded @ truth.hadamard(256).T) * given["su"].double()
    layers = [make("down_proj", quant_config(config), 2, rank, monkeypatch) for rank in range(2)]
    for layer in layers:
        load(layer, {None: given})
    x = torch.randn(3, FFN)
    outputs, _ = together(monkeypatch, layers, list(x.chunk(2, dim=-1)))
    close(sum(outputs), x.double() @ weight[:HIDDEN, :FFN].T)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("prefix", ["l.embed_tokens", ""])
def test_a_quantized_table(prefix, size, monkeypatch):
    config = config_of(["embed_tokens"])
    given = truth.random_linear(VOCABULARY, HIDDEN)
    del given["bias"]
    table = truth.weight_between(given, "e8p", truth.hadamard(HIDDEN), torch.eye(VOCABULARY).double())
    ids = torch.tensor([0, 31, 63, 64, 99])
    total = 0
    for rank in range(size):
        monkeypatch.setattr(vllm_vocabulary, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(vllm_vocabulary, "get_tensor_model_parallel_world_size", lambda: size)
        monkeypatch.setattr(vllm_vocabulary, "tensor_model_parallel_all_reduce", lambda x: x)
        quant = quant_config(config)
        layer = vllm_vocabulary.VocabParallelEmbedding(
            VOCABULARY, HIDDEN, params_dtype=torch.float32, quant_config=quant, prefix=prefix
        )
        load(layer, {None: given})
        total = total + layer(ids)
    close(total, table[ids])


def test_what_is_refused(monkeypatch):
    quant = get_quantization_config("quip")
    with pytest.raises(ValueError, match=r"another package .*'QUiP'.*transformers-quip convert MODEL FOLDER"):
        quant.from_config({"quant_method": "QUiP", "codebook": "E8P12"})
    with pytest.raises(ValueError, match=r"'exl3'.*transformers-quip convert MODEL FOLDER"):
        get_quantization_config("exl3").from_config({"quant_method": "exl3"})
    with pytest.raises(ValueError, match="names no quantized_modules"):
        quant.from_config(QuipConfig(dataset=None).to_dict())
    config = config_of(["router.a", "router.b"])
    with pytest.raises(ValueError, match=r"l\.router is stored as several quantized linears .*dequantize"):
        make("router", quant_config(config), 1, 0, monkeypatch)
