"""One block as a function of its arguments: what goes in is left alone, what comes out is data, groups are independent."""

import copy
import io
import pickle

import pytest
import torch

from tests.models import tiny_ids, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.calibration import capture_inputs, find_blocks, linear_names
from transformers_quip.nn import QuipLinear, replace
from transformers_quip.quantize import block as block_module
from transformers_quip.quantize.block import observe_block, quantize_block, quantize_group, replayed_densely
from transformers_quip.quantize.recipe import quantize_model

IDS = tiny_ids(6, 24, seed=3)
CONFIG = QuipConfig(bits=2, dataset=IDS)
PREFIX = "model.layers.0."


def first_block(arch="llama", **options):
    model = tiny_model(arch)
    _, blocks = find_blocks(model)
    inputs = capture_inputs(model, blocks, IDS, 4, progress=False).of_block(0)
    configs = {name: QuipConfig(**{"bits": 2, "dataset": IDS, **options}) for name in linear_names(blocks[0])}
    return blocks[0], inputs, configs


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for x, y in zip(tensors_of(a[name]), tensors_of(b[name]), strict=True):
            assert torch.equal(x, y), name


def tensors_of(module):
    return [*module.quantized.tensors.values(), module.quantized.su, module.quantized.sv]


def test_nothing_but_the_block_changes_and_the_result_depends_on_nothing_else():
    block, inputs, configs = first_block()
    again = copy.deepcopy(block)
    hidden, before = (
        [tensor.clone() for tensor in inputs.hidden],
        {name: config.to_dict() for name, config in configs.items()},
    )
    dense = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    torch.manual_seed(1)
    first = quantize_block(block, inputs, configs, PREFIX)
    torch.manual_seed(2)
    second = quantize_block(again, inputs, configs, PREFIX)
    same(first.modules, second.modules)
    assert all(torch.equal(a, b) for a, b in zip(hidden, inputs.hidden, strict=True))
    assert before == {name: config.to_dict() for name, config in configs.items()}
    assert all(isinstance(block.get_submodule(name), QuipLinear) for name in configs)
    assert list(first.modules) == [*configs][:7]
    for name, tensor in block.state_dict().items():
        if name in dense:  # norms
            assert torch.equal(tensor, dense[name])
    assert {"observe", "round"} == first.seconds.keys()
    for name, module in first.modules.items():
        assert module.name == PREFIX + name
        assert module.record["shape"] == list(dense[f"{name}.weight"].shape)


def test_results_are_data_that_another_process_can_be_sent():
    block, inputs, configs = first_block()
    result = quantize_block(block, inputs, configs, PREFIX)
    same(pickle.loads(pickle.dumps(result)).modules, result.modules)
    file = io.BytesIO()
    torch.save({name: module.quantized.tensors for name, module in result.modules.items()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    name = "mlp.down_proj"
    assert torch.equal(stored[name]["codes"], block.get_submodule(name).codes)


def test_groups_dealt_out_in_any_order_give_the_block():
    """As several processes would: Hessians once, then each group by itself, on its own copy of the block."""
    block, inputs, configs = first_block()
    hessians = observe_block(block, tuple(configs), inputs, PREFIX)
    groups = {leader: (names, hessians.pop(leader)) for leader, names in hessians.groups.items()}
    assert [names for names, _ in groups.values()] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    dealt = {}
    for leader in reversed(groups):
        dealt |= quantize_group(copy.deepcopy(block), *groups[leader], configs, PREFIX)
    whole = quantize_block(block, inputs, configs, PREFIX).modules
    same({name: dealt[name] for name in whole}, whole)


def test_the_dense_outputs_are_handed_out_before_anything_is_replaced():
    block, inputs, configs = first_block()
    dense, outputs = copy.deepcopy(block), {}

    def keep(batch, output):
        assert not any(isinstance(module, QuipLinear) for module in block.modules())
        outputs[batch] = output.clone()

    quantize_block(block, inputs, configs, PREFIX, keep)
    assert list(outputs) == list(range(inputs.num_batches))
    for batch, output in outputs.items():
        wanted = inputs.call(dense, batch)
        assert (output.float() - wanted).abs().max() < 0.02 * wanted.abs().max()  # products of the pass are in bfloat16


def test_each_group_is_replaced_before_the_next_is_rounded(monkeypatch):
    from transformers_quip.quantize import block as module

    block, inputs, configs = first_block()
    quantized_before = []

    def remember(owner, names, *arguments):
        quantized_before.append([name for name in configs if isinstance(owner.get_submodule(name), QuipLinear)])
        return quantize_group(owner, names, *arguments)

    monkeypatch.setattr(module, "quantize_group", remember)
    quantize_block(block, inputs, configs, PREFIX)
    names = list(configs)
    assert quantized_before == [[], names[:3], names[:4], names[:6]]


def test_linears_of_other_options_in_one_group_are_rounded_apart():
    block, inputs, configs = first_block()
    configs["self_attn.k_proj"] = QuipConfig(bits=4, dataset=IDS)
    result = quantize_block(block, inputs, configs, PREFIX).modules
    bits = {name: block.get_submodule(name).codebook for name in configs}
    assert bits["self_attn.k_proj"] == "e8p-rvq4"
    assert bits["self_attn.q_proj"] == bits["self_attn.v_proj"] == "e8p"
    q, k, v = (result[f"self_attn.{name}_proj"].quantized for name in "qkv")
    assert torch.equal(q.su, v.su)
    assert k.statistics["relative_error"] < 0.2 * q.statistics["relative_error"]


def test_replaying_densely_gives_the_same_values_and_puts_the_linears_back():
    block, inputs, configs = first_block("gpt2")
    quantize_block(block, inputs, configs, "transformer.h.0.")
    modules = {name: block.get_submodule(name) for name in configs}
    wanted = inputs.call(block, 0)
    with replayed_densely(block, configs):
        found = inputs.call(block, 0)
        assert not any(block.get_submodule(name) is module for name, module in modules.items())
    assert all(block.get_submodule(name) is module for name, module in modules.items())
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()  # the linears themselves use 8-bit activations
    with pytest.raises(RuntimeError, match="stop"), replayed_densely(block, configs):
        raise RuntimeError("stop")
    assert all(block.get_submodule(name) is module for name, module in modules.items())


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2},
        {"bits": 2.5},
        {"bits": 2.5, "modules": {"*.v_proj": {"bits": 4}, "lm_head": {"scale": 1.0}, "embed_tokens": {"bits": 4}}},
    ],
    ids=["bits", "average", "average and patterns"],
)
def test_the_callers_config_is_left_as_it_was(options):
    modules = copy.deepcopy(options.get("modules"))
    config = QuipConfig(dataset=IDS, num_samples=6, sequence_length=24, **options)
    before, given = config.to_dict(), config.modules
    model = tiny_model("llama")
    report = quantize_model(model, config)
    assert config.to_dict() == before
    assert config.modules is given
    assert config.modules == modules
    assert config.dataset is IDS
    assert config.calibration is None
    assert getattr(model.config, "quantization_config", None) is None
    settled = report.config
    assert settled.calibration["tokens"] == IDS.numel()
    assert settled.dataset is not IDS
    for name, module in replace.quantized_linears(model).items():
        assert settled.for_module(name).codebook == module.codebook
    if options["bits"] == 2.5:
        assert len({module.codebook for module in replace.quantized_linears(model).values()}) > 1
    if modules:
        assert model.model.layers[0].self_attn.v_proj.codebook == "e8p-rvq4"


def test_groups_too_large_for_their_device_are_rounded_on_the_cpu(monkeypatch):
    weights = {"a": torch.empty(96, 64, device="meta"), "b": torch.empty(32, 64, device="meta")}
    hessian = torch.empty(64, 64, device="meta")
    needed = block_module.rounding_bytes(128, 64)
    assert needed == 40 * 64**2 + 32 * 128 * 64
    for free, device in ((needed, "meta"), (needed - 1, "cpu")):
        monkeypatch.setattr(block_module, "free_memory", lambda _, free=free: free)
        assert block_module._rounding_device(weights, hessian) == torch.device(device)
