"""Models in the files of others: one page a format, each streamed tensor by tensor.

`tensors` reads a model piece by piece, whatever it is made of; `stream` writes safetensors the same
way, and `proof` reads them back; `hf`, `original` and `gguf` (with `mmproj`) are the layouts.
`read_gguf` and `read_mmproj` are the way back, `load_gguf` makes a model of them. `quantized` reads
and writes the layers of quantized checkpoints.
"""

# The formats of `export --to`, a page each: its `export(model, folder, dtype, type)` writes an open
# model (`tensors.open_model`) into a new folder, compares what it wrote, and says what that is.
FORMATS = {
    "hf": "llava_min.export.hf",
    "original": "llava_min.export.original",
    "gguf": "llava_min.export.gguf",
}
