"""Imports all that entry scripts need, once, in the process that `tests.runs.launch` forks runs from."""
import evaluate  # noqa: F401
import evaluation.classify
import evaluation.score
import evaluation.tokenizer  # noqa: F401
import extract  # noqa: F401
import sample  # noqa: F401
import train  # noqa: F401
