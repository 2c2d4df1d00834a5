"""What the tests of training share: a tiny random model with two dozen records, and a run on them
in this process or a child.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from conftest import load_script

from llava_min.config import LlavaConfig, TextConfig, VisionConfig
from llava_min.data.image import CLIP_MEAN, CLIP_STD, ImageConfig
from llava_min.data.processor import Processor
from llava_min.data.tokenizer import Tokenizer
from llava_min.errors import UserError, info
from llava_min.load import TINY, random_model, save
from llava_min.toy import draw as toy

train = load_script("train")


def make_home(home: Path) -> Path:
    """`home`/model of 70,000 parameters; in `home`/data train.json of 24 records, val.json of 6,
    text.json of 24 without pictures.
    """
    tokenizer = Tokenizer.load(TINY)
    image, pad = tokenizer.token_id("<image>"), tokenizer.token_id("<pad>")
    vision = VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    text = TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=pad,
    )
    config = LlavaConfig(vision, text, image_token_id=image, tie_word_embeddings=True)
    images = ImageConfig(vision.image_size, CLIP_MEAN, CLIP_STD, "pad")
    save(
        random_model(config),
        Processor(tokenizer, images, "llava_hf", image, config.tokens_per_image),
        home / "model",
    )
    toy.write(home / "data", "questions", train=24, val=6)
    words = [
        [{"from": "human", "value": f"Say {i}."}, {"from": "gpt", "value": f"This is {i}."}]
        for i in range(24)
    ]
    (home / "data" / "text.json").write_text(
        json.dumps([{"id": str(i), "conversations": turns} for i, turns in enumerate(words)])
    )
    return home


def argv(home: Path, out: Path, *more: str) -> list[str]:
    given = {
        "--model": home / "model",
        "--data": home / "data" / "train.json",
        "--out": out,
        "--device": "cpu",
        "--precision": "fp32",
        "--log-every": "1",
        "--lr": "1e-2",
        "--warmup-steps": "2",
        "--save-every": "0",
    }
    given |= dict(zip(more[::2], more[1::2])) if all(m.startswith("--") for m in more[::2]) else {}
    return [str(x) for pair in given.items() for x in pair]


def run(home: Path, out: Path, *more: str, switches: tuple[str, ...] = ()) -> list[dict]:
    """Train in this process; the lines of metrics.jsonl."""
    train.main([*argv(home, out, *more), *switches])
    return lines(out)


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    return (
        [json.loads(line) for line in (out / name).read_text().splitlines()]
        if (out / name).exists()
        else []
    )


def final(out: Path) -> tuple[str, bytes]:
    """The last checkpoint's name and its manifest: hashes of the weights, the optimizer, the random
    streams, all.
    """
    last = (out / "last").resolve()
    return last.name, (last / "manifest.json").read_bytes()


def child(work: Callable[[], object], log: Path | None = None) -> int:
    """`work` in a fork of this process, as a script would run it; its exit status, negative for the
    signal that ended it.
    """
    pid = os.fork()
    if not pid:
        code = 1
        try:
            fd = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1), os.dup2(fd, 2)
            sys.stdout, sys.stderr = (
                os.fdopen(1, "w", closefd=False),
                os.fdopen(2, "w", closefd=False),
            )
            code = work() or 0
        except UserError as e:
            info(f"error: {e}")
            code = 2
        except KeyboardInterrupt:
            code = 130
        except SystemExit as e:
            code = e.code
        except BaseException as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
