"""Registration with Transformers: early enough in any order of imports, and without making the import slow."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Every part of Transformers' registry: the two mappings, and the two classes that look methods up.
CHECK = (
    "from transformers.quantizers import auto\n"
    "import transformers_quip\n"
    "for name in ('quip', 'QUiP', 'exl3'):\n"
    "    assert auto.AUTO_QUANTIZER_MAPPING[name] is transformers_quip.QuipQuantizer\n"
    "    assert name in auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
    "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['quip'] is transformers_quip.QuipConfig\n"
    "saved = {'quant_method': 'quip', 'bits': 3}\n"
    "assert auto.AutoHfQuantizer.supports_quant_method(saved)\n"
    "assert auto.AutoQuantizationConfig.from_dict(saved) == transformers_quip.QuipConfig(bits=3)\n"
    "assert type(auto.AutoHfQuantizer.from_config(dict(saved))) is transformers_quip.QuipQuantizer\n"
)
# The code that loads models has what it needs, and nothing shows how that came about.
CHECK_LOADING = (
    "import inspect, sys\n"
    "import transformers.modeling_utils as modeling\n"
    "assert modeling.get_hf_quantizer.__wrapped__ is auto.get_hf_quantizer\n"
    "assert 'def from_pretrained' in inspect.getsource(modeling)\n"
    "for module in (modeling, auto):\n"
    "    for loader in (module.__loader__, module.__spec__.loader):\n"
    "        assert type(loader).__module__ != 'transformers_quip.hf.registration'\n"
    "assert not [f for f in sys.meta_path if type(f).__name__ == 'Waiting']\n"
)


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_import_brings_neither_torch_nor_transformers():
    code = (
        "import sys, transformers_quip\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert {'QuipConfig', 'set_backend', '__version__'} <= set(dir(transformers_quip))\n"
    )
    run(code)


ORDERS = {
    "nothing of transformers": "import transformers_quip",
    "models": "import transformers_quip; from transformers import AutoModelForCausalLM, PreTrainedModel",
    "models before": "import transformers.modeling_utils, transformers_quip",
    "registry": "import transformers_quip, transformers.quantizers.auto",
    "registry before": "import transformers.quantizers.auto, transformers_quip",
    "registry's package": "import transformers_quip; from transformers.quantizers import AutoHfQuantizer",
    "config": "from transformers_quip import QuipConfig; import transformers.quantizers",
    "configs of transformers": "import transformers_quip; from transformers import AutoConfig, BitsAndBytesConfig",
    "loader of weights": "import transformers_quip, transformers.core_model_loading, transformers.conversion_mapping",
    "quantizer": "from transformers_quip import QuipQuantizer",
    "layer": "from transformers_quip import QuipLinear",
    "room": "import transformers_quip.hf.modes",
    "looked for before": (
        "import transformers_quip\n"
        "from importlib.util import find_spec\n"
        "for name in ('transformers', 'transformers.quantizers.auto', 'transformers.modeling_utils') * 2:\n"
        "    assert find_spec(name).loader.is_package(name) == (name == 'transformers')"
    ),
    "trainer": "import transformers_quip; from transformers import Trainer",
    "torch": "import torch, transformers_quip, transformers.integrations",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_registered_in_any_order(imports):
    run(f"{imports}\n{CHECK}{CHECK_LOADING}")


def test_registered_while_models_are_not_imported():
    run(f"import sys, transformers_quip\n{CHECK}assert 'transformers.modeling_utils' not in sys.modules\n")


def test_who_uses_a_public_name_finds_the_method_known():
    run(
        "from transformers_quip import QuipConfig\n"
        "from transformers.quantizers.auto import AutoQuantizationConfig\n"
        "assert AutoQuantizationConfig.from_dict(QuipConfig().to_dict()) == QuipConfig()\n"
    )


def test_an_unknown_name_is_an_attribute_error():
    import transformers_quip

    with pytest.raises(AttributeError, match="has no attribute 'QuipConfg'"):
        transformers_quip.QuipConfg  # noqa: B018


@pytest.mark.slow
def test_every_module_can_be_the_first_to_be_imported():
    """Some import Transformers' code that loads models, which registers, and so imports others before it goes on."""
    run(
        "import importlib, os, pathlib, sys, traceback, torch, transformers, transformers_quip\n"
        "root = pathlib.Path(transformers_quip.__file__).parent\n"
        "paths = [path.relative_to(root.parent).with_suffix('') for path in sorted(root.rglob('*.py'))]\n"
        "names = ['.'.join(path.parts).removesuffix('.__init__') for path in paths if path.name != '__main__']\n"
        "assert 'transformers_quip.hf.foreign' in names\n"
        "for name in names:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except BaseException:\n"
        "            traceback.print_exc()\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, name\n"
    )
