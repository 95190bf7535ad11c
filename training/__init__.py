"""What `train.py` needs beside its loop: data, models from configs, logs, restarts, faults, distances."""
