"""`models.vqvae` of the published code: the tokenizer of VAR."""
from models.tokenizers.quantize import VectorQuantizer2
from models.tokenizers.vqvae import VQVAE

__all__ = ['VQVAE', 'VectorQuantizer2']
