"""data/image.py: pixels equal to transformers' bit for bit, whatever the mode; what a checkpoint
may say of them.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from llava_min.data.image import ImageConfig, to_pixels
from llava_min.errors import UserError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = ImageConfig(336, MEAN, STD, "pad")
SIZES = [
    (640, 480),
    (480, 640),
    (336, 336),
    (337, 335),
    (335, 337),
    (672, 336),
    (1, 1),
    (2, 1),
    (5, 4),
    (20, 20),
    (28, 28),
    (1000, 17),
    (17, 1000),
    (1, 300),
    (300, 1),
    (100, 333),
    (333, 100),
    (1023, 767),
    (768, 1024),
    (2000, 1999),
    (31, 500),
]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"]


def picture(w: int, h: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise over a gradient, with alpha where the mode has it; mode P+ is a palette with a
    transparent entry.
    """
    a = np.random.default_rng([seed, w, h]).integers(0, 256, (h, w, 4), dtype=np.uint8)
    a[: h // 2, :, :3] //= 2
    im = Image.fromarray(a, "RGBA")
    if mode == "P+":
        im = im.convert("RGB").convert("P")
        im.info["transparency"] = 35  # dark red of the web palette
        return im
    return (
        im
        if mode == "RGBA"
        else im.convert("LA")
        if mode == "LA"
        else im.convert("RGB").convert(mode)
    )


def encoded(im: Image.Image, kind: str, **kw) -> bytes:
    out = io.BytesIO()
    im.save(out, kind, **kw)
    return out.getvalue()


def reference(im: Image.Image, config: ImageConfig) -> np.ndarray:
    pytest.importorskip("transformers", reason="transformers is the oracle for pixels")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    s = config.size
    args = dict(
        size={"shortest_edge": s},
        crop_size={"height": s, "width": s},
        image_mean=config.mean,
        image_std=config.std,
    )
    if config.aspect == "pad":
        oracle = LlavaImageProcessorPil(do_pad=True, **args)
    else:
        oracle = CLIPImageProcessorPil(**args)
    return oracle(im, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("mode", MODES + ["P+"])
@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_pixels_equal_transformers_bit_for_bit(mode, aspect):
    side = 336 if mode in ("RGB", "RGBA") else 112  # the sums are the same; 112 is quicker
    config = ImageConfig(side, MEAN, STD, aspect)
    for w, h in SIZES:
        im = picture(w, h, mode)
        ours = to_pixels(im, config)
        assert ours.shape == (3, side, side) and ours.dtype == torch.float32
        assert np.array_equal(ours.numpy(), reference(im, config)), (w, h)


@pytest.mark.parametrize(
    "size, mean, std",
    [(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), (28, MEAN, STD), (224, (0.1, 0.9, 0), (3, 0.2, 1))],
)
def test_other_sides_means_and_stds(size, mean, std):
    for aspect in ("pad", "crop"):
        config = ImageConfig(size, mean, std, aspect)
        for w, h in [(640, 480), (3, 50), (size, size), (29, 28), (90, 400)]:
            im = picture(w, h, seed=size)
            assert np.array_equal(to_pixels(im, config).numpy(), reference(im, config)), (
                w,
                h,
                aspect,
            )


def test_padding_in_bands_is_the_whole_square_at_once(monkeypatch):
    """A square of a long picture is never built; with a small band the result must still be the one
    of one piece.
    """
    from llava_min.data import image

    im, colour = picture(90, 2100), (122, 116, 104)
    whole = Image.new("RGB", (2100, 2100), colour)
    whole.paste(im, ((2100 - 90) // 2, 0))
    assert 2**22 // 2100 < 2100  # so that this height needs more than one band
    assert np.array_equal(
        image.pad(im, 64, colour), whole.resize((64, 64), Image.Resampling.BICUBIC)
    )


def test_transparency_is_laid_on_white():
    im = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # red, wholly transparent
    white = to_pixels(Image.new("RGB", (8, 8), "white"), CLIP)
    assert torch.equal(to_pixels(im, CLIP), white)


@pytest.mark.parametrize(
    "make, grey",
    [
        (lambda: Image.fromarray(np.full((9, 9), 40000, np.uint16)), 156),
        (lambda: Image.fromarray(np.full((9, 9), 40000, np.int32)), 156),
        (lambda: Image.fromarray(np.full((9, 9), 65535, np.int32)), 255),
        (lambda: Image.fromarray(np.full((9, 9), 255, np.int32)), 255),
        (lambda: Image.fromarray(np.full((9, 9), 100, np.int32)), 100),
        (lambda: Image.fromarray(np.full((9, 9), 1, np.int32)), 1),
        (lambda: Image.fromarray(np.full((9, 9), 1, np.float32)), 255),
        (lambda: Image.fromarray(np.full((9, 9), 0.5, np.float32)), 128),
        (lambda: Image.fromarray(np.full((9, 9), 100, np.float32)), 100),
        (lambda: Image.fromarray(np.array([[-2, 2]] * 2, np.float32)), None),
    ],
)
def test_deep_modes_are_scaled_and_said(make, grey, capsys):
    im = make()
    ours = to_pixels(im, CLIP)
    err = capsys.readouterr().err
    assert "8 bit" in err and im.mode in err
    if grey is not None:
        assert torch.equal(ours, to_pixels(Image.new("RGB", (9, 9), (grey,) * 3), CLIP))


@pytest.mark.parametrize("size", [(0, 5), (501, 1), (1, 501)])
def test_sizes_that_cannot_be_used_are_refused(size):
    with pytest.raises(UserError, match=f"{size[0]}×{size[1]}"):
        to_pixels(Image.new("RGB", size), CLIP)


def test_nan_pixels_are_refused():
    with pytest.raises(UserError, match="NaN"):
        to_pixels(Image.fromarray(np.array([[0.1, np.nan]], np.float32)), CLIP)


def test_rarer_modes():
    for mode in ("PA", "RGBX", "RGBa", "YCbCr", "HSV", "LAB"):
        im = Image.new(mode, (7, 5), 1)
        assert np.array_equal(to_pixels(im, CLIP).numpy(), reference(im, CLIP)), mode
    with pytest.raises(UserError, match="La"):  # Pillow cannot convert it
        to_pixels(Image.new("La", (4, 4)), CLIP)


def test_an_image_the_caller_opened_from_a_damaged_file(tmp_path):
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (64, 64), dtype=np.uint16))
    for kind, im in (("JPEG", picture(64, 64)), ("PNG", deep)):
        data = encoded(im, kind)
        (tmp_path / "cut").write_bytes(data[: len(data) * 2 // 3])
        with (
            Image.open(tmp_path / "cut") as opened,
            pytest.raises(UserError, match="damaged or cut short .*truncated"),
        ):
            to_pixels(opened, CLIP)


def test_an_image_in_memory_is_never_rotated(tmp_path):
    im = picture(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as turned:
        assert torch.equal(to_pixels(turned, CLIP), to_pixels(im, CLIP))


# ---- configs

GOOD = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "image_mean": list(MEAN),
    "image_std": list(STD),
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}
OPENAI = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "size": 336,
    "resample": 3,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": list(MEAN),
    "image_std": list(STD),
}


@pytest.mark.parametrize(
    "d, aspect",
    [
        (GOOD, None),
        (OPENAI, None),
        (GOOD | {"do_pad": None}, None),
        ({"image_processor": GOOD}, None),
        (GOOD | {"do_pad": True}, "pad"),
        (GOOD | {"do_pad": False}, "crop"),
        (GOOD | {"image_aspect_ratio": "pad"}, "pad"),
        (GOOD | {"image_aspect_ratio": "square"}, "crop"),
        (GOOD | {"image_aspect_ratio": "pad", "do_pad": True}, "pad"),
        (
            GOOD
            | {
                "image_processor_type": "LlavaImageProcessorFast",
                "size": {"shortest_edge": 336, "longest_edge": None},
            },
            None,
        ),
    ],
)
def test_config_reads_what_checkpoints_ship(d, aspect):
    assert ImageConfig.from_hf(d) == ImageConfig(336, MEAN, STD, aspect)


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [0.5, 0.5]},
        {"image_mean": 0.5},
        {"image_mean": [0.5, None, 0.5]},
        {"image_mean": [0.5, 0.5, float("nan")]},
        {"image_mean": [122, 116, 104]},
        {"image_std": [1, 1, 1, 1]},
        {"image_std": [1, 0, 1]},
        {"image_std": [1, -1, 1]},
        {"image_std": None},
        {"resample": 2},
        {"resample": "lanczos"},
        {"rescale_factor": 1 / 127.5},
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_convert_rgb": False},
        {"do_normalize": "no"},
        {"crop_size": {"height": 224, "width": 224}},
        {"crop_size": {"height": 336, "width": 224}},
        {"crop_size": None},
        {"size": {"height": 336, "width": 336}},
        {"size": {"shortest_edge": 336, "longest_edge": 672}},
        {"size": 0},
        {"size": 10**9},
        {"size": "336"},
        {"size": True},
        {"image_aspect_ratio": "anyres"},
        {"image_aspect_ratio": ["pad"]},
        {"do_pad": "yes"},
        {"image_processor_type": "LlavaNextImageProcessor"},
        {"image_processor_type": "SiglipImageProcessor"},
        {"image_processor_type": "ViTImageProcessor"},
        {"image_processor_type": "Qwen2VLImageProcessor"},
    ],
    ids=str,
)
def test_config_refusals_name_key_and_value(change):
    ((key, value),) = change.items()
    with pytest.raises(UserError) as e:
        ImageConfig.from_hf(GOOD | change, "folder/preprocessor_config.json")
    text = str(e.value)
    assert text.startswith("folder/preprocessor_config.json: ") and "\n" not in text
    assert key in text and str(value) in text


def test_config_disagreement_and_oddities():
    with pytest.raises(UserError, match="do_pad.*image_aspect_ratio"):
        ImageConfig.from_hf(GOOD | {"image_aspect_ratio": "pad", "do_pad": False})
    for odd in ([], None, "x", {}, GOOD | {"size": True, "crop_size": True}):
        with pytest.raises(UserError):
            ImageConfig.from_hf(odd)


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_saved_config_is_loaded_by_transformers_with_equal_pixels(aspect, tmp_path):
    pytest.importorskip("transformers", reason="transformers is the oracle for pixels")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    config = ImageConfig(56, MEAN, STD, aspect)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config.to_hf()))
    d = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert ImageConfig.from_hf(d) == config
    assert d["do_pad"] is (aspect == "pad") and d["image_aspect_ratio"] == aspect
    kind = LlavaImageProcessorPil if aspect == "pad" else CLIPImageProcessorPil
    assert d["image_processor_type"] + "Pil" == kind.__name__
    im = picture(70, 50)
    theirs = kind.from_pretrained(tmp_path)(im, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(theirs, to_pixels(im, config).numpy())
