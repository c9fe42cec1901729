"""The files that a run leaves: `images` writes a PNG with its parameters and the JSON record beside it, whole or not at
all; `record` says what made a picture, and which of it determines the picture, so that none is drawn twice.
"""
