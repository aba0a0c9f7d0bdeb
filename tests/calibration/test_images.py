"""Images as samples: the pixels that a model sees are those that its training made, and what cannot be is said."""

import builtins
import sys

import numpy as np
import pytest
from PIL import Image

import biascorr
from biascorr.adapters.loading import network_from_model
from biascorr.calibration.data import batches_from_data, number_of_batches
from biascorr.calibration.images import SUFFIXES
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage
from biascorr.graph.network import ModelInput
from networks import model_from_text

RNG = np.random.default_rng(0)
MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))


def input_of(*shape, dtype="float32"):
    return ModelInput("x", np.dtype(dtype), shape)


NCHW, NHWC = input_of(None, 3, 8, 8), input_of(None, 8, 8, 3)


def pixels(height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)[: 2 + (channels > 1)], dtype=np.uint8)


def saved(folder, **arrays):
    for name, array in arrays.items():
        Image.fromarray(array).save(folder / f"{name}.png")
    return folder


def only(folder, model_input=NCHW, **options):
    """The first image as the input takes it."""
    return biascorr.images(folder, **options).read(model_input)[0]


# What becomes of pixels


SCALED = {
    "imagenet": lambda x: (x / 255 - MEAN) / STD,
    "imagenet-caffe": lambda x: x[..., ::-1] - np.float32((103.939, 116.779, 123.68)),
    "minus-one-to-one": lambda x: x / 127.5 - 1,
    "zero-to-one": lambda x: x / 255,
    None: lambda x: x,
}


@pytest.mark.parametrize("preset", SCALED)
@pytest.mark.parametrize("model_input", [NCHW, NHWC], ids=["NCHW", "NHWC"])
def test_presets(preset, model_input, tmp_path):
    x = pixels()
    found = only(saved(tmp_path, a=x), model_input, preset=preset, size=8)
    expected = SCALED[preset](x.astype(np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected if model_input is NHWC else expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-5)


def test_options_that_are_given_are_taken_before_those_of_a_preset(tmp_path):
    x = pixels().astype(np.float32)
    folder = saved(tmp_path, a=pixels())
    found = only(folder, NHWC, preset="imagenet", size=8, mean=0.5, color="bgr")
    np.testing.assert_allclose(found, (x[..., ::-1] / 255 - 0.5) / STD[::-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(only(folder, NHWC, scale=2, mean=[1, 2, 3], std=4), (x * 2 - [1, 2, 3]) / 4, rtol=1e-6)


def test_gray_images_and_models(tmp_path):
    gray, color = pixels(channels=1), pixels()
    folder = saved(tmp_path, a=gray, b=color)
    rows = biascorr.images(folder, preset="imagenet", size=8).read(input_of(None, 1, 8, 8))
    np.testing.assert_allclose(rows[0][0], (gray / 255 - MEAN.mean()) / STD.mean(), rtol=1e-5)
    np.testing.assert_array_equal(only(folder, NHWC), np.repeat(gray[..., None], 3, axis=2))
    np.testing.assert_array_equal(only(folder, input_of(None, 8, 8, None), layout="NHWC", color="gray")[..., 0], gray)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float64"])
def test_other_types(dtype, tmp_path):
    found = only(saved(tmp_path, a=pixels()), input_of(None, 8, 8, 3, dtype=dtype))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, pixels())


def test_integers_are_pixels_as_they_are(tmp_path):
    folder, model_input = saved(tmp_path, a=pixels()), input_of(None, 8, 8, 3, dtype="uint8")
    np.testing.assert_array_equal(only(folder, model_input, preset="minus-one-to-one"), pixels())
    with pytest.raises(ValueError, match="^data: input x: takes uint8, which are pixels as they are; drop mean, scale$"):
        only(folder, model_input, mean=1, scale=2)
    with pytest.raises(ValueError, match="takes int8, pixels are 0 to 255"):
        only(folder, input_of(None, 8, 8, 3, dtype="int8"))


@pytest.mark.parametrize("tag", range(1, 9))
def test_images_are_turned_as_their_camera_says(tag, tmp_path):
    x = np.zeros((8, 8, 3), np.uint8)
    x[:4, :2] = 255  # where this comes to tells all eight apart
    image = Image.fromarray(x)
    exif = image.getexif()
    exif[0x0112] = tag
    image.save(tmp_path / "a.png", exif=exif)
    moves = [
        lambda x: x, lambda x: x[:, ::-1], lambda x: x[::-1, ::-1], lambda x: x[::-1],
        lambda x: x.swapaxes(0, 1), lambda x: x[::-1].swapaxes(0, 1), lambda x: x[::-1, ::-1].swapaxes(0, 1),
        lambda x: x[:, ::-1].swapaxes(0, 1),
    ]  # fmt: skip
    np.testing.assert_array_equal(only(tmp_path, NHWC), moves[tag - 1](x))


@pytest.mark.parametrize(
    ("mode", "array", "expected"),
    [
        ("RGBA", np.full((8, 8, 4), (10, 20, 30, 0), np.uint8), (10, 20, 30)),
        ("LA", np.full((8, 8, 2), (10, 0), np.uint8), (10, 10, 10)),
        ("I;16", np.full((8, 8), 10 * 256 + 255, np.uint16), (10, 10, 10)),
    ],
)
def test_modes(mode, array, expected, tmp_path):
    assert Image.fromarray(array).mode == mode
    np.testing.assert_array_equal(only(saved(tmp_path, a=array), NHWC), np.full((8, 8, 3), expected))


def test_transparency_of_palettes_is_left_out_without_a_warning(tmp_path):
    image = Image.fromarray(pixels()).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    np.testing.assert_array_equal(only(tmp_path, NHWC), np.asarray(image.convert("RGB")))


def test_pixels_that_are_real_numbers_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff: .*its pixels are real numbers, expected 8 bits"):
        only(tmp_path)


# Sizes


def resized(image, height, width):
    return Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)


def test_the_shorter_side_then_the_centre(tmp_path):
    x = pixels(20, 30)
    whole = np.asarray(resized(x, 10, 15))
    folder = saved(tmp_path, a=x)
    np.testing.assert_array_equal(only(folder, NHWC, size=10), whole[1:9, 4:12])  # round(3.5) is 4
    np.testing.assert_array_equal(only(folder, input_of(None, None, None, 3), size=10, crop=(4, 6)), whole[3:7, 4:10])
    np.testing.assert_array_equal(only(folder, NHWC, size=(9, 8)), np.asarray(resized(x, 9, 8))[:8])
    np.testing.assert_array_equal(only(folder, NHWC, crop=8), x[6:14, 11:19])


def test_what_size_follows_from_the_model(tmp_path):
    x = pixels(20, 30)
    folder = saved(tmp_path, a=x)
    np.testing.assert_array_equal(only(folder, NHWC), np.asarray(resized(x, 8, 12))[:, 2:10])
    np.testing.assert_array_equal(only(folder, input_of(None, 8, 16, 3)), np.asarray(resized(x, 10, 16))[1:9])
    open_sides = input_of(None, 3, None, None)
    assert only(folder, open_sides, size=12).shape == (3, 12, 12)
    assert only(folder, open_sides, size=(12, 10)).shape == (3, 12, 10)
    assert only(folder, open_sides, preset="imagenet").shape == (3, 224, 224)
    assert only(folder, input_of(None, 3, None, 8), size=12).shape == (3, 12, 8)
    with pytest.raises(ValueError, match="^data: input x: takes images of any size; give one"):
        only(folder, open_sides)


@pytest.mark.parametrize(("side", "shorter"), [(224, 256), (299, 342)])
def test_the_margin_of_imagenet_is_in_proportion(side, shorter, tmp_path):
    x = pixels(400, 500)
    found = only(saved(tmp_path, a=x), input_of(None, side, side, 3, dtype="uint8"), preset="imagenet")
    whole = np.asarray(resized(x, shorter, int(shorter * 500 / 400)))
    top, left = (round((length - side) / 2) for length in whole.shape[:2])
    np.testing.assert_array_equal(found, whole[top : top + side, left : left + side])


# What is found


def test_files_in_the_folder_and_one_level_of_folders(tmp_path):
    for name in ("b.JPG", "a.png", "cat/2.webp", "cat/1.bmp", "dog/0.tif", "dog/deeper/3.png", ".hidden.png", ".cache/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels()).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = [file.relative_to(tmp_path).as_posix() for file in biascorr.images(tmp_path).files]
    assert found == ["a.png", "b.JPG", "cat/1.bmp", "cat/2.webp", "dog/0.tif"]


def test_all_suffixes_can_be_read(tmp_path):
    for suffix in SUFFIXES:
        Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(tmp_path / f"a{suffix}")
    rows = biascorr.images(tmp_path).read(NCHW)
    assert abs(rows[0 : len(SUFFIXES)] - 128).max() < 4


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    for k in range(10):
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(tmp_path / f"{k}.png")
    opened, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_image(path))
    samples = biascorr.images(tmp_path)
    batches = batches_from_data(samples, [NCHW], batch_size=2, max_samples=4)
    assert not opened
    found = [batch["x"] for batch in batches]
    assert [batch.shape for batch in found] == [(2, 3, 8, 8)] * 2
    assert np.concatenate(found)[:, 0, 0, 0].tolist() == [0, 2, 5, 7]  # spread evenly
    assert len(opened) == 4
    assert batches.left_any
    assert number_of_batches(samples, [NCHW], batch_size=2, max_samples=4) == 2
    assert number_of_batches(samples, [NCHW], batch_size=4) == 3
    everything = batches_from_data(samples, [NCHW], batch_size=4)
    assert [len(batch["x"]) for batch in everything] == [4, 4, 2]
    assert not everything.left_any


def test_the_size_of_batches_that_a_model_fixes(tmp_path):
    for k in range(6):
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(tmp_path / f"{k}.png")
    samples, fixed = biascorr.images(tmp_path), input_of(2, 3, 8, 8)
    assert [batch["x"].shape for batch in batches_from_data(samples, [fixed], max_samples=5)] == [(2, 3, 8, 8)] * 2
    assert number_of_batches(samples, [fixed], max_samples=5) == 2
    with pytest.raises(ValueError, match="6 samples, the model takes a multiple of 4; leave out 2, e.g. by max_samples=4 "):
        list(batches_from_data(samples, [input_of(4, 3, 8, 8)]))


def test_a_line_on_what_was_read(tmp_path):
    samples = biascorr.images(
        saved(tmp_path, a=np.zeros((8, 8, 3), np.uint8), b=np.full((8, 8, 3), 255, np.uint8)), preset="zero-to-one"
    )
    assert samples.note == ""
    assert repr(samples) == "<2 images, preset='zero-to-one'>"
    assert len(samples) == 2
    list(batches_from_data(samples, [NCHW]))
    assert samples.note == "input x: 0 to 1, mean 0.5, of 2 images"


# What is refused


WRONG_OPTIONS = {
    "size: 0, expected an integer of at least 1": {"size": 0},
    "crop: (1, 2, 3), expected an integer": {"crop": (1, 2, 3)},
    "size: 2.5, expected": {"size": 2.5},
    "size: True, expected": {"size": True},
    "mean: [1, 2], expected a number, or one for each channel": {"mean": [1, 2]},
    "mean: nan, expected": {"mean": np.nan},
    "std: 0, expected more than 0": {"std": 0},
    "scale: 'x', expected a number": {"scale": "x"},
    "scale: -1, expected more than 0": {"scale": -1},
    "scale: 1e+300, expected a number": {"scale": 1e300},
    "std: 1e-300, expected more than 0": {"std": 1e-300},
    "layout: 'CHW', expected one of NCHW, NHWC": {"layout": "CHW"},
    "color: 'RGB', expected one of rgb, bgr, gray": {"color": "RGB"},
    "preset: 'torch', expected one of imagenet, imagenet-caffe, minus-one-to-one, zero-to-one": {"preset": "torch"},
}


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_wrong_options(message, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        biascorr.images(saved(tmp_path, a=pixels()), **WRONG_OPTIONS[message])
    assert str(caught.value).startswith(message)


WRONG_INPUTS = {
    "takes shape (any, 4), images have four axes": (input_of(None, 4), {}),
    "which does not say where the channels are; give layout='NCHW' or 'NHWC'": (input_of(None, None, None, None), {}),
    "takes 4 channels, images have 3, or 1 if they are gray; give layout": (input_of(None, 4, 8, 8), {"layout": "NCHW"}),
    "takes 8 channels, images have 3, or 1": (NCHW, {"layout": "NHWC"}),
    "takes 3 channels, images have 3, or 1 if they are gray; 'gray' has 1": (NCHW, {"color": "gray"}),
    "takes images of 8x8 (height x width), crop is 6x6 (height x width)": (NCHW, {"crop": 6}),
    "a.png: 8x8 (height x width), smaller than the crop of 16x16; give a larger size": (input_of(None, 3, 16, 16), {"size": 8}),
    "a.png: 8x8 (height x width) would be resized to 20000x20000, more than 134217728 pixels; remove it": (
        NCHW,
        {"size": 20_000},
    ),
    "takes bool, images are numbers": (input_of(None, 3, 8, 8, dtype="bool"), {}),
    "takes object, images are numbers": (input_of(None, 3, 8, 8, dtype="object"), {}),
    "mean: 3 numbers for 1 channel": (input_of(None, 1, 8, 8), {"mean": (1, 2, 3)}),
}


@pytest.mark.parametrize("message", WRONG_INPUTS)
def test_models_that_take_something_else(message, tmp_path):
    model_input, options = WRONG_INPUTS[message]
    with pytest.raises(ValueError, match="^data: ") as caught:
        only(saved(tmp_path, a=pixels()), model_input, **options)
    assert message in str(caught.value)


def test_models_with_several_inputs(tmp_path):
    other = ModelInput("mask", np.dtype("float32"), (None, 1))
    with pytest.raises(ValueError, match=r"^data: images, the model has 2 inputs \(x, mask\); give batches"):
        list(batches_from_data(biascorr.images(saved(tmp_path, a=pixels())), [NCHW, other]))
    with pytest.raises(TypeError, match="^data: input x: images in a mapping, which are only read on their own"):
        list(batches_from_data({"x": biascorr.images(tmp_path), "mask": np.ones((1, 1))}, [NCHW, other]))


def test_folders_that_are_no_paths():
    with pytest.raises(TypeError, match="^folder: NoneType, expected a path$"):
        biascorr.images(None)


def test_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="^folder: no such folder: .*gone"):
        biascorr.images(tmp_path / "gone")
    with pytest.raises(ValueError, match="no image in this folder, which is empty$"):
        biascorr.images(tmp_path)
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no image in this folder and one level of folders in it; 1 files, none \.bmp, "):
        biascorr.images(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"a\.txt: it is a file, expected a folder of images"):
        biascorr.images(tmp_path / "a.txt")


def damaged_files(folder):
    Image.fromarray(pixels(64, 64)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    return {"empty": b"", "text": b"no image", "truncated": whole[:-300], "header": whole[:20], "zeros": bytes(100)}


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "header", "zeros"])
def test_files_that_are_damaged(damage, tmp_path):
    (tmp_path / "a.jpg").write_bytes(damaged_files(tmp_path)[damage])
    with pytest.raises(
        ValueError, match=r"^data: .*a\.jpg: no image that can be read: .*; remove it, or save it again as \.png$"
    ):
        only(tmp_path)


@pytest.mark.parametrize("limit", [30, 10])  # of which the first only warns
def test_images_that_are_too_large_to_be_safe(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(
        ValueError, match=r"a\.png: no image that can be read: .*make it smaller, or raise PIL\.Image\.MAX_IMAGE"
    ):
        only(saved(tmp_path, a=pixels()))


def test_without_pillow(tmp_path, monkeypatch):
    import_module = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "PIL":
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "PIL", raising=False)
    with pytest.raises(ImportError, match=r'^images need Pillow: pip install "biascorr\[images\]"$'):
        biascorr.images(tmp_path)


# Beside what the model saw


def trained(folder, **options):
    """A network whose batch normalization has the statistics of these images, so scaled."""
    w = RNG.normal(size=(16, 3, 3, 3)).astype(np.float32)
    text = "g (float[N,3,8,8] x) => (float[N,16,6,6] y) { c = Conv (x, w)  y = BatchNormalization (c, s, b, m, v) }"
    ones, zeros = np.ones(16, np.float32), np.zeros(16, np.float32)
    network = network_from_model(model_from_text(text, w=w, s=ones, b=zeros, m=zeros, v=ones), "model")
    x = biascorr.images(folder, **options).read(network.inputs[0])[0:100]
    layer = network.layers[0].output
    y = network.part({"x": x}, [layer])({"x": x})[layer]
    axes = (0, 2, 3)
    return model_from_text(text, w=w, s=ones, b=zeros, m=y.mean(axes), v=y.var(axes))


@pytest.mark.parametrize("preset", ["imagenet", "minus-one-to-one", "zero-to-one"])
@pytest.mark.parametrize("fold", [False, True])
def test_wrong_scaling_is_said_with_the_right_preset(preset, fold, tmp_path):
    folder = saved(tmp_path, **{f"i{k}": pixels(seed=k) for k in range(8)})
    model = trained(folder, preset=preset, size=8)
    options = {"method": "mean", "fold": fold, "equalize": not fold}
    for given in ("imagenet", "minus-one-to-one", "zero-to-one", None):
        notes = biascorr.correct(model, biascorr.images(folder, preset=given, size=8), **options).notes
        assert sum(note.startswith("input x: ") and note.endswith("of 8 images") for note in notes) == 1
        found = [note for note in notes if "as wide as in training" in note]
        assert len(found) == (given != preset), notes
        assert all(f"preset={preset!r} (--preset {preset}) would make it 1" in note for note in found)


def test_nothing_is_said_where_nothing_is_known(tmp_path):
    folder = saved(tmp_path, **{f"i{k}": pixels(seed=k) for k in range(8)})
    w = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
    model = model_from_text("g (float[N,3,8,8] x) => (float[N,4,6,6] y) { y = Conv (x, w) }", w=w)
    assert not [note for note in biascorr.correct(model, biascorr.images(folder)).notes if "training" in note]
    with Storage(1 << 20) as storage:
        samples = Samples(storage)
        samples.read(np.zeros((4, 3, 8, 8), np.float32), [NCHW], lambda *_: None)
        assert samples.images is None
