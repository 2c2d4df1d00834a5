"""The programs that train with LoRA: ours, and transformers + peft as Trainer runs them.

The same weights, rows, adapter values and optimizer in both: forward, backward, clipping and AdamW,
LoRA on every linear layer of the language model and nothing else trained (the projector and the
tower are frozen). Equal work has equal losses.
"""

import time
from pathlib import Path
from typing import Any

from llava_min.config import LlavaConfig
from llava_min.tools.speed.worker import as_users_have_it, config_of, now, prompt, quiet

LR, MAX_NORM = 1e-4, 1.0


class Program:
    """The same in both: the rows, the adapter's initial values, the step."""

    def ready(self, model: Any, config: LlavaConfig, spec: dict) -> None:
        import torch

        self.model, self.autocast = model.train(), spec["dtype"] == "bfloat16"
        self.trained = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if ".lora_A." in name:  # in the order of the layers, the same on both sides; B is zero
                p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0, fused=True)
        ids, pixels = (x.to(self.device) for x in prompt(config, spec["rows"], spec["text"]))
        labels = ids.clone()
        labels[:, : -spec["answer"]] = -100
        self.batch = {"input_ids": ids, "labels": labels, "pixel_values": pixels}

    def step(self) -> dict:
        import torch

        start = now(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"seconds": now(self.device) - start, "loss": float(loss.detach())}


class Ours(Program):
    """This package, by the functions that train.py calls."""

    def __init__(self, spec: dict):
        start = time.perf_counter()
        import torch

        from llava_min.fast.cpu_linear import upcast_linears
        from llava_min.load import load_model
        from llava_min.lora import LoRAConfig
        from llava_min.training.targets import add_lora
        from llava_min.training.trainable import set_trainable
        from llava_min.training.wrap import compile_blocks, enable_gradient_checkpointing

        self.imported = time.perf_counter() - start
        self.version, self.device = torch.__version__, torch.device(spec["device"])
        start = time.perf_counter()
        model = load_model(Path(spec["folder"]), getattr(torch, spec["dtype"]), self.device)
        add_lora(model, LoRAConfig(spec["lora_r"], 2.0 * spec["lora_r"]))
        set_trainable(model, "lora", train_projector=False)
        upcast_linears(model)
        if spec["checkpointing"]:
            enable_gradient_checkpointing(model, dropout=False)
        if spec["compile"]:
            compile_blocks(model)
        self.ready(model, model.config, spec)
        self.loaded = now(self.device) - start

    def loss(self) -> Any:
        return self.model.loss(**self.batch) / (self.batch["labels"][:, 1:] != -100).sum()

    def products(self) -> dict:
        """TFLOP/s of bare matrix products of the step's tokens with the decoder's weights."""
        import torch
        import torch.nn.functional as F

        layers = [
            m
            for m in self.model.language_model.modules()
            if hasattr(m, "in_features") and hasattr(m, "weight")
        ]
        weights = [m.weight for m in layers if not m.weight.requires_grad]
        tokens = self.batch["input_ids"].numel()
        rows = {
            w.shape[1]: torch.randn(tokens, w.shape[1], device=self.device).to(w.dtype)
            for w in weights
        }
        with torch.inference_mode():
            start = now(self.device)
            for w in weights:
                F.linear(rows[w.shape[1]], w)
            seconds = now(self.device) - start
        return {"tflop_s": 2 * tokens * sum(w.numel() for w in weights) / seconds / 1e12}


class Transformers(Program):
    """transformers + peft as Trainer runs them."""

    def __init__(self, spec: dict):
        as_users_have_it()
        start = time.perf_counter()
        import peft
        import torch
        import transformers
        from transformers import LlavaForConditionalGeneration

        self.imported = time.perf_counter() - start
        from llava_min.config import LINEARS

        quiet()
        self.version = f"{transformers.__version__} + peft {peft.__version__}"
        self.device = torch.device(spec["device"])
        start = time.perf_counter()
        model = LlavaForConditionalGeneration.from_pretrained(spec["folder"], dtype=spec["dtype"])
        targets = rf".*language_model\..*\.({'|'.join(LINEARS)})"
        lora = peft.LoraConfig(
            r=spec["lora_r"], lora_alpha=2 * spec["lora_r"], target_modules=targets
        )
        model = peft.get_peft_model(model.to(self.device), lora)
        if spec["checkpointing"]:
            enable = getattr(model, "activation_checkpointing_enable", None)  # newer releases
            enable = enable or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.ready(model, config_of(spec["folder"]), spec)
        self.batch["attention_mask"] = torch.ones_like(self.batch["input_ids"])
        self.loaded = now(self.device) - start

    def loss(self) -> Any:
        return self.model(**self.batch, use_cache=False).loss
