"""The kernel of experts on a device, against float64 on the CPU, and as a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from tests import truth
from tests.rehearsal import sized

pytestmark = pytest.mark.gpu

ERROR = {torch.float32: 3e-6, torch.float16: 8e-4, torch.bfloat16: sized(4e-3, 8e-3)}
EXPERTS, ROWS, COLUMNS = 6, 96, 384


def stacked(codebook, dtype, device):
    """Arguments of the op without x and ends, and the dense weights float64 of all experts."""
    parts = [truth.random_linear(ROWS, COLUMNS, seed, dtype, codebook) for seed in range(EXPERTS)]
    names = [name for name in parts[0] if name.startswith("codes")]
    weight = [torch.stack([part[name] for part in parts]).to(device) for name in names]
    su, sv = (torch.stack([part[name] for part in parts]).to(device) for name in ("su", "sv"))
    codes = [{name: part[name] for name in names} for part in parts]
    dense = [
        truth.dense_weight(su=part["su"], sv=part["sv"], codebook=codebook, **one)
        for part, one in zip(parts, codes, strict=True)
    ]
    return [weight, su, sv, codebook, "hadamard", "hadamard", 0], dense


def expected(x, ends, dense):
    y, begin = torch.zeros(len(x), ROWS, dtype=torch.float64), 0
    for weight, end in zip(dense, ends.tolist(), strict=True):
        y[begin:end] = x[begin:end].double().cpu() @ weight.T
        begin = end
    return y


def inputs(counts, dtype, device, rest=2):
    ends = torch.tensor(counts).cumsum(0)
    x = torch.randn(int(ends[-1]) + rest, COLUMNS, generator=torch.Generator().manual_seed(9)).to(dtype).to(device)
    return x, ends.to(device)


@pytest.mark.parametrize("codebook", ["e8p", "e8p-rvq3", "e8p-rvq4"])
@pytest.mark.parametrize("counts", [[0, 1, 0, 1, 2, 0], [3, 0, 17, 40, 1, 0], [200, 100, 0, 300, 65, 64]], ids=str)
def test_grouped_linear(codebook, counts, device):
    for dtype, most in ERROR.items():
        arguments, dense = stacked(codebook, dtype, device)
        x, ends = inputs(counts, dtype, device)
        y = torch.ops.quip.grouped_linear(x, ends, *arguments)
        wanted = expected(x, ends, dense)
        assert y.dtype == dtype
        assert (y.double().cpu() - wanted).norm() < most * wanted.norm()
        assert not y[-2:].any()


def test_a_recorded_graph_is_right_for_other_experts(device):
    if device.type != "cuda":
        pytest.skip("graphs are recorded on CUDA devices")
    arguments, dense = stacked("e8p", torch.bfloat16, device)
    x, ends = inputs([1, 0, 0, 2, 0, 1], torch.bfloat16, device, rest=0)
    with torch.no_grad():
        torch.ops.quip.grouped_linear(x, ends, *arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch.ops.quip.grouped_linear(x, ends, *arguments)
        for counts in ([1, 0, 0, 2, 0, 1], [0, 4, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]):
            ends.copy_(torch.tensor(counts).cumsum(0))
            graph.replay()
            wanted = expected(x, ends, dense)
            assert (y.double().cpu() - wanted).norm() < ERROR[torch.bfloat16] * wanted.norm()


def test_compiled_equals_eager(device):
    arguments, _ = stacked("e8p", torch.bfloat16, device)
    x, ends = inputs([1, 0, 0, 2, 0, 1], torch.bfloat16, device)
    with torch.no_grad():
        compiled = torch.compile(lambda *a: torch.ops.quip.grouped_linear(*a) * 1.0, fullgraph=True)
        assert torch.equal(compiled(x, ends, *arguments), torch.ops.quip.grouped_linear(x, ends, *arguments))
    torch.library.opcheck(torch.ops.quip.grouped_linear.default, (x, ends, *arguments))
