"""Text the model writes itself: against generate(), and against the model's own probabilities."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import DynamicCache

from tests.models import ARCHITECTURES, VOCABULARY, tiny_ids, tiny_model
from transformers_quip.calibration import write_text
from transformers_quip.calibration.arguments import cache_argument
from transformers_quip.calibration.growing_cache import cache_bytes, growing_cache
from transformers_quip.calibration.synthetic import sample


def write(model, *args, **kwargs):
    return write_text(model, *args, progress=False, **kwargs)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_text_is_what_generate_writes(arch):
    model = tiny_model(arch)
    with torch.no_grad():  # the likeliest token is clearly so: bfloat16 products must not change it
        model.get_output_embeddings().weight.mul_(3)
    text = write(model, 5, 20, start="random", greedy_tokens=20, batch_size=2)
    assert text.shape == (5, 20)
    assert text.dtype == torch.int64
    greedy = model.generate(
        text[:, :1], max_new_tokens=19, do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones(5, 1)
    )
    # a near tie may fall otherwise, and then all that follows; nearly all documents must agree to the end
    assert (text == greedy).all(1).float().mean() >= 0.8


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_text_follows_the_models_distribution(arch):
    """Pearson's chi-squared of the second token, over 4000 documents that start alike."""
    model = tiny_model(arch)
    count = 4000
    text = write(model, count, 2, start="bos", seed=3)
    assert (text[:, 0] == model.config.bos_token_id).all()
    with torch.no_grad():
        probability = model(torch.tensor([[model.config.bos_token_id]])).logits[0, -1].double().softmax(-1)
    likely = probability * count > 5
    observed = torch.bincount(text[:, 1], minlength=VOCABULARY).double()
    observed = torch.cat([observed[likely], observed[~likely].sum()[None]])
    expected = torch.cat([probability[likely], probability[~likely].sum()[None]]) * count
    statistic = ((observed - expected).square() / expected.clamp(min=1)).sum()
    freedom = int(likely.sum())
    assert freedom > 20
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # mean + 5 standard deviations


def test_later_tokens_see_all_before_them():
    """The mean log-likelihood of sampled text is minus the model's mean entropy along it."""
    model = tiny_model("qwen3")
    text = write(model, 200, 24)
    with torch.no_grad():
        logp = model(text).logits[:, :-1].double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    likelihood = logp.gather(-1, text[:, 1:, None]).squeeze(-1)
    excess = likelihood + entropy
    assert abs(excess.mean()) < 5 * excess.std() / excess.numel() ** 0.5


def test_temperature_makes_text_less_or_more_likely():
    model = tiny_model("llama")
    text = write(model, 60, 24, temperature=[0.3, 1.0, 3.0])
    with torch.no_grad():
        logp = model(text).logits[:, :-1].log_softmax(-1).gather(-1, text[:, 1:, None]).mean((1, 2))
    cold, middle, hot = logp[0::3].mean(), logp[1::3].mean(), logp[2::3].mean()
    assert cold > middle + 0.3
    assert middle > hot + 0.3


def test_same_seed_same_text_and_the_global_generator_is_left_alone():
    model = tiny_model("gpt2")
    state = torch.random.get_rng_state()
    one, again, other = write(model, 4, 12, seed=5), write(model, 4, 12, seed=5), write(model, 4, 12, seed=6)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(set(one[:, 0].tolist())) > 1


def test_packed_documents():
    model = tiny_model("llama")
    text = write(model, 3, 20, start="bos", document_length=8)
    assert text.shape == (3, 20)
    assert (text.flatten()[::8] == model.config.bos_token_id).all()
    assert write(model, 2, 6, document_length=50).shape == (2, 6)


def test_model_is_left_as_it_was():
    model = tiny_model("gpt2").train()
    model.transformer.ln_f.eval()
    training = {name: module.training for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generation = model.generation_config.to_dict()
    precision = torch.backends.mkldnn.matmul.fp32_precision
    write(model, 2, 5)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.to_dict() == generation
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_offloaded_model_writes_the_same(caplog):
    model = tiny_model("llama")
    text = write(model, 2, 8)
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(write(model, 2, 8), text)
    assert "this is slow" in caplog.text


def test_bfloat16_model():
    text = write(tiny_model("llama", dtype=torch.bfloat16), 2, 8)
    assert text.shape == (2, 8)
    assert 0 <= int(text.min()) <= int(text.max()) < VOCABULARY


def test_nan_logits_are_an_error():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN or Inf"):
        write(model, 2, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"document_length": 0}, "document_length"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": []}, "temperature"),
        ({"temperature": [1.0, float("nan")]}, "temperature"),
        ({"start": "eos"}, "start must be one of 'random', 'bos'"),
        ({"greedy_tokens": -1}, "greedy_tokens"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        write(tiny_model("llama"), **{"num_samples": 1, "sequence_length": 4, **options})


def test_models_that_cannot_write():
    with pytest.raises(ValueError, match="LlamaModel cannot write its own calibration text"):
        write(tiny_model("llama").model, 1, 4)
    model = tiny_model("llama")
    model.config.bos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match="start='bos' needs a bos_token_id"):
        write(model, 1, 4, start="bos")


def test_sample_inverts_the_distribution():
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log()  # cumulative 0.5, 0.5, 0.75, 1
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.76, 1 - 2**-24])[:, None]
    assert sample(logits.expand(6, 4), uniform).flatten().tolist() == [0, 0, 2, 2, 3, 3]


def test_sample_never_draws_what_has_no_probability():
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 3:500] = 0
    uniform = torch.tensor([[0.0], [1 - 2**-24]])
    assert sample(logits.expand(2, -1), uniform).flatten().tolist() == [3, 499]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_growing_cache_equals_dynamic_cache(arch):
    model, ids = tiny_model(arch), tiny_ids(2, 20)
    caches = growing_cache(model.config, 20), DynamicCache(config=model.config)
    with torch.no_grad():
        for part in ids.split([5, 1, 7, 1, 1, 5], dim=1):
            ours, truth = (model(part, use_cache=True, **{cache_argument(model): cache}).logits for cache in caches)
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    assert caches[0].get_seq_length() == 20


def test_growing_cache_refuses_more_than_its_capacity():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="cannot hold 5"):
        model(tiny_ids(1, 5), use_cache=True, **{cache_argument(model): growing_cache(model.config, 4)})


def test_cache_bytes():
    model = tiny_model("llama")
    cache = growing_cache(model.config, 1)
    model(tiny_ids(1, 1), use_cache=True, **{cache_argument(model): cache})
    # layers * (keys and values) * key/value heads * head size * bytes of a float32, for 10 tokens
    assert cache_bytes(cache, 10) == 2 * 2 * 2 * 16 * 4 * 10


def test_precision_is_put_back_when_a_linear_fails():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("broken")

    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = Broken(64, 96)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="broken"):
        write(model, 1, 4)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
