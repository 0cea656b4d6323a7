"""Block by block must equal the whole model: the truth is what Transformers' own forward computes."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from tests.models import ARCHITECTURES, HIDDEN, tiny_ids, tiny_model
from transformers_quip.calibration import capture_inputs, find_blocks, linear_names

BLOCKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}


def block_outputs(model, blocks, ids):
    """The hidden states that leave each block in the model's own forward pass."""
    outputs = []

    def record(module, args, output):
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    hooks = [block.register_forward_hook(record) for block in blocks]
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, logits


def assert_replay_equals_forward(model, ids, batch_size):
    _, blocks = find_blocks(model)
    inputs = capture_inputs(model, blocks, ids, batch_size, progress=False)
    assert inputs.num_blocks == len(blocks)
    assert inputs.num_batches == -(-len(ids) // batch_size)
    truth = [block_outputs(model, blocks, batch)[0] for batch in ids.split(batch_size)]
    for index, block in enumerate(blocks):
        inputs.advance(index, block)
        for hidden, outputs in zip(inputs.hidden, truth, strict=True):
            torch.testing.assert_close(hidden, outputs[index], rtol=1e-5, atol=1e-5)
    return inputs


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_replay_equals_the_models_forward(arch):
    # 5 sequences in batches of 2: the last batch is smaller
    assert_replay_equals_forward(tiny_model(arch), tiny_ids(samples=5, length=24), batch_size=2)


@pytest.mark.parametrize("model_type", ["bloom", "falcon"])
def test_blocks_that_return_tuples(model_type):
    fields = {
        "vocab_size": 128,
        "hidden_size": 32,
        "n_head": 4,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "n_layer": 3,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    assert_replay_equals_forward(model, tiny_ids(samples=3), batch_size=2)


def test_hybrid_model_with_several_block_classes():
    config = AutoConfig.for_model(
        "jamba", vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=2, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    _, blocks = find_blocks(model)
    assert len({type(block) for block in blocks}) == 2
    assert_replay_equals_forward(model, tiny_ids(samples=2), batch_size=2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_find_blocks_by_structure(arch):
    model = tiny_model(arch)
    name, blocks = find_blocks(model)
    assert name == BLOCKS.get(arch, "model.layers")
    assert blocks is model.get_submodule(name)


def test_gemma3_blocks_keep_their_own_masks_and_tables():
    model = tiny_model("gemma3")
    _, blocks = find_blocks(model)
    calls = capture_inputs(model, blocks, tiny_ids(4, 24), 2, progress=False).calls
    local, full = calls[0][0].kwargs, calls[1][0].kwargs
    assert not torch.equal(local["position_embeddings"][0], full["position_embeddings"][0])
    # the sliding window of 8 forbids what full attention allows
    assert local["attention_mask"] is not None
    # both batches have one shape: their tensors are stored once
    assert calls[0][0].kwargs["attention_mask"] is calls[0][1].kwargs["attention_mask"]
    assert calls[1][0].kwargs["position_embeddings"][1] is calls[1][1].kwargs["position_embeddings"][1]


def test_text_decoder_of_a_multimodal_model_wins_over_a_longer_vision_tower():
    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, image_token_index=127)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    name, blocks = find_blocks(model)
    assert "language_model" in name
    assert len(blocks) == 2
    assert_replay_equals_forward(model, tiny_ids(samples=2, length=24).clamp(max=120), batch_size=2)


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.groups = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(7))

    def forward(self, hidden_states, scale=1.0):
        return hidden_states + scale * self.gate(hidden_states)


class ToyModel(nn.Module):
    """Embedding, blocks called in a chosen way, several heads."""

    def __init__(self, between=lambda h: h, order=(0, 1, 2)):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 16) for _ in range(9))
        self.stack = nn.ModuleList(ToyBlock() for _ in range(3))
        self.between, self.order = between, order

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for index in self.order:
            hidden = self.between(self.stack[index](hidden_states=hidden, scale=0.5 + index))
        return self.heads[0](hidden)


def test_nested_experts_and_lists_of_heads_are_not_blocks():
    assert find_blocks(ToyModel())[0] == "stack"


def test_hidden_states_passed_by_keyword():
    model = ToyModel()
    ids = torch.randint(16, (3, 5))
    inputs = capture_inputs(model, model.stack, ids, 2, progress=False)
    for index, block in enumerate(model.stack):
        inputs.advance(index, block)
    with torch.no_grad():
        torch.testing.assert_close(model.heads[0](torch.cat(inputs.hidden)), model(ids))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ToyModel(between=lambda h: 2 * h), "changes the hidden states between"),
        (ToyModel(order=(0, 1)), "calls only 2 of 3 blocks"),
        (ToyModel(order=(0, 2, 1)), "Block 2 is called where block 1 is expected"),
        (ToyModel(order=(0, 0, 1, 2)), "Block 0 is called where block 1 is expected"),
    ],
    ids=["changed", "skipped", "out of order", "repeated"],
)
def test_models_that_cannot_go_block_by_block(model, message):
    with pytest.raises(ValueError, match=message):
        capture_inputs(model, model.stack, torch.randint(16, (2, 5)), 2, progress=False)
    assert all("forward" not in block.__dict__ for block in model.stack)


def test_models_without_decoder_blocks():
    with pytest.raises(ValueError, match="No decoder blocks found in Sequential"):
        find_blocks(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    config = AutoConfig.for_model("t5", vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_blocks(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize(
    ("ids", "batch_size"),
    [(torch.empty(0, 5, dtype=torch.long), 2), (torch.ones(5).long(), 2), (torch.ones(2, 5).long(), 0)],
)
def test_capture_refuses_impossible_arguments(ids, batch_size):
    model = ToyModel()
    with pytest.raises(ValueError, match=r"token_ids|batch_size"):
        capture_inputs(model, model.stack, ids, batch_size, progress=False)


def test_capture_leaves_the_model_as_it_was():
    model = tiny_model("gpt2")
    model.train()
    model.transformer.ln_f.eval()
    _, blocks = find_blocks(model)
    before = {name: module.training for name, module in model.named_modules()}
    capture_inputs(model, blocks, tiny_ids(), 2, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all("forward" not in block.__dict__ for block in blocks)


def test_dropout_is_off_during_capture_and_replay():
    model = tiny_model("gpt2").train()  # GPT-2 has dropout 0.1 on embeddings, attention and residuals
    _, blocks = find_blocks(model)
    inputs = capture_inputs(model, blocks, tiny_ids(), 2, progress=False)
    for index, block in enumerate(blocks):
        inputs.advance(index, block)
    truth, _ = block_outputs(model.eval(), blocks, tiny_ids())
    torch.testing.assert_close(inputs.hidden[0], truth[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_offloaded_models(arch):
    accelerate = pytest.importorskip("accelerate")
    ids = tiny_ids(samples=3, length=20)
    model = tiny_model(arch)
    _, blocks = find_blocks(model)
    truth, _ = block_outputs(model, blocks, ids)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert {parameter.device.type for parameter in blocks.parameters()} == {"meta"}
    hooked = [block.__dict__.get("forward") for block in blocks]

    inputs = capture_inputs(model, blocks, ids, 3, progress=False)
    for index, block in enumerate(blocks):
        inputs.advance(index, block)
    torch.testing.assert_close(inputs.hidden[0], truth[-1], rtol=1e-5, atol=1e-5)
    assert [block.__dict__.get("forward") for block in blocks] == hooked


def test_hidden_states_keep_the_models_dtype():
    model = tiny_model("llama", dtype=torch.bfloat16)
    _, blocks = find_blocks(model)
    inputs = capture_inputs(model, blocks, tiny_ids(2, 16), 1, progress=False)
    inputs.advance(0, blocks[0])
    assert [(h.dtype, tuple(h.shape)) for h in inputs.hidden] == [(torch.bfloat16, (1, 16, HIDDEN))] * 2


def test_linear_names():
    _, blocks = find_blocks(tiny_model("gpt2"))
    assert linear_names(blocks[0]) == ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    _, blocks = find_blocks(tiny_model("phi3"))
    assert set(linear_names(blocks[0])) == {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }
