"""The cost of a run, computed before it is run; `python -m cutdiff.plan` is the command line.

`meter` counts the FLOPs and the live bytes of any computation. `forecast` lets a method go through its stages on the
meta device and counts those.
"""
