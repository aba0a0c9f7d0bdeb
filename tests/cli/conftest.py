"""Models and samples for commands."""

import numpy as np
import onnx
import pytest

from networks import quantized, samples, two_layers, weights, with_constants

X = samples(4, 3, 6, 6)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with good and bad models and samples; tests do not change it."""
    folder = tmp_path_factory.mktemp("inputs")
    models = folder / "models"
    data = folder / "data"
    models.mkdir()
    data.mkdir()
    model = two_layers()
    whole = model.SerializeToString()
    (models / "float.onnx").write_bytes(whole)
    onnx.save(quantized(model, [{"x": X}]), models / "quantized.onnx")
    onnx.save(with_constants(model, w1=weights(4, 3, 5, 5)), models / "other.onnx")
    (models / "empty.onnx").write_bytes(b"")
    (models / "text.onnx").write_text("not a model\n" * 50)
    (models / "model.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(50))
    (models / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    external = {"save_as_external_data": True, "size_threshold": 0}
    onnx.save(two_layers(), models / "missing_data.onnx", location="gone.data", **external)
    (models / "gone.data").unlink()
    onnx.save(two_layers(), models / "outside_data.onnx", location="outside.data", **external)
    (models / "outside.data").rename(folder / "outside.data")
    (models / "outside.data").symlink_to(folder / "outside.data")
    del model.graph.node[0].input[1:]
    onnx.save(model, models / "no_weights.onnx")

    np.savez(data / "good.npz", x=X)
    np.save(data / "good.npy", X)
    np.savez(data / "name.npz", z=X)
    np.savez(data / "shape.npz", x=X[:, :2])
    np.savez(data / "dtype.npz", x=X.astype(np.float64))
    np.savez(data / "nan.npz", x=np.full_like(X, np.nan))
    np.savez(data / "none.npz", x=X[:0])
    np.savez(data / "objects.npz", x=np.array([X, None], object))
    (data / "table.csv").write_text("1, 2, 3")
    raw = (data / "good.npz").read_bytes()
    (data / "truncated.npz").write_bytes(raw[:-100])
    np.savez_compressed(data / "damaged.npz", x=X)
    raw = bytearray((data / "damaged.npz").read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 20] = b"\xff" * 20
    (data / "damaged.npz").write_bytes(raw)
    (data / "empty").mkdir()
    (data / "batches").mkdir()
    for k in range(4):
        np.save(data / "batches" / f"{k}.npy", X[k : k + 1])
    return folder


@pytest.fixture
def folder(inputs, tmp_path):
    """An empty folder with links to the inputs."""
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(inputs / name)
    return tmp_path
