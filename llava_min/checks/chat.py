"""What a conversation must look like before a chat template may write it."""

from typing import Any

from llava_min.errors import UserError, escape_controls, shorten


def check_messages(messages: Any) -> None:
    """A non-empty list of messages, each with text or known parts as its content, or UserError."""
    check_list(messages)
    for i, message in enumerate(messages):
        check_content(message, name_of(i, message))


def check_conversation(messages: Any, *, answer: bool) -> None:
    """User and assistant alternate after an optional system message, or UserError.

    `answer`: the last message is the assistant's (training); without it, the user's (generation).
    The error names the message that breaks the order, is empty, or has an image where none may be.
    """
    check_list(messages)
    rest = list(enumerate(messages))
    if messages[0].get("role") == "system":
        check_content(messages[0], "message 0 (system)")
        if has_image(messages[0]):
            raise UserError("message 0 (system): holds an image; put it into a user message")
        del rest[0]
    for n, (i, message) in enumerate(rest):
        check_turn(message, ("user", "assistant")[n % 2], name_of(i, message))
    if answer and (not rest or len(rest) % 2):
        raise UserError(
            "end without an answer, which training needs; add an assistant message", "messages"
        )
    if not answer and len(rest) % 2 == 0:
        raise UserError("nothing to answer; end with a user message", "messages")


def name_of(i: int, message: dict) -> str:
    return f"message {i} ({escape_controls(message.get('role'))[:20]})"


def check_list(messages: Any) -> None:
    is_list = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    if not is_list or not messages:
        raise UserError(
            "expected a non-empty list of {role, content} objects; fix the record", "messages"
        )


def check_content(message: dict, where: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        kind = type(content).__name__
        raise UserError(f"{where}: content is {kind}, expected a string or a list of parts; fix it")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise UserError(
                f"{where}: unknown part {shorten(part, 100)}; "
                'expected {"type": "text", "text": "…"} or {"type": "image"}'
            )


def check_turn(message: dict, role: str, where: str) -> None:
    if message.get("role") != role:
        raise UserError(
            f"{where}: expected role {role} here; user and assistant alternate, user first"
        )
    check_content(message, where)
    if role == "user" and is_blank(message) and not has_image(message):
        raise UserError(f"{where}: is empty; write a question or add an image")
    if role == "assistant" and has_image(message):
        raise UserError(f"{where}: holds an image, but only user messages can; move it")
    # it would leave nothing to learn from, and in LLaVA voids the whole record
    if role == "assistant" and is_blank(message):
        raise UserError(f"{where}: the answer is empty; give it text or drop the record")


def has_image(message: dict) -> bool:
    content = message["content"]
    return isinstance(content, list) and any(part["type"] == "image" for part in content)


def is_blank(message: dict) -> bool:
    content = message["content"]
    if isinstance(content, str):
        return not content.strip()
    return not any(part["text"].strip() for part in content if part["type"] == "text")


def check_plain(system: str | None, turns: list) -> None:
    if system or len(turns) != 1 or not turns[0].images:
        raise UserError(
            "plain takes one image and its caption, no system message, no further turns; use "
            "another for conversations",
            "template",
        )


def check_template_name(name: Any, known: list[str]) -> None:
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"{escape_controls(name)[:100]} is not known; choose one of {', '.join(known)}",
            "template",
        )
