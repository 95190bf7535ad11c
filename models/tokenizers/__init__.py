"""Image tokenizers, a file each, over shared convolutions (conv.py) and quantizers."""
