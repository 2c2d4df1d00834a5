"""Prompts or messages, and images -> the ids, masks, labels and pixels that the model takes.

chat.py makes pieces of a conversation; here they become ids, and an image its placeholder tokens,
by id, so that ids, labels and masks have one length from the start. place_images.py finds the
images of each row, and image.py makes their pixels.

Two rules say how the text beside an image is tokenized:
    hf     as transformers' LlavaProcessor does with the checkpoint's tokenizer; prompts that are
           used as they are always follow it
    llava  as LLaVA's tokenizer_image_token does: each text between images by itself, so that a `▁`
           is on both sides of an image. The original does so in all its templates, so a checkpoint
           that it trained (`original`) keeps to it in every template but llava_hf
To compare:
https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/mm_utils.py
https://github.com/huggingface/transformers/blob/3833a10/src/transformers/models/llava/processing_llava.py

Shapes: B batch (rows), T tokens, N images in reading order, S pixels a side.
"""

import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from llava_min.checks.processor import (
    check_image_token,
    check_padding_side,
    check_prompts,
    check_sees,
    check_template_token,
    refuse_ids,
)
from llava_min.config import IGNORE
from llava_min.data.chat import (
    IMAGE_TOKEN,
    LLAVA_HF_JINJA,
    ORIGINAL_KEY,
    TEMPLATE_KEY,
    Piece,
    get_template,
    render,
)
from llava_min.data.image import ImageConfig, to_pixels
from llava_min.data.place_images import Images, as_list, place_images, split_images
from llava_min.data.tokenizer import Tokenizer
from llava_min.util.files import write_json


class Processor:
    """The tokenizer, the image settings and the chat template of a checkpoint.

    image_config: None for a language model alone, which takes no images.
    tokens_per_image: how many placeholders `image_token_id` one image takes, 576 for CLIP-L/14-336.
    eos_ids: what ends an answer by the model's config.
    original: the checkpoint was trained by the original LLaVA, or from one that was.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_config: ImageConfig | None,
        template_name: str,
        image_token_id: int,
        tokens_per_image: int,
        eos_ids: Sequence[int] = (),
        original: bool = False,
    ):
        self.tokenizer, self.image_config = tokenizer, image_config
        self.template_name, self.template = template_name, get_template(template_name)
        self.image_token_id, self.tokens_per_image = image_token_id, tokens_per_image
        self.eos_ids, self.original = eos_ids, original
        self.rule = "llava" if original and template_name != "llava_hf" else self.template.rule
        content = [{"type": "image"}] if image_config else "x"
        if image_config is not None:
            check_image_token(tokenizer.token_id(IMAGE_TOKEN), image_token_id)
            if tokenizer.token_id(IMAGE_TOKEN) is None:
                tokenizer.add_special(IMAGE_TOKEN, image_token_id)
        # every token that the template needs is there
        question = {"role": "user", "content": content}
        answer = {"role": "assistant", "content": "x"}
        for piece in render(template_name, [question, answer], answer=True):
            if piece.token is not None:
                self._ids_of(piece.token)

    # ---- prompts, used as they are

    def __call__(
        self,
        prompts: str | list[str],
        images: Images = None,
        *,
        padding_side: str = "left",
        parse_special: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Prompts in which `<image>` marks each image; only BOS is added, where the tokenizer does.

        Returns input_ids (B, T) int64, attention_mask (B, T) and, if there are images, pixel_values
        (N, 3, S, S). Special strings stay text unless `parse_special`. Raises UserError if marks
        and images differ in number.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        check_prompts(prompts, spaced=self.template_name in ("llava_hf", "vicuna_v1"))
        rows = split_images(as_list(images), [p.count(IMAGE_TOKEN) for p in prompts])
        ids = [self._encode_prompt(p, parse_special) for p in prompts]
        return self._batch(ids, rows, padding_side)

    def _encode_prompt(self, prompt: str, parse_special: bool) -> list[int]:
        t = self.tokenizer
        ids = [t.bos_id] if t.add_bos else []
        mark = t.added.get(IMAGE_TOKEN)
        chunks = prompt.split(IMAGE_TOKEN)
        for i, chunk in enumerate(chunks):
            if i:
                ids += self._ids_of("image")
            # the tokenizer's <image> may take the spaces beside it
            if i + 1 < len(chunks) and mark.lstrip:
                chunk = chunk.rstrip()
            if i and mark.rstrip:
                chunk = chunk.lstrip()
            if chunk:
                ids += t.encode(chunk, at="special" if i else "start", parse_special=parse_special)
        return ids

    # ---- messages, through the template

    def chat(
        self, messages: list, images: Images = None, *, padding_side: str = "left"
    ) -> dict[str, torch.Tensor]:
        """The generation prompt of one conversation, or of a list of them; returns what `__call__`
        returns.

        An image is a `{"type": "image"}` part of a user message. It may hold the image itself
        (`"image": im`, as in transformers) instead of `images`. Where no message has such a part,
        each `<image>` in a user's plain string is an image (as many as `images`); where none is
        written, the images go into the first user message. Without images, `<image>` is text.
        """
        many = isinstance(messages, list) and messages and isinstance(messages[0], list)
        talks, rows = place_images(messages if many else [messages], images)
        pieces = [render(self.template_name, talk, answer=False) for talk in talks]
        return self._batch([self.encode(p)[0] for p in pieces], rows, padding_side)

    def training(self, messages: list[dict], images: Images = None) -> dict:
        """One conversation that ends in an answer -> input_ids and labels, lists of one length,
        and pixel_values (N, 3, S, S) if there are images, which are found as in `chat`.

        Labels are -100 except on the answers and their end tokens; they are not shifted.
        """
        (messages,), (row,) = place_images([messages], images)
        ids, labels = self.encode(render(self.template_name, messages, answer=True))
        out = {"input_ids": ids, "labels": labels}
        return out | {"pixel_values": self._pixels(row)} if row else out

    def encode(self, pieces: list[Piece]) -> tuple[list[int], list[int]]:
        """A rendered conversation -> its ids and labels, of one length."""
        t, ids, labels = self.tokenizer, [], []
        if t.add_bos and pieces[0].token != "bos":
            ids, labels = [t.bos_id], [IGNORE]
        before = "start"  # what comes before a text: the tokenizer's `at`, or "image"
        for p in pieces:
            if p.token is not None:
                new = self._ids_of(p.token)
                before = {"bos": "start", "image": "image"}.get(p.token, "special")
            else:
                if self.rule == "llava":
                    new = t.encode_prefixed(p.text, at="start" if before == "image" else before)
                else:
                    new = t.encode(p.text, at="special" if before == "image" else before)
                before = "inside"
            ids += new
            labels += new if p.supervised else [IGNORE] * len(new)
        return ids, labels

    def _ids_of(self, token: str) -> list[int]:
        if token == "image":
            check_sees(self.image_config, "images")
            return [self.image_token_id] * self.tokens_per_image
        t = self.tokenizer
        named = {"bos": t.bos_id, "eos": t.eos_id}
        id = named[token] if token in named else t.token_id(token)
        check_template_token(id, token, self.template_name)
        return [id]

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.stack([to_pixels(im, self.image_config) for im in images])

    def _batch(
        self, rows: list[list[int]], images: list[list[Image.Image]], side: str
    ) -> dict[str, torch.Tensor]:
        check_padding_side(side)
        t = self.tokenizer
        pad = next((i for i in (t.pad_id, t.eos_id) if i is not None), 0)  # masked: any id will do
        T = max(map(len, rows))
        ids = torch.full((len(rows), T), pad, dtype=torch.int64)
        mask = torch.zeros((len(rows), T), dtype=torch.int64)
        for b, row in enumerate(rows):
            at = slice(T - len(row), T) if side == "left" else slice(0, len(row))
            ids[b, at], mask[b, at] = torch.tensor(row, dtype=torch.int64), 1
        out = {"input_ids": ids, "attention_mask": mask}
        flat = sum(images, [])
        return out | {"pixel_values": self._pixels(flat)} if flat else out

    # ---- back to text, and to disk

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's, the tokenizer's EOS and those of the config."""
        t, stop = self.tokenizer, self.template.stop
        id = t.token_id(stop)
        # plain's newline is text, a byte token in Llama's vocabulary
        if id is None and stop.isspace():
            id = t.encode(stop, at="inside")[-1]
        return [i for i in dict.fromkeys([id, t.eos_id, *self.eos_ids]) if i is not None]

    def suppressed_ids(self, vocab_size: int) -> list[int]:
        """Ids that have logits but are no text: the image token, and the rows of padding in a head
        of `vocab_size` rows.
        """
        image = [self.image_token_id] if self.image_token_id >= 0 else []
        return [*image, *range(len(self.tokenizer), vocab_size)]

    def decode(self, ids) -> str:
        """The text of one row of ids (a list or a 1-D tensor), without special tokens."""
        try:
            row = [operator.index(i) for i in ids]
        except (TypeError, ValueError, RuntimeError):  # an int, rows of rows, floats
            refuse_ids(ids)
        return self.tokenizer.decode(row)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer and the settings, as transformers reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(Path(folder))
        self.save_settings(Path(folder))

    def save_settings(self, folder: Path) -> None:
        """Write preprocessor_config.json and processor_config.json, and template llava_hf as jinja;
        an adapter's folder has them too.
        """
        # transformers counts (S // patch)² + 1 placeholders, and one less for "default": no CLS
        side = math.isqrt(self.tokens_per_image)
        has_cls = side * side + 1 == self.tokens_per_image
        assert side * side + has_cls == self.tokens_per_image, "a square, with or without CLS"
        config = {
            "processor_class": "LlavaProcessor",
            "patch_size": self.image_config.size // side,
            "vision_feature_select_strategy": "full" if has_cls else "default",
            "num_additional_image_tokens": 1,
            "image_token": IMAGE_TOKEN,
            TEMPLATE_KEY: self.template_name,
        }
        if self.original:
            config[ORIGINAL_KEY] = True
        image = {"processor_class": "LlavaProcessor"} | self.image_config.to_hf()
        write_json(folder / "preprocessor_config.json", image)
        write_json(folder / "processor_config.json", config)
        if self.template_name == "llava_hf":
            (folder / "chat_template.jinja").write_text(LLAVA_HF_JINJA, encoding="utf-8")
