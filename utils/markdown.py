"""Tables in Markdown, as model cards, TensorBoard and the web page show them."""
import json
from typing import Any


def table_of(rows: dict[str, Any]) -> str:
    """A table of names and values."""
    lines = [f'| {name} | {cell_of(value)} |' for name, value in rows.items()]
    return '\n'.join(['| name | value |', '|---|---|', *lines])


def cell_of(value: Any) -> str:
    """A value as one line that ends no cell; what is no text is written as JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    return ' '.join(text.replace('|', '\\|').split())
