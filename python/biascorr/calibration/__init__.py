"""Where samples come from, which of them are held out, and where they and what follows from them are kept."""
