"""data/processor.py: ids equal to transformers' LlavaProcessor, one length of ids and labels,
pictures counted.
"""

import io
import json
import pathlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXT, hf_config, their_model, write_folder
from PIL import Image

import llava_min
from llava_min.config import LlavaConfig
from llava_min.data.chat import LLAVA_HF_JINJA, render
from llava_min.data.from_folder import read_processor
from llava_min.data.image import ImageConfig, to_pixels
from llava_min.data.processor import Processor
from llava_min.data.tokenizer import Tokenizer
from llava_min.errors import UserError
from llava_min.load import TINY

CONFIG = ImageConfig(
    28, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "pad"
)
WORDS = [
    "A cat",
    "two  dogs",
    "it's 3",
    "no",
    "Ünïcode 猫",
    "x\ny",
    "(a, b)",
    " lead",
    "trail ",
    "1.5%",
    "colour",
]
SPECIALS = ["<s>", "</s>", "<unk>", "<pad>", "ASSISTANT:", "<image", "USER: "]
IMAGE = {"type": "image"}


def picture(seed: int) -> Image.Image:
    rng = random.Random(seed)
    return Image.new("RGB", (rng.randint(5, 60), rng.randint(5, 60)), tuple(rng.randbytes(3)))


def said(rng: random.Random) -> str:
    n = rng.randint(1, 6)
    return "".join(rng.choice(WORDS) + rng.choice([" ", ". ", ", "]) for _ in range(n)).strip()


def talk(rng: random.Random, turns: int | None = None, pictures=(0, 1, 2)) -> list[dict]:
    out = []
    for _ in range(turns or rng.randint(1, 3)):
        question = [{"type": "text", "text": said(rng) + "?"}] + [IMAGE] * rng.choice(pictures)
        out += [{"role": "user", "content": question}, {"role": "assistant", "content": said(rng)}]
    return out


def spell(pieces, bos="", eos="</s>") -> str:
    names = {"bos": bos, "eos": eos, "image": "<image>"}
    return "".join(p.text if p.token is None else names.get(p.token, p.token) for p in pieces)


@pytest.fixture(scope="module")
def sp_model() -> bytes:
    """A small SentencePiece model with Llama's settings."""
    sentencepiece = pytest.importorskip("sentencepiece")
    rng, out = random.Random(1), io.BytesIO()
    lines = [said(rng) + " USER: ASSISTANT: [INST] [/INST]" * (i % 3 == 0) for i in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


@pytest.fixture(scope="module", params=["legacy", "modern", "tokenizer.json", "bytes"])
def folder(request, sp_model, tmp_path_factory) -> pathlib.Path:
    """Tokenizer folders of each source: tokenizer.model of both legacy settings, what transformers
    saves of the second, and a byte-level one with the tokens of chatml and llama3.
    """
    path = tmp_path_factory.mktemp(request.param)
    return (
        bytes_folder(path)
        if request.param == "bytes"
        else llama_folder(path, sp_model, request.param)
    )


def llama_folder(path, model: bytes, kind: str) -> pathlib.Path:
    names = {"400": "<image>", "401": "<pad>"}
    added = {id: {"content": c, "special": True, "normalized": False} for id, c in names.items()}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": kind == "legacy",
        "added_tokens_decoder": added,
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    (path / "tokenizer.model").write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if kind == "tokenizer.json":
        transformers = pytest.importorskip(
            "transformers", reason="writes the tokenizer.json that is read here"
        )
        saved = path / "saved"
        transformers.AutoTokenizer.from_pretrained(path).save_pretrained(saved)
        assert not (saved / "tokenizer.model").exists()
        return saved
    return path


def bytes_folder(path) -> pathlib.Path:
    tk = pytest.importorskip("tokenizers", reason="trains the byte-level tokenizer")
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    t = tk.Tokenizer(tk.models.BPE())
    t.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tk.decoders.ByteLevel()
    rng = random.Random(2)
    trainer = tk.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator([said(rng) for _ in range(300)], trainer)
    t.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|begin_of_text|>",
        "pad_token": "<|endoftext|>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def processor(folder, template: str, tokens: int = 4) -> Processor:
    t = Tokenizer.load(folder)
    id = t.token_id("<image>")
    return Processor(t, CONFIG, template, len(t) if id is None else id, tokens)


def templates_of(folder) -> list[str]:
    path = folder / "tokenizer.json"
    if path.exists() and "im_start" in path.read_text():
        return ["vicuna_v1", "plain", "chatml", "llama3"]
    return ["vicuna_v1", "llava_hf", "plain", "mistral"]


# ---- against transformers


def hf_processor(p: Processor, where: pathlib.Path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers' LlavaProcessor is the oracle"
    )
    p.save(where)
    hf = transformers.AutoProcessor.from_pretrained(where)
    assert type(hf).__name__ == "LlavaProcessor"
    return hf


# 2 × 2 patches, without and with CLS: strategies default and full
@pytest.mark.parametrize("tokens", [4, 5])
def test_prompts_are_encoded_as_llava_processor_does(folder, tokens, tmp_path):
    p = processor(folder, "vicuna_v1", tokens)
    hf = hf_processor(p, tmp_path)
    for seed in range(40):
        rng = random.Random(seed)
        prompts, n = [], 0
        for _ in range(rng.randint(1, 4)):
            bits = rng.choices(
                WORDS + SPECIALS + ["<image>", "<image>\n", " <image> "], k=rng.randint(1, 8)
            )
            prompts.append("".join(bits) + "x")
            n += prompts[-1].count("<image>")
        images = [picture(seed + i) for i in range(n)]
        for side in ("left", "right"):
            ours = p(prompts, images, padding_side=side, parse_special=True)
            theirs = hf(
                text=prompts,
                images=images or None,
                padding=True,
                padding_side=side,
                return_tensors="pt",
            )
            assert ours["input_ids"].tolist() == theirs["input_ids"].tolist(), prompts
            assert ours["attention_mask"].tolist() == theirs["attention_mask"].tolist()
            assert ("pixel_values" in ours) == bool(n)
            if n and hf.image_processor.backend == "pil":
                assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize(
    "flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}], ids=str
)
def test_a_mark_that_takes_the_space_beside_it(flags, sp_model, tmp_path):
    path = llama_folder(tmp_path, sp_model, "modern")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["400"] |= flags
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    p = processor(path, "mistral")
    hf = hf_processor(p, tmp_path / "saved")
    for prompt in (" a <image> b ", "  no picture  ", " <image>  <image> "):
        images = [picture(i) for i in range(prompt.count("<image>"))]
        theirs = hf(text=prompt, images=images or None, return_tensors="pt")
        assert torch.equal(p(prompt, images)["input_ids"], theirs["input_ids"]), prompt


def test_special_strings_stay_text_unless_asked(folder):
    p = processor(folder, "vicuna_v1")
    eos = p.tokenizer.token(p.tokenizer.eos_id)
    ids = p(f"say {eos} now")["input_ids"][0].tolist()
    assert p.tokenizer.eos_id not in ids and eos in p.decode(ids)
    assert p.tokenizer.eos_id in p(f"say {eos} now", parse_special=True)["input_ids"][0].tolist()


def test_chat_is_transformers_chat(sp_model, tmp_path):
    """llava_hf, one exchange: the same ids as apply_chat_template of the folder we save."""
    p = processor(llama_folder(tmp_path, sp_model, "modern"), "llava_hf")
    hf = hf_processor(p, tmp_path / "saved")
    for seed in range(30):
        m = talk(random.Random(seed), 1)[:1]
        images = [picture(i) for i in range(m[0]["content"].count(IMAGE))]
        text = hf.apply_chat_template(m, add_generation_prompt=True)
        theirs = hf(text=text, images=images or None, return_tensors="pt")
        assert torch.equal(p.chat(m, images)["input_ids"], theirs["input_ids"])


def test_byte_level_templates_are_the_rendered_text_with_specials_parsed(tmp_path):
    tk = pytest.importorskip("tokenizers", reason="tokenizers is the oracle")
    path = bytes_folder(tmp_path)
    oracle = tk.Tokenizer.from_file(str(path / "tokenizer.json"))
    for name in ("chatml", "llama3"):
        p = processor(path, name)
        oracle.add_special_tokens([tk.AddedToken("<image>", special=True)])
        for seed in range(40):
            m = talk(random.Random(seed))
            text = spell(render(name, m, answer=True), bos="<|begin_of_text|>")
            text = text.replace("<image>", "<image>" * p.tokens_per_image)
            ids = oracle.encode(text, add_special_tokens=False).ids
            n = text.count("<image>") // p.tokens_per_image
            assert p.training(m, [picture(i) for i in range(n)])["input_ids"] == ids, text


def test_mistral_ids_are_the_rendered_text_with_specials_parsed(sp_model, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers' tokenizer is the oracle"
    )
    path = llama_folder(tmp_path, sp_model, "modern")
    p, hf = processor(path, "mistral"), transformers.AutoTokenizer.from_pretrained(path)
    for seed in range(40):
        m = talk(random.Random(seed), pictures=[0])
        text = spell(render("mistral", m, answer=True), bos="<s> ")
        assert p.training(m)["input_ids"] == hf(text, add_special_tokens=False).input_ids, text


def test_qwens_own_tokenizer(tmp_path):
    assets = pathlib.Path(__file__).parents[2] / "shared" / "assets" / "tokenizers"
    if not (assets / "qwen1_5_tokenizer.json").exists():
        pytest.skip("needs qwen1_5_tokenizer.json in ../shared/assets/tokenizers")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((assets / f"qwen1_5_{name}").read_bytes())
    p, hf = processor(tmp_path, "chatml"), transformers.AutoTokenizer.from_pretrained(tmp_path)
    m = [
        {"role": "user", "content": "What is 猫?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And  犬?"},
    ]
    theirs = hf.apply_chat_template(m, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert p.chat(m)["input_ids"][0].tolist() == theirs
    assert set(p.stop_ids) == {151645}  # <|im_end|>, which is also this checkpoint's EOS


# ---- the layout of what it gives


def test_a_picture_becomes_its_placeholders(folder):
    p = processor(folder, "vicuna_v1", 9)
    images = [picture(i) for i in range(3)]
    out = p(["a <image> b <image>", "<image>", "no picture"], images)
    assert (out["input_ids"] == p.image_token_id).sum(1).tolist() == [18, 9, 0]
    assert out["input_ids"].dtype == out["attention_mask"].dtype == torch.int64
    assert out["pixel_values"].dtype == torch.float32
    assert torch.equal(out["pixel_values"], torch.stack([to_pixels(im, CONFIG) for im in images]))
    assert "pixel_values" not in p("no picture") and p("no picture")["input_ids"].ndim == 2


def test_padding_goes_to_the_side_asked_for(folder):
    p = processor(folder, "vicuna_v1")
    texts = ["a", "a longer text than that", "colour colour"]
    single = [p(t)["input_ids"][0].tolist() for t in texts]
    for side in ("left", "right"):
        out = p(texts, padding_side=side)
        for ids, mask, alone in zip(out["input_ids"], out["attention_mask"], single):
            assert ids[mask.bool()].tolist() == alone

            pads, ones = [0] * (len(ids) - len(alone)), [1] * len(alone)
            assert mask.tolist() == (pads + ones if side == "left" else ones + pads)
    with pytest.raises(UserError, match="padding_side"):
        p("a", padding_side="middle")


def test_padding_goes_to_the_left_unless_asked(folder):
    p = processor(folder, "vicuna_v1")
    texts = ["a", "a longer text than that"]
    talks = [[{"role": "user", "content": text}] for text in texts]
    for call, given in ((p, texts), (p.chat, talks)):
        default, left = call(given), call(given, padding_side="left")
        assert default["attention_mask"][0, 0] == 0 and all(
            torch.equal(default[k], left[k]) for k in left
        )


def test_ways_to_give_pictures(folder):
    p = processor(folder, "vicuna_v1")
    a, b, c = (picture(i) for i in range(3))
    flat = p(["<image> x <image>", "y", "<image> z"], [a, b, c])
    nested = p(["<image> x <image>", "y", "<image> z"], [[a, b], [], [c]])
    assert all(torch.equal(flat[k], nested[k]) for k in flat)
    assert torch.equal(p("<image> x", a)["pixel_values"], p("<image> x", [a])["pixel_values"])


@pytest.mark.parametrize(
    "prompts, images, says",
    [
        ("<image> x", None, "0 given"),
        ("x", 1, "1 given"),
        ("<image><image> x", 1, "1 given"),
        (["<image> x", "y"], 2, "2 given"),
        (["<image> x", "y"], [0, 1], "prompt 0 marks 1"),
        (["<image> x", "y"], [2, 0], "2 given, but prompt 0 marks 1"),
        (["<image> x", "y"], [1], "1 lists for 2 prompts"),
        ("", None, "empty"),
        (" \n\t", None, "empty"),
        (["x", ""], None, "empty"),
        ([], None, "prompts"),
        (3, None, "prompts"),
        (["x", 3], None, "prompts"),
        ("<image> x", "path.jpg", "str"),
        ("<image> x", ["path.jpg"], "str"),
        ("a\ud800b", None, "surrogate"),
    ],
)
def test_what_does_not_add_up_is_one_line(prompts, images, says, sp_model, tmp_path):
    p = processor(llama_folder(tmp_path, sp_model, "modern"), "vicuna_v1")
    if isinstance(images, int):
        images = [picture(i) for i in range(images)]
    elif isinstance(images, list) and all(isinstance(n, int) for n in images):
        images = [[picture(i) for i in range(n)] for n in images]
    with pytest.raises(UserError, match=says) as e:
        p(prompts, images)
    assert str(e.value).isprintable() and len(str(e.value)) < 2000


@pytest.mark.parametrize(
    "prompt, right",
    [
        (
            "USER:<image>\ndescribe this image.\nASSISTANT: ",
            "USER: <image>\\ndescribe this image. ASSISTANT:",
        ),
        ("USER: <image>\nWhat? ASSISTANT: ", "USER: <image>\\nWhat? ASSISTANT:"),
        ("USER: <image>\nWhat?ASSISTANT:", "What? ASSISTANT:"),
        ("USER: <image>\nWhat? ASSISTANT:", None),
        ("USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: q ASSISTANT:", None),
        ("USER: <image>\nWho wrote this?\n ASSISTANT:", None),
        ("<image> what?", None),
        ("the SUPERUSER:x of it <image>", None),
    ],
)
def test_spacing_of_raw_prompts(prompt, right, sp_model, tmp_path, capsys):
    path = llama_folder(tmp_path, sp_model, "modern")
    for name in ("llava_hf", "vicuna_v1"):
        processor(path, name)(prompt, picture(0))
        err = capsys.readouterr().err
        if right is None:
            assert err == ""
        else:
            assert right in err.replace("\\\\n", "\\n") and err.count("\n") == 1, err
    processor(path, "mistral")(prompt, picture(0))
    assert capsys.readouterr().err == ""


# ---- conversations


def test_what_generation_feeds_is_a_prefix_of_what_training_feeds(folder):
    for name in templates_of(folder):
        p = processor(folder, name)
        for seed in range(30):
            m = talk(random.Random(seed), *((1, [1]) if name == "plain" else ()))
            n = sum(part == IMAGE for q in m[::2] for part in q["content"])
            full = p.training(m, [picture(i) for i in range(n)])
            for end in range(1, len(m), 2):
                k = sum(part == IMAGE for q in m[:end:2] for part in q["content"])
                prompt = p.chat(m[:end], [picture(i) for i in range(k)])["input_ids"][0].tolist()
                assert full["input_ids"][: len(prompt)] == prompt
                assert full["labels"][len(prompt) - 1] == -100 and full["labels"][len(prompt)] >= 0


def test_labels_are_the_answers_and_their_stops(folder):
    for name in templates_of(folder):
        p = processor(folder, name)
        for seed in range(30):
            m = talk(random.Random(seed), *((1, [1]) if name == "plain" else (None, [0, 1])))
            n = sum(part == IMAGE for q in m[::2] for part in q["content"])
            out = p.training(m, [picture(i) for i in range(n)])
            ids, labels = out["input_ids"], out["labels"]
            assert len(ids) == len(labels) and all(b in (-100, a) for a, b in zip(ids, labels))
            assert p.image_token_id not in labels and ("pixel_values" in out) == bool(n)
            spans, span = [], []
            for label in labels + [-100]:
                if label != -100:
                    span.append(label)
                elif span:
                    spans, span = spans + [span], []
            assert len(spans) == len(m) // 2
            for span, answer in zip(spans, m[1::2]):
                assert (
                    span[-1] in p.stop_ids and p.decode(span).strip() == answer["content"].strip()
                )


def test_one_picture_is_the_first_users(folder):
    p = processor(folder, "vicuna_v1")
    parts = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}]
    want = p.chat(parts, picture(0))
    for content in ("What?", "<image>\nWhat?", "What?<image>", [{"type": "text", "text": "What?"}]):
        got = p.chat([{"role": "user", "content": content}], picture(0))
        assert all(torch.equal(got[k], want[k]) for k in want), content
    talk = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A cat"},
        {"role": "user", "content": "Why?"},
    ]
    later = talk[:2] + [{"role": "user", "content": "<image>\nWhy?"}]
    first, second = (p.chat(m, picture(0))["input_ids"][0].tolist() for m in (talk, later))
    assert first.index(p.image_token_id) < second.index(p.image_token_id)
    assert first.count(p.image_token_id) == second.count(p.image_token_id) == p.tokens_per_image
    with pytest.raises(UserError, match="2 for 3 conversations that mark none"):
        p.chat([talk] * 3, [picture(0)] * 2)


def test_pictures_may_stand_in_the_messages(folder):
    p = processor(folder, "llava_hf")
    a, b = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 30), "blue")
    ask = lambda *parts: [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what?"},
                *({"type": "image"} | part for part in parts),
            ],
        }
    ]
    for inside, beside, images in (
        (ask({"image": a}, {"image": b}), ask({}, {}), [a, b]),
        ([ask({"image": b}), ask(), ask({"image": a})], [ask({}), ask(), ask({})], [b, a]),
    ):
        ours, theirs = p.chat(inside), p.chat(beside, images)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    said = [{"role": "assistant", "content": "a square"}]
    ours, theirs = p.training(ask({"image": a}) + said), p.training(ask({}) + said, a)
    assert ours["labels"] == theirs["labels"] and torch.equal(
        ours["pixel_values"], theirs["pixel_values"]
    )
    # as tables fill what is absent
    assert torch.equal(
        p.chat(ask({"image": None}), a)["pixel_values"], p.chat(ask({}), a)["pixel_values"]
    )
    for talk, images, says in (
        (ask({"image": a}), [a], "in one place"),
        (ask({"image": a}), [], "in one place"),
        ([3], None, "expected a non-empty list"),
        ([{"role": "user", "content": ["x"]}], None, "unknown part x"),
        (ask({"image": a}, {}), None, "1 given, but the prompt marks 2"),
        (ask({"image": "a.png"}), None, "str among them"),
    ):
        with pytest.raises(UserError, match=says):
            p.chat(talk, images)


@pytest.mark.parametrize("name", ["llava_hf", "vicuna_v1"])
def test_a_mark_alone_is_asked_as_it_is_trained(folder, name):
    """An `<image>` without text has the same ids as the image part that a dataset makes of it."""
    p = processor(folder, name)
    mark, part = ([{"role": "user", "content": content}] for content in ("<image>", [IMAGE]))
    assert torch.equal(p.chat(mark, picture(0))["input_ids"], p.chat(part, picture(0))["input_ids"])


def test_marks_in_text_are_pictures_only_where_nothing_else_says_where_they_go(folder):
    p = processor(folder, "vicuna_v1")
    literal = "what does the <image> tag do?"
    count = lambda out: (out["input_ids"] == p.image_token_id).sum().item()
    assert count(p.chat([{"role": "user", "content": literal}])) == 0  # no picture: it is text
    parts = [{"role": "user", "content": [IMAGE, {"type": "text", "text": literal}]}]
    out = p.chat(parts, picture(0))
    assert count(out) == p.tokens_per_image and "<image> tag" in p.decode(out["input_ids"][0])
    with pytest.raises(UserError, match="1 given, but the prompt marks 2"):
        p.chat([{"role": "user", "content": "<image> or <image>?"}], picture(0))
    with pytest.raises(UserError, match="0 given"):
        p.chat(parts)
    with pytest.raises(UserError, match="2 given"):
        p.training(parts + [{"role": "assistant", "content": "x"}], [picture(0), picture(1)])
    # an answer is never searched
    out = p.training(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "use <image>"}],
        picture(0),
    )
    assert out["labels"].count(p.image_token_id) == 0
    assert out["input_ids"].count(p.image_token_id) == p.tokens_per_image


def test_batches_of_conversations(folder):
    p = processor(folder, "vicuna_v1")
    one = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]}]
    two, none = [{"role": "user", "content": "And this"}], [{"role": "user", "content": "Hello"}]
    out = p.chat([two, two], [picture(0), picture(1)])
    assert (out["input_ids"] == p.image_token_id).sum(1).tolist() == [4, 4]
    out = p.chat([one, none], picture(0))
    assert (out["input_ids"] == p.image_token_id).sum(1).tolist() == [4, 0]
    out = p.chat(
        [two, none, one], [[picture(0), picture(1)], [], [picture(2)]], padding_side="right"
    )
    assert (out["input_ids"] == p.image_token_id).sum(1).tolist() == [8, 0, 4]
    assert len(out["pixel_values"]) == 3
    for messages, row, images in zip(
        [two, none, one], out["input_ids"], [[picture(0), picture(1)], [], [picture(2)]]
    ):
        alone = p.chat(messages, images)["input_ids"][0]
        assert torch.equal(row[: len(alone)], alone)


def test_chunks_stand_between_dummy_prefixes_whatever_legacy_says(sp_model, tmp_path):
    """A ▁ on both sides of the picture in vicuna_v1; the checkpoint's own rule in llava_hf and in
    raw prompts.
    """
    m = [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "no"},
    ]
    for kind in ("legacy", "modern"):
        (tmp_path / kind).mkdir()
        path = llama_folder(tmp_path / kind, sp_model, kind)
        for name in ("vicuna_v1", "llava_hf"):
            p = processor(path, name)
            space, image = p.tokenizer.token_id("▁"), p.image_token_id
            ids = p.training(m, picture(0))["input_ids"]
            first, last = ids.index(image), len(ids) - 1 - ids[::-1].index(image)
            assert ids[first - 1] == space
            assert (ids[last + 1] == space) == (name == "vicuna_v1" or kind == "legacy")


def test_stop_ids(sp_model, tmp_path):
    path = llama_folder(tmp_path, sp_model, "modern")
    t = Tokenizer.load(path)
    for name in ("vicuna_v1", "llava_hf", "mistral"):
        assert processor(path, name).stop_ids == [2]
    assert processor(path, "plain").stop_ids == [t.encode("a cat\n")[-1], 2]
    # as Llama spells it
    assert processor(TINY, "plain").stop_ids == [Tokenizer.load(TINY).token_id("<0x0A>"), 2]
    (tmp_path / "b").mkdir()
    p = processor(bytes_folder(tmp_path / "b"), "llama3")
    assert p.stop_ids == [p.tokenizer.token_id("<|eot_id|>"), p.tokenizer.token_id("<|endoftext|>")]


def test_rows_that_are_no_text_are_silent(folder):
    p = processor(folder, "llava_hf")
    n = len(p.tokenizer)
    assert p.suppressed_ids(n) == [p.image_token_id] and p.suppressed_ids(n + 2) == [
        p.image_token_id,
        n,
        n + 1,
    ]


def test_construction_refuses_what_cannot_work(sp_model, tmp_path):
    t = Tokenizer.load(llama_folder(tmp_path, sp_model, "modern"))
    with pytest.raises(
        UserError, match="template: chatml needs the token <|im_start|>".replace("|", r"\|")
    ):
        Processor(t, CONFIG, "chatml", 400, 4)
    with pytest.raises(
        UserError, match="image_token_index: the config says 7, the tokenizer has <image> at 400"
    ):
        Processor(t, CONFIG, "llava_hf", 7, 4)
    with pytest.raises(UserError, match="template"):
        Processor(t, CONFIG, "nonsense", 400, 4)


def test_saved_is_loaded(folder, tmp_path):
    for name in templates_of(folder):
        where = tmp_path / name
        p = processor(folder, name)
        p.save(where)
        config = json.loads((where / "processor_config.json").read_text())
        assert config["llava_min_template"] == name and config["patch_size"] == 14
        q = Processor(
            Tokenizer.load(where),
            ImageConfig.from_hf(json.loads((where / "preprocessor_config.json").read_text())),
            config["llava_min_template"],
            p.image_token_id,
            p.tokens_per_image,
        )
        m = talk(random.Random(3), *((1, [1]) if name == "plain" else ()))
        images = [
            picture(i) for i in range(sum(part == IMAGE for x in m[::2] for part in x["content"]))
        ]
        a, b = p.training(m, images), q.training(m, images)
        assert a["input_ids"] == b["input_ids"] and a["labels"] == b["labels"]
        assert ("pixel_values" in a) == ("pixel_values" in b) == bool(images)
        assert not images or torch.equal(a["pixel_values"], b["pixel_values"])
        assert (where / "chat_template.jinja").exists() == (name == "llava_hf")


def test_what_is_no_row_and_no_picture_is_one_line(folder):
    p = processor(folder, "vicuna_v1")
    for bad in (
        None,
        5,
        [[5, 6]],
        torch.ones(2, 3).long(),
        [None],
        ["a"],
        torch.ones(3),
        torch.tensor(5),
    ):
        with pytest.raises(UserError, match="ids: .*one row"):
            p.decode(bad)
    talk = [{"role": "user", "content": "What?"}]
    for bad in (np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8), {"a": 1}, 0):
        for call in (p.chat, p.training):
            with pytest.raises(UserError, match=f"images: {type(bad).__name__}"):
                call(talk, bad)


def test_decode_leaves_special_tokens_out(folder):
    p = processor(folder, "vicuna_v1")
    out = p("<image> two dogs", picture(0))
    for ids in (out["input_ids"][0], out["input_ids"][0].tolist()):
        assert p.decode(ids).strip() == "two dogs"


# ---- whole folders, of each generation of llava-hf's files

GENERATIONS = ["4.36", "4.44", "4.46", "5"]
SPACES = ["prepend", "always", "first"]
ADDED = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 400, "<pad>": 401}
PARTS = WORDS + [
    "USER: ",
    " ASSISTANT:",
    "</s>",
    "<s>",
    "<image>",
    "<image>\n",
    " <image> ",
    "  ",
    "   ",
    " ",
    "</s>USER: ",
    "\n",
    "\n\n",
    "▁",
    " ▁",
    "<unk>",
    "<pad>",
]


def tokenizer_spec(model: bytes, spaces: str, merges: type) -> dict:
    """tokenizer.json as transformers 4 converted it: merges ranked by score."""
    sp = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
    halves = [
        (p[:i], p[i:])
        for p, id in sorted(vocab.items(), key=lambda x: -sp.get_score(x[1]))
        if not sp.is_byte(id)
        for i in range(1, len(p))
        if {p[:i], p[i:]} <= vocab.keys()
    ]
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    text, bos = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
    )
    normalizers = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
    }
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": spaces, "split": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": content} | flags for content, id in ADDED.items()],
        "normalizer": normalizers if spaces == "prepend" else None,
        "pre_tokenizer": None if spaces == "prepend" else metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in halves]
            if merges is str
            else [list(pair) for pair in halves],
        },
    }


def published(
    path: pathlib.Path, model: bytes, generation: str, spaces: str, legacy: bool = False
) -> pathlib.Path:
    """All the small files of a llava-hf folder, as transformers of that version left them:
    config.json, which decides how the others are read, stands beside them. tokenizer.model came
    with the first alone.
    """
    path.mkdir(parents=True)
    write = lambda name, value: (path / name).write_text(
        json.dumps(value, ensure_ascii=False), encoding="utf-8"
    )
    text = TEXT | {"vocab_size": 448, "pad_token_id": 401}
    write("config.json", hf_config(image_token_index=400, pad_token_id=401) | {"text_config": text})
    write(
        "tokenizer.json",
        tokenizer_spec(model, spaces, str if generation in ("4.36", "4.44") else list),
    )
    write("preprocessor_config.json", CONFIG.to_hf() | {"processor_class": "LlavaProcessor"})
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = names | {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "sp_model_kwargs": {},
        "model_max_length": 1000000000000000019884624838656,
        "use_default_system_prompt": False,
        "trust_remote_code": False,
        "added_tokens_decoder": {
            str(id): {"content": c, "special": True} | flags for c, id in ADDED.items()
        },
    }
    write(
        "special_tokens_map.json",
        {name: {"content": content} | flags for name, content in names.items()},
    )
    write("added_tokens.json", {"<image>": 400, "<pad>": 401})
    jinja = {"chat_template": LLAVA_HF_JINJA}
    if generation == "4.36":
        (path / "tokenizer.model").write_bytes(model)
    else:
        config["add_prefix_space"] = None
        write("chat_template.json", jinja)
        write(
            "processor_config.json",
            {
                "processor_class": "LlavaProcessor",
                "image_token": "<image>",
                "patch_size": 14,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            },
        )
    if generation in ("4.46", "5"):
        (path / "chat_template.jinja").write_text(LLAVA_HF_JINJA)
        config |= {"image_token": "<image>", "extra_special_tokens": {"image_token": "<image>"}}
    write("tokenizer_config.json", config)
    if generation == "5":
        transformers = pytest.importorskip("transformers", reason="it is to write the folder")
        transformers.AutoProcessor.from_pretrained(path).save_pretrained(path / "5")
        assert not (path / "5" / "special_tokens_map.json").exists()
        (path / "5" / "config.json").write_bytes((path / "config.json").read_bytes())
        return path / "5"
    return path


def read(folder: pathlib.Path) -> Processor:
    return read_processor(
        folder,
        LlavaConfig.from_hf(json.loads((folder / "config.json").read_text())),
        None,
        None,
        None,
    )


def prompts(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PARTS, k=rng.randint(1, 10))) + "x" for _ in range(n)]


def agree(folder: pathlib.Path, texts: list[str]) -> list[list[int]]:
    """Ids of `texts`, equal here and in transformers' AutoProcessor, each reading the whole folder."""
    transformers = pytest.importorskip(
        "transformers", reason="AutoProcessor on the whole folder is the oracle"
    )
    ours, hf = read(folder), transformers.AutoProcessor.from_pretrained(folder)
    pictures = [text.count("<image>") for text in texts]
    ids = [ours._encode_prompt(text, True) for text in texts]
    # as LlavaProcessor does
    expanded = [text.replace("<image>", "<image>" * ours.tokens_per_image) for text in texts]
    for text, a, b in zip(texts, ids, hf.tokenizer(expanded)["input_ids"]):
        assert a == b, text
    if hf.patch_size:  # the oldest folders leave it to the caller
        for text, n in zip(texts[:50], pictures):
            images = [picture(i) for i in range(n)]
            theirs = hf(text=text, images=images or None, return_tensors="pt")["input_ids"]
            assert torch.equal(ours(text, images, parse_special=True)["input_ids"], theirs), text
    plain = [text for text in texts[:200] if "<image>" not in text]
    for text, row in zip(plain, hf.tokenizer(plain, split_special_tokens=True)["input_ids"]):
        assert row == ours._encode_prompt(text, False), text
    for row in ids[:200]:
        assert ours.decode(row) == hf.decode(row, skip_special_tokens=True)
    return ids


@pytest.mark.parametrize("legacy", [False, True], ids=["modern", "legacy"])
@pytest.mark.parametrize("spaces", SPACES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_llavas_tokenizer_json_is_obeyed_as_written(
    generation, spaces, legacy, sp_model, tmp_path
):
    """Whatever `legacy` says beside it; and what we save reads the same, with its config.json and
    without.
    """
    folder = published(tmp_path / "from", sp_model, generation, spaces, legacy)
    texts = prompts(1, 300 if legacy else 2000)
    ids = agree(folder, texts)
    p = read(folder)
    p.save(tmp_path / "alone")
    again = processor(tmp_path / "alone", "llava_hf")
    assert [again._encode_prompt(text, True) for text in texts] == ids
    transformers = pytest.importorskip("transformers")
    alone = transformers.AutoTokenizer.from_pretrained(tmp_path / "alone")
    rows = alone([text.replace("<image>", "<image>" * 4) for text in texts[:300]]).input_ids
    for text, row, theirs in zip(texts, ids, rows):
        assert theirs == row, text
    (tmp_path / "alone" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert agree(tmp_path / "alone", texts) == ids


def test_the_published_folder_has_a_space_on_both_sides_of_a_picture(sp_model, tmp_path):
    folder = published(tmp_path / "from", sp_model, "4.46", "prepend")
    p, space = read(folder), Tokenizer.load(folder).token_id("▁")
    assert p.template_name == "llava_hf"
    talk = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}]
    for ids in (p("USER: <image>\nWhat? ASSISTANT:", picture(0)), p.chat(talk, picture(0))):
        ids = ids["input_ids"][0].tolist()
        first, newline = ids.index(400), p.tokenizer.token_id("\n")
        assert ids[first - 1] == space and ids[first + 4 : first + 6] == [space, newline]
    row = p.training(talk + [{"role": "assistant", "content": "no"}], picture(0))["input_ids"]
    assert row[: len(ids)] == ids
    end = p.tokenizer.encode("</s>USER", parse_special=True)
    assert end == [2, *p.tokenizer.encode("USER")] and p.tokenizer.encode(
        "USER"
    ) != p.tokenizer.encode("USER", at="inside")


@pytest.mark.parametrize("kind", ["prepend", "model"])
def test_load_and_save_keep_every_id(kind, sp_model, tmp_path):
    """`llava_min.load` and `llava_min.save` of a whole checkpoint; `model`: a tokenizer.model
    without tokenizer.json.
    """
    theirs = their_model(
        image_token_index=400,
        pad_token_id=401,
        text_config=TEXT | {"vocab_size": 448, "pad_token_id": 401},
    )
    folder = write_folder(tmp_path / "weights", sp_model, theirs)
    small = published(tmp_path / "from", sp_model, "4.36", "prepend")
    for path in small.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if kind == "model":
        (folder / "tokenizer.json").unlink()
    texts = prompts(2, 2000)
    model, p = llava_min.load(folder, dtype="fp32", device="cpu")
    ids = [p._encode_prompt(text, True) for text in texts]
    if kind == "prepend":
        assert ids == agree(folder, texts)
    llava_min.save(model, p, tmp_path / "to")
    assert agree(tmp_path / "to", texts) == ids


@pytest.mark.parametrize(
    "model_type", [None, "llava", "mistral", "llama", "llava_llama", "llava_mistral"]
)
@pytest.mark.parametrize("spaces", SPACES)
def test_which_class_reads_a_folder(model_type, spaces, sp_model, tmp_path):
    """As transformers decides: by config.json's model_type, without one by the class that
    tokenizer_config.json names.
    """
    transformers = pytest.importorskip("transformers", reason="the reference")
    folder = published(tmp_path / "from", sp_model, "4.44", spaces)
    (folder / "config.json").unlink()
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in prompts(3, 300):
        assert ours.encode(text, parse_special=True) == theirs.encode(
            text, add_special_tokens=False
        ), text
    # to stand beside a LLaVA's config.json, as a model that is built from it does
    ours.save(tmp_path / "to")
    (tmp_path / "to" / "config.json").write_text('{"model_type": "llava"}')
    again, theirs = (
        Tokenizer.load(tmp_path / "to"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "to"),
    )
    for text in prompts(4, 300):
        ids = ours.encode(text, parse_special=True)
        assert (
            again.encode(text, parse_special=True)
            == theirs.encode(text, add_special_tokens=False)
            == ids
        ), text


@pytest.mark.parametrize("says", [True, False])
def test_bos_is_what_tokenizer_json_says(says, sp_model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference")
    folder = published(tmp_path / "from", sp_model, "4.46", "prepend")
    spec, config = (
        json.loads((folder / name).read_text())
        for name in ("tokenizer.json", "tokenizer_config.json")
    )
    config["add_bos_token"] = not says
    if not says:
        spec["post_processor"]["single"].pop(0)
    for name, value in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(value))
    ids = read(folder)("two dogs")["input_ids"][0].tolist()
    assert (ids[0] == 1) == says and ids == transformers.AutoProcessor.from_pretrained(
        folder
    ).tokenizer("two dogs").input_ids


def test_no_dummy_space_survives_a_save(sp_model, tmp_path):
    """add_prefix_space false beside a tokenizer.model, saved beside a LLaVA's config.json:
    transformers obeys our tokenizer.json.
    """
    path = llama_folder(tmp_path, sp_model, "modern")
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"add_prefix_space": False}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = [processor(path, "llava_hf")._encode_prompt(text, True) for text in prompts(5, 300)]
    folder = published(tmp_path / "to", sp_model, "4.46", "prepend")
    for name in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink()
    processor(path, "llava_hf").save(folder)
    assert agree(folder, prompts(5, 300)) == ids
    for p in (processor(path, "llava_hf"), read(folder)):
        assert p.decode(p.tokenizer.encode("  lead")) == "  lead"


def test_the_real_tokenizer_through_the_processor(tmp_path):
    """llama.cpp's vectors and the spaces that SentencePiece keeps apart, from a tokenizer.model
    alone and from what we save.
    """
    assets = pathlib.Path(__file__).parents[2] / "shared" / "assets" / "tokenizers"
    if not (assets / "llama_tokenizer.model").exists():
        pytest.skip("needs llama_tokenizer.model in ../shared/assets/tokenizers")
    transformers = pytest.importorskip("transformers", reason="it is to read what we save")
    (tmp_path / "tokenizer.model").write_bytes((assets / "llama_tokenizer.model").read_bytes())
    p = processor(tmp_path, "llava_hf")
    p.save(tmp_path / "to")
    q, hf = (
        processor(tmp_path / "to", "llava_hf"),
        transformers.AutoProcessor.from_pretrained(tmp_path / "to"),
    )
    with open(assets / "ggml-vocab-llama-spm.gguf.inp", encoding="utf-8", newline="") as f:
        texts = f.read().split("\n__ggml_vocab_test__\n")
    vectors = [
        [int(i) for i in line.split()]
        for line in (assets / "ggml-vocab-llama-spm.gguf.out").read_text().split("\n")
    ]
    texts, vectors = texts + ["x  cat"], vectors + [[921, 29871, 6635]]
    for text, ids in zip(texts, vectors):
        assert hf.tokenizer(text).input_ids == [1] + ids, text
        for one in (p, q) if text.strip() else ():  # an empty prompt is refused
            assert one(text)["input_ids"][0].tolist() == [1] + ids, text
    prompt = "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: more"
    ids = q(prompt, picture(0), parse_special=True)["input_ids"][0].tolist()
    assert ids[:10] == [1, 3148, 1001, 29901, 29871, *[32000] * 4, 29871] and ids[-6:-2] == [
        29889,
        2,
        3148,
        1001,
    ]


# ---- the original's layout

ORIGINAL = dict(
    model_type="llava_mistral",
    mm_vision_tower="openai/clip-vit-large-patch14-336",
    mm_projector_type="mlp2x_gelu",
    image_aspect_ratio="pad",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=400,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
)


@pytest.mark.parametrize(
    "model_type, name", [("llava_mistral", "mistral"), ("llava_llama", "vicuna_v1")]
)
def test_the_original_tokenizes_by_chunks_in_every_mode(model_type, name, sp_model, tmp_path):
    """tokenizer_image_token: SentencePiece on each chunk between pictures, and so it stays in what
    we save.
    """
    sentencepiece = pytest.importorskip("sentencepiece")
    path = llama_folder(tmp_path, sp_model, "modern")
    config = json.loads((path / "tokenizer_config.json").read_text())
    for key in ("added_tokens_decoder", "pad_token", "extra_special_tokens"):
        del config[key]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps(ORIGINAL | {"model_type": model_type}))
    shape = LlavaConfig.from_hf(json.loads((path / "config.json").read_text()))
    p = read_processor(path, shape, None, None, None)
    p.save(tmp_path / "saved")
    hf = replace(shape, vision_source=None)
    (tmp_path / "saved" / "config.json").write_text(json.dumps(hf.to_hf()))
    q = read_processor(tmp_path / "saved", hf, None, None, None)
    assert p.template_name == q.template_name == name
    sp = sentencepiece.SentencePieceProcessor(model_proto=sp_model)
    for seed in range(40):
        m = talk(random.Random(seed), 1)[:1]
        chunks = spell(render(name, m, answer=False)).split("<image>")
        ids = [1]
        for i, chunk in enumerate(chunks):
            ids += [400] * (p.tokens_per_image * (i > 0)) + sp.encode(chunk)
        images = [picture(i) for i in range(len(chunks) - 1)]
        for one in (p, q):
            assert one.chat(m, images)["input_ids"][0].tolist() == ids
    own = read_processor(path, shape, None, None, "llava_hf")  # transformers' rule, whoever trained
    assert (own.rule, p.rule) == ("hf", "llava") and processor(path, "mistral").rule == "hf"
    (tmp_path / "saved" / "processor_config.json").write_text('{"llava_min_chunks": "yes"}')
    with pytest.raises(
        UserError,
        match="processor_config.json: llava_min_chunks is .*yes.*, expected true or false",
    ):
        read_processor(tmp_path / "saved", hf, None, None, None)
