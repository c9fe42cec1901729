"""The operators around the network. Takes tensors and ints; imports nothing from cutdiff."""
