"""What runs leave behind does not change by accident: logs, curves, checkpoints, exports, samples, presets.

`python -m tests.pinned` stores them anew where a change is meant.
"""
import json

import pytest

from tests.pinned import FOLDER, RUNS, machine, outline_of, settings_of_presets


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return tmp_path_factory.mktemp('pinned')


def stored(name):
    return json.loads((FOLDER / f'{name}.json').read_text())


@pytest.mark.parametrize('model', RUNS)
def test_a_run_leaves_what_it_always_left(root, model):
    """Names, keys and tags on any machine; every number and every byte on one like that of the stored run."""
    expected = stored(model)
    found = json.loads(json.dumps(outline_of(model, root)))
    assert found['shared'] == expected['shared']
    if machine() == expected['machine']:
        assert found['exact'] == expected['exact']
    assert found['exact']['loss'] == pytest.approx(expected['exact']['loss'], rel=0.05)


def test_presets_mean_what_they_always_meant():
    found, expected = settings_of_presets(), stored('presets')
    assert found.keys() == expected.keys()
    for name, settings in found.items():
        assert settings == expected[name], name
