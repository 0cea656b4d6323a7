"""The native format: the check of a checkpoint's tensors."""

import pytest

from transformers_quip import QuipLinear
from transformers_quip.checkpoints import native
from transformers_quip.checkpoints.headers import TensorInfo


def headers(**changes):
    result = {
        "fc.codes": TensorInfo((12, 8), "I16", "a"),
        "fc.su": TensorInfo((64,), "BF16", "a"),
        "fc.sv": TensorInfo((12,), "F32", "a"),
        "fc.bias": TensorInfo((12,), "F16", "a"),
        "norm.weight": TensorInfo((64,), "F32", "a"),
    }
    for name, value in changes.items():
        key = name.replace("_", ".")
        if value is None:
            del result[key]
        else:
            result[key] = TensorInfo(*value, "a")
    return result


def test_a_checkpoint_that_fits():
    native.check_tensors({"fc": QuipLinear(64, 12, device="meta")}, ["other"], headers())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fc_codes": None}, r"fc\.codes is missing"),
        ({"fc_bias": None}, r"fc\.bias is missing"),
        ({"fc_codes": ((12, 7), "I16")}, r"fc\.codes has shape \[12, 7\] instead of \[12, 8\]"),
        ({"fc_su": ((12,), "F32")}, r"fc\.su has shape \[12\] instead of \[64\]"),
        ({"fc_codes": ((12, 8), "I32")}, r"fc\.codes has type I32 instead of I16"),
        ({"fc_sv": ((12,), "F8_E4M3")}, r"fc\.sv has type F8_E4M3 instead of F16 or BF16 or F32 or F64"),
        ({"fc_sv": ((12,), "I16"), "fc_su": None}, r"fc\.su is missing; fc\.sv has type I16"),
        ({"other_codes": ((1, 1), "I16")}, r"other\.codes exists, but config\.json does not list other"),
    ],
)
def test_a_checkpoint_that_does_not_fit(changes, said):
    with pytest.raises(ValueError, match=said) as error:
        native.check_tensors({"fc": QuipLinear(64, 12, device="meta")}, ["other"], headers(**changes))
    assert "download or save the model again" in str(error.value)


def test_many_problems_are_one_short_error():
    linears = {f"fc{i}": QuipLinear(8, 8, device="meta") for i in range(30)}
    with pytest.raises(ValueError, match="and 116 more") as error:
        native.check_tensors(linears, [], {})
    assert len(str(error.value)) < 500


def test_the_source_of_a_quantization_is_checked():
    native.check_sources({"norm": "norm.weight"}, headers())
    with pytest.raises(ValueError, match=r"no fc\.weight to quantize \(1 of 2 .* it has fc\.bias, fc\.codes"):
        native.check_sources({"norm": "norm.weight", "fc": "fc.weight"}, headers())
    with pytest.raises(ValueError, match="nothing of that name"):
        native.check_sources({"absent": "absent.weight"}, headers())
