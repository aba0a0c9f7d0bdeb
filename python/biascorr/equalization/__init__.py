"""Equalization: batch normalizations folded, channels scaled between layers, high biases folded; the classic interface."""
