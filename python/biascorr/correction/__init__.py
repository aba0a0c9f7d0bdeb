"""Bias correction of whole models: simulated quantization, methods, candidates and their scores; the classic interface."""
