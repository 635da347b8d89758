"""Answers: a trained model generates text, with its latent cache and its own MTP modules as drafters."""

from cofire.serve.batch import Batch
from cofire.serve.cache import KVCache
from cofire.serve.engine import Engine, Request
from cofire.serve.generation import Generation, generate
from cofire.serve.sampling import SamplingParameters
from cofire.serve.text import ChatTemplate, TextStream, load_chat_template, load_tokenizer

__all__ = [
    "Batch",
    "ChatTemplate",
    "Engine",
    "Generation",
    "KVCache",
    "Request",
    "SamplingParameters",
    "TextStream",
    "generate",
    "load_chat_template",
    "load_tokenizer",
]
