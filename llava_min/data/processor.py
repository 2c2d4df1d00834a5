"""Prompts or messages + pictures → the ids, masks, labels and pixels that the model takes.

Where the column of `data/` comes together: chat.py says what stands in a conversation, tokenizer.py
spells it, image.py makes the pixels. A picture becomes its placeholder tokens here, by id, so ids,
labels and masks are born one length.

Two rules of tokenization (ground: transformers' LlavaProcessor, and LLaVA's tokenizer_image_token):
    own    what transformers does with the checkpoint's tokenizer; `processor(prompts)` always follows it
    chunk  LLaVA's: each chunk of text between pictures is encoded by itself, a `▁` on both sides of a picture
The original does so in every conversation mode, so its checkpoints (`chunks`) keep to it in every template but llava_hf.
"""

import json
import math
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from llava_min.config import IGNORE
from llava_min.data.chat import (
    CHUNKS,
    LLAVA_HF_JINJA,
    RECORD,
    Piece,
    check,
    parts,
    render,
    template,
)
from llava_min.data.image import ImageConfig, to_pixels
from llava_min.data.tokenizer import Tokenizer
from llava_min.errors import UserError, escape_controls, warn
from llava_min.util.files import write_json

MARK = "<image>"

Pictures = Image.Image | list[Image.Image] | list[list[Image.Image]] | None


class Processor:
    """`tokens_per_image` is how many placeholders `image_token_id` one picture takes: 576 for
    CLIP-L/14-336. `ends`: ids that end an answer by the model's config. `chunks`: the checkpoint
    was trained by the original LLaVA, or from one that was.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_config: ImageConfig,
        template_name: str,
        image_token_id: int,
        tokens_per_image: int,
        ends: Sequence[int] = (),
        chunks: bool = False,
    ):
        self.tokenizer, self.image_config, self.ends, self.chunks = (
            tokenizer,
            image_config,
            ends,
            chunks,
        )
        self.template_name, self.template = template_name, template(template_name)
        self.rule = "chunk" if chunks and template_name != "llava_hf" else self.template.rule
        self.image_token_id, self.tokens_per_image = image_token_id, tokens_per_image
        known = tokenizer.token_id(MARK)
        if known is None:
            tokenizer.add_special(MARK, image_token_id)
        elif known != image_token_id:
            raise UserError(
                f"image_token_index: the config says {image_token_id}, the tokenizer has {MARK} "
                f"at {known}; mend the one that is wrong"
            )
        probe = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": "x"},
        ]
        # every token the template needs is there
        for piece in render(template_name, probe, answer=True):
            if piece.token is not None:
                self._ids_of(piece.token)

    # ---- prompts, used as they are

    def __call__(
        self,
        prompts: str | list[str],
        images: Pictures = None,
        *,
        padding_side: str = "left",
        parse_special: bool = False,
    ) -> dict[str, torch.Tensor]:
        """`<image>` marks each picture; nothing else is added but BOS, by the tokenizer's own rule.

        Returns input_ids (B, T) int64, attention_mask (B, T) and, when there are pictures,
        pixel_values (N, 3, S, S) in reading order. Special strings stay text unless
        `parse_special`. `UserError` when marks and pictures differ.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not (
            isinstance(prompts, (list, tuple))
            and prompts
            and all(isinstance(p, str) for p in prompts)
        ):
            raise UserError(
                "prompts: expected a string or a non-empty list of strings; mend the call"
            )
        for p in prompts:
            if not p.strip():
                raise UserError("prompt: is empty; write a question")
            if self.template_name in ("llava_hf", "vicuna_v1"):
                _check_spacing(p)
        rows = _by_row(_listed(images), [p.count(MARK) for p in prompts])
        ids = [self._encode_prompt(p, parse_special) for p in prompts]
        return self._batch(ids, sum(rows, []), padding_side)

    def _encode_prompt(self, prompt: str, parse_special: bool) -> list[int]:
        t = self.tokenizer
        ids = [t.bos_id] if t.add_bos else []
        mark = t.added[MARK]
        chunks = prompt.split(MARK)
        for i, chunk in enumerate(chunks):
            if i:
                ids += self._ids_of("image")
            if mark.lstrip and i + 1 < len(chunks):
                chunk = chunk.rstrip()
            if mark.rstrip and i:
                chunk = chunk.lstrip()
            if chunk:
                ids += t.encode(chunk, at="special" if i else "start", parse_special=parse_special)
        return ids

    # ---- messages, through the template

    def chat(
        self, messages: list, images: Pictures = None, *, padding_side: str = "left"
    ) -> dict[str, torch.Tensor]:
        """The generation prompt of one conversation, or of a list of them; returns what `__call__`
        returns.

        Pictures are the `{"type": "image"}` parts of user messages, which may hold them (`"image":
        picture`, as in transformers) instead of `images`; text stays text whatever it says.
        Messages without such parts but with `images`: each `<image>` written in a user's plain
        string is a picture (there must be as many marks as pictures); where none is written, the
        pictures go into the first user message.
        """
        many = isinstance(messages, list) and messages and isinstance(messages[0], list)
        talks = messages if many else [messages]
        images = _gathered(talks, images)
        rows = _by_row(images, [_count(talk, images) for talk in talks])
        ids = []
        for talk, row in zip(talks, rows):
            pieces = render(self.template_name, _place(talk, len(row)), answer=False)
            ids.append(self.encode(pieces)[0])
        return self._batch(ids, sum(rows, []), padding_side)

    def training(self, messages: list[dict], images: Pictures = None) -> dict:
        """One conversation that ends in an answer → input_ids and labels (lists of one length), and
        pixel_values (N, 3, S, S) when there are pictures. Pictures are found as in `chat`. Labels
        are −100 but on the answers and their end tokens; they are not shifted.
        """
        images = _gathered([messages], images)
        (row,) = _by_row(images, [_count(messages, images)])
        ids, labels = self.encode(
            render(self.template_name, _place(messages, len(row)), answer=True)
        )
        out = {"input_ids": ids, "labels": labels}
        return out | {"pixel_values": self._pixels(row)} if row else out

    def encode(self, pieces: list[Piece]) -> tuple[list[int], list[int]]:
        """A rendered conversation -> its ids and labels, of one length."""
        t, ids, labels = self.tokenizer, [], []
        if t.add_bos and pieces[0].token != "bos":
            ids, labels = [t.bos_id], [IGNORE]
        before = "start"
        for p in pieces:
            if p.token is not None:
                new = self._ids_of(p.token)
                before = {"bos": "start", "image": "image"}.get(p.token, "special")
            else:
                if self.rule == "chunk":
                    new = t.encode_prefixed(p.text, at="start" if before == "image" else before)
                else:
                    new = t.encode(p.text, at="special" if before == "image" else before)
                before = "inside"
            ids += new
            labels += new if p.supervised else [IGNORE] * len(new)
        return ids, labels

    def _ids_of(self, token: str) -> list[int]:
        if token == "image":
            return [self.image_token_id] * self.tokens_per_image
        t = self.tokenizer
        id = (
            {"bos": t.bos_id, "eos": t.eos_id}[token]
            if token in ("bos", "eos")
            else t.token_id(token)
        )
        if id is None:
            raise UserError(
                f"template {self.template_name}: needs the token {token}, which this tokenizer "
                "does not have; choose another template"
            )
        return [id]

    # ---- back, and to disk

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's stop token, the tokenizer's EOS, and the model's
        own.
        """
        t, stop = self.tokenizer, self.template.stop
        id = t.token_id(stop)
        # plain's newline is spelled, as a byte token in Llama's vocabulary
        if id is None and stop.isspace():
            id = t.encode(stop, at="inside")[-1]
        return [i for i in dict.fromkeys([id, t.eos_id, *self.ends]) if i is not None]

    def silent_ids(self, vocab_size: int) -> list[int]:
        """Ids that a head of `vocab_size` rows scores but that are no text: the placeholder, and
        rows of padding.
        """
        return [self.image_token_id, *range(len(self.tokenizer), vocab_size)]

    def decode(self, ids) -> str:
        """Text of one row of ids (a list or a 1-D tensor), special tokens left out."""
        try:
            ids = [operator.index(i) for i in ids]
        except (
            TypeError,
            ValueError,
            RuntimeError,
        ):  # not a row; rows of rows; a tensor of more than ids
            what = f"{tuple(ids.shape)}" if hasattr(ids, "shape") else type(ids).__name__
            raise UserError(
                f"ids: {what}, expected one row of token ids; decode row by row"
            ) from None
        return self.tokenizer.decode(ids)

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer, preprocessor_config.json and processor_config.json, as transformers
        reads them.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(Path(folder))
        self.save_settings(Path(folder))

    def save_settings(self, folder: Path) -> None:
        """How pictures are prepared and messages written: what an adapter has beside it."""
        # transformers counts (S // patch)² + 1 placeholders, less one for strategy "default": it
        # drops CLS
        side = math.isqrt(self.tokens_per_image)
        strategy = "default" if side * side == self.tokens_per_image else "full"
        assert side * side + (strategy == "full") == self.tokens_per_image, (
            "a square, with or without CLS"
        )
        config = {
            "processor_class": "LlavaProcessor",
            "patch_size": self.image_config.size // side,
            "vision_feature_select_strategy": strategy,
            "num_additional_image_tokens": 1,
            "image_token": MARK,
            RECORD: self.template_name,
        } | ({CHUNKS: True} if self.chunks else {})
        image = {"processor_class": "LlavaProcessor"} | self.image_config.to_hf()
        write_json(folder / "preprocessor_config.json", image)
        write_json(folder / "processor_config.json", config)
        if self.template_name == "llava_hf":
            (folder / "chat_template.jinja").write_text(LLAVA_HF_JINJA, encoding="utf-8")

    # ---- parts

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.stack([to_pixels(im, self.image_config) for im in images])

    def _batch(
        self, rows: list[list[int]], images: list[Image.Image], side: str
    ) -> dict[str, torch.Tensor]:
        if side not in ("left", "right"):
            raise UserError(
                f"padding_side: {escape_controls(side)[:50]}, expected left or right; mend the call"
            )
        t = self.tokenizer
        pad = next((i for i in (t.pad_id, t.eos_id) if i is not None), 0)  # masked: any id will do
        T = max(map(len, rows))
        ids = torch.full((len(rows), T), pad, dtype=torch.int64)
        mask = torch.zeros((len(rows), T), dtype=torch.int64)
        for b, row in enumerate(rows):
            at = slice(T - len(row), T) if side == "left" else slice(0, len(row))
            ids[b, at], mask[b, at] = torch.tensor(row, dtype=torch.int64), 1
        out = {"input_ids": ids, "attention_mask": mask}
        return out | {"pixel_values": self._pixels(images)} if images else out


def _check_spacing(prompt: str) -> None:
    """Warn when USER: and ASSISTANT: lack the single spaces that were trained: other spacing, other
    ids.
    """
    right = re.sub(r"\bUSER:(?=\S)", "USER: ", prompt)
    right = re.sub(r"(?<=\S)(?<!</s>)\n?(?=ASSISTANT:)", " ", right)
    right = re.sub(r"ASSISTANT:\s+\Z", "ASSISTANT:", right)
    if right != prompt:
        show = json.dumps(right, ensure_ascii=False)
        warn(
            "prompt: its spacing differs from what the model was trained with; right is "
            f"{show[:1000]}"
        )


def _parts(messages: list[dict]) -> int:
    return sum(parts(m, f"message {i}")[0] for i, m in enumerate(messages))


def _marks(message: dict) -> int:
    content = message.get("content")
    return content.count(MARK) if message.get("role") == "user" and isinstance(content, str) else 0


def _listed(images: Pictures) -> list:
    images = [] if images is None else [images] if isinstance(images, Image.Image) else images
    if not isinstance(images, (list, tuple)):
        raise UserError(
            f"images: {type(images).__name__}, expected a PIL image, a list, or a list of lists; "
            "open it first"
        )
    return images


def _gathered(talks: list[list[dict]], images: Pictures) -> list:
    """The pictures of conversations: those given beside them, or those that stand in their image
    parts.
    """
    for talk in talks:
        check(talk)
    contents = [m["content"] for talk in talks for m in talk if isinstance(m.get("content"), list)]
    inside = [
        part["image"]
        for content in contents
        for part in content
        if isinstance(part, dict) and part.get("image") is not None
    ]
    if inside and images is not None:
        raise UserError(
            "images: were given, and the messages hold pictures, too; give them in one place"
        )
    return inside or _listed(images)


def _count(messages: list[dict], images: list) -> int | None:
    """How many pictures a conversation asks for: its image parts, else the marks in its users'
    strings, else unknown.
    """
    if not images:  # without pictures a written mark is text
        return _parts(messages)
    return _parts(messages) or sum(map(_marks, messages)) or None


def _place(messages: list[dict], pictures: int) -> list[dict]:
    """Messages whose pictures are image parts. `_by_row` has seen to it that the counts agree."""
    if not pictures or _parts(messages):
        return messages
    out, marked = [], any(map(_marks, messages))
    for m in messages:
        n = 0 if m.get("role") != "user" else _marks(m) if marked else pictures
        if n:
            texts = parts(m)[1]
            texts = [t.replace(MARK, "").strip() for t in texts] if marked else texts
            m = m | {
                "content": [{"type": "image"}] * n + [{"type": "text", "text": t} for t in texts]
            }
            pictures -= n
        out.append(m)
    return out


def _by_row(images: list, counts: list[int | None]) -> list[list[Image.Image]]:
    """Pictures of each row. `counts`: how many each row marks; None where the row takes what it is
    given.
    """
    if any(isinstance(row, (list, tuple)) for row in images):
        if len(images) != len(counts) or not all(isinstance(row, (list, tuple)) for row in images):
            raise UserError(
                f"images: {len(images)} lists for {len(counts)} prompts; give one per prompt"
            )
        rows = [list(row) for row in images]
    elif all(n is None for n in counts):
        if images and len(counts) > 1 and len(images) != len(counts):
            raise UserError(
                f"images: {len(images)} for {len(counts)} conversations that mark none; "
                "give a list per conversation"
            )
        rows = (
            [[im] for im in images] if len(counts) > 1 and images else [list(images)] * len(counts)
        )
    else:
        total = sum(n or 0 for n in counts)
        if len(images) != total:
            who = "the prompts mark" if len(counts) > 1 else "the prompt marks"
            raise UserError(_mismatch(who, total, len(images)))
        rest = iter(images)
        rows = [[next(rest) for _ in range(n or 0)] for n in counts]
    for i, (row, n) in enumerate(zip(rows, counts)):
        for im in row:
            if not isinstance(im, Image.Image):
                raise UserError(
                    f"images: {type(im).__name__} among them, expected PIL images; open it first"
                )
        if n is not None and n != len(row):
            raise UserError(_mismatch(f"prompt {i} marks", n, len(row)))
    return rows


def _mismatch(who: str, marks: int, given: int) -> str:
    return f"images: {given} given, but {who} {marks} with {MARK}; give one picture for each mark"
