"""Captions to ids and back, on disk and in transformers."""

from __future__ import annotations

import json

import pytest
import torch

from fastldm.errors import CheckpointError, ConfigError, DataError
from fastldm.models.tokenizer import CaptionTokenizer, train_tokenizer

CAPTIONS = [
    "a red cat on a mat",
    "smiling face with heart-eyes",
    "Flag of France",
    "flag of São Tomé",
    "a cat with a red hat, smiling",
]


@pytest.fixture(params=["wordpiece", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> CaptionTokenizer:
    return train_tokenizer(iter(CAPTIONS), 200, max_length=12, model=request.param)


def test_ids_are_framed_and_padded(tokenizer: CaptionTokenizer) -> None:
    ids, mask = tokenizer(["a red cat", ""])
    assert ids.shape == mask.shape == (2, 12)
    assert ids.dtype == torch.int64
    pad, cls, sep = (tokenizer.tokenizer.token_to_id(t) for t in ("[PAD]", "[CLS]", "[SEP]"))
    assert ids[1].tolist() == [cls, sep] + [pad] * 10
    length = int(mask[0].sum())
    assert ids[0, 0] == cls
    assert ids[0, length - 1] == sep
    assert (ids[0, length:] == pad).all()
    assert torch.equal(mask, (ids != pad).long())


def test_known_captions_come_back(tokenizer: CaptionTokenizer) -> None:
    assert tokenizer.decode(tokenizer("Flag of France").input_ids[0]) == "flag of france"
    assert tokenizer.decode(tokenizer("São").input_ids[0].tolist()) == "sao"


def test_long_captions_are_cut_and_keep_their_end(tokenizer: CaptionTokenizer) -> None:
    ids = tokenizer("a cat " * 20).input_ids[0]
    assert ids.shape == (12,)
    assert ids[-1] == tokenizer.tokenizer.token_to_id("[SEP]")
    assert tokenizer("a cat " * 20, max_length=5).input_ids.shape == (1, 5)


def test_padding_to_the_longest(tokenizer: CaptionTokenizer) -> None:
    ids, mask = tokenizer(["a cat", "cat"], padding="longest")
    assert ids.shape[1] == mask.sum(dim=1).max() < 12
    assert tokenizer([], padding="longest").input_ids.shape == (0, 12)


def test_every_id_has_a_row(tokenizer: CaptionTokenizer) -> None:
    ids = tokenizer([*CAPTIONS, "zebra Ω 42"]).input_ids
    assert ids.max() < tokenizer.vocab_size == len(tokenizer)
    unknown = tokenizer.tokenizer.token_to_id("[UNK]")
    assert unknown in ids[-1]
    assert unknown not in ids[:-1]


def test_vocabulary_is_limited() -> None:
    assert train_tokenizer(CAPTIONS, 40).vocab_size <= 40
    cased = train_tokenizer(CAPTIONS, 200, lowercase=False)
    assert not torch.equal(cased("Flag").input_ids, cased("flag").input_ids)


@pytest.mark.parametrize("model", ["wordpiece", "bpe"])
def test_the_same_captions_give_the_same_vocabulary(model: str) -> None:
    """Also in another order: processes that learn it on their own must agree."""
    words = ["ab", "ba", "abba", "cab", "dab", "deed", "feed", "bead", "cafe", "fade", "x"]
    captions = [f"{first} {second}" for first in words for second in words]
    vocabularies = {
        train_tokenizer(given, 60, model=model).tokenizer.to_str()
        for given in (captions, captions, captions[::-1], sorted(captions))
    }
    assert len(vocabularies) == 1


@pytest.mark.parametrize("model", ["wordpiece", "bpe"])
def test_only_the_special_tokens_are_special(model: str) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 200, model=model)
    assert {token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values()} == {
        "[PAD]", "[UNK]", "[CLS]", "[SEP]",
    }  # fmt: skip
    assert [tokenizer.tokenizer.id_to_token(i) for i in range(4)] == [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]",
    ]  # fmt: skip
    assert sorted(tokenizer.tokenizer.get_vocab().values()) == list(range(tokenizer.vocab_size))


def test_saved_folder_gives_the_same_ids_here_and_in_transformers(tokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    texts = [*CAPTIONS, "", "an unseen caption about zebras", "cat " * 30]
    expected = tokenizer(texts)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ours = CaptionTokenizer.from_pretrained(tmp_path, subfolder="tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    for other in (ours(texts), theirs(texts, **options)):
        assert torch.equal(other.input_ids, expected.input_ids)
        assert torch.equal(other.attention_mask, expected.attention_mask)
    assert ours.model_max_length == theirs.model_max_length == 12
    assert theirs.pad_token_id == ours.pad_token_id


def test_saving_again_changes_nothing(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    first = (tmp_path / "tokenizer.json").read_bytes()
    tokenizer(["a cat"])
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first


def test_bad_input_is_named(tokenizer: CaptionTokenizer) -> None:
    with pytest.raises(DataError, match=r"captions\[1\]: expected a string, got None"):
        tokenizer(["a", None])
    with pytest.raises(ConfigError, match="padding: got 'left'"):
        tokenizer(["a"], padding="left")
    with pytest.raises(ConfigError, match="truncation, return_tensors"):
        tokenizer(["a"], return_tensors="np")
    with pytest.raises(ConfigError, match="max_length: got 2"):
        CaptionTokenizer(tokenizer.tokenizer, max_length=2)


def test_bad_training_input_is_named() -> None:
    with pytest.raises(DataError, match="captions: there is none"):
        train_tokenizer(["", "  "], 100)
    with pytest.raises(DataError, match=r"captions\[1\]: expected a string, got 3"):
        train_tokenizer(["a", 3], 100)
    with pytest.raises(ConfigError, match="vocab_size: got 4"):
        train_tokenizer(CAPTIONS, 4)
    with pytest.raises(ConfigError, match="model: got 'unigram'"):
        train_tokenizer(CAPTIONS, 100, model="unigram")


def test_foreign_tokenizers_need_the_special_tokens() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(ConfigError, match=r"no special token \[PAD\]"):
        CaptionTokenizer(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))


def test_damaged_files_are_named(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer file"):
        CaptionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        CaptionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="no model_max_length"):
        CaptionTokenizer.from_pretrained(tmp_path)
