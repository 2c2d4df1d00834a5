"""Weights in few bits: one storage a page, and the ways to choose its numbers. Nothing here knows
what model it serves.

linear.py says what every quantized layer does; group.py (8 to 1 bits), codebook.py (NF4, FP4) and
int8.py store; rounding.py, hqq.py and awq.py choose; bitsandbytes.py, compressed_tensors.py and
awq_gemm.py are others' files; methods.py gives them their names. folder.py says how a checkpoint
stores one layer, checkpoint.py reads and writes all of them.
"""
