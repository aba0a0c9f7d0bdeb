"""What all results have in common: text, JSON, a data frame, a page, all made of their records."""

from __future__ import annotations

import abc
import io
import json
from os import PathLike
from typing import TYPE_CHECKING, Generic

from biascorr.arguments import check_flags, check_path
from biascorr.graph.network import is_traced
from biascorr.report.lines import two_lines
from biascorr.report.records import Record, rows
from biascorr.typing import Model_co

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from biascorr.graph.network import BiasNetwork

_WIDTH = 80
"""Columns of a summary."""


class Reported(abc.ABC):
    """A result that tells what it is by its record."""

    @abc.abstractmethod
    def to_dict(self) -> Record:
        """The record of the result: dicts, lists, text, numbers, bool and None. Numbers that are not finite are None."""

    def to_json(self, indent: int | None = 2) -> str:
        """The record as JSON, by the letter of its standard: no NaN, ASCII alone.

        Parameters
        ----------
        indent : int or None
            Spaces of a level; None: all in one line.
        """
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __repr__(self) -> str:
        return "\n".join(two_lines(self.to_dict()))

    def summary(self) -> str:
        """What the command line prints of the result, as plain text of 80 columns.

        Raises ImportError where rich is not installed (``pip install "biascorr[cli]"``).
        """
        try:
            from rich.console import Console

            from biascorr.report.terminal import render
        except ImportError as error:
            raise ImportError(f'a summary needs {error.name}: pip install "biascorr[cli]"') from error
        text = io.StringIO()
        render(self.to_dict(), Console(file=text, width=_WIDTH, color_system=None, force_terminal=False, _environ={}))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def to_dataframe(self) -> pandas.DataFrame:
        """The layers, or models, of the result as a pandas.DataFrame, a row each.

        Raises ImportError where pandas is not installed (``pip install pandas``).
        """
        from biascorr.report.frames import frame_from_rows

        return frame_from_rows(rows(self.to_dict()))

    def save_report(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Writes a page about the result, an .html file that needs no other, whole or not at all.

        Raises
        ------
        FileExistsError
            The file exists and `force` is not set.
        ImportError
            jinja2 is not installed (``pip install "biascorr[report]"``).
        OSError
            It cannot be written.
        TypeError
            The path is none, or `force` is neither True nor False.
        """
        check_path("path", path)
        check_flags(force=force)
        from biascorr.report.html import save_page

        save_page(self.to_dict(), path, force=force)

    def _repr_html_(self) -> str:
        from biascorr.report.notebook import excerpt

        return excerpt(self.to_dict())


class Saved(Reported, Generic[Model_co]):
    """A result with a model that can be saved."""

    network: BiasNetwork

    @property
    def model(self) -> Model_co:
        """The model that was made, of the framework's own type: onnx.ModelProto, bytes of a .tflite file, keras.Model."""
        return self.network.model  # type: ignore[no-any-return]

    @abc.abstractmethod
    def _provenance(self) -> str | None:
        """What a file says of how it was made; None where nothing was done to the model."""

    def save(self, path: str | PathLike[str], *, force: bool = False, provenance: bool = True) -> None:
        """Writes the model, whole or not at all.

        Parameters
        ----------
        path : path
            Where; the name ends as those of such models do.
        force : bool
            Whether an existing file is overwritten.
        provenance : bool
            Whether the file says how it was made: the version of this package, the method and a digest of the data, as JSON, in
            the metadata of an ONNX model, with the key "biascorr"; in "biascorr.json" in the archive behind a TFLite model; in
            "biascorr_provenance.json" in a .keras file. A model to which nothing was done is saved as it was, and what says
            that another correction made it is replaced.

        Raises
        ------
        FileExistsError
            The file exists and `force` is not set.
        OSError
            It cannot be written.
        TypeError
            The path is none, or `force` or `provenance` is neither True nor False.
        ValueError
            The name ends as those of other models do.
        """
        check_path("path", path)
        check_flags(force=force, provenance=provenance)
        if is_traced(self.network):
            self.network.save(path, force=force, provenance=self._provenance() if provenance else None)
        else:
            self.network.save(path, force=force)


class Plotted(Reported):
    """A result that can be drawn, too."""

    def plot(self) -> Figure:
        """A figure: of a correction, the SQNR of each layer before and after it and the scores of all candidates; of an
        equalization, the ranges of the channels of each scaled layer before and after it.

        Returns
        -------
        matplotlib.figure.Figure
            Its method `savefig` writes it; a notebook shows it.

        Raises
        ------
        ImportError
            matplotlib is not installed (``pip install "biascorr[report]"``).
        """
        from biascorr.report.plots import figure

        return figure(self.to_dict())
