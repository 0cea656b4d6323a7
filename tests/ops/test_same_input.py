"""The rule for "the same input as before": whatever writes to an input, and whoever asks, no old answer is given."""

import copy
import gc
import math
import pickle
import threading
import weakref

import pytest
import torch

from transformers_quip.ops.same_input import SameInput, have_same_bytes


def numpy(x):
    x.numpy()[...] = 3


def dlpack(x):
    torch.from_dlpack(x.detach()).fill_(3)


def data(x):
    x.data.fill_(3)


def in_place(x):
    x.fill_(3)


def storage(x):
    x.untyped_storage().copy_(torch.full_like(x, 3).untyped_storage())


def data_is_replaced(x):
    x.data = torch.full_like(x, 3)


WRITES = [numpy, dlpack, data, in_place, storage, data_is_replaced]
CONTEXTS = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def held(x, su=None, key="key"):
    """What the taker "q" computed of x."""
    shared = SameInput()
    tensors = (x,) if su is None else (x, su)
    assert shared.take("q", tensors, key) is None
    shared.keep("q", tensors, key, "result")
    return shared


def test_a_sibling_takes_it_once():
    x = torch.randn(3, 8)
    shared = held(x)
    assert shared.take("k", (x,), "key") == "result"
    assert shared.takers == 2
    assert shared.take("k", (x,), "key") is None  # called again
    assert shared.is_empty


def test_who_computed_it_does_not_get_it():
    x = torch.randn(3, 8)
    assert held(x).take("q", (x,), "key") is None


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("write", WRITES)
def test_an_input_that_was_written_to(write, context):
    with context():
        x = torch.zeros(3, 8)
        shared = held(x)
        write(x)
        assert shared.take("k", (x,), "key") is None


@pytest.mark.parametrize("write", WRITES)
def test_another_tensor_that_decides_the_result_was_written_to(write):
    x, su = torch.randn(3, 8), torch.ones(8)
    shared = held(x, su)
    twin = su.clone()
    write(su)
    assert shared.take("k", (x, twin), "key") == "result"  # that of "k" holds what "q" was computed with
    assert shared.take("v", (x, su), "key") is None


def test_another_tensor_of_the_same_values_is_another_input():
    x = torch.randn(3, 8)
    assert held(x).take("k", (x.clone(),), "key") is None


def test_another_key():
    x = torch.randn(3, 8)
    assert held(x).take("k", (x,), "other") is None


def test_another_thread():
    x, found = torch.randn(3, 8), []
    shared = held(x)
    thread = threading.Thread(target=lambda: found.append(shared.take("k", (x,), "key")))
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize("x", [torch.randn(8, 3).T, torch.empty(3, 8, device="meta")])
def test_what_cannot_be_compared_is_not_kept(x):
    assert held(x).is_empty


def test_nothing_outlives_the_input():
    x = torch.randn(3, 8)
    shared = held(x)
    known = weakref.ref(x)
    assert not shared.is_empty
    del x
    gc.collect()
    assert known() is None
    assert shared.is_empty


def test_a_result_that_nobody_takes_is_soon_not_kept():
    shared, kept = SameInput(), []
    for _ in range(140):
        x = torch.randn(3, 8)
        assert shared.take("o", (x,), "key") is None
        shared.keep("o", (x,), "key", "result")
        kept.append(not shared.is_empty)
    assert kept[:2] == [True, True]
    assert not any(kept[2:60])
    assert 3 <= sum(kept) <= 6  # it is tried again now and then
    for _ in range(140):  # one with siblings is always kept
        x = torch.randn(3, 8)
        assert shared.take("q", (x,), "key") is None
        shared.keep("q", (x,), "key", "result")
        assert shared.take("k", (x,), "key") == "result"


def test_copies_hold_nothing():
    x = torch.randn(3, 8)
    shared = held(x)
    assert copy.deepcopy(shared).is_empty
    assert pickle.loads(pickle.dumps(shared)).is_empty
    assert not shared.is_empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_same_bytes(dtype):
    x = torch.arange(35).reshape(5, 7).to(dtype)
    assert have_same_bytes(x, x.clone())
    for i in range(35):
        other = x.clone()
        other.view(-1)[i] += 1
        assert not have_same_bytes(x, other)
    assert not have_same_bytes(x, x.reshape(7, 5))
    assert have_same_bytes(x[:0], x[:0])


def test_same_bytes_are_not_equal_numbers():
    assert have_same_bytes(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert not have_same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not have_same_bytes(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
