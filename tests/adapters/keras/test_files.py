"""Keras models in files: what is no model, outputs that are written whole or not at all, statistics that go along."""

import json
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from keras import layers

import biascorr
from biascorr import BiasCorrection, CrossLayerScaling, HighBiasFold, correct, equalize, whole_file
from biascorr.adapters.keras import files
from command_line import run, start
from keras_models import (
    KERAS_WARNS,
    ROUGH,
    X,
    chain,
    corrected,
    in_process,
    layers_of,
    outputs_of,
    params_of,
    plain,
    randomized,
    sequential,
    with_norms,
)
from networks import two_layers

pytestmark = [
    KERAS_WARNS,
    pytest.mark.filterwarnings("ignore:not folded:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with models and samples, which tests do not change."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context():
        with_norms().save(folder / "model.keras")
        save_h5(with_norms(), folder / "model.h5")
    np.savez(folder / "x.npz", image=X)
    onnx.save(two_layers(), folder / "model.onnx")
    return folder


def save_h5(model, path):
    """As Keras 2 did; Keras 3 says that this is old."""
    model.save(path)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def same(model, other):
    """Asserts that two models have the same layers and values, but for seeds, which Keras does not save."""
    before, after = layers_of(model), layers_of(other)
    assert list(before) == list(after)
    for name in before:
        for source, variable in zip(before[name].variables, after[name].variables, strict=True):
            if "seed" not in source.path:
                np.testing.assert_array_equal(variable.numpy(), source.numpy())


# Reading


@pytest.mark.parametrize(("name", "kind"), [("model.keras", str), ("model.h5", Path)])
def test_paths_are_as_good_as_models(name, kind, saved):
    path, model = kind(saved / name), with_norms()
    same(corrected(path).model, corrected(model).model)
    same(equalize(path).model, equalize(model).model)


def test_classic_functions_take_paths(saved):
    model, path = with_norms(), saved / "model.keras"
    assert biascorr.find_all_convs_bn_with_activation(path).keys() == {"first", "depthwise", "second"}
    params = params_of(model)
    same(BiasCorrection.correct_bias(path, params, ROUGH, [X]), BiasCorrection.correct_bias(model, params, ROUGH, [X]))
    info = biascorr.find_all_convs_bn_with_activation(path)["second"]
    one = BiasCorrection.analytical_bias_correction_per_layer(path, "second", info, ROUGH)
    same(one, BiasCorrection.analytical_bias_correction_per_layer(model, "second", info, ROUGH))
    one = BiasCorrection.bias_correction_per_layer(path, saved / "model.h5", params, "second", [X], quant_params=ROUGH)
    same(one, BiasCorrection.bias_correction_per_layer(model, model, params, "second", [X], quant_params=ROUGH))
    same(biascorr.fold_all_batch_norms(path)[0], biascorr.fold_all_batch_norms(model)[0])
    same(
        biascorr.fold_given_batch_norms(path, [("first", "norm")]), biascorr.fold_given_batch_norms(model, [("first", "norm")])
    )
    same(biascorr.equalize_model(path), biascorr.equalize_model(model))
    same(CrossLayerScaling.scale_model(path)[0], CrossLayerScaling.scale_model(model)[0])
    pair = [("second", "logits")]
    same(CrossLayerScaling.scale_cls_sets(path, pair)[0], CrossLayerScaling.scale_cls_sets(model, pair)[0])
    same(HighBiasFold.bias_fold(path, [], []), HighBiasFold.bias_fold(model, [], []))


def cut(left):
    return lambda content: content[: int(len(content) * left)]


DAMAGED = {
    "empty": lambda content: b"",  # noqa: ARG005
    "text": lambda content: b"import keras\n" * 30,  # noqa: ARG005
    "zeros": lambda content: bytes(1000),  # noqa: ARG005
    "a tenth": cut(0.1),
    "half": cut(0.5),
    "all but little": cut(0.99),
    "wrong bytes": lambda content: content[:200] + bytes(300) + content[500:],
}


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_files_that_are_damaged(name, damage, saved, tmp_path):
    path = tmp_path / name
    if (name, damage) == ("model.h5", "wrong bytes"):
        pytest.skip("nothing of it is there")
    path.write_bytes(DAMAGED[damage]((saved / name).read_bytes()))
    with pytest.raises(ValueError, match=f"^reference: {re.escape(str(path))}: Keras cannot read it: "):
        equalize(path)


def without(name):
    def change(source, target):
        with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
            for each in before.namelist():
                if each != name:
                    after.writestr(each, before.read(each))

    return change


def with_statistics(text):
    def change(source, target):
        shutil.copy(source, target)
        with zipfile.ZipFile(target, "a") as archive:
            archive.writestr(files.FOLDED, text)

    return change


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
def test_archives_without_a_part(name, saved, tmp_path):
    without(name)(saved / "model.keras", tmp_path / "model.keras")
    with pytest.raises(ValueError, match="Keras cannot read it"):
        equalize(tmp_path / "model.keras")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"first": 3}', '{"first": ["norm", "!", "", ""]}', "[" * 100_000])
def test_statistics_that_are_broken(text, saved, tmp_path):
    with_statistics(text)(saved / "model.keras", tmp_path / "model.keras")
    with pytest.raises(ValueError, match="reference: .*expected what biascorr writes there"):
        equalize(tmp_path / "model.keras")


def test_statistics_of_other_tensors_say_nothing(saved, tmp_path):
    with_statistics('{"none": ["norm", "", "", "0"]}')(saved / "model.keras", tmp_path / "model.keras")
    same(equalize(tmp_path / "model.keras").model, equalize(with_norms()).model)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_what_is_no_file(suffix, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^reference: .*none\.\w+: no such file$"):
        equalize(tmp_path / f"none{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(OSError, match=r"^reference: .*folder\.\w+: a folder, expected a file$"):
        equalize(tmp_path / f"folder{suffix}")


class Doubled(keras.Layer):
    def call(self, x):
        return x * 2


def test_a_file_with_a_layer_of_the_callers_own(tmp_path):
    model = randomized(chain(layers.Conv2D(4, 3, name="conv"), Doubled(name="doubled")))
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"Keras cannot read it: .*Doubled.*load_model\(path, custom_objects=...\)"):
        corrected(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Doubled": Doubled})
    same(corrected(loaded).model, corrected(model).model)
    with keras.saving.custom_object_scope({"Doubled": Doubled}):
        same(corrected(tmp_path / "model.keras").model, corrected(model).model)


def test_a_file_with_a_loss_of_the_callers_own_is_read_with_a_warning(tmp_path):
    def half(y_true, y_pred):
        return keras.ops.mean(y_true - y_pred) / 2

    model = plain()
    model.compile("sgd", half)
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match=r"model\.keras: compile the model that is returned yourself: .*half"):
        returned = corrected(tmp_path / "model.keras").model
    assert not returned.compiled
    same(returned, corrected(model).model)


def test_a_file_keeps_what_it_is_compiled_with(tmp_path):
    model = plain()
    model.compile(keras.optimizers.SGD(0.25), "mse", metrics=["mae"])
    model.fit(X, np.zeros((16, 4, 4, 2)), verbose=0)
    corrected(model).save(tmp_path / "out.keras")
    again = keras.saving.load_model(tmp_path / "out.keras")
    assert (float(again.optimizer.learning_rate), int(again.optimizer.iterations)) == (0.25, 1)


# Writing


@pytest.fixture(scope="module")
def correction():
    return corrected(sequential(), fold=True)


@pytest.fixture(scope="module")
def equalized():
    return equalize(with_norms())


@pytest.mark.parametrize("name", ["out", "out.h5", "out.onnx", "out.keras.zip", "out.KERAS"])
def test_other_suffixes_are_refused(name, correction, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{name}: expected a name that ends with .keras")):
        correction.save(tmp_path / name)
    assert names_in(tmp_path) == []


def test_an_onnx_model_is_not_saved_as_one_of_keras(tmp_path):
    for name in ("out.keras", "out.h5"):
        with pytest.raises(ValueError, match=re.escape(f"{name}: a name of a Keras model, expected one for an ONNX model")):
            equalize(two_layers()).save(tmp_path / name)
    assert names_in(tmp_path) == []


def test_an_existing_file_is_kept_unless_forced(correction, tmp_path):
    path = tmp_path / "out.keras"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=re.escape(str(path))):
        correction.save(path)
    assert path.read_bytes() == b"precious"
    correction.save(str(path), force=True)
    same(keras.saving.load_model(path), correction.model)
    assert names_in(tmp_path) == ["out.keras"]


def test_a_saved_model_says_how_it_was_made(correction, tmp_path):
    correction.save(tmp_path / "out.keras")
    with zipfile.ZipFile(tmp_path / "out.keras") as archive:
        found = json.loads(archive.read(files.PROVENANCE))
    assert found == {"version": biascorr.__version__, "method": correction.method, "data": correction.data_digest}
    correct(tmp_path / "out.keras", X, method="iterative").save(tmp_path / "out.keras", force=True)
    with zipfile.ZipFile(tmp_path / "out.keras") as archive:
        assert archive.namelist().count(files.PROVENANCE) == 1
        assert json.loads(archive.read(files.PROVENANCE))["method"] == "iterative"


def test_a_model_may_be_overwritten_with_its_own_correction(saved, tmp_path):
    path = tmp_path / "model.keras"
    shutil.copy(saved / "model.keras", path)
    correction = corrected(path)
    correction.save(path, force=True)
    same(keras.saving.load_model(path), correction.model)


@pytest.mark.parametrize("name", ["none/out.keras", "file/out.keras", "folder.keras"])
def test_places_that_cannot_be_written_to(name, correction, tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "folder.keras").mkdir()
    for force in (False, True):
        with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
            correction.save(tmp_path / name, force=force)
    assert names_in(tmp_path) == ["file", "folder.keras"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError("no")])
@pytest.mark.parametrize("where", ["save_model", "_flush", "writestr"])
def test_saving_that_is_interrupted_leaves_nothing(where, error, force, equalized, tmp_path, monkeypatch):
    path = tmp_path / "out.keras"
    if force:
        path.write_bytes(b"precious")

    def fail(*_, **__):
        raise error

    owner = {"save_model": keras.saving, "_flush": whole_file, "writestr": files.zipfile.ZipFile}[where]
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        equalized.save(path, force=force)
    monkeypatch.undo()
    assert names_in(tmp_path) == (["out.keras"] if force else [])
    assert not force or path.read_bytes() == b"precious"


NO_SPACE = """
    import os, resource, sys
    from pathlib import Path
    from keras_models import sequential
    from biascorr.adapters.keras import files
    path, *limits = Path(sys.argv[1]), *map(int, sys.argv[2:])
    model = sequential()
    if os.getuid() == 0:
        os.setuid(65534)  # root may write anywhere
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            files.save(model, "{}", path)
        except OSError as error:
            print(type(error).__name__, error)
"""


def test_a_disk_that_is_full_and_a_folder_that_is_read_only():
    with tempfile.TemporaryDirectory() as place:  # others run tests in that of pytest, and close it
        Path(place).chmod(0o755)
        full, locked = Path(place, "full"), Path(place, "locked")
        full.mkdir()
        full.chmod(0o777)
        locked.mkdir(0o555)
        for folder, limits, kind in ((full, [0, 3000], "OSError"), (locked, [-1], "PermissionError")):
            done = in_process(NO_SPACE, folder / "out.keras", *limits)
            lines = done.stdout.splitlines()
            assert [line.partition(" ")[0] for line in lines] == [kind] * len(limits), done
            assert all(str(folder) in line for line in lines)
            assert names_in(folder) == []


# Statistics


def analytical(model, infos):
    """The bias of the layer that is corrected by what a batch normalization said."""
    returned = BiasCorrection.analytical_bias_correction_per_layer(model, "second", infos["second"], ROUGH)
    return layers_of(returned)["second"].bias.numpy()


@pytest.mark.parametrize("make", [with_norms, lambda: with_norms_in_a_row()], ids=["functional", "sequential"])
@pytest.mark.parametrize("way", ["memory", "file"])
def test_dictionaries_from_before_equalization_are_as_good_as_those_from_after(way, make, tmp_path):
    model = make()
    before = biascorr.find_all_convs_bn_with_activation(model)
    result = equalize(model)
    equalized = result.model
    if way == "file":
        result.save(tmp_path / "out.keras")
        equalized = tmp_path / "out.keras"
    after = biascorr.find_all_convs_bn_with_activation(equalized)
    assert "second" in before.keys() & after.keys()
    assert after["second"].input_bn.name == before["second"].input_bn.name
    assert not np.allclose(after["second"].input_bn.beta, before["second"].input_bn.beta)
    assert np.abs(analytical(equalized, after) - layers_of(result.model)["second"].bias.numpy()).max() > 0
    np.testing.assert_array_equal(analytical(equalized, before), analytical(equalized, after))
    params = params_of(model)
    corrections = [
        BiasCorrection.correct_bias(equalized, params, ROUGH, [X], infos, perform_only_empirical_bias_corr=False)
        for infos in (before, after, None)
    ]
    same(corrections[0], corrections[1])
    same(corrections[0], corrections[2])
    same(
        correct(equalized, method="analytical", quant_params=ROUGH).model,
        correct(result.model, method="analytical", quant_params=ROUGH).model,
    )


def with_norms_in_a_row():
    parts = [
        layers.Conv2D(4, 3, padding="same", use_bias=False, name="first"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
        layers.Conv2D(5, 1, name="second"),
        layers.ReLU(name="relu_2"),
        layers.Conv2D(3, 1, name="logits"),
    ]
    return randomized(keras.Sequential([keras.Input((8, 8, 3), name="image"), *parts]))


def test_statistics_go_through_all_steps_and_files(tmp_path):
    model = with_norms()
    before = biascorr.find_all_convs_bn_with_activation(model)
    folded, pairs = biascorr.fold_all_batch_norms(model)
    scaled, infos = CrossLayerScaling.scale_model(folded)
    done = HighBiasFold.bias_fold(scaled, pairs, infos)
    for each in (folded, scaled, done):
        found = biascorr.find_all_convs_bn_with_activation(each)
        np.testing.assert_array_equal(analytical(each, before), analytical(each, found))
    again = corrected(done)
    again.save(tmp_path / "out.keras")
    found = biascorr.find_all_convs_bn_with_activation(tmp_path / "out.keras")
    expected = biascorr.find_all_convs_bn_with_activation(done)
    assert list(found) == list(expected)
    for name in ("depthwise", "second"):
        np.testing.assert_allclose(found[name].input_bn.beta, expected[name].input_bn.beta, rtol=1e-6)


def test_a_dictionary_is_updated_by_equalization():
    model = with_norms()
    infos = biascorr.find_all_convs_bn_with_activation(model)
    equalized = biascorr.equalize_model(model, conv_bn_dict=infos)
    found = biascorr.find_all_convs_bn_with_activation(equalized)
    np.testing.assert_allclose(infos["second"].input_bn.beta, found["second"].input_bn.beta, rtol=1e-5)


@pytest.mark.parametrize("name", ["depthwise", "first"])
def test_a_layer_that_is_changed_afterwards_is_known_nothing_of(name):
    equalized = biascorr.equalize_model(with_norms())
    found = biascorr.find_all_convs_bn_with_activation(equalized)
    layer = equalized.get_layer(name)
    layer.set_weights([each * 2 for each in layer.get_weights()])
    after = biascorr.find_all_convs_bn_with_activation(equalized)
    reader = {"first": "depthwise", "depthwise": "second"}[name]
    assert found[reader].input_bn is not None
    assert reader not in after or after[reader].input_bn is None
    other = {"first": "second", "depthwise": "depthwise"}[name]
    assert after[other].input_bn is not None


def test_names_are_those_of_keras():
    infos = biascorr.find_all_convs_bn_with_activation(with_norms())
    assert {name: (info.input_bn and info.input_bn.name) for name, info in infos.items()} == {
        "first": None, "depthwise": "norm", "second": "norm_2"
    }  # fmt: skip
    assert [report.name for report in corrected(with_norms()).report] == ["first", "depthwise", "second", "logits"]


# The command line


@pytest.mark.parametrize(("name", "run"), [("model.keras", start), ("model.h5", run)], ids=["model.keras", "model.h5"])
def test_correct_from_the_command_line(name, run, saved, tmp_path):
    arguments = "correct", saved / name, "--data", saved / "x.npz", "--method", "mean", "-o", "out.keras"
    done = run(*arguments, cwd=tmp_path, TF_CPP_MIN_LOG_LEVEL="3")
    assert done.returncode == 0, done.stderr
    assert re.search("mean, 4 of 4 layers, .* -> out.keras; a float model, quantize it now", done.stdout)
    expected = correct(with_norms(), X, method="mean").model
    for output, each in zip(outputs_of(keras.saving.load_model(tmp_path / "out.keras")), outputs_of(expected)):
        np.testing.assert_allclose(output, each, rtol=1e-5, atol=1e-5)


def test_equalize_from_the_command_line(saved, tmp_path):
    done = run("equalize", saved / "model.keras", "-o", "out.keras", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    same(keras.saving.load_model(tmp_path / "out.keras"), equalize(with_norms()).model)
    again = run("equalize", saved / "model.keras", "-o", "out.keras", cwd=tmp_path)
    assert again.returncode == 1
    assert "out.keras exists; --force overwrites it" in again.stderr


REFUSED = {
    ("model.keras", "out.onnx"): "out.onnx: expected a name that ends with .keras, which is how Keras models are saved",
    ("model.keras", "out.h5"): "out.h5: expected a name that ends with .keras, which is how Keras models are saved",
    ("model.h5", "out"): "out: expected a name that ends with .keras, which is how Keras models are saved",
    ("model.onnx", "out.keras"): "out.keras: a name of a Keras model, expected one for an ONNX model: .onnx",
}


@pytest.mark.parametrize(("model", "output"), REFUSED)
@pytest.mark.parametrize("command", ["correct", "equalize"])
def test_wrong_names_of_outputs_are_known_before_the_work(command, model, output, saved, tmp_path, monkeypatch, capsys):
    from biascorr.cli import app

    monkeypatch.chdir(tmp_path)
    for module in ("correction.correct", "equalization.equalize"):
        monkeypatch.setattr(f"biascorr.{module}.{module.rpartition('.')[2]}", lambda *_, **__: pytest.fail("the work was done"))
    with pytest.raises(SystemExit, match="1"):
        app.app([command, str(saved / model), "-o", output, *(["--method", "analytical"] if command == "correct" else [])])
    assert capsys.readouterr().err == f"error: {REFUSED[model, output]}\n"
    assert names_in(tmp_path) == []
