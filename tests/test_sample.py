"""sample.py: flags, answers on stdout and the rest on stderr, the conversation; on a random model
of the test's own.
"""

import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import load_script
from PIL import Image

from llava_min.config import LlavaConfig, TextConfig, VisionConfig
from llava_min.data.image import ImageConfig
from llava_min.data.processor import Processor
from llava_min.data.tokenizer import Tokenizer
from llava_min.errors import UserError
from llava_min.generate import generate
from llava_min.load import load, random_model, save

ROOT = Path(__file__).parent.parent
sample = load_script("sample")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    import sentencepiece

    rng, out, folder = random.Random(0), io.BytesIO(), tmp_path_factory.mktemp("sample")
    lines = [
        "".join(rng.choice("abcdefgh ") for _ in range(40)) + " USER: ASSISTANT:"
        for _ in range(300)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    tokenizer = Tokenizer.load(folder)
    image = tokenizer.add_special("<image>")
    config = LlavaConfig(
        VisionConfig(16, 32, 2, 2, 28, 14, 16),
        TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
        ),
        image_token_id=image,
    )
    processor = Processor(
        tokenizer,
        ImageConfig(28, (0.5,) * 3, (0.3,) * 3, "pad"),
        "vicuna_v1",
        image,
        config.tokens_per_image,
    )
    model = random_model(config, seed=1)
    for p in model.parameters():
        p.data.mul_(2 if p.dim() > 1 else 1)  # loud enough that another image is another answer
    save(model, processor, folder / "model", "fp32")
    return folder / "model"


@pytest.fixture
def images(tmp_path) -> list[str]:
    paths = [tmp_path / "red one.png", tmp_path / "blue.png"]
    for path, colour in zip(paths, ("red", "blue")):
        Image.new("RGB", (30, 20), colour).save(path)
    return list(map(str, paths))


@pytest.fixture
def ask(model_folder, capsys, monkeypatch):
    """main with these arguments and this stdin -> (stdout, stderr)."""

    def run(*argv: str, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr(
            sys,
            "stdin",
            io.TextIOWrapper(
                io.BytesIO(stdin.encode("utf-8", "surrogateescape")), encoding="utf-8"
            ),
        )
        capsys.readouterr()
        sample.main([*argv, "--model", str(model_folder), "--max-new-tokens", "9"])
        return capsys.readouterr()

    return run


def expected(folder: Path, talk: list[dict], path: str, **options) -> str:
    model, processor = load(str(folder))
    batch = processor.chat(talk, [Image.open(path)])
    return processor.decode(
        generate(model, batch, max_new_tokens=9, eos_token_id=processor.stop_ids, **options)[0]
    )


def user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def test_one_image_streams_its_answer(ask, model_folder, images):
    out, err = ask(images[0], "--prompt", "abc?")
    assert out == expected(model_folder, [user("abc?")], images[0]) + "\n" != "\n"
    assert "tokens in" in err and "loaded" in err and "--max-new-tokens 9" in err
    assert ask(images[0], "--prompt", "-", stdin="abc?\n")[0] == out
    assert ask(images[0], "--prompt", "<image>\nabc?")[0] == out
    assert (
        ask(images[0])[0]
        == expected(model_folder, [user("Describe this image in detail.")], images[0]) + "\n"
    )


def test_several_images_and_json(ask, model_folder, images):
    out, _ = ask(*images, "--prompt", "abc?")
    want = [expected(model_folder, [user("abc?")], path).strip() for path in images]
    assert out == "".join(f"{path}: {text}\n" for path, text in zip(images, want))
    rows = [json.loads(line) for line in ask(*images, "--prompt", "abc?", "--json")[0].splitlines()]
    assert [(r["image"], r["prompt"], r["answer"]) for r in rows] == [
        (p, "abc?", w) for p, w in zip(images, want)
    ]
    assert all(r["new_tokens"] == 9 and r["stopped"] == "limit" for r in rows)
    beams = ask(images[0], "--prompt", "abc?", "--num-beams", "3", "--num-return-sequences", "2")[0]
    assert (
        beams.startswith(
            expected(model_folder, [user("abc?")], images[0], num_beams=3).strip() + "\n"
        )
        and beams.count("\n") == 2
    )
    warm = [ask(images[0], "--temperature", "2", "--seed", str(seed))[0] for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_more_images_than_one_batch(ask, images):
    many = [images[i % 2] for i in range(sample.BATCH + 3)]
    rows = [json.loads(line) for line in ask(*many, "--prompt", "abc?", "--json")[0].splitlines()]
    assert [r["image"] for r in rows] == many and len({r["answer"] for r in rows}) == 2


def test_a_conversation_reads_the_image_once(ask, model_folder, images, monkeypatch):
    from llava_min.clip import VisionTower

    seen, forward = [], VisionTower.forward
    monkeypatch.setattr(
        VisionTower, "forward", lambda self, x: seen.append(len(x)) or forward(self, x)
    )
    out, err = ask(
        images[0],
        "--chat",
        stdin=f"abc?\ndef?\n\n/help\n/nothing\n/reset\ndef?\n/image {images[1]}\nabc?\n/image none.png\nabc?\n/quit\nabc?\n",
    )
    assert seen == [1, 1]  # two images, five questions
    first = expected(model_folder, [user("abc?")], images[0])
    talk = [
        user("abc?"),
        {"role": "assistant", "content": first.strip()},
        {"role": "user", "content": "def?"},
    ]
    other = expected(model_folder, [user("abc?")], images[1])
    talk_2 = [
        user("abc?"),
        {"role": "assistant", "content": other.strip()},
        {"role": "user", "content": "abc?"},
    ]
    want = [
        first,
        expected(model_folder, talk, images[0]),
        expected(model_folder, [user("def?")], images[0]),
        other,
        expected(model_folder, talk_2, images[1]),
    ]
    assert out == "".join(text + "\n" for text in want) and first != other
    assert "/nothing: no such command" in err and "none.png: no such file" in err


def test_ctrl_c_stops_the_answer_and_not_the_conversation(ask, model_folder, images, monkeypatch):
    shown, show = [], sample.show

    def interrupted(text: str) -> None:
        show(text)
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample, "show", interrupted)
    out, err = ask(images[0], "--chat", stdin="abc?\ndef?\n")
    kept = "".join(shown[:2])
    assert "stopped" in err and out.startswith(kept)
    talk = [
        user("abc?"),
        {"role": "assistant", "content": kept.strip()},
        {"role": "user", "content": "def?"},
    ]
    assert out == kept + "\n" + expected(model_folder, talk, images[0]) + "\n"


def test_a_full_context_ends_an_answer_and_not_the_conversation(ask, images):
    out, err = ask(images[0], "--chat", stdin=f"{'abc ' * 1000}\n\udcff\nabc?\n")
    assert err.count("error:") == 2 and "context is 1024" in err and "surrogate" in err
    assert out.count("\n") == 1


def test_a_terminal_gets_no_control_characters(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, want in ((Terminal(), "a\\x1b[2J\\u202eb\n"), (io.StringIO(), "a\x1b[2J\u202eb\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        sample.show("a\x1b[2J\u202eb\n")
        assert stream.getvalue() == want


def test_an_adapter_changes_the_answer(ask, model_folder, images, tmp_path):
    from llava_min.adapter import save_adapter
    from llava_min.lora import LoRAConfig
    from llava_min.training.targets import add_lora

    model, _ = load(str(model_folder))
    config = LoRAConfig(4, 8)
    add_lora(model, config)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    (tmp_path / "adapter").mkdir()
    save_adapter(model, config, tmp_path / "adapter", str(model_folder))
    plain, tuned = ask(images[0])[0], ask(images[0], "--adapter", str(tmp_path / "adapter"))[0]
    assert plain != tuned
    for folder in ("adapter", "."):  # a run's folder has one
        with pytest.raises(
            UserError, match="holds no config.json.* give the base model, and .*adapter as adapter"
        ):
            sample.main([images[0], "--model", str(tmp_path / folder)])
    with pytest.raises(UserError, match=f"another rank or base, made for {model_folder}"):
        # the model was forgotten
        sample.main([images[0], "--adapter", str(tmp_path / "adapter")])


def test_every_flag_of_the_answer_reaches_it(ask, images, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sys.modules["llava_min.generate"],
        "generate",
        lambda model, batch, **options: seen.append((model.dtype, options)) or [[5], [5] * 9],
    )
    flags = {
        "min_new_tokens": 2,
        "num_beams": 3,
        "num_return_sequences": 2,
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 7,
        "length_penalty": 0.5,
        "repetition_penalty": 1.5,
        "seed": 4,
    }
    argv = [x for name, value in flags.items() for x in ("--" + name.replace("_", "-"), str(value))]
    out, _ = ask(images[0], "--json", "--dtype", "bf16", *argv)
    ((dtype, options),) = seen
    assert (
        dtype == torch.bfloat16
        and options.items() >= (flags | {"max_new_tokens": 9, "compile": False}).items()
    )
    assert [json.loads(line)["stopped"] for line in out.splitlines()] == ["end", "limit"]


def test_the_tiny_model_is_asked_its_own_question_and_says_what_it_is(images, capsys):
    sample.main([images[0], "--max-new-tokens", "4", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["prompt"] == sample.TINY_QUESTION and sample.TINY_NOTE in err


def test_a_image_is_turned_as_its_tag_says(ask, tmp_path):
    im, tag = Image.new("RGB", (30, 30), "red"), Image.Exif()
    im.paste("blue", (0, 0, 30, 10))
    tag[0x0112] = 3  # upside down
    im.save(tmp_path / "tagged.png", exif=tag), im.rotate(180).save(tmp_path / "turned.png")
    turned, tagged = ask(str(tmp_path / "turned.png"))[0], ask(str(tmp_path / "tagged.png"))[0]
    assert ask(str(tmp_path / "tagged.png"), "--exif")[0] == turned != tagged


def test_names_of_images_cannot_drive_the_terminal(ask, images, tmp_path):
    path = tmp_path / "a\x1b[2J.png"
    path.write_bytes(Path(images[0]).read_bytes())
    out, _ = ask(str(path), images[1])
    assert "a\\x1b[2J.png: " in out and "\x1b" not in out


def test_a_question_without_an_answer_is_forgotten(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(sample, "stream_answer", lambda *a, **k: None)
    mute = SimpleNamespace(chat=lambda *a: {}, decode=lambda ids: " ")
    assert sample.turn(None, mute, None, [user("abc?")], "def?", None, {}) == [user("abc?")]


@pytest.mark.parametrize(
    "argv, names",
    [
        ([], "IMAGE"),
        (["x.png", "--tmperature", "1"], "--temperature"),
        (["x.png", "--seed", "1", "--seed", "2"], "twice"),
        (["x.png", "--prompt", " "], "--prompt"),
        (["x.png", "--prompt", "-"], "--prompt -"),
        (["x.png", "--prompt", "<image> <image> a"], "2 times"),
        (["x.png", "y.png", "--chat"], "--chat"),
        (["x.png", "--chat", "--json"], "--chat"),
        (["x.png", "--chat", "--num-beams", "2"], "--chat"),
        (["x.png", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["x.png", "--temperature", "nan"], "--temperature"),
        (["x.png", "--temperature", "1e-40"], "--temperature: 1e-40"),
        (["x.png", "--num-beams", "100000"], "--num-beams: 100000"),
        (["red.png", "--template", ""], "--template"),
        (["x.png", "--top-p", "0"], "--top-p: 0.0"),
        (["x.png", "--top-k", "-1"], "--top-k"),
        (["x.png", "--prompt", "a\udcff"], "--prompt: is not UTF-8"),
        (["x.png", "--num-beams", "2", "--length-penalty", "1e30"], "--length-penalty"),
        (["x.png", "--num-return-sequences", "2"], "--num-return-sequences"),
        (["x.png", "--compile", "--num-beams", "2"], "--compile"),
        (["x.png", "--adapter", ""], "--adapter: is empty"),
        (
            ["red.png", "--max-new-tokens", "1000000000"],
            "--max-new-tokens: 1000000000 and the question's .* context of 1024",
        ),
        (
            ["red.png", "--max-new-tokens", "9", "--prompt", "abc " * 500],
            "--max-new-tokens: 9 and the question's",
        ),
        (["red.png", "--template", "poem"], "--template: poem"),
        (["red.png", "--device", "tpu"], "--device: 'tpu'"),
        (["red.png", "--model", "/etc"], "/etc: holds no config.json"),
        (["x.png"], "x.png: no such file"),
        (["x.png", "--model", "/none"], "x.png"),
    ],
)
def test_mistakes_are_named_before_weights_are_read(argv, names, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20), "red").save("red.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    monkeypatch.setattr(
        sys.modules["llava_min.load"], "load_weights", lambda *a: pytest.fail("weights were read")
    )
    with pytest.raises(UserError, match=names) as e:
        sample.main(argv)
    assert "\n" not in str(e.value)


def test_what_has_no_effect_is_told_once(ask, images):
    from llava_min.errors import warn_once

    warn_once.cache_clear()
    assert (
        ask(images[0], "--top-k", "3", "--chat", stdin="abc?\ndef?\n")[1].count(
            "warning: --top-k: has no effect"
        )
        == 1
    )


def test_help_is_quick_and_mistakes_exit_with_2(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = lambda *argv: subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), *argv],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    took = []
    for _ in range(3):  # the quickest of three: other work may be going on
        start = time.perf_counter()
        done = run("--help")
        took.append(time.perf_counter() - start)
    assert done.returncode == 0 and "--repetition-penalty" in done.stdout and min(took) < 1
    done = run()
    assert (
        (done.returncode, done.stdout) == (2, "")
        and done.stderr.startswith("error: IMAGE")
        and done.stderr.count("\n") == 1
    )


def test_small_files_are_read_once(ask, images, monkeypatch):
    loading, count = sys.modules["llava_min.load"], []
    for name in ("read_config", "read_processor", "collect_entries"):
        read = getattr(loading, name)
        spy = lambda *given, read=read, name=name: count.append(name) or read(*given)
        monkeypatch.setattr(loading, name, spy)
    ask(images[0])
    assert sorted(count) == ["collect_entries", "read_config", "read_processor"]
