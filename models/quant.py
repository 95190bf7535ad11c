"""`models.quant` of the published code: the multi-scale residual quantizer."""
from models.tokenizers.quantize import Phi, VectorQuantizer2

__all__ = ['Phi', 'VectorQuantizer2']
