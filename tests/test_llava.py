"""llava.py: features, logits and loss of transformers for every decoder, whatever the batch and its
padding.
"""

from dataclasses import replace

import pytest
import torch
from conftest import IMAGE, KINDS, PATCHES, VOCAB, our_model, pixels, rows, their_model

from llava_min import llava
from llava_min.config import VisionConfig
from llava_min.errors import UserError

IGNORE = -100


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def feed(pair, ids, px=None, mask=None) -> float:
    """How far our logits are from transformers', where the tokens are real."""
    theirs, ours = pair
    real = torch.ones_like(ids) if mask is None else mask
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    expected = theirs(
        input_ids=ids, pixel_values=px, attention_mask=real, position_ids=positions
    ).logits
    got = ours(ids, px, mask)
    # far enough apart for a fault to show
    assert got.shape == expected.shape and expected.std() > 0.1
    return (got - expected)[real.bool()].abs().max().item()


@pytest.mark.parametrize("layer", range(-4, 4))
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_features_of_every_layer(layer, strategy):
    theirs = their_model(vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    ours = our_model(theirs)
    if layer == 0:  # transformers 5.23 takes 0 for "no hidden states"; -4 is the same layer
        theirs.config.vision_feature_layer = theirs.model.config.vision_feature_layer = -4
    px = pixels(3)
    features = theirs.model.vision_tower(px, output_hidden_states=True).hidden_states[layer]
    assert difference(ours.vision_tower(px), features) <= 1e-4
    expected = torch.stack(list(theirs.get_image_features(px).pooler_output))
    assert difference(ours.encode_images(px), expected) <= 1e-4
    patches = PATCHES + (strategy == "full")
    assert expected.shape[1] == patches == ours.config.tokens_per_image
    assert feed((theirs, ours), rows(1, 2, patches=patches), px) <= 1e-4


def test_a_tower_without_a_class_token_keeps_all_its_features(monkeypatch):
    ours = our_model(their_model())
    px = pixels(2)
    assert ours.encode_images(px).shape[1] == PATCHES
    monkeypatch.setattr(VisionConfig, "has_class_token", False)
    assert ours.encode_images(px).shape[1] == PATCHES + 1
    full = replace(ours.config, vision_feature_select_strategy="full")
    assert full.tokens_per_image == PATCHES  # there is none to keep


def test_projector_without_bias():
    theirs = their_model(multimodal_projector_bias=False)
    assert feed((theirs, our_model(theirs)), rows(2), pixels(2)) <= 1e-4


@pytest.mark.parametrize(
    "pictures", [(1,), (0,), (1, 1, 1), (0, 3, 1, 2), (2, 0), (0, 0, 1)], ids=str
)
def test_logits_whatever_pictures_the_rows_hold(pair, pictures):
    assert feed(pair, rows(*pictures), pixels(sum(pictures)) if sum(pictures) else None) <= 1e-4


def test_text_alone_with_no_picture_tensor_or_an_empty_one(pair):
    ours, ids = pair[1], rows(0, 0)
    assert torch.equal(ours(ids), ours(ids, pixels(0)))


@pytest.mark.parametrize("pads", [(0, 3), (7, 0, 2)], ids=str)
def test_padding_on_either_side_changes_nothing(pair, pads):
    ours, length = pair[1], 16
    ids = rows(*[i % 2 + 1 for i in range(len(pads))], length=length)
    per_row = pixels(int((ids == IMAGE).sum()) // PATCHES).split(
        [i % 2 + 1 for i in range(len(pads))]
    )
    short = [row[: length - n] for row, n in zip(ids, pads)]
    alone = [ours(row[None], px)[0] for row, px in zip(short, per_row)]
    for side in ("left", "right"):
        padded, mask = (
            torch.full((len(pads), length), 7),
            torch.zeros(len(pads), length, dtype=torch.long),
        )
        for i, row in enumerate(short):
            at = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            padded[i, at], mask[i, at] = row, 1
        got = ours(padded, torch.cat(per_row), mask)
        assert got.isfinite().all()
        for i, want in enumerate(alone):
            assert difference(got[i][mask[i].bool()], want) <= 1e-5, side
        assert feed(pair, padded, torch.cat(per_row), mask) <= 1e-4
        assert difference(got, ours(padded, torch.cat(per_row), mask.bool())) == 0


def test_pictures_go_to_their_places_in_reading_order(pair):
    ours, ids, px = pair[1], rows(1, 2), pixels(3)
    before = ours(ids, px)
    swapped = ours(ids, px[[0, 2, 1]])
    assert difference(before[0], swapped[0]) == 0 and difference(before[1], swapped[1]) > 0.01


def labels_of(ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Right-padded rows: nothing is learned at the start, at every third token and at the padding."""
    labels = ids.clone()
    labels[:, :9], labels[:, ::3] = IGNORE, IGNORE
    for row, n in zip(labels, lengths):
        row[n:] = IGNORE
    return labels


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_loss_is_transformers_loss(pair, chunk, monkeypatch):
    monkeypatch.setattr(llava, "LOGIT_ROWS", chunk)
    theirs, ours = pair
    ids, px, lengths = rows(1, 0, 1), pixels(2), [20, 17, 12]
    labels = labels_of(ids, lengths)
    mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).long()
    count = (labels[:, 1:] != IGNORE).sum()
    expected = (
        theirs(input_ids=ids, pixel_values=px, attention_mask=mask, labels=labels).loss * count
    )
    got = ours.loss(ids, labels, px)
    assert got.shape == () and abs(got - expected) <= 1e-4 * expected


def test_gradients_are_transformers_gradients():
    theirs = their_model("mistral").requires_grad_(True)
    ours = our_model(theirs).requires_grad_(True)
    ids, px = rows(1, 2), pixels(3)
    labels = labels_of(ids, [20, 15])
    theirs(input_ids=ids, pixel_values=px, labels=labels).loss.mul(
        (labels[:, 1:] != IGNORE).sum()
    ).backward()
    ours.loss(ids, labels, px).backward()
    expected = {
        n.removeprefix("model.").replace("encoder.", ""): p.grad
        for n, p in theirs.named_parameters()
    }
    for name, p in ours.named_parameters():
        if name.startswith(("vision_tower.layers.2.", "vision_tower.post_layernorm")):
            assert p.grad is None  # not read
        else:
            assert (p.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-5, name


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_training_on_padded_rows_is_the_same_forward(kind):
    """Attention takes another path where gradients are wanted."""
    ours = our_model(their_model(kind))
    ids, px = rows(0, 2), pixels(2)
    for side in (slice(0, 4), slice(16, 20), slice(0, 0)):
        mask = torch.ones_like(ids)
        mask[0, side] = 0
        plain = ours.requires_grad_(False)(ids, px, mask)
        assert difference(ours.requires_grad_(True)(ids, px, mask), plain) <= 1e-5


def test_in_training_a_batch_without_pictures_reaches_all_that_is_trained():
    """Ranks wait for one another's gradients: a parameter without one on one of them stops the run."""
    ours, ids = our_model(their_model()).train().requires_grad_(True), rows(0)
    ours.loss(ids, ids).backward()
    unread = ("vision_tower.layers.2.", "vision_tower.post_layernorm")
    assert all(
        p.grad is not None for name, p in ours.named_parameters() if not name.startswith(unread)
    )
    assert not any(p.grad.any() for p in ours.multi_modal_projector.parameters())


def test_the_tower_and_projector_may_be_wider_than_the_rest():
    """What is trained is in fp32. And the loss is, whatever the logits are."""
    ours, ids, px = our_model(their_model()), rows(1), pixels(1)
    exact = ours(ids, px)
    ours.bfloat16()
    ours.vision_tower.float()
    ours.multi_modal_projector.float()
    got = ours(ids, px)
    assert got.dtype == torch.bfloat16 and (got - exact).norm() < 0.03 * exact.norm()
    assert ours.loss(ids, ids, px).dtype == torch.float32


def test_a_batch_that_teaches_nothing_has_loss_zero(pair):
    ids = rows(0)
    loss = pair[1].loss(ids, torch.full_like(ids, IGNORE))
    assert loss.shape == () and loss == 0


def test_the_loss_reads_no_padding(pair):
    ours, ids, px = pair[1], rows(1, 1), pixels(2)
    labels = labels_of(ids, [20, 14])
    other = ids.clone()
    other[1, 14:] = 5
    assert ours.loss(ids, labels, px) == ours.loss(other, labels, px)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_tied_where_the_config_says_so(kind):
    theirs = their_model(kind)
    ours = our_model(theirs)
    tied = ours.lm_head.weight is ours.language_model.embed_tokens.weight
    assert (
        tied == (kind == "qwen2") == (theirs.lm_head.weight is theirs.get_input_embeddings().weight)
    )


@pytest.mark.parametrize("pictures, given", [((1,), 2), ((2,), 1), ((0,), 1), ((1, 1), 3)])
def test_placeholders_are_counted(pair, pictures, given):
    found = PATCHES * sum(pictures)
    with pytest.raises(
        UserError, match=f"{found} image tokens for {given} images of {PATCHES} each"
    ):
        pair[1](rows(*pictures), pixels(given))


def test_half_a_picture_is_refused(pair):
    ids = rows(1)
    ids[ids == IMAGE] = torch.tensor([IMAGE, IMAGE, IMAGE, 5])
    with pytest.raises(UserError, match="3 image tokens for 1 images"):
        pair[1](ids, pixels(1))


def test_what_does_not_fit_together_is_refused(pair):
    ids = rows(1, length=12)
    for given, says in (
        ((ids,), "no images came"),
        ((ids, pixels(1), torch.ones(1, 13)), r"attention_mask: \(1, 13\)"),
        ((ids[0],), "input_ids"),
        ((ids + VOCAB, pixels(1)), "expected ids from 0 to 383"),
        ((ids, pixels(1)[0]), "pixel_values"),
        ((ids, pixels(1).numpy()), "pixel_values: ndarray"),
    ):
        with pytest.raises(UserError, match=says):
            pair[1](*given)


def test_a_sliding_window_is_refused_only_beyond_it():
    theirs = their_model("mistral")
    ours = our_model(theirs)
    assert ours.config.text.sliding_window == 64
    assert feed((theirs, ours), rows(1, length=64), pixels(1)) <= 1e-4
    with pytest.raises(UserError, match="65 tokens long, more than sliding_window 64"):
        ours(rows(1, length=65), pixels(1))


def test_the_context_is_refused_with_both_numbers(pair):
    ours = pair[1]
    if ours.config.text.sliding_window is None:
        ours(rows(0, length=256))
    with pytest.raises(UserError, match="257 tokens long.* 256"):
        ours(rows(0, length=257))


def test_packed_rows_lose_what_their_records_lose():
    """Several records in one row: the same loss and gradients as a row each, pictures included."""
    model = our_model(their_model()).double().requires_grad_()
    ids, pictures = rows(1, 0, 2, length=20), pixels(3).double()
    labels = ids.clone()
    labels[:, :8] = -100
    labels[:, 0] = -100  # a record's first token is nobody's next
    apart = model.loss(ids, labels, pictures)
    apart.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    pad = lambda x, value: torch.cat([x.flatten(), torch.full((5,), value)])[None]
    segments = pad(torch.arange(3)[:, None].expand(3, 20), -1)
    together = model.loss(pad(ids, 0), pad(labels, -100), pictures, segments=segments)
    together.backward()
    assert torch.allclose(apart, together, rtol=1e-13, atol=0)
    for n, p in model.named_parameters():
        if n in want:
            assert (p.grad - want[n]).norm() <= 1e-12 * want[n].norm(), n
