"""What `import biascorr` brings in, what it leaves for first use, and how long it takes."""

import os
import pickle
import statistics
import subprocess
import sys
import time

import pytest

import biascorr
from biascorr.correction.classic import BiasCorrection, BiasCorrectionParams, find_all_convs_bn_with_activation
from biascorr.correction.correct import correct
from biascorr.correction.quant_params import QuantParams
from biascorr.correction.result import Correction
from biascorr.graph.batch_norms import ConvBnInfoType
from biascorr.graph.operations import ActivationType
from biascorr.graph.reasons import LayerReport

LATER = ("onnx", "onnxruntime", "rich", "typer", "biascorr.correction", "biascorr.graph", "biascorr.adapters.onnx")
LONGEST = 15e-3
"""Seconds that the import may take beyond numpy's own."""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_the_model_interface_is_imported_at_first_use():
    loaded = f"print(*sorted(set({LATER}) & set(sys.modules)))"
    code = f"import sys, biascorr; {loaded}; biascorr.LayerReport, biascorr.correct; {loaded}"
    before, after = run(code).splitlines()
    assert before == ""
    assert after.split() == ["biascorr.correction", "biascorr.graph"]


def test_names_that_are_imported_later_are_as_good_as_the_others():
    classes = ActivationType, BiasCorrection, BiasCorrectionParams, ConvBnInfoType, Correction, LayerReport, QuantParams
    names = {each.__name__: each for each in (*classes, correct, find_all_convs_bn_with_activation)}
    assert {name: getattr(biascorr, name) for name in names} == names
    listed, starred = run("import biascorr; print(*dir(biascorr)); from biascorr import *; print(*dir())").splitlines()
    assert set(biascorr.__all__) <= set(listed.split())
    assert set(biascorr.__all__) <= set(starred.split())
    run(f"from biascorr import {', '.join(names)}")
    assert pickle.loads(pickle.dumps(biascorr.correct)) is correct
    report = biascorr.LayerReport("conv", "Conv")
    assert pickle.loads(pickle.dumps(report)) == report


def test_an_unknown_attribute_is_an_error():
    with pytest.raises(AttributeError, match="module 'biascorr' has no attribute 'korrect'"):
        _ = biascorr.korrect


@pytest.mark.slow
def test_the_import_takes_little_longer_than_that_of_numpy(tmp_path):
    def seconds(code):
        start = time.perf_counter()
        run(code, PYTHONPYCACHEPREFIX=str(tmp_path), PYTHONDONTWRITEBYTECODE="")
        return time.perf_counter() - start

    def difference():
        pairs = [(seconds("import biascorr"), seconds("import numpy")) for _ in range(7)]
        ours, numpys = zip(*pairs)
        return statistics.median(ours) - statistics.median(numpys)

    seconds("import biascorr")  # compiles to bytecode, as an installation does
    differences = []
    while min(differences, default=1.0) > LONGEST and len(differences) < 3:  # another process may have been busy
        differences.append(difference())
    assert min(differences) <= LONGEST, differences
