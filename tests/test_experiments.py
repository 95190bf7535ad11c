"""The table of an experiment: what it chooses, and what its errors are of."""
import pytest

from bench.post_training import NUM_CHOOSING, Candidate, Judge, Side, compare, summary


class JudgeOfStoredScores(Judge):
    """Knows the scores of every candidate, and what was asked for."""

    def __init__(self, distances):
        self.distances = distances
        self.asked = []

    def score(self, candidate, num_images, noise):
        self.asked.append((candidate, num_images, noise))
        return dict(distance=self.distances[candidate][num_images], accuracy=0.9)


def test_settings_are_chosen_on_other_images_than_those_of_the_score(tmp_path):
    weak, strong = (Candidate(tmp_path / 'run' / 'ar-ckpt-last.pth', (('cfg', cfg),)) for cfg in (0., 1.5))
    alone = Candidate(tmp_path / 'base' / 'ar-ckpt-last.pth')
    judge = JudgeOfStoredScores({weak: {NUM_CHOOSING: 0.5, 5000: 0.7}, strong: {NUM_CHOOSING: 0.6, 5000: 0.4},
                                 alone: {5000: 0.8}})
    sides = dict(base=Side([alone]), tuned=Side([weak, strong], 'base'))
    rows = compare(judge, sides, seed=3, num_images=5000)
    # The better one of the small sets is reported, also where the other would have won.
    assert rows['tuned'] == dict(compared_with='base', run='run', settings={'cfg': 0.}, tried=2, distance=0.7,
                                 accuracy=0.9)
    assert rows['base']['distance'] == 0.8
    noise_of = {num_images: {noise for _, count, noise in judge.asked if count == num_images}
                for num_images in (NUM_CHOOSING, 5000)}
    assert not noise_of[NUM_CHOOSING] & noise_of[5000]


def test_errors_are_those_of_paired_differences():
    rows = {seed: dict(continued=dict(compared_with='', distance=1. + seed, accuracy=0.5),
                       neon=dict(compared_with='continued', distance=0.5 + seed + gain, accuracy=0.5))
            for seed, gain in enumerate((-0.1, 0., 0.1))}
    table = summary(rows)
    assert table['neon']['compared_with'] == 'continued'
    assert table['neon']['distance_difference'] == pytest.approx(-0.5)
    # The seeds differ by 1, their differences by 0.1: 0.1 over the root of 3.
    assert table['neon']['distance_difference_error'] == pytest.approx(0.1 / 3 ** 0.5)
    assert table['neon']['accuracy_difference_error'] == 0
    assert table['continued'] == dict(compared_with='', distance=pytest.approx(2), accuracy=0.5)
