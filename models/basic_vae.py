"""`models.basic_vae` of the published code: encoder and decoder of the tokenizers."""
from models.tokenizers.conv import Decoder, Encoder

__all__ = ['Decoder', 'Encoder']
