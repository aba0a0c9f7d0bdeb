"""The run that the README shows: a text recognizer, quantized, corrected, and compared on lines of text that it reads."""
