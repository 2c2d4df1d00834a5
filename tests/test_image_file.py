"""checks/image_file.py: what a picture file can do to us (group A of the catalogue of bad inputs),
and what is read of a good one.
"""

import os
import random
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_image import CLIP, MEAN, STD, encoded, picture

from llava_min.checks.image_file import FORMATS, MAX_ASPECT, MAX_BYTES, decode_image, open_image
from llava_min.data.image import ImageConfig, to_pixels
from llava_min.errors import UserError


def chunk(kind: bytes, data: bytes, bad_crc: bool = False) -> bytes:
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data) ^ bad_crc)
    )


def png(w: int, h: int, idat: bytes = b"", bad_crc: bool = False, extra: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", idat, bad_crc) + chunk(b"IEND", b"")


IDAT4 = zlib.compress(b"".join(b"\0" + bytes([50] * 4) for _ in range(4)))
BAD = {  # name: (bytes, what the message must say)
    "2 empty": (b"", "empty"),
    "3 html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "4 lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "git lfs pull",
    ),
    "5 jpeg cut": (encoded(picture(64, 64), "JPEG")[:-400], "cut short"),
    "5 png cut": (encoded(picture(64, 64), "PNG")[:-4000], "cut short"),
    "5 webp cut": (encoded(picture(64, 64), "WEBP")[:-400], ""),
    "5 gif cut": (encoded(picture(64, 64).quantize(), "GIF")[:-2000], ""),
    "5 bmp cut": (encoded(picture(64, 64), "BMP")[:-400], "cut short"),
    "5 tiff cut": (encoded(picture(64, 64), "TIFF")[:-4000], ""),
    "6 crc": (png(4, 4, IDAT4, bad_crc=True), "damaged"),
    "9 bomb": (png(14000, 14000), "pixels"),
    "10 bomb below Pillow's error": (png(10000, 10000), "pixels"),
    "12 line": (png(1_000_000, 1), "crop it"),
    "12 strip": (png(2, 60000), "crop it"),
    "13 no width": (png(0, 4), ""),
    "23 eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
    "23 psd": (b"8BPS\0\1" + bytes(20), "Photoshop"),
    "23 ppm": (b"P6 2 2 255\n" + bytes(12), "JPEG, PNG"),
    "24 svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
    "24 svg behind a comment": (b"<!-- drawn\nby hand -->\n<svg></svg>", "SVG"),
    "26 compressed text": (
        png(4, 4, IDAT4, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "damaged",
    ),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC"),
    "json": (b'{"image": 1}', "JSON"),
    "noise": (random.Random(0).randbytes(300), "not an image"),
    "text": (b"hello", "not an image"),
}


def refusal(*args, **kw) -> str:
    with pytest.raises(UserError) as e:
        open_image(*args, **kw)
    text = str(e.value)
    assert len(text) <= 2000 and text.isprintable(), text
    return text


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_bad_files_are_one_line_that_names_them(case, suffix, tmp_path):
    data, says = BAD[case]
    path = tmp_path / f"pic{suffix}"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = refusal(path)
    assert str(path) in text and says in text
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 500


def test_long_text_chunk_and_large_files_are_refused_by_size(tmp_path):
    path = tmp_path / "big.png"
    head = png(4, 4)[:33]
    with open(path, "wb") as f:  # sparse: 100 MB of tEXt
        f.write(head + struct.pack(">I", 10**8) + b"tEXt")
        f.truncate(10**8 + 1000)
    assert f"{MAX_BYTES >> 20} MiB" in refusal(path)


def test_paths_that_are_no_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.jpg")
    assert "folder" in refusal(tmp_path)
    assert "URL" in refusal("https://example.com/a.jpg") and "URL" in refusal(
        "data:image/png;base64,AAAA"
    )
    assert "empty" in refusal("")
    assert "cannot be read" in refusal("a\0b.jpg") and "cannot be read" in refusal("x" * 5000)
    assert "cannot be read" in refusal("\ud800.jpg")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in refusal(tmp_path / "pipe") and "device" in refusal("/dev/zero")
    os.symlink(tmp_path / "gone", tmp_path / "dangling")
    assert "no such file" in refusal(tmp_path / "dangling")


def test_no_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    picture(4, 4).save(path)

    def denied(*a, **k):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # root, as tests often run, may read everything
    assert "Permission denied" in refusal(path)


def test_hostile_names_are_escaped_and_odd_names_work(tmp_path):
    text = refusal(str(tmp_path / "a\x1b[31m\nb\u202e.jpg"))
    assert "\\x1b" in text and "\\n" in text
    for name in [
        "süß 猫 🙂.png",
        "two words.png",
        "new\nline.png",
        "-rf.png",
        "UPPER.PNG",
        "noext",
    ]:
        picture(6, 5).save(tmp_path / name, "PNG")
        assert open_image(tmp_path / name).size == (6, 5)
        assert open_image(name, root=tmp_path).size == (6, 5)


def test_nothing_leaves_the_root(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    picture(6, 5).save(tmp_path / "secret.png")
    picture(6, 5).save(root / "sub" / "a.png")
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink(tmp_path, root / "up")
    for path in [
        "../secret.png",
        "sub/../../secret.png",
        "link.png",
        "up/secret.png",
        str(tmp_path / "secret.png"),
        "/etc/passwd",
        "../../../../../../etc/passwd",
    ]:
        assert "outside the image folder" in refusal(path, root=root)
    assert "looked for" in refusal("sub/b.png", root=root)
    # the root itself may be a link, and a path may wander inside
    os.symlink(root, tmp_path / "alias")
    for path in ["sub/a.png", "sub/../sub/a.png", str(root / "sub" / "a.png")]:
        assert open_image(path, root=tmp_path / "alias").size == (6, 5)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "CMYK", "LA"])
def test_every_allowed_format_opens_as_pillow_opens_it(kind, mode, tmp_path, capsys):
    im = picture(37, 23, mode)
    try:
        im.save(tmp_path / "pic", kind)
    except (OSError, ValueError):
        pytest.skip(f"Pillow writes no {kind} of mode {mode}")
    with Image.open(tmp_path / "pic") as plain:
        assert torch.equal(to_pixels(open_image(tmp_path / "pic"), CLIP), to_pixels(plain, CLIP))
    assert capsys.readouterr().err == ""
    assert open_image(tmp_path / "pic").filename == str(tmp_path / "pic")


def test_the_smallest_picture_and_the_widest(tmp_path):
    picture(1, 1).save(tmp_path / "1.png")
    assert open_image(tmp_path / "1.png").size == (1, 1)
    picture(MAX_ASPECT, 1).save(tmp_path / "w.png")
    assert to_pixels(open_image(tmp_path / "w.png"), CLIP).isfinite().all()
    with pytest.raises(UserError, match="crop it"):
        to_pixels(picture(MAX_ASPECT + 1, 1), CLIP)
    with pytest.raises(UserError, match="above 0"):
        to_pixels(Image.new("RGB", (0, 5)), CLIP)


def test_16_bit_png_and_float_tiff_files(tmp_path, capsys):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tiff")
    for name in ("deep.png", "float.tiff"):
        mean = to_pixels(open_image(tmp_path / name), CLIP).mean()
        assert -0.5 < mean < 1, name  # neither white nor black
        err = capsys.readouterr().err
        assert name in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "kind, says",
    [("GIF", "animated"), ("WEBP", "animated"), ("PNG", "animated"), ("TIFF", "several pages")],
)
def test_of_several_frames_the_first_is_taken_and_said(kind, says, tmp_path, capsys):
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue", "lime")]
    frames[0].save(
        tmp_path / "f",
        kind,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    im = open_image(tmp_path / "f")
    err = capsys.readouterr().err
    assert says in err and str(tmp_path / "f") in err
    assert im.convert("RGB").getpixel((3, 3)) == (255, 0, 0)


def test_values_that_are_not_finite_are_no_picture(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "f", "TIFF")
    assert "NaN or infinite" in refusal(tmp_path / "f")


def test_previews_of_a_camera_are_no_further_pictures(tmp_path, capsys):
    big, small = (Image.new("RGB", (n, n), "red") for n in (32, 16))
    big.save(tmp_path / "f", "MPO", save_all=True, append_images=[small])
    assert open_image(tmp_path / "f").size == (32, 32) and capsys.readouterr().err == ""


def test_exif_orientation(tmp_path, capsys):
    im = picture(40, 30)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        im.save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(open_image(tmp_path / "a.png"), im)
        err = capsys.readouterr().err
        assert ("orientation" in err) == (orientation > 1)
        turned = open_image(tmp_path / "a.png", exif=True)
        assert turned.size == ((30, 40) if orientation >= 5 else (40, 30))
        if orientation == 6:
            assert np.array_equal(turned, im.transpose(Image.Transpose.ROTATE_270))
        assert capsys.readouterr().err == ""
        assert 0x0112 not in turned.getexif() or turned.getexif()[0x0112] == 1


def test_corrupt_exif_and_icc_do_not_hurt(tmp_path, capsys):
    im = picture(32, 32)
    for seed in range(20):
        rng = random.Random(seed)
        exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08" + rng.randbytes(60)
        im.save(tmp_path / "a.jpg", exif=exif, icc_profile=rng.randbytes(300))
        for apply in (False, True):
            assert open_image(tmp_path / "a.jpg", exif=apply).convert("RGB").size == (32, 32)


def test_truncated_exif_warning_is_ours_not_pythons(tmp_path):
    picture(32, 32).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_image(tmp_path / "a.jpg")
    assert not caught, [str(w.message) for w in caught]


def test_pillow_is_left_as_it_was(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(10000, 10000))
    picture(4, 4).save(tmp_path / "ok.png")
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    open_image(tmp_path / "ok.png")
    refusal(tmp_path / "bomb.png")
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_our_cap_stands_when_the_caller_lifted_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png(14000, 14000))
    assert "million" in refusal(tmp_path / "bomb.png")


def test_a_tiff_with_a_ring_of_pages_does_not_hang(capsys):
    data = bytearray(encoded(picture(8, 8), "TIFF"))
    (ifd,) = struct.unpack_from("<I", data, 4)
    (n,) = struct.unpack_from("<H", data, ifd)
    struct.pack_into("<I", data, ifd + 2 + 12 * n, ifd)  # the next page is this one
    assert np.array_equal(decode_image(bytes(data), "ring.tiff"), picture(8, 8).convert("RGB"))
    assert capsys.readouterr().err == ""  # Pillow ends its count where a page comes again


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_load_or_are_refused(kind):
    """Flips, cuts and splices: a picture or a UserError, nothing else; and the undamaged control
    loads.
    """
    rng = random.Random(kind)
    good = encoded(picture(24, 17), kind)
    assert decode_image(good, "good").size == (24, 17)
    loaded = 0
    for i in range(150):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 4])):
            at = rng.randrange(min(len(data), 200) if i % 2 else len(data))
            match rng.randrange(3):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    del data[at : at + rng.randrange(1, 40)]
                case 2:
                    data[at:at] = rng.randbytes(rng.randrange(1, 20))
        try:
            im = decode_image(bytes(data), "damaged", exif=bool(i % 2))
            to_pixels(im, ImageConfig(28, MEAN, STD, "pad"))
            loaded += 1
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) <= 2000
    assert loaded < 150
