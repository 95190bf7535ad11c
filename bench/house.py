"""How readable the code is, in numbers: `python -m bench.house [FOLDER ...]`.

Counts files and lines, sizes of functions, density of tokens, tuple assignments, comments, docstrings and
return annotations of the product, which is all but bench and tests; one column for each checkout given. The
numbers are a smoke detector and no goal: a number is easy to please, and the reader is not.
"""
import ast
import io
import statistics
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

FOLDERS = ('configs', 'evaluation', 'models', 'training', 'utils')
LAYOUT = {
    tokenize.NEWLINE,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
    tokenize.COMMENT,
}
LONG_FILE = 400  # lines


@dataclass
class Counts:
    """What is added up over all files."""
    file_sizes: list[int] = field(default_factory=list)  # in lines
    function_sizes: list[int] = field(default_factory=list)  # in lines, with decorators left out
    tokens: int = 0          # outside docstrings and comments
    code_lines: int = 0      # lines with such a token
    comments: int = 0
    assignments: int = 0
    packed: int = 0          # assignments of several values to several names
    public_names: int = 0    # functions, methods and classes
    documented: int = 0      # public names with a docstring
    public_functions: int = 0
    annotated: int = 0       # public functions with a return annotation


def product_files(root: Path) -> list[Path]:
    """All modules below a folder that are neither tests nor bench; `FOLDERS` may be missing."""
    files = list(root.glob('*.py'))
    for folder in FOLDERS:
        files += root.glob(f'{folder}/**/*.py')
    return sorted(files)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            docstring = node.body[0]
            lines |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def is_packed(node: ast.Assign) -> bool:
    """Whether an assignment binds several names to several values; a swap does not count."""
    target = node.targets[0]
    value = node.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)):
        return False
    names = {ast.unparse(part) for part in target.elts}
    values = {ast.unparse(part) for part in value.elts}
    return names != values


def num_lines(node: ast.FunctionDef) -> int:
    """Lines of a function, with its signature and its docstring."""
    return node.end_lineno - node.lineno + 1


def count_tokens(text: str, in_docstrings: set[int], counts: Counts) -> None:
    """Add the tokens, comments and code lines of a file."""
    of_code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            counts.comments += 1
        elif token.type not in LAYOUT and token.start[0] not in in_docstrings:
            counts.tokens += 1
            of_code |= set(range(token.start[0], token.end[0] + 1))
    counts.code_lines += len(of_code)


def count_nodes(tree: ast.Module, counts: Counts) -> None:
    """Add the assignments, functions and classes of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            counts.assignments += 1
            if is_packed(node):
                counts.packed += 1
        if isinstance(node, ast.FunctionDef):
            counts.function_sizes.append(num_lines(node))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith('_'):
            counts.public_names += 1
            if ast.get_docstring(node):
                counts.documented += 1
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
            counts.public_functions += 1
            if node.returns is not None:
                counts.annotated += 1


def function_size(path: Path, name: str) -> int:
    """Lines of a function of a module; 0 where there is no such function."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return num_lines(node)
    return 0


def measure(root: Path) -> dict[str, float]:
    """All numbers of the product below a folder, by what they are called in the table."""
    counts = Counts()
    for path in product_files(root):
        text = path.read_text()
        tree = ast.parse(text)
        counts.file_sizes.append(len(text.splitlines()))
        count_tokens(text, docstring_lines(tree), counts)
        count_nodes(tree, counts)

    functions = sorted(counts.function_sizes)
    train = root / 'train.py'
    return {
        'files': len(counts.file_sizes),
        'lines': sum(counts.file_sizes),
        'median file': statistics.median(counts.file_sizes),
        'largest file': max(counts.file_sizes),
        f'files over {LONG_FILE} lines': sum(size > LONG_FILE for size in counts.file_sizes),
        'function median': statistics.median(functions),
        'function p95': functions[len(functions) * 95 // 100],
        'largest function': functions[-1],
        'tokens per code line': counts.tokens / counts.code_lines,
        'tuple assignments, %': 100 * counts.packed / counts.assignments,
        'comments per 100 code lines': 100 * counts.comments / counts.code_lines,
        'public names with docstring, %': 100 * counts.documented / counts.public_names,
        'public functions with return type, %': 100 * counts.annotated / counts.public_functions,
        'lines of train.py': len(train.read_text().splitlines()),
        'lines of its function `train`': function_size(train, 'train'),
    }


def as_text(value: float) -> str:
    """Counts as they are, shares and means with one digit after the point."""
    return f'{value:.1f}' if isinstance(value, float) else str(value)


def main() -> None:
    """Print a table with one column for each folder of the command line, or for this one."""
    roots = [Path(name) for name in sys.argv[1:]] or [Path()]
    columns = [measure(root) for root in roots]
    for name in columns[0]:
        row = ''.join(f'{as_text(column[name]):>12}' for column in columns)
        print(f'{name:38}{row}')


if __name__ == '__main__':
    main()
