"""Scores: `python evaluate.py REF SAMPLE`, and commands around them. Runs under torchrun, too.

    evaluate.py REF SAMPLE             Inception Score, FID, sFID, precision and recall of images
    evaluate.py stats INPUT OUT.npz    statistics of images, to be used as a reference
    evaluate.py pack FOLDER OUT.npz    PNG files as one npz, shuffled
    evaluate.py classify-eval SAMPLE   how often a classifier sees the requested class
    evaluate.py reject IN OUT.npz      keep the images of each class that a classifier is surest of
    evaluate.py encoders               encoders of further scores, and which of their files are here
    evaluate.py scaling FOLDER         scaling laws of trainings of several depths
    evaluate.py table FILE...          table of reported and measured scores
    evaluate.py summary FILE...        mean and standard deviation of scores over seeds
    evaluate.py tokenizer --ckpt=FILE  PSNR, SSIM, LPIPS, rFID and code usage (also: reconstruct-eval)

Exit codes: 0 done, 2 wrong usage or input, 3 weights of a feature network or classifier are missing; torchrun
itself ends with 1 then.
"""
import sys
from typing import Any

from evaluation.settings import (
    ClassifySettings,
    EncodersSettings,
    PackSettings,
    RejectSettings,
    ScalingSettings,
    ScoreSettings,
    StatsSettings,
    SummarySettings,
    TableSettings,
    TokenizerSettings,
    parse_evaluation,
)
from utils.console import announce, one_line_errors

if __name__ == '__main__':
    # Wrong flags and missing files are answered now: the imports below take seconds.
    with one_line_errors('evaluate.py', exit_code=2):
        command = parse_evaluation(sys.argv[1:], __doc__)
        command.require_files()
    announce('evaluate.py', 'loading torch and the images')

import dist
from evaluation.classify import evaluate_classify, evaluate_reject
from evaluation.encoder_list import list_encoders
from evaluation.pack import evaluate_pack, evaluate_stats
from evaluation.scaling_laws import evaluate_scaling
from evaluation.score import evaluate_images
from evaluation.score_table import score_table, summarize
from evaluation.tokenizer import evaluate_tokenizer
from utils.log import setup_logging

# settings of a command -> what runs it, and returns the text that the master prints, or None
FUNCTIONS = {
    ScoreSettings: evaluate_images,
    StatsSettings: evaluate_stats,
    PackSettings: evaluate_pack,
    ClassifySettings: evaluate_classify,
    RejectSettings: evaluate_reject,
    EncodersSettings: list_encoders,
    ScalingSettings: evaluate_scaling,
    TableSettings: score_table,
    SummarySettings: summarize,
    TokenizerSettings: evaluate_tokenizer,
}


def main(settings: Any = None) -> None:
    """Run a command, given by its settings; None takes that of the command line."""
    if settings is None:
        settings = parse_evaluation(sys.argv[1:], __doc__)

    # NCCL cannot exchange tensors on the CPU.
    runs_on_cpu = getattr(settings, 'device', '') == 'cpu'
    dist.initialize(backend='gloo' if runs_on_cpu else None)
    setup_logging(None, dist.is_master())
    run = FUNCTIONS[type(settings)]
    text = run(settings)
    if text:
        print(text)  # noqa: T201
    dist.finalize()


if __name__ == '__main__':
    with one_line_errors('evaluate.py', exit_code=2):
        main(command)
