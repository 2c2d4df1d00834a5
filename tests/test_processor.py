"""data/processor.py: ids equal to transformers' LlavaProcessor, one length of ids and labels, pictures
counted."""

import io
import json
import pathlib
import random

import numpy as np
import pytest
import torch
from PIL import Image

from llava_min.cli import UserError
from llava_min.data.chat import render
from llava_min.data.image import ImageConfig, to_pixels
from llava_min.data.processor import Processor
from llava_min.data.tokenizer import Tokenizer
from llava_min.load import TINY

CONFIG = ImageConfig(28, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "pad")
WORDS = ["A cat", "two  dogs", "it's 3", "no", "Ünïcode 猫", "x\ny", "(a, b)", " lead", "trail ", "1.5%",
         "colour"]
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
        sentence_iterator=iter(lines), model_writer=out, model_type="bpe", vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2, num_threads=1)
    return out.getvalue()


@pytest.fixture(scope="module", params=["legacy", "modern", "tokenizer.json", "bytes"])
def folder(request, sp_model, tmp_path_factory) -> pathlib.Path:
    """Tokenizer folders of each source: tokenizer.model of both legacy settings, what transformers saves of
    the second, and a byte-level one with the tokens of chatml and llama3."""
    path = tmp_path_factory.mktemp(request.param)
    return bytes_folder(path) if request.param == "bytes" else llama_folder(path, sp_model, request.param)


def llama_folder(path, model: bytes, kind: str) -> pathlib.Path:
    names = {"400": "<image>", "401": "<pad>"}
    added = {id: {"content": c, "special": True, "normalized": False} for id, c in names.items()}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": kind == "legacy", "added_tokens_decoder": added,
              "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
              "extra_special_tokens": {"image_token": "<image>"}}
    (path / "tokenizer.model").write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if kind == "tokenizer.json":
        transformers = pytest.importorskip("transformers",
                                           reason="writes the tokenizer.json that is read here")
        saved = path / "saved"
        transformers.AutoTokenizer.from_pretrained(path).save_pretrained(saved)
        assert not (saved / "tokenizer.model").exists()
        return saved
    return path


def bytes_folder(path) -> pathlib.Path:
    tk = pytest.importorskip("tokenizers", reason="trains the byte-level tokenizer")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
               "<|end_header_id|>", "<|eot_id|>"]
    t = tk.Tokenizer(tk.models.BPE())
    t.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tk.decoders.ByteLevel()
    rng = random.Random(2)
    trainer = tk.trainers.BpeTrainer(vocab_size=400, special_tokens=special,
                                     initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
                                     show_progress=False)
    t.train_from_iterator([said(rng) for _ in range(300)], trainer)
    t.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>",
              "bos_token": "<|begin_of_text|>", "pad_token": "<|endoftext|>"}
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
    transformers = pytest.importorskip("transformers", reason="transformers' LlavaProcessor is the oracle")
    p.save(where)
    hf = transformers.AutoProcessor.from_pretrained(where)
    assert type(hf).__name__ == "LlavaProcessor"
    return hf


@pytest.mark.parametrize("tokens", [4, 5])  # 2 × 2 patches, without and with CLS: strategies default and full
def test_prompts_are_encoded_as_llava_processor_does(folder, tokens, tmp_path):
    p = processor(folder, "vicuna_v1", tokens)
    hf = hf_processor(p, tmp_path)
    for seed in range(40):
        rng = random.Random(seed)
        prompts, n = [], 0
        for _ in range(rng.randint(1, 4)):
            bits = rng.choices(WORDS + SPECIALS + ["<image>", "<image>\n", " <image> "], k=rng.randint(1, 8))
            prompts.append("".join(bits) + "x")
            n += prompts[-1].count("<image>")
        images = [picture(seed + i) for i in range(n)]
        for side in ("left", "right"):
            ours = p(prompts, images, padding_side=side, parse_special=True)
            theirs = hf(text=prompts, images=images or None, padding=True, padding_side=side,
                        return_tensors="pt")
            assert ours["input_ids"].tolist() == theirs["input_ids"].tolist(), prompts
            assert ours["attention_mask"].tolist() == theirs["attention_mask"].tolist()
            assert ("pixel_values" in ours) == bool(n)
            if n and hf.image_processor.backend == "pil":
                assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
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
    transformers = pytest.importorskip("transformers", reason="transformers' tokenizer is the oracle")
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
    m = [{"role": "user", "content": "What is 猫?"}, {"role": "assistant", "content": "A cat."},
         {"role": "user", "content": "And  犬?"}]
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
        assert default["attention_mask"][0, 0] == 0 and all(torch.equal(default[k], left[k]) for k in left)


def test_ways_to_give_pictures(folder):
    p = processor(folder, "vicuna_v1")
    a, b, c = (picture(i) for i in range(3))
    flat = p(["<image> x <image>", "y", "<image> z"], [a, b, c])
    nested = p(["<image> x <image>", "y", "<image> z"], [[a, b], [], [c]])
    assert all(torch.equal(flat[k], nested[k]) for k in flat)
    assert torch.equal(p("<image> x", a)["pixel_values"], p("<image> x", [a])["pixel_values"])


@pytest.mark.parametrize("prompts, images, says", [
    ("<image> x", None, "0 given"), ("x", 1, "1 given"), ("<image><image> x", 1, "1 given"),
    (["<image> x", "y"], 2, "2 given"),
    (["<image> x", "y"], [0, 1], "prompt 0 marks 1"), (["<image> x", "y"], [2, 0], "2 given, but prompt 0 marks 1"), (["<image> x", "y"], [1], "1 lists for 2 prompts"),
    ("", None, "empty"), (" \n\t", None, "empty"), (["x", ""], None, "empty"), ([], None, "prompts"),
    (3, None, "prompts"),
    (["x", 3], None, "prompts"), ("<image> x", "path.jpg", "str"), ("<image> x", ["path.jpg"], "str"),
    ("a\ud800b", None, "surrogate"),
])
def test_what_does_not_add_up_is_one_line(prompts, images, says, sp_model, tmp_path):
    p = processor(llama_folder(tmp_path, sp_model, "modern"), "vicuna_v1")
    if isinstance(images, int):
        images = [picture(i) for i in range(images)]
    elif isinstance(images, list) and all(isinstance(n, int) for n in images):
        images = [[picture(i) for i in range(n)] for n in images]
    with pytest.raises(UserError, match=says) as e:
        p(prompts, images)
    assert str(e.value).isprintable() and len(str(e.value)) < 2000


@pytest.mark.parametrize("prompt, right", [
    ("USER:<image>\ndescribe this image.\nASSISTANT: ", "USER: <image>\\ndescribe this image. ASSISTANT:"),
    ("USER: <image>\nWhat? ASSISTANT: ", "USER: <image>\\nWhat? ASSISTANT:"),
    ("USER: <image>\nWhat?ASSISTANT:", "What? ASSISTANT:"),
    ("USER: <image>\nWhat? ASSISTANT:", None),
    ("USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: q ASSISTANT:", None),
    ("USER: <image>\nWho wrote this?\n ASSISTANT:", None), ("<image> what?", None),
    ("the SUPERUSER:x of it <image>", None),
])
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
                assert full["input_ids"][:len(prompt)] == prompt
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
                assert span[-1] in p.stop_ids and p.decode(span).strip() == answer["content"].strip()


def test_one_picture_is_the_first_users(folder):
    p = processor(folder, "vicuna_v1")
    parts = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}]
    want = p.chat(parts, picture(0))
    for content in ("What?", "<image>\nWhat?", "What?<image>", [{"type": "text", "text": "What?"}]):
        got = p.chat([{"role": "user", "content": content}], picture(0))
        assert all(torch.equal(got[k], want[k]) for k in want), content
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat"},
            {"role": "user", "content": "Why?"}]
    later = talk[:2] + [{"role": "user", "content": "<image>\nWhy?"}]
    first, second = (p.chat(m, picture(0))["input_ids"][0].tolist() for m in (talk, later))
    assert first.index(p.image_token_id) < second.index(p.image_token_id)
    assert first.count(p.image_token_id) == second.count(p.image_token_id) == p.tokens_per_image
    with pytest.raises(UserError, match="2 for 3 conversations that mark none"):
        p.chat([talk] * 3, [picture(0)] * 2)


def test_pictures_may_stand_in_the_messages(folder):
    p = processor(folder, "llava_hf")
    a, b = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 30), "blue")
    ask = lambda *parts: [{"role": "user", "content": [{"type": "text", "text": "what?"}, *({"type": "image"} | part for part in parts)]}]
    for inside, beside, images in ((ask({"image": a}, {"image": b}), ask({}, {}), [a, b]),
                                   ([ask({"image": b}), ask(), ask({"image": a})], [ask({}), ask(), ask({})], [b, a])):
        ours, theirs = p.chat(inside), p.chat(beside, images)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    said = [{"role": "assistant", "content": "a square"}]
    ours, theirs = p.training(ask({"image": a}) + said), p.training(ask({}) + said, a)
    assert ours["labels"] == theirs["labels"] and torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert torch.equal(p.chat(ask({"image": None}), a)["pixel_values"], p.chat(ask({}), a)["pixel_values"])  # as tables fill what is absent
    for talk, images, says in ((ask({"image": a}), [a], "in one place"), (ask({"image": a}), [], "in one place"), ([3], None, "expected a non-empty list"),
                               ([{"role": "user", "content": ["x"]}], None, "unknown part x"), (ask({"image": a}, {}), None, "1 given, but the prompt marks 2"),
                               (ask({"image": "a.png"}), None, "str among them")):
        with pytest.raises(UserError, match=says):
            p.chat(talk, images)


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
    out = p.training([{"role": "user", "content": "q"}, {"role": "assistant", "content": "use <image>"}],
                     picture(0))
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
    out = p.chat([two, none, one], [[picture(0), picture(1)], [], [picture(2)]], padding_side="right")
    assert (out["input_ids"] == p.image_token_id).sum(1).tolist() == [8, 0, 4]
    assert len(out["pixel_values"]) == 3
    for messages, row, images in zip([two, none, one], out["input_ids"],
                                     [[picture(0), picture(1)], [], [picture(2)]]):
        alone = p.chat(messages, images)["input_ids"][0]
        assert torch.equal(row[:len(alone)], alone)


def test_chunks_stand_between_dummy_prefixes_whatever_legacy_says(sp_model, tmp_path):
    """A ▁ on both sides of the picture in vicuna_v1; the checkpoint's own rule in llava_hf and in raw
    prompts."""
    m = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]},
         {"role": "assistant", "content": "no"}]
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
    assert processor(TINY, "plain").stop_ids == [Tokenizer.load(TINY).token_id("<0x0A>"), 2]  # as Llama spells it
    (tmp_path / "b").mkdir()
    p = processor(bytes_folder(tmp_path / "b"), "llama3")
    assert p.stop_ids == [p.tokenizer.token_id("<|eot_id|>"), p.tokenizer.token_id("<|endoftext|>")]


def test_rows_that_are_no_text_are_silent(folder):
    p = processor(folder, "llava_hf")
    n = len(p.tokenizer)
    assert p.silent_ids(n) == [p.image_token_id] and p.silent_ids(n + 2) == [p.image_token_id, n, n + 1]


def test_construction_refuses_what_cannot_work(sp_model, tmp_path):
    t = Tokenizer.load(llama_folder(tmp_path, sp_model, "modern"))
    with pytest.raises(UserError, match="template chatml: needs the token <|im_start|>".replace("|", r"\|")):
        Processor(t, CONFIG, "chatml", 400, 4)
    with pytest.raises(UserError,
                       match="image_token_index: the config says 7, the tokenizer has <image> at 400"):
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
        q = Processor(Tokenizer.load(where),
                      ImageConfig.from_hf(json.loads((where / "preprocessor_config.json").read_text())),
                      config["llava_min_template"], p.image_token_id, p.tokens_per_image)
        m = talk(random.Random(3), *((1, [1]) if name == "plain" else ()))
        images = [picture(i) for i in range(sum(part == IMAGE for x in m[::2] for part in x["content"]))]
        a, b = p.training(m, images), q.training(m, images)
        assert a["input_ids"] == b["input_ids"] and a["labels"] == b["labels"]
        assert ("pixel_values" in a) == ("pixel_values" in b) == bool(images)
        assert not images or torch.equal(a["pixel_values"], b["pixel_values"])
        assert (where / "chat_template.jinja").exists() == (name == "llava_hf")


def test_what_is_no_row_and_no_picture_is_one_line(folder):
    p = processor(folder, "vicuna_v1")
    for bad in (None, 5, [[5, 6]], torch.ones(2, 3).long(), [None], ["a"], torch.ones(3), torch.tensor(5)):
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
