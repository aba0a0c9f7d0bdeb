"""What arrays can do to a kernel that reads them: every way to be wrong is an exception, and none ends the process."""

import ctypes
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from biascorr import ChannelMean, MeanBiasCorrector, Quantization, _kernels, fake_quantize, prepare_input_mean

GRID = (np.ones(1), np.zeros(1))


def run(code):
    """What a process prints that has 4 GB of addresses."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n" + code
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", limited], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


class BorrowChecker(ctypes.Structure):
    """What extension modules in Rust share, to tell each other which arrays they write to."""

    _fields_ = (
        ("version", ctypes.c_uint64),
        ("flags", ctypes.c_void_p),
        ("acquire", ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.py_object)),
        ("acquire_mut", ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.py_object)),
        ("release", ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.py_object)),
        ("release_mut", ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.py_object)),
    )

    @classmethod
    def shared(cls):
        prepare_input_mean([np.ones(1)], None)  # the first borrow makes it
        capsule = np._core.multiarray._RUST_NUMPY_BORROW_CHECKING_API
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
        return cls.from_address(pointer(capsule, b"_RUST_NUMPY_BORROW_CHECKING_API"))


WRITTEN = {
    "samples[1]": ((4, 3), np.float32, lambda array: prepare_input_mean([np.ones((2, 3)), array[::-1]], None)),
    "samples[0]": ((4, 3), ml_dtypes.bfloat16, lambda array: prepare_input_mean([array], None)),
    "weights": ((4, 3), np.float32, lambda array: MeanBiasCorrector(np.ones(4)).calculate(array, np.ones((4, 3), np.float32))),
    "fake_quantized_weights": ((4, 3), np.float64, lambda array: MeanBiasCorrector(np.ones(4)).calculate(array + 1, array)),
    "mean": ((4,), np.float64, lambda array: _kernels.weight_error(np.ones((4, 3)), np.ones((4, 3)), array, 1, "IO", True)),
    "array": ((4, 3), np.float32, lambda array: _kernels.fake_quantize_array(array, (*GRID, 8, 3, 1))),
    "scale": ((1,), np.float64, lambda array: _kernels.quantize(np.ones((4, 3)), (array, GRID[1], 8, 3, 1))),
    "zero_point": ((1,), np.float64, lambda array: _kernels.dequantize(np.ones(3, np.int8), (GRID[0], array, 8, 3, 1))),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_array_that_another_module_writes_to_is_named(name):
    shape, dtype, call = WRITTEN[name]
    array, checker = np.ones(shape, dtype), BorrowChecker.shared()
    call(array)
    assert checker.acquire_mut(checker.flags, array) == 0
    try:
        with pytest.raises(ValueError, match=rf"{name.translate({91: chr(92) + '['})}: borrowed for writing"):
            call(array)
    finally:
        checker.release_mut(checker.flags, array)
    call(array)
    assert checker.acquire_mut(checker.flags, array) == 0, "a borrow was not given back"
    checker.release_mut(checker.flags, array)


class Hostile:
    """Does something to another array when it is asked to be one."""

    def __init__(self, action):
        self.action = action

    def __array__(self, dtype=None, copy=None):
        self.action()
        return np.ones((2, 4), dtype or np.float32)


def test_an_array_that_changes_while_the_next_one_is_made():
    victim = np.ones((1000, 4), np.float32)

    def refilled():
        victim[...] = 3

    for action in (lambda: setattr(victim, "shape", (500, 2, 4)), refilled, lambda: victim.resize((7, 4), refcheck=False)):
        mean = prepare_input_mean([victim, Hostile(action)], None)
        expected = (victim.sum() / 4 + 2) / (victim.size / 4 + 2)
        np.testing.assert_allclose(mean, np.full(4, expected), rtol=1e-6)
    weights = np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match="fake_quantized_weights: shape"):
        MeanBiasCorrector(np.ones(2)).calculate(weights, Hostile(lambda: weights.resize((2, 4000), refcheck=False)))


def test_an_array_that_is_changed_in_another_thread_meanwhile():
    code = """
import threading, weakref
import numpy as np
from biascorr import MeanBiasCorrector, prepare_input_mean, set_num_threads
set_num_threads(1)
threading.excepthook = lambda _: None  # a sample of other shapes may be refused
mean = np.ones(200_000)
refused = 0
for call in (lambda x: prepare_input_mean([x], None), lambda x: MeanBiasCorrector(mean, layout="IO").calculate(x, x)):
    for turn in range(10):
        sample = np.ones((200_000, 64), np.float32)
        given = sample[...] if turn % 2 else sample
        thread = threading.Thread(target=call, args=(given,))
        thread.start()
        while thread.is_alive():
            if weakref.getweakrefcount(sample) > 0:  # the kernel has it
                try:
                    sample.resize((200_000, 32), refcheck=False)
                    break  # no longer
                except ValueError as error:
                    refused += "referenced" in str(error)
            given.shape = (200_000, 8, 8)
            given.shape = (200_000, 64)
        thread.join()
print("refused" if refused else "too late")
"""
    assert run(code) == "refused"


def test_views_of_one_element_in_several_dtypes():
    code = """
import numpy as np
from biascorr import prepare_input_mean
memory = np.full(4, 257, np.int16)
samples = [np.broadcast_to(memory[:1], (3, 2)), np.broadcast_to(memory.view(np.int8)[:1], (5, 2)),
           np.broadcast_to(memory.view(np.int32)[:1], (3, 2)), np.broadcast_to(memory[1:2], (3, 2))]
print(prepare_input_mean(samples, None) == np.mean(np.concatenate(samples), axis=0, dtype=np.float64).astype(np.float32))
"""
    assert run(code) == "[ True  True]"


class Refilled(list):
    """Gives one buffer again and again."""

    buffer = np.zeros((2, 3), np.float32)

    def __getitem__(self, k):
        self.buffer[...] = k
        return self.buffer


class Iterated(list):
    """The same, to whoever iterates."""

    def __iter__(self):
        return map(Refilled([None]).__getitem__, range(len(self)))


@pytest.mark.parametrize("kind", [Refilled, Iterated])
@pytest.mark.parametrize("quantization", [None, Quantization(2.0, 1)])
def test_a_sequence_that_refills_one_buffer(kind, quantization):
    expected = 1.5 if quantization is None else 0.25
    assert prepare_input_mean(kind([None] * 4), quantization).tolist() == [expected] * 3


def test_a_list_that_an_array_in_it_changes():
    samples = [np.full((2, 4), 3, np.float32), None, np.full((2, 4), 5, np.float32)]
    samples[1] = Hostile(samples.clear)
    assert prepare_input_mean(samples, None).tolist() == [3.0] * 4


def odd_strides():
    fields = np.zeros(40, np.dtype([("byte", "i1"), ("real", "f4"), ("short", "i2")]))
    fields["real"], fields["short"] = np.arange(40), -np.arange(40)
    yield fields["real"].reshape(10, 4)
    yield fields["short"].reshape(10, 4)
    yield fields["byte"].reshape(10, 4)
    buffer = np.arange(400).astype(np.uint8)
    for dtype in (np.int16, np.uint32, np.float16):
        for stride in (3, 5, -3, -7):
            yield np.ndarray((5, 4), dtype, buffer, offset=200, strides=(4 * stride, stride))
    yield np.ndarray((5, 4), ml_dtypes.bfloat16, np.zeros(256, np.uint8), offset=1, strides=(21, 5))
    yield np.ndarray((1, 4), np.int32, buffer, offset=4, strides=(3, 4))  # an axis of one step goes nowhere


@pytest.mark.parametrize("array", list(odd_strides()), ids=lambda array: f"{array.dtype} {array.strides}")
def test_strides_that_are_no_whole_elements(array):
    contiguous = array.copy()
    np.testing.assert_array_equal(prepare_input_mean([array], None), prepare_input_mean([contiguous], None))
    corrector = MeanBiasCorrector(np.ones(len(array)))
    found = corrector.calculate(array, np.zeros_like(contiguous))
    np.testing.assert_array_equal(found, corrector.calculate(contiguous, np.zeros_like(contiguous)))
    np.testing.assert_array_equal(fake_quantize(array, Quantization()), fake_quantize(contiguous, Quantization()))


def test_kernels_refuse_what_they_cannot_read():
    misaligned = np.zeros(49, np.uint8)[1:].view(np.float32).reshape(4, 3)
    grids, mean = (*GRID, 8, [0, 0], None), np.ones(4)
    with pytest.raises(ValueError, match="weights: misaligned or byte-swapped"):
        _kernels.weight_error_from_grids(misaligned, grids, mean, 1, "IO")
    with pytest.raises(ValueError, match="weights: misaligned or byte-swapped"):
        _kernels.weight_error_from_grids(np.ones((4, 3), ">f4"), grids, mean, 1, "IO")
    for wrong in (np.ones((4, 3), np.float16), np.ones((4, 3), int), [[1.0]]):
        with pytest.raises(TypeError, match=r"weights: .*, expected an array of float32 or float64"):
            _kernels.weight_error_from_grids(wrong, grids, mean, 1, "IO")
        with pytest.raises(TypeError, match=r"array: .*, expected an array of float32 or float64"):
            _kernels.quantize(wrong, (*GRID, 8, 3, 1))
    with pytest.raises(TypeError, match="mean: dtype float32, expected an array of float64"):
        _kernels.weight_error(np.ones((4, 3)), np.ones((4, 3)), np.ones(4, np.float32), 1, "IO", True)
    with pytest.raises(ValueError, match="array: not contiguous, expected C order"):
        _kernels.quantize(np.ones((4, 3)).T, (*GRID, 8, 3, 1))
    with pytest.raises(TypeError, match="array: dtype int64, expected an array of integers of 8, 16 or 32 bits"):
        _kernels.dequantize(np.ones(3, np.int64), (*GRID, 8, 3, 1))
    for strides, blocks in (([0], None), ([1, 0], None), ([-1, 0], None), ([0, 1], (1, 0)), ([0, 1], (2, 1)), ([0, 1], (1, 2))):
        given = np.ones(2), np.zeros(2), 8, strides, blocks
        with pytest.raises(ValueError, match="grids: 2 along the strides"):
            _kernels.weight_error_from_grids(np.ones((4, 3)), given, mean, 1, "IO")


@pytest.mark.parametrize("dtype", ["datetime64[s]", "timedelta64[s]", "complex64", "object", "S3", "U3", "V4", "i4,f4"])
def test_dtypes_that_are_no_numbers_are_refused_by_name(dtype):
    array, name = np.zeros((2, 3), dtype), np.dtype(dtype)
    for call in (
        lambda: prepare_input_mean([array], None),
        lambda: ChannelMean().update(array),
        lambda: MeanBiasCorrector([1.0, 1.0]).calculate(np.ones((2, 3)), array),
        lambda: fake_quantize(array, Quantization()),
    ):
        with pytest.raises(TypeError) as error:
            call()
        assert f"dtype {name}, expected" in str(error.value)


NO_MEMORY = {
    "channels": "prepare_input_mean([broadcast(np.int8(1), (1, HUGE))], None)",
    "channels of a float": "prepare_input_mean([broadcast(np.float32(1), (HUGE,))], None)",
    "channels of an integer and a float": "prepare_input_mean([broadcast(t(1), (1, HUGE)) for t in (bool, np.half)], None)",
    "channels first": "ChannelMean(channel_axis=1).update(broadcast(np.int64(1), (1, HUGE, 1)))",
    "taps": "TapMean(Window((1,), (1,), (1,), ((0, 0),))).update(broadcast(np.float32(1), (1, HUGE, 1)))",
    "positions": "TapMean(Window((3,), (1,), (1,), ((0, 0),))).update(broadcast(np.float32(1), (1, 2, HUGE)))",
    "output channels": "MeanBiasCorrector([1.0]).calculate(*[broadcast(np.float32(1), (1, HUGE))] * 2)",
    "float64": "MeanBiasCorrector([1.0]).calculate(*[broadcast(np.float16(1), (1, HUGE))] * 2)",
    "no inputs": "MeanBiasCorrector(np.ones(0)).calculate(*[np.ones((0, HUGE), np.float32)] * 2)",
    "from a grid": "MeanBiasCorrector([1.0]).calculate_from_quantization(broadcast(np.float32(1), (1, HUGE)), Quantization())",
    "ranges": "Quantization.from_weights(np.ones((HUGE, 0), np.float32), axis=0)",
    "quantized": "Quantization(1.0, 0, 32).quantize(broadcast(np.float32(1), (1, HUGE)))",
    "moved to a grid": "fake_quantize(broadcast(np.float32(1), (1, HUGE)), Quantization())",
    "ranges of channels": "channel_ranges(broadcast(np.float32(1), (HUGE, 1)), 'OI', axis='O')",
    "scaled channels": "scaled_channels(broadcast(np.float32(1), (HUGE, 1)), 'OI')",
}


@pytest.mark.parametrize("name", NO_MEMORY)
def test_memory_that_cannot_be_had_is_an_error(name):
    code = f"""
import numpy as np
from biascorr import ChannelMean, MeanBiasCorrector, Quantization, fake_quantize, prepare_input_mean
from biascorr.channel_scale import channel_ranges, scaled_channels
from biascorr.statistics import TapMean
from biascorr.windows import Window
broadcast = np.broadcast_to
for HUGE in (1 << 40, 1 << 29):
    try:
        {NO_MEMORY[name]}
        print("computed")
    except MemoryError as error:
        print("refused")
"""
    assert run(code).splitlines()[0] == "refused"


@pytest.mark.parametrize("of", ["mean", "taps", "shift"])
def test_near_the_limit_of_memory_either_all_is_computed_or_nothing(of):
    code = f"""
import numpy as np
from biascorr import MeanBiasCorrector, prepare_input_mean
from biascorr.statistics import TapMean
from biascorr.windows import Window
def taps(size):
    means = TapMean(Window((1,), (1,), (1,), ((0, 0),)))
    means.update(np.broadcast_to(np.float32(1), (1, size, 1)))
kernels = {{
    "mean": lambda size: prepare_input_mean([np.broadcast_to(np.int8(1), (1, size))], None),
    "taps": taps,
    "shift": lambda size: MeanBiasCorrector([1.0]).calculate(*[np.broadcast_to(np.float32(1), (1, size))] * 2),
}}
outcomes = set()
for size in (1 << 20, 3 << 20, 12 << 20, 50 << 20, 100 << 20, 200 << 20, 1 << 30):
    try:
        kernels["{of}"](size)
        outcomes.add("computed")
    except MemoryError:
        outcomes.add("refused")
print(*sorted(outcomes))
"""
    assert run(code) == "computed refused"


SHORT = {
    "pool": "prepare_input_mean([np.ones((1 << 10, 1 << 12), np.int8)] * 2, None)",
    "channels": "prepare_input_mean([broadcast(np.float64(1), (4, N))], None)",
    "wide integers": "prepare_input_mean([broadcast(np.uint64(2**64 - 1), (4, N))], None)",
    "copied": "prepare_input_mean([broadcast(np.float32(1), (4, N)).astype('>f4')], None)",
    "accumulated": "ChannelMean(channel_axis=0).update(broadcast(np.float16(1), (N, 7)))",
    "taps": "TapMean(Window((3,), (1,), (1,), ((1, 1),))).update(broadcast(np.int8(1), (4, 2, N)))",
    "shift": "MeanBiasCorrector([1.0]).calculate(*[broadcast(np.float16(1), (1, N))] * 2)",
    "grids": "MeanBiasCorrector([1.0]).calculate_from_quantization(broadcast(np.half(1), (1, N)), Quantization(np.ones(N)))",
    "quantized": "Quantization(1.0, 0, 16).quantize(broadcast(np.float32(1), (N,)))",
    "per channel": "Quantization(np.ones(N), 0).dequantize(broadcast(np.int8(1), (2, N)))",
    "fake quantized": "fake_quantize(broadcast(np.float64(1), (N, 3)), Quantization(np.ones(3)))",
    "ranges": "Quantization.from_weights(broadcast(np.float32(1), (N, 2)), axis=0)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", SHORT)
def test_what_is_short_of_memory_is_computed_or_refused(name):
    """By one thread, but for the pool: when each of several first asks for memory, the allocator takes more by chance."""
    code = f"""
import os
from pathlib import Path
import numpy as np
from biascorr import ChannelMean, MeanBiasCorrector, Quantization, fake_quantize, prepare_input_mean, set_num_threads
from biascorr.statistics import TapMean
from biascorr.windows import Window
broadcast, N = np.broadcast_to, 1 << 20
if "{name}" != "pool":
    set_num_threads(1)

def limited(megabytes):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + int(megabytes * (1 << 20)),) * 2)
    try:
        {SHORT[name]}
    except (MemoryError, RuntimeError):  # no memory, or no threads
        return 1
    return 0

outcomes = set()
for megabytes in (0.5, 1, 2, 4, 4.5, 5, 6, 8, 10, 15, 25, 40, 60, 90, 130, 200, 300, 600):
    child = os.fork()
    if child == 0:
        os._exit(limited(megabytes))
    outcomes.add(os.waitpid(child, 0)[1])
print(*sorted(outcomes))
"""
    assert run(code) == "0 256"


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 1 << 62), (1 << 62, 0), (0, 0)])
def test_shapes_without_elements(shape):
    for array in (np.zeros(shape, np.int8), np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), shape, (0, 1 << 62))):
        with pytest.raises(ValueError, match=r"samples\[0\]: shape .* has no elements"):
            prepare_input_mean([array], None)
        assert fake_quantize(array[:3, :3], Quantization()).size == 0


def test_an_axis_of_one_step_may_have_any_stride():
    memory = np.arange(4, dtype=np.int8)
    for strides in ((1 << 62, 1), (-(1 << 62), 1), (7, 1)):
        array = np.lib.stride_tricks.as_strided(memory, (1, 4), strides)
        assert prepare_input_mean([array, array], None).tolist() == [0, 1, 2, 3]
        assert prepare_input_mean([array.T], None).tolist() == [1.5]
