"""llama.cpp's files as a model: a language model and, beside it, its mmproj; `load` comes here.

With an mmproj it is a LLaVA. Without one it is the language model alone: its config has no vision,
and it answers texts.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

from llava_min.checks.from_folder import check_aspect
from llava_min.checks.weights import check_entries
from llava_min.config import LlavaConfig
from llava_min.data.adapter_tokens import add_tokens as add_adapter_tokens
from llava_min.data.chat import IMAGE_TOKEN
from llava_min.data.image import ASPECTS
from llava_min.data.processor import Processor
from llava_min.errors import UserError, info, preview, shorten
from llava_min.export.build import TABLES, Decoder, add_tokens, read_gguf_decoder
from llava_min.export.gguf_file import read_header
from llava_min.export.quantized import Parts
from llava_min.export.read_mmproj import Vision, open_mmproj
from llava_min.llava import Llava
from llava_min.load import on_meta
from llava_min.tensors import TensorInfo
from llava_min.weights import NAMES


def find_gguf(source: str) -> Path | None:
    """The language model's file that `source` is, or that lies in it; None for what is no GGUF.

    Where a config.json says what the folder is, that is read and no .gguf, and said. Raises
    UserError for a folder with several language models.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    every = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if every and (path / "config.json").exists():
        say_unread(path, tuple(p.name for p in every))
    if not every or (path / "config.json").exists():
        return None
    files = [p for p in every if not is_mmproj(p)]
    if len(files) != 1:
        raise UserError(f"{path}: has {count(files, 'language models')}; name one", "source")
    return files[0]


@cache  # several steps ask what a folder is
def say_unread(folder: Path, names: tuple[str, ...]) -> None:
    info(
        f"{folder}: is read by its config.json, and {preview(names, ', ')} is not read; give that "
        "file's path to read it"
    )


def gguf_config(source: str) -> LlavaConfig | None:
    """The shapes of llama.cpp's files; None where `source` is none of them."""
    file = find_gguf(source)
    return open_files(file, None, None, None)[0].config if file else None


def is_mmproj(path: Path) -> bool:
    return "mmproj" in path.name.lower()


def count(files: list[Path], what: str) -> str:
    names = preview((shorten(p.name) for p in files), ", ")
    return f"{len(files)} {what} ({names})" if files else f"no {what}"


def find_mmproj(path: Path, width: int) -> Path | None:
    """The mmproj beside the language model `path`, made for its hidden size `width`.

    Raises UserError where there are several.
    """
    files = mmprojs(path)
    fitting = [p for p in files if width in shape_of_last(p)]
    if len(fitting) > 1:
        raise UserError(
            f"{path}: beside it are {count(fitting, 'mmproj files')} that fit it; put it and its "
            "own into a folder of their own",
            "source",
        )
    if files and not fitting:
        info(f"{path}: is read alone, for {count(files, 'mmproj')} beside it is another model's")
    return fitting[0] if fitting else None


def mmprojs(path: Path) -> list[Path]:
    return sorted(p for p in path.parent.glob("*.gguf") if is_mmproj(p))


def shape_of_last(path: Path) -> tuple[int, ...]:
    last = read_header(path)[1].get("mm.2.weight")
    return last.shape[:1] if last else ()


def open_files(
    path: Path,
    adapter: Path | None,
    aspect: str | None,
    template: str | None,
) -> tuple[Llava, Processor, dict[str, TensorInfo], Parts]:
    """The language model `path`, with an mmproj beside it, on meta; its processor; where its
    tensors are, every one accounted for; and no quantized layers.

    aspect, template: the caller's; None for what the files say. Raises UserError.
    """
    check_aspect(aspect, ASPECTS)
    decoder = read_gguf_decoder(path, template)
    tokenizer, text = decoder.tokenizer, decoder.config
    mmproj = find_mmproj(path, text.hidden_size)
    vision = open_mmproj(mmproj) if mmproj else None
    config = with_tower(decoder, vision) if vision else alone(decoder)
    if adapter is not None:
        add_adapter_tokens(tokenizer, adapter, config.text.vocab_size)
    model, entries = on_meta(config), decoder.entries | (vision.tensors if vision else {})
    check_entries(entries, model, dict.fromkeys(TABLES, text.vocab_size))
    processor = Processor(
        tokenizer,
        vision and replace(vision.images, aspect=ASPECTS[aspect or vision.images.aspect]),
        decoder.template,
        config.image_token_id,
        config.tokens_per_image if vision else 0,
        config.text.eos_token_ids,
        decoder.original,
    )
    return model, processor, entries, Parts(None, {})


def alone(decoder: Decoder) -> LlavaConfig:
    image = decoder.tokenizer.token_id(IMAGE_TOKEN)  # a LLaVA's decoder has it
    return LlavaConfig(
        None,
        decoder.config,
        image_token_id=-1 if image is None else image,
        tie_word_embeddings=decoder.tied,
        dtype=NAMES[decoder.dtype],
    )


def with_tower(decoder: Decoder, vision: Vision) -> LlavaConfig:
    """<image> and padding are added where the file has none, in rows behind its vocabulary."""
    image, pad = add_tokens(decoder.tokenizer)
    rows = decoder.config.vocab_size
    if len(decoder.tokenizer) > rows:
        rows = (len(decoder.tokenizer) + 63) // 64 * 64
    return LlavaConfig(
        vision.config,
        replace(decoder.config, vocab_size=rows, pad_token_id=pad),
        image_token_id=image,
        vision_feature_layer=vision.layer,
        projector_bias=vision.biased,
        tie_word_embeddings=decoder.tied,
        dtype=NAMES[decoder.dtype],
    )
