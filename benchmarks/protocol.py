"""The text of every quality figure: articles, tokens and windows.

Everything comes from the test data inside the `gensim` package, so that no figure needs the network: 105 articles of
Wikipedia (a shortened dump) and a news corpus (Lee). The first 80 % of the articles are for calibration; the rest, and
the news, are for evaluation. Only the calibration windows are shuffled, always in the same way.
"""

from __future__ import annotations

import bz2
import re
from dataclasses import dataclass
from pathlib import Path

import torch

SEQUENCE_LENGTH = 512
CALIBRATION_WINDOWS = 256
EVALUATION_WINDOWS = 40
CALIBRATION_SHARE = 0.8
SHORTEST_ARTICLE = 500  # characters; the dump's redirects and stubs are shorter

_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = "lee_background.cor"


@dataclass(frozen=True)
class Windows:
    """Token ids (int64), each [number of windows, length]."""

    calibration: torch.Tensor
    evaluation: dict[str, torch.Tensor]  # "wiki", "news"


def _test_data() -> Path:
    import gensim

    return Path(gensim.__file__).parent / "test" / "test_data"


def wikipedia_articles() -> list[str]:
    """Return the articles as plain text, each beginning with its title, in the order of the dump."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    articles = []
    with bz2.open(_test_data() / _WIKIPEDIA) as dump:
        for title, markup, _ in extract_pages(dump, filter_namespaces=("0",)):
            text = filter_wiki(markup).strip()
            if len(text) > SHORTEST_ARTICLE:
                articles.append(f"{title}\n\n{text}")
    # The published figures were made from a file with three line ends between articles. Some articles contain three of
    # their own, so that reading the file back gives more pieces; the 80 % are counted in these pieces.
    return re.split(r"\n{3}(?=[^\n])", "\n\n\n".join(articles))


def news() -> str:
    """Return the news corpus as one text."""
    return (_test_data() / _NEWS).read_text(encoding="utf-8")


def load_windows(
    tokenizer,
    calibration: int = CALIBRATION_WINDOWS,
    evaluation: int = EVALUATION_WINDOWS,
    length: int = SEQUENCE_LENGTH,
) -> Windows:
    """Tokenize the texts and cut them into windows of `length` tokens without special tokens.

    Args:
        tokenizer: a Transformers tokenizer.
        calibration: number of windows drawn (without repetition, seed 0) from all calibration windows.
        evaluation: number of windows taken from the beginning of each evaluation text.
        length: tokens in a window; the rest at a text's end is dropped.
    """

    def windows(text: str) -> torch.Tensor:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        return ids[: len(ids) - len(ids) % length].view(-1, length)

    articles = wikipedia_articles()
    cut = int(len(articles) * CALIBRATION_SHARE)
    pool = windows("\n\n".join(articles[:cut]))
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:calibration]
    return Windows(
        calibration=pool[drawn],
        evaluation={
            "wiki": windows("\n\n".join(articles[cut:]))[:evaluation],
            "news": windows(news())[:evaluation],
        },
    )
