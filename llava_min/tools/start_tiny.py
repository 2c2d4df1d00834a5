"""An untrained tiny LLaVA with its tokenizer: what recipe `tiny` starts from.

python -m llava_min.tools.start_tiny OUT
"""

from dataclasses import dataclass, field
from pathlib import Path

from llava_min.errors import UserError
from llava_min.util.cli import parse
from llava_min.util.script import run


@dataclass
class Config:
    out: list[str] = field(default_factory=list)  # the folder to write


def main(argv: list[str]) -> None:
    flags = parse(Config, argv, "Write an untrained tiny LLaVA.", positional="out")
    if len(flags.out) != 1:
        raise UserError("OUT: give the one folder to write")

    from llava_min.config import LlavaConfig, TextConfig, VisionConfig
    from llava_min.data.image import CLIP_MEAN, CLIP_STD, ImageConfig
    from llava_min.data.processor import Processor
    from llava_min.data.tokenizer import Tokenizer
    from llava_min.load import random_model, write_model
    from llava_min.toy import vocab as toy_vocab
    from llava_min.util.files import new_folder, write_json

    with new_folder(Path(flags.out[0])) as folder:
        words = toy_vocab.words(), toy_vocab.toy_words()
        (folder / "tokenizer.model").write_bytes(toy_vocab.tokenizer_model(*words))
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
        settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        write_json(folder / "tokenizer_config.json", settings)
        tokenizer = Tokenizer.load(folder)
        image, pad = tokenizer.add_special("<image>"), tokenizer.add_special("<pad>")
        vision = VisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=5,  # the last one is never run, as in LLaVA
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            projection_dim=128,
        )
        text = TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=432,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=32,
            max_position_embeddings=1024,
            pad_token_id=pad,
        )
        config = LlavaConfig(vision, text, image_token_id=image, tie_word_embeddings=True)
        images = ImageConfig(vision.image_size, CLIP_MEAN, CLIP_STD, "pad")
        processor = Processor(tokenizer, images, "llava_hf", image, config.tokens_per_image)
        model = random_model(config)
        write_model(model, processor, folder, model.dtype)


if __name__ == "__main__":
    run(main)
