"""Scores over settings: a table in CSV that grows row by row, and its plot."""
import csv
import logging
from pathlib import Path
from typing import Any

from utils.checkpoint import atomic_path
from utils.figures import new_figure, save_figure

logger = logging.getLogger(__name__)
PLOTTED = ('fid', 'sfid', 'is', 'precision', 'recall')


class ScoreTable:
    """`<output>.csv`, a row per combination: its settings, then its scores.

    Args:
        output: the folder of the sweep, beside which the table lies.
        settings: names of the settings that vary.
    Raises:
        ValueError: the file there is no table, or that of another sweep.
    """

    def __init__(self, output: Path, settings: list[str]):
        self.csv = output.with_name(f'{output.name}.csv')
        self.png = output.with_name(f'{output.name}.png')
        self.settings = settings
        self.rows = []
        if self.csv.exists():
            try:
                with self.csv.open(newline='') as file:
                    rows = list(csv.DictReader(file))
            except ValueError as error:
                raise ValueError(f'expected the table of a sweep in {self.csv}, cannot read it ({error}): '
                                 'pass another --output, or move it away') from None
            # A row with an empty cell was cut off, and its combination is sampled again.
            self.rows = [row for row in rows if all(row.values())]
            if self.rows and not set(settings) <= self.rows[0].keys():
                raise ValueError(f'{self.csv} is of another sweep, with {", ".join(self.rows[0])}: '
                                 'pass another --output, or move it away')

    def has(self, combination: dict[str, Any]) -> bool:
        """Whether there is a row with these settings."""
        wanted = {name: str(value) for name, value in combination.items()}
        return any(wanted.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, settings and scores by name, and rewrite the file."""
        self.rows.append({name: str(value) for name, value in row.items()})
        columns = dict.fromkeys(name for row in self.rows for name in row)
        with atomic_path(self.csv) as temporary, temporary.open('w', newline='') as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def plot(self) -> None:
        """Draw `<output>.png`: a panel per score over the first setting, a line per value of the rest."""
        first, *others = self.settings
        scores = [name for name in PLOTTED if all(row.get(name) for row in self.rows)]
        if not scores:
            return
        figure = new_figure(4 * len(scores), 3.4)
        if figure is None:
            logger.warning('%s has all scores; the plot needs pip install matplotlib', self.csv)
            return

        lines: dict[str, list[dict[str, str]]] = {}
        for row in self.rows:
            label = ', '.join(f'{name} {row[name]}' for name in others)
            lines.setdefault(label, []).append(row)
        for number, score in enumerate(scores, start=1):
            axis = figure.add_subplot(1, len(scores), number)
            for label, rows in lines.items():
                x = [axis_value(row[first]) for row in rows]
                y = [float(row[score]) for row in rows]
                axis.plot(x, y, 'o-', label=label or None)
            axis.set(title=score, xlabel=first)
            axis.grid(alpha=0.3)
        if others:
            axis.legend(fontsize='x-small')
        save_figure(self.png, figure)


def axis_value(text: str) -> float | str:
    """The number in a text, or the text itself if it is no number."""
    try:
        return float(text)
    except ValueError:
        return text
