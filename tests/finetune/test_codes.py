"""Codes move where the gradient of the loss says so, and only if the model is better on text that it has not seen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.finetune.conftest import IDS, pair
from transformers_quip import QuipLinear, codebooks
from transformers_quip.finetune import TuneOptions, record, tune_vectors
from transformers_quip.finetune import codes as module
from transformers_quip.finetune.codes import FILE, MovableLinear, Moves, apply_moves, best_moves, check_movable, move_codes
from transformers_quip.finetune.end_to_end import student_head
from transformers_quip.nn.replace import quantized_linears

BOOKS = ["e8p", "e8p-rvq3", "e8p-rvq4", "d4", "half-integer", "scalar2", "scalar3", "scalar8", "trellis:mul1:k2:exl3"]
OPTIONS = TuneOptions(held_out=8, code_rounds=6, code_windows=8, code_share=0.01)


def points_near(book, rows=32, columns=48):
    """A random weight, in units of the codebook's points, rounded: codes and points in blocks."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * book.gaussian_scale
    codes, points = book.encode(book.to_blocks(weight))
    return codes, book.from_blocks(points)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(module, "product_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def models():
    return pair("llama")


@pytest.mark.parametrize("name", BOOKS)
def test_stored_codes_are_taken_apart_again(name):
    book = codebooks.get(name)
    codes, points = points_near(book)
    stored = book.store(codes)
    assert torch.equal(book.codes_of(stored, 48), codes)
    assert torch.equal(book.decode(stored, 48), points)


def test_a_codebook_that_packs_codes_in_its_own_way_says_so():
    class Packed(type(codebooks.get("d4"))):
        def store(self, codes):
            return {"codes": codes.flip(0)}

    with pytest.raises(TypeError, match="codebook 'd4' has no method codes_of"):
        Packed().codes_of({"codes": torch.zeros(1, 1, dtype=torch.uint8)}, 4)


def linear_of(name, rows=32, columns=48):
    """A quantized linear with a bias, and with su and sv that differ from 1."""
    torch.manual_seed(3)
    linear = QuipLinear(columns, rows, bias=True, codebook=name, seed=5)
    book = codebooks.get(name)
    codes, _ = points_near(book, rows, columns)
    for tensor, value in book.store(codes).items():
        linear.get_parameter(tensor).data = value
    linear.su.data = 0.5 + torch.rand(columns)
    linear.sv.data = 0.5 + torch.rand(rows)
    linear.bias.data = torch.randn(rows)
    return linear


@pytest.mark.parametrize("name", ["e8p", "trellis:mul1:k2:exl3"])
def test_slope_is_the_derivative_with_respect_to_the_points(name):
    linear = linear_of(name)
    x = torch.randn(3, 7, 48)
    wanted = torch.randn(3, 7, 32)
    stand_in = MovableLinear(linear)
    given = x.clone().requires_grad_()
    (stand_in(given) - wanted).square().sum().backward()

    points = linear._decode(torch.float64)

    def loss(points):
        weight = linear._weight_of(points)
        return (nn.functional.linear(x.double(), weight, linear.bias.double()) - wanted.double()).square().sum()

    direction = torch.randn(points.shape, dtype=torch.float64)
    step = 1e-4
    expected = (loss(points + step * direction) - loss(points - step * direction)) / (2 * step)
    assert (stand_in.slope().double() * direction).sum().item() == pytest.approx(expected.item(), rel=1e-4)
    exact = x.double().requires_grad_()
    (
        nn.functional.linear(exact, linear._weight_of(points), linear.bias.double()) - wanted.double()
    ).square().sum().backward()
    assert torch.allclose(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BOOKS)
def test_best_moves(name):
    """At most one in a row, of the steepest blocks, to points of the codebook, with the gain that they predict."""
    book = codebooks.get(name)
    codes, points = points_near(book)
    slope = torch.randn(points.shape, generator=torch.Generator().manual_seed(2))
    most = max(1, len(codes) // 2)
    moves = best_moves(book, points, slope, most)
    assert 0 < len(moves.rows) <= most
    assert len(moves.rows.unique()) == len(moves.rows)
    changed = codes.clone()
    changed[moves.rows, moves.columns] = moves.codes
    there = book.decode(book.store(changed), points.shape[1])
    gains = book.to_blocks((points - there) * slope).sum(-1)
    assert torch.allclose(gains[moves.rows, moves.columns], moves.gains, rtol=1e-4, atol=1e-5)
    assert (moves.gains > 0).all()
    assert (book.to_blocks(there - points) != 0).any(-1).sum() == len(moves.rows)
    steepness = book.to_blocks(slope).norm(dim=-1)
    assert torch.equal(steepness[moves.rows].argmax(-1), moves.columns)


def test_columns_that_end_within_a_block():
    book = codebooks.get("e8p")
    _, points = points_near(book, 8, 32)
    moves = best_moves(book, points[:, :28], torch.randn(8, 28), 8)
    assert len(moves.rows)
    assert moves.columns.max() < 4


def test_apply_moves_changes_these_codes_alone():
    linear = linear_of("e8p-rvq4")
    before = {name: tensor.clone() for name, tensor in linear.stored().items()}
    x = torch.randn(2, 48)
    linear(x)  # a prepared call must not outlive the codes
    moves = Moves(torch.tensor([3, 9]), torch.tensor([0, 5]), torch.tensor([17, -70000], dtype=torch.int32), torch.ones(2))
    apply_moves(linear, moves)
    for name, tensor in linear.stored().items():
        different = (tensor != before[name]).nonzero().tolist()
        assert all(place in ([3, 0], [9, 5]) for place in different)
    assert torch.equal(codebooks.get("e8p-rvq4").codes_of(linear.stored(), 48)[[3, 9], [0, 5]], moves.codes)
    assert torch.allclose(linear(x), nn.functional.linear(x, linear.dequantize(), linear.bias), atol=1e-4)


def damaged(model, share=0.05):
    """A copy whose codes were replaced at random in some places."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(8)
    for linear in quantized_linears(model).values():
        codes = linear.codes.data
        hit = torch.rand(codes.shape, generator=generator) < share
        wrong = torch.randint(-(2**15), 2**15, codes.shape, generator=generator).to(torch.int16)
        linear.codes.data = torch.where(hit, wrong, codes)
    return model


def moved(model, dense, options=OPTIONS, **others):
    teacher = record(dense, IDS)
    return move_codes(model, teacher, student_head(model, teacher, IDS[:1, :4]), options, progress=False, **others)


def test_a_damaged_model_gets_better(models):
    model = damaged(models[1])
    before = {name: value.clone() for name, value in model.named_parameters()}
    report = moved(model, models[0])
    assert report.moved > 0
    assert report.verdict.accepted
    assert report.verdict.after < report.verdict.before
    assert len(report.history) == OPTIONS.code_rounds
    assert sum(entry["moved"] for entry in report.history) == report.moved
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.endswith(".codes") for name in changed)
    differing = sum((value != before[name]).sum().item() for name, value in model.named_parameters() if name in changed)
    assert 0 < differing <= report.moved  # a block may move twice
    assert not any(isinstance(inner, MovableLinear) for inner in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_a_loss_stays_as_it_is(models):
    """Its own predictions are the teacher's: any move is a loss, and is undone."""
    model = copy.deepcopy(models[1])
    before = {name: value.clone() for name, value in model.named_parameters()}
    report = moved(model, model, TuneOptions(held_out=8, code_rounds=2, code_windows=4, code_share=0.02))
    assert report.moved == 0
    assert not report.verdict.accepted
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_stopped_run_goes_on(models, tmp_path, monkeypatch):
    expected = damaged(models[1])
    report = moved(expected, models[0])
    model, rounds = damaged(models[1]), module._Mover._round

    def stopping(self, number, chosen):
        if number == 3:
            raise KeyboardInterrupt
        rounds(self, number, chosen)

    monkeypatch.setattr(module._Mover, "_round", stopping)
    with pytest.raises(KeyboardInterrupt):
        moved(model, models[0], folder=tmp_path, mark={"run": 1})
    monkeypatch.setattr(module._Mover, "_round", rounds)
    again = damaged(models[1])
    resumed = moved(again, models[0], folder=tmp_path, mark={"run": 1})
    assert resumed.history == report.history
    assert resumed.verdict == report.verdict
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), expected.parameters(), strict=True))


def test_the_state_of_another_run_or_a_damaged_one(models, tmp_path, caplog):
    options = TuneOptions(held_out=8, code_rounds=1, code_windows=4, code_share=0.01)
    moved(damaged(models[1]), models[0], options, folder=tmp_path, mark={"run": 1})
    moved(damaged(models[1]), models[0], options, folder=tmp_path, mark={"run": 2})
    assert "is of another run" in caplog.text
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        moved(damaged(models[1]), models[0], options, folder=tmp_path, mark={"run": 1})


def test_linears_take_turns_where_memory_is_short(models, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 1)
    linears = check_movable(models[1])
    assert module._groups(linears) == [[name] for name in linears]
    report = moved(damaged(models[1]), models[0])
    assert len(report.history) == OPTIONS.code_rounds


def test_after_the_vectors(models):
    model = damaged(models[1])
    options = TuneOptions(epochs=1, batch_size=4, held_out=8, code_rounds=4, code_windows=8, code_share=0.01)
    report = tune_vectors(model, record(models[0], IDS), options, progress=False)
    assert report.codes is not None
    assert report.codes.verdict.before == pytest.approx(report.verdict.after, rel=1e-6)
    assert report.codes.verdict.after <= report.codes.verdict.before
    assert report.to_dict()["codes"]["blocks"] == sum(one.codes.numel() for one in quantized_linears(model).values())
    assert report.is_better


def test_codes_that_cannot_move(models, monkeypatch):
    monkeypatch.setattr(module.processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="codes are moved by one process"):
        check_movable(models[1])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has no quantized linears whose codes could be chosen again"):
        check_movable(models[0])


@pytest.mark.parametrize(("name", "value"), [("code_rounds", -1), ("code_windows", 0), ("code_share", 0.0)])
def test_options(name, value):
    with pytest.raises(ValueError, match=name):
        TuneOptions(**{name: value})
