"""Ask a LLaVA about images.

    python sample.py cat.jpg --model llava-hf/llava-1.5-7b-hf --prompt "What is on the sofa?"
    python sample.py cat.jpg dog.jpg --prompt "What animal is this?"  # a line each: IMAGE: ANSWER
    python sample.py cat.jpg --chat                                   # a conversation about it
    python sample.py --model SmolLM2.gguf --prompt "Who are you?"     # a language model alone

Answers go to stdout, everything else to stderr. The answer about a single image is streamed, unless
several answers, beams or --json are asked for.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_min.checks.question import check_fits, check_flags, check_no_image, check_prompt
from llava_min.errors import UserError, escape_controls, info
from llava_min.options import NumericOptions
from llava_min.util.cli import PathArg, flags, parse
from llava_min.util.script import run

QUESTION = "Describe this image in detail."
TINY_QUESTION = "What is in the picture?"  # the open question of the tiny model's own task
TINY_NOTE = (
    "note: the bundled tiny model knows drawn shapes and short strings only; the 7B answers with: "
    "python sample.py IMAGE --model llava-hf/llava-1.5-7b-hf"
)
BATCH = 8  # images answered at a time
HELP = (
    "/image PATH: another image   /reset: forget the conversation   /quit or Ctrl-D: end   "
    "Ctrl-C: stop an answer"
)


@dataclass(frozen=True)
class Config(NumericOptions):
    images: list[str] = field(default_factory=list)  # the images, one answer each
    prompt: str | None = None  # the question; - reads it from stdin
    model: PathArg | None = None  # a folder, a hub id, or tiny, the bundled one
    adapter: PathArg | None = None  # a PEFT folder, applied unmerged
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the weights
    quantize: str | None = None  # the decoder to int8, int4, hqq8 … hqq1, nf4, fp4 or w8a8
    device: str = "auto"  # cpu, cuda, cuda:N
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # the checkpoint's if not given
    template: str | None = None  # chat template; the checkpoint's if not given
    exif: bool = False  # rotate images as their orientation tag says
    compile: bool = False  # one fused program per token: slow to start, fast after
    chat: bool = False  # a conversation about one image
    json: bool = False  # one JSON object per answer

    @property
    def answers(self) -> int:
        """Answers or beams of an image."""
        return max(self.num_beams, self.num_return_sequences)


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "Ask a LLaVA about images.", positional="images")
    check_flags(config, sys.stdin is None)
    with flags(config):
        answer(config, read_prompt(config))


def answer(config: Config, prompt: str | None) -> None:
    from llava_min.checks.image_file import open_image
    from llava_min.load import open_checkpoint

    # read everything that is small, so that a mistake is found before weights are loaded
    images = [open_image(path, exif=config.exif) for path in config.images]
    if config.model is None:
        info(TINY_NOTE)
    start = time.perf_counter()
    source = config.model or "tiny"
    question = prompt or (TINY_QUESTION if source == "tiny" else QUESTION)
    checkpoint = open_checkpoint(
        source,
        adapter=config.adapter,
        image_aspect_ratio=config.image_aspect_ratio,
        template=config.template,
    )
    processor = checkpoint.processor
    if not images:
        check_no_image(checkpoint.config.vision)
    talk = [{"role": "user", "content": content(question, bool(images))}]
    batch = processor.chat(talk, images[:1])
    context = checkpoint.config.text.context
    check_fits(config.max_new_tokens, batch["input_ids"].shape[1], context)
    model, _ = checkpoint.load(config.dtype, config.device, config.quantize)
    dtype = str(model.dtype).removeprefix("torch.")
    stored = model.config.quantization
    kind = f"{dtype}, {stored.method}" if stored else dtype
    info(f"loaded {source} in {time.perf_counter() - start:.1f} s: {model.device}, {kind}")
    if config.compile:
        info("--compile: the first answer waits until its step is compiled")
    options = config.numbers() | {
        "compile": config.compile,
        "suppress_tokens": processor.suppressed_ids(model.config.text.vocab_size),
    }
    if config.chat:
        chat(model, processor, images[:1], prompt, config.exif, options)
    elif max(len(images), 1) * config.answers == 1 and not config.json:
        stream_answer(model, batch, processor, [], **options)
    else:
        answer_all(model, processor, images, question, config, options)


def read_prompt(config: Config) -> str | None:
    """The question, None when none was given."""
    prompt = config.prompt
    if prompt is None:
        return None
    if prompt == "-":
        return check_prompt(sys.stdin.buffer.read(), "--prompt -").strip()
    # the bytes as typed, whatever the locale made of them
    return check_prompt(os.fsencode(prompt), "--prompt")


def content(prompt: str, about_image: bool) -> list[dict]:
    """A question, about an image or not. Every template puts it first, so <image> is dropped."""
    text = {"type": "text", "text": prompt.replace("<image>", "").strip()}
    return [{"type": "image"}, text] if about_image else [text]


def show(text: str) -> None:
    """To stdout at once; on a terminal with its control characters escaped."""
    if sys.stdout.isatty():
        text = "".join(c if c in "\n\t" else escape_controls(c) for c in text)
    print(text, end="", flush=True)


def stream_answer(model: Any, batch: dict, processor: Any, ids: list[int], **options: Any) -> None:
    """Stream one answer to stdout, statistics to stderr. `ids` collects the new ids, also those of
    an interrupted answer.
    """
    from llava_min.generate import stream

    start, first = time.perf_counter(), None
    try:
        for piece in stream(model, batch, processor, ids=ids, **options):
            first = first or time.perf_counter()
            show(piece)
    except KeyboardInterrupt:
        show("\n")
        raise
    end, most = time.perf_counter(), options["max_new_tokens"]
    show("\n")
    wait = f", the first after {first - start:.1f} s" if first else ""
    limit = f"; stopped at --max-new-tokens {most}" if len(ids) == most else ""
    info(f"{len(ids)} tokens in {end - start:.1f} s{wait}{limit}")


def answer_all(
    model: Any, processor: Any, images: list, prompt: str, config: Config, options: dict
) -> None:
    """Batch by batch: the answer of one image, lines of `IMAGE: ANSWER` for several, or JSON."""
    from llava_min.generate import generate

    n, start, tokens, cut = config.num_return_sequences, time.perf_counter(), 0, 0
    asked = config.images or [None]  # None: a text alone
    for i in range(0, len(asked), BATCH):
        paths, began = asked[i : i + BATCH], time.perf_counter()
        talks = [[{"role": "user", "content": content(prompt, bool(images))}] for _ in paths]
        batch = processor.chat(talks, [[image] for image in images[i : i + BATCH]] or None)
        answers = generate(model, batch, eos_token_id=processor.stop_ids, **options)
        seconds = round(time.perf_counter() - began, 3)  # of the whole batch
        for j, ids in enumerate(answers):
            path, text = paths[j // n], processor.decode(ids).strip()
            at_limit = len(ids) == config.max_new_tokens
            tokens, cut = tokens + len(ids), cut + at_limit
            row = {"image": path, "prompt": prompt, "answer": text, "new_tokens": len(ids)}
            row |= {"stopped": "limit" if at_limit else "end"}
            row |= {"seconds": seconds, "batch": len(paths)}
            if config.json:
                print(json.dumps(row), flush=True)
            else:
                show(f"{escape_controls(path)}: {text}\n" if len(images) > 1 else f"{text}\n")
    stopped = f"; {cut} of {len(asked) * n} answers stopped at --max-new-tokens"
    limit = f"{stopped} {config.max_new_tokens}" if cut else ""
    info(f"{tokens} tokens in {time.perf_counter() - start:.1f} s{limit}")


# ---- the conversation


def questions(first: str | None) -> Iterator[str]:
    """`first`, then the lines that the user types until the input ends."""
    if first is not None:
        yield first
    if sys.stdin is None:
        return
    # bytes that are not text then make a bad question, not a traceback
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    while True:
        try:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            info(" (/quit or Ctrl-D ends)")
            continue
        if not line:
            return
        if line.strip():
            yield line.strip()


def chat(
    model: Any, processor: Any, images: list, first: str | None, exif: bool, options: dict
) -> None:
    """A conversation about `images`, which are one or none."""
    from llava_min.checks.image_file import open_image
    from llava_min.checks.processor import check_sees
    from llava_min.generate import new_cache

    cache, talk = new_cache(model), []
    info(HELP)
    for line in questions(first):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/reset":
            talk = []
            info("forgot the conversation; the image stays")
        elif command == "/image":
            try:
                check_sees(processor.image_config, "/image")
                path = rest.strip().strip("'\"")
                images, talk = [open_image(path and str(Path(path).expanduser()), exif=exif)], []
                info("a new image, a new conversation")
            except UserError as e:
                info(f"error: {e}")
        elif command.startswith("/"):
            info(HELP if command == "/help" else f"{command}: no such command; {HELP}")
        else:
            talk = turn(model, processor, images, talk, line, cache, options)


def turn(
    model: Any, processor: Any, images: list, talk: list, question: str, cache: Any, options: dict
) -> list[dict]:
    """Ask one question and stream its answer -> the conversation with both; without an answer, the
    conversation as it was.
    """
    ids, text = [], question if talk else content(question, bool(images))
    asked = [*talk, {"role": "user", "content": text}]
    try:
        batch = processor.chat(asked, images)
        stream_answer(model, batch, processor, ids, cache=cache, **options)
    except UserError as e:
        info(f"error: {e}" + ("; /reset forgets the conversation" if talk else ""))
        return talk
    except KeyboardInterrupt:
        info("stopped; the answer so far is kept")
    text = processor.decode(ids).strip()
    return [*asked, {"role": "assistant", "content": text}] if text else talk


if __name__ == "__main__":
    run(main)
