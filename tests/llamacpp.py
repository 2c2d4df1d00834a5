"""llama.cpp in process, through llama-cpp-python: greedy ids of a text, features of an image."""

import ctypes
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama.cpp, which reads GGUF; pip install 'llava_min[gguf]'"
)
mtmd = pytest.importorskip("llama_cpp.mtmd_cpp", reason="a llama-cpp-python with mtmd")
_quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Model:
    def __init__(self, folder: Path, length: int = 512):
        self.path = next(p for p in folder.glob("*.gguf") if not p.name.startswith("mmproj"))
        self.llm = llama_cpp.Llama(
            str(self.path), n_ctx=length, n_threads=1, n_threads_batch=1, verbose=False
        )
        self.length = length

    def greedy(self, ids: list[int], n: int) -> list[int]:
        self.llm.reset()
        return list(islice(self.llm.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0), n))


class Eyes:
    """mtmd with the mmproj of `folder` beside the language model of `model`."""

    def __init__(self, folder: Path, model: Model):
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.warmup = False, 1, False
        params.print_timings, params.media_marker = False, b"<__media__>"
        mtmd.mtmd_log_set(_quiet, None)
        mtmd.mtmd_helper_log_set(_quiet, None)
        self.model, self.llm = model, model.llm
        path = next(folder.glob("mmproj*.gguf"))
        self.ctx = mtmd.mtmd_init_from_file(str(path).encode(), self.llm.model, params)
        assert self.ctx, f"{path}: mtmd does not read it"

    def chunks(self, prompt: str, image: np.ndarray):
        """The prompt, <__media__> in it, and an (H, W, 3) uint8 image as mtmd cuts them."""
        side_y, side_x, _ = image.shape
        data = np.ascontiguousarray(image)
        bytes_of = (ctypes.c_uint8 * data.size).from_buffer_copy(data.tobytes())
        bitmap = mtmd.mtmd_bitmap_init(side_x, side_y, bytes_of)
        text = mtmd.mtmd_input_text()
        text.text, text.text_len = prompt.encode(), len(prompt.encode())
        text.add_special, text.parse_special = True, True
        out = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        code = mtmd.mtmd_tokenize(self.ctx, out, ctypes.byref(text), bitmaps, 1)
        assert code == 0, code
        mtmd.mtmd_bitmap_free(bitmap)
        return out

    def features(self, image: np.ndarray) -> torch.Tensor:
        """(P, C) as the language model is given them."""
        chunks = self.chunks("<__media__>", image)
        n = mtmd.mtmd_input_chunks_size(chunks)
        for i in range(n):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            if mtmd.mtmd_input_chunk_get_type(chunk) == 1:  # an image
                tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                assert mtmd.mtmd_encode_chunk(self.ctx, chunk) == 0
                width = llama_cpp.llama_model_n_embd(self.llm.model)
                x = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.ctx), (tokens, width))
                found = torch.from_numpy(x.copy())
                mtmd.mtmd_input_chunks_free(chunks)
                return found
        raise AssertionError("no image among the chunks")

    def answer(self, prompt: str, image: np.ndarray, n: int, stops: set[int]) -> list[int]:
        """Greedy ids after the prompt with its image."""
        chunks, past = self.chunks(prompt, image), llama_cpp.llama_pos(0)
        memory = llama_cpp.llama_get_memory(self.llm.ctx)
        llama_cpp.llama_memory_clear(memory, True)
        code = mtmd.mtmd_helper_eval_chunks(
            self.ctx, self.llm.ctx, chunks, 0, 0, self.model.length, True, ctypes.byref(past)
        )
        assert code == 0, code
        mtmd.mtmd_input_chunks_free(chunks)
        ids, vocab = [], self.llm.n_vocab()
        for _ in range(n):
            row = llama_cpp.llama_get_logits_ith(self.llm.ctx, -1)
            logits = np.ctypeslib.as_array(row, (vocab,))
            id = int(logits.argmax())
            if id in stops:
                break
            ids.append(id)
            batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(id), 1)
            assert llama_cpp.llama_decode(self.llm.ctx, batch) == 0
        return ids
