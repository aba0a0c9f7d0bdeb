"""Keras models, run by TensorFlow."""
