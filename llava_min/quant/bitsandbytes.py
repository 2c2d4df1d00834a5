"""bitsandbytes' tensors of one layer, as transformers writes them into safetensors.

nf4, fp4   weight (N K / 2, 1) uint8, weight.absmax, weight.quant_map (16,); with double
           quantization weight.nested_absmax, weight.nested_quant_map (256,); and
           weight.quant_state.bitsandbytes__nf4, the rest as JSON in uint8
int8       weight (N, K) int8, SCB (N,) fp32, weight_format 0 (rows)

`tensors_of` and `fill` are inverse; names are relative to the layer, whose bias has its usual name.
"""

import json
import math

import torch
from torch import Tensor

from llava_min.errors import UserError
from llava_min.quant.codebook import BLOCK, NESTED, CodebookLinear, codebook
from llava_min.quant.int8 import Int8Linear

STATE = "weight.quant_state.bitsandbytes__"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensors_of(layer: CodebookLinear | Int8Linear) -> dict[str, Tensor]:
    """Suffix -> tensor, without the bias."""
    packed = layer.weight_packed.detach()
    if isinstance(layer, Int8Linear):
        rows = torch.tensor(0, dtype=torch.uint8)
        return {"weight": packed, "SCB": layer.SCB.detach(), "weight_format": rows}
    device = packed.device
    out = {
        "weight": packed,
        "weight.absmax": layer.absmax.detach(),
        "weight.quant_map": codebook(layer.kind, device).clone(),
    }
    state = {
        "quant_type": layer.kind,
        "blocksize": BLOCK,
        "dtype": NAMES.get(layer.dtype, "float32"),
        "shape": [layer.out_features, layer.in_features],
    }
    if layer.double_quant:
        out |= {
            "weight.nested_absmax": layer.nested_absmax.detach(),
            "weight.nested_quant_map": codebook("dynamic", device).clone(),
        }
        state |= {
            "nested_blocksize": NESTED,
            "nested_dtype": "float32",
            "nested_offset": layer.nested_offset.item(),
        }
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {**out, STATE + layer.kind: text}


def state_of(tensors: dict[str, Tensor]) -> dict:
    """The JSON among the tensors of a 4-bit layer. Raises UserError where there is none that can be
    read."""
    for name, x in tensors.items():
        if name.startswith(STATE):
            try:
                return dict(json.loads(bytes(x.tolist())))
            except (ValueError, TypeError, RecursionError):
                break
    raise UserError(
        "a 4-bit layer has no readable quant_state; save the checkpoint again with bitsandbytes"
    )


def fill(layer: CodebookLinear | Int8Linear, tensors: dict[str, Tensor]) -> None:
    """Give `layer` the numbers of `tensors` (suffix -> tensor, without the bias) as they are.

    Raises UserError for tensors that are missing, or of another shape, block size or kind than the
    layer's; the layer then keeps what it had.
    """
    if isinstance(layer, CodebookLinear):
        return fill_four_bits(layer, tensors)
    if tensors.get("weight_format", torch.tensor(0)).flatten().tolist() != [0]:
        raise UserError(
            "an int8 layer's weight_format is not 0; save the checkpoint again with bitsandbytes"
        )
    layer.store_read({"weight_packed": tensors.get("weight"), "SCB": tensors.get("SCB")})


def fill_four_bits(layer: CodebookLinear, tensors: dict[str, Tensor]) -> None:
    state = state_of(tensors)
    want = {
        "quant_type": layer.kind,
        "blocksize": BLOCK,
        "shape": [layer.out_features, layer.in_features],
    }
    maps = {"weight.quant_map": codebook(layer.kind, torch.device("cpu"))}
    read = {"weight_packed": tensors.get("weight"), "absmax": tensors.get("weight.absmax")}
    if layer.double_quant:
        want["nested_blocksize"] = NESTED
        maps["weight.nested_quant_map"] = codebook("dynamic", torch.device("cpu"))
        read["nested_absmax"] = tensors.get("weight.nested_absmax")
        offset, device = state.get("nested_offset"), getattr(tensors.get("weight"), "device", None)
        known = type(offset) is float and math.isfinite(offset)
        read["nested_offset"] = torch.tensor([offset], device=device) if known else None
    for name, ours in want.items():
        if state.get(name) != ours:
            came = str(state.get(name))[:40]
            raise UserError(
                f"quant_state: {name} is {came!r}, {ours!r} is what is read; "
                "quantize the 16-bit checkpoint anew"
            )
    for name, ours in maps.items():
        x = tensors.get(name, ours)
        if x.shape != ours.shape or not torch.allclose(x.cpu().float(), ours, rtol=0, atol=1e-6):
            raise UserError(
                f"{name} has other numbers than {layer.kind} has; "
                "quantize the 16-bit checkpoint anew"
            )
    layer.store_read(read)
    layer.dtype = DTYPES.get(str(state.get("dtype")), torch.float32)
