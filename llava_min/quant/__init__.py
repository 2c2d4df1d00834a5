"""Weights in few bits: one storage a page, and the ways to choose its numbers. The layers know
nothing of the model that they are in; calibrate.py knows a Llama block by the names of its parts.

linear.py says what every quantized layer does; group.py (8 to 1 bits), codebook.py (NF4, FP4) and
int8.py store; rounding.py, hqq.py and awq.py choose, calibrate.py walks the blocks for awq.py;
bitsandbytes.py, compressed_tensors.py and awq_gemm.py are others' files; methods.py gives them
their names, folder.py says how a checkpoint stores one layer. export/quantized.py reads and writes
all of a model's, export/awq.py reads the weights and the records that AWQ is calibrated on.
"""
