"""The mode in which the host may not wait: what it refuses and what it lets through."""

import pytest
import torch

from tests.no_sync import forbidden_synchronisation

X = torch.tensor([3.0, 1.0, 2.0])


@pytest.mark.parametrize(
    "wait",
    [
        lambda: X.sum().item(),
        lambda: bool((X > 0).all()),
        lambda: X.tolist(),
        lambda: X.cpu(),
        lambda: X.numpy(),
        lambda: X.nonzero(),
        lambda: X[X > 1],
        lambda: torch.zeros(3).masked_fill(X > 1, 1)[X > 1],
        lambda: torch.zeros(3).index_put_((X > 1,), torch.ones(2)),
        lambda: torch.equal(X, X),
        lambda: X.unique(),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: X.to("meta"),
        lambda: torch.linalg.inv(torch.eye(2)),
    ],
)
def test_values_that_the_host_reads(wait):
    wait()
    with pytest.raises(AssertionError, match="host"), forbidden_synchronisation():
        wait()


def test_values_that_stay_on_the_device():
    first = torch.tensor([0, 1])
    with forbidden_synchronisation():
        found = torch.where(X > 1, X, 0)[X.argsort()]
        found[first] += 1
        torch.addmm(torch.zeros(3, 3), X[:, None], X[None]).sum(1)
    assert found.tolist() == [1.0, 3.0, 3.0]


def test_what_waits_can_be_counted():
    noted = []
    with forbidden_synchronisation(noted):
        assert X.sum().item() + X.max().item() == 9
    assert noted == ["aten::_local_scalar_dense"] * 2
