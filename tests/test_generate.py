"""generate.py: the same ids as transformers, whatever the batch, the padding and the cache;
pictures read once.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from llava_min.cache import KVCache, round_up
from llava_min.config import LlavaConfig
from llava_min.decoding import decode
from llava_min.errors import UserError, warn_once
from llava_min.fast.fused import compiled
from llava_min.generate import generate, new_cache, stream
from llava_min.llava import Llava
from llava_min.options import Options
from llava_min.sampling import LogitsProcessor

transformers = pytest.importorskip(
    "transformers", reason="the oracle of these tests; pip install -e '.[test]'"
)
# several end tokens, so that answers of random models do end
IMAGE, EOS, PATCHES = 99, [2, 5, 7, 11, 30, 31], 4


def build(
    kind: str = "llama", heads: int = 2
) -> tuple[transformers.LlavaForConditionalGeneration, Llava]:
    """One random model twice. Large weights make the scores far apart, as a trained model's are."""
    torch.manual_seed(0)
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
        model_type="clip_vision_model",
    )
    text = dict(
        model_type=kind,
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=heads,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=512,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES
    )
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim > 1:
                p *= 6
    ours = Llava(LlavaConfig.from_hf(config.to_dict())).eval()
    ours.load_state_dict(
        {
            k.removeprefix("model.").replace("encoder.", ""): x
            for k, x in theirs.state_dict().items()
        }
    )
    return theirs, ours


@pytest.fixture(scope="module")
def pair():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build()
    torch.set_num_threads(before)


@pytest.fixture
def model(pair):
    return pair[1]


def prompt(g: torch.Generator, words: int, pictures: int = 1) -> list[int]:
    ids = torch.randint(40, 90, (words,), generator=g).tolist()
    for at in sorted(torch.randint(1, words + 1, (pictures,), generator=g).tolist(), reverse=True):
        ids[at:at] = [IMAGE] * PATCHES
    return ids


def one(ids: list[int], pixels: torch.Tensor | None = None) -> dict:
    return {"input_ids": torch.tensor([ids])} | (
        {} if pixels is None or not len(pixels) else {"pixel_values": pixels}
    )


def padded(rows: list[list[int]], side: str, extra: int = 2) -> dict:
    t = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), t), 41), torch.zeros(len(rows), t, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(t - len(row), t) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def reference(theirs, batch: dict, eos: list[int] = EOS, **options) -> list[list[int]]:
    """transformers' new ids, cut before the end token as ours are."""
    batch = {"attention_mask": torch.ones_like(batch["input_ids"])} | batch
    out = theirs.generate(
        **batch, **({"do_sample": False, "top_k": 0} | options), eos_token_id=eos, pad_token_id=0
    )
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: next((i for i, id in enumerate(row) if id in eos), None)] for row in rows]


OTHERS = [
    {"repetition_penalty": 1.4},
    {"min_new_tokens": 4},
    {"suppress_tokens": list(range(40, 70))},
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        *OTHERS,
        *(
            {"num_beams": n, "length_penalty": p, "early_stopping": e}
            for n, p, e in itertools.product((2, 4), (0.5, 1.0, 2.0), (False, True, "never"))
        ),
        *({"num_beams": 3, "num_return_sequences": 3} | other for other in OTHERS),
        {"num_beams": 2, "length_penalty": -1.0},
    ],
    ids=str,
)
def test_ids_equal_transformers_on_fifty_prompts(pair, options):
    theirs, ours = pair
    g = torch.Generator().manual_seed(1)
    batch = padded([prompt(g, 4 + i % 9) for i in range(50)], "left") | {
        "pixel_values": torch.randn(50, 3, 28, 28, generator=g)
    }
    got = generate(ours, batch, max_new_tokens=10, eos_token_id=EOS, **options)
    assert got == reference(theirs, batch, max_new_tokens=10, **options)
    assert len(set(map(tuple, got))) > 10
    assert min(map(len, got)) < 10 or options.get("length_penalty", 1) > 1  # some end by themselves


@pytest.mark.parametrize("kind, heads", [("llama", 4), ("mistral", 1), ("qwen2", 2)])
def test_other_decoders(kind, heads):
    theirs, ours = build(kind, heads)
    g = torch.Generator().manual_seed(2)
    batch = padded([prompt(g, 5), prompt(g, 9, 2)], "left") | {
        "pixel_values": torch.randn(3, 3, 28, 28, generator=g)
    }
    for options in ({}, {"num_beams": 3, "num_return_sequences": 3}):
        assert generate(ours, batch, max_new_tokens=10, eos_token_id=EOS, **options) == reference(
            theirs, batch, max_new_tokens=10, **options
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5},
        {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 2},
        {"num_beams": 2, "early_stopping": True, "repetition_penalty": 1.3},
    ],
)
def test_batch_of_eight_is_eight_singles_on_either_side(pair, options):
    theirs, ours = pair
    g = torch.Generator().manual_seed(3)
    counts = [1, 0, 2, 1, 0, 1, 3, 1]
    rows = [prompt(g, 3 + 2 * i, n) for i, n in enumerate(counts)]
    pixels = torch.randn(sum(counts), 3, 28, 28, generator=g)
    options, ends = options | {"max_new_tokens": 12}, list(range(2, 20))
    singles = [
        generate(ours, one(row, own), eos_token_id=ends, **options)
        for row, own in zip(rows, pixels.split(counts))
    ]
    # rows stop at different steps
    assert len({len(ids) for answers in singles for ids in answers}) > 2
    for side in ("left", "right"):
        batch = padded(rows, side) | {"pixel_values": pixels}
        assert generate(ours, batch, eos_token_id=ends, **options) == sum(singles, []), side
    assert reference(
        theirs, padded(rows, "left") | {"pixel_values": pixels}, eos=ends, **options
    ) == sum(singles, [])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {
            "temperature": 0.9,
            "top_k": 20,
            "top_p": 0.7,
            "repetition_penalty": 1.2,
            "min_new_tokens": 3,
        },
        {"temperature": 1.1, "num_return_sequences": 3},
        {"temperature": 1.1, "num_beams": 3, "num_return_sequences": 2},
        {"temperature": 0.7, "top_k": 1, "num_beams": 2},
        {"temperature": 0.7, "top_p": 0.01, "num_beams": 2},
    ],
)
def test_seeded_sampling_repeats_and_equals_transformers(pair, options):
    theirs, ours = pair
    g = torch.Generator().manual_seed(4)
    batch = padded([prompt(g, 5), prompt(g, 9)], "left") | {
        "pixel_values": torch.randn(2, 3, 28, 28, generator=g)
    }
    options = options | {"max_new_tokens": 10}
    got = generate(ours, batch, seed=5, eos_token_id=EOS, **options)
    torch.manual_seed(6)  # the global state has no say
    assert generate(ours, batch, seed=5, eos_token_id=EOS, **options) == got
    assert (
        len(
            {
                str(generate(ours, batch, seed=seed, eos_token_id=EOS, **options))
                for seed in range(4)
            }
        )
        > 1
    )
    torch.manual_seed(5)
    assert reference(theirs, batch, **({"do_sample": True} | options)) == got


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(0.5, 0, 1.0), (1.0, 7, 1.0), (1.7, 0, 0.9), (0.8, 30, 0.4), (2.0, 1000, 0.01)],
)
def test_probabilities_equal_the_warpers(temperature, top_k, top_p):
    from transformers.generation import logits_process as hf

    scores = torch.randn(6, 100, generator=torch.Generator().manual_seed(7)) * 3
    scores[0, :50] = 1.0  # ties at the edge of top_k
    want = hf.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        want = hf.TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = hf.TopPLogitsWarper(top_p)(None, want)
    got = LogitsProcessor(
        Options(temperature=temperature, top_k=top_k, top_p=top_p), torch.tensor([2])
    )(scores, 0)
    assert torch.equal(got.softmax(-1), want.softmax(-1))


def test_top_p_is_the_fewest_tokens_that_hold_so_much():
    kept = LogitsProcessor(Options(temperature=1.0, top_p=0.5), torch.tensor([2]))(
        torch.zeros(1, 4), 0
    ).isfinite()
    assert kept.tolist() == [[False, False, True, True]]  # two quarters are a half


def test_draw_follows_the_probabilities():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    processor = LogitsProcessor(
        Options(), torch.tensor([2]), generator=torch.Generator().manual_seed(8)
    )
    drawn = processor.sample(p.log().expand(20000, -1), 1)[:, 0].bincount(minlength=4) / 20000
    assert (drawn - p).abs().max() < 0.02 and drawn[3] == 0


def test_an_answer_stops_at_its_own_end(model):
    batch = one(prompt(torch.Generator().manual_seed(9), 8, 0))
    free = generate(model, batch, max_new_tokens=20, eos_token_id=[])[0]
    assert len(free) == 20
    end = next(id for id in free[3:] if id not in free[:3])
    cut = free[: free.index(end)]
    assert generate(model, batch, max_new_tokens=20, eos_token_id=end) == [cut]
    assert (
        end
        not in generate(
            model, batch, max_new_tokens=len(cut) + 3, min_new_tokens=len(cut) + 1, eos_token_id=end
        )[0][: len(cut) + 1]
    )
    assert generate(model, batch, max_new_tokens=2, eos_token_id=end) == [free[:2]]
    assert free[0] not in generate(model, batch, max_new_tokens=20, suppress_tokens=[free[0]])[0]
    # nothing else is left
    assert generate(model, batch, max_new_tokens=5, eos_token_id=99, suppress_tokens=range(99)) == [
        []
    ]
    steps = list(decode(model, batch, Options(max_new_tokens=20, eos_token_id=end)))
    assert len(steps) == len(cut) + 1  # nothing is computed after the end


class Counter:
    """Counts pictures through the tower, and tokens of each pass through the language model."""

    def __init__(self, model: Llava):
        self.pictures, self.tokens = 0, []
        self.hooks = [
            model.vision_tower.register_forward_hook(self.tower),
            model.language_model.register_forward_hook(self.text),
        ]

    def tower(self, module, args, out):
        self.pictures += len(out)

    def text(self, module, args, out):
        self.tokens.append(tuple(args[0].shape[:2]))

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize(
    "options, rows",
    [
        ({}, 2),
        ({"num_beams": 4}, 8),
        ({"temperature": 1.0, "num_return_sequences": 3, "seed": 0}, 6),
    ],
)
def test_pictures_and_prompt_are_read_once(model, options, rows):
    g = torch.Generator().manual_seed(10)
    batch = padded([prompt(g, 6), prompt(g, 9)], "left", extra=5) | {
        "pixel_values": torch.randn(2, 3, 28, 28, generator=g)
    }
    with Counter(model) as count:
        generate(model, batch, max_new_tokens=5, eos_token_id=[], **options)
    assert count.pictures == 2
    # padding that no row needs is not read at all
    assert count.tokens == [(2, 9 + PATCHES)] + [(rows, 1)] * 4


def test_a_conversation_reads_only_what_is_new(model):
    g = torch.Generator().manual_seed(11)
    pixels, cache = torch.randn(1, 3, 28, 28, generator=g), new_cache(model)

    def ask(ids: list[int], pixels: torch.Tensor, **options) -> tuple[list[int], int, int]:
        with Counter(model) as count:
            got = generate(
                model, one(ids, pixels), cache=cache, max_new_tokens=6, eos_token_id=[], **options
            )[0]
        # = a fresh run
        assert (
            got
            == generate(model, one(ids, pixels), max_new_tokens=6, eos_token_id=[], **options)[0]
        )
        return got, count.pictures, count.tokens[0][1]

    talk = [50, 51, 52] + [IMAGE] * PATCHES + [53, 54]
    answer, pictures, read = ask(talk, pixels)
    assert (pictures, read) == (1, len(talk))
    talk += answer + [60, 61]
    assert ask(talk, pixels)[1:] == (0, 3)  # the answer's last token was never fed
    assert ask(talk, pixels, num_beams=3)[1:] == (0, 1)  # beams branch from the conversation
    # and so do several answers
    assert ask(talk, pixels, temperature=1.0, num_return_sequences=2, seed=0)[1:] == (0, 1)
    # and leave nothing behind
    assert cache.suffix is None and cache.length == len(cache.ids) == len(talk)
    assert ask(talk[:9] + [70, 71], pixels)[1:] == (0, 2)  # another second question
    other = pixels.clone()
    other[0, 0, 0, 0] += 1
    # another picture: only the words before it are kept
    assert ask(talk, other)[1:] == (1, len(talk) - 3)
    other += 1  # the caller's tensor changes under us
    assert ask(talk, other)[1:] == (1, len(talk) - 3)
    two = [50, 51, 52] + [IMAGE] * PATCHES + [53] + [IMAGE] * PATCHES + [54]
    assert ask(two, torch.cat([other, pixels]))[1:] == (1, PATCHES + 1)
    assert ask(two, torch.cat([other, other]))[1:] == (1, PATCHES + 1)
    assert ask([50, 51, 52, 55], pixels[:0])[1:] == (0, 1)
    assert ask([80] * 200, pixels[:0])[1:] == (0, 200)
    assert ask([80] * 245, pixels[:0])[1:] == (0, 45) and cache.capacity == 256
    # it grew, and has what it had
    assert ask([80] * 260, pixels[:0])[1:] == (0, 15) and cache.capacity == 512


def test_rooms_are_powers_of_two():
    assert [round_up(n) for n in (1, 256, 257, 512, 513)] == [256, 256, 512, 512, 1024]


def test_an_interrupted_conversation_goes_on(model):
    pixels, cache = (
        torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(12)),
        new_cache(model),
    )
    talk = [50] + [IMAGE] * PATCHES + [51]

    def stop(*_):
        if cache.length > at:
            raise KeyboardInterrupt

    hook = model.language_model.layers[0].register_forward_hook(stop)
    for at in (0, 9):  # while reading the prompt; in the middle of a step
        with pytest.raises(KeyboardInterrupt):
            generate(model, one(talk, pixels), cache=cache, max_new_tokens=9, eos_token_id=[])
    hook.remove()
    steps = decode(model, one(talk, pixels), Options(max_new_tokens=9, eos_token_id=[]), cache)
    said = [int(next(steps)) for _ in range(3)]
    steps.close()  # the reader went away
    assert said == generate(model, one(talk, pixels), max_new_tokens=3, eos_token_id=[])[0]
    with Counter(model) as count:
        got = generate(model, one([*talk, *said, 60], pixels), cache=cache, max_new_tokens=5)
    assert (count.pictures, count.tokens[0]) == (0, (1, 2))
    assert got == generate(model, one([*talk, *said, 60], pixels), max_new_tokens=5)


def test_compile_is_one_graph_without_recompiling(model, monkeypatch):
    """With the backend that runs the captured graph as it is: the real one takes half a minute."""
    from torch._dynamo.utils import counters

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend="eager", **kw))
    compiled.cache_clear()
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(13)
    before, at = counters["stats"]["unique_graphs"], None
    for words in (5, 9, 30):
        batch = padded([prompt(g, words), prompt(g, words + 3)], "left") | {
            "pixel_values": torch.randn(2, 3, 28, 28, generator=g)
        }
        assert generate(model, batch, compile=True, max_new_tokens=8) == generate(
            model, batch, max_new_tokens=8
        )
        at = at or counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == at == before + 1
    cache, talk = new_cache(model), [50, 51]
    for _ in range(2):  # a conversation: one row, so one more graph
        said = generate(
            model, one(talk), compile=True, cache=cache, max_new_tokens=8, eos_token_id=[]
        )[0]
        assert said == generate(model, one(talk), max_new_tokens=8, eos_token_id=[])[0]
        talk += said
    assert counters["stats"]["unique_graphs"] == at + 1
    compiled.cache_clear()
    with pytest.raises(UserError, match="compile"):
        generate(model, batch, compile=True, num_beams=2)


@pytest.mark.parametrize(
    "bad, names",
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_new_tokens": -5}, "max_new_tokens: -5"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": 10**9}, "1000000005 .* 512"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"min_new_tokens": 300}, "min_new_tokens: 300"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens: 6 .* max_new_tokens 5"),
        ({"temperature": -1}, "temperature: -1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_p": 0}, "top_p: 0"),
        ({"top_p": 1.1}, "top_p: 1.1"),
        ({"top_k": -1}, "top_k: -1"),
        ({"num_beams": 0}, "num_beams: 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "3 answers .* 2 beams"),
        ({"num_return_sequences": 2}, "greedy"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"eos_token_id": 100}, "eos_token_id: 100"),
        ({"suppress_tokens": [-1]}, "suppress_tokens: -1"),
        ({"length_penalty": -51}, "length_penalty: -51"),
        ({"length_penalty": 50.5}, "length_penalty: 50.5"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"temperature": 1e-40}, "temperature: 1e-40"),
        ({"temperature": 9e-6}, "temperature"),
        ({"repetition_penalty": 9e-4}, "repetition_penalty: 0.0009"),
        ({"suppress_tokens": range(100)}, "suppress_tokens: all 100"),
        (
            {"suppress_tokens": list(range(99)), "eos_token_id": 99, "min_new_tokens": 1},
            "suppress_tokens: all ids but",
        ),
        ({"eos_token_id": range(100), "num_beams": 2}, "eos_token_id: all 100"),
        ({"num_beams": 1025}, "num_beams: 1025"),
        ({"num_return_sequences": 10**5, "temperature": 1.0}, "num_return_sequences: 100000"),
        ({"eos_token_id": 2.5}, "eos_token_id: 2.5"),
        ({"eos_token_id": [True]}, "eos_token_id: True"),
        ({"eos_token_id": "2"}, "eos_token_id: '2'"),
        ({"suppress_tokens": 500}, "suppress_tokens: 500"),
        ({"eos_token_id": torch.ones(2, 2)}, "eos_token_id"),
        ({"suppress_tokens": [None]}, "suppress_tokens: None"),
        ({"do_sample": True}, "do_sample: no option of generate; did you mean temperature"),
        ({"max_length": 5}, "max_length: .* max_new_tokens"),
        ({"max_new_token": 5}, "max_new_token: .* max_new_tokens"),
        ({"zzz": 5}, "zzz: .* there are max_new_tokens"),
    ],
)
def test_bad_options_are_named_before_any_work(model, bad, names):
    with Counter(model) as count, pytest.raises(UserError, match=names) as e:
        generate(model, one([50, 51, 52, 53, 54]), **bad)
    assert count.tokens == [] and "\n" not in str(e.value)


def test_an_option_without_effect_is_told_once(capsys):
    warn_once.cache_clear()
    for name, idle, without in (
        ("top_k", 3, "temperature above 0"),
        ("top_p", 0.5, "temperature above 0"),
        ("length_penalty", 2.0, "num_beams above 1"),
        ("early_stopping", True, "num_beams above 1"),
    ):
        Options(**{name: idle}), Options(**{name: idle})
        assert capsys.readouterr().err.count(f"{name}: has no effect without {without}") == 1
        Options(**{name: idle}, temperature=1.0, num_beams=2)
        assert not capsys.readouterr().err
    warn_once.cache_clear()


def test_ids_of_any_kind(model):
    batch = one(prompt(torch.Generator().manual_seed(3), 8, 0))
    want = generate(model, batch, max_new_tokens=9, eos_token_id=EOS, suppress_tokens=[40])
    for kind in (np.array, torch.tensor, tuple, lambda ids: [*map(np.int64, ids)] * 2):
        assert (
            generate(
                model, batch, max_new_tokens=9, eos_token_id=kind(EOS), suppress_tokens=np.int64(40)
            )
            == want
        )


IDS = torch.tensor([[50, 51, 52]])


@pytest.mark.parametrize(
    "batch, says",
    [
        (None, "batch: NoneType"),
        ({}, "batch: dict without input_ids"),
        ([1], "batch: list"),
        (IDS, "batch: Tensor"),
        ({"input_ids": [[50]]}, "input_ids: list"),
        ({"input_ids": IDS[0]}, r"input_ids: \(3,\)"),
        ({"input_ids": IDS.float()}, "float32, expected an int64"),
        ({"input_ids": IDS[:0]}, r"\(0, 3\)"),
        ({"input_ids": IDS + 48}, "98 to 100, expected ids from 0 to 99"),
        ({"input_ids": -IDS}, "-52 to -50"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 4)}, r"attention_mask: \(1, 4\)"),
        ({"input_ids": IDS, "attention_mask": [[1]]}, "attention_mask: list"),
        *(
            ({"input_ids": IDS, "pixel_values": x}, "pixel_values: ")
            for x in (
                np.zeros((1, 3, 28, 28), np.float32),
                [0.5],
                torch.zeros(3, 28, 28),
                torch.zeros(1, 1, 28, 28),
                torch.zeros(1, 3, 27, 28),
                torch.zeros(1, 3, 28, 28, dtype=torch.uint8),
            )
        ),
    ],
    ids=str,
)
def test_what_is_no_batch_is_one_line(model, batch, says):
    for call in (lambda: generate(model, batch), lambda: stream(model, batch, Letters())):
        with pytest.raises(UserError, match=says) as e:
            call()
        assert "\n" not in str(e.value)


def test_numbers_of_numpy_are_numbers(model):
    batch = one([50, 51, 52])
    plain = dict(temperature=0.5, top_k=5, top_p=0.5, max_new_tokens=4, seed=3)
    theirs = dict(
        temperature=np.float32(0.5),
        top_k=np.int64(5),
        top_p=np.float64(0.5),
        max_new_tokens=np.uint8(4),
        seed=np.int32(3),
    )
    assert generate(model, batch, **theirs) == generate(model, batch, **plain)
    for bad in (np.float64("nan"), np.bool_(True), np.ones(2), True, "0.5"):
        with pytest.raises(UserError, match="temperature: "):
            generate(model, batch, temperature=bad)


def test_a_stream_needs_a_tokenizer(model):
    with pytest.raises(UserError, match="processor: NoneType"):
        stream(model, one([50, 51]), None)


def test_bad_batches(model):
    pixels = torch.zeros(1, 3, 28, 28)
    with pytest.raises(UserError, match="no images"):
        generate(model, one([50] + [IMAGE] * PATCHES))
    with pytest.raises(UserError, match="5 image tokens for 1 images"):
        generate(model, one([50] + [IMAGE] * 5, pixels))
    with pytest.raises(UserError, match="without a token"):
        generate(
            model,
            {"input_ids": torch.tensor([[50], [51]]), "attention_mask": torch.tensor([[1], [0]])},
        )
    with pytest.raises(UserError, match="2 prompts"):
        generate(model, {"input_ids": torch.tensor([[50], [51]])}, cache=new_cache(model))
    # a cache that does not know what it has read
    with pytest.raises(UserError, match=r"new_cache\(model\)"):
        generate(
            model,
            one([50, 51]),
            cache=KVCache(model.config.text, 1, 300, model.dtype, model.device),
        )


def test_a_conversation_of_another_model(model):
    other = Llava(
        dataclasses.replace(
            model.config, text=dataclasses.replace(model.config.text, rope_theta=5e5)
        )
    )
    with pytest.raises(UserError, match=r"new_cache\(model\) of this model"):
        generate(model, one([50, 51]), cache=new_cache(other))


def test_logits_that_are_not_numbers_stop_the_run():
    _, model = build()
    model.lm_head.weight.data[3] = math.nan
    for options in ({}, {"temperature": 1.0, "seed": 0}, {"num_beams": 2}):
        with pytest.raises(UserError, match="not finite"):
            generate(model, one([50, 51]), **options)


class Letters:
    """A tokenizer whose odd ids are the first half of a character."""

    def stream(self):
        self.held = ""
        return self

    def push(self, id: int) -> str:
        self.held += f"<{id}>"
        if id % 2:
            return ""
        text, self.held = self.held, ""
        return text

    def flush(self) -> str:
        return self.held


def test_a_stream_is_the_same_answer_in_pieces(model):
    batch = one(prompt(torch.Generator().manual_seed(14), 8, 0))
    want, ids = generate(model, batch, max_new_tokens=20, eos_token_id=[])[0], []
    pieces = list(stream(model, batch, Letters(), ids=ids, max_new_tokens=20, eos_token_id=[]))
    assert ids == want and "".join(pieces) == "".join(f"<{id}>" for id in want) and all(pieces)
    letters = Letters()
    letters.stop_ids = [want[2]]  # a processor knows what ends an answer
    assert "".join(stream(model, batch, letters, max_new_tokens=20)) == "".join(
        f"<{id}>" for id in want[: want.index(want[2])]
    )
    for several in ({"num_beams": 2}, {"num_return_sequences": 2, "temperature": 1.0}):
        with pytest.raises(UserError, match="one answer"):  # at once, not at the first piece
            stream(model, batch, letters, **several)
