"""Answers: a trained model generates text, with its latent cache and its own MTP modules as drafters."""

from cofire.serve.batch import Batch
from cofire.serve.cache import KVCache
from cofire.serve.generation import Generation, TextStream, generate, load_tokenizer
from cofire.serve.sampling import SamplingParameters

__all__ = ["Batch", "Generation", "KVCache", "SamplingParameters", "TextStream", "generate", "load_tokenizer"]
