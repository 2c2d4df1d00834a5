"""`parity`: a sound checkpoint is the same at every stage, and of each seeded fault the stage that
it sits in is named as the first that differs.
"""

import copy
import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="what is compared with; pip install -e '.[test]'")

from conftest import TEXT, VISION, their_model, write_folder

import llava_min
from llava_min.config import IGNORE
from llava_min.data.tokenizer.tokenizer_json import write_spaces
from llava_min.errors import UserError
from llava_min.load import TINY, save
from llava_min.tools import parity
from llava_min.tools.export import main as export
from llava_min.tools.quantize import main as quantize

STAGES = ["pixels", "ids", "labels", "tower", "projector", "logits", "loss", "greedy", "gradients"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory, spm):
    """A folder whose tokenizer is a tokenizer.model alone."""
    return write_folder(tmp_path_factory.mktemp("parity") / "bare", spm, their_model())


@pytest.fixture(scope="module")
def folder(bare):
    """The same as we save it."""
    model, processor = llava_min.load(str(bare), image_aspect_ratio="pad", template="llava_hf")
    save(model, processor, bare.parent / "sound")
    return bare.parent / "sound"


@pytest.fixture(scope="module")
def loaded(folder):
    return parity.load(parity.Config([str(folder)]))


def first_wrong(sides, tolerance) -> str | None:
    config = parity.Config(["x"], tokens=8)
    stages = parity.run_stages(copy.deepcopy(sides), config, tolerance)
    return next((stage.name for stage in stages if not stage.same), None)


def test_a_sound_folder_is_the_same_at_every_stage_and_exits_0(folder, capsys):
    pytest.importorskip("peft", reason="the gradients are compared with its own")
    assert parity.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\w+) .* same ", out, re.M) == STAGES
    assert "all 9 stages are the same" in out and "64 tokens of 1 answer" in out


def test_the_ids_of_a_bare_tokenizer_model_are_named(bare, capsys):
    """Which transformers 5 reads without its dummy space and BOS beside a LLaVA's config.json."""
    (bare / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "LlavaProcessor",
                "patch_size": 14,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
                "image_token": "<image>",
            }
        )
    )
    assert parity.main([str(bare), "--tokens", "4"]) == 1
    assert "the first stage that differs is ids: 'USER: <image>" in capsys.readouterr().out


# ---- seeded faults, each in its own stage


def unpadded(sides):
    sides.processor.image_config = replace(sides.processor.image_config, aspect="crop")


def label_off_by_one(sides):
    training = sides.processor.training

    def shifted(messages, images):
        row = training(messages, images)
        return row | {"labels": [*row["labels"][1:], IGNORE]}

    sides.processor.training = shifted


def other_epsilon(sides):
    for module in sides.model.vision_tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6


def kept_class_token(sides):
    sides.model.config = replace(sides.model.config, vision_feature_select_strategy="full")


def tower_a_layer_short(sides):
    sides.model.vision_tower.layers_used -= 1


def tanh_gelu(sides):
    projector = sides.model.multi_modal_projector
    gelu = lambda x: torch.nn.functional.gelu(projector.linear_1(x), approximate="tanh")
    projector.forward = lambda x: projector.linear_2(gelu(x))


def other_rope(sides):
    text = replace(sides.model.language_model.config, rope_theta=9000.0)
    sides.model.language_model.config = text


def other_norm_epsilon(sides):
    for module in sides.model.language_model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-3


def unshifted_loss(sides):
    loss = sides.model.loss
    sides.model.loss = lambda input_ids, labels, pixel_values: loss(
        input_ids, torch.roll(labels, 1, 1), pixel_values
    )


FAULTS = {
    "an unpadded image": (unpadded, "pixels"),
    "a label off by one": (label_off_by_one, "labels"),
    "a wrong epsilon in the tower": (other_epsilon, "tower"),
    "a lost rule for the class token": (kept_class_token, "tower"),
    "a tower one block short": (tower_a_layer_short, "tower"),
    "tanh for erf in the projector": (tanh_gelu, "projector"),
    "another rotary base": (other_rope, "logits"),
    "a wrong epsilon in the decoder": (other_norm_epsilon, "logits"),
    "a loss of the wrong token": (unshifted_loss, "loss"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_at_its_stage(name, loaded):
    fault, stage = FAULTS[name]
    sides, tolerance = copy.deepcopy(loaded[0]), loaded[1]
    fault(sides)
    stages = parity.run_stages(sides, parity.Config(["x"], tokens=8), tolerance)
    wrong = [s.name for s in stages if not s.same]
    assert wrong[0] == stage
    assert f"the first stage that differs is {stage}" in list(parity.table(stages))[-1]


def test_answers_that_differ_are_named(loaded, monkeypatch):
    from llava_min.tools import parity_stages

    generate = parity_stages.generate
    other = lambda *a, **k: [[*ids[:-1], ids[-1] ^ 1] for ids in generate(*a, **k)]
    monkeypatch.setattr(parity_stages, "generate", other)
    assert first_wrong(*loaded) == "greedy"


def test_gradients_that_differ_are_named(loaded, monkeypatch):
    pytest.importorskip("peft", reason="the gradients are compared with its own")
    from llava_min.tools import parity_stages

    config = parity_stages.LoRAConfig
    monkeypatch.setattr(parity_stages, "LoRAConfig", lambda r, s, *a: config(r, s * 2, *a))
    assert first_wrong(*loaded) == "gradients"


def test_prepend_read_as_metaspace_is_named_at_the_ids(tmp_path):
    """A tokenizer.json that prepends `▁` in its normalizer puts another one than Metaspace does
    after a special token and before a space."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    path = folder / "tokenizer.json"
    spec = write_spaces(json.loads(path.read_text()), ("always", True, 1), path)
    path.write_text(json.dumps(spec))
    (folder / "tokenizer.model").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    sides, tolerance = parity.load(parity.Config([str(folder)]))
    assert sides.processor.tokenizer.prepend
    assert first_wrong(sides, tolerance) is None
    sides.processor.tokenizer.prepend, sides.processor.tokenizer.scheme = False, "first"
    sides.processor.tokenizer.__dict__.pop("matchers", None)
    assert first_wrong(sides, tolerance) == "ids"


def test_a_difference_exits_1_and_says_where(folder, capsys, monkeypatch):
    code = parity.main([str(folder), "--image-aspect-ratio", "crop", "--tokens", "4"])
    out = capsys.readouterr().out
    assert code == 1 and "the first stage that differs is pixels" in out
    assert len(re.findall("DIFFERS", out)) == 1  # each stage has the reference's input


WIDE = {  # of whole groups of 128 and blocks of 64
    "text_config": {**TEXT, "hidden_size": 128, "intermediate_size": 256},
    "vision_config": {**VISION, "hidden_size": 64, "intermediate_size": 128},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory, spm):
    """A folder as we save it, and the same quantized by each method."""
    room = tmp_path_factory.mktemp("wide")
    bare = write_folder(room / "bare", spm, their_model(**WIDE))
    save(*llava_min.load(str(bare), image_aspect_ratio="pad", template="llava_hf"), room / "hf")
    for method in ("int4", "nf4", "int8", "hqq4"):
        quantize([str(room / "hf"), str(room / method), "--method", method, "--dtype", "fp32"])
    return room


def test_a_quantized_folder_is_compared_too(wide, capsys):
    pytest.importorskip("compressed_tensors", reason="what transformers reads int4 with")
    assert parity.main([str(wide / "int4"), "--tokens", "4"]) == 0
    assert "all 9 stages are the same" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_folder_in_bitsandbytes_is_compared_as_far_as_it_computes(method, wide, capsys):
    pytest.importorskip("bitsandbytes", reason="what transformers reads nf4 and int8 with")
    assert parity.main([str(wide / method), "--tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert "all 8 stages are the same" in out and "both in fp32" in err and "16 bit" in err
    with pytest.raises(UserError, match="fp32 at most"):
        parity.main([str(wide / method), "--dtype", "fp64"])


def test_what_transformers_cannot_read_or_run_is_one_line(wide, tmp_path):
    with pytest.raises(UserError, match="hqq4 is stored as llava_min has it"):
        parity.main([str(wide / "hqq4")])
    pytest.importorskip("bitsandbytes", reason="what transformers reads nf4 and int8 with")
    quantize(["tiny", str(tmp_path / "nf4")])  # whose width of 160 is no whole blocks
    with pytest.raises(UserError, match="does not run it.*blocks of 64") as e:
        parity.main([str(tmp_path / "nf4")])
    assert "\n" not in str(e.value)


def test_an_exported_folder_is_the_same(tmp_path, capsys):
    export(["tiny", str(tmp_path / "hf"), "--to", "hf"])
    capsys.readouterr()
    assert parity.main([str(tmp_path / "hf"), "--tokens", "4"]) == 0


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="parity needs transformers; pip install") as e:
        parity.main(["tiny"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "FOLDER: give the folder"),
        (["a", "b"], "FOLDER: give the folder"),
        (["./none"], "no such folder"),
    ],
)
def test_mistakes_are_one_line(argv, said):
    with pytest.raises(UserError, match=said):
        parity.main(argv)
