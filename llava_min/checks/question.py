"""What sample.py is asked: which of its flags go together, and the text of the question."""

from pathlib import Path
from typing import Any

from llava_min.errors import UserError


def check_flags(config: Any, stdin_closed: bool) -> None:
    """`config`: sample.py's flags. Raises UserError where they do not go together."""
    images, several = len(config.images), config.answers > 1
    if not images and not (is_gguf(config.model) and (config.prompt or config.chat)):
        check_no_image(config)
    if config.compile and several:
        raise UserError(
            "--compile: works for one answer per image; leave it out with --num-beams or "
            "--num-return-sequences above 1"
        )
    if config.prompt == "-" and stdin_closed and not config.chat:
        raise UserError("--prompt -: stdin is closed; give the question as --prompt TEXT")
    if config.chat:
        check_chat(config, images, several, stdin_closed)


def is_gguf(model: str | None) -> bool:
    """Whether it can be a language model alone."""
    return model is not None and (model.endswith(".gguf") or any(Path(model).glob("*.gguf")))


def check_no_image(vision: Any) -> None:
    """A model without `vision` is asked without an image; UserError for the others."""
    if vision is not None:
        raise UserError(
            "IMAGE: no image was given; python sample.py IMAGE [--prompt TEXT], "
            "and --help for the rest"
        )


def check_chat(config: Any, images: int, several: bool, stdin_closed: bool) -> None:
    if images > 1:
        raise UserError(
            f"--chat: {images} images were given, a conversation is about one; "
            "/image PATH changes it"
        )
    if config.json or several:
        raise UserError(
            "--chat: streams one answer; leave out --json, --num-beams and --num-return-sequences"
        )
    if stdin_closed and config.prompt is None:
        raise UserError(
            "--chat: stdin is closed, so no question can come; open it, or give --prompt TEXT"
        )
    if config.prompt == "-":
        raise UserError("--prompt -: a chat reads its questions from stdin anyway; leave it out")


def check_prompt(data: bytes, source: str) -> str:
    """The question in `data`, which came from `source`, or UserError."""
    try:
        prompt = data.decode("utf-8")
    except UnicodeError as e:
        raise UserError(f"{source}: is not UTF-8 at byte {e.start}; convert it") from None
    if not prompt.replace("<image>", "").strip():
        raise UserError(f"{source}: is empty; write a question, or leave it out")
    if (marks := prompt.count("<image>")) > 1:
        raise UserError(
            f"--prompt: {marks} times <image>, and a question is about one image; "
            "mark it once at most"
        )
    return prompt


def check_fits(max_new_tokens: int, tokens: int, context: int) -> None:
    """A question of `tokens` and its answer fit the model's context, or UserError."""
    if tokens + max_new_tokens > context:
        raise UserError(
            f"{max_new_tokens} and the question's {tokens} tokens are more than the model's "
            f"context of {context}; lower it, or shorten the question",
            "max_new_tokens",
        )
