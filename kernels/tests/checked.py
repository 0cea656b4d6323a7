"""The self-check in the interpreter: every family is right, wrong kernels are found. Run by test_gpu_interpreted.py."""

from __future__ import annotations

import json

import pytest
import torch

from quip_kernels.gpu import dequantize, grouped, launch, matvec, nearest, small_batch, transform, trellis, viterbi
from transformers_quip.ops.triton import families, self_check
from transformers_quip.ops.triton.route import Encoder, Family

if not launch.interpreted():
    raise RuntimeError("run test_gpu_interpreted.py, which starts these tests with Triton's interpreter")

CPU = torch.device("cpu")
# The function of each family and encoder that makes its result.
FUNCTIONS = {
    Family.TRANSFORM: (transform, "transform"),
    Family.MATVEC: (matvec, "matvec"),
    Family.SMALL_BATCH: (small_batch, "small_batch"),
    Family.DEQUANTIZE: (dequantize, "dequantize"),
    Family.TRELLIS: (trellis, "matvec"),
    Family.GROUPED: (grouped, "grouped"),
    Encoder.TRELLIS: (viterbi, "search"),
    Encoder.POINTS: (nearest, "encode"),
    Encoder.PANELS: (nearest, "round_panel"),
    Encoder.PANELS_3: (nearest, "round_panel"),
    Encoder.PANELS_4: (nearest, "round_panel"),
    Encoder.GRID: (nearest, "round_scalar_panel"),
}


def answers(capsys, *names):
    self_check.main(["cpu", *names])
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert all(line.startswith("verdict: ") for line in lines)
    return [json.loads(line.removeprefix("verdict: ")) for line in lines]


def test_all_are_right(capsys):
    names = [*self_check.names(), *self_check.names(self_check.ENCODE)]
    assert answers(capsys, *names) == [None] * len(names)


@pytest.mark.parametrize("family", FUNCTIONS)
def test_one_wrong_number_is_found(family, monkeypatch, capsys):
    module, name = FUNCTIONS[family]
    right = getattr(module, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        if isinstance(result, tuple):  # of an encoder: another first code
            result[0].view(-1)[0] ^= 1
            return result
        flat = result.view(-1)
        flat[7] = flat[7] ^ 1 if result.dtype == torch.int32 else flat[7] * 1.5 + 0.1
        return result

    monkeypatch.setattr(module, name, wrong)
    (found,) = answers(capsys, family.value)
    assert found.startswith("ArithmeticError: ")


@pytest.mark.parametrize(("place", "change"), [("bytes", 1 << 7), ("scales", 1.001), ("sums", 1 << 9)])
def test_one_wrong_digit_is_found(place, change, monkeypatch, capsys):
    right = transform.transform_quantize

    def wrong(*arguments, **options):
        digits = right(*arguments, **options)
        changed = getattr(digits, place)
        first = (0,) if place == "scales" else (0, -1, *[0] * (changed.ndim - 2))  # of the highest digit
        changed[first] = changed[first] * change if place == "scales" else changed[first] ^ change
        return digits

    monkeypatch.setattr(transform, "transform_quantize", wrong)
    (found,) = answers(capsys, Family.TRANSFORM.value)
    assert found.startswith("ArithmeticError: ")


def test_whole_layers_are_compared_too(capsys):
    def wrong(x, *layer):
        from transformers_quip.ops.triton.run import linear

        return linear(x, *layer) * 1.02

    with pytest.raises(ArithmeticError, match="a layer of codebook e8p in torch.bfloat16, 1 vectors: relative error 0.02"):
        families.whole_layer(CPU, wrong)


def test_the_check_ends_after_an_error_of_the_driver(monkeypatch, capsys):
    """Whatever follows could fail for the same reason, so that another process does the rest."""

    def fails(*_, **__):
        raise RuntimeError("an illegal memory access was encountered\nlong explanation")

    monkeypatch.setattr(dequantize, "dequantize", fails)
    names = [Family.DEQUANTIZE.value, Encoder.TRELLIS.value]
    assert answers(capsys, *names) == ["RuntimeError: an illegal memory access was encountered"]
