"""Write a figure of matplotlib as a picture that appears whole or not at all."""

import io
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from gpt2_edge.seal import write_file

_DOTS_PER_INCH: Final = 150


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the path ends in, such as .png or .svg.

    Raises:
        OSError: It cannot be written; what was there before still is.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=_DOTS_PER_INCH, format=path.suffix.lower().removeprefix("."))
    write_file(path, [picture.getvalue()])
