"""Names of modules in short form, and names that must not be expanded."""

import time

import pytest

from transformers_quip.checkpoints.names import MOST, compress_names, expand_names


@pytest.mark.parametrize(
    ("names", "short"),
    [
        ([], []),
        (["fc"], ["fc"]),
        (["layers.0.fc", "layers.1.fc", "layers.2.fc"], ["layers.{0-2}.fc"]),
        (["layers.0.fc", "layers.2.fc", "layers.3.fc", "layers.10.fc"], ["layers.{0,2-3,10}.fc"]),
        (["layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b", "head"], ["layers.{0-1}.a", "layers.{0-1}.b", "head"]),
        (["l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w", "l.1.e.1.w"], ["l.{0-1}.e.{0-1}.w"]),
        (["l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w"], ["l.{0-1}.e.0.w", "l.0.e.1.w"]),
        (["0", "1", "fc1", "fc2"], ["{0-1}", "fc1", "fc2"]),
        (["layers.7.fc"], ["layers.7.fc"]),
    ],
)
def test_names_in_short_form(names, short):
    assert compress_names(names) == short
    assert sorted(expand_names(short)) == sorted(names)


@pytest.mark.parametrize(
    "names",
    [
        ["{0-99999999999}"],
        ["l.{0-999}.{0-999}.{0-999}"],
        ["{0-9}." * 12 + "fc"],
        ["{0-999999}", "fc"],
        [f"l.{{0-9999}}.{number}" for number in range(101)],
        ["{" + ",".join(["0-99999"] * 11) + "}"],
        ["l.{" + "9" * 5000 + "}"],
        ["l.{0-" + "9" * 5000 + "}.fc"],
        ["l.{3-1}.fc"],
    ],
)
def test_more_names_than_a_model_has(names):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"mean more than 1,000,000 modules|is not a range of numbers of modules") as error:
        expand_names(names)  # before the first name is asked for
    assert time.process_time() - start < 1
    assert len(str(error.value)) < 300


def test_as_many_names_as_there_may_be():
    assert sum(1 for _ in expand_names([f"{{0-{MOST - 1}}}"])) == MOST
    literal = ["a{0-3}.b", "{}", "{x}", "{1-}", ""]
    assert list(expand_names(literal)) == literal
