"""What `train.py` needs beside the loop: how a run is continued, and what its logs hold."""
