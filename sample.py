"""Ask a LLaVA about pictures.

    python sample.py cat.jpg --model llava-hf/llava-1.5-7b-hf --prompt "What is on the sofa?"
    python sample.py cat.jpg dog.jpg --prompt "What animal is this?"      # one line for each: PICTURE: ANSWER
    python sample.py cat.jpg --chat                                       # a conversation about the picture

Answers go to stdout, everything else to stderr. One picture's answer streams, unless several
answers, beams or
--json are asked for.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from llava_min.errors import UserError, escape_controls, info
from llava_min.util.cli import (
    NonNegativeFloat,
    NonNegativeInt,
    PathArg,
    PositiveFloat,
    PositiveInt,
    Seed,
    flags,
    parse,
    run,
)

QUESTION = "Describe this image in detail."
TINY_QUESTION = "What is in the picture?"  # the open question of the tiny model's own task
TINY_NOTE = (
    "note: the bundled tiny model knows drawn shapes and short strings only; the 7B answers with: "
    "python sample.py PICTURE --model llava-hf/llava-1.5-7b-hf"
)
BATCH = 8  # pictures answered at a time
HELP = (
    "/image PATH: another picture   /reset: forget what was said   /quit or Ctrl-D: end   "
    "Ctrl-C: stop an answer"
)


@dataclass
class Knobs:
    images: list[str] = field(default_factory=list)  # the pictures, one answer each
    prompt: str | None = None  # the question; - reads it from stdin
    model: PathArg | None = None  # a folder, a hub id, or tiny, the bundled one
    adapter: PathArg | None = None  # a PEFT folder, applied unmerged
    max_new_tokens: PositiveInt = 256  # an answer ends here at the latest
    min_new_tokens: NonNegativeInt = 0  # and not before so many
    temperature: NonNegativeFloat = 0.0  # 0 is greedy; above it, sampling
    top_p: Annotated[float, 0.0, 1.0] = (
        1.0  # sample among the fewest tokens that hold so much probability
    )
    top_k: NonNegativeInt = 0  # sample among so many best tokens; 0 is all
    num_beams: PositiveInt = 1  # beam search
    num_return_sequences: PositiveInt = 1  # answers per picture, of beams or of sampling
    length_penalty: float = 1.0  # above 0 prefers longer beams
    repetition_penalty: PositiveFloat = 1.0  # above 1 repeats less
    seed: Seed | None = None  # makes sampling repeatable
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the weights
    device: str = "auto"  # cpu, cuda, cuda:N
    image_aspect_ratio: Literal["pad", "crop"] | None = (
        None  # pad or crop; else what the checkpoint records
    )
    template: str | None = None  # chat template; the checkpoint's if not given
    exif: bool = False  # turn pictures as their orientation tag says
    compile: bool = False  # one fused program per token: slow to start, fast after
    chat: bool = False  # a conversation about one picture
    json: bool = False  # one JSON object per answer


def main(argv: list[str]) -> None:
    knobs = parse(Knobs, argv, "Ask a LLaVA about pictures.", positional="images")
    check(knobs)
    with flags(knobs):
        answer(knobs, read_prompt(knobs))


def answer(knobs: Knobs, prompt: str | None) -> None:
    from llava_min.checks.image_file import open_image
    from llava_min.load import load, prepare
    from llava_min.sampling import Options

    names = (
        "max_new_tokens",
        "min_new_tokens",
        "num_beams",
        "num_return_sequences",
        "temperature",
        "top_p",
        "top_k",
        "length_penalty",
        "repetition_penalty",
        "seed",
    )
    options = {name: getattr(knobs, name) for name in names}
    Options(**options)  # what is wrong with them is found before weights are loaded
    images = [open_image(path, exif=knobs.exif) for path in knobs.images]
    if knobs.model is None:
        info(TINY_NOTE)
    start = time.perf_counter()
    source = knobs.model or "tiny"
    question = prompt or (TINY_QUESTION if source == "tiny" else QUESTION)
    ready = prepare(
        source,
        adapter=knobs.adapter,
        image_aspect_ratio=knobs.image_aspect_ratio,
        template=knobs.template,
    )
    processor = ready.processor
    batch = processor.chat([{"role": "user", "content": content(question)}], images[:1])
    tokens, context = batch["input_ids"].shape[1], ready.model.config.text.context
    if tokens + knobs.max_new_tokens > context:
        raise UserError(
            f"--max-new-tokens: {knobs.max_new_tokens} and the question's {tokens} tokens are more "
            "than the model's "
            f"context of {context}; lower it, or shorten the question"
        )
    model, _ = load(
        source,
        dtype=knobs.dtype,
        device=knobs.device,
        adapter=knobs.adapter,
        image_aspect_ratio=processor.image_config.aspect,
        template=processor.template_name,
    )
    dtype = str(model.dtype).removeprefix("torch.")
    info(f"loaded {source} in {time.perf_counter() - start:.1f} s: {model.device}, {dtype}")
    if knobs.compile:
        info("--compile: the first answer waits until its step is compiled")
    options |= {
        "compile": knobs.compile,
        "suppress_tokens": processor.suppressed_ids(model.config.text.vocab_size),
    }
    if knobs.chat:
        chat(model, processor, images[0], prompt, knobs.exif, options)
        return
    if len(images) * knobs.num_beams * knobs.num_return_sequences == 1 and not knobs.json:
        say(model, batch, processor, [], **options)
    else:
        answer_all(model, processor, images, question, knobs, options)


def check(knobs: Knobs) -> None:
    if not knobs.images:
        raise UserError(
            "IMAGE: no picture was given; python sample.py PICTURE [--prompt TEXT], "
            "and --help for the rest"
        )
    if knobs.chat and len(knobs.images) > 1:
        raise UserError(
            f"--chat: {len(knobs.images)} pictures were given, a conversation is about one; "
            "/image PATH changes it"
        )
    if knobs.chat and (knobs.json or knobs.num_beams > 1 or knobs.num_return_sequences > 1):
        raise UserError(
            "--chat: streams one answer; leave out --json, --num-beams and --num-return-sequences"
        )
    if knobs.compile and (knobs.num_beams > 1 or knobs.num_return_sequences > 1):
        raise UserError(
            "--compile: works for one answer per picture; leave it out with --num-beams or "
            "--num-return-sequences above 1"
        )
    if knobs.chat and sys.stdin is None and knobs.prompt is None:
        raise UserError(
            "--chat: stdin is closed, so no question can come; open it, or give --prompt TEXT"
        )
    if knobs.chat and knobs.prompt == "-":
        raise UserError("--prompt -: a chat reads its questions from stdin anyway; leave it out")


def read_prompt(knobs: Knobs) -> str | None:
    """The question, None when none was given."""
    prompt, source = knobs.prompt, "--prompt -" if knobs.prompt == "-" else "--prompt"
    try:
        if prompt == "-":
            if sys.stdin is None:
                raise UserError("--prompt -: stdin is closed; give the question as --prompt TEXT")
            prompt = sys.stdin.buffer.read().decode("utf-8").strip()
        elif prompt:
            # the bytes that were typed, whatever the locale took them for
            prompt = os.fsencode(prompt).decode("utf-8")
    except UnicodeError as e:
        raise UserError(f"{source}: is not UTF-8 at byte {e.start}; convert it") from None
    if prompt is not None and not prompt.replace("<image>", "").strip():
        raise UserError(f"{source}: is empty; write a question, or leave it out")
    if prompt is not None and prompt.count("<image>") > 1:
        raise UserError(
            f"--prompt: {prompt.count('<image>')} times <image>, and a question is about one "
            "picture; "
            "mark it once at most"
        )
    return prompt


def content(prompt: str) -> list[dict]:
    """A question about a picture. Every template puts the picture first, so a written mark says
    nothing more.
    """
    return [{"type": "image"}, {"type": "text", "text": prompt.replace("<image>", "").strip()}]


def show(text: str) -> None:
    """To stdout at once; on a terminal without what could drive it."""
    if sys.stdout.isatty():
        text = "".join(c if c in "\n\t" else escape_controls(c) for c in text)
    print(text, end="", flush=True)


def say(model: Any, batch: dict, processor: Any, ids: list[int], **options: Any) -> None:
    """Stream one answer to stdout, statistics to stderr; `ids` takes the new ids, also of a broken
    answer.
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
    end = time.perf_counter()
    show("\n")
    wait = f", the first after {first - start:.1f} s" if first else ""
    info(f"{len(ids)} tokens in {end - start:.1f} s{wait}{limit(ids, options['max_new_tokens'])}")


def limit(ids: list[int], most: int) -> str:
    return f"; stopped at --max-new-tokens {most}" if len(ids) == most else ""


def answer_all(
    model: Any, processor: Any, images: list, prompt: str, knobs: Knobs, options: dict
) -> None:
    """One picture after the other, `PICTURE: ANSWER` a line where there are several, or one JSON
    object each.
    """
    from llava_min.generate import generate

    n, start, tokens, cut = knobs.num_return_sequences, time.perf_counter(), 0, 0
    for i in range(0, len(images), BATCH):
        paths, began = knobs.images[i : i + BATCH], time.perf_counter()
        talks = [[{"role": "user", "content": content(prompt)}] for _ in paths]
        batch = processor.chat(talks, [[image] for image in images[i : i + BATCH]])
        answers = generate(model, batch, eos_token_id=processor.stop_ids, **options)
        seconds = round(time.perf_counter() - began, 3)  # of the whole batch
        for j, ids in enumerate(answers):
            path, text = paths[j // n], processor.decode(ids).strip()
            stopped = "limit" if limit(ids, knobs.max_new_tokens) else "end"
            tokens, cut = tokens + len(ids), cut + (stopped == "limit")
            if knobs.json:
                print(
                    json.dumps(
                        {
                            "image": path,
                            "prompt": prompt,
                            "answer": text,
                            "new_tokens": len(ids),
                            "stopped": stopped,
                            "seconds": seconds,
                            "batch": len(paths),
                        }
                    ),
                    flush=True,
                )
            else:
                show(f"{escape_controls(path)}: {text}\n" if len(images) > 1 else f"{text}\n")
    ended = (
        f"; {cut} of {len(images) * n} answers stopped at --max-new-tokens {knobs.max_new_tokens}"
        if cut
        else ""
    )
    info(f"{tokens} tokens in {time.perf_counter() - start:.1f} s{ended}")


# ---- the conversation


def questions(first: str | None) -> Iterator[str]:
    """Lines the user types, `first` before them, until the input ends."""
    if first is not None:
        yield first
    if sys.stdin is None:
        return
    # what is not text is then a bad question, not a fault
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
    model: Any, processor: Any, image: Any, first: str | None, exif: bool, options: dict
) -> None:
    from llava_min.checks.image_file import open_image
    from llava_min.generate import new_cache

    cache, talk = new_cache(model), []
    info(HELP)
    for line in questions(first):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/reset":
            talk = []
            info("forgot the conversation; the picture stays")
        elif command == "/image":
            try:
                path = rest.strip().strip("'\"")
                image, talk = open_image(path and str(Path(path).expanduser()), exif=exif), []
                info("a new picture, a new conversation")
            except UserError as e:
                info(f"error: {e}")
        elif command.startswith("/"):
            info(HELP if command == "/help" else f"{command}: no such command; {HELP}")
        else:
            talk = turn(model, processor, image, talk, line, cache, options)


def turn(
    model: Any,
    processor: Any,
    image: Any,
    talk: list[dict],
    question: str,
    cache: Any,
    options: dict,
) -> list[dict]:
    """Ask one question and stream its answer -> the conversation with both, or as it was without an
    answer.
    """
    asked, ids = [*talk, {"role": "user", "content": question if talk else content(question)}], []
    try:
        say(model, processor.chat(asked, [image]), processor, ids, cache=cache, **options)
    except UserError as e:
        info(f"error: {e}" + ("; /reset forgets what was said" if talk else ""))
        return talk
    except KeyboardInterrupt:
        info("stopped; what was said so far is kept")
    text = processor.decode(ids).strip()
    return [*asked, {"role": "assistant", "content": text}] if text else talk


if __name__ == "__main__":
    run(main)
