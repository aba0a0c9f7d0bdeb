"""How far the work is, with a clock of the test's own."""

import pytest

import biascorr
from biascorr.calibration.progress import WHOLE, Work
from networks import quantized, samples, two_layers


class Clock:
    """Seconds that the test lets pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Watched:
    """Work, and what it reports at each second."""

    def __init__(self):
        self.clock, self.reports = Clock(), []
        self.work = Work(lambda *report: self.reports.append(report), self.clock)

    def run(self, kind, units, seconds, label=None):
        """Does so many units of a kind, each in so many seconds."""
        with self.work.doing(kind, units, label) as advance:
            for _ in range(units):
                self.clock.now += seconds
                advance(1 / units)

    @property
    def share(self):
        return self.reports[-1][1] / WHOLE


def test_share_of_work_as_planned_is_that_of_the_time():
    watched = Watched()
    watched.work.plan({"float": 20, "score": 20})
    watched.run("float", 20, 1.0)
    assert watched.share == pytest.approx(0.5, abs=0.01)
    watched.run("score", 10, 1.0)
    assert watched.share == pytest.approx(0.75, abs=0.01)


def test_pace_of_a_kind_is_learned():
    watched = Watched()
    watched.work.plan({"squared": 40, "float": 10})
    watched.run("squared", 20, 5.0)
    left = 100 / watched.share - 100
    assert left == pytest.approx(20 * 5 + 10 * 5 / 6, rel=0.1)


def test_share_never_falls_back_and_ends_below_the_whole():
    watched = Watched()
    watched.work.plan({"float": 10})
    watched.run("float", 10, 1.0)
    watched.work.plan({"float": 1000})
    watched.run("float", 10, 1.0)
    watched.work.plan({})
    watched.run("float", 1, 1.0)
    shares = [done for _, done, _ in watched.reports]
    assert shares == sorted(shares)
    assert max(shares) == WHOLE - 1


def test_steps_inside_of_steps_have_labels_and_times_of_their_own():
    watched = Watched()
    watched.work.plan({"squared": 10, "layers": 10})
    with watched.work.step("candidate 1 of 2: squared"), watched.work.doing("squared", 10) as advance:
        watched.run("layers", 10, 1.0, "float network")
        watched.clock.now += 30.0
        advance(1.0)
    labels = [label for label, _, _ in watched.reports]
    assert list(dict.fromkeys(labels)) == ["candidate 1 of 2: squared", "float network"]
    assert labels[-1] == "candidate 1 of 2: squared"
    assert watched.work._seconds == {"layers": 10.0, "squared": 30.0}


def test_what_was_not_done_of_a_step_is_not_left():
    watched = Watched()
    watched.work.plan({"float": 10, "score": 10})
    with watched.work.doing("float", 10) as advance:
        watched.clock.now += 1.0
        advance(0.1)
    watched.run("score", 1, 1.0)
    assert watched.share == pytest.approx(2 / 11, abs=0.01)


@pytest.mark.parametrize("method", ["auto", "mean", "squared"])
@pytest.mark.parametrize("is_given", [False, True])
def test_the_share_of_a_correction_grows_from_nothing_to_all(method, is_given):
    reports, model = [], two_layers()
    options = {"quantized": quantized(model, [{"x": samples(4, 3, 6, 6)}])} if is_given else {"fold": True}
    biascorr.correct(model, samples(32, 3, 6, 6), method=method, progress=lambda *report: reports.append(report), **options)
    shares = [done for _, done, total in reports if total == WHOLE]
    assert {label for label, _, total in reports if total is None} == {"reading samples"}  # of an array, nobody knows before
    assert shares == sorted(shares)
    assert shares[0] <= WHOLE / 20
    assert shares[-1] > 0.9 * WHOLE
    labels = list(dict.fromkeys(label for label, _, _ in reports))
    assert labels[:2] == ["reading samples", "uncorrected model"]
    if method == "auto":
        assert [label for label in labels if label.startswith("candidate 2")] == ["candidate 2 of 5: activation 0.5"]
