"""Bias correction of whole models, whatever the framework: layers, the network they are in, how they are corrected."""
