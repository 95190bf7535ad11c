"""What `train.py` needs beside its loop: data, models from recipes, logs, restarts, faults, distances."""
