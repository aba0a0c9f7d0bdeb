"""TFLite: models in flatbuffers as networks, run by LiteRT."""
