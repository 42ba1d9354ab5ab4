"""Captions to token ids, by a vocabulary learned from the captions of a data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from fastldm.errors import CheckpointError, ConfigError, DataError
from fastldm.outputs import BaseOutput
from fastldm.storage import atomic_file, read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
_SPECIAL_TOKENS = [PAD, UNK, CLS, SEP]
_PREFIX, _SUFFIX = "##", "</w>"
_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"


@dataclass
class TokenizerOutput(BaseOutput):
    """Token ids of a batch of captions.

    Attributes:
        input_ids: int64 [B, L].
        attention_mask: int64 [B, L], 1 for a token and 0 for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor


class CaptionTokenizer:
    """Turns captions into ids of one length: [CLS] words [SEP] and then [PAD].

    The empty caption, [CLS] [SEP] and padding, stands for "no condition" in classifier-free
    guidance. The files are those of Hugging Face tokenizers: transformers' ``AutoTokenizer`` reads
    a saved folder and gives the same ids.

    Args:
        tokenizer: a tokenizer of the ``tokenizers`` library that has the special tokens [PAD],
            [UNK], [CLS] and [SEP] and puts the latter two around a caption.
        max_length: L, the length of every output; longer captions are cut and keep their [SEP].

    Raises:
        ConfigError: `max_length` leaves no room for a token, or a special token is missing.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int = 77) -> None:
        pad_token_id = tokenizer.token_to_id(PAD)
        missing = [token for token in _SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
        if missing or pad_token_id is None:
            raise ConfigError(f"tokenizer: has no special token {', '.join(missing)}")
        if not isinstance(max_length, int) or max_length < len((CLS, SEP)) + 1:
            raise ConfigError(f"max_length: got {max_length!r}; accepted: an integer of at least 3")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_token_id = pad_token_id

    @property
    def model_max_length(self) -> int:
        """`max_length`, by the name that transformers' tokenizers have for it."""
        return self.max_length

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included: the rows that an embedding needs."""
        return self.tokenizer.get_vocab_size()

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(
        self,
        captions: str | Sequence[str],
        *,
        padding: Literal["max_length", "longest"] = "max_length",
        max_length: int | None = None,
        truncation: Literal[True] = True,
        return_tensors: Literal["pt"] = "pt",
    ) -> TokenizerOutput:
        """Token ids of `captions`; the keywords are those of transformers' tokenizers.

        Args:
            captions: B strings, or one.
            padding: to `max_length`, or to the longest of these captions.
            max_length: in place of the tokenizer's own.
            truncation, return_tensors: always cut, always tensors.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 [B, L]; unpacks in that order.

        Raises:
            DataError: a caption is not a string.
            ConfigError: a keyword has another value than those above.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        for index, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise DataError(f"captions[{index}]: expected a string, got {caption!r}")
        if padding not in ("max_length", "longest"):
            raise ConfigError(f"padding: got {padding!r}; accepted: 'max_length', 'longest'")
        if truncation is not True or return_tensors != "pt":
            raise ConfigError(
                f"truncation, return_tensors: got {truncation!r}, {return_tensors!r}; "
                "accepted: True, 'pt'"
            )
        length = self.max_length if max_length is None else max_length
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(
            pad_id=self.pad_token_id,
            pad_token=PAD,
            length=length if padding == "max_length" else None,
        )
        encodings = self.tokenizer.encode_batch(captions)
        width = length if padding == "max_length" or not encodings else len(encodings[0].ids)
        return TokenizerOutput(
            _matrix([encoding.ids for encoding in encodings], width),
            _matrix([encoding.attention_mask for encoding in encodings], width),
        )

    def decode(self, input_ids: Tensor | Sequence[int]) -> str:
        """The caption of ids [L], special tokens left out, as far as the vocabulary keeps it."""
        ids = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a folder.

        Raises:
            OSError: the folder cannot be written; files that were in it are unchanged.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        with atomic_file(folder / _TOKENIZER_FILE) as temporary:
            temporary.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_length,
            "pad_token": PAD,
            "unk_token": UNK,
            "cls_token": CLS,
            "sep_token": SEP,
        }
        write_json(folder / _CONFIG_FILE, config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, subfolder: str | None = None) -> Self:
        """Read a folder that `save_pretrained` wrote.

        Raises:
            CheckpointError: a file is missing or damaged.
            ConfigError: the files hold a tokenizer that does not fit captions.
        """
        from tokenizers import Tokenizer

        path = Path(folder, subfolder or "")
        config = read_json(path / _CONFIG_FILE)
        if not isinstance(config, dict) or "model_max_length" not in config:
            raise CheckpointError(f"{path / _CONFIG_FILE}: has no model_max_length")
        file = path / _TOKENIZER_FILE
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
        try:
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:
            raise CheckpointError(f"{file}: not a tokenizer file ({error})") from None
        return cls(tokenizer, config["model_max_length"])


def train_tokenizer(
    captions: Iterable[str],
    vocab_size: int = 30522,
    *,
    max_length: int = 77,
    model: Literal["wordpiece", "bpe"] = "wordpiece",
    lowercase: bool = True,
) -> CaptionTokenizer:
    """Learn a vocabulary from captions; the same captions give the same one.

    Args:
        captions: read once, so an iterator will do.
        vocab_size: the most tokens to learn; few captions give fewer. The default is BERT's.
        max_length: length of the tokenizer's outputs, special tokens included.
        model: ``"wordpiece"`` as BERT's, or byte-pair encoding.
        lowercase: whether case is ignored; accents are then ignored, too.

    Raises:
        DataError: there is no caption with a character to learn from, or one is not a string.
        ConfigError: `model` or `vocab_size` is not accepted.
    """
    from tokenizers import normalizers, pre_tokenizers, processors

    if not isinstance(vocab_size, int) or vocab_size <= len(_SPECIAL_TOKENS):
        raise ConfigError(
            f"vocab_size: got {vocab_size!r}; accepted: an integer above {len(_SPECIAL_TOKENS)}"
        )
    if model not in ("wordpiece", "bpe"):
        raise ConfigError(f"model: got {model!r}; accepted: 'wordpiece', 'bpe'")
    captions = list(captions)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise DataError(f"captions[{index}]: expected a string, got {caption!r}")
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word
        for caption in captions
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption))
    )
    if not words:
        raise DataError("captions: there is none with a character to learn a vocabulary from")
    tokenizer = _learn(words, vocab_size, model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)],
    )
    return CaptionTokenizer(tokenizer, max_length)


def _learn(words: Counter[str], vocab_size: int, model: Literal["wordpiece", "bpe"]) -> Tokenizer:
    """A tokenizer with the vocabulary of `words`, the same in every run.

    The library numbers the characters inside words in the order of a randomly seeded hash table,
    and breaks ties between merges by those numbers. Named as special tokens they are numbered in
    order; the vocabulary is then moved into a tokenizer in which they are plain tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer, WordPieceTrainer

    options: dict[str, Any] = {"vocab_size": vocab_size, "show_progress": False}
    if model == "wordpiece":
        learner = Tokenizer(models.WordPiece(unk_token=UNK))
        inner = {f"{_PREFIX}{character}" for word in words for character in word[1:]}
        trainer: Any = WordPieceTrainer(special_tokens=_SPECIAL_TOKENS + sorted(inner), **options)
    else:
        learner = Tokenizer(models.BPE(unk_token=UNK, end_of_word_suffix=_SUFFIX))
        inner = {f"{word[-1]}{_SUFFIX}" for word in words}
        trainer = BpeTrainer(
            special_tokens=_SPECIAL_TOKENS + sorted(inner), end_of_word_suffix=_SUFFIX, **options
        )
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(words.elements(), trainer)
    learned = json.loads(learner.to_str())["model"]
    if model == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(learned["vocab"], unk_token=UNK))
        tokenizer.decoder = decoders.WordPiece()
    else:
        merges = [tuple(merge) for merge in learned["merges"]]
        tokenizer = Tokenizer(
            models.BPE(learned["vocab"], merges, unk_token=UNK, end_of_word_suffix=_SUFFIX)
        )
        tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    return tokenizer


def _matrix(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)
