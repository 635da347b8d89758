"""Number formats, quantisation and scaled products: FP8 with fine-grained scales, and LogFMT."""
