"""What shows that a folder just written is the model that it was made of: every tensor, read back,
has the bytes that were meant, and the logits are the source's.

Both models run block by block, each with its weights for as long as it runs and the next one's on
their way, so a model of any size is compared in the memory of two blocks. The source runs while it
is written, on the tensors that the writer has read, and with LoRA's updates beside them: y = W x +
s B A x, where the folder has the sum W + s B A.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_min.errors import UserError, label
from llava_min.export.stored import Stored
from llava_min.export.stream import Read, Sums, checksum, reader_threads
from llava_min.export.tensors import Tensors, Update
from llava_min.llava import Llava
from llava_min.load import on_meta, plan_model, read_config
from llava_min.tensors import TensorInfo
from llava_min.weights import SMALL

# of the logits' largest value, by which the written model may differ from its source: the weights
# are rounded to the dtype on disk, and an adapter is merged in another order than it is applied
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LAYER = 0.2  # of that, of its norm, is what one merged layer's outputs may differ by
EMBEDDING = "language_model.embed_tokens"
Expected = tuple[list[Tensor], dict[str, Tensor]]


def is_small(model: Llava) -> bool:
    return sum(p.numel() for p in model.parameters()) <= SMALL


class Streamed:
    """Gives each part of a `model` on meta its weights while it runs, by hooks."""

    def __init__(self, model: Llava, read: Read, dtype: torch.dtype, pool: ThreadPoolExecutor):
        self.model, self.dtype, self.pool = model, dtype, pool
        self.read = read
        tower, text = model.vision_tower, model.language_model
        image = [tower.embeddings, *tower.layers[: tower.layers_used], model.multi_modal_projector]
        # as they run, see `outputs`
        first = [text.embed_tokens, *image] if is_small(model) else [*image, text.embed_tokens]
        self.parts = [*first, *text.layers, model.lm_head]
        paths = {module: path for path, module in model.named_modules()}
        self.paths = [paths[part] for part in self.parts]
        self.ahead: tuple[int, dict[str, Future]] | None = None
        # these say on which device and in which dtype their models are, and stay
        for path in ("vision_tower.pre_layrnorm", "language_model.norm"):
            put(model.get_submodule(path), self.came(self.ask(path)))
        for i, part in enumerate(self.parts):
            meta = dict(part.named_parameters())
            part.register_forward_pre_hook(lambda part, _, i=i: put(part, self.take(i)))
            part.register_forward_hook(lambda part, _, out, meta=meta: put(part, meta))

    def ask(self, path: str) -> dict[str, Future]:
        """For the weights of a part."""
        part = self.model.get_submodule(path)
        if path == "lm_head" and self.model.config.tie_word_embeddings:
            path = EMBEDDING
        return {
            name: self.pool.submit(self.read, f"{path}.{name}", self.dtype)
            for name, _ in part.named_parameters()
        }

    def came(self, asked: dict[str, Future]) -> dict[str, nn.Parameter]:
        return {
            name: nn.Parameter(coming.result(), requires_grad=False)
            for name, coming in asked.items()
        }

    def take(self, i: int) -> dict[str, nn.Parameter]:
        """The weights of part `i`; those of the next are read from here on."""
        at, coming = self.ahead or (i, self.ask(self.paths[i]))
        found = self.came(coming if at == i else self.ask(self.paths[i]))
        more = i + 1 < len(self.paths)
        self.ahead = (i + 1, self.ask(self.paths[i + 1])) if more else None
        return found


def put(part: nn.Module, tensors: dict[str, nn.Parameter]) -> None:
    for name, p in tensors.items():
        path, _, leaf = name.rpartition(".")
        setattr(part.get_submodule(path), leaf, p)


# ---- an adapter's layers


def add_updates(
    model: nn.Module, updates: dict[str, list[Update]], made: dict[str, Tensor]
) -> None:
    """In fp32 to what the layers at these paths make, which is kept in `made`."""
    for path, mine in updates.items():

        def add(layer: nn.Module, inputs: tuple, y: Tensor, path=path, mine=mine) -> Tensor:
            x, total = inputs[0].float(), y.float()
            for a, b, scale in mine:
                total = total + scale * F.linear(F.linear(x, a), b)
            made[path] = total.to(y.dtype)
            return made[path]

        model.get_submodule(path).register_forward_hook(add)


def compare_layers(model: nn.Module, made: dict[str, Tensor], tolerance: float) -> None:
    """Each merged layer against what the source's `made` of the same input, which goes on from
    there: what is rounded in one layer is not taken for a fault of the next.
    """
    for path in made:

        def compare(layer: nn.Module, inputs: tuple, y: Tensor, path=path) -> Tensor:
            right = made[path]
            error, norm = (float(x.float().norm()) for x in (y - right, right))
            if not error <= tolerance * norm:
                raise UserError(
                    f"{path}: merged, its outputs differ by {error:.2g}, of a norm of {norm:.2g}, "
                    f"from the adapter's beside the base; merge with {label('dtype')} fp32"
                )
            return right

        if path != "lm_head":  # the logits are compared in any case
            model.get_submodule(path).register_forward_hook(compare)


# ---- the whole


@torch.no_grad()
def outputs(model: Llava, read: Read, dtype: torch.dtype, rows: int) -> list[Tensor]:
    """What a model on meta makes of one image and some tokens: logits of the first `rows` tokens,
    and of a large one, whose decoder gets the tokens alone, the image's features before them.
    """
    model.eval()  # or texts alone would run the tower, too
    small = is_small(model)
    config = model.config
    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, *[config.vision.image_size] * 2, generator=g)
    ids = torch.randint(0, min(rows, config.image_token_id), (1, 24), generator=g)
    with reader_threads(2) as pool:
        Streamed(model, read, dtype, pool)
        if small:
            image = torch.full((1, config.tokens_per_image), config.image_token_id)
            ids = torch.cat([ids[:, :12], image, ids[:, 12:]], 1)
            return [model(ids, pixels)[..., :rows].float()]
        return [model.encode_images(pixels).float(), model(ids)[..., :rows].float()]


class Checked:
    """Reads the tensors of the folder, each as it was written by its checksum."""

    def __init__(
        self, model: Llava, entries: dict[str, TensorInfo], sums: Sums, dtype: torch.dtype
    ):
        self.reader, self.entries = Stored(entries, model), entries
        self.left, self.dtype = dict(sums), dtype

    def __call__(self, name: str, dtype: torch.dtype) -> Tensor:
        x, entry = self.reader(name, self.dtype), self.entries[name]
        right = self.left.pop(name, None)
        if right is not None and checksum(x[: entry.shape[0]]) != right:
            raise UserError(
                f"{entry}: reads back otherwise than it was written; "
                "check the disk, and write it again"
            )
        return x if dtype == self.dtype else self.reader.memory.empty(x.shape, dtype).copy_(x)

    def rest(self) -> None:
        """Those that no forward pass has needed."""
        for name in list(self.left):
            self(name, self.dtype)


def run_dtype(model: Llava, dtype: torch.dtype) -> torch.dtype:
    """In which a model written in `dtype` runs."""
    return dtype if dtype == torch.bfloat16 and not is_small(model) else torch.float32


@contextmanager
def running(model: Tensors, dtype: torch.dtype, rows: int) -> Iterator[Future]:
    """Runs the source beside what is written in the block, in the same order; gives what will be
    its `outputs`, and what its layers with LoRA made.
    """
    source, between, made = on_meta(model.model.config), model.handover, {}
    add_updates(source, model.updates, made)

    def run() -> Expected:
        try:
            return outputs(source, model.again, run_dtype(source, dtype), rows), made
        finally:  # the writer waits for nobody
            between.close()

    between.open()
    with ThreadPoolExecutor(1) as pool:
        expected = pool.submit(run)
        try:
            yield expected
        except BaseException:
            between.end(failed=True)
            raise
        between.end()


def prove(
    model: Tensors, folder: Path, dtype: torch.dtype, rows: int, sums: Sums, expected: Expected
) -> float:
    """Read the folder back: every tensor by its checksum, and the logits of the first `rows` tokens
    against the source's, of `running`; returns their largest difference.

    Raises UserError for a tensor that is another, and a difference beyond TOLERANCE.
    """
    found, entries, _ = plan_model(folder, *read_config(folder))
    checked, worst = Checked(found, entries, sums, dtype), 0.0
    logits, made = expected
    compare_layers(found, made, TOLERANCE[dtype] * LAYER)
    out = outputs(found, checked, run_dtype(model.model, dtype), rows)
    checked.rest()
    for mine, right in zip(out, logits):
        worst = max(worst, float((mine - right).abs().max()))
        most = float(right.abs().max())
        if not worst <= TOLERANCE[dtype] * most:
            raise UserError(
                f"{folder}: its logits differ from the source's by {worst:.3g}, of {most:.3g} at "
                f"most; export it with {label('dtype')} fp32"
            )
    return worst
