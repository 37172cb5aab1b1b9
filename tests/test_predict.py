"""python -m minidl predict, and the images of users: every kind, and whatever is not one."""

import argparse
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from minidl import evaluation, images, weights
from minidl.commands import predict, trained
from minidl.errors import CheckpointError, DataError, UsageError
from test_evaluate import ARCH, FEW, TEST_SET, state  # noqa: F401: a fixture

Image = pytest.importorskip("PIL.Image", reason="images need it: pip install 'minidl[plot]'")

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
SMOOTH = np.stack([*np.meshgrid(np.arange(0, 256, 8), np.arange(0, 256, 8)), np.full((32, 32), 90)], axis=2).astype(np.uint8)


def read(path):
    """As (H, W, 3), signed, so that differences can be taken."""
    array = images.read(path, 32)
    assert array.dtype == np.uint8 and array.shape == (3, 32, 32) and array.flags.c_contiguous
    return array.transpose(1, 2, 0).astype(int)


def save(path, picture, **settings):
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **settings)
    return path


# ---- kinds of images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["it.png", "it.bmp", "it.tiff", "it.ppm", "it.webp", "it.gif", "it without suffix"])
def test_an_image_of_32x32_is_taken_as_it_is(tmp_path, name):
    image = Image.fromarray(PICTURE)
    expected = PICTURE
    if name == "it.gif":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        expected = np.asarray(image.convert("RGB"))
    settings = dict(lossless=True) if name == "it.webp" else dict(format="PNG") if "." not in name else {}
    assert np.array_equal(read(save(tmp_path / name, image, **settings)), expected)


def test_jpeg_with_and_without_black_as_a_colour(tmp_path):
    assert np.abs(read(save(tmp_path / "it.jpg", SMOOTH, quality=95)) - SMOOTH).mean() < 3
    cmyk = Image.fromarray(SMOOTH).convert("CMYK")
    for name, settings in ("it.jpg", dict(quality=95)), ("it.tiff", {}):
        assert np.abs(read(save(tmp_path / name, cmyk, **settings)) - SMOOTH).mean() < 3


@pytest.mark.parametrize("mode, levels", [("L", [0, 100, 255]), ("1", [0, 255])])
def test_gray(tmp_path, mode, levels):
    gray = np.random.default_rng(1).choice(np.array(levels, np.uint8), (32, 32))
    found = read(save(tmp_path / "it.png", Image.fromarray(gray).convert(mode)))
    assert (found == gray[:, :, None]).all()


@pytest.mark.parametrize("name", ["it.png", "it.tiff", "it.ppm"])
def test_gray_in_16_bits(tmp_path, name):
    gray = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    if name == "it.ppm":
        (tmp_path / name).write_bytes(b"P5 32 32 65535\n" + gray.astype(">u2").tobytes())
    else:
        save(tmp_path / name, gray)
    assert (read(tmp_path / name) == np.rint(gray / 257)[:, :, None]).all()


@pytest.mark.parametrize("mode, name", [("RGBA", "it.png"), ("RGBA", "it.tiff"), ("LA", "it.png"), ("P", "it.png")])
def test_what_is_transparent_is_white(tmp_path, mode, name):
    alpha = np.tile(np.repeat(np.array([0, 255], np.uint8), 16), (32, 1))  # the left half
    if mode == "P":
        image = Image.fromarray((alpha // 255).astype(np.uint8)).convert("P")
        image.putpalette([200, 0, 0, 10, 20, 30])
        path = save(tmp_path / name, image, transparency=0)
        ink = [10, 20, 30]
    else:
        image = Image.fromarray(np.full((32, 32, 3), 40, np.uint8)).convert("L" if mode == "LA" else "RGB")
        image.putalpha(Image.fromarray(alpha))
        path = save(tmp_path / name, image)
        ink = [40, 40, 40]
    found = read(path)
    assert (found[:, :16] == 255).all() and (found[:, 16:] == ink).all()


def test_half_transparent_is_half_white(tmp_path):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    assert np.abs(read(save(tmp_path / "it.png", image)) - 127).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_as_the_camera_was_held(tmp_path, orientation):
    """What EXIF calls the orientation undoes what was done to the stored rows."""
    done = {1: np.array, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
            6: np.rot90, 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "it.png", np.ascontiguousarray(done(PICTURE)), exif=exif)
    assert np.array_equal(read(path), PICTURE)


@pytest.mark.parametrize("width, height", [(32 + 40, 32), (32, 32 + 40), (32 + 41, 32)])
def test_the_middle_is_taken(tmp_path, width, height):
    canvas = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - 32) // 2, (width - 32) // 2
    canvas[top:top + 32, left:left + 32] = PICTURE
    assert np.array_equal(read(save(tmp_path / "it.png", canvas)), PICTURE)


def test_no_pixel_is_passed_over(tmp_path):
    """A pattern finer than the result becomes its mean."""
    board = (np.indices((320, 320)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(read(save(tmp_path / "it.png", board))[2:-2, 2:-2] - 127.5).max() <= 2
    large = np.asarray(Image.fromarray(SMOOTH).resize((640, 640), Image.Resampling.BICUBIC))
    assert np.abs(read(save(tmp_path / "large.png", large)) - SMOOTH).mean() < 2


@pytest.mark.parametrize("width, height", [(1, 1), (1, 10_000), (10_000, 1), (3, 2)])
def test_any_size(tmp_path, width, height):
    assert (read(save(tmp_path / "it.png", np.full((height, width, 3), 77, np.uint8))) == 77).all()


def test_the_first_picture_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "it.gif", save_all=True, append_images=frames[1:])
    assert (read(tmp_path / "it.gif") == [255, 0, 0]).all()


# ---- what is no image --------------------------------------------------------------------------------------------


def png(width, height, pixels=b""):
    """A PNG that declares a size and has these pixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def encoded(form):
    buffer = io.BytesIO()
    Image.fromarray(np.tile(PICTURE, (4, 4, 1))).save(buffer, form)
    return buffer.getvalue()


NO_IMAGE = {
    "empty": (b"", "it is empty"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "it is none of PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM, or damaged"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(no) print\n", "it is none of PNG"),
    "text": (b"a picture of a cat", "it is none of PNG"),
    "bomb": (png(50_000, 50_000), r"it declares more than [\d,]+ pixels"),
    "small bomb": (png(10_000, 10_000), r"it declares more than [\d,]+ pixels"),
    "largest": (png(2**31 - 1, 2**31 - 1), r"it declares more than [\d,]+ pixels"),
    "gif bomb": (b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded("GIF")[10:], r"it declares more than [\d,]+ pixels"),
    "no pixels": (png(32, 32), "."),
    "no size": (png(0, 0), "."),
    "half a jpeg": (encoded("JPEG")[:2000], "truncated"),
    "half a png": (encoded("PNG")[:2000], "truncated"),
    "half a tiff": (encoded("TIFF")[:2000], "."),
    "half a webp": (encoded("WEBP")[:2000], "."),
}


@pytest.mark.parametrize("content, reason", NO_IMAGE.values(), ids=NO_IMAGE)
def test_what_is_no_image(tmp_path, content, reason, recwarn):
    (tmp_path / "it.png").write_bytes(content)
    with pytest.raises(DataError, match=f"it.png cannot be read: .*{reason}") as caught:
        images.read(tmp_path / "it.png", 32)
    assert len(str(caught.value).splitlines()) == 1 and not recwarn.list


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in ("pipe", "it is not a file"), ("", "it is not a file"), ("nothing", "No such file or directory"):
        with pytest.raises(DataError, match=f"cannot be read: {reason}"):
            images.read(tmp_path / name, 32)
    with pytest.raises(DataError, match="/dev/zero cannot be read: it is not a file"):
        images.read("/dev/zero", 32)


def test_real_numbers_have_no_white(tmp_path):
    with pytest.raises(DataError, match="it.tiff cannot be read: its pixels are real numbers"):
        images.read(save(tmp_path / "it.tiff", np.ones((32, 32), np.float32)), 32)


@pytest.mark.parametrize("form", images.FORMATS)
def test_damage_anywhere_is_an_error_or_an_image(tmp_path, form):
    rng = np.random.default_rng(2)
    whole = encoded(form)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 600), 8):
            damaged[place] = rng.integers(256)
        (tmp_path / "it").write_bytes(damaged[:rng.integers(len(whole) // 2, len(whole))])
        try:
            read(tmp_path / "it")
        except DataError as error:
            assert str(error).startswith(f"{tmp_path / 'it'} cannot be read: ")
            refused += 1
    assert refused


def test_without_pillow(tmp_path, monkeypatch):
    path = save(tmp_path / "it.png", PICTURE)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match=r'the package PIL is needed: `pip install "minidl\[plot\]"`'):
        images.read(path, 32)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, state):
    weights.save(tmp_path / "it.npz", state, weights.describe(ARCH, 10, {}, TEST_SET))
    return tmp_path / "it.npz"


@pytest.fixture
def files(tmp_path):
    return [save(tmp_path / f"{index}.png", np.ascontiguousarray(image.transpose(1, 2, 0)))
            for index, image in enumerate(FEW.images)]


def call(*arguments):
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    predict.main(parser.parse_args([*map(str, arguments), "--device", "cpu"]))


def test_a_test_image_is_what_evaluation_takes_it_for(checkpoint, files, capsys):
    call(checkpoint, *files, "--json", "--topk", 100)
    found = json.loads(capsys.readouterr().out)
    logits = evaluation.outputs(trained.network_with(*trained.load(str(checkpoint))), FEW, 64, "it").astype(float)
    shares = np.exp(logits) / np.exp(logits).sum(axis=0)
    assert len(set(logits.argmax(axis=0))) > 3, "it tells them apart"
    for path, answer, column in zip(files, found, shares.T, strict=True):
        assert answer["image"] == str(path)
        assert [it["class"] for it in answer["classes"]] == [str(k) for k in np.argsort(-column)]
        assert [it["probability"] for it in answer["classes"]] == pytest.approx(sorted(column, reverse=True), rel=1e-9)


def test_text(checkpoint, files, capsys):
    call(checkpoint, *files[:2], "-k", 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    for line, name in zip(lines, (str(files[0]), "", str(files[1]), "")):
        assert re.fullmatch(rf"{re.escape(name)} +\d  +[\d.]+%", line)


def test_classes_without_names_are_numbered(tmp_path, state, files, capsys):
    weights.save(tmp_path / "it.npz", state, {**weights.describe(ARCH, 10, {}, TEST_SET), "class_names": None})
    call(tmp_path / "it.npz", files[0], "--json")
    answers = json.loads(capsys.readouterr().out)[0]["classes"]
    assert len(answers) == 5 and all(re.fullmatch(r"class \d", answer["class"]) for answer in answers)


def test_refused(tmp_path, state, checkpoint, files):
    with pytest.raises(DataError, match="nothing.png cannot be read"):
        call(checkpoint, files[0], tmp_path / "nothing.png")
    weights.save(tmp_path / "plain.npz", state, weights.describe(ARCH, 10, {}))
    with pytest.raises(CheckpointError, match="plain.npz does not say how images must be normalized"):
        call(tmp_path / "plain.npz", files[0])
    weights.save(tmp_path / "plain.npz", state)
    with pytest.raises(CheckpointError, match="plain.npz does not say which network its weights belong to"):
        call(tmp_path / "plain.npz", files[0])


def test_as_a_process(checkpoint, files):
    result = subprocess.run([sys.executable, "-m", "minidl", "predict", checkpoint, *files], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and len(result.stdout.splitlines()) == 5 * len(files)
    result = subprocess.run([sys.executable, "-m", "minidl", "predict", checkpoint, checkpoint], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (DataError.exit_code, "")
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"error: {checkpoint} cannot be read: it is none of PNG")


def test_far_apart(tmp_path, state, files, capsys):
    """Logits of 1e5 have exponentials beyond all numbers."""
    large = {**state, "classifier.weight": 1e5 * state["classifier.weight"], "classifier.bias": 1e5 * state["classifier.bias"]}
    weights.save(tmp_path / "it.npz", large, weights.describe(ARCH, 10, {}, TEST_SET))
    call(tmp_path / "it.npz", *files, "--json")
    for answer in json.loads(capsys.readouterr().out):
        assert sum(it["probability"] for it in answer["classes"]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_half_of_a_normalization(tmp_path, state, files, name):
    weights.save(tmp_path / "it.npz", state, {**weights.describe(ARCH, 10, {}, TEST_SET), name: None})
    with pytest.raises(CheckpointError, match="it.npz does not say how images must be normalized"):
        call(tmp_path / "it.npz", files[0])
