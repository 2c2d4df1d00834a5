"""What the tests of the spine share: tiny random models of every kind that is read, ours and
transformers'.
"""

import importlib.util
import io
import json
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: no test reaches for the network
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, as do what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from llava_min.config import LlavaConfig
from llava_min.llava import Llava

PIECES = 320  # of the tokenizer; <image> and <pad> follow
IMAGE, PAD, VOCAB = PIECES, PIECES + 1, 384
PATCHES = 4
VISION = dict(
    model_type="clip_vision_model",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
    projection_dim=16,
)
TEXT = dict(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    pad_token_id=PAD,
)
KINDS = {  # every decoder that is read, as changes of TEXT
    "llama": {},
    "mistral": dict(model_type="mistral", num_key_value_heads=2, rope_theta=1e6, sliding_window=64),
    "qwen2": dict(
        model_type="qwen2",
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=[2, 3],
    ),
    "llama3": dict(num_key_value_heads=1, rope_theta=500000.0),
    "head_dim": dict(head_dim=16, num_key_value_heads=2),
}


def load_script(name: str):
    """The module of train.py, eval.py or sample.py, which lie beside the package and not in it."""
    spec = importlib.util.spec_from_file_location(
        f"{name}_script", Path(__file__).parent.parent / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def hf_config(kind: str = "llama", **top) -> dict:
    """The config.json of a tiny llava-hf model."""
    text = {**TEXT, **KINDS[kind]}
    return {
        "model_type": "llava",
        "vision_config": dict(VISION),
        "text_config": text,
        "image_token_index": IMAGE,
        "image_seq_length": PATCHES,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        **top,
    }


def their_model(kind: str = "llama", seed: int = 0, **top):
    """transformers' model, every parameter random, biases and norms too, so large that logits are
    far apart.
    """
    transformers = pytest.importorskip(
        "transformers", reason="the oracle of this test; pip install -e '.[test]'"
    )
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(**hf_config(kind, **top))
    ).eval()
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        p.data = (
            noise * p[0].numel() ** -0.5
            if p.dim() > 1
            else ("norm" in name and "bias" not in name) + 0.3 * noise
        )
    model.tie_weights()
    return model.requires_grad_(False)


def our_model(theirs) -> Llava:
    """The same model as ours, through no code of weights.py."""
    model = Llava(LlavaConfig.from_hf(theirs.config.to_dict())).eval()
    model.load_state_dict(
        {
            n.removeprefix("model.").replace("encoder.", ""): x
            for n, x in theirs.state_dict().items()
        }
    )
    return model.requires_grad_(False)


@pytest.fixture(scope="session", params=KINDS)
def pair(request):
    """(transformers' model, ours) of each kind."""
    theirs = their_model(request.param)
    return theirs, our_model(theirs)


def pixels(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def rows(*images: int, length: int = 20, seed: int = 0, patches: int = PATCHES) -> torch.Tensor:
    """Ids (B, length) with the given number of images in each row."""
    ids = torch.randint(
        3, PIECES, (len(images), length), generator=torch.Generator().manual_seed(seed)
    )
    for row, n in zip(ids, images):
        for i in range(n):
            row[1 + i * (patches + 1) : 1 + i * (patches + 1) + patches] = IMAGE
    return ids


@pytest.fixture(scope="session")
def spm() -> bytes:
    """A SentencePiece model of PIECES pieces with Llama's settings."""
    import sentencepiece

    rng, out = random.Random(0), io.BytesIO()
    words = "USER: ASSISTANT: what is in the picture a red circle left of two blue squares ? . ,".split()
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


def write_processor(folder: Path, spm: bytes) -> None:
    """The small files of a llava-hf folder beside config.json and the weights."""
    # the last two are for Qwen's template
    names = ("<image>", "<pad>", "<|im_start|>", "<|im_end|>")
    added = {
        str(IMAGE + i): {"content": name, "special": True, "normalized": False}
        for i, name in enumerate(names)
    }
    (folder / "tokenizer.model").write_bytes(spm)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<pad>",
                "added_tokens_decoder": added,
            }
        )
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 28},
                "crop_size": {"height": 28, "width": 28},
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "do_pad": False,
            }
        )
    )


def write_folder(folder: Path, spm: bytes, theirs, rename=lambda name: name) -> Path:
    """A llava-hf folder of `theirs`, its tensors named by `rename` from transformers' names in
    memory.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    write_processor(folder, spm)
    (folder / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    save_file(
        {rename(n): p.clone() for n, p in theirs.named_parameters()}, folder / "model.safetensors"
    )
    return folder
