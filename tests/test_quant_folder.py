"""quant/folder.py: quantization_config comes back as it was written; other kinds are refused."""

import pytest
import torch

from llava_min.errors import UserError
from llava_min.quant.folder import Stored, config_of, kind_of, read_config, tensors_of
from llava_min.quant.methods import METHODS, empty_layer


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_comes_back_from_its_tensors(method):
    config = config_of(method, None, ["lm_head"])
    stored = read_config(config, "config.json")
    layer = empty_layer(method, 256, 64)
    layer.load(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
    again = stored.layer(256, 64)
    stored.fill(again, tensors_of(layer, stored.kind))
    assert type(again) is type(layer) and stored.kind == kind_of(method)
    assert torch.equal(again.dequantize(), layer.dequantize())


@pytest.mark.parametrize(
    "config, says",
    [
        (None, "kind None"),
        ({"quant_method": "gptq", "bits": 4}, "kind 'gptq', expected bitsandbytes"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit is False"),
        (config_of("nf4", None, []) | {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
        (config_of("nf4", None, []) | {"bnb_4bit_quant_storage": "bfloat16"}, "quant_storage"),
        (config_of("int4", None, []) | {"format": "naive-quantized"}, "format is 'naive"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False}, "zero_point"),
        ({"quant_method": "awq", "bits": 8, "group_size": 128, "zero_point": True}, "bits is 8"),
        ({"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True}, "group_size"),
        (config_of("hqq4", None, []) | {"format": 2}, "another version"),
        (config_of("hqq4", None, []) | {"method": "hqq5"}, "method is 'hqq5'"),
        (config_of("hqq4", None, []) | {"method": ["hqq4"]}, "method is .'hqq4'."),
        ({"quant_method": ["awq"]}, "kind .'awq'., expected bitsandbytes"),
        ({"quant_method": {}}, "kind {}, expected bitsandbytes"),
    ],
)
def test_what_is_not_read_is_named(config, says):
    with pytest.raises(UserError, match=says) as e:
        read_config(config, "config.json")
    assert "\n" not in str(e.value)


def test_awq_is_read_with_its_zero_points():
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
    stored = read_config(config, "config.json")
    assert stored == Stored("awq", "int4", 64) and not stored.layer(128, 64).symmetric
