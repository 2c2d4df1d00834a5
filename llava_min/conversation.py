"""A KV cache that outlives one answer: the next turn is fed only from where it differs from what was read.

Between `llama.KVCache`, which knows slots and masks but not what stands in them, and generate.py, which reads
each prompt into it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_min.llama import KVCache
from llava_min.llava import Llava

ROOM = 256  # slots: the least of a cache that outlives one call, or is compiled for


def roomy(slots: int) -> int:
    """The next power of two: few sizes to grow through, and to compile for."""
    return max(ROOM, 1 << (slots - 1).bit_length())


class Conversation(KVCache):
    """The cache of one conversation: give it to `generate` or `stream` at every turn, and it grows as it must.

    It remembers the ids and pictures it has read (`ids`, `pixels`). It knows nothing of weights: when those
    change, make a new one.
    """

    def __init__(self, model: Llava):
        super().__init__(model.config.text, 1, 0, model.dtype, model.device)
        self.image_token_id, self.tokens_per_image = model.config.image_token_id, model.config.tokens_per_image
        self.ids, self.pixels = [], None

    def known(self, ids: list[int], pixels: Tensor | None) -> tuple[int, int]:
        """How many tokens, and pictures among them, were read exactly as this prompt has them."""
        n = min(len(self.ids), len(ids) - 1)  # one token at least is fed: its logits are wanted
        n = next((i for i in range(n) if self.ids[i] != ids[i]), n)
        places = [i for i in range(n) if ids[i] == self.image_token_id]
        both = [] if pixels is None or self.pixels is None else list(zip(self.pixels, pixels))
        whole = min(len(both), len(places) // self.tokens_per_image)
        pictures = next((i for i in range(whole) if not torch.equal(both[i][0], both[i][1].cpu())), whole)
        read = pictures * self.tokens_per_image
        return (n if read == len(places) else places[read]), pictures

    def rewind(self, ids: list[int], pixels: Tensor | None, slots: int) -> tuple[int, Tensor | None]:
        """Back to where the prompt differs, with room for so many `slots` in all -> how many of its tokens stay,
        and the pictures among the rest."""
        start, pictures = self.known(ids, pixels)
        self.crop(start)
        self.ids = ids[:start]
        self.pixels = None if pixels is None else pixels.cpu().clone()  # the caller may write to his
        if slots > self.slots:
            more = roomy(slots) - self.slots
            for i, pair in enumerate(self.trunk):  # one by one: never the whole cache twice
                self.trunk[i] = F.pad(pair[0].mT, (0, more)).mT, F.pad(pair[1], (0, 0, 0, more))
            self.filled = F.pad(self.filled, (0, more))
        return start, None if pixels is None or pictures == len(pixels) else pixels[pictures:]

    def settle(self, fed: list[Tensor]) -> None:
        """Write down the answer's tokens `fed`, each (1,), that were read; branches are forgotten."""
        if self.tail is None and fed:
            self.ids = self.ids + torch.cat(fed).tolist()
        self.crop(len(self.ids))
