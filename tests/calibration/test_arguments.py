"""Arguments are asked of the signature, whatever a release of Transformers calls them."""

import pytest
import torch
from torch import nn

from tests.models import tiny_model
from transformers_quip.calibration.arguments import cache_argument, without_cache


def model(forward):
    return type("Model", (nn.Module,), {"forward": forward})()


@pytest.mark.parametrize(
    ("forward", "cache", "options"),
    [
        (lambda self, input_ids, past_key_values=None, use_cache=None: None, "past_key_values", {"use_cache": False}),
        (lambda self, input_ids, cache=None, use_cache=None: None, "cache", {"use_cache": False}),
        (lambda self, input_ids, cache=None, **kwargs: None, "cache", {"use_cache": False}),
        (lambda self, input_ids: None, None, {}),
    ],
)
def test_a_signature(forward, cache, options):
    assert cache_argument(model(forward)) == cache
    assert without_cache(model(forward)) == options


def test_a_model_of_the_installed_transformers():
    llama = tiny_model("llama")
    ids = torch.arange(6).unsqueeze(0)
    assert llama(ids, **without_cache(llama)).past_key_values is None
    cache = llama(ids[:, :5], use_cache=True).past_key_values
    following = llama(ids[:, 5:], use_cache=True, **{cache_argument(llama): cache}).logits
    torch.testing.assert_close(following[:, -1], llama(ids).logits[:, -1])
