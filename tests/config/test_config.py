"""QuipConfig: defaults, checks of every option, and the JSON round trip."""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from transformers.quantizers.auto import AutoQuantizationConfig

from transformers_quip import QuipConfig, codebooks
from transformers_quip.config import OPTIONS
from transformers_quip.config.bits import mixed_bits
from transformers_quip.config.typed import TypedOptions


class Table:
    """Stands for a datasets.Dataset."""

    column_names = ("text",)

    def __len__(self):
        return 7

    def __getitem__(self, index):
        raise AssertionError("the config has no business with the rows")


def test_defaults():
    config = QuipConfig()
    documented = {
        "bits": 2,
        "codebook": "e8p",
        "incoherence": "hadamard",
        "rescale": True,
        "rounding": "ldlq",
        "dataset": "self",
        "tokenizer": None,
        "text_column": "text",
        "num_samples": 256,
        "sequence_length": 512,
        "batch_size": 8,
        "damping": 0.01,
        "refinement_sweeps": None,
        "scale": "auto",
        "modules_to_not_convert": None,
        "modules": None,
        "seed": 0,
    }
    assert {name: getattr(config, name) for name in documented} == documented
    assert config.quant_method == "quip"
    assert config.is_calibrated
    assert not QuipConfig(dataset=None).is_calibrated


def test_every_option_is_a_documented_keyword():
    parameters = inspect.signature(QuipConfig).parameters
    assert list(parameters) == list(OPTIONS)
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        name: option.default for name, option in OPTIONS.items()
    }
    assert all(f"{name} (default" in QuipConfig.__doc__ for name in OPTIONS)
    with pytest.raises(TypeError):
        QuipConfig(2)


def test_every_option_is_an_attribute_with_the_type_of_its_keyword():
    """As type checkers see them; a keyword may be any sequence where the attribute is a list."""
    # as they are written: Python 3.10's get_type_hints adds None to the type of a keyword whose default is None
    attributes, keywords = TypedOptions.__annotations__, dict(TypedOptions.__init__.__annotations__)
    assert list(attributes) == list(OPTIONS)
    assert keywords.pop("return") == "None"
    assert {name: kind.replace("Sequence", "list") for name, kind in keywords.items()} == attributes


def test_codebook_chooses_the_bits_and_bits_the_codebook():
    assert QuipConfig(bits=2).codebook == "e8p"
    assert QuipConfig(codebook="e8p").bits == 2
    assert QuipConfig(bits=2.0).bits == 2
    assert isinstance(QuipConfig(bits=2.0).bits, int)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 1.5}, ["bits=1.5", "must be one of", "between 2 and 4"]),
        ({"bits": 4.5}, ["bits=4.5", "must be one of", "2, 3, 4"]),
        ({"bits": float("nan")}, ["bits=nan", "must be a number of bits"]),
        ({"bits": 2.5, "codebook": "e8p"}, ["bits=2.5", "codebook='e8p'", "contradict"]),
        ({"bits": 2.5, "dataset": None}, ["bits=2.5", "dataset=None", "'self'"]),
        ({"bits": 2.5, "rounding": "stochastic", "modules": {"fc": {"codebook": "nope"}}}, ["'fc'", "codebook='nope'"]),
        ({"bits": True}, ["bits=True", "must be a number of bits"]),
        ({"bits": "2"}, ["bits='2'"]),
        ({"bits": 5}, ["bits=5", "must be one of 2, 3, 4, 8", "'trellis' has codebooks of more bits"]),
        ({"bits": 9, "codebook": "trellis"}, ["bits=9", "1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8", "between 1 and 8"]),
        ({"bits": 3, "codebook": "trellis:mul1:k2:exl3"}, ["bits=3", "which has 2 bits", "'scalar3', 'trellis'"]),
        ({"codebook": "trelis"}, ["codebook='trelis'", "did you mean 'trellis'"]),
        ({"bits": 2.5, "modules": {"fc": {"codebook": "trellis"}}}, ["'fc'", "needs a number of bits here"]),
        ({"bits": None}, ["bits=None"]),
        ({"codebook": "e8q"}, ["codebook='e8q'", "'e8p'", "did you mean 'e8p'"]),
        ({"codebook": 8}, ["codebook=8", "'e8p'"]),
        ({"incoherence": "hadamar"}, ["incoherence='hadamar'", "'none'", "did you mean 'hadamard'"]),
        ({"incoherence": None}, ["incoherence=None", "'hadamard'"]),
        ({"incoherence": "hadamard-1"}, ["incoherence='hadamard-1'", "'hadamard-N' for blocks of N numbers"]),
        ({"rounding": "gptq"}, ["rounding='gptq'", "'ldlq'", "'nearest'"]),
        ({"dataset": ""}, ["dataset=''", "'self'"]),
        ({"dataset": []}, ["dataset=[]", "empty"]),
        ({"dataset": torch.zeros(0, 4)}, ["dataset=<Tensor of shape (0, 4)>", "empty"]),
        ({"dataset": 3}, ["dataset=3", "'self'"]),
        ({"dataset": {"a": 1}}, ["dataset={'a': 1}"]),
        ({"tokenizer": 3}, ["tokenizer=3"]),
        ({"text_column": None}, ["text_column=None", "string"]),
        ({"num_samples": 0}, ["num_samples=0", "at least 1"]),
        ({"num_samples": 1.5}, ["num_samples=1.5", "integer"]),
        ({"num_samples": True}, ["num_samples=True", "integer"]),
        ({"sequence_length": -1}, ["sequence_length=-1", "at least 1"]),
        ({"batch_size": "8"}, ["batch_size='8'", "integer"]),
        ({"damping": 0}, ["damping=0", "above 0"]),
        ({"damping": float("nan")}, ["damping=nan", "above 0"]),
        ({"damping": False}, ["damping=False"]),
        ({"refinement_sweeps": -1}, ["refinement_sweeps=-1", "at least 0"]),
        ({"scale": "best"}, ["scale='best'", "'auto'"]),
        ({"scale": -0.9}, ["scale=-0.9", "'auto'"]),
        ({"scale": True}, ["scale=True", "'auto'"]),
        ({"modules_to_not_convert": "lm_head"}, ["modules_to_not_convert='lm_head'", "list"]),
        ({"modules_to_not_convert": [1]}, ["modules_to_not_convert=[1]", "list"]),
        ({"modules": []}, ["modules=[]", "dict"]),
        ({"modules": {"mlp": {"seed": 4}}}, ["modules=", "'mlp'", "'seed'", "'codebook'"]),
        ({"modules": {"mlp": {"rounding": "gptq"}}}, ["modules=", "'mlp'", "rounding='gptq'", "'ldlq'"]),
        ({"modules": {"mlp": 4}}, ["modules=", "'mlp': 4", "dict"]),
        ({"modules": {"": {"bits": 2}}}, ["modules=", "pattern"]),
        ({"incoherence": ["hadamard"]}, ["incoherence=['hadamard']", "pair"]),
        ({"incoherence": ["hadamard", "dct"]}, ["incoherence=", "'none'"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"seed": 2**63}, ["seed="]),
        ({"bit": 2}, ["no option 'bit'", "given 2", "num_samples", "did you mean 'bits'"]),
        ({"quantized_modules": ["a"]}, ["no option 'quantized_modules'"]),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_what_is_allowed(options, said):
    with pytest.raises(ValueError) as error:
        QuipConfig(**options)
    for text in said:
        assert text in str(error.value)


def test_bits_and_codebook_that_contradict_each_other(monkeypatch):
    book = copy.copy(codebooks.get("e8p"))
    book.name, book.bits = "wide", 4
    monkeypatch.setitem(codebooks._CODEBOOKS._entries, "wide", lambda: book)
    assert QuipConfig(codebook="wide").bits == 4
    with pytest.raises(ValueError, match=r"bits=2 and codebook='wide', which has 4 bits.*'e8p'"):
        QuipConfig(bits=2, codebook="wide")


@pytest.mark.parametrize(
    ("dataset", "stored"),
    [
        (None, None),
        ("self", "self"),
        ("wikitext2", "wikitext2"),
        (["one", "two"], "2 texts given by the caller"),
        (["one"], "1 text given by the caller"),
        ([[1, 2], [3]], "2 token sequences given by the caller"),
        ([1, 2, 3], "1 token sequence given by the caller"),
        (torch.zeros(5, 9, dtype=torch.long), "5 token sequences given by the caller"),
        (np.zeros((3, 2), dtype=np.int64), "3 token sequences given by the caller"),
        (Table(), "7 data set rows given by the caller"),
    ],
)
def test_data_is_stored_as_a_description(dataset, stored):
    config = QuipConfig(dataset=dataset, tokenizer=len)
    saved = json.loads(config.to_json_string())
    assert saved["dataset"] == stored
    assert saved["tokenizer"] is None
    assert config.dataset is dataset
    assert QuipConfig.from_dict(saved).dataset == stored


def test_json_round_trip_is_exact():
    config = QuipConfig(
        num_samples=3,
        damping=0.02,
        scale=0.9,
        modules_to_not_convert=["fc1", r"layers\.0\..*"],
        tokenizer="some/folder",
        seed=2**62,
    )
    config.calibration = {"dataset": "self", "tokens": 48}
    config.quantized_modules = ["model.layers.{0-3}.fc"]
    saved = json.loads(json.dumps(config.to_dict()))
    assert saved["quant_method"] == "quip"
    assert saved["format_version"] == 1
    loaded = AutoQuantizationConfig.from_dict(saved)
    assert isinstance(loaded, QuipConfig)
    assert loaded.to_dict() == saved
    assert loaded == config
    assert loaded != QuipConfig()
    assert dict(loaded) == saved
    assert loaded.get("bits") == 2
    assert loaded.get("nothing") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, ["format_version=2", "version 1", "newer transformers-quip"]),
        ({"format_version": None}, ["format_version=None", "version 1"]),
        ({"format_version": "1"}, ["format_version='1'"]),
        ({"codebook": "trellis9"}, ["codebook='trellis9'", "'e8p'", "newer transformers-quip"]),
        ({"incoherence": "fourier"}, ["incoherence='fourier'", "'hadamard'", "newer transformers-quip"]),
        ({"group_size": 128}, ["'group_size'", "does not have", "newer transformers-quip"]),
        ({"modules": {"mlp": {"group_size": 4}}}, ["modules=", "newer transformers-quip"]),
        ({"calibration": "self"}, ["calibration='self'", "dict"]),
        ({"quantized_modules": "all"}, ["quantized_modules='all'", "list"]),
        ({"quant_method": "gptq"}, ["quant_method='gptq'"]),
    ],
)
def test_a_saved_config_that_is_not_understood_is_an_error(change, said):
    with pytest.raises(ValueError) as error:
        QuipConfig.from_dict({**QuipConfig().to_dict(), **change})
    for text in said:
        assert text in str(error.value)


def test_a_saved_config_without_format_version_is_an_error():
    saved = QuipConfig().to_dict()
    del saved["format_version"]
    with pytest.raises(ValueError, match="no format_version"):
        QuipConfig.from_dict(saved)


def test_a_dict_of_options_is_a_config():
    config, rest = QuipConfig.from_dict({"quant_method": "quip", "seed": 5}, return_unused_kwargs=True, bits=2, other=1)
    assert config == QuipConfig(seed=5)
    assert rest == {"other": 1}


def test_update_checks_and_changes_all_or_nothing():
    config = QuipConfig()
    assert config.update(seed=3, other=1) == {"other": 1}
    assert config.seed == 3
    with pytest.raises(ValueError, match="batch_size=0"):
        config.update(seed=4, batch_size=0)
    assert config.seed == 3


def test_values_set_later_are_checked_by_validate():
    config = QuipConfig()
    config.num_samples = "many"
    with pytest.raises(ValueError, match="num_samples='many'"):
        config.validate()


def test_copies_share_the_data_but_not_the_records():
    data = torch.zeros(2, 3, dtype=torch.long)
    config = QuipConfig(dataset=data)
    config.calibration = {"tokens": 6}
    copied = copy.deepcopy(config)
    assert copied.dataset is data
    copied.calibration["tokens"] = 7
    assert config.calibration == {"tokens": 6}
    assert config.without_data().dataset == "2 token sequences given by the caller"
    assert config.dataset is data


def test_options_of_single_modules():
    config = QuipConfig(
        modules={
            "*.down_proj": {"damping": 0.1, "rounding": "nearest"},
            "model.layers.0.*": {"incoherence": ("hadamard", "none"), "damping": 0.2},
            "v_proj": {"codebook": "e8p"},
        }
    )
    assert config.for_module("model.layers.1.mlp.up_proj") is config
    down = config.for_module("model.layers.1.mlp.down_proj")
    assert (down.damping, down.rounding, down.incoherence, down.modules) == (0.1, "nearest", "hadamard", None)
    first = config.for_module("model.layers.0.mlp.down_proj")
    assert (first.damping, first.rounding, first.incoherence) == (0.2, "nearest", ["hadamard", "none"])
    assert config.for_module("model.layers.2.self_attn.v_proj").bits == 2
    assert config.for_module("model.layers.2.self_attn.kv_proj") is config
    assert QuipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("method", ["stochastic", "convex"])
def test_methods_of_single_weights_are_refused_for_lattices(method):
    assert QuipConfig(rounding=method, codebook="scalar3").rounding == method
    with pytest.raises(ValueError, match=f"rounding='{method}' does not work with codebook='e8p', only with.*'scalar2'"):
        QuipConfig(rounding=method)
    with pytest.raises(ValueError, match="methods for 'e8p': 'ldlq', .*'nearest', 'yaqa'$"):
        QuipConfig(rounding=method)
    with pytest.raises(ValueError, match=f"'down_proj'.*rounding='{method}' does not work with codebook='e8p'"):
        QuipConfig(modules={"down_proj": {"rounding": method}})


def test_trellis_is_a_codebook_for_every_number_of_bits():
    config = QuipConfig(codebook="trellis")
    assert (config.bits, config.codebook, config.sweeps) == (2, "trellis:mul1:k2:exl3", 0)
    assert QuipConfig(bits=2.5, codebook="trellis").codebook == "trellis:mul1:k2.5:exl3"
    for bits in (1, 1.5, 2, 3, 3.5, 4, 5, 6, 7, 8):
        config = QuipConfig(bits=bits, codebook="trellis", modules={"up_proj": {"bits": 4}, "fc": {"codebook": "e8p"}})
        assert codebooks.get(config.codebook).bits == bits
        assert config == QuipConfig.from_dict(config.to_dict())
        assert config.for_module("a.up_proj").codebook == "trellis:mul1:k4:exl3"  # bits alone keep the family
        assert (config.for_module("a.fc").codebook, config.for_module("a.fc").sweeps) == ("e8p", 10)
    single = QuipConfig(codebook="trellis:hyb-q9v2:k3:qtip", refinement_sweeps=2)
    assert (single.bits, single.sweeps) == (3, 2)
    module = QuipConfig(bits=3, modules={"fc": {"codebook": "trellis"}}).for_module("fc")
    assert module.codebook == "trellis:mul1:k3:exl3"


def test_averages_of_trellis_codes():
    config = QuipConfig(
        bits=5.25, codebook="trellis", modules={"fc": {"bits": 6}, "up_proj": {"bits": 3, "codebook": "trellis"}}
    )
    assert config.is_mixed
    assert config.for_module("mlp.down_proj").is_mixed
    assert config.for_module("fc").codebook == "trellis:mul1:k6:exl3"
    assert config.for_module("up_proj").codebook == "trellis:mul1:k3:exl3"
    assert config == QuipConfig.from_dict(config.to_dict())
    with pytest.raises(ValueError, match="is an average over modules"):
        _ = config.codebook_spec
    assert mixed_bits(5.25, "trellis") == (4, 5, 6, 7)
    assert mixed_bits(2.25, "trellis") == mixed_bits(2.5, None) == (2, 3, 4)
    assert mixed_bits(1.75, "trellis") == (1, 2, 3)


def test_bits_between_those_of_codebooks_are_an_average():
    config = QuipConfig(bits=2.5, modules={"down_proj": {"bits": 4}})
    assert config.is_mixed
    assert config.codebook is None
    assert not config.for_module("layers.0.down_proj").is_mixed
    assert config.for_module("layers.0.down_proj").codebook == QuipConfig(bits=4).codebook
    assert config.for_module("layers.0.up_proj") is config
    assert not QuipConfig(bits=3).is_mixed
    assert QuipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("method", ["convex", "stochastic"])
@pytest.mark.parametrize("dataset", ["self", None])
def test_methods_of_scalar_grids_are_refused_for_a_trellis(method, dataset):
    book = "trellis:mul1:k2:exl3"
    allowed = "only with 'half-integer', 'scalar2', 'scalar3', 'scalar4', 'scalar8'"
    with pytest.raises(ValueError) as caught:
        QuipConfig(codebook=book, rounding=method, dataset=dataset)
    message = str(caught.value)
    assert message.startswith(f"QuipConfig: rounding={method!r} does not work with codebook={book!r}, {allowed}")
    assert message.endswith(
        "methods for 'trellis:mul1:k2:exl3': 'ldlq', 'ldlq-rg', 'greedy', 'quantease', 'nearest', 'yaqa'"
    )
    with pytest.raises(
        ValueError, match=f"modules has 'down_proj'.*rounding='{method}' does not work with codebook='{book}'"
    ):
        QuipConfig(dataset=dataset, modules={"down_proj": {"codebook": book, "rounding": method}})
