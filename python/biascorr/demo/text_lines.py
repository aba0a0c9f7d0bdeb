"""Text lines drawn with Pillow, and their reading by the text recognizer of PP-OCRv4.

The network takes (1, 3, 48, W) float32 pixels in -1..1 and gives (1, T, K) probabilities: for each of T steps along the
line, one per character. A line is read by CTC: the best character of each step, repeats merged, blanks dropped.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import onnx
from matplotlib import ft2font, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Line = tuple[str, NDArray[np.float32]]

FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONTS = [
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
]
WORDS = """account address amount balance black bridge Broadway bread building butter castle change cheese city coffee
company copper corner customer date delivery discount dollar door Dublin east engine express failed fresh garden gate
glass gold green harbour Helsinki hotel house invoice island item January kitchen lemon letter library London machine
market menu metal model morning mountain museum north number office orange order Paris paper parking payment platform
price quality quantity receipt return river Rome school service silver simple south station street summer table tax
ticket total tower train travel valid village water weight west window winter yellow zone"""
MARGIN, HEIGHT = 8, 48

# The picture's layout in pixels, and its colours (mark, cell) of readings that are wrong and right.
PICTURE_WIDTH, HEADER, ROW, LINE_LEFT, LINE_WIDTH, READING_LEFT, READING_WIDTH = 1400, 84, 54, 24, 390, 436, 314
COLOURS = {False: ("#b3261e", "#fbe9e7"), True: ("#1b7a3d", "#eaf6ed")}
SHOWN_CHARACTERS = 29


def network_path() -> Path:
    """The recognizer inside the wheel rapidocr-onnxruntime, found without importing it and its dependencies."""
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("no text recognizer: pip install --no-deps rapidocr-onnxruntime==1.4.4")
    return Path(spec.submodule_search_locations[0]) / "models" / "ch_PP-OCRv4_rec_infer.onnx"


def characters_of(network: onnx.ModelProto) -> list[str]:
    """What each of the K probabilities stands for: the blank, the keys in the network's metadata, the space."""
    metadata = {entry.key: entry.value for entry in network.metadata_props}
    return ["", *metadata["character"].splitlines(), " "]


def render_lines(count: int, seed: int) -> list[Line]:
    """`count` lines: the text and its (1, 3, 48, W) picture."""
    rng = np.random.default_rng(seed)
    return [_render_line(_random_text(rng), rng) for _ in range(count)]


def _random_text(rng: np.random.Generator) -> str:
    count = int(rng.integers(2, 4))
    return " ".join(_random_number(rng) if rng.random() < 0.3 else str(rng.choice(WORDS.split())) for _ in range(count))


def _random_number(rng: np.random.Generator) -> str:
    number, day, month = rng.integers(10, 100_000), rng.integers(1, 29), rng.integers(1, 13)
    return str(rng.choice([f"{number}", f"{number / 100:.2f}", f"2024-{month:02}-{day:02}", f"{number % 100}%"]))


def _render_line(text: str, rng: np.random.Generator) -> Line:
    font = ImageFont.truetype(str(FONT_FOLDER / f"{rng.choice(FONTS)}.ttf"), int(rng.integers(26, 34)))
    paper, ink = int(rng.integers(180, 256)), int(rng.integers(0, 100))
    _, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (int(right) + 2 * MARGIN, HEIGHT), paper)
    ImageDraw.Draw(image).text((MARGIN, (HEIGHT - top - bottom) / 2), text, fill=ink, font=font)
    noisy = np.clip(np.asarray(image) + rng.normal(0, 6, (HEIGHT, image.width)), 0, 255)
    return text, np.tile(noisy / 127.5 - 1, (1, 3, 1, 1)).astype(np.float32)


def read_line(probabilities: NDArray[np.float32], characters: Sequence[str]) -> str:
    """Greedy CTC decoding of (1, T, K) probabilities."""
    best = probabilities[0].argmax(axis=1)
    starts = np.diff(best, prepend=0) != 0
    return "".join(characters[index] for index in best[starts])


def read_right(text: str, reading: str) -> bool:
    """Whether the reading is the text, spaces ignored."""
    return text.replace(" ", "") == reading.replace(" ", "")


def character_accuracy(texts: Sequence[str], readings: Sequence[str]) -> float:
    """1 - edit distance / length over all lines, spaces ignored, at least 0."""
    pairs = [(text.replace(" ", ""), reading.replace(" ", "")) for text, reading in zip(texts, readings, strict=True)]
    errors = sum(edit_distance(text, reading) for text, reading in pairs)
    return max(0.0, 1 - errors / sum(len(text) for text, _ in pairs))


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn one text into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@style.context("default")
def save_picture(path: Path, lines: Sequence[Line], readings: Mapping[str, Sequence[str]], rows: int = 12) -> None:
    """Draw the first `rows` lines, each beside what every model read; the header counts all of `lines`."""
    height = HEADER + ROW * rows + LINE_LEFT
    figure = Figure(figsize=(PICTURE_WIDTH / 100, height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, PICTURE_WIDTH), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    _write(axes, LINE_LEFT, 36, "rendered line", size=14, weight="bold")
    _write(axes, LINE_LEFT, 62, f"the first {rows} of {len(lines)}; spaces do not count", color="#666666")
    for column, (name, texts) in enumerate(readings.items()):
        left = READING_LEFT + column * READING_WIDTH
        right = sum(read_right(text, reading) for (text, _), reading in zip(lines, texts, strict=True))
        _write(axes, left, 36, name, size=14, weight="bold")
        _write(axes, left, 62, f"{right} of {len(lines)} lines right", color="#666666")
        for row, ((text, _), reading) in enumerate(zip(lines[:rows], texts[:rows], strict=True)):
            _draw_reading(axes, left, HEADER + row * ROW, reading, read_right(text, reading))
    for row, (_, pixels) in enumerate(lines[:rows]):
        _draw_line(axes, HEADER + row * ROW, pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    axes.text(x, y, text, va="center", parse_math=False, **style)


def _draw_line(axes: Axes, top: float, pixels: NDArray[np.float32]) -> None:
    scale = min(40 / HEIGHT, LINE_WIDTH / pixels.shape[3])
    width, height = pixels.shape[3] * scale, HEIGHT * scale
    top += (ROW - height) / 2
    extent = (LINE_LEFT, LINE_LEFT + width, top + height, top)
    axes.imshow(pixels[0, 0], cmap="gray", vmin=-1, vmax=1, aspect="auto", extent=extent, interpolation="antialiased")


def _draw_reading(axes: Axes, left: float, top: float, reading: str, right: bool) -> None:
    mark, cell = COLOURS[right]
    box = (left, top + 7), READING_WIDTH - 14, ROW - 14
    axes.add_patch(FancyBboxPatch(*box, boxstyle="round,pad=0,rounding_size=6", facecolor=cell, edgecolor="none"))
    _write(axes, left + 10, top + ROW / 2, "✓" if right else "✗", size=14, color=mark)
    look: dict[str, Any] = {"style": "normal"} if reading.strip() else {"style": "italic"}
    _write(axes, left + 32, top + ROW / 2, _drawable(reading), size=10.5, family="DejaVu Sans Mono", color=mark, **look)


def _drawable(reading: str) -> str:
    """The reading with a box for each character that the picture's font lacks."""
    known = ft2font.FT2Font(str(FONT_FOLDER / "DejaVuSansMono.ttf")).get_charmap()
    text = "".join(character if ord(character) in known else "□" for character in reading.strip()) or "(nothing)"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
