"""The parts that command lines share: arguments, files of prompts, which pictures to draw, and drawing them.

Read `arguments` first: flags are made from the fields of the objects that a command line names. `runs` makes of the
arguments the pictures that are missing, and `drawing` draws them one after the other. Nothing is imported from torch
before the arguments are parsed.
"""
