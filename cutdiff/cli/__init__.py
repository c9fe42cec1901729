"""The parts that command lines share: arguments, files of prompts, the pictures of a run, and drawing them.

Read `arguments` first: flags are made from the fields of the objects that a command line names. `runs` turns the
arguments into the pictures that are missing, `drawing` draws them one after the other, and `ending` turns an error into
one line and an exit status. torch is not imported before the arguments are parsed.
"""
