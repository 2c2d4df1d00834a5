"""Byte-pair encoding in plain Python: text -> ids, and a stream of ids -> text.

One merge loop serves both families. SentencePiece style (Llama, Mistral): symbols are characters, a
space is `▁`, and a character without a piece is spelled in byte tokens `<0x..>`. Byte level (GPT-2,
Qwen, Llama-3): a regex cuts the text into words, and symbols are the bytes of a word.

Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; Radford et al. 2019 (GPT-2) for the byte
alphabet. The reference is HF `tokenizers`:
https://github.com/huggingface/tokenizers/blob/v0.22.0/tokenizers/src/models/bpe/word.rs
"""

import codecs
import heapq
import re
import unicodedata

# (left id, right id) -> (rank, merged id); the lowest rank is merged first
Pairs = dict[tuple[int, int], tuple[int, int]]
MAX_CACHED_WORDS, MAX_CACHED_LENGTH = 1 << 16, 64


def merge(ids: list[int], pairs: Pairs) -> list[int]:
    """Merges neighbours, lowest rank first and leftmost among equals, until no pair is left.

    O(n log n): a heap of the pairs, over a doubly linked list of the symbols.
    """
    n = len(ids)
    ids, left, right = ids[:], list(range(-1, n - 1)), list(range(1, n + 1))
    heap = []

    def offer(i: int) -> None:
        if i >= 0 and right[i] < n and (pair := pairs.get((ids[i], ids[right[i]]))):
            heapq.heappush(heap, (pair[0], i))

    for i in range(n - 1):
        offer(i)
    while heap:
        rank, i = heapq.heappop(heap)
        j = right[i]
        pair = pairs.get((ids[i], ids[j])) if j < n else None
        # stale entry: one of the two has merged with another since
        if pair is None or pair[0] != rank:
            continue
        ids[i], ids[j] = pair[1], -1  # -1: gone, and in no pair
        right[i] = right[j]
        if right[i] < n:
            left[right[i]] = i
        offer(left[i])
        offer(i)
    return [i for i in ids if i >= 0]


class WordCache(dict):
    """word -> ids: most words of a text have been seen before. Bounded in words and in length."""

    def __init__(self, encode):
        self.encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self.encode(word)
        if len(word) <= MAX_CACHED_LENGTH:
            if len(self) >= MAX_CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def without(pairs: Pairs, ids: set[int]) -> Pairs:
    """`pairs` without those that merge into one of `ids`."""
    if any(new in ids for _, new in pairs.values()):
        return {pair: (rank, new) for pair, (rank, new) in pairs.items() if new not in ids}
    return pairs


class SentencePieceBPE:
    """BPE over characters with `▁` for the space, as transformers converts a `tokenizer.model`."""

    def __init__(
        self,
        vocab: dict[str, int],
        pairs: Pairs,
        unk_id: int | None,
        *,
        fuse_unk: bool,
        byte_fallback: bool,
        strip: bool,
    ):
        self.vocab, self.pairs, self.unk_id, self.fuse_unk = vocab, pairs, unk_id, fuse_unk
        self.byte_fallback, self.strip = byte_fallback, strip
        self.bytes = [vocab.get(f"<0x{b:02X}>") if byte_fallback else None for b in range(256)]
        # where no piece has a ▁ behind another character, no merge crosses that border, and the
        # text may be encoded (and cached) word by word
        by_word = not any("▁" in piece.lstrip("▁") for piece in vocab)
        self.split = re.compile("▁*[^▁]+|▁+" if by_word else ".+", re.S).findall
        self.words = WordCache(self.encode_word)

    def encode_word(self, word: str) -> list[int]:
        ids = []
        for char in word:
            if char in self.vocab:
                ids.append(self.vocab[char])
            elif None not in (spelled := [self.bytes[b] for b in char.encode()]):
                ids += spelled
            elif self.unk_id is not None:
                ids.append(self.unk_id)
        return merge(ids, self.pairs)

    def encode(self, text: str) -> list[int]:
        ids = [i for word in self.split(text) for i in self.words[word]]
        if self.fuse_unk and self.unk_id in ids:
            ids = [i for i, before in zip(ids, [None] + ids) if not i == before == self.unk_id]
        return ids

    def forget(self, ids: set[int]) -> None:
        """No text is encoded to one of `ids` any more."""
        self.pairs = without(self.pairs, ids)
        self.words.clear()

    def decoder(self) -> "SentencePieceDecoder":
        return SentencePieceDecoder(self.byte_fallback, self.strip)


class SentencePieceDecoder:
    """A run of byte tokens is text only if all of it is UTF-8 (else one U+FFFD per byte, as in
    `tokenizers`), so it is held back until another token ends it.
    """

    def __init__(self, byte_fallback: bool, strip: bool):
        byte = re.compile("<0x([0-9A-Fa-f]{2})>").fullmatch
        self.byte = byte if byte_fallback else lambda token: None
        self.strip, self.run = strip, b""

    def push(self, token: str) -> str:
        if byte := self.byte(token):
            self.run += bytes.fromhex(byte[1])
            return ""
        return self.out(self.end_run() + token.replace("▁", " "))

    def flush(self) -> str:
        return self.out(self.end_run())

    def end_run(self) -> str:
        run, self.run = self.run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(run)

    def out(self, text: str) -> str:
        if self.strip and text:  # the dummy space before the first word
            self.strip, text = False, text.removeprefix(" ")
        return text


# GPT-2's byte alphabet: printable Latin-1 maps to itself, the other bytes to U+0100 and up
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted({*range(256)} - {*PRINTABLE})
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}
# Bytes of no printable character: controls, and what begins no assigned character in UTF-8. SmolLM2
# has no tokens for some of them.
UNPRINTABLE = {*range(32)} - {9, 10, 13} | {0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}


class Kinds(dict):
    r"""Character → an ASCII character of the same kind, for str.translate: `a` for \p{L}, `0` for
    \p{N}, tab for \s, `!` for the rest. The regexes of the checkpoints ask for nothing else outside
    ASCII, so on translated text the standard library's `re` finds their words. Filled as characters
    are met.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kind = unicodedata.category(char)[0]
        if code < 128:
            kind = "!" if "\x1c" <= char <= "\x1f" else char  # space to Python, not to Unicode
        elif char == "ſ":
            # the one other letter that a case-blind 's matches
            kind = "S"
        elif kind in "LN":
            kind = "a" if kind == "L" else "0"
        else:
            kind = "\t" if char.isspace() else "!"
        self[code] = kind
        return kind


KINDS = Kinds()

# pre-tokenizer regexes, as the files write them
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# SmolLM2 cuts twice, each digit from what is beside it and then by GPT-2's regex; here in one, so
# that the spaces before a digit are a word by themselves.
SMOLLM_SPLIT = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
)


def over_kinds(regex: str) -> str:
    r"""`regex` for text in KINDS: \p{L} is A-Za-z and \p{N} is \d, inside [...] and outside."""
    inside = re.sub(r"\[[^\]]*\]", lambda m: m[0].replace(r"\p{L}", "A-Za-z"), regex)
    return inside.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", r"\d")


SPLITS = {
    regex: over_kinds(regex) for regex in (GPT2_SPLIT, QWEN2_SPLIT, LLAMA3_SPLIT, SMOLLM_SPLIT)
}


class ByteLevelBPE:
    """BPE over the bytes of the words that a regex finds (GPT-2, Qwen, Llama-3)."""

    def __init__(self, vocab: dict[str, int], pairs: Pairs, *, split: str, ignore_merges: bool):
        self.vocab, self.pairs, self.ignore_merges = vocab, pairs, ignore_merges
        self.bytes = [vocab.get(BYTE_TO_CHAR[b]) for b in range(256)]
        self.split_regex = split
        self.split = re.compile(SPLITS[split], re.ASCII).finditer
        self.words = WordCache(self.encode_word)

    def encode_word(self, word: str) -> list[int]:
        data = word.encode()
        if self.ignore_merges and (token := "".join(BYTE_TO_CHAR[b] for b in data)) in self.vocab:
            return [self.vocab[token]]
        # as in `tokenizers`, a byte that has no token is left out
        return merge([self.bytes[b] for b in data if self.bytes[b] is not None], self.pairs)

    def encode(self, text: str) -> list[int]:
        spans = [m.span() for m in self.split(text.translate(KINDS))]
        return [i for start, end in spans for i in self.words[text[start:end]]]

    def forget(self, ids: set[int]) -> None:
        """No text is encoded to one of `ids` any more."""
        self.pairs = without(self.pairs, ids)
        self.vocab = {token: id for token, id in self.vocab.items() if id not in ids}
        self.words.clear()

    def decoder(self) -> "ByteLevelDecoder":
        return ByteLevelDecoder()


class ByteLevelDecoder:
    """Bytes of tokens -> text, whole characters only; bytes that are not UTF-8 become U+FFFD."""

    def __init__(self):
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> str:
        if all(c in CHAR_TO_BYTE for c in token):
            return self.utf8.decode(bytes(CHAR_TO_BYTE[c] for c in token))
        return self.utf8.decode(token.encode())  # an added token outside the byte alphabet

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)
