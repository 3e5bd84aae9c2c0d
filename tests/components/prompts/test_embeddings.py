import json
import shutil

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from components.pipeline.runner import run_stage
from components.pipeline.tables import read_table
from components.prompts import curate_prompts
from components.prompts import embeddings as prompt_embeddings
from components.prompts.embeddings import Neighbours
from univigu.errors import BadInputError, ConfigError, MissingInputError

WORDS = ["a", "red", "blue", "seven", "six", "on", "white", "black", "moving", "left", "right"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random sentence model, in which a word and its plural are one token, so they have the same meaning."""
    folder = tmp_path_factory.mktemp("embedding")
    ids = {"[PAD]": 0, "[UNK]": 1} | {word: 2 + place for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"s\b"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = BertModel(BertConfig(vocab_size=32, max_position_embeddings=32, initializer_range=0.5, **sizes))
    model.save_pretrained(folder)
    return folder


TEXTS = ["a red seven", "a blue six on black", "red sevens", "a red sevens", "moving left", "a blue six on blacks"]


def looks(model_folder, batches, cosine=0.9):
    """The closeness of each text to the earlier ones if all are kept."""
    neighbours, found = Neighbours(model_folder, cosine), []
    for batch in batches:
        neighbours.start(batch)
        for number, text in enumerate(batch):
            found.append(neighbours.measure(number))
            neighbours.keep(number, text)
    return found


def test_each_text_is_compared_with_every_earlier_one(model_folder, monkeypatch):
    neighbours = Neighbours(model_folder, 0.9)
    vectors = neighbours.embed(TEXTS)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    cosines = vectors @ vectors.T
    found = looks(model_folder, [TEXTS])
    assert found[0] == (-1.0, "", 0)
    for number in range(1, len(TEXTS)):
        earlier = cosines[number, :number]
        assert found[number].cosine == pytest.approx(float(earlier.max()), abs=1e-4)
        assert found[number].id == TEXTS[int(earlier.argmax())]
        assert found[number].count == int((earlier >= 0.9).sum())
    monkeypatch.setattr(prompt_embeddings, "BLOCK", 2)  # the store grows, and is compared in parts
    for size in (1, 2, 4):
        batches = [TEXTS[start : start + size] for start in range(0, len(TEXTS), size)]
        assert [(look.id, look.count) for look in looks(model_folder, batches)] == [
            (look.id, look.count) for look in found
        ]


def test_padding_changes_nothing_and_cls_pooling_is_read_from_the_folder(model_folder, tmp_path):
    neighbours = Neighbours(model_folder, 0.9)
    assert torch.allclose(neighbours.embed(TEXTS)[0], neighbours.embed(TEXTS[:1])[0], atol=1e-5)
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    other = Neighbours(folder, 0.9)
    assert not torch.allclose(neighbours.embed(TEXTS)[0], other.embed(TEXTS)[0], atol=1e-3)


@pytest.fixture
def curate(tmp_path, tiny_wan_folder, profile, model_folder, monkeypatch):
    """Curate texts with the sentence model; returns the manifest, the kept texts with their scores, the rejected."""
    monkeypatch.setattr(curate_prompts, "EMBEDDED", 4)
    settings = profile["curate_prompts"]
    settings["max_rejected_share"] = 1.0
    settings["filters"].update(language="off", unknown_tokens="off", near_duplicates="off")
    root = tmp_path / "root"
    shutil.copytree(tiny_wan_folder / "tokenizer", root / profile["base"] / "tokenizer")
    shutil.copytree(model_folder, root / settings["embedding_model"])
    raw = root / profile["raw_prompts"] / "raw.jsonl"
    raw.parent.mkdir(parents=True)

    def run(texts):
        rows = [{"text": text, "source": "test", "licence": "CC0-1.0"} for text in texts]
        raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
        manifest = run_stage("curate-prompts", profile, root)
        tables = (read_table(root / "data/curated", name).to_pylist() for name in ("prompts", "rejected"))
        kept, rejected = tables
        return manifest, {row["text"]: json.loads(row["scores"]) for row in kept}, rejected

    return run


def test_semantic_duplicates_are_rejected_or_scored(curate, profile):
    settings = profile["curate_prompts"]
    settings["semantic_duplicate_cosine"] = 0.999
    settings["filters"]["semantic_duplicates"] = "enforce"
    manifest, kept, rejected = curate(TEXTS)
    assert set(kept) == {"a red seven", "a blue six on black", "red sevens", "moving left"}
    assert [row["reason"] for row in rejected] == ["semantic_duplicate"] * 2
    assert "cosine 1.000" in rejected[0]["detail"]
    assert len(manifest["facts"]["embedding_model"]) == 64
    settings["filters"]["semantic_duplicates"] = "score"
    _, kept, rejected = curate(TEXTS)
    assert rejected == []
    assert {text for text in kept if "semantic_duplicate" in kept[text]} == {"a red sevens", "a blue six on blacks"}


def test_prompts_with_too_many_neighbours_are_rejected(curate, profile):
    profile["curate_prompts"]["diversity"] = {"cosine": 0.999, "neighbours": 1}
    profile["curate_prompts"]["filters"]["diversity"] = "enforce"
    texts = ["a red seven", "a red sevens", "as red seven", "as red sevens", "moving left"]
    _, kept, rejected = curate(texts)
    assert set(kept) == {"a red seven", "a red sevens", "moving left"}
    assert {row["reason"] for row in rejected} == {"crowded"}
    assert kept["a red sevens"]["neighbours"] == 1


def test_a_missing_or_damaged_model_is_an_error(tmp_path, model_folder):
    with pytest.raises(MissingInputError, match="no sentence-embedding model at"):
        Neighbours(tmp_path / "none", 0.8)
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match="can't be read"):
        Neighbours(folder, 0.8)
    with pytest.raises(ConfigError, match=r"'diversity\.cosine' is 3"):
        Neighbours(model_folder, 3)
