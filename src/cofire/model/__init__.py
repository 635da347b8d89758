"""The mathematics of the model on one device; parallelism is applied from outside."""

from cofire.model.build import build
from cofire.model.decoder import Decoder, DecoderOutput, LossOutput

__all__ = ["Decoder", "DecoderOutput", "LossOutput", "build"]
