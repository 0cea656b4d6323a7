"""The model card: what it says, and whose text is left alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoModelForCausalLM

from transformers_quip.hub import claims, model_card
from transformers_quip.hub.model_card import make_card, write_card
from transformers_quip.hub.origin import describe, find_repo_id


@pytest.fixture
def folder(quantized, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    return copy


def test_saving_writes_it(quantized, dense):
    card = ModelCard.load(Path(quantized) / "README.md")
    assert card.data.library_name == "transformers"
    assert {"quip", "2-bit"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # a folder is not an id on the Hub
    code = card.text.partition("```python\n")[2].partition("```")[0].splitlines()
    assert code[0] == "import transformers_quip"
    assert len(code) == 3
    name = Path(dense).name
    assert f'AutoModelForCausalLM.from_pretrained("{name}", quantization_config=config)' in card.text
    assert dense not in str(card)
    assert "QuipConfig(bits=2, dataset=None)" in card.text
    # on paper: 2 bits, and 32 bits for every input and output feature, over all linears of a block
    linears = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    bits = 2 + 32 * sum(m + n for m, n in linears) / sum(m * n for m, n in linears)
    assert f"{bits:.3f} counting all stored tensors" in card.text
    weights = sum(m * n for m, n in linears) * 2
    rest = 2 * 128 * 64 + 5 * 64  # embeddings, head, norms
    assert f"{weights / (weights + rest):.1%} of {weights + rest:,} parameters" in card.text
    assert f"{4 * (weights + rest) / 1e3:.2f} kB before" in card.text


def test_metadata_with_a_base_model_and_measured_perplexities(folder):
    results = [{"dataset": "wiki", "perplexity": 46.7, "dense_perplexity": 17.8, "protocol": "40 windows of 512 tokens"}]
    (folder / model_card.EVALUATION).write_text(json.dumps({"results": results}))
    card = make_card(folder, repo_id="me/model-2bit", base_model="org/model")
    data = card.data.to_dict()
    assert data["base_model"] == "org/model"
    assert data["base_model_relation"] == "quantized"
    assert data["quantized_by"] == "me"
    (name, (result,)) = model_index_to_eval_results(data["model-index"])
    assert name == "model, 2 bits per weight"
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 46.7, "wiki")
    assert "| wiki | 46.7 | 17.8 | 40 windows of 512 tokens |" in card.text
    assert ModelCard(str(card)).data.to_dict() == data


def test_bits_on_the_average(folder):
    config = json.loads((folder / "config.json").read_text())
    options = {"bits": 2.5, "codebook": None, "modules": {"q_proj": {"bits": 3}}, "dataset": "self"}
    config["quantization_config"].update(options)
    (folder / "config.json").write_text(json.dumps(config))
    card = make_card(folder)
    assert "codebook by module" in card.text
    assert "QuipConfig(bits=2.5)" in card.text
    assert "2.5-bit" in card.data.tags


def test_a_converted_model_says_so(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["origin"] = None
    (folder / "config.json").write_text(json.dumps(config))
    text = make_card(folder).text
    assert "Converted from a checkpoint of another format" in text
    assert "| calibration | not known |" in text
    assert "QuipConfig(" not in text


def test_our_own_card_is_refreshed_and_an_edited_one_is_not(folder):
    path = folder / "README.md"
    first = path.read_text()
    assert write_card(folder, repo_id="me/model")
    assert path.read_text() != first
    assert write_card(folder)
    assert path.read_text().partition("\n# ")[2] == first.partition("\n# ")[2]
    edited = path.read_text().replace("## Limits", "## Limits\n\nIt cannot count.")
    path.write_text(edited)
    assert not write_card(folder)
    assert path.read_text() == edited
    assert write_card(folder, overwrite=True)
    assert "It cannot count" not in path.read_text()


@pytest.mark.parametrize(
    "text",
    [
        b"# Mine\n",
        b"---\nlicense: mit\n---\n# Mine\n",
        b"no heading",
        b"---\nlicense: [mit\n---\n",  # no YAML
        b"---\n- mit\n---\n",  # no mapping
        "---\nlicense: mit\n---\nGrüße".encode("latin-1"),
    ],
)
def test_a_user_s_own_text_is_left_alone(folder, text):
    (folder / "README.md").write_bytes(text)
    assert not write_card(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_bytes() == text
    assert write_card(folder, overwrite=True)
    assert b"import transformers_quip" in (folder / "README.md").read_bytes()


def test_a_link_is_not_written_through(folder, tmp_path):
    """In the client's cache README.md is a link to a file that other revisions share."""
    shared = tmp_path / "blob"
    shared.write_bytes((folder / "README.md").read_bytes())
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(shared)
    before = shared.read_bytes()
    assert write_card(folder, repo_id="me/model")
    assert shared.read_bytes() == before
    assert "me/model" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (model_card.EVALUATION, "{", "quip_evaluation.json is not JSON"),
        (model_card.EVALUATION, '{"results": [{"perplexity": 3}]}', "quip_evaluation.json has no list of results"),
        (
            model_card.EVALUATION,
            '{"results": [{"dataset": "wiki", "protocol": "p", "perplexity": "low"}]}',
            "perplexity .a number.",
        ),
        ("README.md/text.md", "", "README.md"),
    ],
)
def test_saving_survives_a_folder_without_a_card(quantized, tmp_path, caplog, name, content, message):
    """The weights come first: what keeps the card from being written is one warning, and everything loads."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    model = AutoModelForCausalLM.from_pretrained(quantized)
    with caplog.at_level("WARNING", "transformers_quip"):
        model.save_pretrained(tmp_path)
    (warning,) = [record.getMessage() for record in caplog.records if "no model card" in record.getMessage()]
    assert re.search(message, warning)
    assert not (tmp_path / "README.md").is_file()
    assert (tmp_path / "model.safetensors").stat().st_size > 0


def test_an_error_of_our_own_is_not_swallowed(folder, monkeypatch):
    monkeypatch.setattr(model_card, "make_card", lambda *_, **__: {}["no such key"])
    with pytest.raises(KeyError):
        model_card.try_to_write_card(folder)


def test_a_perplexity_that_is_no_number_in_json(folder):
    """A model that is broken has an infinite one: it stands in the text, and not in the metadata."""
    result = {"dataset": "wiki", "perplexity": float("inf"), "protocol": "p"}
    (folder / model_card.EVALUATION).write_text(json.dumps({"results": [result]}))
    card = make_card(folder)
    assert "| wiki | inf |" in card.text
    assert "model-index" not in card.data.to_dict()


def test_transformers_form_is_replaced_only_while_it_is_empty(folder):
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
        "This model card has been automatically generated."
    )
    form = str(ModelCard.from_template(ModelCardData(tags=["mine"], license="mit"), model_description=description))
    (folder / "README.md").write_text(form.replace("## Uses", "## Uses\n\nFor poems."))
    assert not write_card(folder)
    (folder / "README.md").write_text(form)
    assert write_card(folder)
    data = ModelCard.load(folder / "README.md").data
    assert data.license == "mit"
    assert {"mine", "quip"} <= set(data.tags)


def test_no_card_for_another_folder(dense, folder):
    with pytest.raises(ValueError, match="not hold a model that was quantized by transformers-quip"):
        make_card(dense)


def test_origin(tmp_path):
    cached = tmp_path / "models--org--name" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert find_repo_id(str(cached)) == "org/name"
    assert find_repo_id("org/name") == "org/name"
    assert find_repo_id("gpt2") == "gpt2"
    assert find_repo_id(str(tmp_path)) is None
    assert find_repo_id("") is None
    assert find_repo_id("a/b/c") is None
    assert describe(str(tmp_path))["folder"] == tmp_path.name
    assert set(describe("org/name")) == {"base_model", "versions"}


@pytest.mark.parametrize("edit", [None, "\nMy own words.\n"])
def test_a_dense_model_saved_over_our_card(quantized, tmp_path, edit, caplog):
    """The card says 2 bits, and the weights beside it are dense now: ours goes, somebody's own text stays."""
    model = AutoModelForCausalLM.from_pretrained(quantized)
    model.save_pretrained(tmp_path)
    card = tmp_path / model_card.CARD
    assert "2 bits per weight" in card.read_text()
    if edit:
        card.write_text(card.read_text() + edit)
    model.dequantize().save_pretrained(tmp_path)
    assert card.exists() == bool(edit)
    assert ("not quantized now" in caplog.text) == bool(edit)
    AutoModelForCausalLM.from_pretrained(quantized).save_pretrained(tmp_path)
    assert card.exists()


@pytest.mark.parametrize("text", ["# Mine\n", "", "\xff", "---\nlicense: mit\n---\nhello\n"])
def test_a_dense_model_saved_over_another_card(dense, tmp_path, text):
    (tmp_path / model_card.CARD).write_bytes(text.encode("latin-1"))
    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(tmp_path)
    assert (tmp_path / model_card.CARD).read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize(
    "metadata",
    [
        "model-index: 5",
        "model-index:\n- name: 5\n  results: x",
        f"x: {'[' * 3000}{']' * 3000}",
        "- a\n- b",
        "5",
        "tags: {a: [5]}",
    ],
    ids=["number", "results", "deep", "list", "scalar", "tags"],
)
@pytest.mark.parametrize("body", ["", "# Somebody's words"])
def test_metadata_of_any_kind_stays_or_is_replaced(metadata, body, tmp_path):
    """A card that somebody has written stays; one without words is replaced; neither ends in a traceback."""
    shutil.copytree(Path(__file__).parents[1] / "formats" / "e8p", tmp_path / "model")
    card = tmp_path / "model" / model_card.CARD
    card.write_text(f"---\n{metadata}\n---\n{body}\n")
    before = card.read_text()
    if not model_card.write_card(tmp_path / "model"):
        assert card.read_text() == before
    else:
        assert not body
        assert "written by transformers-quip" in card.read_text()


@pytest.mark.parametrize(
    "calibration",
    [
        "x",
        {"tuning": "x"},
        {"tuning": {"kept": True}},
        {"tuning": {"kept": True, "held_out_before": "1", "held_out_after": 0.5}},
        {"tuning": {"kept": True, "held_out_before": 1.0, "held_out_after": float("nan")}},
        {"tuning": {"kept": False, "held_out_before": 1.0, "held_out_after": 0.5}},
    ],
)
def test_tuning_that_is_not_described_or_not_kept(calibration):
    assert claims.tuning({"calibration": calibration}) is None
    assert claims.calibration({"calibration": calibration}) is None
