"""Models in the files of others: one page a format, each streamed tensor by tensor.

`tensors` reads a model piece by piece, whatever it is made of; `stream` writes safetensors the same
way and reads them back; `hf`, `original` and `gguf` are the layouts; `read_gguf` is the way back.
`quantized` reads and writes the layers of quantized checkpoints.
"""
