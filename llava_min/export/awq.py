"""A checkpoint quantized by AWQ, on records with images and text.

Tower, projector and embedding are read whole and run once over every record; then the decoder is
quantized half a block at a time (quant/calibrate.py), so in memory are the part that is quantized
already, half a block in fp32, and the hidden states of the records.
"""

import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from llava_min.checks.inputs import check_length
from llava_min.checks.load import check_unquantized, warn_quantized_twice
from llava_min.errors import info
from llava_min.export.quantized import check_method_fits
from llava_min.fast.cpu_linear import upcast_linears
from llava_min.llama import rotary
from llava_min.llava import Llava
from llava_min.load import BLOCKS, Checkpoint
from llava_min.quant.calibrate import calibrate, place_for
from llava_min.quant.folder import Stored, kind_of
from llava_min.weights import Reader, load_weights, make_parameter


def quantize_by_awq(
    checkpoint: Checkpoint,
    batches: Iterable[dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    group_size: int | None = None,
) -> None:
    """Load `checkpoint`, which is in 16 bit, with its decoder's blocks in int4 that AWQ chose.

    batches: what `dataset.collate` gives for one record each, so that no row has padding. dtype: of
    what is not quantized. Raises UserError for a checkpoint that is quantized, a group size that
    does not divide a width, too few tokens, and NaN.
    """
    model = checkpoint.model
    check_unquantized("awq4", model.config.quantization is not None)
    warn_quantized_twice(checkpoint.source, checkpoint.entries.values())
    blocks = model.language_model.layers
    layers = [layer for layer in blocks[0].modules() if isinstance(layer, nn.Linear)]
    if group_size is None:
        check_method_fits(layers, "awq4", model.config.vision is not None)
    for layer in layers:
        place_for(layer, group_size)  # refuses a group size, before minutes of work
    read_around(checkpoint, dtype, device)
    rows = [hidden_states(model, batch) for batch in batches]
    info(f"calibrating on {sum(x.shape[1] for x in rows)} tokens of {len(rows)} records")

    paths, reader = {module: path for path, module in model.named_modules()}, Reader()

    def read(module: nn.Module) -> None:
        for name, _ in list(module.named_parameters()):
            name = f"{paths[module]}.{name}"
            weight = make_parameter(model, name, torch.float32, device, False)
            reader.fill(weight, checkpoint.entries[name])

    def context(x: Tensor) -> tuple:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return *rotary(positions, model.config.text, x.dtype), None, None, False

    start = time.monotonic()
    for done in calibrate(blocks, rows, read, context, dtype, group_size):
        info(f"block {done} of {len(blocks)}, {time.monotonic() - start:.0f} s")
    stored = Stored(kind_of("awq4", group_size), "awq4", group_size)
    model.config = replace(model.config, quantization=stored)
    model.eval()


def read_around(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Read all weights but those of the decoder's blocks."""
    language_model = checkpoint.model.language_model
    blocks, language_model.layers = language_model.layers, nn.ModuleList()
    around = {n: info for n, info in checkpoint.entries.items() if not n.startswith(BLOCKS)}
    load_weights(checkpoint.model, around, dtype, device)
    upcast_linears(checkpoint.model)
    language_model.layers = blocks


@torch.no_grad()
def hidden_states(model: Llava, batch: dict[str, Tensor]) -> Tensor:
    """What the decoder's first block reads of a record (1, T, C), in fp32."""
    ids = batch["input_ids"].to(model.device)
    check_length(model.config, ids.shape[1])
    return model.eval().embed(ids, batch.get("pixel_values")).float()
