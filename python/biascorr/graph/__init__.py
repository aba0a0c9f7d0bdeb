"""Layers, operations and their roles, channel axes, batch normalizations, matching; the protocols that adapters fulfil."""
