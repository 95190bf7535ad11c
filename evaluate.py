"""Scores: `python evaluate.py REF SAMPLE`, and commands around them. Runs under torchrun, too.

    evaluate.py REF SAMPLE             Inception Score, FID, sFID, precision and recall of images
    evaluate.py stats INPUT OUT.npz    statistics of images, to be used as a reference
    evaluate.py pack FOLDER OUT.npz    PNG files as one npz, shuffled
    evaluate.py classify-eval SAMPLE   how often a classifier sees the requested class
    evaluate.py reject IN OUT.npz      keep the images of each class that a classifier is surest of
    evaluate.py tokenizer --ckpt=FILE  PSNR, SSIM, LPIPS, rFID and code usage (also: reconstruct-eval)

Exit codes: 0 done, 2 wrong usage or input, 3 weights of a feature network or classifier are missing; torchrun
itself ends with 1 then.
"""
import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dist
from configs.options import make_parser
from evaluation.classify import ClassifySettings, RejectSettings, evaluate_classify, evaluate_reject
from evaluation.pack import PackSettings, StatsSettings, evaluate_pack, evaluate_stats
from evaluation.score import ScoreSettings, evaluate_images
from evaluation.tokenizer import TokenizerSettings, evaluate_tokenizer
from utils.log import one_line_errors, setup_logging


class Command(NamedTuple):
    """A command of this program."""
    settings: type                    # dataclass of its flags
    run: Callable[[Any], str | None]  # settings -> the text that the master prints
    description: str                  # for --help


SCORE = Command(ScoreSettings, evaluate_images, 'Score images against a reference, as the evaluator of ADM.')
TOKENIZER = Command(TokenizerSettings, evaluate_tokenizer,
                    'Rate the reconstructions of a tokenizer, and how it uses its codes.')
COMMANDS = {
    'stats': Command(StatsSettings, evaluate_stats, 'Write the statistics of images, as a reference.'),
    'pack': Command(PackSettings, evaluate_pack, 'Pack a folder of images into one npz.'),
    'classify-eval': Command(ClassifySettings, evaluate_classify, 'Rate images by a classifier.'),
    'reject': Command(RejectSettings, evaluate_reject, 'Rejection sampling by a classifier.'),
    'tokenizer': TOKENIZER,
    'reconstruct-eval': TOKENIZER,
}


def main() -> None:
    """Run the command of the command line; without a command's name, score images."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ('-h', '--help'):
        summary, commands = __doc__.split('\n\n', 1)
        make_parser(ScoreSettings, 'evaluate.py', summary).print_help()
        print(f'\n{commands}')  # noqa: T201
        sys.exit(0 if argv else 2)
    name = argv[0] if argv[0] in COMMANDS else ''
    command = COMMANDS.get(name, SCORE)
    parser = make_parser(command.settings, f'evaluate.py {name}'.strip(), command.description)

    # A misspelt command would be taken for the path of a reference.
    meant = difflib.get_close_matches(argv[0], COMMANDS, n=1, cutoff=0.7)
    if not name and meant and not Path(argv[0]).exists():
        parser.error(f'expected REF or a command, got {argv[0]!r}: the nearest command is {meant[0]}')
    try:
        values = parser.parse(argv[1:] if name else argv)
        settings = command.settings(**values)
    except ValueError as error:
        parser.error(str(error))

    # NCCL cannot exchange tensors on the CPU.
    runs_on_cpu = getattr(settings, 'device', '') == 'cpu'
    dist.initialize(backend='gloo' if runs_on_cpu else None)
    setup_logging(None, dist.is_master())
    text = command.run(settings)
    if text:
        print(text)  # noqa: T201
    dist.finalize()


if __name__ == '__main__':
    with one_line_errors('evaluate.py', exit_code=2):
        main()
