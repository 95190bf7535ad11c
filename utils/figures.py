"""Figures of matplotlib, which is optional: made without a screen, written whole or not at all."""
from pathlib import Path
from typing import Any

from utils.files import atomic_path


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure that is drawn without a screen; None where matplotlib is not installed.

    Args:
        width, height: in inches of 120 pixels.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: str | Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')
