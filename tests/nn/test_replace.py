"""Putting quantized linears into a model and dense ones back."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import truth
from transformers_quip import QuipConfig, QuipLinear
from transformers_quip.nn import replace


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 12)
        self.conv = Conv1D(64, 12)
        self.head = nn.Sequential(nn.Linear(64, 8, bias=False))

    def forward(self, x):
        return self.head(self.conv(self.fc(x)))


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Named(nn.Linear):
    """Computes the same as its base class."""


class WithMore(nn.Linear):
    """Needs more than a weight and a bias."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


def values(m, n):
    parts = truth.random_linear(m, n)
    return SimpleNamespace(tensors=truth.stored(parts), su=parts["su"] / 30, sv=parts["sv"])


def quantized_net():
    net = Net().eval()
    for name, module in list(net.named_modules()):
        if replace.is_dense_linear(module):
            replace.replace_linear(net, name, values(*replace.linear_shape(module)), QuipConfig())
    return net


def test_what_counts_as_a_dense_linear():
    assert replace.is_dense_linear(nn.Linear(2, 3))
    assert replace.is_dense_linear(Conv1D(2, 3))
    assert not replace.is_dense_linear(QuipLinear(2, 3))
    assert replace.is_dense_linear(Named(2, 3))
    assert not replace.is_dense_linear(Router(2, 3))
    assert not replace.is_dense_linear(WithMore(2, 3))
    assert not replace.is_dense_linear(nn.MultiheadAttention(4, 2).out_proj)  # another module reads its weight
    assert not replace.is_dense_linear(nn.Embedding(2, 3))


def test_only_an_embedding_is_replaced_by_a_quantized_embedding():
    net = Net()
    with pytest.raises(TypeError, match="fc is a Linear, not an nn.Embedding"):
        replace.replace_embedding(net, "fc", values(12, 64), QuipConfig())
    assert type(net.fc) is nn.Linear


@pytest.mark.parametrize("module", [nn.Linear(5, 3), Conv1D(3, 5)])
def test_shape_and_weight_of_both_kinds(module):
    assert replace.linear_shape(module) == (3, 5)
    weight = replace.dense_weight(module)
    x = torch.randn(2, 5)
    torch.testing.assert_close(x @ weight.T + module.bias, module(x))
    assert replace.dense_weight(module, torch.zeros_like(module.weight)).shape == (3, 5)


def test_replacing_and_back_computes_the_same():
    net = quantized_net()
    assert list(replace.quantized_linears(net)) == ["fc", "conv", "head.0"]
    x = torch.randn(4, 64)
    y = net(x)
    weights = [truth.dense_weight(m.codes, m.su, m.sv) for m in replace.quantized_linears(net).values()]
    by_hand = (x.double() @ weights[0].T + net.fc.bias.double()) @ weights[1].T + net.conv.bias.double()
    torch.testing.assert_close(y.double(), by_hand @ weights[2].T, rtol=1e-4, atol=1e-4)

    dense = replace.replace_by_dense(net)
    assert {name: type(module) for name, module in dense.items()} == {
        "fc": nn.Linear,
        "conv": Conv1D,
        "head.0": nn.Linear,
    }
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)
    assert net.head[0].bias is None
    assert not net.fc.training
    assert all(p.requires_grad for p in net.parameters())
    assert not replace.quantized_linears(net)


def test_dense_of_another_dtype():
    module = replace.to_dense(quantized_net().conv, torch.bfloat16)
    assert module.weight.dtype == module.bias.dtype == torch.bfloat16
    assert module.weight.shape == (12, 64)


def test_replace_by_empty_keeps_the_bias_and_takes_no_memory():
    net = Net().eval()
    bias = net.fc.bias
    for name in ("fc", "conv"):
        replace.replace_by_empty(net, name, QuipConfig(seed=3))
    assert net.fc.bias is bias
    assert net.fc.codes.is_meta
    assert net.fc.su.is_meta
    assert net.fc.codes.shape == (12, 8)
    assert net.conv.codes.shape == (64, 2)
    assert net.conv.conv1d
    assert net.conv.seed == 3
    assert not net.conv.training


def test_freeze():
    net = quantized_net()
    net.fc.su.requires_grad_()
    net.fc.bias.requires_grad_()
    replace.freeze(net)
    assert not any(p.requires_grad for p in net.parameters())


def test_an_offloaded_model_cannot_be_made_dense():
    net = quantized_net()
    net.head.to("meta")
    with pytest.raises(ValueError, match=r"head\.0 is offloaded"):
        replace.replace_by_dense(net)
    assert isinstance(net.fc, QuipLinear)  # nothing was changed
