"""A Keras model is corrected on a worker of a cluster with the bits that it gets here."""

import warnings

from distributed import Client, LocalCluster

from biascorr import correct
from keras_models import KERAS_WARNS, ROUGH, X, digest, with_norms


@KERAS_WARNS
def test_worker_gives_the_same_bits():
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)
        here, there = (correct(with_norms(), X, quant_params=ROUGH, method="squared", client=each) for each in (None, client))
    assert here.scores == there.scores
    assert [*map(digest, here.model.variables)] == [*map(digest, there.model.variables)]
