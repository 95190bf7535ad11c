"""`evaluate.py table` and `summary`: of lists of reported scores, of reports, over seeds."""
import json

import pytest

import evaluate
from evaluation.score_table import read_rows, render
from tests.runs import REPO


def beyond(real='a', bank='b', statistics='c'):
    """What scores beyond ADM's were compared with, by the first letter of each digest."""
    references = dict(real=dict(sha256=real * 64), bank=dict(sha256=bank * 64))
    mae = dict(sha256='m' * 64, dtype='float32', training=dict(kind='statistics', sha256=statistics * 64))
    return dict(metrics=dict(memory=dict(references=references)), encoders=dict(mae=mae))


def report(seed=0, **changes):
    """A report of `evaluate.py REF SAMPLE --json=FILE` as far as tables need it."""
    content = dict(
        command='score',
        scores=dict(fid=2 + seed, fid_own=None, prdc5_inception_10k=dict(density=0.9, coverage=0.8)),
        sample=dict(path='samples/var_d16.npz', sha256=f'{seed}' * 64, count=50_000),
        reference=dict(path='ref.npz', sha256='r' * 64),
        manifest=dict(ckpt='weights/var_d16.pth', settings=dict(cfg=1.5, top_k=900, seed=seed)),
        network=dict(name='inception', digest='d' * 64),
        settings=dict(features='inception', dtype='float32', pr_mode='adm', fd_method='eigh'),
        beyond=beyond(),
    )
    return content | changes


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_page_of_models_is_the_rendering_of_its_scores():
    table = render(read_rows(REPO / 'docs' / 'scores.json'))
    page = (REPO / 'docs' / 'models.md').read_text()
    assert page.endswith(f'\n{table}\n'), 'run: python evaluate.py table docs/scores.json'
    assert page.count('| measured here |') == 1
    rows = read_rows(REPO / 'docs' / 'scores.json')
    values = {row['reported'] for row in rows if (row['model'], row['metric']) == ('FlowAR-H', 'fid')}
    assert values == {'1.65', '1.68', '1.67'}  # of the authors, and of two others


def test_table_of_a_report_and_of_a_list(evaluate_here, tmp_path):
    path = write(tmp_path / 'report.json', report())
    row = dict(model='VAR | d16', metric='fid', reported='3.50', by='authors', settings='cfg 1.5')
    listed = write(tmp_path / 'list.json', dict(scores=[row, row | dict(report='report.json')]))
    printed = evaluate_here('table', listed, path, f'--output={tmp_path / "table.md"}')
    lines = printed.strip().splitlines()
    assert lines[2] == r'| VAR \| d16 | fid | 3.50 | authors | - | cfg 1.5 | - |'
    assert lines[3] == r'| VAR \| d16 | fid | 3.50 | authors | 2 | cfg 1.5 | 000000000000 |'
    assert lines[4] == '| var_d16.pth | fid | - | - | 2 | cfg 1.5, top_k 900, seed 0 | 000000000000 |'
    assert lines[5].startswith('| var_d16.pth | prdc5_inception_10k density | - | - | 0.9 |')
    assert len(lines) == 7
    assert (tmp_path / 'table.md').read_text() == printed


def test_summary_over_seeds(evaluate_here, tmp_path):
    paths = [write(tmp_path / f'{seed}.json', report(seed)) for seed in range(3)]
    printed = evaluate_here('summary', *paths)
    assert printed.splitlines()[:2] == ['3 samples of 50000 images', 'FID: 3 +- 1 (2, 3, 4)']
    assert 'FID: 2 (1 seed)' in evaluate_here('summary', paths[0])


@pytest.mark.parametrize(('change', 'message'), [
    (dict(reference=dict(path='x', sha256='s' * 64)), f'the reference ({"r" * 64} against {"s" * 64})'),
    (dict(sample=dict(path='x', sha256='1' * 64, count=5000)), 'the number of images (50000 against 5000)'),
    (dict(beyond=beyond(real='x')), f'the real images ({"a" * 64} against {"x" * 64})'),
    (dict(beyond=beyond(bank='x')), f'the bank of training images ({"b" * 64} against {"x" * 64})'),
    (dict(beyond=beyond(statistics='x')), f'the statistics of mae ({"c" * 64} against {"x" * 64})'),
    (dict(beyond=beyond(real='x', bank='y')), f'the real images and the bank of training images ({"a" * 64}'),
    (dict(beyond=beyond() | dict(encoders={})), 'the encoder mae and the statistics of mae'),
    (dict(settings=report()['settings'] | dict(pr_mode='fp32')), '--pr_mode (adm against fp32)'),
    (dict(scores=dict(fid=3)), 'the scores'),
])
def test_summary_names_what_differs(evaluate_here, tmp_path, change, message):
    paths = [write(tmp_path / f'{seed}.json', report(seed)) for seed in range(2)]
    paths.append(write(tmp_path / 'other.json', report(2, **change)))
    with pytest.raises(SystemExit) as stop:
        evaluate_here('summary', *paths)
    assert f'{paths[0]} and {paths[2]} differ in {message}' in str(stop.value)
    assert stop.value.code == 2


@pytest.mark.parametrize(('change', 'message'), [
    (dict(sample=report()['sample']), 'two reports are of the same images'),
    (dict(command='tokenizer'), 'expected a report of evaluate.py REF SAMPLE'),
])
def test_summary_mixes_nothing(evaluate_here, tmp_path, change, message):
    paths = [write(tmp_path / 'a.json', report()), write(tmp_path / 'b.json', report(1, **change))]
    with pytest.raises(SystemExit, match=message) as stop:
        evaluate_here('summary', *paths)
    assert stop.value.code == 2


@pytest.mark.parametrize(('content', 'message'), [
    (dict(scores=[dict(model='x', metric='fid', reported=3.5, by='x', settings='')]), 'in score 0 of'),
    (dict(other=1), 'found neither'),
    (dict(scores=[dict(model='x', metric='fid', reported='', by='', settings='', report=7)]),
     'expected the path of a report in score 0'),
    (dict(scores=[dict(model='x', metric='kid', reported='', by='', settings='', report='report.json')]),
     'expected the score kid in'),
])
def test_lists_that_are_none(evaluate_here, tmp_path, content, message):
    write(tmp_path / 'report.json', report())
    with pytest.raises(SystemExit, match=message):
        evaluate_here('table', write(tmp_path / 'list.json', content))


@pytest.mark.parametrize(('change', 'part'), [
    (dict(scores=[1]), 'scores'), (dict(sample=dict(path='x')), 'path and sha256 of the sample'),
    (dict(reference=None), 'reference'), (dict(settings=[]), 'settings'), (dict(manifest=[1]), 'manifest')])
def test_damaged_reports_are_named(evaluate_here, tmp_path, change, part):
    path = write(tmp_path / 'a.json', report(**change))
    for command in ('table', 'summary'):
        with pytest.raises(SystemExit, match=f'a.json, its {part} is missing or something else') as stop:
            evaluate_here(command, path)
        assert stop.value.code == 2


def test_files_that_are_not_there(evaluate_here, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate_here('table')
    assert 'expected files of scores' in capsys.readouterr().err
    settings = evaluate.parse_evaluation(['table', 'a.json', str(tmp_path / 'b.json')], '')
    assert settings.files == f'a.json,{tmp_path / "b.json"}'
    with pytest.raises(ValueError, match=r'found none at a\.json'):
        settings.require_files()
