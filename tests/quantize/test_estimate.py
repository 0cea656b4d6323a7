"""What a run needs, before it starts: against formulas, and against sleeping samples."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny_ids, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.quantize import estimate as module
from transformers_quip.quantize.estimate import Group, Sample, estimate, groups_of, peak_of_block, time_samples
from transformers_quip.quantize.plan import make_plan

OPTIONS = {"dataset": tiny_ids(8, 16), "num_samples": 8, "sequence_length": 16, "batch_size": 2, "calibrate_on": "mixed"}
CONFIG = QuipConfig(**OPTIONS)


def test_groups():
    shapes = {"q": (64, 32), "k": (16, 32), "o": (32, 64)}
    assert groups_of({"q": ("q", "k"), "o": ("o",)}, shapes) == [Group(("q", "k"), 32, 80), Group(("o",), 64, 32)]


def test_rounding_scales_with_the_sizes():
    sample = Sample(0, 0, 0, columns=100, row=0.5, hessian=2.0)
    assert sample.rounding(Group(("a",), 100, 10)) == pytest.approx(0.5 * 10 + 2)
    assert sample.rounding(Group(("a",), 200, 10)) == pytest.approx(4 * 0.5 * 10 + 8 * 2)


def test_the_peak_is_the_larger_of_observing_and_rounding():
    wide, narrow = Group(("a",), 1000, 1), Group(("b",), 10, 1)
    rounding = 40 * 10**6 + 32 * 1000
    assert peak_of_block([wide, narrow], 5) == 5 + rounding + 8 * 100
    assert peak_of_block([narrow, wide], 5) == 5 + rounding
    many = [Group(("a",), 1000, 1)] * 8
    assert peak_of_block(many, 0) == max(8 * 8 * 10**6, rounding + 7 * 8 * 10**6)


def test_the_time_is_made_of_the_samples(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=3)
    plan = make_plan(model, CONFIG)
    names = {"q": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o": ["self_attn.o_proj"]}
    names |= {"g": ["mlp.gate_proj", "mlp.up_proj"], "d": ["mlp.down_proj"]}
    columns, rows = {"q": 64, "o": 64, "g": 64, "d": 96}, {"q": 128, "o": 64, "g": 192, "d": 64}
    groups = [Group(tuple(members), columns[key], rows[key]) for key, members in names.items()]
    sample = Sample(observe=3.0, replay=1.0, write=0.5, columns=64, row=0.01, hessian=2.0)
    monkeypatch.setattr(module, "time_samples", lambda *_: (sample, groups))
    found = estimate(model, plan, CONFIG, (8, 16), 4, 10**9)
    assert found.stages["observe and replay"] == pytest.approx(3 * (4 * 3.0 + 2 * 1.0))
    one = 0.01 * (128 + 64 + 192) + 3 * 2.0 + 0.01 * 64 * 1.5**2 + 2.0 * 1.5**3
    assert found.stages["round"] == pytest.approx(3 * one)
    assert found.stages["text"] == pytest.approx(1 * 4 * 3 * 0.5)  # 32 documents of 4 tokens are one round
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert found.memory == 10**9 + peak_of_block(groups, block) + 8 * 16 * 64 * 4
    assert "two timed samples" in found.sentences()


def test_gradients_cost_time_disk_and_the_whole_dense_model(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=3)
    sample = Sample(observe=3.0, replay=1.0, write=0.5, columns=64, row=0.01, hessian=2.0)
    groups = [Group(("self_attn.q_proj",), 64, 64), Group(("mlp.down_proj",), 96, 64)]
    monkeypatch.setattr(module, "time_samples", lambda *_: (sample, groups))
    config = QuipConfig(
        **OPTIONS, rounding="yaqa", sketch="A", sketch_samples=6, modules_to_not_convert=[".*(q|k|v|o|gate|up)_proj"]
    )
    without = QuipConfig(**OPTIONS, modules_to_not_convert=[".*(q|k|v|o|gate|up)_proj"])
    found, ldlq = (estimate(model, make_plan(model, each), each, (8, 16), 0, 10**9) for each in (config, without))
    size = 3 * 4 * (64**2 + 96**2)
    assert found.disk == ldlq.disk + size
    blocks = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    assert found.memory == max(ldlq.memory, 10**9 + blocks + 8 * 16 * 64 * 4) + size
    # a forward and a backward pass through 3 blocks, 2 sequences in a batch of 1 s; products as fast as the Hessians'
    multiply = 2.0 / (2 * 16 * (64**2 + 96**2))
    assert found.stages["gradients"] == pytest.approx(6 * (2 * 3 * 1.0 / 2 + 3 * 16 * (64**2 + 96**2) * multiply))
    assert ldlq.stages["gradients"] == 0


def test_samples_are_measured_and_leave_the_model_alone():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample, groups = time_samples(model, make_plan(model, CONFIG), CONFIG, 16)
    assert [group.names[0] for group in groups] == [
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
    ]
    assert [group.columns for group in groups] == [64, 64, 64, 96]
    assert [group.rows for group in groups] == [128, 64, 192, 64]
    assert sample.columns == 64
    assert min(sample.observe, sample.replay, sample.write) > 0
    assert sample.row >= 0
    assert sample.hessian >= 0
    assert sample.row + sample.hessian > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"bits": 2.5}, {"rounding": "yaqa", "refinement_sweeps": None}, {"codebook": "trellis"}]
)
def test_every_kind_of_config_can_be_sampled(options):
    model, config = tiny_model("qwen3"), QuipConfig(**OPTIONS, **options)
    assert time_samples(model, make_plan(model, config), config, 16)[0].observe > 0
