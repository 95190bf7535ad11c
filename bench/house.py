"""How readable the code is, in numbers: `python -m bench.house [FOLDER]`.

Counts files and lines, sizes of functions, density of tokens, tuple assignments, comments and docstrings of
the product, which is all but bench and tests. They are a smoke detector, no goal: a number is easy to
please, and the reader is not.
"""
import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path

LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
          tokenize.ENCODING, tokenize.COMMENT}


def product_files(root: Path) -> list[Path]:
    files = [*root.glob('*.py')]
    for folder in ('configs', 'evaluation', 'models', 'training', 'utils'):
        files += root.glob(f'{folder}/**/*.py')
    return sorted(files)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            text = node.body[0]
            lines |= set(range(text.lineno, text.end_lineno + 1))
    return lines


def is_packed(node: ast.Assign) -> bool:
    """Whether an assignment binds several names to several values; a swap is none."""
    target, value = node.targets[0], node.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)):
        return False
    return {ast.unparse(part) for part in target.elts} != {ast.unparse(part) for part in value.elts}


def measure(root: Path) -> dict[str, float]:
    """All numbers of the product below a folder."""
    sizes, functions = [], []
    tokens = code_lines = comments = lines = assignments = packed = public = documented = 0
    for path in product_files(root):
        text = path.read_text()
        tree = ast.parse(text)
        in_docstrings = docstring_lines(tree)
        sizes.append(len(text.splitlines()))
        lines += sizes[-1]
        of_code: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments += 1
            elif token.type not in LAYOUT and token.start[0] not in in_docstrings:
                tokens += 1
                of_code |= set(range(token.start[0], token.end[0] + 1))
        code_lines += len(of_code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                assignments += 1
                packed += is_packed(node)
            if isinstance(node, ast.FunctionDef):
                functions.append(node.end_lineno - node.lineno + 1)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith('_'):
                public += 1
                documented += ast.get_docstring(node) is not None
    functions.sort()
    return {
        'files': len(sizes),
        'lines': lines,
        'median file': statistics.median(sizes),
        'largest file': max(sizes),
        'files over 400 lines': sum(size > 400 for size in sizes),
        'function median': statistics.median(functions),
        'function p95': functions[len(functions) * 95 // 100],
        'largest function': functions[-1],
        'tokens per code line': tokens / code_lines,
        'tuple assignments, %': 100 * packed / assignments,
        'comments per 100 code lines': 100 * comments / code_lines,
        'public names with docstring, %': 100 * documented / public,
        'lines of train.py': len((root / 'train.py').read_text().splitlines()),
    }


def main() -> None:
    roots = [Path(name) for name in sys.argv[1:]] or [Path()]
    columns = [measure(root) for root in roots]
    for name in columns[0]:
        print(f'{name:34}' + ''.join(f'{column[name]:>12.4g}' for column in columns))


if __name__ == '__main__':
    main()
