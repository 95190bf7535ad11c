"""Tables of scores: `evaluate.py table` of reported and measured ones, `evaluate.py summary` over seeds.

Both read JSON files. A list of reported scores has the rows {"model", "metric", "reported", "by", "settings"}
under "scores", all of them texts, as the published tables print them; a row may add "report", the path of a
report of `evaluate.py REF SAMPLE --json=FILE` beside the list, from which the measured value is taken. Such
reports may also be given by themselves.
"""
from pathlib import Path
from typing import Any

import numpy as np

import dist
from evaluation.settings import SCORES, SummarySettings, TableSettings
from utils.files import read_json, write_text
from utils.markdown import cell_of

COLUMNS = ('model', 'metric', 'reported', 'by', 'measured here', 'settings', 'manifest')
LISTED = ('model', 'metric', 'reported', 'by', 'settings')
SHOWN = ('cfg', 'top_k', 'top_p', 'num_step', 'guidance', 'temperature', 'seed')  # settings of a manifest
EMPTY = '-'
SETS = dict(real='the real images', bank='the bank of training images')  # that scores are compared with

Row = dict[str, str]


# ---------------------------------------------------------------------------------------------- table
def score_table(settings: TableSettings) -> str | None:
    """`evaluate.py table`: the table as Markdown on the master, None on the other ranks.

    Raises:
        ValueError: a file cannot be read, or is neither a list of scores nor a report.
    """
    if not dist.is_master():
        return None
    rows = []
    for path in settings.files.split(','):
        rows += read_rows(Path(path))
    text = render(rows)
    if settings.output:
        write_text(settings.output, f'{text}\n')
    return text


def render(rows: list[Row]) -> str:
    """Rows as a table in Markdown; what a row lacks is a dash."""
    lines = [f'| {" | ".join(COLUMNS)} |', '|' + '---|' * len(COLUMNS)]
    for row in rows:
        cells = [cell_of(row.get(column) or EMPTY) for column in COLUMNS]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def read_rows(path: Path) -> list[Row]:
    """The rows of a list of scores, or of a report.

    Raises:
        ValueError: the file cannot be read, or is something else.
    """
    content = _read(path)
    if content.get('command') == 'score':
        check_report(content, path)
        return _rows_of_report(content)
    scores = content.get('scores')
    if not isinstance(scores, list):
        raise ValueError(f'expected a report of evaluate.py or a list of "scores" in {path}, found neither: '
                         'pass another file')
    rows = []
    for number, row in enumerate(scores):
        if not (isinstance(row, dict) and all(isinstance(row.get(name), str) for name in LISTED)):
            raise ValueError(f'expected the texts {", ".join(LISTED)} in score {number} of {path}, got '
                             f'{row}: complete it')
        if not isinstance(row.get('report', ''), str):
            raise ValueError(f'expected the path of a report in score {number} of {path}, got '
                             f'{row["report"]!r}: correct it')
        rows.append(_with_measured(row, path.parent))
    return rows


def check_report(report: dict[str, Any], path: str | Path) -> None:
    """Make sure that a report of `evaluate.py REF SAMPLE` has the parts that are read here.

    Raises:
        ValueError: one is missing, or something else than `evaluate.py` writes.
    """
    odd = [name for name in ('scores', 'sample', 'reference', 'settings')
           if not isinstance(report.get(name), dict)]
    odd += [name for name in ('manifest', 'beyond') if not isinstance(report.get(name) or {}, dict)]
    if not odd:
        sample = report['sample']
        texts = {
            'path and sha256 of the sample': (sample.get('path'), sample.get('sha256')),
            'sha256 of the reference': (report['reference'].get('sha256'),),
        }
        odd = [name for name, values in texts.items()
               if not all(isinstance(value, str) for value in values)]
    if odd:
        raise ValueError(f'expected a report of evaluate.py REF SAMPLE --json=FILE in {path}, its {odd[0]} '
                         'is missing or something else: score the images again')


def _with_measured(row: Row, folder: Path) -> Row:
    """A row of a list, with what its report says."""
    if not row.get('report'):
        return row
    path = folder / row['report']
    report = _read(path)
    check_report(report, path)
    found = flat(report['scores'])
    if row['metric'] not in found:
        raise ValueError(f'expected the score {row["metric"]} in {path}, it has {", ".join(found)}: correct '
                         'the row')
    return row | {'measured here': f'{found[row["metric"]]:.4g}', 'manifest': _manifest_of(report)}


def _rows_of_report(report: dict[str, Any]) -> list[Row]:
    """A row per score of a report."""
    manifest = report.get('manifest') or {}
    settings = manifest.get('settings') or {}
    shown = [f'{name} {settings[name]}' for name in SHOWN if name in settings]
    model = Path(manifest.get('ckpt') or report['sample']['path']).name
    rows = []
    for metric, value in flat(report['scores']).items():
        rows.append({
            'model': model,
            'metric': metric,
            'measured here': f'{value:.4g}',
            'settings': ', '.join(shown),
            'manifest': _manifest_of(report),
        })
    return rows


def _manifest_of(report: dict[str, Any]) -> str:
    """What tells the images of a report: the beginning of their SHA-256, which their manifest names, too."""
    return str(report.get('sample', {}).get('sha256', ''))[:12]


def flat(scores: dict[str, Any]) -> dict[str, float]:
    """Numbers by name; those of a group have its name in front, and lists are left out."""
    found = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            for part, number in flat(value).items():
                found[f'{name} {part}'] = number
        elif isinstance(value, int | float):
            found[name] = value
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f'expected a JSON file of scores at {path}, cannot read it ({error}): check the '
                         'path') from None


# ---------------------------------------------------------------------------------------------- summary
def summarize(settings: SummarySettings) -> str | None:
    """`evaluate.py summary`: mean, sample standard deviation and every value of reports over seeds.

    Raises:
        ValueError: a file is no report, or the reports are not of one definition or of the same images.
    """
    if not dist.is_master():
        return None
    paths = settings.files.split(',')
    reports = [_read(Path(path)) for path in paths]
    for path, report in zip(paths, reports, strict=True):
        if report.get('command') != 'score':
            raise ValueError(f'expected a report of evaluate.py REF SAMPLE --json=FILE in {path}, got '
                             'something else: pass another file')
        check_report(report, path)
    first = _definition(reports[0])
    for path, report in zip(paths[1:], reports[1:], strict=True):
        other = _definition(report)
        differing = [what for what in first | other if first.get(what) != other.get(what)]
        if differing:
            ours, theirs = dist.what_differs(first.get(differing[0]), other.get(differing[0]))
            raise ValueError(f'{paths[0]} and {path} differ in {" and ".join(differing)} ({ours} against '
                             f'{theirs}): summarize reports that differ in the seed of the sample alone')
    digests = [report['sample']['sha256'] for report in reports]
    if len(set(digests)) < len(digests):
        raise ValueError('two reports are of the same images, which have one seed: pass reports of other '
                         'seeds')

    lines = [f'{len(reports)} samples of {first["the number of images"]} images']
    values = [flat(report['scores']) for report in reports]
    for name in values[0]:
        numbers = [value[name] for value in values]
        listed = ', '.join(f'{number:.6g}' for number in numbers)
        if len(numbers) == 1:
            lines.append(f'{SCORES.get(name, name)}: {listed} (1 seed)')
            continue
        spread = float(np.std(numbers, ddof=1))
        lines.append(f'{SCORES.get(name, name)}: {np.mean(numbers):.6g} +- {spread:.3g} ({listed})')
    return '\n'.join(lines)


def _definition(report: dict[str, Any]) -> dict[str, Any]:
    """All that must be the same for scores to be averaged, by what a message calls it."""
    definition = {
        'the scores': list(flat(report['scores'])),
        'the number of images': report['sample'].get('count'),
        'the reference': report['reference']['sha256'],
        'the network': report['network'],
    }
    for name in ('features', 'dtype', 'pr_mode', 'fd_method', 'split_size'):
        definition[f'--{name}'] = report['settings'].get(name)

    # Scores beyond ADM's have encoders, statistics and images of their own.
    beyond = report.get('beyond', {})
    for name, encoder in beyond.get('encoders', {}).items():
        definition[f'the encoder {name}'] = [encoder['sha256'], encoder['dtype']]
        if 'training' in encoder:
            definition[f'the statistics of {name}'] = encoder['training'].get('sha256')
    for metric in beyond.get('metrics', {}).values():
        for of, images in metric['references'].items():
            definition[SETS[of]] = images['sha256']
    return definition
