"""Scores that a generator was trained to improve, by the entry `trained_on` of the manifest of its images.

Such a score says how well the training went, and little about the images. The entry lists encoders and
metrics, by the names that `evaluate.py` has for them; who made the weights knows them and adds it.
"""
from typing import Any


def targets_of(manifest: dict[str, Any] | None) -> list[str]:
    """What the generator was trained on; [] where its manifest says nothing about it.

    Raises:
        ValueError: the entry is no list of names.
    """
    manifest = manifest or {}
    # The images that `evaluate.py reject` keeps are those of the generator of the candidates.
    targets = manifest.get('trained_on') or (manifest.get('candidates') or {}).get('trained_on') or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f'expected a list of names as trained_on in the manifest, got {targets!r}: write '
                         '["fid"], or ["inception"] for all scores of an encoder')
    return targets


def marked_scores(targets: list[str], scores: dict[str, Any], network: Any,
                  beyond: dict[str, Any] | None) -> dict[str, list[str]]:
    """The targets that concern a score, by the name of the score; a score that none concerns is absent.

    Args:
        targets: see `targets_of`.
        scores: all of the report.
        network: of --features, which the scores of ADM are made by; None if there are none.
        beyond: what the report says of the other scores; None if there are none.
    """
    made_of = {name: [name, network.name] for name in scores if network is not None}
    for metric, described in (beyond or {}).get('metrics', {}).items():
        for name in described['scores']:
            # FDr^6 has scores of one of its encoders, and such of all.
            own = [encoder for encoder in described['encoders']
                   if name.startswith((f'fd_{encoder}', f'fdr_{encoder}'))]
            made_of[name] = [name, metric, *(own or described['encoders'])]
    marked = {name: [target for target in targets if target in parts] for name, parts in made_of.items()}
    return {name: found for name, found in marked.items() if found}


def mark_of(report: dict[str, Any], *scores: str) -> str:
    """What stands behind these numbers of a report if the generator was trained on them, else ''."""
    targets = dict.fromkeys(target for score in scores for target in report['trained_on'].get(score, ()))
    return f' (trained on {", ".join(targets)})' if targets else ''
