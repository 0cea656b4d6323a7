"""Names of modules in short form, and back."""

import pytest

from transformers_quip.checkpoints.names import compress_names, expand_names


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
