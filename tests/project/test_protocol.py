"""The windows of the evaluation protocol are the ones that all published figures were made with."""

from __future__ import annotations

import hashlib

import pytest
import torch

pytest.importorskip("gensim")

import protocol

# sha256 of the ids (little-endian int64) that the original script gives for this stand-in tokenizer
DIGESTS = {
    "calibration": "6bb2d42e0d9afecbbdc47300a3cddf2b4dda1cb8498c39c4787513f2cc223936",
    "wiki": "39a983a86524a40805afac1bde17420ba122aac01b42fb87eb4bfc303d167b41",
    "news": "06cd920d34c5c56eec4408ae19f297827b1c55b677f81f2f103dedf786300fd4",
}


def bytes_as_tokens(text, add_special_tokens):
    assert add_special_tokens is False
    return {"input_ids": list(text.encode())}


@pytest.fixture(scope="module")
def windows():
    return protocol.load_windows(bytes_as_tokens)


def digest(ids):
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def test_windows_are_those_of_the_published_figures(windows):
    assert windows.calibration.shape == (256, 512)
    assert digest(windows.calibration) == DIGESTS["calibration"]
    for name, ids in windows.evaluation.items():
        assert ids.shape == (40, 512)
        assert digest(ids) == DIGESTS[name]


def test_fewer_and_shorter_windows(windows, monkeypatch):
    article = "".join(chr(97 + i % 26) for i in range(1000))
    monkeypatch.setattr(protocol, "wikipedia_articles", lambda: [article] * 10)
    monkeypatch.setattr(protocol, "news", lambda: article)
    found = protocol.load_windows(bytes_as_tokens, calibration=3, evaluation=2, length=100)
    assert found.calibration.shape == (3, 100)
    text = torch.tensor(list("\n\n".join([article] * 8).encode()))
    pool = text[: len(text) // 100 * 100].view(-1, 100)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.calibration, pool[order[:3]])
    assert torch.equal(found.evaluation["news"], text[:200].view(2, 100))
