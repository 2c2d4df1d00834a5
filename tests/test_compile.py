"""`compile=True` on the CPU, with the real compiler: the step's logits are those of the plain one,
in 16 bit and in every quantized form, and one program serves all blocks.
"""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from llava_min.cache import KVCache, round_up
from llava_min.config import LlavaConfig, TextConfig
from llava_min.decoding import compiled_step, prefill, step
from llava_min.errors import UserError
from llava_min.fast.cpu_linear import prepack_linears
from llava_min.fast.fused import arrange, compiled
from llava_min.fast.int_matmul import speed_up
from llava_min.generate import generate
from llava_min.llava import Llava
from llava_min.quant.methods import quantize_layers

with_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants g++ here")
CPU = torch.device("cpu")


def model_of(method: str | None, dtype: torch.dtype) -> Llava:
    """A language model of three blocks, quantized and made fast as `load` does it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    model = Llava(LlavaConfig(vision=None, text=TextConfig(**sizes, **heads))).to(dtype)
    model.requires_grad_(False).eval()
    if method is not None:
        layers = [n for n, m in model.named_modules() if "_proj" in n and hasattr(m, "weight")]
        quantize_layers(model, layers, method, 64 if method == "int4" else None)
        speed_up(model, dtype)
    prepack_linears(model)
    return model


@with_compiler
@pytest.mark.filterwarnings("error::UserWarning")  # none of the compiler's reach a user
@pytest.mark.parametrize(
    "method, dtype",
    [(None, "float32"), *((m, "bfloat16") for m in (None, "int8", "int4", "hqq2", "nf4", "w8a8"))],
)
@torch.inference_mode()
def test_a_compiled_step_is_the_plain_one(method, dtype):
    dtype = getattr(torch, dtype)
    model = model_of(method, dtype)
    ids = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    compiled.cache_clear()
    before, logits = counters["stats"]["unique_graphs"], {}
    kinds = []
    for static, run in ((False, step), (True, compiled_step)):
        arrange(model, static, dtype)
        cache = KVCache(model.config.text, 1, round_up(30), dtype, CPU, static_shapes=static)
        prefill(model, ids, None, None, cache)
        for new in range(3):
            cache.advance(1)
            logits.setdefault(static, []).append(run(model, torch.tensor([new]), cache))
        kinds.append([type(m) for m in model.modules()])
    compiled.cache_clear()
    assert (kinds[0] != kinds[1]) == (method in ("int8", "int4", "hqq2"))  # read as stored
    arrange(model, False, dtype)
    assert kinds[0] == [type(m) for m in model.modules()]
    want, got = (torch.cat(logits[static]) for static in (False, True))
    most = 1e-5 if dtype == torch.float32 else 0.03
    assert (got - want).norm() <= most * want.norm()
    assert counters["stats"]["unique_graphs"] == before + 1


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match="^compile: wants a C.. compiler on a CPU and found none"):
        generate(
            model_of(None, torch.float32), {"input_ids": torch.ones(1, 4).long()}, compile=True
        )
