"""A block is tuned between the roundings of its groups, in QuIP#'s order, and never becomes worse by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.finetune.conftest import IDS
from tests.models import tiny_model
from transformers_quip import QuipConfig
from transformers_quip.calibration import BlockCall, BlockInputs, capture_inputs, find_blocks
from transformers_quip.config.tune import TuneOptions
from transformers_quip.finetune.blockwise import BlockTuner, split
from transformers_quip.nn import QuipLinear
from transformers_quip.quantize.block import quantize_block
from transformers_quip.quantize.recipe import quantize_model

CONFIG = QuipConfig(bits=2, dataset=IDS, sequence_length=20, num_samples=24, batch_size=2, refinement_sweeps=1)
OPTIONS = TuneOptions(mode="full", block_windows=18, block_epochs=4)
QKV = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
LLAMA = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


def entering(model, ids=IDS):
    """(the first block, its inputs, the names of its linears)"""
    _, blocks = find_blocks(model)
    inputs = capture_inputs(model, blocks, ids, 2, progress=False).of_block(0)
    return blocks[0], inputs, [name for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)]


def quantized(options, seed=0):
    """(first block of a tiny Llama, quantized and tuned, its tuner, its result, the dense block, its inputs)"""
    block, inputs, names = entering(tiny_model("llama", seed=seed))
    dense, _, _ = entering(tiny_model("llama", seed=seed))
    tuner = BlockTuner(options, inputs)
    result = quantize_block(block, inputs, dict.fromkeys(names, CONFIG), tuner=tuner)
    return block, tuner, result, dense, inputs


def test_the_order_is_that_of_quip_sharp():
    batches, calls = [], []

    class Noted:
        def observe(self, batch, output):
            batches.append(batch)

        def tune(self, block, names, remaining):
            state = [isinstance(block.get_submodule(name), QuipLinear) for name in (*names, *remaining)]
            assert state == [True] * len(names) + [False] * len(remaining)
            calls.append((tuple(names), tuple(remaining)))

    block, inputs, names = entering(tiny_model("llama"))
    quantize_block(block, inputs, dict.fromkeys(names, CONFIG), tuner=Noted())
    assert batches == list(range(12))
    assert calls == [(group, tuple(sum(LLAMA[number + 1 :], ()))) for number, group in enumerate(LLAMA[:-1])]


def test_it_helps_on_windows_that_it_was_not_trained_on():
    block, tuner, result, dense, inputs = quantized(OPTIONS)
    assert [record.names for record in tuner.records] == list(LLAMA[:-1])
    kept = [record for record in tuner.records if record.kept]
    assert len(kept) >= 2
    assert all(record.after < record.before for record in kept)
    plain, _, _ = entering(tiny_model("llama"))
    names = [name for group in LLAMA for name in group]
    quantize_block(plain, inputs, dict.fromkeys(names, CONFIG))
    _, other, _ = entering(tiny_model("llama"), IDS.flip(0, 1))
    errors = [
        sum((other.call(each, batch) - other.call(dense, batch)).square().sum().item() for batch in range(12))
        for each in (block, plain)
    ]
    assert errors[0] < 0.97 * errors[1]
    # the results say what the block holds
    for name, module in result.modules.items():
        linear = block.get_submodule(name)
        assert torch.equal(module.quantized.su, linear.su.float())
        assert torch.equal(module.quantized.sv, linear.sv.float())
    assert set(result.vectors) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    for name, vector in result.vectors.items():
        assert torch.equal(vector, block.get_parameter(name))
        assert not torch.equal(vector, dense.get_parameter(name))
    assert all(torch.equal(block.get_submodule(name).su, block.get_submodule(QKV[0]).su) for name in QKV)


def test_the_same_again():
    first, second = quantized(OPTIONS), quantized(OPTIONS)
    assert first[1].records == second[1].records
    states = [found[0].state_dict() for found in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_a_loss_is_rolled_back():
    block, tuner, _, _, inputs = quantized(TuneOptions(mode="full", block_windows=16, block_learning_rate=5.0))
    assert [record.kept for record in tuner.records] == [False] * 3
    plain, _, _ = entering(tiny_model("llama"))
    names = [name for group in LLAMA for name in group]
    quantize_block(plain, inputs, dict.fromkeys(names, CONFIG))
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())


def test_its_loss_by_the_formula():
    generator = torch.Generator().manual_seed(2)
    weight, target, hidden = (torch.randn(*shape, generator=generator) for shape in ((6, 6), (2, 5, 6), (2, 5, 6)))
    block = nn.Linear(6, 6, bias=False)
    block.weight.data = weight
    tuner = BlockTuner(OPTIONS, BlockInputs([hidden], [BlockCall((), {})]))
    tuner.observe(0, target)
    loss = tuner._loss(block, 0)
    x, y, w = hidden.double(), target.double(), weight.double()
    terms = []
    added = sorted(float(((y - x)[i, j] ** 2).sum()) for i in range(2) for j in range(5))
    for i in range(2):
        for j in range(5):
            error = w @ x[i, j] - y[i, j]
            # PyTorch's median of ten numbers is the fifth
            terms.append(float(error @ error) / max(float(((y - x)[i, j] ** 2).sum()), added[4]))
    assert loss.item() == pytest.approx(sum(terms) / 10, rel=1e-5)
    loss.backward()
    assert block.weight.grad is not None


@pytest.mark.parametrize(
    ("windows", "sizes", "train", "held"),
    [(16, [2] * 12, 8, 2), (64, [4] * 64, 16, 4), (64, [4] * 3, 2, 1), (8, [1] * 2, 1, 1), (1, [8] * 4, 1, 1)],
)
def test_its_batches(windows, sizes, train, held):
    found = split(TuneOptions(mode="full", block_windows=windows), sizes)
    assert (len(found[0]), len(found[1])) == (train, held)
    assert not set(found[0]) & set(found[1])
    assert set(found[0]) | set(found[1]) <= set(range(len(sizes)))


def test_a_single_batch_is_used_for_both():
    assert split(OPTIONS, [24]) == ([0], [0])


@pytest.mark.parametrize("arch", ["gpt2", "gemma3", "qwen2_moe"])
def test_other_architectures(arch):
    model, tuners = tiny_model(arch), []

    def tuner(inputs):
        tuners.append(BlockTuner(OPTIONS, inputs))
        return tuners[-1]

    quantize_model(model, CONFIG, tuner=tuner)
    records = [record for tuner in tuners for record in tuner.records]
    kept = [record for record in records if record.kept]
    assert len(kept) >= len(records) / 2
    assert all(record.after < record.before for record in kept)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
