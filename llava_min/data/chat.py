"""Chat templates as code: role/content messages → pieces, each with its supervised mark.

Second station of the data flow: `data/processor.py` turns the pieces into ids and labels in the
same pass, so nothing is ever searched for in a finished text. A piece is text, or a token that is
put in by id; text of users and data is never scanned for special strings. What is supervised is
each answer with its end token.

Sources: `vicuna_v1` and `plain`, LLaVA's conversation.py, preprocess_v1 and preprocess_plain;
`llava_hf`, the jinja text of the llava-hf checkpoints; `chatml`, `mistral`, `llama3`, the jinja
texts of Qwen1.5-Chat, Mistral-7B-Instruct-v0.2 and Meta-Llama-3-Instruct, with the pictures put
first as LLaVA does. Which of them a checkpoint wants is found in data/recognise.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llava_min.errors import UserError, escape_controls

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN_SYSTEM = "You are a helpful assistant"  # no full stop in Qwen1.5's own template


@dataclass(frozen=True)
class Piece:
    """Text, or a token: "bos", "eos", "image" (a whole picture), or the content of a special token."""

    text: str | None = None
    token: str | None = None
    supervised: bool | None = False  # None: of an answer that is not learnt, see `Turn`


@dataclass(frozen=True)
class Turn:
    """One exchange: pictures and texts of the user, then the texts of the reply (None where
    generation starts).
    """

    pictures: int
    texts: list[str]
    reply: list[str] | None
    # None where the answer is marked as not to be learnt: it has no labels, but is never joined
    # with what stands
    # beside it, so that its ids are those of an answer that is learnt, and of the prompt in the
    # evaluation.
    supervised: bool | None = True

    def question(self) -> str:
        """LLaVA's preprocess_multimodal leaves this text beside a picture: stripped, and put after
        it.
        """
        text = "".join(self.texts)
        return text.strip() if self.pictures else text

    def answer(self) -> str:
        return "".join(self.reply)


@dataclass(frozen=True)
class Template:
    """`pieces` renders (system, turns). `stop` is the content of the token that ends an answer.
    `rule` says how text is tokenized beside a picture: "own" = as the checkpoint's tokenizer does
    after a special token, "chunk" = the original's way, each chunk between pictures by itself, so
    that a `▁` stands on both sides of the picture (and what the original trained keeps to it: see
    processor.py).
    """

    pieces: Callable[[str | None, list[Turn]], Iterator[Piece]]
    stop: str
    rule: str


def _pictures(turn: Turn) -> Iterator[Piece]:
    """Each picture on its own line. LLaVA collapses several in one message to one; here all are
    kept.
    """
    for i in range(turn.pictures):
        yield Piece(token="image")
        # preprocess_multimodal strips the last newline
        if turn.question() or i + 1 < turn.pictures:
            yield Piece("\n")


def vicuna_v1(system: str | None, turns: list[Turn]) -> Iterator[Piece]:
    yield Piece((VICUNA_SYSTEM if system is None else system) + " ")
    for t in turns:
        yield Piece("USER: ")
        yield from _pictures(t)
        yield Piece(t.question() + " ASSISTANT:")
        if t.reply is not None:
            yield Piece(" " + t.answer(), supervised=t.supervised)
            # nothing between </s> and the next USER
            yield Piece(token="eos", supervised=t.supervised)


def llava_hf(system: str | None, turns: list[Turn]) -> Iterator[Piece]:
    """The jinja text of llava-hf, but for `</s>` where that one ends an answer in a space, and so
    never teaches the model to stop.
    """
    if system is not None:
        yield Piece(system + " ")
    for t in turns:
        yield Piece("USER: ")
        for _ in range(t.pictures):
            yield Piece(token="image")
            yield Piece("\n")
        yield Piece("".join(text + " " for text in t.texts) + "ASSISTANT:")
        if t.reply is not None:
            yield Piece("".join(" " + text for text in t.reply), supervised=t.supervised)
            yield Piece(token="eos", supervised=t.supervised)


def plain(system: str | None, turns: list[Turn]) -> Iterator[Piece]:
    """Projector pretraining: the picture and its caption. The question is discarded, as the
    original does.
    """
    if system or len(turns) != 1 or not turns[0].pictures:
        raise UserError(
            "template plain: takes one picture and its caption, no system message, no further "
            "turns; use another template for conversations"
        )
    for _ in range(turns[0].pictures):
        yield Piece(token="image")
    if turns[0].reply is not None:
        yield Piece(turns[0].answer() + "\n", supervised=turns[0].supervised)


def chatml(system: str | None, turns: list[Turn]) -> Iterator[Piece]:
    yield Piece(token="<|im_start|>")
    yield Piece("system\n" + (QWEN_SYSTEM if system is None else system))
    yield Piece(token="<|im_end|>")
    for t in turns:
        yield Piece("\n")
        yield Piece(token="<|im_start|>")
        yield Piece("user\n")
        yield from _pictures(t)
        yield Piece(t.question())
        yield Piece(token="<|im_end|>")
        yield Piece("\n")
        yield Piece(token="<|im_start|>")
        yield Piece("assistant\n")
        if t.reply is not None:
            yield Piece(t.answer(), supervised=t.supervised)
            yield Piece(token="<|im_end|>", supervised=t.supervised)


def mistral(system: str | None, turns: list[Turn]) -> Iterator[Piece]:
    yield Piece(token="bos")
    for i, t in enumerate(turns):
        # The jinja text writes " [INST]"; after BOS the tokenizer's own dummy prefix is that space.
        yield Piece("[INST] " if i == 0 else " [INST] ")
        if i == 0 and system is not None:
            yield Piece(system + "\n\n")
        yield from _pictures(t)
        yield Piece(t.question() + " [/INST]")
        if t.reply is not None:
            yield Piece(" " + t.answer(), supervised=t.supervised)
            yield Piece(token="eos", supervised=t.supervised)


def llama3(system: str | None, turns: list[Turn]) -> Iterator[Piece]:
    def header(role: str) -> Iterator[Piece]:
        yield Piece(token="<|start_header_id|>")
        yield Piece(role)
        yield Piece(token="<|end_header_id|>")
        yield Piece("\n\n")

    yield Piece(token="bos")
    if system is not None:
        yield from header("system")
        yield Piece(system.strip())
        yield Piece(token="<|eot_id|>")
    for t in turns:
        yield from header("user")
        yield from _pictures(t)
        yield Piece(t.question().strip())
        yield Piece(token="<|eot_id|>")
        yield from header("assistant")
        if t.reply is not None:
            yield Piece(t.answer().strip(), supervised=t.supervised)
            yield Piece(token="<|eot_id|>", supervised=t.supervised)


# the key of processor_config.json under which we write a template's name
RECORD = "llava_min_template"
CHUNKS = "llava_min_chunks"  # and the one that says that the original LLaVA trained this checkpoint
TEMPLATES = {
    "vicuna_v1": Template(vicuna_v1, "</s>", "chunk"),
    "llava_hf": Template(llava_hf, "</s>", "own"),
    # the newline is the end, as text: there is no end token
    "plain": Template(plain, "\n", "chunk"),
    "chatml": Template(chatml, "<|im_end|>", "own"),
    "mistral": Template(mistral, "</s>", "own"),
    "llama3": Template(llama3, "<|eot_id|>", "own"),
}


def template(name: str) -> Template:
    if not isinstance(name, str) or name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UserError(
            f"template: {escape_controls(name)[:100]} is not known; choose one of {known}"
        )
    return TEMPLATES[name]


# ---- messages


def check(messages: list[dict]) -> None:
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) for m in messages)
    ):
        raise UserError(
            "messages: expected a non-empty list of {role, content} objects; mend the record"
        )


def parts(message: dict, where: str = "message") -> tuple[int, list[str]]:
    """(number of pictures, texts) of one message; its content is a string or text and image parts."""
    content = message.get("content")
    if isinstance(content, str):
        return 0, [content] if content else []
    if not isinstance(content, list):
        kind = type(content).__name__
        raise UserError(
            f"{where}: content is {kind}, expected a string or a list of parts; mend it"
        )
    pictures, texts = 0, []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            pictures += 1
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise UserError(
                f"{where}: unknown part {escape_controls(part)[:100]}; "
                'expected {"type": "text", "text": "…"} or {"type": "image"}'
            )
    return pictures, texts


def exchanges(messages: list[dict], *, answer: bool) -> tuple[str | None, list[Turn]]:
    """(system text or None, turns) of messages that alternate user/assistant after an optional
    system message.

    An answer whose message says `"loss": False`, as in ms-swift, is not supervised. `answer`: the
    last message is the assistant's (training); without it the user's (generation). `UserError`
    names the message that breaks the order, has nothing in it, or puts a picture where none can
    stand.
    """
    check(messages)
    system, rest = None, list(enumerate(messages))
    if messages[0].get("role") == "system":
        pictures, texts = parts(messages[0], "message 0 (system)")
        if pictures:
            raise UserError("message 0 (system): holds a picture; put it into a user message")
        system, rest = " ".join(texts), rest[1:]
    turns, question = [], None
    for i, m in rest:
        role = "user" if question is None else "assistant"
        where = f"message {i} ({escape_controls(m.get('role'))[:20]})"
        if m.get("role") != role:
            raise UserError(
                f"{where}: expected role {role} here; user and assistant alternate, user first"
            )
        pictures, texts = parts(m, where)
        blank = not "".join(texts).strip()
        if role == "user":
            if blank and not pictures:
                raise UserError(f"{where}: is empty; write a question or add a picture")
            question = pictures, texts
        else:
            if pictures:
                raise UserError(f"{where}: holds a picture, but only user messages can; move it")
            if blank:  # it would leave nothing to learn from, and in LLaVA voids the whole record
                raise UserError(f"{where}: the answer is empty; give it text or drop the record")
            turns.append(Turn(*question, texts, None if m.get("loss") is False else True))
            question = None
    if answer and (question is not None or not turns):
        raise UserError(
            "messages: end without an answer, which training needs; add an assistant message"
        )
    if not answer:
        if question is None:
            raise UserError("messages: nothing to answer; end with a user message")
        turns.append(Turn(*question, None))
    return system, turns


def render(name: str, messages: list[dict], *, answer: bool) -> list[Piece]:
    """The pieces of a conversation in template `name`, neighbouring texts of one mark joined.

    What `answer=False` gives (the generation prompt) is a prefix of what `answer=True` gives once
    the answer is added, piece for piece: the unsupervised text before an answer always ends where
    the answer begins.
    """
    out: list[Piece] = []
    for p in template(name).pieces(*exchanges(messages, answer=answer)):
        if p.text == "":
            continue
        if (
            p.text is not None
            and out
            and out[-1].text is not None
            and out[-1].supervised == p.supervised
        ):
            p = Piece(out.pop().text + p.text, supervised=p.supervised)
        out.append(p)
    return out


# ---- for others

LLAVA_HF_JINJA = (  # what llava_hf does, for transformers' users of a folder that we save
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
