"""A codebook that the package does not know, with a stream whose rows differ in length, through everything by its name.

Its grid is that of `scalar3`: the values k − 3.5. The four in the middle are stored in two bits; a weight beyond them, an
outlier, is found by a stream of gaps (as ICQuant, arXiv 2505.00850, stores positions), which makes its two bits mean
another value. So the right answers are known without this encoding.
"""

import copy
import math
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models import tiny_ids
from transformers_quip import QuipConfig, QuipLinear, codebooks
from transformers_quip.checkpoints.inventory import read_folder
from transformers_quip.codebooks import Codebook, Grid
from transformers_quip.evaluation import true_bits_per_weight
from transformers_quip.nn import QuipEmbedding
from transformers_quip.nn.replace import quantized_modules
from transformers_quip.quantize.plan import make_plan

SKIP = 255  # a gap of this many weights without an outlier after it
SHARE = math.erfc(2 / 1.2 / math.sqrt(2))  # of outliers, of Gaussian weights in units of 1 / 1.2


class Outliers(Codebook):
    """`codes`: two bits a weight. `gaps`: uint8, weights before each outlier, row after row. `counts`: gaps of a row."""

    name = "outliers"
    bits = 2 + 8 * round(SHARE, 3)
    block_size = 1
    code_dtype = torch.uint8
    gaussian_scale = 1.2

    def tensors(self, out_features, in_features):
        return {
            "codes": Grid((out_features, math.ceil(in_features / 4)), torch.uint8),
            "counts": Grid((out_features,), torch.int32),
            "gaps": Grid((None,), torch.uint8, expected=round(SHARE * out_features * in_features)),
        }

    def encode(self, x):
        codes = (self.check_vectors(x) + 3.5).round().clamp(0, 7)
        return codes.to(torch.uint8).reshape(x.shape[:-1]), (codes - 3.5).reshape(x.shape)

    def store(self, codes):
        outlier = (codes < 2) | (codes > 5)
        # 0 and 1 stay, 6 and 7 become 2 and 3
        pairs = torch.where(outlier, codes - 4 * (codes > 5), codes - 2)
        pairs = torch.nn.functional.pad(pairs, (0, -codes.shape[1] % 4)).reshape(len(codes), -1, 4)
        gaps, counts = [], []
        for row in outlier.tolist():
            before, found = 0, []
            for is_outlier in row:
                if is_outlier:
                    found.append(before)
                before = 0 if is_outlier else before + 1
                if before == SKIP:
                    found.append(SKIP)
                    before = 0
            gaps += found
            counts.append(len(found))
        return {
            "codes": (pairs << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).sum(-1).to(torch.uint8),
            "counts": torch.tensor(counts, dtype=torch.int32),
            "gaps": torch.tensor(gaps, dtype=torch.uint8),
        }

    def select_rows(self, tensors, rows):
        rows = rows.long()
        counts = tensors["counts"].long()
        begin, wanted = (counts.cumsum(0) - counts)[rows], counts[rows]
        shift = (begin - (wanted.cumsum(0) - wanted)).repeat_interleave(wanted)
        gaps = tensors["gaps"][torch.arange(len(shift)) + shift]
        return {"codes": tensors["codes"][rows], "counts": tensors["counts"][rows], "gaps": gaps}

    def decode(self, tensors, columns, dtype=torch.float32):
        codes, counts, gaps = tensors["codes"], tensors["counts"].long(), tensors["gaps"].int()
        if counts.sum() != len(gaps):
            raise ValueError(f"counts of {int(counts.sum())} gaps, but there are {len(gaps)}")
        pairs = ((codes[..., None] >> torch.tensor([0, 2, 4, 6])) & 3).flatten(1)[:, :columns]
        steps = torch.where(gaps == SKIP, SKIP, gaps + 1).cumsum(0)
        before = torch.cat([steps.new_zeros(1), steps])[counts.cumsum(0) - counts].repeat_interleave(counts)
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        is_outlier = torch.zeros(pairs.shape, dtype=torch.bool)
        is_outlier[rows[gaps != SKIP], (steps - before - 1)[gaps != SKIP]] = True
        return torch.where(is_outlier, pairs + 4 * (pairs > 1), pairs + 2).to(dtype) - 3.5


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(codebooks._CODEBOOKS, "_entries", dict(codebooks._CODEBOOKS._entries))
    codebooks.register("outliers", Outliers)
    yield
    codebooks._get.cache_clear()


def test_the_codebook_itself():
    codes = torch.randint(0, 8, (5, 1500), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes[1:3] = 3  # rows without an outlier: more than 255 weights before the next
    codes[2, 700], codes[4] = 7, 0
    book = codebooks.get("outliers")
    stored = book.store(codes)
    book.check(stored, 5, 1500)
    assert len(set(stored["counts"].tolist())) == 5
    assert torch.equal(book.decode(stored, 1500), codes.float() - 3.5)
    some = torch.tensor([4, 1, 2, 2])
    assert torch.equal(book.decode(book.select_rows(stored, some), 1500), codes[some].float() - 3.5)


OPTIONS = {
    "uncalibrated": {"dataset": None},
    "calibrated": {"dataset": tiny_ids(4, 16, seed=5), "num_samples": 4, "sequence_length": 16, "refinement_sweeps": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_the_whole_way(options, dense, ids, tmp_path):
    config = QuipConfig(codebook="outliers", modules={"embed_tokens": {"codebook": "outliers"}}, **options)
    assert config.bits == Outliers.bits
    original = AutoModelForCausalLM.from_pretrained(dense("llama"))
    plan = make_plan(original, config)
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    modules = quantized_modules(model)
    assert set(plan.names) == set(modules)
    assert {type(module) for module in modules.values()} == {QuipLinear, QuipEmbedding}
    logits = model(ids).logits

    # saved: three tensors of each, of which one has a length of its own
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            shapes |= {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118
    lengths = {name: shapes[f"{name}.gaps"] for name in modules}
    for name, module in modules.items():
        assert {key for key in shapes if key.startswith(f"{name}.")} == {
            f"{name}.{key}" for key in ("codes", "counts", "gaps", "su", "sv")
        }
        assert lengths[name] == [module.gaps.numel()] == [int(module.counts.sum())]
        assert module.counts.unique().numel() > 1
    assert len(set(map(tuple, lengths.values()))) > 1

    # counted: the plan by the expected length, everything else by the real one
    stored = sum(
        m.codes.numel() + 4 * m.counts.numel() + m.gaps.numel() + 4 * (len(m.su) + len(m.sv)) for m in modules.values()
    )
    weights = sum(m.weight.numel() for m in modules.values())
    assert true_bits_per_weight(model) == pytest.approx(8 * stored / weights)
    inventory = read_folder(tmp_path)
    assert inventory.true_bits == pytest.approx(8 * stored / weights)
    linear = inventory.linears[0]
    here = modules[linear.name]
    assert linear.codes_bytes == here.codes.numel() + 4 * here.counts.numel() + here.gaps.numel()
    assert plan.true_bits == pytest.approx(8 * stored / weights, abs=0.25)

    # loaded, run, in another dtype, dequantized
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.quantization_config.codebook == "outliers"
    assert torch.equal(reloaded(ids).logits, logits)
    halved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(halved.model.layers[1].mlp.up_proj.gaps, reloaded.model.layers[1].mlp.up_proj.gaps)
    for name, module in quantized_modules(reloaded).items():
        weight = original.get_submodule(name).weight
        lost = ((module.dequantize() - weight).square().sum() / weight.square().sum()).item()
        assert lost < (0.08 if options["dataset"] is None else 0.5), name  # 3 bits: 0.034 and a little of a Gaussian
    torch.testing.assert_close(reloaded.dequantize()(ids).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.fixture
def module():
    """A linear and its dense weight, by the grid's definition."""
    codes = torch.randint(0, 8, (12, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    linear = QuipLinear(64, 12, False, codebook="outliers", incoherence="none")
    assert linear.gaps.shape == (0,)
    linear.load_state_dict({**Outliers().store(codes), "su": torch.ones(64), "sv": torch.ones(12)})
    return linear, codes.float() - 3.5


def test_a_module_computes_and_travels(module):
    linear, weight = module
    x = torch.randn(3, 64)
    expected = x @ weight.T
    torch.testing.assert_close(linear(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected)
        assert linear._prepared is None  # no compiled kernel knows it
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        torch.testing.assert_close(other(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), expected)
    x.requires_grad_()
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 64))
    torch.library.opcheck(torch.ops.quip.linear.default, (x, *linear.layer()))


def test_another_length_is_loaded_in_its_place(module):
    linear, _ = module
    codes = torch.full((12, 64), 3, dtype=torch.uint8)
    linear.load_state_dict({**Outliers().store(codes), "su": torch.ones(64), "sv": torch.ones(12)})
    assert linear.gaps.shape == (0,)
    assert (linear.dequantize() == -0.5).all()


@torch.no_grad()
def test_damaged_files_are_refused(dense, ids, tmp_path):
    config = QuipConfig(codebook="outliers", dataset=None)
    AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config).save_pretrained(tmp_path)
    file, key = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.gaps"
    whole = load_file(file)
    for wrong, said in (
        (None, f"{key} is missing"),
        (whole[key].to(torch.int16), f"{key} has type I16 instead of U8"),
        (whole[key][:, None], rf"{key} has shape \[\d+, 1\]"),
    ):
        save_file({k: v for k, v in {**whole, key: wrong}.items() if v is not None}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=said):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file({**whole, key: whole[key][1:].contiguous()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="gaps, but there are"):  # the codebook's own check
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids)
