"""The Hessians of experts: each from its own tokens, in as many passes as memory asks for, shrunk where tokens are few."""

import pytest
import torch
from torch import nn

from tests.models import tiny_ids, tiny_model
from transformers_quip.calibration import capture_inputs, find_blocks
from transformers_quip.calibration.experts import BORROWED, ExpertHessians

NAME = "mlp.experts"
READ, WRITE = f"{NAME}.gate_up_proj", f"{NAME}.down_proj"


@pytest.fixture(scope="module")
def block_and_inputs():
    model = tiny_model("mixtral")
    _, blocks = find_blocks(model)
    inputs = capture_inputs(model, blocks, tiny_ids(4, 16), 2, progress=False)
    return blocks[0], inputs.of_block(0)


def collected(block, inputs, **options):
    hessians = ExpertHessians(block, [NAME], "model.layers.0.", **options)
    found = {}
    for number, parts in enumerate(hessians.passes):
        with hessians.watching(block, number), torch.no_grad():
            outputs = [inputs.call(block, batch) for batch in range(inputs.num_batches)]
        found |= {(part.name, e): hessians.pop(part.name, e) for part in parts for e in part.experts}
    return hessians, found, outputs


@pytest.fixture(scope="module")
def routed(block_and_inputs):
    """Every expert's tokens, and what each computes of them, by Transformers' own formulas in float64."""
    block, inputs = block_and_inputs
    seen = []
    handle = block.mlp.experts.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        for batch in range(inputs.num_batches):
            inputs.call(block, batch)
    handle.remove()
    x, chosen = (torch.cat([given[i] for given in seen]) for i in (0, 1))
    tokens = [x[(chosen == expert).any(-1)].double() for expert in range(4)]
    inner = []
    for expert, own in enumerate(tokens):
        gate, up = (own @ block.mlp.experts.gate_up_proj[expert].double().T).chunk(2, dim=-1)
        inner.append(nn.functional.silu(gate) * up)
    return tokens, inner


@torch.no_grad()
def test_each_expert_has_the_hessian_of_its_own_tokens(block_and_inputs, routed):
    block, inputs = block_and_inputs
    tokens, inner = routed
    hessians, found, outputs = collected(block, inputs)
    assert hessians.tokens == {READ: [len(t) for t in tokens], WRITE: [len(t) for t in tokens]}
    assert sum(hessians.tokens[READ]) == 2 * 4 * 16
    assert len(hessians.passes) == 1
    pool = torch.cat(tokens).T @ torch.cat(tokens) / sum(map(len, tokens))
    for expert in range(4):
        for name, x in ((READ, tokens[expert]), (WRITE, inner[expert])):
            own = x.T @ x / len(x)
            size = len(own)
            siblings = pool if name == READ else torch.eye(size, dtype=torch.float64) * own.diagonal().mean()
            share = len(x) / (len(x) + BORROWED * size)
            expected = share * own + (1 - share) * siblings
            assert (found[name, expert].double() - expected).norm() < 0.01 * expected.norm()  # products are bfloat16 there
    for batch, output in enumerate(outputs):
        expected = inputs.call(block, batch)
        assert (output - expected).norm() < 0.01 * expected.norm()
    assert type(block.mlp.experts).__name__ == "MixtralExperts"


@torch.no_grad()
def test_several_passes_give_the_same(block_and_inputs):
    block, inputs = block_and_inputs
    _, whole, _ = collected(block, inputs)
    for budget, passes in ((2 * 8 * 64**2, 6), (0, 8), (8 * (4 * 64**2 + 96**2), 3)):
        hessians, found, _ = collected(block, inputs, budget=budget)
        assert len(hessians.passes) == passes, budget
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_experts_without_tokens_take_their_siblings(block_and_inputs):
    block, _ = block_and_inputs
    hessians = ExpertHessians(block, [NAME], "layer.")
    with hessians.watching(block, 0):
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        chosen = torch.tensor([[0, 1]] * 6)
        block.mlp.experts(x, chosen, torch.ones(6, 2))
    assert hessians.tokens == {READ: [6, 6, 0, 0], WRITE: [6, 6, 0, 0]}
    torch.testing.assert_close(hessians.pop(READ, 3), x.T @ x / 6, rtol=1e-4, atol=1e-5)
    alone = hessians.pop(WRITE, 2)
    assert torch.equal(alone, torch.eye(96) * alone[0, 0])
    assert alone[0, 0] > 0
    assert hessians.borrowing() == {f"layer.{READ}": (4, 4, 0), f"layer.{WRITE}": (4, 4, 0)}


def test_no_token_at_all(block_and_inputs):
    block, _ = block_and_inputs
    hessians = ExpertHessians(block, [NAME])
    assert hessians.pop(READ, 0) is None
    assert hessians.shape(READ) == (4, 192, 64)
