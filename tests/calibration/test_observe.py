"""Who reads what in a block, and how often it is reported."""

import pytest
import torch
from torch import nn

from tests.models import tiny_ids, tiny_model
from transformers_quip.calibration import (
    BlockCall,
    BlockHessians,
    BlockInputs,
    capture_inputs,
    find_blocks,
    linear_names,
    observe_linears,
)
from transformers_quip.calibration.observe import Regroup

GROUPS = {
    "llama": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)],
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "opt": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    "gpt_neox": [("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)],
    "mixtral": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)],
}  # fmt: skip
GROUPS["qwen3"] = GROUPS["gemma3"] = GROUPS["llama"]


@pytest.mark.parametrize("arch", GROUPS)
def test_groups_of_real_blocks(arch):
    model = tiny_model(arch)
    _, blocks = find_blocks(model)
    inputs = capture_inputs(model, blocks, tiny_ids(5, 12), 2, progress=False)
    seen = {}
    block = blocks[0]
    with observe_linears(block, linear_names(block), lambda leader, x: seen.setdefault(leader, []).append(x.clone())) as o:
        inputs.advance(0, block)
    assert {frozenset(group) for group in o.groups.values()} == {frozenset(group) for group in GROUPS[arch]}
    assert all(group[0] == leader for leader, group in o.groups.items())
    # three batches of 2, 2 and 1 sequences of 12 tokens, each reported once a group
    for xs in seen.values():
        assert [x.shape[:-1].numel() for x in xs] == [24, 24, 12]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())


def test_reported_inputs_are_the_linears_inputs():
    """The truth: x recovered from what the linear returns, y = x W^T with a square invertible W."""
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    inputs = capture_inputs(model, blocks, tiny_ids(2, 12), 2, progress=False)
    reported, outputs = {}, {}
    linear = blocks[0].self_attn.o_proj
    hook = linear.register_forward_hook(lambda module, args, output: outputs.update(y=output))
    with observe_linears(blocks[0], ["self_attn.o_proj"], lambda leader, x: reported.update({leader: x.clone()})):
        inputs.advance(0, blocks[0])
    hook.remove()
    x = torch.linalg.solve(linear.weight.double(), outputs["y"].detach().double().mT).mT
    torch.testing.assert_close(reported["self_attn.o_proj"].double(), x, rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """Linears a..d run by the script `body(self, x)`."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def run(body, *batches):
    """Observe a toy block on the batches; return (groups, number of reports of each leader a call)."""
    block, reports = Block(body), []
    with torch.no_grad(), observe_linears(block, "abcd", lambda leader, x: reports[-1].append(leader)) as observer:
        for batch in batches:
            reports.append([])
            block(batch)
    return observer.groups, ["".join(call) for call in reports]


X = torch.randn(3, 4)


def test_equal_values_in_other_tensors_are_other_inputs():
    groups, reports = run(lambda m, x: m.a(x) + m.b(x.clone()) + m.c(x), X)
    assert groups == {"a": ("a", "c"), "b": ("b",)}
    assert reports == ["ab"]


def test_views_of_one_input_are_one_input():
    groups, _ = run(lambda m, x: [m.a(first := x.view(3, 4)), m.b(x.view(3, 4)), first][0], X)
    assert groups == {"a": ("a", "b")}


def test_reused_memory_is_another_input():
    def body(m, x):
        for linear in (m.a, m.b, m.c, m.d):  # each input is freed before the next is made, often at the same address
            linear(x * 2)
        return x

    assert run(body, X)[0] == {name: (name,) for name in "abcd"}


def test_changed_in_place_is_another_input():
    groups, reports = run(lambda m, x: [m.a(y := x.clone()), m.b(y), m.c(y.add_(1)), m.d(y)], X)
    assert groups == {"a": ("a", "b"), "c": ("c", "d")}
    assert reports == ["ac"]


def test_passed_by_keyword():
    assert run(lambda m, x: m.a(input=x) + m.b(x), X)[0] == {"a": ("a", "b")}


def test_a_linear_that_runs_several_times_is_reported_each_time():
    def body(m, x):
        return [(m.a(part), m.b(part)) for part in x.split(1)]

    groups, reports = run(body, X, X)
    assert groups["a"] == ("a", "b")
    assert reports == ["aaa", "aaa"]


def test_linears_without_tokens_join_when_they_first_run():
    def body(m, x):
        m.a(x)
        if len(x) > 1:  # experts c and d share an input of their own, b reads a's
            m.b(x)
            m.c(part := x[1:])
            m.d(part)

    groups, reports = run(body, X[:1], X, X[:1])
    # b has not seen the first batch, so a's statistics are not its own
    assert groups == {"a": ("a",), "b": ("b",), "c": ("c", "d")}
    assert reports == ["a", "abc", "a"]


def test_a_member_that_does_not_run_is_no_error():
    def body(m, x):
        m.a(x)
        if len(x) > 1:
            m.b(x)

    groups, reports = run(body, X, X[:1])
    assert groups == {"a": ("a", "b")}
    assert reports == ["a", "a"]


def test_groups_that_part_name_the_one_that_differs():
    def later(m, x):
        m.a(x)
        m.b(x if len(x) > 1 else x.clone())

    def in_one_call(m, x):
        m.a(x)
        m.b(x)
        m.c(x)
        m.b(x * 2)

    def by_the_leader(m, x):
        m.a(x)
        m.b(x)
        m.a(x * 2)

    for body, batches, name in ((later, (X, X[:1]), "b"), (in_one_call, (X,), "b"), (by_the_leader, (X,), "a")):
        with pytest.raises(Regroup) as error:
            run(body, *batches)
        assert error.value.name == name
    block, reports = Block(in_one_call), []
    with torch.no_grad(), observe_linears(block, "abcd", lambda leader, x: reports.append(leader), ["b"]) as observer:
        block(X)
    assert observer.groups == {"a": ("a", "c"), "b": ("b",)}
    assert reports == ["a", "b", "b"]


def test_hessians_of_a_linear_that_reads_its_groups_input_and_another():
    def body(m, x):
        return m.a(x) + m.b(x) + m.b(x[:1] * 3)

    block, inputs = Block(body), BlockInputs([X, X + 1], [BlockCall((), {})] * 2)
    outputs, restarts = {}, []
    hessians = BlockHessians().collect(block, "abcd", inputs, outputs.__setitem__, lambda: restarts.append(1))
    assert hessians.groups == {"a": ("a",), "b": ("b",)}
    assert restarts == [1]
    assert sorted(outputs) == [0, 1]
    a = torch.cat([X, X + 1]).double()
    b = torch.cat([a, X[:1] * 3, (X[:1] + 1) * 3])
    for name, x in (("a", a), ("b", b)):
        torch.testing.assert_close(hessians.pop(name).double(), x.T @ x / len(x), rtol=1e-5, atol=1e-5)


def test_groups_that_part_after_the_first_batch_are_an_error():
    def body(m, x):
        return m.a(x) + m.b(x if len(x) > 1 else x.clone())

    inputs = BlockInputs([X, X[:1]], [BlockCall((), {})] * 2)
    with pytest.raises(ValueError, match=r"block\.b reads the same input as other linears in the first batch"):
        BlockHessians("block.").collect(Block(body), "abcd", inputs)


def test_hooks_are_removed_after_an_error():
    block = Block(lambda m, x: m.a(x))

    def fail(leader, x):
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback"), observe_linears(block, "abcd", fail):
        block(X)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())
