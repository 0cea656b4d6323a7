"""QuipQuantizer apart from loading: registration, messages, what it tells Transformers."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import transformers_quip
from tests.models import save_tiny_model, tiny_model
from transformers_quip import QuipConfig, QuipQuantizer
from transformers_quip.hf import methods
from transformers_quip.quantize.recipe import quantize_model


def test_registered_under_quip():
    assert AUTO_QUANTIZER_MAPPING["quip"] is QuipQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["quip"] is QuipConfig


def test_importing_again_replaces_the_classes():
    importlib.reload(transformers_quip)
    assert AUTO_QUANTIZER_MAPPING["quip"] is QuipQuantizer
    code = (
        "import sys, transformers_quip\n"
        "old = transformers_quip.QuipQuantizer\n"
        "for name in [n for n in sys.modules if n.startswith('transformers_quip')]: del sys.modules[name]\n"
        "import transformers_quip as b, torch\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\n"
        "new = b.QuipQuantizer\n"
        "assert m['quip'] is new is not old\n"
        "assert b.QuipLinear(8, 4)(torch.ones(1, 8)).shape == (1, 4)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_name_that_another_package_took(monkeypatch):
    class Foreign:
        pass

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "quip", Foreign)
    with pytest.raises(ImportError, match="'quip' is taken by .*Foreign"):
        methods.register()


def test_what_it_tells_transformers():
    hooks = QuipQuantizer(QuipConfig(), pre_quantized=False)
    assert hooks.is_serializable() is True
    assert hooks.is_trainable is True
    assert hooks.is_compileable is True
    assert hooks.requires_calibration is False
    assert hooks.update_dtype(torch.float16) == torch.float16
    assert QuipConfig().get_loading_attributes() == {}


@pytest.mark.parametrize(
    "device_map",
    [
        {"model": "cpu", "lm_head": "disk"},
        {"model": 0, "lm_head": "cpu"},
        {"model": "cuda:0", "lm_head": torch.device("cpu")},
    ],
)
def test_calibration_wants_the_model_in_memory(device_map):
    with pytest.raises(ValueError, match="offloads"):
        QuipQuantizer(QuipConfig(), pre_quantized=False).validate_environment(device_map=device_map)
    for fitting in ({"": "cpu"}, {"": 0}, {"model": 0, "lm_head": 1}, "auto", None):
        QuipQuantizer(QuipConfig(), pre_quantized=False).validate_environment(device_map=fitting)
    QuipQuantizer(QuipConfig(dataset=None), pre_quantized=False).validate_environment(device_map=device_map)


@pytest.mark.parametrize(
    "device_map", ["mps", "mps:0", torch.device("mps"), {"": "mps"}, {"model": "cpu", "lm_head": "mps:0"}]
)
@pytest.mark.parametrize("dataset", ["self", None])
def test_mps_loads_but_does_not_quantize(dataset, device_map):
    config = QuipConfig(dataset=dataset)
    with pytest.raises(ValueError, match=r"cannot be quantized on mps.*no float64.*Quantize on the CPU"):
        QuipQuantizer(config, pre_quantized=False).validate_environment(device_map=device_map)
    config.quantized_modules = ["lm_head"]
    QuipQuantizer(config, pre_quantized=True).validate_environment(device_map=device_map)


def test_a_model_on_mps_is_refused_before_it_is_read(tmp_path):
    model = tiny_model("llama")
    model._hf_hook = SimpleNamespace(execution_device="mps:0")  # the device that accelerate gives to a model
    with pytest.raises(ValueError, match="cannot be quantized on mps:0"):
        quantize_model(model, QuipConfig())
    with pytest.raises(ValueError, match="cannot be quantized on mps"):
        transformers_quip.quantize(tmp_path / "no model", tmp_path / "out", device="mps")


def test_size_of_parameters_for_device_map_auto(tmp_path):
    model = tiny_model("llama")
    hooks = QuipQuantizer(QuipConfig(dataset=None), pre_quantized=False)
    hooks._process_model_before_weight_loading(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert 2 / 8 < hooks.param_element_size(model, "model.layers.0.mlp.up_proj.weight", weight) < 3 / 8
    assert hooks.param_element_size(model, "lm_head.weight", model.lm_head.weight) == 4


def test_coverage_and_warnings_are_logged(tmp_path, caplog):
    folder = save_tiny_model("llama", tmp_path)
    config = QuipConfig(dataset=None, modules_to_not_convert=["k_proj", "q_porj"])
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    levels = {record.levelname: record.message for record in caplog.records if record.name.startswith("transformers_quip")}
    assert "LlamaForCausalLM: 12 of 15 linear layers" in levels["INFO"]
    assert "model.layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj (in modules_to_not_convert)" in levels["INFO"]
    assert "No module of LlamaForCausalLM matches 'q_porj'" in caplog.text
    assert "dataset=None at 2 bits" in caplog.text
