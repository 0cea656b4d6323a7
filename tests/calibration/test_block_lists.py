"""Models with several lists of blocks, and blocks that pass on more than hidden states."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from tests.architectures.tiny import randomize, tiny_config
from transformers_quip.calibration import capture_inputs, find_block_lists, find_blocks
from transformers_quip.calibration.inputs import GivenInputs, are_calls, counts, keywords, split
from transformers_quip.calibration.recorder import Passed

IDS = torch.randint(3, 100, (5, 12), generator=torch.Generator().manual_seed(0))
LISTS = {
    "t5": (AutoModelForSeq2SeqLM, ["encoder.block", "decoder.block"]),
    "bart": (AutoModelForSeq2SeqLM, ["model.encoder.layers", "model.decoder.layers"]),
    "bert": (AutoModelForMaskedLM, ["bert.encoder.layer"]),
    "modernbert": (AutoModelForMaskedLM, ["model.layers"]),
    "hrm_text": (AutoModelForCausalLM, ["model.L_module.layers", "model.H_module.layers"]),
    "git": (AutoModelForCausalLM, ["git.encoder.layer"]),
    "hy_v4": (AutoModelForCausalLM, ["model.layers"]),
}


def tiny(model_type):
    auto, names = LISTS[model_type]
    try:
        config = tiny_config(model_type)
    except KeyError:
        pytest.skip(f"this Transformers has no {model_type}")
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    randomize(model)
    return model, names


@pytest.mark.parametrize("model_type", LISTS)
@torch.no_grad()
def test_blocks_that_run_alone_compute_what_they_compute_in_the_model(model_type):
    model, names = tiny(model_type)
    lists = find_block_lists(model)
    assert sorted(lists) == sorted(names)
    for name, blocks in lists.items():
        expected = []

        def keep(module, given, output, expected=expected):
            expected.append(output[0] if isinstance(output, tuple) else output)

        hook = blocks[-1].register_forward_hook(keep)
        for part in IDS.split(2):
            model(**keywords(model, part), use_cache=False) if model.config.model_type != "bert" else model(part)
        hook.remove()
        inputs = capture_inputs(model, blocks, IDS, 2, progress=False)
        for index, block in enumerate(blocks):
            inputs.advance(index, block)
        expected = expected[:: len(expected) // 3]  # HRM runs its layers several times, of which the first is recorded
        for found, wanted in zip(inputs.hidden, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_t5_passes_its_position_bias_on():
    model, _ = tiny("t5")
    inputs = capture_inputs(model, model.encoder.block, IDS, 2, progress=False)
    first, second = inputs.calls[0][0], inputs.calls[1][0]
    assert not any(isinstance(value, Passed) for value in (*first.args, *first.kwargs.values()))
    assert any(isinstance(value, Passed) for value in (*second.args, *second.kwargs.values()))
    alone = inputs.of_block(0)
    alone.call(model.encoder.block[0], 0)
    assert set(alone.leaving) == {0}
    assert inputs.of_block(1).passed is alone.leaving


def test_a_model_with_one_list():
    model, _ = tiny("modernbert")
    assert list(find_block_lists(model)) == [find_blocks(model)[0]]


def test_given_inputs():
    calls = [{"input_features": torch.zeros(2, 3, 4), "decoder_input_ids": torch.zeros(2, 5).long()} for _ in range(4)]
    assert are_calls(calls)
    assert not are_calls([{"input_ids": torch.zeros(2, 3), "attention_mask": torch.ones(2, 3)}])
    assert not are_calls([{"text": "a"}])
    assert not are_calls("self")
    given = GivenInputs(calls, most=5)
    assert (len(given), *counts(given)) == (3, 6, 30)
    assert split(given, 100) == calls[:3]
    assert [len(part) for part in split(IDS, 2)] == [2, 2, 1]
    assert counts(IDS) == (5, 60)
    with pytest.raises(ValueError, match=r"dataset\[1\] must be a dictionary of the model's arguments"):
        GivenInputs([calls[0], {"pixel_values": 3}], most=9)
