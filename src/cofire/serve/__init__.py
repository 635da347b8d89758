"""Answers: a trained model generates text, with its latent cache and its own MTP modules as drafters."""
