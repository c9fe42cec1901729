"""The cost of a run before it is run. `meter` counts the FLOPs and live bytes of whatever computes; `forecast` lets a
method go through its stages on the meta device and counts them. `python -m cutdiff.plan` is the command line.
"""
