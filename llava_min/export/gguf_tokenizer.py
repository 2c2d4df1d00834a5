"""A tokenizer as GGUF's entries: tokens, scores or merges, types and special ids.

llama.cpp has two: `llama`, SentencePiece's merges by score, and `gpt2`, byte-level BPE with a named
regex. The numbers of the types are llama.cpp's (llama.h, LLAMA_TOKEN_TYPE).
"""

from llava_min.data.processor import Processor
from llava_min.data.tokenizer import Tokenizer
from llava_min.data.tokenizer.bpe import GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT, SMOLLM_SPLIT
from llava_min.errors import warn
from llava_min.export.jinja import JINJA

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PRE = {  # the regex of a byte-level tokenizer -> its name
    GPT2_SPLIT: "gpt-2",
    QWEN2_SPLIT: "qwen2",
    LLAMA3_SPLIT: "llama-bpe",
    SMOLLM_SPLIT: "smollm",
}


def token_type(t: Tokenizer, id: int) -> int:
    token = t.token(id)
    if token is None:
        return UNUSED
    if id == t.unk_id:
        return UNKNOWN
    if added := t.added.get(token):
        return CONTROL if added.special else USER_DEFINED
    if t.kind != "byte-level" and len(token) == 6 and token.startswith("<0x"):
        return BYTE
    return NORMAL


def scores(t: Tokenizer, rows: int) -> list[float]:
    """SentencePiece's own where there is a tokenizer.model, else by the merges' order."""
    if t.sp:
        n = len(t.sp)
        return [t.sp.get_score(i) if i < n else 0.0 for i in range(rows)]
    rank: dict[int, int] = {}
    for order, id in t.bpe.pairs.values():
        rank[id] = min(order, rank.get(id, order))
    return [-float(rank.get(id, 0)) for id in range(rows)]


def merges(t: Tokenizer) -> list[str]:
    ordered = sorted(t.bpe.pairs, key=lambda pair: t.bpe.pairs[pair][0])
    return [f"{t.token(a)} {t.token(b)}" for a, b in ordered]


def entries(processor: Processor, rows: int, eos: int | None) -> dict[str, object]:
    """The metadata `tokenizer.…` for a vocabulary of `rows`; `eos` as the model's config has it."""
    t = processor.tokenizer
    tokens = [t.token(id) if t.token(id) is not None else f"[PAD{id}]" for id in range(rows)]
    found: dict[str, object] = {
        "ggml.tokens": tokens,
        "ggml.token_type": [token_type(t, id) for id in range(rows)],
        "ggml.add_bos_token": t.add_bos,
        "ggml.add_eos_token": False,
        "chat_template": JINJA[processor.template_name],
    }
    if t.kind == "byte-level":
        found |= {"ggml.model": "gpt2", "ggml.pre": PRE[t.bpe.split_regex]}
        found |= {"ggml.merges": merges(t)}
    else:
        found |= {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": scores(t, rows)}
        found |= {"ggml.add_space_prefix": t.scheme != "never"}
        if t.scheme == "first":
            warn(
                "llama.cpp puts a space after each special token, and this tokenizer at the start "
                "of a text alone: a text behind <image> or </s> may have one token more there"
            )
    eos = t.eos_id if eos is None else eos
    stop = next(iter(processor.stop_ids), None)
    ids = {"bos": t.bos_id, "eos": eos, "unknown": t.unk_id, "padding": t.pad_id}
    if stop not in (None, eos):
        ids["eot"] = stop
    return found | {f"ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
