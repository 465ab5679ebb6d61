"""Tokenizers built on the spot for the text tests: small, offline, each with its own way from text to added tokens."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "red running shoes for men size 10, blue cotton t-shirt, stainless steel water bottle 500ml, hp 74 & tri-color",
    "user place=paris device=phone search: wireless mouse title of category office / paper age=25-34 gender=f",
    "hot dog hotdog grill, user: c++ primer, brand new in box [2 pack] (large) 5 < 6 > 4 | deal {a} item: recommend",
    "abcdefghijklmnopqrstuvwxyz 0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;-/=&%+'\"()[]{}<>|_#@!?*",
)
CHATML = ("<|im_start|>", "<|im_end|>")
LEVELS = (16, 16, 16)


def sid_tokens() -> list[str]:
    return [f"<{letter}_{code}>" for letter, size in zip("abc", LEVELS, strict=True) for code in range(size)]


def _wrap(core: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.add_tokens(sid_tokens())
    return tokenizer


@cache
def byte_bpe(chatml: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE as of GPT-2 and Qwen: NFC, no unknown token."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *(CHATML if chatml else ())]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT * 5,
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return _wrap(core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """Unigram with spaces as `▁` and an NFKC normaliser, as of T5: unknown characters become `<unk>`."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in range(4))]
    core.train_from_iterator(
        TEXT * 5,
        trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=special, show_progress=False),
    )
    return _wrap(core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece that lower-cases and strips accents, as of BERT."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core.train_from_iterator(
        TEXT * 5, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return _wrap(core, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@cache
def gemma_like() -> PreTrainedTokenizerFast:
    """Character BPE with byte fallback and `▁` for spaces; runs of blanks and HTML tags are added, as in Gemma."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.train_from_iterator(TEXT * 5, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    state = json.loads(core.to_str())["model"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
    merges = [tuple(merge) for merge in state["merges"]]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    core.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = _wrap(core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    runs = [char * size for char, most in (("\n", 4), ("▁", 6), ("\t", 2)) for size in range(2, most)]
    plain = [*runs, "\t", "<start_of_turn>", "<unused1>", "<table>", "</td>", "[@BOS@]", "<h1>"]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    return tokenizer


ODD = (
    "hotdog", "C++", "user:", "é", "日本", "q", "<b>", "</b>", "[@X@]", "\n\n", "  ", "\t\t", "▁▁", "<|x|>", "<|x|>y",
    "<<", "-", "ＦＵＬＬ", "big red", " <sp>", "don't", "…", "‹z›",
)  # fmt: skip


@cache
def odd() -> PreTrainedTokenizerFast:
    """Byte-level BPE that folds case and width, with the strangest added tokens people put into vocabularies."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT * 5,
        trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", *CHATML], show_progress=False
        ),
    )
    tokenizer = _wrap(core, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(text, normalized=True, special=False) for text in ODD])
    tokenizer.add_tokens(
        [
            AddedToken("Blue", single_word=True, normalized=False),
            AddedToken("green", lstrip=True, rstrip=True, normalized=True),
            AddedToken("{mask}", lstrip=True, normalized=False, special=True),
        ]
    )
    return tokenizer


class SlowTokenizer:
    """A tokenizer without offsets, as the Python ones of transformers: added tokens, and a token per character."""

    is_fast = False
    eos_token, eos_token_id, unk_token_id, bos_token_id = "<eos>", 0, None, None

    def __init__(self) -> None:
        import re

        self.added = ["<eos>", "hotdog", *sid_tokens()]
        self._split = re.compile(
            "(" + "|".join(re.escape(token) for token in sorted(self.added, key=len, reverse=True)) + ")"
        )
        self.added_tokens_decoder = dict(enumerate(self.added))
        self.all_special_ids, self.all_special_tokens = [0], ["<eos>"]

    def __len__(self) -> int:
        return len(self.added) + 0x110000

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        parts = [part for part in self._split.split(text) if part]
        return [i for p in parts for i in ([self.added.index(p)] if p in self.added else [100 + ord(c) for c in p])]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.added[i] if i < len(self.added) else chr(i - 100) for i in ids]


ALL = {
    "byte_bpe": byte_bpe,
    "metaspace": metaspace,
    "wordpiece": wordpiece,
    "gemma_like": gemma_like,
    "odd": odd,
    "slow": cache(SlowTokenizer),
}
