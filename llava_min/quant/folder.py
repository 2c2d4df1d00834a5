"""Quantized checkpoints as folders: what `quantization_config` says of the layers, in and out.

    bitsandbytes        nf4, fp4, int8           as transformers writes it
    compressed-tensors  int4, awq4               format pack-quantized, symmetric, groups of 128
    awq                 published AWQ-GEMM       read only
    llava_min           hqq and other groups     group.py's tensors as they are, `format` 1

A layer is quantized if the file has its numbers; a reader of transformers is told the same by the
names of the modules that are left in 16 bit.
"""

import reprlib
from dataclasses import dataclass

from torch import Tensor

from llava_min.errors import UserError
from llava_min.quant import awq_gemm, bitsandbytes, compressed_tensors
from llava_min.quant.codebook import CodebookLinear
from llava_min.quant.group import GroupLinear
from llava_min.quant.linear import QuantLinear
from llava_min.quant.methods import METHODS, empty_layer

FORMAT = 1  # of our own layout
BNB, CT, GEMM, OURS = "bitsandbytes", "compressed-tensors", "awq", "llava_min"


@dataclass(frozen=True)
class Stored:
    """How the quantized layers of a checkpoint are stored."""

    kind: str  # the quant_method of its quantization_config
    method: str  # a name of METHODS; of awq "int4" with zero-points
    group_size: int | None = None
    double_quant: bool = True

    def layer(self, in_features: int, out_features: int) -> QuantLinear:
        """A layer without values on the meta device, for `fill`."""
        if self.kind == GEMM:
            return GroupLinear(
                in_features, out_features, bits=4, group_size=self.group_size, device="meta"
            )
        if self.method in ("nf4", "fp4") and not self.double_quant:
            return CodebookLinear(
                in_features, out_features, kind=self.method, double_quant=False, device="meta"
            )
        return empty_layer(
            self.method, in_features, out_features, group_size=self.group_size, device="meta"
        )

    def fill(self, layer: QuantLinear, tensors: dict[str, Tensor]) -> None:
        """Give `layer` the numbers of `tensors`, suffix -> tensor, as they are."""
        if self.kind == OURS:
            return layer.store_read({name: tensors.get(name) for name in own_tensors(layer)})
        pages = {BNB: bitsandbytes, CT: compressed_tensors, GEMM: awq_gemm}
        pages[self.kind].fill(layer, tensors)


def kind_of(method: str, group_size: int | None = None) -> str:
    """The layout a method is written in: one that other tools read, where there is one."""
    if method in ("nf4", "fp4", "int8"):
        return BNB
    return CT if method in ("int4", "awq4") and group_size in (None, 128) else OURS


def own_tensors(layer: QuantLinear) -> list[str]:
    return [name for name, _ in layer.named_parameters() if name != "bias"]


def tensors_of(layer: QuantLinear, kind: str) -> dict[str, Tensor]:
    """Suffix -> tensor of a layer in that layout, without the bias."""
    if kind == BNB:
        return bitsandbytes.tensors_of(layer)
    if kind == CT:
        return compressed_tensors.tensors_of(layer)
    return {name: getattr(layer, name).detach() for name in own_tensors(layer)}


def names_of(stored: Stored, layer: QuantLinear) -> list[str]:
    """Suffixes of the tensors that a layer has in that layout, without the bias."""
    if stored.kind == OURS:
        return own_tensors(layer)
    if stored.kind == GEMM:
        return ["qweight", "qzeros", "scales"]
    if stored.kind == CT:
        return ["weight_packed", "weight_scale", "weight_shape"]
    if stored.method == "int8":
        return ["weight", "SCB", "weight_format"]
    nested = ["nested_absmax", "nested_quant_map"] if stored.double_quant else []
    parts = ["absmax", "quant_map", *nested, f"quant_state.bitsandbytes__{stored.method}"]
    return ["weight", *(f"weight.{part}" for part in parts)]


def config_of(
    method: str,
    group_size: int | None,
    skipped: list[str],
    dtype: str = "bfloat16",
    double_quant: bool = True,
) -> dict:
    """The quantization_config of a checkpoint by `method`; `skipped` are modules left in `dtype`,
    in which other tools then compute.
    """
    kind = kind_of(method, group_size)
    if kind == BNB:
        four = method != "int8"
        return {
            "quant_method": BNB,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": method if four else "fp4",
            "bnb_4bit_use_double_quant": four and double_quant,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }
    if kind == CT:
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 128,
            "dynamic": False,
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        return {
            "quant_method": CT,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [f"re:.*{name}.*" for name in skipped],
        }
    usual = METHODS[method][1]
    return {
        "quant_method": OURS,
        "format": FORMAT,
        "method": method,
        "group_size": group_size or usual,
        "modules_to_not_convert": skipped,
    }


def read_config(config: object, where: str) -> Stored:
    """`quantization_config` of the file `where`. Raises UserError for a kind that is not read."""
    kind = config.get("quant_method") if isinstance(config, dict) else None
    readers = {BNB: _bitsandbytes, CT: _compressed_tensors, GEMM: _awq, OURS: _ours}
    if not isinstance(kind, str) or kind not in readers:
        raise UserError(
            f"{where}: quantization_config is of kind {reprlib.repr(kind)}, expected "
            f"{', '.join(readers)}; give the 16-bit checkpoint, and quantize it here"
        )

    def refuse(key: str, value: object, expected: str) -> None:
        raise UserError(
            f"{where}: quantization_config.{key} is {reprlib.repr(value)}, expected {expected}; "
            "give the 16-bit checkpoint, and quantize it here"
        )

    return readers[kind](config, refuse)


def _bitsandbytes(config: dict, refuse) -> Stored:
    four, eight = config.get("load_in_4bit", False), config.get("load_in_8bit", False)
    if (four, eight) not in ((True, False), (False, True)):
        refuse("load_in_4bit", four, "true, or load_in_8bit to be true")
    if eight:
        return Stored(BNB, "int8")
    method, storage = config.get("bnb_4bit_quant_type", "fp4"), "bnb_4bit_quant_storage"
    if method not in ("nf4", "fp4"):
        refuse("bnb_4bit_quant_type", method, "nf4 or fp4")
    if config.get(storage, "uint8") != "uint8":
        refuse(storage, config[storage], "uint8")
    double = config.get("bnb_4bit_use_double_quant", False)
    if type(double) is not bool:
        refuse("bnb_4bit_use_double_quant", double, "true or false")
    return Stored(BNB, method, double_quant=double)


def _compressed_tensors(config: dict, refuse) -> Stored:
    groups = config.get("config_groups")
    if config.get("format") != "pack-quantized" or not isinstance(groups, dict) or len(groups) != 1:
        refuse("format", config.get("format"), "pack-quantized with one of config_groups")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or group.get("input_activations"):
        refuse("config_groups", group, "weights alone to be quantized")
    want = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    for key, value in want.items():
        if weights.get(key) != value:
            refuse(f"weights.{key}", weights.get(key), repr(value))
    return Stored(CT, "int4", _group_size(weights.get("group_size"), refuse))


def _awq(config: dict, refuse) -> Stored:
    want = {"bits": 4, "version": "gemm", "zero_point": True}
    for key, value in want.items():
        came = config.get(key, value if key == "version" else None)
        if (came.lower() if isinstance(came, str) else came) != value:
            refuse(key, came, repr(value))
    return Stored(GEMM, "int4", _group_size(config.get("group_size"), refuse))


def _ours(config: dict, refuse) -> Stored:
    method, version = config.get("method"), config.get("format")
    if version != FORMAT:
        refuse("format", version, f"{FORMAT}; this checkpoint was made by another version")
    if not isinstance(method, str) or method not in METHODS:
        refuse("method", method, f"one of {', '.join(METHODS)}")
    size = config.get("group_size")
    return Stored(OURS, method, None if size is None else _group_size(size, refuse))


def _group_size(size: object, refuse) -> int:
    if type(size) is not int or not 8 <= size <= 1 << 16:
        refuse("group_size", size, "a number of weights from 8 up")
    return size
