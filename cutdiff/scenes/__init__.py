"""The embedded world: simple captioned scenes that can be rendered truly at every resolution."""
