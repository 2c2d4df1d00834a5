"""names.py: every part has a name in every layout that has it, and comes back from it."""

import pytest
from conftest import our_model, their_model

from llava_min.names import LAYOUTS, PARTS, path_in, to_layout, to_ours


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_come_back_from_every_layout(layout):
    model = our_model(their_model("llama"))
    for name, _ in model.named_parameters():
        theirs = to_layout(name, layout)
        if theirs is None:  # PEFT on the original LLaVA does not reach the tower
            assert layout == "original_lora" and name.startswith("vision_tower.")
        else:
            assert to_ours(theirs) == name


def test_the_columns_are_the_names_of_transformers():
    theirs = their_model("llama")
    names = {name for name, _ in our_model(theirs).named_parameters()}
    assert {to_layout(name, "hf_5_memory") for name in names} == dict(
        theirs.named_parameters()
    ).keys()


def test_a_row_has_a_column_for_each_layout():
    assert all(len(row) == len(LAYOUTS) for row in PARTS.values())


def test_paths_and_strangers():
    assert path_in("lm_head", "hf") == "language_model.lm_head"
    assert path_in("language_model.layers.0.mlp", "original") == "model.layers.0.mlp"
    assert path_in("vision_tower.layers.1", "original_lora") is None
    assert to_ours("transformer.h.0.attn") is None
