"""FDr^6: Frechet distances of six encoders, each divided by that of ImageNet's own validation images.

FDr_e = FD_e(sample, training images) / FD_e(validation images, training images), and FDr^6 is the mean over
the six encoders, so that the validation images have 1. Source: arXiv 2604.28190, Sec. 3.4 and App. B.
"""
from collections.abc import Mapping

FDR_ENCODERS = ('inception', 'convnext', 'dinov2', 'mae', 'siglip', 'clip')

# FD(validation, training) of ImageNet at 256 pixels, by the published settings of every encoder. The paper
# divides by numbers with more digits than its code ships. MAE's 0.04 alone raises FDr^6 by about one percent,
# so that both are reported: `paper` compares with the tables of the paper, `released` with what the released
# code prints.
DIVISORS = {
    'paper': dict(inception=1.67744, convnext=56.8678, dinov2=14.18543, mae=0.04284, siglip=0.60489,
                  clip=5.60465),
    'released': dict(inception=1.68, convnext=56.87, dinov2=14.19, mae=0.04, siglip=0.6, clip=5.6),
}


def ratios(distances: Mapping[str, float], divisors: Mapping[str, float]) -> dict[str, float]:
    """FDr of every encoder.

    Args:
        distances: FD(sample, training) by encoder.
        divisors: FD(validation, training) by encoder, of the same encoders, references and precision.
    Raises:
        ValueError: a divisor is missing, or not above zero.
    """
    found = {}
    for encoder, distance in distances.items():
        divisor = divisors.get(encoder, 0.)
        if not divisor > 0:
            raise ValueError(f'expected a distance of the validation images above zero for {encoder}, got '
                             f'{divisor:g}: take other images for it than for the reference')
        found[encoder] = distance / divisor
    return found


def fdr6(distances: Mapping[str, float], divisors: Mapping[str, float]) -> float:
    """The mean ratio of the six encoders; fewer encoders make another number, which has no name.

    Raises:
        ValueError: a distance is missing; or see `ratios`.
    """
    missing = [encoder for encoder in FDR_ENCODERS if encoder not in distances]
    if missing:
        raise ValueError(f'FDr^6 is a mean over {", ".join(FDR_ENCODERS)}, the distance of '
                         f'{", ".join(missing)} is missing: compute it, too')
    six = {encoder: distances[encoder] for encoder in FDR_ENCODERS}
    return sum(ratios(six, divisors).values()) / len(FDR_ENCODERS)
