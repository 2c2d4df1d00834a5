"""Rules on LoRA and quantization: where the adapter lands, how strong it is, whether 4 bits are 4.

Here as on the other pages of rules, the docstring of a rule is the reason that is printed.
"""

import re

from llava_min.checks.doctor.facts import Finding, Findings, Run, as_list
from llava_min.checks.regex import is_quick, is_regex

# CLIP-L/14-336's linear layers, as in transformers 5 -> inputs + outputs, over its 24 blocks.
TOWER = {
    f"model.vision_tower.encoder.layers.0.{name}": 24 * size
    for name, size in {
        "self_attn.q_proj": 2048,
        "self_attn.k_proj": 2048,
        "self_attn.v_proj": 2048,
        "self_attn.out_proj": 2048,
        "mlp.fc1": 5120,
        "mlp.fc2": 5120,
    }.items()
}
LANGUAGE_ONLY = ".*language_model.*_proj"  # a regex: the seven layers of its blocks, no others
VICUNA_FIRST = "vicuna|liuhaotian"  # the original adds LoRA before it has a tower


def fits(names: object, path: str) -> bool:
    """Whether PEFT's target_modules or exclude_modules names the linear layer at `path`."""
    if names == "all-linear":
        return True
    if isinstance(names, str):  # a regex on the whole path
        return is_regex(names) and is_quick(names, 5, 1 << 17) and bool(re.fullmatch(names, path))
    return any(f".{path}".endswith(f".{name}") for name in as_list(names))


def lora_in_tower(run: Run) -> Findings:
    """PEFT compares the ends of module names, and CLIP's attention has q_proj, k_proj and v_proj
    too: a tower that is meant to be frozen learns, and an export to GGUF loses what it learnt
    (LLaVA#1647, lmms-finetune#11, llama.cpp#14867)."""
    targets = run.written("targets")
    if run.kind != "hf" or not targets or re.search(VICUNA_FIRST, run.text("model").lower()):
        return
    if run.tensors is not None:
        pairs = [name for name in run.tensors if ".lora_A" in name and "vision" in name]
        what = f"{len(pairs)} LoRA pairs are in the vision tower, first {pairs[0]}" if pairs else ""
    else:
        sizes = {
            path: n
            for path, n in TOWER.items()
            if fits(targets.value, path) and not fits(run.value("excluded"), path)
        }
        leaves = ", ".join(path.rpartition(".")[2] for path in sizes)
        what = f"{targets.text} also names the vision tower's {leaves}" if sizes else ""
        if sizes and (r := run.number("r")):
            n = int(r * sum(sizes.values()))
            what += f": {n:,} parameters at rank {int(r)} in CLIP-L/14-336"
    if what:
        meant = isinstance(targets.value, str) and "vision" in targets.value
        yield Finding(
            "note" if meant else "error", targets, what, f'target_modules = "{LANGUAGE_ONLY}"'
        )


def gate_forgotten(run: Run) -> Findings:
    """The MLP is down(silu(gate(x)) * up(x)). LLaVA adapts all seven linear layers of a block
    (scripts/v1_5/finetune_lora.sh), and QLoRA needed all to match full tuning (arXiv
    2305.14314)."""
    targets = run.written("targets")
    names = as_list(targets.value) if targets and isinstance(targets.value, list) else []
    if {"up_proj", "down_proj"} <= set(names) and "gate_proj" not in names:
        yield Finding(
            "warning",
            targets,
            f"{targets.text} has up_proj and down_proj, and not gate_proj",
            "add gate_proj",
        )


def rank_large(run: Run) -> Findings:
    """An update has at most the layer's width as its rank, 4,096 in a 7B and 5,120 in a 13B, and
    from half of that on LoRA has more numbers than the layer. LLaVA takes 128."""
    r = run.number("r")
    if r and r > 2048 and run.trains == "lora":
        at = run["r"]
        name = at.text.split()[0]
        fix = f"{name} 128" if name.startswith("-") else f"{name} = 128"
        yield Finding("error" if r > 5120 else "warning", at, at.text, fix)


def alpha_unset(run: Run) -> Findings:
    """alpha / r scales what LoRA adds; LLaVA's is 256 / 128 = 2. A larger r with the same alpha
    turns the adapter down."""
    r, alpha = run.written("r"), run["alpha"]
    if (
        run.kind != "train.py"
        and r
        and run.number("r")
        and not alpha.written
        and run.trains == "lora"
    ):
        flag = "lora_alpha = " if run.kind == "hf" else "--lora_alpha "
        yield Finding(
            "warning",
            alpha,
            f"{r.text}, and {alpha.text}: scaled by {alpha.value / r.value:g}",
            f"{flag}{int(2 * r.value)}",
        )


def alpha_large(run: Run) -> Findings:
    """LLaVA scales its LoRA by 2 (256 / 128); a larger alpha / r acts as a larger learning
    rate."""
    alpha, value, r = run.written("alpha"), run.number("alpha"), run.number("r")
    if alpha and value and r and value / r >= 16 and run.trains == "lora":
        yield Finding(
            "note",
            alpha,
            f"{alpha.text} at rank {int(r)}: scaled by {value / r:g}",
            f"alpha {int(2 * r)}, or rank {int(value / 2)}",
        )


def lora_switched_off(run: Run) -> Findings:
    """LLaVA reads the other lora flags only with lora_enable: without it the whole language model
    is trained."""
    at = run.written("r") or run.written("alpha")
    if run.kind == "llava" and at and not run.value("lora"):
        yield Finding("error", at, f"{at.text}, and {run['lora'].text}", "--lora_enable True")


def lora_frozen(run: Run) -> Findings:
    """LLaVA adds LoRA, and then tune_mm_mlp_adapter freezes everything but the projector
    (llava/train/train.py)."""
    if run.kind == "llava" and run.value("lora") is True and run.value("projector_only") is True:
        at = run["projector_only"]
        yield Finding(
            "error",
            at,
            f"{at.text} with {run['lora'].text}: LoRA never learns",
            f"remove {at.text}",
        )


def adapter_large(run: Run) -> Findings:
    """modules_to_save keeps whole copies: 0.5 GB each in fp32 for the embeddings and the head of a
    7B, in every adapter (peft#2898, peft#1689). LLaVA's vocabulary needs no new words."""
    saved = run.written("saved_modules")
    big = {"embed_tokens", "lm_head"} & set(as_list(saved.value)) if saved else ()
    if big:
        yield Finding("note", saved, saved.text, f"take {' and '.join(sorted(big))} out")


def bits_ignored(run: Run) -> Findings:
    """BitsAndBytesConfig reads its bnb_4bit fields only with load_in_4bit (default False): this is
    LoRA on a 16-bit base and no QLoRA, with 14.1 GB of weights for a 7B where nf4 takes 4.5."""
    fields = [s for name, s in run.settings.items() if name.startswith("bnb_4bit_")]
    if run.kind == "hf" and fields and run.value("4bit") in (False, None):
        more = f" and {len(fields) - 1} more bnb_4bit fields" if fields[1:] else ""
        yield Finding(
            "error",
            run.written("4bit") or fields[0],
            f"{run['4bit'].text}, with {fields[0].text}{more}: nothing is quantized",
            "load_in_4bit = true, or remove the bnb_4bit fields",
        )


def quant_type_ignored(run: Run) -> Findings:
    """LLaVA quantizes by --bits alone (default 16): the base stays in 16 bits."""
    at = run.settings.get("quant_type") or run.settings.get("double_quant")
    if run.kind == "llava" and at and run.value("bits") == 16:
        yield Finding("error", at, f"{at.text}, and {run['bits'].text}", "--bits 4, or remove it")


def quantized_in_full(run: Run) -> Findings:
    """Weights of bitsandbytes have no gradient; on a quantized model only adapters learn (QLoRA,
    arXiv 2305.14314)."""
    if run.kind == "llava" and run.value("bits") in (4, 8) and run.trains == "full":
        yield Finding(
            "error",
            run["bits"],
            f"{run['bits'].text}, and {run['lora'].text}",
            "--lora_enable True",
        )


def computed_in_fp32(run: Run) -> Findings:
    """What 4-bit layers compute in is a setting of its own: in fp32 a GPU multiplies several times
    slower than in bf16."""
    dtype = run["4bit_dtype"]
    if run.kind == "hf" and run.value("4bit") is True and "float32" in str(dtype.value):
        yield Finding(
            "warning",
            dtype,
            f"{dtype.text}, with load_in_4bit",
            'bnb_4bit_compute_dtype = "bfloat16"',
        )


def fp4_not_nf4(run: Run) -> Findings:
    """QLoRA uses nf4, which loses less than fp4 (arXiv 2305.14314, table 2)."""
    at = run["4bit_type"]
    if run.kind == "hf" and run.value("4bit") is True and at.value == "fp4":
        yield Finding("note", at, f"{at.text}, with load_in_4bit", 'bnb_4bit_quant_type = "nf4"')


def projector_quantized(run: Run) -> Findings:
    """transformers leaves lm_head alone out: projector and tower are quantized too. LLaVA keeps
    its projector in 16 bits (llm_int8_skip_modules, llava/train/train.py)."""
    skipped = run["skipped_modules"]
    if (
        run.kind == "hf"
        and True in (run.value("4bit"), run.value("8bit"))
        and not any("projector" in name for name in as_list(skipped.value))
    ):
        yield Finding(
            "warning",
            skipped,
            skipped.text,
            'llm_int8_skip_modules = ["multi_modal_projector", "vision_tower", "lm_head"]',
        )


RULES = (
    lora_in_tower,
    gate_forgotten,
    rank_large,
    alpha_unset,
    alpha_large,
    lora_switched_off,
    lora_frozen,
    adapter_large,
    bits_ignored,
    quant_type_ignored,
    quantized_in_full,
    computed_in_fp32,
    fp4_not_nf4,
    projector_quantized,
)
