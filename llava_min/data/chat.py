"""Chat templates: role/content messages -> pieces of text and special tokens, each with whether
it is supervised.

`data/processor.py` turns the pieces into ids and labels in one pass, so no answer is searched for
in finished text. A special token is put in by its id; text of users and data is never scanned for
special strings. Supervised are the answers with their end tokens.

Sources: `vicuna_v1` and `plain` are LLaVA's conversation.py, preprocess_v1 and preprocess_plain;
`llava_hf` is the jinja text of the llava-hf checkpoints; `chatml`, `mistral` and `llama3` are those
of Qwen1.5-Chat, Mistral-7B-Instruct-v0.2 and Meta-Llama-3-Instruct, with the images first, as LLaVA
puts them. data/recognise.py finds the template of a checkpoint. To compare:
https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/train/train.py
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from llava_min.checks.chat import check_conversation, check_plain, check_template_name

IMAGE_TOKEN = "<image>"  # an image in a prompt or in a user's text
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN_SYSTEM = "You are a helpful assistant"  # no full stop in Qwen1.5's own template


@dataclass(frozen=True)
class Piece:
    """A text, or a token: "bos", "eos", "image" (a whole image), or a special token's content."""

    text: str | None = None
    token: str | None = None
    # None: of an answer that is not learned. Like False it has no labels, but it stays a piece of
    # its own, so its ids are those of a learned answer, and of the prompt in evaluation
    supervised: bool | None = False


@dataclass(frozen=True)
class Turn:
    """A user message and the answer to it."""

    images: int
    texts: list[str]
    reply: list[str] | None  # None where generation starts
    supervised: bool | None = True  # True or None, see `Piece`

    def question(self) -> str:
        """Beside an image the text is stripped and follows it: LLaVA's preprocess_multimodal."""
        text = "".join(self.texts)
        return text.strip() if self.images else text

    def answer(self) -> str:
        return "".join(self.reply)


@dataclass(frozen=True)
class Template:
    """`render` makes pieces of (system text, turns). `stop`: what ends an answer.

    `rule` says how the text beside an image is tokenized, see processor.py:
        hf     as transformers does with the checkpoint's tokenizer
        llava  as LLaVA does: each text between images by itself, so a `▁` is on both sides of one
    """

    render: Callable[[str | None, list[Turn]], Iterator[Piece]]
    stop: str
    rule: str


def image_lines(turn: Turn) -> Iterator[Piece]:
    """Each image on its own line. LLaVA collapses several in one message to one; here all are
    kept.
    """
    for i in range(turn.images):
        yield Piece(token="image")
        # preprocess_multimodal strips the last newline
        if turn.question() or i + 1 < turn.images:
            yield Piece("\n")


def vicuna_v1(system: str | None, turns: list[Turn]) -> Iterator[Piece]:
    yield Piece((VICUNA_SYSTEM if system is None else system) + " ")
    for t in turns:
        yield Piece("USER: ")
        yield from image_lines(t)
        yield Piece(t.question() + " ASSISTANT:")
        if t.reply is not None:
            yield Piece(" " + t.answer(), supervised=t.supervised)
            # nothing between </s> and the next USER
            yield Piece(token="eos", supervised=t.supervised)


def llava_hf(system: str | None, turns: list[Turn]) -> Iterator[Piece]:
    """llava-hf's jinja text ends an answer with a space, and so never teaches the model to stop;
    here it ends with `</s>`.
    """
    if system is not None:
        yield Piece(system + " ")
    for t in turns:
        yield Piece("USER: ")
        for _ in range(t.images):
            yield Piece(token="image")
            yield Piece("\n")
        yield Piece("".join(text + " " for text in t.texts) + "ASSISTANT:")
        if t.reply is not None:
            yield Piece("".join(" " + text for text in t.reply), supervised=t.supervised)
            yield Piece(token="eos", supervised=t.supervised)


def plain(system: str | None, turns: list[Turn]) -> Iterator[Piece]:
    """Projector pretraining: an image and its caption. The question is dropped, as in LLaVA."""
    check_plain(system, turns)
    for _ in range(turns[0].images):
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
        yield from image_lines(t)
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
        # the jinja text writes " [INST]"; after BOS the tokenizer's dummy prefix is that space
        yield Piece("[INST] " if i == 0 else " [INST] ")
        if i == 0 and system is not None:
            yield Piece(system + "\n\n")
        yield from image_lines(t)
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
        yield from image_lines(t)
        yield Piece(t.question().strip())
        yield Piece(token="<|eot_id|>")
        yield from header("assistant")
        if t.reply is not None:
            yield Piece(t.answer().strip(), supervised=t.supervised)
            yield Piece(token="<|eot_id|>", supervised=t.supervised)


TEMPLATES = {
    "vicuna_v1": Template(vicuna_v1, "</s>", "llava"),
    "llava_hf": Template(llava_hf, "</s>", "hf"),
    "plain": Template(plain, "\n", "llava"),  # the newline is text: there is no end token
    "chatml": Template(chatml, "<|im_end|>", "hf"),
    "mistral": Template(mistral, "</s>", "hf"),
    "llama3": Template(llama3, "<|eot_id|>", "hf"),
}


def get_template(name: str) -> Template:
    check_template_name(name, list(TEMPLATES))
    return TEMPLATES[name]


# ---- messages


def split_content(message: dict) -> tuple[int, list[str]]:
    """(number of images, texts) of a message; its content is a string, or text and image parts."""
    content = message["content"]
    if isinstance(content, str):
        return 0, [content] if content else []
    return count_images([message]), [part["text"] for part in content if part["type"] == "text"]


def count_images(messages: list[dict]) -> int:
    contents = [m["content"] for m in messages if not isinstance(m["content"], str)]
    return sum(part["type"] == "image" for content in contents for part in content)


def text_of(message: dict) -> str:
    return "".join(split_content(message)[1])


def marks_to_parts(messages: list[dict]) -> list[dict]:
    """Each `<image>` in a user's plain string becomes an image part, before the stripped text."""
    out = []
    for m in messages:
        text = m["content"]
        is_users = m.get("role") == "user" and isinstance(text, str)
        if is_users and (n := text.count(IMAGE_TOKEN)):
            text = text.replace(IMAGE_TOKEN, "").strip()
            texts = [{"type": "text", "text": text}] if text else []
            m = m | {"content": [{"type": "image"}] * n + texts}
        out.append(m)
    return out


def to_turns(messages: list[dict], *, answer: bool) -> tuple[str | None, list[Turn]]:
    """(system text or None, turns). `answer`: they end with an answer (training), or with a
    question (generation).

    An answer whose message says `"loss": False`, as in ms-swift, is not supervised. Raises
    UserError for other messages than those that alternate, user first.
    """
    check_conversation(messages, answer=answer)
    system, turns = None, []
    if messages[0]["role"] == "system":
        system, messages = " ".join(split_content(messages[0])[1]), messages[1:]
    for question, reply in zip_longest(messages[0::2], messages[1::2]):
        images, texts = split_content(question)
        if reply is None:
            turns.append(Turn(images, texts, None))
        else:
            supervised = None if reply.get("loss") is False else True
            turns.append(Turn(images, texts, split_content(reply)[1], supervised))
    return system, turns


def render(name: str, messages: list[dict], *, answer: bool) -> list[Piece]:
    """The pieces of a conversation in template `name`; adjacent texts are one piece if both are
    supervised, or neither.

    What `answer=False` gives (the generation prompt) is a prefix of what `answer=True` gives once
    the answer is added, piece for piece: text that is not supervised ends where an answer begins.
    """
    template, out = get_template(name), []
    for p in template.render(*to_turns(messages, answer=answer)):
        if p.text == "":
            continue
        last = out[-1] if out else Piece()
        if None not in (p.text, last.text) and last.supervised == p.supervised:
            out[-1] = Piece(last.text + p.text, supervised=p.supervised)
        else:
            out.append(p)
    return out


# ---- what a saved folder says

TEMPLATE_KEY = "llava_min_template"  # of processor_config.json: the template's name
ORIGINAL_KEY = "llava_min_chunks"  # the original LLaVA trained this checkpoint
# template llava_hf for transformers
LLAVA_HF_JINJA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
