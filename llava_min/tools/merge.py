"""`python -m llava_min merge MODEL ADAPTER … OUT`: put adapters into their base, as one model.

An adapter is a PEFT folder (LoRA, DoRA, rsLoRA, with whole modules), a LoRA folder of the original
LLaVA, or a file such as mm_projector.bin. All is read and written tensor by tensor, and OUT is a
llava-hf folder.

An adapter of QLoRA was trained over quantized weights. `--quantize nf4` puts it into those,
dequantized, as a MODEL that is quantized already has them in any case; without it goes into the
16-bit weights. `--data` says how far either is from the trained model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_min.errors import UserError, escape_controls, info, label, shorten
from llava_min.util.cli import PathArg, flags, parse
from llava_min.util.files import check_apart


@dataclass
class MergeConfig:
    folders: list[str] = field(default_factory=list)  # the base (or hub id, or tiny); adapters; OUT
    weights: tuple[float, ...] | None = None  # of each adapter, with commas between; 1 each
    quantize: str | None = None  # what the adapter was trained over, nf4, int4 …: merge into that
    data: PathArg | None = None  # rows with answers: how far the merged model is from the trained
    image_folder: PathArg | None = None  # where their images are; default: the data file's folder
    device: str = "auto"  # that compares them: cpu, cuda, cuda:N
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # as the base is stored, if not given
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # to record; the adapter's or base's
    template: str | None = None  # to record; the adapter's or base's, if not given
    revision: str | None = None  # of a hub id
    overwrite: bool = False  # OUT may be a model's folder, which is replaced


def main(argv: list[str]) -> None:
    config = parse(MergeConfig, argv, "Put adapters into their base.", positional="folders")
    with flags(config):
        run(config, *check(config))


def check(config: MergeConfig) -> tuple[str, list[str], Path]:
    if len(config.folders) < 3:
        raise UserError(
            "FOLDER: give three or more, the base, its adapters, and the folder to write"
        )
    if config.weights and 0 in config.weights:
        raise UserError("0 leaves an adapter out; leave it out of the command", "weights")
    source, *adapters, out = config.folders
    check_apart(Path(out), source, *adapters)
    if config.image_folder and not config.data:
        raise UserError("is of no use alone; give the rows to compare on, too", "image_folder")
    one_model = len(adapters) == 1 and config.weights in (None, (1.0,))
    if config.data and not (one_model and Path(adapters[0]).is_dir()):
        raise UserError(
            "compares with the one model that was trained; give one adapter's folder, without "
            f"{label('weights')}",
            "data",
        )
    return source, adapters, Path(out)


def run(config: MergeConfig, source: str, adapters: list[str], out: Path) -> None:
    from llava_min.export.hf import write_hf
    from llava_min.export.tensors import open_model
    from llava_min.util.files import check_new_folder, new_folder
    from llava_min.weights import DTYPES

    check_new_folder(out, config.overwrite)
    names = ("image_aspect_ratio", "template", "revision")
    settings = {name: getattr(config, name) for name in names}
    weights = config.weights and list(config.weights)
    model = open_model(source, adapters, weights, config.quantize, **settings)
    dtype = model.dtype if config.dtype is None else DTYPES[config.dtype]
    batches = read_batches(config, model) if config.data else None
    with new_folder(out, overwrite=config.overwrite) as aside:
        write_hf(model, aside, dtype)
    changed = len({name for a in model.read.adapters for name in a.targets})
    info(f"saved {out}: {len(adapters)} adapter(s) merged into {changed} tensors, all read back")
    if batches:
        compare(config, source, adapters[0], model, batches, dtype, settings)


# ---- how far it is from the trained model


def read_batches(config: MergeConfig, model: Any) -> list[dict]:
    """The rows of --data, read before anything is written."""
    from llava_min.checks.dataset import refuse_beyond_context
    from llava_min.data.dataset import Dataset
    from llava_min.data.records import read_records
    from llava_min.export.compare import batches_of

    records = read_records(config.data, config.image_folder)
    context = model.model.config.text.context
    empty = Dataset([], model.processor)
    if long := [shorten(r.id) for r in records if empty.tokens(r, context) > context]:
        refuse_beyond_context(long, len(records), context)
    return batches_of(Dataset(records, model.processor, max_length=context))


def compare(
    config: MergeConfig,
    source: str,
    adapter: str,
    written: Any,
    batches: list[dict],
    dtype: Any,
    settings: dict,
) -> None:
    """Print what `written` and the other possible merge are from the trained model, which is the
    base as it was quantized with the adapter beside it.
    """
    import torch

    from llava_min.export.compare import distance, log_probs
    from llava_min.export.tensors import open_model
    from llava_min.load import open_checkpoint
    from llava_min.parallel.ranks import pick_device
    from llava_min.weights import SMALL, count_weights

    device = pick_device(config.device)
    small = count_weights(written.model) <= SMALL
    compute = torch.float32 if small else dtype
    checkpoint = open_checkpoint(source, adapter=adapter, **settings)
    trained, _ = checkpoint.load(compute, device, config.quantize)
    expected = [log_probs(trained, batch) for batch in batches]
    stored = checkpoint.config.quantization
    over = source if stored is None else f"{source} in {stored.method}"
    tokens = sum(map(len, expected))
    info(f"from {adapter} over {over}, on {tokens:,} supervised tokens of {config.data}:")
    del trained, checkpoint

    name = "the weights as they are" if stored is None else f"dequantized {stored.method}"
    merges = {f"{name} (written)": written}
    if config.quantize:
        merges["the 16-bit weights"] = open_model(source, [adapter], **settings)
    print(f"{'merged into':<32}{'mean KL':>10}{'top-1 agreement':>18}")
    for name, model in merges.items():
        found = distance(model.load(dtype, compute, device), batches, expected)
        print(f"{escape_controls(name):<32}{found.kl:>10.2e}{found.agreement:>18.2%}")
