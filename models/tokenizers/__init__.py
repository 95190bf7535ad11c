"""Image tokenizers: one file each, over shared convolution blocks (conv.py) and quantizers (quantize.py)."""
