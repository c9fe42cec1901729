"""The files that a run leaves: `images` gives a PNG and the JSON record beside it a name of their own, and writes them
whole or not at all; `parameters` is the text in the PNG; `record` says what made a picture, and which of it determines
the picture, so that none is drawn twice.
"""
